"""No retry storm: three services of three attempts each before a dead dependency send it at most 1.3 calls a request, plain retries 27.

    ./run proof storm [--requests 1000] [--rate 100] [--seed 1] [--leaf refuse,down,hang] [--only amplification,control,errors,breakers]

Each service is a process of its own: FastAPI with `meshkit.fastapi.install`, and a `meshkit.httpx.client` to the next. The dependency
is a port that refuses connections, one that answers 503, or one that accepts and says nothing. Four things are shown:

* amplification: breakers off, at most 1.3 calls a request reach it: a request that was served by the first service. That one
  in two asks it at least is there to see that the chain was whole; fewer than one a request is what it comes to where
  services give up before they ask.
* control: the same handlers with httpx and tenacity send it 27 (a fifth of the requests is enough to see it). Where they do not, this
  proof could not fail, and shows nothing.
* errors: where a tenth of the calls to a living dependency fail by chance, as many requests succeed as with plain retries, but for
  a hundredth.
* breakers: with breakers on only the one next to the dead part opens, and once the dependency is back, the first request succeeds
  within the open period that is going on, and a quarter of a second for its way. Where it hangs, this is shown at 25 requests a second only, unless `--hang-rate` says more.

Exit code 3: it ran to its end, and one of them is not so. The logs of all processes are kept then.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from proofs.storm.process import Broken, Port, Processes

HOPS = ("edge", "a", "b")
MOST = 1.3
# Below this, what the leaf was spared was not spared by retries.
LEAST = 0.5
PLAIN = 27
POINT = 0.01
LEAVES = ("refuse", "down", "hang")
PARTS = ("amplification", "control", "errors", "breakers")
# What the first success may take beside the waiting: until the next request comes (a hundredth of a second, a twenty-fifth
# where it hangs), its way through three services and back, and the answer in which `b` tells what is left. The rest is for
# processes that wait for a core. A success that missed its period is at least a whole `--open-for` late.
SLACK = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How much of what is shown."""

    requests: int
    rate: float
    hang_rate: float
    seed: int
    open_for: float
    leaves: tuple[str, ...]
    parts: tuple[str, ...]
    say: Any


class Chain:
    """Edge, a, b and the leaf, and a client before them."""

    def __init__(
        self, processes: Processes, client: httpx.AsyncClient, ports: dict[str, Port], options: Options
    ) -> None:
        self._processes = processes
        self._client = client
        self._ports = ports
        self._options = options
        self.statuses: Counter[int] = Counter()
        self.unanswered: Counter[str] = Counter()
        self.succeeded = asyncio.Event()
        self.first_success = 0.0

    async def asked(self) -> None:
        """One request of somebody's. One that gets no answer has failed, and ends nothing else."""
        try:
            answer = await self._client.get(self._ports["edge"].url)
        except httpx.TransportError as error:
            self.unanswered[type(error).__name__] += 1
            return
        self.statuses[answer.status_code] += 1
        if answer.status_code == 200 and not self.succeeded.is_set():
            self.first_success = time.monotonic()
            self.succeeded.set()

    async def load(self, requests: int) -> None:
        """So many requests, each at its own time, however long those before it take."""
        began, every = time.monotonic(), 1 / self._options.rate
        async with asyncio.TaskGroup() as people:
            for number in range(requests):
                await asyncio.sleep(max(0.0, began + number * every - time.monotonic()))
                people.create_task(self.asked())
                if number and number % 200 == 0:
                    self._processes.check()
                    self._options.say(f"    {number} requests sent, {self.statuses.total()} answered")

    async def seen(self, name: str) -> Any:
        """What a process tells of itself."""
        self._processes.check()
        return (await self._client.get(f"{self._ports[name].url}/seen")).json()

    async def start_leaf(self, mode: str) -> None:
        """Have the leaf's process listen on its port."""
        arguments = ("--mode", mode, "--seed", str(self._options.seed))
        await self._processes.start("leaf", "proofs.storm.leaf", self._ports["leaf"], *arguments)
        await self.until_ready("leaf")

    async def recover(self, kind: str) -> None:
        """The leaf works again."""
        if kind == "refuse":
            await self.start_leaf("ok")
        else:
            (await self._client.put(f"{self._ports['leaf'].url}/mode/ok")).raise_for_status()

    async def until_ready(self, *names: str) -> None:
        for name in names:
            end = time.monotonic() + 60
            while True:
                try:
                    await self.seen(name)
                    break
                except httpx.TransportError:
                    if time.monotonic() > end:
                        raise Broken(f"{name} did not answer within a minute") from None
                    await asyncio.sleep(0.05)


