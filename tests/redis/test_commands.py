"""`meshkit breaker …` as an operator runs it: a process of its own, against a real Redis."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import redis

from meshkit import CircuitBreaker, SharedState
from meshkit.cli.app import run
from meshkit.redis import BreakerStore
from meshkit.testing import servers

pytestmark = [pytest.mark.real("redis")]


@dataclass(frozen=True, slots=True)
class Ran:
    code: int
    out: str
    err: str


async def meshkit(*words: str, before: str = "", **environment: str) -> Ran:
    """The installed command, with nothing in its environment but what is given, and no terminal."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", f"{before}from meshkit.cli import main; main()", "breaker", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


@dataclass(frozen=True, slots=True)
class Fleet:
    """A process of the fleet, which is this one, and how an operator names its store."""

    shared: SharedState
    breaker: CircuitBreaker
    environment: dict[str, str]

    async def run(self, *words: str) -> Ran:
        return await meshkit(*words, **self.environment)

    async def rows(self) -> dict[str, Any]:
        return {row["name"]: row for row in json.loads((await self.run("list", "--json")).out)}


@pytest.fixture
def fleet(redis_server: servers.Redis) -> Iterator[Fleet]:
    prefix, name = uuid.uuid4().hex, f"payments-{uuid.uuid4().hex[:6]}"
    breaker = CircuitBreaker(name)
    store = BreakerStore(redis_server.url, prefix=prefix)
    shared = SharedState(lambda wanted: store(wanted) if wanted.startswith(name) else None)
    yield Fleet(shared, breaker, {"MESHKIT_REDIS_URL": redis_server.url, "MESHKIT_BREAKER_PREFIX": prefix})
    store.close()


async def test_forced_open_seen_and_released(fleet: Fleet) -> None:
    """An operator forces a breaker open for ten minutes, sees it in the list, and releases it."""
    name = fleet.breaker.name
    await fleet.shared.refresh()
    listed = await fleet.run("list")
    assert (0, "") == (listed.code, listed.err)
    assert [name, "closed", "0"] == listed.out.splitlines()[1].split()
    done = await fleet.run("force-open", name, "--for", "10m", "--reason", "INC-42", "--by", "alice")
    assert (0, f"{name!r} is forced open for 10m. Processes that follow this store do it within seconds.\n") == (
        done.code,
        done.out,
    )
    await fleet.shared.refresh()
    assert "open" == fleet.breaker.state
    listed = await fleet.run("list")
    assert 3 == listed.code
    assert listed.out.splitlines()[1].endswith("10m left, by alice, INC-42")
    row = (await fleet.rows())[name]
    assert ("open", True, "INC-42") == (row["state"], row["forced_open"], row["switch"]["reason"])
    done = await fleet.run("release", name)
    assert (0, f"{name!r} is released. Processes that follow this store do it within seconds.\n") == (
        done.code,
        done.out,
    )
    await fleet.shared.refresh()
    assert "closed" == fleet.breaker.state
    assert [name, "closed", "0", "released"] == (await fleet.run("list")).out.splitlines()[1].split()


async def test_one_whose_time_is_over_was_not_released(fleet: Fleet) -> None:
    """A switch that ended by itself is listed as expired, and what was planned upon it says the same."""
    name = fleet.breaker.name
    await fleet.shared.refresh()
    await fleet.shared.force_open(name, seconds=0.001, by="alice")
    await asyncio.sleep(0.01)
    listed = await fleet.run("list")
    assert (0, "expired") == (listed.code, listed.out.splitlines()[1].split()[-1])
    planned = await fleet.run("release", name, "--dry-run")
    assert f"plan: {name!r} would be released; as it stands: expired, by alice\n" == planned.err


async def test_without_a_time_it_stays_until_released(fleet: Fleet) -> None:
    """Without `--for` the breaker is isolated, and `--json` says what was written."""
    await fleet.shared.refresh()
    done = await fleet.run("force-open", fleet.breaker.name, "--json")
    said = json.loads(done.out)
    assert (0, True, None) == (done.code, said["written"], said["switch"]["until"])
    assert "@" in said["switch"]["by"]
    await fleet.shared.refresh()
    assert "isolated" == fleet.breaker.state


