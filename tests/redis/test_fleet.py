"""Processes that share one real Redis, and what happens to it meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from meshkit import CircuitBreaker, ConfigurationError, MeshkitError, SharedState
from meshkit.redis import BreakerStore
from meshkit.testing import servers
from meshkit.testing.clock import ManualClock

pytestmark = [pytest.mark.real("redis")]

# What one exchange may take on a busy machine.
SOON = 15.0


class Member:
    """One process of the fleet."""

    def __init__(self, url: str, prefix: str, kind: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fleet_process.py")), url, prefix, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def asked(self, word: str = "status") -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> str:
        """End it in order; what it said on stderr."""
        return self._process.communicate("\n", timeout=30)[1]

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture
def server() -> Iterator[servers.Redis]:
    with servers.redis() as server:
        yield server
        with contextlib.suppress(ProcessLookupError, IndexError):
            # A stopped process does not heed SIGTERM.
            os.kill(server.pid, signal.SIGCONT)


@pytest.fixture(params=["pybreaker", "meshkit"])
def fleet(server: servers.Redis, request: pytest.FixtureRequest) -> Iterator[list[Member]]:
    members = [Member(server.url, "shop", request.param) for _ in range(2)]
    try:
        yield members
    finally:
        for member in members:
            member.kill()


@pytest.fixture
async def operator(server: servers.Redis) -> AsyncIterator[SharedState]:
    store = BreakerStore(server.url, prefix="shop")
    yield SharedState(store)
    store.close()


async def until(members: list[Member], said: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
    """Ask until all members say so."""
    deadline = time.monotonic() + SOON
    while True:
        answers = [await asyncio.to_thread(member.asked) for member in members]
        if all(said(answer) for answer in answers):
            return answers
        assert time.monotonic() < deadline, answers
        await asyncio.sleep(0.02)


async def test_a_force_open_reaches_every_process(fleet: list[Member], operator: SharedState) -> None:
    """Two processes on one Redis: what the operator forces open, both reject, and both go on when it is released."""
    await until(fleet, lambda answer: answer["store"] and answer["state"] == "closed")
    for seconds, state in ((None, "isolated"), (600, "open")):
        await operator.force_open("payments", seconds=seconds, reason="INC-42")
        answers = await until(fleet, lambda answer, state=state: answer["state"] == state)
        await until(fleet, lambda answer, before=answers[0]: answer["rejected"] > before["rejected"])
        await operator.release("payments")
        answers = await until(fleet, lambda answer: answer["state"] == "closed")
        await until(fleet, lambda answer, before=answers[0]: answer["ok"] > before["ok"])
    # Neither took over the other's trip.
    fleet[0].asked("fail")
    await until(fleet[:1], lambda answer: answer["state"] == "open")
    # Nothing is to happen, so there is nothing to wait for: a few rounds of a real store, in real processes.
    await asyncio.sleep(0.5)
    assert "closed" == fleet[1].asked()["state"]
    for member in fleet:
        assert "Traceback" not in member.close()


async def test_calls_go_on_while_redis_hangs(fleet: list[Member], operator: SharedState, server: servers.Redis) -> None:
    """While Redis is stopped in the middle (it takes connections and answers nothing), no call waits for it, breakers trip
    by themselves, and an operator's word is heard when it goes on."""
    await until(fleet, lambda answer: answer["store"])
    os.kill(server.pid, signal.SIGSTOP)
    before = await until(fleet, lambda answer: answer["state"] == "closed")
    # Long enough for each process to have called often; the processes and the store are real, and so is their time.
    await asyncio.sleep(1.0)
    for member, earlier in zip(fleet, before, strict=True):
        answer = member.asked()
        assert answer["calls"] > earlier["calls"] + 20
        assert answer["slowest"] < 0.5
    fleet[0].asked("fail")
    await until(fleet[:1], lambda answer: answer["state"] == "open")
    os.kill(server.pid, signal.SIGCONT)
    await operator.force_open("payments")
    await until(fleet, lambda answer: answer["state"] == "isolated")


async def test_a_switch_outlasts_the_store(fleet: list[Member], operator: SharedState, server: servers.Redis) -> None:
    """Redis is killed and comes back empty: what was switched stays so in every process, and is released by a word."""
    await operator.force_open("payments")
    await until(fleet, lambda answer: answer["state"] == "isolated")
    server.kill()
    await until(fleet, lambda answer: not answer["store"])
    server.start()
    answers = await until(fleet, lambda answer: answer["store"])
    assert ["isolated"] * 2 == [answer["state"] for answer in answers]
    await operator.release("payments")
    await until(fleet, lambda answer: answer["state"] == "closed")
    for answer in (member.asked() for member in fleet):
        assert answer["slowest"] < 0.5


