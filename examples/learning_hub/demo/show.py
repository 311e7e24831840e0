"""The five acts, told in plain lines as they happen, and the summary that says whether the story holds."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import httpx
from sqlalchemy.exc import SQLAlchemyError

from learning_hub.demo import books
from learning_hub.demo.broker import DEAD_LETTER_QUEUES, CannotStart, broker
from learning_hub.demo.driver import Driver
from learning_hub.demo.platform import Platform, ServiceError, until, working_folder
from meshkit import MeshkitError
from meshkit.embedded.otlp import OtlpReceiver, SpanRecord
from meshkit.embedded.story import orphans, roots, services, waterfall
from meshkit.rabbitmq.dead_letters import DeadLetterRecord, DeadLetters

__all__ = ["BREAKS_OFF", "CannotStart", "CannotTell", "Show", "StoryBroken", "broken_off", "show", "stage", "tell"]

PAYMENTS = "payment-service.enrollment-requested"
PROVIDER, OURS = "payment-provider", "payment-service"


class StoryBroken(Exception):
    """The acts did not come to what they should; the text says at which point."""


class CannotTell(Exception):
    """What there is to say cannot be written: the disk is full, say. A reader who has gone is a BrokenPipeError."""


# What ends the acts early: the hub does not do what it should, or broker, partner or database have gone for good.
BREAKS_OFF = (StoryBroken, ServiceError, MeshkitError, httpx.HTTPError, SQLAlchemyError, TimeoutError)


def broken_off(error: BaseException) -> str:
    """One line for what ended the acts early."""
    return f"the story broke off: {' '.join(str(error).split()) or type(error).__name__}"


def tell(line: str, to: TextIO) -> None:
    """Print a line at once.

    Raises:
        CannotTell: it cannot be written.
        BrokenPipeError: nobody reads any more.
    """
    try:
        print(line, file=to, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CannotTell(f"cannot write to {to.name.strip('<>')}: {error.strerror or error}") from error


async def show(options: argparse.Namespace) -> int:
    """Run the demo as its command line asks, and return the exit code."""
    tale: TextIO = sys.stderr if options.json else sys.stdout
    # Without a terminal there is nobody who could press a key.
    stays = not options.once and sys.stdin is not None and sys.stdin.isatty()
    async with stage(options.broker, otlp=options.otlp, keep=options.keep, tale=tale) as play:
        try:
            await play.acts()
            if not stays:
                await play.platform.stop()
            await play.last_flush()
            summary, problems = await play.summary()
            play.draw()
        except BREAKS_OFF as error:
            play.say("")
            play.say(broken_off(error))
            play.show_logs()
            return 1
        play.close_the_books(summary)
        if options.json:
            tell(json.dumps(summary), sys.stdout)
        for problem in problems:
            print(f"demo: {problem}", file=sys.stderr)
        if stays:
            play.say_where_everything_is()
            await _key()
    if play.receiver.not_forwarded:
        print(
            f"demo: {play.receiver.not_forwarded} spans could not be sent on: {play.receiver.forward_error}",
            file=sys.stderr,
        )
        return 1
    return 1 if problems else 0


@contextlib.asynccontextmanager
async def stage(
    broker_choice: str = "embedded",
    *,
    otlp: str | None = None,
    keep: Path | None = None,
    tale: TextIO,
    seed: int = 1,
    **platform: Any,
) -> AsyncIterator[Show]:
    """Everything the acts need, up and ready: folder, broker, receiver of traces, services.

    Raises:
        CannotStart: something the user asked for is not to be had.
    """
    started = time.monotonic()
    if otlp is not None:
        await _reachable(otlp)
    if keep is not None:
        keep = _empty(keep)
    async with contextlib.AsyncExitStack() as all_of_it:
        folder = await all_of_it.enter_async_context(working_folder(keep))
        name, url = await all_of_it.enter_async_context(broker(broker_choice))
        try:
            receiver = OtlpReceiver(forward_to=otlp, record_to=folder / "traces" if keep else None)
        except ValueError as error:
            raise CannotStart(f"--otlp: {error}") from error
        await all_of_it.enter_async_context(receiver)
        play = Show(name, url, receiver, tale, started)
        play.say(f"learning hub: five services and a payment provider on the {name} broker, in {folder}")
        try:
            play.platform = await all_of_it.enter_async_context(
                Platform(folder, amqp_url=url, otlp_url=receiver.url, temporary=keep is None, say=play.say, **platform)
            )
        except ServiceError as error:
            raise CannotStart(str(error)) from error
        play.driver = Driver(play.platform, seed=seed)
        play.say("all of them are ready")
        yield play


@dataclass(slots=True)
class Show:
    """The acts, on a platform that is up. What they find goes into the summary."""

    broker: str
    amqp_url: str
    receiver: OtlpReceiver
    tale: TextIO
    started: float
    # Where things are killed on purpose, all takes longer.
    patience: float = 1.0
    platform: Platform = field(init=False)
    driver: Driver = field(init=False)
    outage_dead_letters: int = 0
    dead_lettered: int = 0
    replayed: int = 0
    story: DeadLetterRecord | None = None
    replay_trace_id: str = ""
    # The provider's own figures: how often it was asked for a charge, how often under a key it had had, what it charged.
    asked: int = 0
    repeated: int = 0
    charges: int = 0
    # Counters of /metrics by process, since each starts at 0: (service, process id) → what is counted → value.
    counted: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)

    # -- telling ------------------------------------------------------------------------------------------------------

    def say(self, line: str) -> None:
        """One line of the tale, with the seconds since it began."""
        for part in line.splitlines() or [""]:
            tell(f"{time.monotonic() - self.started:6.1f}  {part}".rstrip(), self.tale)

    def act(self, number: int, title: str) -> None:
        bold, plain = ("\033[1m", "\033[0m") if self._colour else ("", "")
        tell(f"\n{bold}Act {number}: {title}{plain}", self.tale)

    @property
    def _colour(self) -> bool:
        return self.tale.isatty() and "NO_COLOR" not in os.environ

    # -- the acts -----------------------------------------------------------------------------------------------------

    async def acts(self) -> None:
        """All five, one after the other."""
        await self.normal_traffic()
        await self.outage()
        await self.defect()
        await self.replay()
        await self.all_ended()

    async def normal_traffic(self, *, users: int = 8, enrollments: int = 24) -> None:
        self.act(1, "normal traffic")
        told = self.driver.told
        await self.driver.create(users)
        self.say(
            f"{len(told.users)} users and {len(told.courses)} courses; course-service knows the users by their events"
        )
        await self.driver.enroll(enrollments, declined=enrollments // 8)
        self.say(f"{len(told.enrollments)} enrollments accepted over HTTP")
        now = await self.settled()
        self.say(f"{self._ended(now)}; whoever's card was refused has been told, and is enrolled no longer")

    async def outage(self, *, enrollments: int = 24, least: float = 6.0) -> None:
        self.act(2, "an outage of the payment provider")
        told, before = self.driver.told, len(self.driver.told.enrollments)
        began = time.monotonic()
        await self.driver.provider("busy", seconds=1)
        self.say("the provider is overloaded: 429, Retry-After: 1 … and now it fails: 503 to everything")
        people = asyncio.create_task(self.driver.enroll(enrollments, every=0.15))
        try:
            await asyncio.sleep(0.3)
            await self.driver.provider("fail")
            await self._until(lambda: self._breaker("open"), "the breaker has opened", within=30)
            self.say('calls are retried, then the breaker "payment-provider" opens: nobody waits for a dead partner')
            await self._until(self._paused, "the consumer has paused", within=30)
            self.say(
                f"the consumer of {PAYMENTS} pauses, and fetches one message at a time to see whether it may go on"
            )
            await people
            # Long enough that the consumer has been seen to probe.
            await asyncio.sleep(max(0.0, began + least - time.monotonic()))
        finally:
            people.cancel()
            await asyncio.gather(people, return_exceptions=True)
        self.say(
            f"{len(told.enrollments) - before} more enrollments accepted meanwhile, "
            f'{told.pending} of them told "enrollment pending" (degraded)'
        )
        await self.driver.provider("ok")
        repaired = time.monotonic()
        self.say(f"the provider is repaired after {repaired - began:.1f} s")
        self.say(
            f"by its own book it was asked for a charge only {await self.driver.asked('fail')} times while it failed"
        )
        now = await self.settled()
        self.outage_dead_letters = await self.dead_letters()
        self.say(f"all caught up {time.monotonic() - repaired:.1f} s later: {self._ended(now)}")
        self.say(f"dead letters of the outage: {self.outage_dead_letters}")

    async def defect(self, *, enrollments: int = 18) -> None:
        self.act(3, "a defect")
        await self._count()
        self.say("release 1.1.0 of payment-service is rolled out: it understands coupons")
        await self.platform.roll_out(OURS, LEARNING_HUB_RELEASE="1.1.0")
        coupons = ("", "WELCOME10", "SPRING5")
        await self.driver.enroll(enrollments, coupons=coupons)
        choking = {id_ for id_, coupon in self.driver.told.coupons.items() if coupon == "SPRING5"}
        self.say(f"{enrollments} enrollments accepted, {len(choking)} of them with a coupon that it chokes on")

        async def all_dead() -> bool:
            return await self.dead_letters() >= len(choking)

        await self._until(all_dead, "what fails for good is in the dead-letter queue", within=60)
        self.dead_lettered = await self.dead_letters()
        async with DeadLetters(self.amqp_url) as letters:
            records, _ = await letters.read(f"{PAYMENTS}.dlq")
        self.story = next((record for record in records if b"SPRING5" in record.body), records[0])
        self.say(
            f"{self.dead_lettered} dead letters after {self.story.attempt} attempts each; the others were not held up"
        )
        self.say(f"the oldest: {self.story.error_type}: {self.story.error_message}")
        for line in self.story.stack.rstrip().splitlines()[-4:]:
            self.say(f"    {line.strip()}")

    async def replay(self) -> None:
        self.act(4, "mended, and replayed")
        await self._count()
        await self.platform.roll_out(OURS, LEARNING_HUB_RELEASE="1.1.1")
        self.say("release 1.1.1 is rolled out; the dead letters, by cause:")
        await self._meshkit("dlq", "list", PAYMENTS)
        if self.story is None:
            return
        self.say("first one of them, to see that it is mended:")
        first = await self._replayed("--id", self.story.message_id)
        self.replay_trace_id = first["trace_id"]
        mine = json.loads(self.story.body)["enrollment_id"]

        async def through() -> bool:
            return (await books.read(self.platform, self.driver.told)).states.get(mine) == "completed"

        await self._until(through, "the replayed enrollment is completed", within=30)
        self.say(f"enrollment {mine} is completed; now the rest:")
        if await self.dead_letters():
            await self._replayed()

    async def all_ended(self) -> None:
        self.act(5, "every enrollment has come to an end")
        now = await self.settled()
        self.say(self._ended(now))

    # -- looking ------------------------------------------------------------------------------------------------------

    async def settled(self, *, within: float = 60.0) -> books.Books:
        """Wait until all that was accepted has come to everything it should have, and nothing is under way."""
        seen: books.Books | None = None

        async def done() -> bool:
            nonlocal seen
            await self._count()
            seen = await books.read(self.platform, self.driver.told)
            return not books.lost(self.driver.told, seen)

        await self._until(
            done, "everything that was accepted has come to its end", within=within, every=0.3, strict=False
        )
        assert seen is not None
        return seen

    async def dead_letters(self) -> int:
        """How many there are, in all dead-letter queues of the hub."""
        async with DeadLetters(self.amqp_url) as letters:
            return sum(found.depth for found in await letters.depths(DEAD_LETTER_QUEUES))

    def _ended(self, now: books.Books) -> str:
        states = list(now.states.values())
        return (
            f"{len(states)} enrollments: {states.count('completed')} completed, "
            f"{states.count('compensated')} compensated, {states.count('pending')} pending"
        )

    async def _until(
        self,
        true: Callable[[], Awaitable[bool]],
        what: str,
        *,
        within: float,
        every: float = 0.1,
        strict: bool = True,
    ) -> None:
        if not await until(true, within=within * self.patience, every=every) and strict:
            raise StoryBroken(f"within {within:.0f} s it did not come to this: {what}")

    async def _breaker(self, state: str) -> bool:
        return any(
            labels.get("breaker") == PROVIDER and labels.get("state") == state and value == 1
            for labels, value in await self._samples(OURS, "meshkit_circuitbreaker_state")
        )

    async def _paused(self) -> bool:
        return any(
            labels.get("queue") == PAYMENTS and value == 1
            for labels, value in await self._samples(OURS, "meshkit_consumer_paused")
        )

    async def _count(self) -> None:
        """Note the counters that the summary adds up, of each process while it lives."""
        for name in self.platform.databases:
            process = self.platform.processes[name].running
            samples = await self._samples(name)
            if process is None or not samples:
                continue
            self.counted[name, process.pid] = {
                "retries": sum(
                    v for m, _, v in samples if m in ("meshkit_retries_total", "meshkit_message_retries_total")
                ),
                "duplicates": sum(value for metric, _, value in samples if metric == "meshkit_inbox_duplicates_total"),
                "opened": sum(
                    v
                    for m, labels, v in samples
                    if m == "meshkit_circuitbreaker_transitions_total" and labels.get("to_state") == "open"
                ),
            }

    async def _samples(self, service: str, metric: str = "") -> list[Any]:
        """The samples of a service's /metrics: of one metric (labels, value), or of all (name, labels, value)."""
        try:
            page = (await self.platform.http.get(self.platform.url(service) + "/metrics")).text
        except httpx.TransportError:
            return []
        found = []
        for line in page.splitlines():
            if match := re.fullmatch(r"(\w+)(?:\{(.*)\})? ([-+.\deEInfNa]+)(?: .*)?", line):
                labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', match[2] or ""))
                found.append((match[1], labels, float(match[3])))
        return [(labels, value) for name, labels, value in found if name == metric] if metric else found

    # -- the operator's own tool ----------------------------------------------------------------------------------------

    async def _replayed(self, *selection: str) -> dict[str, Any]:
        out = await self._meshkit("dlq", "replay", PAYMENTS, "--yes", "--json", *selection)
        receipt: dict[str, Any] = json.loads(out.splitlines()[-1])
        self.replayed += len(receipt["replayed"])
        self.say(f"{len(receipt['replayed'])} replayed, {receipt['left']} left in {receipt['queue']}")
        return receipt

    async def _meshkit(self, *words: str) -> str:
        """Run `meshkit …` as an operator would, tell what it prints, and return its stdout."""
        self.say(f"$ meshkit {' '.join(words)}")
        code, out, err = await self.platform.run_tool("-c", "from meshkit.cli import main; main()", *words)
        if code not in (0, 3):
            raise StoryBroken(f"`meshkit {' '.join(words)}` ended with exit code {code}: {err.strip()}")
        for line in err.splitlines() if "--json" in words else out.splitlines():
            self.say(f"  {line}")
        return out

    # -- the end ------------------------------------------------------------------------------------------------------

    async def last_flush(self) -> None:
        """Wait until no more spans arrive."""
        known = -1

        def quiet() -> bool:
            nonlocal known
            before, known = known, len(self.receiver.spans())
            return before == known

        await until(quiet, within=10, every=0.6)

    async def summary(self) -> tuple[dict[str, Any], list[str]]:
        """The summary, and what is wrong with it, in words."""
        told = self.driver.told
        now = await books.read(self.platform, told)
        states = list(now.states.values())
        story, replay = self._story_spans(), self._replay_spans()
        missing, twice = books.lost(told, now), books.doubled(told, now)
        summary: dict[str, Any] = {
            "broker": self.broker,
            "enrollments_accepted": len(told.enrollments),
            "enrollments_completed": states.count("completed"),
            "enrollments_compensated": states.count("compensated"),
            "lost": len(missing),
            "double_effects": len(twice),
            "retries": int(sum(process["retries"] for process in self.counted.values())),
            "breaker_opened": int(sum(process["opened"] for process in self.counted.values())),
            "outage_dead_letters": self.outage_dead_letters,
            "dead_lettered": self.dead_lettered,
            "replayed": self.replayed,
            "left_in_dlq": await self.dead_letters(),
            "story_trace_id": self.story.trace_id if self.story else "",
            "story_replay_trace_id": self.replay_trace_id,
            "story_services": services(story),
            "story_spans": len(story),
            "seconds": round(time.monotonic() - self.started, 1),
        }
        ended = summary["enrollments_completed"] + summary["enrollments_compensated"]
        holds = {
            **{f"lost: {id_}: {', '.join(what)}": False for id_, what in list(missing.items())[:10]},
            **{f"twice: {id_}: {', '.join(what)}": False for id_, what in list(twice.items())[:10]},
            f"{summary['enrollments_accepted']} enrollments accepted, {ended} ended": 0
            < summary["enrollments_accepted"]
            == ended,
            "the breaker never opened": summary["breaker_opened"] >= 1,
            "nothing was retried": summary["retries"] >= 1,
            f"the outage cost {self.outage_dead_letters} dead letters": self.outage_dead_letters == 0,
            "no dead letter came of the defect": self.dead_lettered > 0,
            f"{self.dead_lettered} dead letters, {self.replayed} replayed": self.dead_lettered == self.replayed,
            f"{summary['left_in_dlq']} left in the dead-letter queues": summary["left_in_dlq"] == 0,
            f"the story has only the services {summary['story_services']}": len(summary["story_services"]) >= 4,
            f"the story has {len(roots(story))} roots": len(roots(story)) == 1,
            f"{len(orphans(story))} spans of the story have lost their parent": not orphans(story),
            "the replay is not linked to the story": any(
                link.trace_id == summary["story_trace_id"] for span in replay for link in span.links
            ),
        }
        self.asked = sum(len(lines) for lines in now.requests.values())
        self.repeated = now.repeated
        self.charges = sum(len(lines) for lines in now.charges.values())
        return summary, [problem for problem, fine in holds.items() if not fine]

    def _story_spans(self) -> list[SpanRecord]:
        return self.receiver.trace(self.story.trace_id) if self.story else []

    def _replay_spans(self) -> list[SpanRecord]:
        return self.receiver.trace(self.replay_trace_id) if self.replay_trace_id else []

    def draw(self) -> None:
        """The story of one enrollment, with the replay of it below."""
        picture = waterfall(
            self._story_spans(),
            replay=self._replay_spans(),
            width=min(shutil.get_terminal_size((120, 40)).columns, 160),
            color=self._colour,
            encoding=self.tale.encoding or "utf-8",
        )
        tell(f"\n{picture}", self.tale)

    def close_the_books(self, summary: dict[str, Any]) -> None:
        """The figures, for people."""
        s = summary
        for line in (
            f"{s['enrollments_accepted']} enrollments accepted = {s['enrollments_completed']} completed "
            f"+ {s['enrollments_compensated']} compensated",
            f"lost {s['lost']}, taken effect twice {s['double_effects']} (by the driver's, the services' and the provider's books)",
            f"the provider was asked for a charge {self.asked} times, {self.repeated} of them again under a key it knew, "
            f"and charged {self.charges} times",
            f"{s['retries']} retries, breaker opened {s['breaker_opened']} times, dead letters of the outage: "
            f"{s['outage_dead_letters']}",
            f"{s['dead_lettered']} dead letters of the defect, {s['replayed']} replayed, {s['left_in_dlq']} left",
            f"one story: {s['story_spans']} spans of {len(s['story_services'])} services, trace {s['story_trace_id']}",
        ):
            self.say(line)

    def show_logs(self) -> None:
        """What the services last complained about."""
        for process in self.platform.processes.values():
            lines = process.log.read_text(errors="replace").splitlines() if process.log.exists() else []
            for line in lines[-5:]:
                self.say(f"{process.name}: {line[:300]}")

    def say_where_everything_is(self) -> None:
        self.say("")
        self.say("it all goes on running; Enter or Ctrl-C ends it and takes everything away")
        for process in self.platform.processes.values():
            self.say(f"  {process.url}  {process.name}")
        self.say(
            f"  break it again:  curl -X PUT {self.platform.url(PROVIDER)}/mode -H 'content-type: application/json' "
            """-d '{"behaviour": "fail"}'"""
        )
        self.say(f"  look yourself:   .venv/bin/meshkit dlq list {PAYMENTS} --url {self.amqp_url}")