async def test_a_dry_run_changes_nothing(fleet: Fleet) -> None:
    """With `--dry-run` the plan is said, and the store stays as it is."""
    name = fleet.breaker.name
    await fleet.shared.refresh()
    planned = await fleet.run("force-open", name, "--for", "90s", "--dry-run")
    assert (0, "") == (planned.code, planned.out)
    assert f"plan: {name!r} would be forced open for 90s; as it stands: nothing was said yet\n" == planned.err
    planned = await fleet.run("release", name, "--dry-run", "--json")
    assert {"breaker": name, "switch": None, "written": False} == json.loads(planned.out)
    await fleet.shared.refresh()
    assert "closed" == fleet.breaker.state


async def test_a_name_that_no_process_has_is_stopped(fleet: Fleet) -> None:
    """A misspelt name ends with 4 and the name that was meant, with `--json` too; `--anyway` writes it all the same."""
    name = fleet.breaker.name
    await fleet.shared.refresh()
    for words in (("force-open", f"{name}s"), ("release", f"{name}s"), ("force-open", f"{name}s", "--dry-run")):
        stopped = await fleet.run(*words)
        assert (4, "") == (stopped.code, stopped.out)
        assert f"did you mean {name!r}?" in stopped.err
        stopped = await fleet.run(*words, "--json")
        told = {"breaker": f"{name}s", "switch": None, "written": False, "known": False, "near": [name]}
        assert (4, told) == (stopped.code, json.loads(stopped.out))
    assert [name] == list(await fleet.rows())
    assert 0 == (await fleet.run("force-open", f"{name}s", "--anyway")).code
    assert {name, f"{name}s"} == set(await fleet.rows())


async def test_what_is_no_switch_is_shown_as_such(fleet: Fleet, redis_server: servers.Redis) -> None:
    """A switch that something else has written over is shown, and can be replaced; control characters do nothing."""
    name = fleet.breaker.name
    await fleet.shared.refresh()
    store = BreakerStore(redis_server.url, prefix=fleet.environment["MESHKIT_BREAKER_PREFIX"])
    store(f"{name}:switch").state = "\x1b[2Jnonsense"
    store.close()
    listed = await fleet.run("list")
    assert 0 == listed.code
    assert "nonsense' is no switch" in listed.out
    assert "\x1b" not in listed.out
    assert 0 == (await fleet.run("force-open", name, "--reason", "\x1b[2J")).code
    listed = await fleet.run("list")
    assert 3 == listed.code
    assert "\x1b" not in listed.out


async def test_an_odd_key_hides_no_other_breaker(fleet: Fleet, redis_server: servers.Redis) -> None:
    """What cannot be read of one breaker is shown as unreadable with the reason: its own switch still counts, the other
    breakers are listed as they are, and `--json` is JSON."""
    name, prefix = fleet.breaker.name, fleet.environment["MESHKIT_BREAKER_PREFIX"]
    await fleet.shared.refresh()
    client = redis.Redis.from_url(redis_server.url)

    def key(breaker: str, value: str) -> str:
        return f"{prefix}:{breaker}:pybreaker:{value}"

    try:
        odd = {
            "late": ("opened_at", "9" * 14, "opened_at unreadable: year"),
            "later": ("opened_at", "9" * 26, "opened_at unreadable: timestamp out of range"),
            "many": ("fail_counter", "lots", "failures unreadable: invalid literal"),
            "bytes": ("state", b"bad\xff", "state unreadable: 'utf-8' codec can't decode"),
        }
        for breaker, (value, stands, _) in odd.items():
            client.set(key(breaker, "state"), "open")
            client.set(key(breaker, value), stands)
        client.lpush(key("list", "state"), 1)
        client.set(prefix.encode() + b":na\xffme:pybreaker:state", "open")
        await fleet.shared.force_open(name)
        word = '{"switch": "open", "until": null, "at": 0, "version": "v"}'
        client.set(key("late:switch", "state"), word)
        listed = await fleet.run("list")
        assert (3, "") == (listed.code, listed.err)
        lines = {line.split()[0]: line for line in listed.out.splitlines()}
        for breaker, (_, _, reason) in odd.items():
            assert reason in lines[breaker]
        assert "forced open until released; opened_at unreadable" in lines["late"]
        assert ["list", "unreadable"] == lines["list"].split()[:2]
        assert "state unreadable: the key holds no string" in lines["list"]
        assert "name unreadable: the key is no UTF-8" in lines["na\\xffme"]
        assert "unreadable" not in lines[name]
        assert "forced open until released" in lines[name]
        rows = json.loads((await fleet.run("list", "--json")).out)
        row = next(row for row in rows if row["name"] == "many")
        assert ("open", None, False) == (row["state"], row["failures"], row["forced_open"])
        misspelt = await fleet.run("force-open", "lis")
        assert (4, True) == (misspelt.code, "did you mean 'list'?" in misspelt.err)
    finally:
        client.close()