@asynccontextmanager
async def chain(
    options: Options, logs: Path, what: str, leaf: str, kind: str, breaker: float | None
) -> AsyncIterator[Chain]:
    """All processes of one scenario, ready."""
    folder = logs / what.replace(" ", "-")
    folder.mkdir()
    ports = {name: Port() for name in (*HOPS, "leaf")}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    async with (
        Processes(folder) as processes,
        httpx.AsyncClient(timeout=None, limits=limits, trust_env=False) as client,
    ):
        made = Chain(processes, client, ports, options)
        for name, following in zip(HOPS, (*HOPS[1:], "leaf"), strict=True):
            arguments = ["--name", name, "--target", ports[following].url, "--kind", kind]
            if breaker is not None:
                arguments += ["--breaker", str(breaker)]
            await processes.start(name, "proofs.storm.hop", ports[name], *arguments)
        if leaf != "refuse":
            await made.start_leaf(leaf)
        await made.until_ready(*HOPS)
        yield made
        processes.check()


async def storm(options: Options, logs: Path, what: str, leaf: str, kind: str) -> dict[str, Any]:
    """All requests, breakers off: what reached the leaf, and what came of it."""
    options.say(f"{what}: {options.requests} requests at {options.rate:g}/s, {kind}")
    async with chain(options, logs, what, leaf, kind, None) as made:
        began = time.monotonic()
        await made.load(options.requests)
        seconds = time.monotonic() - began
        seen = {name: await made.seen(name) for name in HOPS}
        sent = {name: seen[name]["sent"] for name in HOPS}
        served = seen["edge"]["served"]
        told: dict[str, Any] = {
            "requests": options.requests,
            "never_served": options.requests - served,
            # Of those that were served: one that never came cannot have asked anybody.
            "calls_a_request": round(sent["b"] / served, 3) if served else 0.0,
            "sent": sent,
        }
        if leaf != "refuse":
            told["seen_by_leaf"] = await made.seen("leaf")
        told["success_rate"] = round(made.statuses[200] / options.requests, 4)
        told["statuses"] = {str(status): count for status, count in sorted(made.statuses.items())}
        told["unanswered"] = dict(made.unanswered)
        told["seconds"] = round(seconds, 1)
    options.say(f"    {told['calls_a_request']} calls a request, success rate {told['success_rate']}")
    if told["never_served"] or told["unanswered"]:
        options.say(
            f"    {told['never_served']} requests never reached the edge; without an answer: {told['unanswered']}"
        )
    return told