async def test_one_warning_when_redis_goes_and_one_when_it_is_back(
    server: servers.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """However long Redis is away, meshkit's log has two lines about it."""
    breaker = CircuitBreaker("payments")
    store = BreakerStore(server.url, prefix="shop")
    shared = SharedState(store)
    assert await shared.refresh()
    server.kill()
    for _ in range(5):
        assert not await shared.refresh()
    server.start()
    for _ in range(5):
        assert await shared.refresh()
    went, back = [record.getMessage() for record in caplog.records if record.name == "meshkit"]
    assert "Connection refused" in went
    assert "answers again" in back
    assert "closed" == breaker.state
    store.close()


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(redis_server: servers.Redis) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(redis_server.url)
    yield client
    client.close()


async def test_keys_that_nobody_uses_expire(client: redis.Redis) -> None:
    """The keys of a breaker live for `ttl` from the last time that a process had it; an operator's word never expires."""
    clock, prefix = ManualClock(hold=True), uuid.uuid4().hex
    breaker = CircuitBreaker(f"b-{prefix}", clock=clock)
    store = BreakerStore(client, prefix=prefix, ttl=3600)
    shared = SharedState(store, clock=clock)
    await shared.force_open(breaker.name)
    await shared.refresh()

    def lives() -> dict[str, int]:
        keys = [key.decode() for key in client.scan_iter(f"{prefix}:{breaker.name}*")]
        return {key.removeprefix(f"{prefix}:{breaker.name}"): client.ttl(key) for key in keys}

    expected = {":pybreaker:state", ":pybreaker:fail_counter", ":pybreaker:opened_at", ":switch:pybreaker:fail_counter"}
    left = lives()
    assert -1 == left.pop(":switch:pybreaker:state")
    assert expected == left.keys()
    assert all(3590 <= each <= 3600 for each in left.values())
    for key in expected:
        client.expire(f"{prefix}:{breaker.name}{key}", 100)
    await clock.advance(61)
    await shared.refresh()
    left = lives()
    assert -1 == left.pop(":switch:pybreaker:state")
    assert all(3590 <= each <= 3600 for each in left.values())
    # All of them expire: the switch stays, and is known to whoever comes later.
    for key in expected:
        client.delete(f"{prefix}:{breaker.name}{key}")
    later = CircuitBreaker(breaker.name, clock=clock)
    await shared.refresh()
    assert ["isolated", "isolated"] == [breaker.state, later.state]
    assert expected | {":switch:pybreaker:state"} == lives().keys()


def test_prefixes_keep_fleets_apart(client: redis.Redis) -> None:
    """Names are found under their own prefix only, whatever letters it is made of."""
    odd = f"{uuid.uuid4().hex}[*]?\\"
    first, second = BreakerStore(client, prefix=odd), BreakerStore(client, prefix=odd[:-4])
    first("payments").state = "open"
    first("user-service api:8080:switch").state = "closed"
    second("orders").state = "closed"
    assert ["payments", "user-service api:8080"] == first.names()
    assert ["orders"] == second.names()


def test_the_values_are_those_of_pybreaker(client: redis.Redis) -> None:
    """What pybreaker's storage writes, ours reads, and the other way round, with a decoding client too."""
    import pybreaker

    prefix = uuid.uuid4().hex
    theirs = pybreaker.CircuitRedisStorage("closed", client, namespace=f"{prefix}:payments")
    decoding = redis.Redis.from_url(f"redis://127.0.0.1:{client.connection_pool.connection_kwargs['port']}/0")
    for ours in (BreakerStore(client, prefix=prefix)("payments"), BreakerStore(decoding, prefix=prefix)("payments")):
        stock = pybreaker.CircuitBreaker(fail_max=1, reset_timeout=60, state_storage=ours)
        assert ("closed", "closed") == (ours.state, theirs.state)
        with pytest.raises(pybreaker.CircuitBreakerError):
            stock.call(int, "x")
        assert ("open", ours.opened_at, 1) == (theirs.state, theirs.opened_at, theirs.counter)
        before = ours.opened_at
        assert before is not None
        ours.opened_at = before.replace(year=2001)
        assert before == theirs.opened_at
        ours.increment_success_counter()
        assert 1 == theirs.success_counter == ours.success_counter
        stock.close()
        assert ("closed", 0, 0) == (theirs.state, theirs.counter, theirs.success_counter)
    decoding.close()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_wrong_values_say_what_would_be_right() -> None:
    """Each value that cannot work is refused, and a password in a URL is in no error."""
    import redis.asyncio

    for options, words in (
        ({"prefix": ""}, "prefix begins the keys"),
        ({"ttl": 10}, "600 or above, not 10"),
        ({"timeout": 0}, "above 0, not 0"),
        ({"redis": "http://:secret@host"}, "no URL that it understands"),
        ({"redis": "redis://:secret@host:port"}, "no URL that it understands"),
        ({"redis": redis.asyncio.Redis()}, "asyncio client does not do"),
        ({"redis": None}, "not a builtins.NoneType"),
    ):
        with pytest.raises(ConfigurationError, match=words) as caught:
            BreakerStore(**{"redis": "redis://127.0.0.1:1", **options})  # type: ignore[arg-type]
        assert "secret" not in str(caught.value)


async def test_a_redis_that_is_away_is_an_error_with_a_code() -> None:
    """For an operator, a store that cannot be reached is MK102."""
    (port,) = servers.free_ports(1)
    store = BreakerStore(f"redis://:secret@127.0.0.1:{port}/0")
    for asked in (store.names, store.look):
        with pytest.raises(MeshkitError, match="Connection refused") as caught:
            asked()
        assert "MK102" == caught.value.code
        assert "secret" not in str(caught.value)
    with pytest.raises(MeshkitError, match="Connection refused"):
        await SharedState(store).force_open("payments")