async def test_any_time_may_stand_in_the_store(fleet: Fleet, redis_server: servers.Redis) -> None:
    """A switch without a time that counts is no switch; one beyond every calendar is shown as that. `--json` has no value
    that JSON has not."""

    def refused(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    name = fleet.breaker.name
    await fleet.shared.refresh()
    store = BreakerStore(redis_server.url, prefix=fleet.environment["MESHKIT_BREAKER_PREFIX"])
    for until, shown in (
        ("NaN", "is no switch"),
        ('"nan"', "is no switch"),
        ("Infinity", "is no switch"),
        ("1" + "0" * 400, "is no switch"),
        ("1e300", "forced open until after the year 9999, over 1000 years left"),
        ("-1e300", "expired"),
    ):
        store(f"{name}:switch").state = f'{{"switch": "open", "until": {until}, "at": 0, "version": "v"}}'
        listed = await fleet.run("list")
        assert (3 if "forced" in shown else 0, "") == (listed.code, listed.err)
        assert shown in listed.out.splitlines()[1]
        json.loads((await fleet.run("list", "--json")).out, parse_constant=refused)
    store.close()


@pytest.mark.parametrize("length", ["9999999d", "365d1s", "99999999999999999999d", "9" * 400 + "d"])
def test_a_length_of_time_has_a_bound(length: str, capsys: pytest.CaptureFixture[str]) -> None:
    """More than a year ends with 2 and says how to have no end, before anybody is asked."""
    (port,) = servers.free_ports(1)
    assert 2 == run(["breaker", "force-open", "payments", f"--for={length}", f"--redis=redis://127.0.0.1:{port}"])
    said = capsys.readouterr()
    assert "" == said.out
    assert f"--for is a year (365d) at most, not {length[:40]}. Without it a breaker stays forced open" in said.err


async def test_a_year_is_a_length_of_time(fleet: Fleet) -> None:
    """The longest time that is taken is listed afterwards."""
    await fleet.shared.refresh()
    assert 0 == (await fleet.run("force-open", fleet.breaker.name, "--for", "365d")).code
    listed = await fleet.run("list")
    assert (3, "") == (listed.code, listed.err)
    assert "365d left" in listed.out


@pytest.mark.parametrize("length", ["10", "0s", "m", "10m ", "ten minutes", "-5m"])
def test_a_length_of_time_needs_a_unit(length: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no length of time ends with 2 and an example, before anybody is asked."""
    (port,) = servers.free_ports(1)
    assert 2 == run(["breaker", "force-open", "payments", f"--for={length}", f"--redis=redis://127.0.0.1:{port}"])
    said = capsys.readouterr()
    assert "" == said.out
    assert f"--for is a length of time such as 90s, 10m or 1h30m, not {length!r}" in said.err


async def test_servers_that_are_away_end_with_2() -> None:
    """A Redis that is down, one that hangs, no address, and a missing library: one line and exit code 2."""
    (port,) = servers.free_ports(1)
    with servers.redis() as hanging:
        os.kill(hanging.pid, signal.SIGSTOP)
        try:
            for url, words in (
                (f"redis://:secret@127.0.0.1:{port}/0", "MK102  Redis cannot be used: Error 111 connecting"),
                (hanging.url, "MK102  Redis cannot be used: Timeout"),
                ("nonsense", "MK100  the address of Redis is no URL that it understands"),
            ):
                ran = await meshkit("list", "--redis", url)
                assert (2, "", 1) == (ran.code, ran.out, len(ran.err.splitlines()))
                assert words in ran.err
                assert "secret" not in ran.err
        finally:
            os.kill(hanging.pid, signal.SIGCONT)
    ran = await meshkit("list", before="import sys; sys.modules['redis'] = None; ")
    assert 2 == ran.code
    assert "MK101  redis is not installed" in ran.err
    assert 'pip install "meshkit-py[redis]"' in ran.err