async def outage(options: Options, logs: Path, leaf: str) -> dict[str, Any]:
    """Breakers on: which of them open, and when the first request succeeds after the leaf is back."""
    what = f"breakers {leaf}"
    options.say(f"{what}: {options.requests} requests at {options.rate:g}/s, then the leaf comes back")
    async with chain(options, logs, what, leaf, "meshkit", options.open_for) as made:
        await made.load(options.requests)
        during = {name: await made.seen(name) for name in HOPS}
        # Requests go on coming. The leaf comes back in the middle of an open period, so that it is known which one.
        people = asyncio.create_task(_go_on(made, options.rate))
        try:
            async with asyncio.timeout(120):
                while True:
                    wait = (await made.seen("b"))["retry_after"]
                    if wait is not None and wait >= options.open_for / 4:
                        break
                    await asyncio.sleep(0.02)
            early = made.statuses[200]
            await made.recover(leaf)
            back = time.monotonic()
            left = (await made.seen("b"))["retry_after"]
            async with asyncio.timeout(120):
                await made.succeeded.wait()
        finally:
            people.cancel()
            (ended,) = await asyncio.gather(people, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended
        before = made.statuses[200]
        await made.load(20)
        after = {name: await made.seen(name) for name in HOPS}
        told = {
            "requests": options.requests,
            "rate": options.rate,
            "sent": {name: during[name]["sent"] for name in HOPS},
            "opened": [name for name in HOPS if any(change["to"] == "open" for change in after[name]["changes"])],
            "times_opened": sum(change["to"] == "open" for change in after["b"]["changes"]),
            "open_period_left": 0.0 if left is None else round(left, 3),
            "first_success_after": round(made.first_success - back, 3),
            "succeeded_before": early,
            "succeed_afterwards": made.statuses[200] - before,
            "unanswered": dict(made.unanswered),
        }
        told["late"] = round(told["first_success_after"] - told["open_period_left"], 3)
    options.say(
        f"    opened: {', '.join(told['opened'])}; first success {told['first_success_after']} s after the leaf was back, "
        f"{told['open_period_left']} s of the open period were left: {told['late']} s late, where {SLACK} s are allowed"
    )
    if told["unanswered"]:
        options.say(f"    without an answer: {told['unanswered']}")
    return told


async def _go_on(made: Chain, rate: float) -> None:
    async with asyncio.TaskGroup() as people:
        while True:
            people.create_task(made.asked())
            await asyncio.sleep(1 / rate)


def _slower(options: Options, leaf: str) -> Options:
    """Before a dependency that hangs, each service gives up a twentieth of its caller's time before the caller does: 0.25 s
    of 5 s. Where a process waits longer than that for a core, callers give up first, and their breakers count it. So this
    runs at a rate at which a small machine that others use too keeps up; `--hang-rate` takes the full one."""
    if leaf != "hang":
        return options
    share = min(1.0, options.hang_rate / options.rate)
    return replace(options, requests=max(50, round(options.requests * share)), rate=options.rate * share)


async def run(options: Options, logs: Path) -> dict[str, Any]:
    """Each part in turn; what is not shown is in `wrong`."""
    summary: dict[str, Any] = {
        "proof": "storm",
        "seed": options.seed,
        "requests": options.requests,
        "rate": options.rate,
        "open_for": options.open_for,
        "slack": SLACK,
    }
    wrong: list[str] = []

    def hold(claim: bool, says: str) -> None:
        if not claim:
            wrong.append(says)
            options.say(f"    WRONG: {says}")

    if "amplification" in options.parts:
        found = summary["amplification"] = {}
        for leaf in options.leaves:
            told = found[leaf] = await storm(options, logs, f"amplification {leaf}", leaf, "meshkit")
            calls = told["calls_a_request"]
            hold(calls <= MOST, f"{leaf}: {calls} calls a request reach it, more than {MOST}")
            asked = told["sent"]["b"] / options.requests
            hold(asked >= LEAST, f"{leaf}: {asked:.2f} calls a request sent reach it; below {LEAST} nothing is shown")
            if leaf != "refuse":
                hold(told["seen_by_leaf"] == told["sent"]["b"], f"{leaf}: the leaf has not counted what was sent")
    if "control" in options.parts:
        found = summary["control"] = {}
        # What a request multiplies to does not hang on how many there are, and these cost 40 calls each. To one that
        # hangs, nobody makes a second attempt without a limit of time.
        fewer = replace(options, requests=max(50, options.requests // 5))
        for leaf in options.leaves:
            if leaf != "hang":
                told = found[leaf] = await storm(fewer, logs, f"control {leaf}", leaf, "plain")
                calls = told["calls_a_request"]
                hold(round(calls) == PLAIN, f"{leaf}: plain retries send {calls} calls a request, not {PLAIN}")
    if "errors" in options.parts:
        plain = await storm(options, logs, "errors plain", "flaky", "plain")
        ours = await storm(options, logs, "errors meshkit", "flaky", "meshkit")
        summary["errors"] = {"plain": plain, "meshkit": ours}
        less = plain["success_rate"] - ours["success_rate"]
        hold(
            round(less, 4) <= POINT,
            f"with 10 % errors {ours['success_rate']} succeed, with plain retries {plain['success_rate']}",
        )
    if "breakers" in options.parts:
        found = summary["breakers"] = {}
        for leaf in options.leaves:
            told = found[leaf] = await outage(_slower(options, leaf), logs, leaf)
            hold(told["opened"] == ["b"], f"{leaf}: the breakers of {', '.join(told['opened']) or 'none'} opened")
            hold(not told["succeeded_before"], f"{leaf}: requests succeeded before the leaf was back")
            hold(
                told["succeed_afterwards"] == 20,
                f"{leaf}: only {told['succeed_afterwards']} of 20 succeed after the first",
            )
            late = told["late"]
            hold(late <= SLACK, f"{leaf}: the first success came {late:.2f} s after the open period was over")
    summary["wrong"] = wrong
    return summary


def _within(error: Exception) -> Iterator[str]:
    """What has gone wrong: of a group, all that is in it."""
    if isinstance(error, ExceptionGroup):
        for each in error.exceptions:
            yield from _within(each)
    else:
        yield f"{type(error).__name__}: {error}".removesuffix(": ")


def _listed(known: tuple[str, ...], text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(text.split(",")))
    for word in found:
        if word not in known:
            raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    parser.add_argument("--hang-rate", type=float, default=25.0, help="the same with breakers, where the leaf hangs")
    parser.add_argument("--seed", type=int, default=1, help="which calls to the living dependency fail")
    parser.add_argument("--open-for", type=float, default=2.0, help="seconds a breaker stays open at first")
    parser.add_argument("--leaf", type=partial(_listed, LEAVES), default=LEAVES, help=f"of {','.join(LEAVES)}")
    parser.add_argument("--only", type=partial(_listed, PARTS), default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--json", action="store_true", help="only the summary on stdout, what goes on to stderr")
    given = parser.parse_args()
    if (
        given.requests < 50
        or not 0 < given.rate <= 10_000
        or not given.open_for >= 2 * SLACK
        or not given.hang_rate > 0
    ):
        parser.error(
            "--requests is 50 or more, so that a breaker has something to judge; --rate and --hang-rate are above 0; "
            f"--open-for is {2 * SLACK:g} or more, so that a period that was missed can be told from a slow machine"
        )
    options = Options(
        requests=given.requests,
        rate=given.rate,
        hang_rate=given.hang_rate,
        seed=given.seed,
        open_for=given.open_for,
        leaves=given.leaf,
        parts=given.only,
        say=partial(print, file=sys.stderr if given.json else sys.stdout, flush=True),
    )
    # A SIGTERM ends it in order too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    logs = Path(tempfile.mkdtemp(prefix="meshkit-storm-"))
    code = 1
    try:
        summary = asyncio.run(run(options, logs))
        code = 3 if summary["wrong"] else 0
    except KeyboardInterrupt:
        code = 130
    except (Broken, httpx.HTTPError, ExceptionGroup, TimeoutError) as error:
        for each, times in Counter(_within(error)).items():
            print(f"storm: broke off: {each}" + (f" ({times} times)" if times > 1 else ""), file=sys.stderr)
    else:
        print(json.dumps(summary))
    finally:
        if code in (0, 130):
            with contextlib.suppress(OSError):
                shutil.rmtree(logs)
        else:
            print(f"storm: the logs are in {logs}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