async def _key() -> None:
    """Until Enter, or until there is nobody any more who could press it."""
    pressed = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, pressed.set)
    try:
        await pressed.wait()
    finally:
        loop.remove_reader(sys.stdin)


async def _reachable(otlp: str) -> None:
    try:
        parts = urlsplit(otlp)
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise CannotStart(
            f"--otlp is the base of an OTLP/HTTP endpoint, http://localhost:4318, not {otlp!r}"
        ) from error
    if parts.scheme not in ("http", "https") or not host:
        raise CannotStart(f"--otlp is the base of an OTLP/HTTP endpoint, http://localhost:4318, not {otlp!r}")
    try:
        async with asyncio.timeout(5):
            _, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        reason = error.strerror or str(error) or "no answer"
        raise CannotStart(f"nothing answers at --otlp {host}:{port} ({reason})") from error
    except ValueError as error:
        # No name for a host: `http://a..b`.
        raise CannotStart(f"--otlp: {host!r} is no host ({error})") from error
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _empty(folder: Path) -> Path:
    """The folder, made and found empty; as a full path, since the services run in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CannotStart(f"--keep takes an empty folder, and {folder} is not")
    except OSError as error:
        raise CannotStart(f"--keep {folder}: {error.strerror or error}") from error
    return folder.resolve()
