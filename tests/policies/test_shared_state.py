from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import pybreaker
import pytest
import redis

import meshkit.httpx
from meshkit import (
    CircuitBreaker,
    CircuitBreakers,
    CircuitOpenError,
    ConfigurationError,
    MeshkitError,
    SharedState,
)
from meshkit.core.lifecycle import Lifecycle
from meshkit.policies.circuit_breaker import breakers
from meshkit.policies.shared_state import Switch
from meshkit.redis import BreakerStore
from meshkit.testing.clock import ManualClock

T = TypeVar("T")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(hold=True)


@pytest.fixture
def name() -> str:
    """Of its own for each test, because a process has one list of living breakers."""
    return f"payments-{uuid.uuid4().hex[:8]}"


def breaker(name: str, clock: ManualClock, **options: Any) -> CircuitBreaker:
    return CircuitBreaker(name, **{"min_calls": 2, "window": 10, "open_for": 10.0, "clock": clock, **options})


async def fine() -> str:
    return "ok"


async def broken() -> None:
    raise ConnectionError("no")


async def trip(guarded: CircuitBreaker, times: int = 2) -> None:
    for _ in range(times):
        with pytest.raises(ConnectionError):
            await guarded(broken)()


async def rejected(guarded: Any, *args: Any) -> bool:
    async def call(*args: Any) -> str:
        return "ok"

    try:
        await guarded(call)(*args)
    except CircuitOpenError:
        return True
    return False


async def soon(so: Callable[[], bool]) -> None:
    """Wait for what another thread does, a store's for one."""
    async with asyncio.timeout(10):
        while not so():  # noqa: ASYNC110 - no event could tell of it
            await asyncio.sleep(0.001)


# -- one contract, for each kind of storage: as interlock's `test_storage_contract`, but for what decides a call, which
#    here no storage does ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Store:
    """A store of one kind: what makes its storages, and what takes its keys away."""

    of: Callable[[str], Any]
    lose_keys: Callable[[], object]


def memory() -> Store:
    storages: dict[str, pybreaker.CircuitMemoryStorage] = {}

    def of(name: str) -> pybreaker.CircuitMemoryStorage:
        return storages.setdefault(name, pybreaker.CircuitMemoryStorage("closed"))

    def lose_keys() -> None:
        for storage in storages.values():
            storage.__init__("closed")  # type: ignore[misc]

    return Store(of, lose_keys)


@pytest.fixture(
    params=[
        "memory",
        pytest.param("pybreaker's redis", marks=pytest.mark.real("redis")),
        pytest.param("meshkit's redis", marks=pytest.mark.real("redis")),
    ]
)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "memory":
        yield memory()
        return
    client = redis.Redis.from_url(request.getfixturevalue("redis_server").url)
    prefix = uuid.uuid4().hex

    def lose_keys() -> None:
        for key in client.scan_iter(f"{prefix}:*"):
            client.delete(key)

    if request.param == "meshkit's redis":
        yield Store(BreakerStore(client, prefix=prefix), lose_keys)
    else:
        yield Store(
            lambda name: pybreaker.CircuitRedisStorage("closed", client, namespace=f"{prefix}:{name}"), lose_keys
        )
    lose_keys()
    client.close()


async def test_what_the_breaker_is_stands_in_the_store(store: Store, name: str, clock: ManualClock) -> None:
    """State, failures in the window and the time of opening are written as pybreaker writes them, the time rounded up
    to the whole second."""
    guarded = breaker(name, clock, min_calls=3)
    shared = SharedState(store.of, clock=clock)
    seen = store.of(name)
    assert await shared.refresh()
    assert ("closed", 0, None) == (seen.state, seen.counter, seen.opened_at)
    await trip(guarded, 2)
    assert await shared.refresh()
    assert ("closed", 2, None) == (seen.state, seen.counter, seen.opened_at)
    await clock.advance(0.25)
    await trip(guarded, 1)
    await clock.advance(3)
    assert await shared.refresh()
    assert ("open", 3, 1_700_000_001) == (seen.state, seen.counter, seen.opened_at.timestamp())
    await clock.advance(7)
    assert await shared.refresh()
    assert "half-open" == seen.state
    assert "ok" == await guarded(fine)()
    assert await shared.refresh()
    assert ("closed", 0) == (seen.state, seen.counter)


async def test_forced_open_for_a_time_it_probes_afterwards(store: Store, name: str, clock: ManualClock) -> None:
    """An operator's switch rejects for as long as it says, then the breaker decides as usual."""
    guarded = breaker(name, clock)
    shared, operator = SharedState(store.of, clock=clock), SharedState(store.of, clock=clock)
    await shared.refresh()
    said = await operator.force_open(name, seconds=600, reason="INC-42", by="alice")
    assert "closed" == guarded.state
    assert await shared.refresh()
    assert ("open", 600.0) == (guarded.state, guarded.retry_after)
    assert said == await shared.switch(name)
    await clock.advance(599)
    assert await shared.refresh()
    assert await rejected(guarded)
    await clock.advance(1)
    assert await shared.refresh()
    assert "half_open" == guarded.state
    assert not await rejected(guarded)
    assert await shared.refresh()
    assert "closed" == guarded.state


async def test_forced_open_until_it_is_taken_back(store: Store, name: str, clock: ManualClock) -> None:
    """Without a time it rejects until an operator takes it back; then it is closed. As often as one likes."""
    guarded = breaker(name, clock)
    shared, operator = SharedState(store.of, clock=clock), SharedState(store.of, clock=clock)
    for _ in range(3):
        await operator.force_open(name)
        assert await shared.refresh()
        assert "isolated" == guarded.state
        await clock.advance(100_000)
        assert await shared.refresh()
        assert await rejected(guarded)
        await operator.release(name)
        assert await shared.refresh()
        assert "closed" == guarded.state
        assert not await rejected(guarded)


async def test_the_last_word_counts(store: Store, name: str, clock: ManualClock) -> None:
    """Shorter, longer, for ever, taken back and said anew between two looks: what stands in the store is done."""
    guarded = breaker(name, clock)
    shared, operator = SharedState(store.of, clock=clock), SharedState(store.of, clock=clock)
    await operator.force_open(name, seconds=600)
    await shared.refresh()
    await operator.force_open(name, seconds=60)
    await shared.refresh()
    assert 60.0 == guarded.retry_after
    await operator.force_open(name)
    await shared.refresh()
    assert "isolated" == guarded.state
    await operator.release(name)
    await operator.force_open(name, seconds=300)
    await shared.refresh()
    assert ("open", 300.0) == (guarded.state, guarded.retry_after)
    await operator.force_open(name, seconds=1)
    await clock.advance(2)
    # It was over before anybody looked.
    await shared.refresh()
    assert "closed" == guarded.state


async def test_whoever_comes_later_finds_it(store: Store, name: str, clock: ManualClock) -> None:
    """A process that starts while the switch is on has it before its first call, and so has a breaker made later."""
    operator = SharedState(store.of, clock=clock)
    await operator.force_open(name, seconds=600)
    await clock.advance(100)
    guarded = breaker(name, clock)
    async with SharedState(store.of, clock=clock):
        assert ("open", 500.0) == (guarded.state, guarded.retry_after)
        await clock.advance(1)
        later = breaker(name, clock)
        assert ("open", 499.0) == (later.state, later.retry_after)
        assert await rejected(later)


async def test_a_name_that_is_new_is_asked_about_at_once(store: Store, name: str, clock: ManualClock) -> None:
    """Where a process makes its first breaker of a name, the switch is looked up without waiting for the next round."""
    await SharedState(store.of, clock=clock).force_open(name)
    async with SharedState(store.of, clock=clock):
        later = breaker(name, clock)
        assert not await rejected(later)
        await soon(lambda: later.state == "isolated")
        assert await rejected(breaker(name, clock))
        # No time has passed, so no round was due.
        assert 1000.0 == clock.now()


async def test_the_trip_of_another_process_is_never_taken_over(store: Store, name: str, clock: ManualClock) -> None:
    """What others write of their breakers changes nothing here: one bad node shuts off no other."""
    guarded = breaker(name, clock)
    shared = SharedState(store.of, clock=clock)
    await shared.refresh()
    theirs = pybreaker.CircuitBreaker(fail_max=1, state_storage=store.of(name))
    theirs.open()
    assert "open" == store.of(name).state
    assert await shared.refresh()
    assert ("closed", False) == (guarded.state, await rejected(guarded))


async def test_who_says_closed_undoes_no_switch(store: Store, name: str, clock: ManualClock) -> None:
    """Processes that write their state while an operator speaks do not write over what the operator said."""
    guarded = breaker(name, clock)
    shared, operator = SharedState(store.of, clock=clock), SharedState(store.of, clock=clock)
    for round_ in range(5):
        await trip(guarded)
        await asyncio.gather(shared.refresh(), operator.force_open(name, seconds=600 + round_))
        guarded.reset()
        pybreaker.CircuitBreaker(state_storage=store.of(name)).close()
        assert await shared.refresh()
        assert 600.0 + round_ == guarded.retry_after
        await operator.release(name)
        assert await shared.refresh()


async def test_a_store_that_lost_its_keys_takes_no_switch_back(store: Store, name: str, clock: ManualClock) -> None:
    """After a loss of all keys the switch stays, what is mirrored is written anew, and an operator can still take the
    switch back."""
    guarded = breaker(name, clock)
    shared, operator = SharedState(store.of, clock=clock), SharedState(store.of, clock=clock)
    await operator.force_open(name)
    await shared.refresh()
    store.lose_keys()
    assert await operator.switch(name) is None
    await shared.refresh()
    assert ("isolated", "open") == (guarded.state, store.of(name).state)
    await operator.release(name)
    await shared.refresh()
    assert ("closed", "closed") == (guarded.state, store.of(name).state)


async def test_stock_pybreaker_sees_the_switch(store: Store, name: str, clock: ManualClock) -> None:
    """A stock pybreaker on the same keys rejects from the operator's word on, for as long as a process of ours follows
    it, and calls again when it is taken back."""
    guarded = breaker(name, clock)
    # pybreaker asks the machine's own clock.
    clock = ManualClock(hold=True, epoch=time.time() - 100)
    stock = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=10, state_storage=store.of(name))
    shared, operator = SharedState(store.of, clock=clock), SharedState(store.of, clock=clock)
    await operator.force_open(name)
    await clock.advance(100)
    assert await shared.refresh()
    with pytest.raises(pybreaker.CircuitBreakerError):
        stock.call(lambda: "ok")
    assert "isolated" == guarded.state
    await operator.release(name)
    assert await shared.refresh()
    assert "ok" == stock.call(lambda: "ok")


async def test_two_operators_at_once_leave_one_word(store: Store, name: str, clock: ManualClock) -> None:
    """Of switches said at the same time one stands, whole, and each operator is told a word that stood there."""
    operators = [SharedState(store.of, clock=clock) for _ in range(6)]
    said = await asyncio.gather(
        *(
            operator.force_open(name, seconds=60 + number, by=str(number)) if number % 2 else operator.release(name)
            for number, operator in enumerate(operators)
        )
    )
    left = await operators[0].switch(name)
    assert left in said
    guarded = breaker(name, clock)
    await operators[0].refresh()
    assert ("open" if left is not None and left.on else "closed") == guarded.state


# -- a storage never decides a call -----------------------------------------------------------------------------------


class Faulty(pybreaker.CircuitMemoryStorage):
    """A storage in memory that does what its `fault` says, and notes which thread asked."""

    def __init__(self, faults: Faults) -> None:
        super().__init__("closed")
        self._faults = faults

    @property
    def state(self) -> str:
        return self._faults.met("state", super().state)

    @state.setter
    def state(self, state: str) -> None:
        self._faults.met("set state", "")
        pybreaker.CircuitMemoryStorage.state.fset(self, state)  # type: ignore[attr-defined]

    @property
    def counter(self) -> int:
        return self._faults.met("counter", super().counter)

    def increment_counter(self) -> None:
        if self._faults.fault != "swallows":
            self._faults.met("increment", None)
            super().increment_counter()


class Faults:
    def __init__(self) -> None:
        self.fault = ""
        self.raises: type[BaseException] | None = None
        self.asked: list[tuple[str, str]] = []
        self.reached = threading.Event()
        self.goes_on = threading.Event()
        self._storages: dict[str, Faulty] = {}

    def __call__(self, name: str) -> Faulty:
        return self._storages.setdefault(name, Faulty(self))

    def met(self, what: str, answer: Any) -> Any:
        self.asked.append((what, threading.current_thread().name))
        if self.raises is not None:
            raise self.raises
        if self.fault == "down":
            raise ConnectionError("refused")
        if self.fault == "hangs":
            self.reached.set()
            self.goes_on.wait(60)
            if self.raises is not None:
                raise self.raises
        if self.fault == "garbage" and what in ("state", "counter"):
            return {"state": '{"switch": 7}', "counter": 1}[what]
        if self.fault == "swallows" and what in ("state", "counter"):
            return {"state": "closed", "counter": 0}[what]
        return answer


@pytest.fixture
def faults() -> Iterator[Faults]:
    made = Faults()
    yield made
    made.goes_on.set()


async def test_a_storage_never_decides_a_call(faults: Faults, name: str, clock: ManualClock) -> None:
    """Calls that succeed, fail, trip the breaker, are rejected and probe never ask the storage; only the thread does (the
    paragraph "Storage": store down, local decision)."""
    guarded = breaker(name, clock)
    async with SharedState(faults, clock=clock):
        before = len(faults.asked)
        for _ in range(100):
            await guarded(fine)()
        await trip(guarded, 5)
        for _ in range(100):
            assert await rejected(guarded)
        guarded.force_open(1)
        await clock.advance(2)
        assert not await rejected(guarded)
        assert before == len(faults.asked)
    assert {"shared breaker state"} == {thread for _, thread in faults.asked}


@pytest.mark.parametrize("fault", ["down", "garbage", "swallows"])
async def test_a_store_that_fails_leaves_decisions_here(
    faults: Faults, name: str, clock: ManualClock, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """A store that refuses, answers nonsense, or hides its errors fails no call; the breaker trips by itself, the switch
    stays as last known; one warning when the store goes, one when it is back."""
    guarded, switched = breaker(name, clock), breaker(f"{name}-off", clock)
    shared, operator = SharedState(faults, clock=clock), SharedState(faults, clock=clock)
    await operator.force_open(f"{name}-off")
    assert await shared.refresh()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "meshkit"):
        faults.fault = fault
        for _ in range(5):
            assert not await shared.refresh()
            assert "ok" == await guarded(fine)()
            await clock.advance(10)
        assert (False, False) == (shared.checks()[0].ok, shared.checks()[0].required)
        await trip(guarded, 5)
        assert ("open", "isolated") == (guarded.state, switched.state)
        faults.fault = ""
        for _ in range(3):
            assert await shared.refresh()
    assert shared.checks()[0].ok
    went, back = [record.getMessage() for record in caplog.records]
    assert "the store does not answer as it should" in went
    assert "the store answers again, after 50 s" in back
    assert "open" == faults(name).state


async def test_a_store_that_hangs_delays_nothing(
    faults: Faults, name: str, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """With a store that does not answer, start takes a second at most, calls go on, no second thread is begun, and close
    returns; when it answers again, its word is heeded."""
    guarded = breaker(name, clock)
    await SharedState(faults, clock=clock).force_open(name)
    faults.fault = "hangs"
    shared = SharedState(faults, clock=clock)
    starting = asyncio.create_task(shared.start())
    assert await asyncio.to_thread(faults.reached.wait, 5)
    await clock.advance(0.9)
    assert not starting.done()
    await clock.advance(0.1)
    await starting
    assert "ok" == await guarded(fine)()
    before = threading.active_count()
    with caplog.at_level(logging.WARNING, "meshkit"):
        for _ in range(6):
            await clock.advance(5)
        assert before == threading.active_count()
    assert ["no answer for 5 s"] == [shared.checks()[0].detail]
    assert 1 == len(caplog.records)
    faults.fault = ""
    faults.goes_on.set()
    assert await shared.refresh()
    assert "isolated" == guarded.state
    await shared.close()


@pytest.mark.parametrize(
    "raised", [asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration]
)
async def test_a_store_that_raises_what_is_no_error_is_asked_again(
    raised: type[BaseException], faults: Faults, name: str, clock: ManualClock
) -> None:
    """What usually ends a task or a process is the store's failure where a storage raises it: said by health, told to an
    operator at once, and over with the next round."""
    guarded = breaker(name, clock)
    operator, shared = SharedState(faults, clock=clock), SharedState(faults, clock=clock)
    await operator.force_open(name)
    faults.raises = raised
    assert not await within_seconds(shared.refresh())
    assert raised.__name__ in shared.checks()[0].detail
    with pytest.raises(MeshkitError, match=f"cannot be used: .*{raised.__name__}") as told:
        await within_seconds(operator.release(name))
    assert "MK102" == told.value.code
    faults.raises = None
    assert await shared.refresh()
    assert "isolated" == guarded.state


async def within_seconds(work: Coroutine[Any, Any, T]) -> T:
    """The clock of these tests stands still, so only this ends a wait for an answer that never comes."""
    async with asyncio.timeout(5):
        return await work


async def test_close_waits_for_no_store(faults: Faults, name: str, clock: ManualClock) -> None:
    """A part that is closed while its store hangs is closed at once, and what the store says later is nobody's."""
    guarded = breaker(name, clock)
    await SharedState(faults, clock=clock).force_open(name)
    faults.fault = "hangs"
    lifecycle = Lifecycle(clock=clock)
    lifecycle.add(SharedState(faults, clock=clock))
    starting = asyncio.create_task(lifecycle.start())
    assert await asyncio.to_thread(faults.reached.wait, 5)
    await clock.advance(1)
    await starting
    assert lifecycle.ready
    await lifecycle.stop()
    hanging = [thread for thread in threading.enumerate() if thread.name == "shared breaker state"]
    faults.goes_on.set()
    for thread in hanging:
        thread.join(5)
    await asyncio.sleep(0)
    assert "closed" == guarded.state


async def test_a_start_that_is_cancelled_leaves_nothing(faults: Faults, name: str, clock: ManualClock) -> None:
    """Whoever cancels `async with` while it waits for a store's first word leaves no task behind, and may start anew."""
    guarded = breaker(name, clock)
    await SharedState(faults, clock=clock).force_open(name)
    faults.fault = "hangs"
    shared = SharedState(faults, clock=clock)

    async def use() -> None:
        async with shared:
            raise AssertionError("it has not started")

    before = asyncio.all_tasks()
    using = asyncio.create_task(use())
    assert await asyncio.to_thread(faults.reached.wait, 5)
    using.cancel()
    with pytest.raises(asyncio.CancelledError):
        await using
    assert before == asyncio.all_tasks()
    faults.fault = ""
    faults.goes_on.set()
    async with shared:
        assert "isolated" == guarded.state


async def test_an_operator_who_waits_no_longer_leaves_no_error(
    faults: Faults, name: str, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that fails after its operator was cancelled has nobody to tell, and logs nothing."""
    faults.fault = "hangs"
    asking = asyncio.create_task(SharedState(faults, clock=clock).force_open(name))
    assert await asyncio.to_thread(faults.reached.wait, 5)
    hanging = [thread for thread in threading.enumerate() if thread.name == "shared breaker state"]
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    faults.raises = ConnectionError
    faults.goes_on.set()
    for thread in hanging:
        thread.join(5)
    await asyncio.sleep(0)
    gc.collect()
    assert [] == caplog.records


def test_a_loop_that_ends_while_its_store_hangs_says_nothing(
    faults: Faults, name: str, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the loop's end cancels an exchange that nobody has closed, no callback fails."""

    async def main() -> None:
        faults.fault = "hangs"
        starting = asyncio.create_task(SharedState(faults, clock=clock).start())
        assert await asyncio.to_thread(faults.reached.wait, 5)
        await clock.advance(1)
        await starting

    guarded = breaker(name, clock)
    asyncio.run(main())
    assert [] == caplog.records
    assert "closed" == guarded.state


def test_a_process_ends_while_its_store_hangs() -> None:
    """A store that never answers keeps no process alive: `asyncio.run` returns and the interpreter ends."""
    code = """
import asyncio, threading
from meshkit import CircuitBreaker, SharedState

def hang(name):
    threading.Event().wait()

async def main():
    breaker = CircuitBreaker("payments")
    async with SharedState(hang):
        print("runs", breaker.state)

asyncio.run(main())
print("ended")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert "runs closed\nended\n" == done.stdout


async def test_one_bad_key_keeps_no_other_from_being_read(clock: ManualClock, name: str) -> None:
    """Where the storage of one breaker fails, the switches of all others are heeded, however many are bad."""
    good = {f"{name}-{number}": breaker(f"{name}-{number}", clock) for number in (3, 9)}
    bad = [breaker(f"{name}-{number}", clock) for number in (0, 1, 2, 4, 5, 6, 7, 8)]
    whole = memory()

    def of(wanted: str) -> Any:
        if wanted.removesuffix(":switch") in {each.name for each in bad}:
            raise ConnectionError("wrong type of key")
        return whole.of(wanted) if wanted.startswith(name) else None

    shared, operator = SharedState(of, clock=clock), SharedState(of, clock=clock)
    for each in good:
        await operator.force_open(each)
    for _ in range(3):
        assert not await shared.refresh()
    assert ["isolated", "isolated"] == [each.state for each in good.values()]
    assert ["closed"] * 8 == [each.state for each in bad]


async def test_a_store_that_takes_nothing_more_is_still_read(name: str, clock: ManualClock) -> None:
    """Where nothing can be written any more (a full store), every switch is still heeded, at once."""
    guarded = [breaker(f"{name}-{number}", clock) for number in range(20)]
    store, full = memory(), False

    class Full(pybreaker.CircuitMemoryStorage):
        @property
        def state(self) -> str:
            return "closed"

        @state.setter
        def state(self, state: str) -> None:
            raise MemoryError("command not allowed when used memory > 'maxmemory'")

    def of(wanted: str) -> Any:
        if not wanted.startswith(name):
            return None
        return store.of(wanted) if wanted.endswith(":switch") or not full else Full("closed")

    shared, operator = SharedState(of, clock=clock), SharedState(of, clock=clock)
    for each in guarded:
        await operator.force_open(each.name)
    full = True
    assert not await shared.refresh()
    assert {"isolated"} == {each.state for each in guarded}
    assert "maxmemory" in shared.checks()[0].detail


async def test_a_slow_store_is_not_taken_for_one_that_is_away(
    name: str, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Many breakers and a store far away: a round that takes longer than the patience, but goes on, is no outage."""
    guarded = [breaker(f"{name}-{number}", clock) for number in range(4)]
    store, loop = memory(), asyncio.get_running_loop()

    def of(wanted: str) -> Any:
        if not wanted.startswith(name):
            return None
        if wanted.endswith(":switch"):
            asyncio.run_coroutine_threadsafe(clock.advance(3), loop).result(10)
        return store.of(wanted)

    shared = SharedState(of, clock=clock)
    assert await shared.refresh()
    assert [] == caplog.records
    assert ["closed"] * 4 == [each.state for each in guarded] == [store.of(each.name).state for each in guarded]


# -- what a switch does to what is there ------------------------------------------------------------------------------


async def test_what_was_done_by_hand_is_there_again_afterwards(name: str, clock: ManualClock) -> None:
    """A breaker that was isolated by hand stays so when the switch is taken back, and one that was disabled is so
    again; but while the switch is on, all reject."""
    isolated, disabled, plain = (breaker(name, clock) for _ in range(3))
    isolated.isolate()
    disabled.disable()
    store = memory()
    shared, operator = SharedState(store.of, clock=clock), SharedState(store.of, clock=clock)
    for seconds in (None, 60):
        await operator.force_open(name, seconds=seconds)
        await shared.refresh()
        for each in (isolated, disabled, plain):
            assert await rejected(each)
        await operator.release(name)
        await shared.refresh()
        assert ["isolated", "disabled", "closed"] == [each.state for each in (isolated, disabled, plain)]
    await operator.force_open(name, seconds=60)
    await shared.refresh()
    await clock.advance(61)
    await shared.refresh()
    assert ["isolated", "disabled", "half_open"] == [each.state for each in (isolated, disabled, plain)]


async def test_a_switch_outlasts_a_reset_by_hand(name: str, clock: ManualClock) -> None:
    """While the switch is on, a breaker that somebody resets in one process rejects again from the next look on."""
    guarded = breaker(name, clock)
    store = memory()
    async with SharedState(store.of, clock=clock) as shared:
        await shared.force_open(name, seconds=100)
        assert "open" == guarded.state
        guarded.reset()
        assert await shared.refresh()
        assert ("open", 100.0) == (guarded.state, guarded.retry_after)
        await shared.release(name)
        assert "closed" == guarded.state


async def test_per_key_breakers_are_switched_together(name: str, clock: ManualClock) -> None:
    """A switch on the common name reaches all keys, those to come too; outwards they are open only if all are."""
    family = CircuitBreakers(name, key=lambda tenant: tenant, most=2, open_for=10.0, clock=clock)
    store = memory()
    shared, operator = SharedState(store.of, clock=clock), SharedState(store.of, clock=clock)
    first, second = family.get("a"), family.get("b")
    assert first is not None
    assert second is not None
    first.force_open()
    await shared.refresh()
    assert "closed" == store.of(name).state
    second.force_open()
    await shared.refresh()
    assert "open" == store.of(name).state
    for seconds in (600, None):
        await operator.force_open(name, seconds=seconds)
        await shared.refresh()
        for tenant in ("a", "b", "c", "d"):
            assert await rejected(family, tenant)
        await operator.release(name)
        await shared.refresh()
        for tenant in ("a", "b", "c", "d"):
            assert not await rejected(family, tenant)


async def test_one_in_shadow_mode_is_closed_for_others(
    name: str, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A breaker that rejects nothing makes no other process reject, and the log says that a switch does not either."""
    guarded = breaker(name, clock, shadow=True)
    store = memory()
    shared, operator = SharedState(store.of, clock=clock), SharedState(store.of, clock=clock)
    await trip(guarded)
    await shared.refresh()
    assert ("open", "closed") == (guarded.state, store.of(name).state)
    with caplog.at_level(logging.WARNING, "meshkit"):
        await operator.force_open(name, reason="INC-42", by="alice")
        await shared.refresh()
        await shared.refresh()
    assert [
        f"circuit {name!r} is in shadow mode: forced open, it still rejects nothing",
        f"circuit {name!r} is forced open until it is released (alice, INC-42)",
    ] == [record.getMessage() for record in caplog.records]


async def test_no_breaker_is_kept_alive(name: str, clock: ManualClock) -> None:
    """A breaker that its owner lets go of is gone, switched or not, and its storage is let go of as well."""
    storages: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    def of(wanted: str) -> Any:
        made = pybreaker.CircuitMemoryStorage("closed")
        if wanted.startswith(name):
            storages[wanted] = made
            if wanted.endswith(":switch"):
                made.state = Switch(on=True, at=clock.time(), version="1").text()
            return made
        return None

    guarded = breaker(name, clock)
    alive = weakref.ref(guarded)
    async with SharedState(of, clock=clock) as shared:
        assert "isolated" == guarded.state
        assert 2 == len(storages)
        del guarded
        gc.collect()
        assert alive() is None
        await shared.refresh()
        gc.collect()
        assert 0 == len(storages)


async def test_no_breaker_is_kept_alive_by_a_store_that_hangs(faults: Faults, name: str, clock: ManualClock) -> None:
    """While an exchange waits for its store, breakers that their owners let go of are gone all the same."""
    guarded = breaker(name, clock)
    alive = weakref.ref(guarded)
    faults.fault = "hangs"
    shared = SharedState(faults, clock=clock)
    asking = asyncio.create_task(shared.refresh())
    assert await asyncio.to_thread(faults.reached.wait, 5)
    del guarded
    gc.collect()
    assert alive() is None
    await shared.close()
    assert not await asking


async def test_thousands_of_breakers_hold_up_no_call(name: str, clock: ManualClock) -> None:
    """Between looking at some breakers and at the next ones, other tasks have their turn."""
    family = CircuitBreakers(name, key=lambda tenant: tenant, most=2000, clock=clock)
    for tenant in range(2000):
        family.get(tenant)
    turns, before = 0, []

    def of(wanted: str) -> None:
        before.append(turns)

    shared = SharedState(of, clock=clock)
    exchange = asyncio.create_task(shared.refresh())
    while not exchange.done():
        turns += 1
        await asyncio.sleep(0)
    assert await exchange
    # All were looked at before the first was written.
    assert before[0] >= 40


# -- what is made while it runs -----------------------------------------------------------------------------------------


async def test_a_client_that_begins_to_ask_later_is_switched(name: str, clock: ManualClock) -> None:
    """An HTTP client, which makes its breaker at its first request, sends nothing to what is forced open."""
    sent: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(200)

    store = memory()
    first = breaker(name, clock)
    async with SharedState(store.of, clock=clock) as shared:
        await shared.force_open(name, reason="INC-42")
        async with meshkit.httpx.client(
            name, base_url="http://prices.test", inner=httpx.MockTransport(answer), retry=None
        ) as client:
            with pytest.raises(CircuitOpenError):
                await client.get("/")
    assert ("isolated", []) == (first.state, sent)


async def test_per_key_breakers_that_are_made_later_are_switched(name: str, clock: ManualClock) -> None:
    """Per-key breakers of a name that is forced open reject the calls of all keys from the first one on, also of those
    that have no place, and let all through when it is released."""
    store = memory()
    first = breaker(name, clock)
    async with SharedState(store.of, clock=clock) as shared:
        for seconds in (None, 60):
            await shared.force_open(name, seconds=seconds)
            family = CircuitBreakers(name, key=lambda tenant: tenant, most=2, clock=clock)
            for tenant in ("a", "b", "c", "a"):
                assert await rejected(family, tenant)
            await shared.release(name)
            for tenant in ("a", "b", "c", "d"):
                assert not await rejected(family, tenant)
        assert "closed" == first.state


async def test_a_breaker_that_a_thread_makes_is_switched(name: str, clock: ManualClock) -> None:
    """A breaker made in a thread without an event loop rejects the first call, and its name is asked about where new."""
    store = memory()
    operator = SharedState(store.of, clock=clock)
    await operator.force_open(name)
    async with SharedState(store.of, clock=clock):
        (first, second) = [await asyncio.to_thread(breaker, name, clock) for _ in range(2)]
        await soon(lambda: first.state == "isolated" == second.state)
        third = await asyncio.to_thread(breaker, name, clock)
        assert "isolated" == third.state


async def test_a_word_that_comes_while_a_breaker_is_made_counts(name: str) -> None:
    """A release that is heard while another thread does with its new breaker what was said before is done too."""
    reached, goes_on = threading.Event(), threading.Event()

    class Held(ManualClock):
        def time(self) -> float:
            if threading.current_thread().name == "maker":
                reached.set()
                goes_on.wait(10)
            return super().time()

    clock, store, made = Held(hold=True), memory(), []
    first = breaker(name, clock)
    async with SharedState(store.of, clock=clock) as shared:
        await shared.force_open(name)
        maker = threading.Thread(target=lambda: made.append(breaker(name, clock)), name="maker")
        maker.start()
        assert await asyncio.to_thread(reached.wait, 10)
        await shared.release(name)
        goes_on.set()
        await asyncio.to_thread(maker.join)
        assert ["closed", "closed"] == [first.state, made[0].state]


async def test_a_name_that_comes_back_has_its_last_word(name: str, clock: ManualClock) -> None:
    """Where all breakers of a name are gone and one is made again, it rejects while the switch is on as far as is known;
    one that was taken back meanwhile is let go at once."""
    store = memory()
    operator = SharedState(store.of, clock=clock)
    async with SharedState(store.of, clock=clock) as shared:

        async def made_again() -> CircuitBreaker:
            gc.collect()
            assert name not in {each.name for each in breakers()}
            assert await shared.refresh()
            return breaker(name, clock)

        first = breaker(name, clock)
        await shared.force_open(name)
        assert "isolated" == first.state
        del first
        second = await made_again()
        assert "isolated" == second.state
        del second
        await operator.release(name)
        third = await made_again()
        assert "isolated" == third.state
        await soon(lambda made=third: made.state == "closed")  # type: ignore[misc]
        await shared.force_open(name, seconds=60)
        assert "open" == third.state
        del third
        await clock.advance(60)
        assert "closed" == (await made_again()).state


async def test_only_what_is_new_is_asked_about(faults: Faults, name: str, clock: ManualClock) -> None:
    """A new name costs what it takes to ask about it, and one that is known costs nothing before the next round; what is
    wrong with the store is not taken back because a new name could be read."""
    asked: list[str] = []

    def of(wanted: str) -> Any:
        asked.append(wanted)
        if wanted == f"{name}-bad":
            raise ConnectionError("wrong type of key")
        return faults(wanted) if wanted.startswith(name) else None

    old, bad = breaker(f"{name}-old", clock), breaker(f"{name}-bad", clock)
    async with SharedState(of, clock=clock) as shared:
        asked.clear()
        new = breaker(f"{name}-new", clock)
        await soon(lambda: f"{name}-new:switch" in asked)
        assert [f"{name}-new", f"{name}-new:switch"] == asked
        again = [breaker(each, clock) for each in (new.name, old.name)]
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert 2 == len(asked)
        assert "wrong type of key" in shared.checks()[0].detail
    assert ["closed"] * 4 == [each.state for each in (bad, new, *again)]


async def test_a_store_that_hangs_holds_up_no_new_breaker(faults: Faults, name: str, clock: ManualClock) -> None:
    """While the store does not answer, breakers are made and call as always; when it does, they are asked about."""
    await SharedState(faults, clock=clock).force_open(name)
    first = breaker(f"{name}-first", clock)
    async with SharedState(faults, clock=clock):
        faults.fault = "hangs"
        known, new = breaker(first.name, clock), breaker(name, clock)
        assert await asyncio.to_thread(faults.reached.wait, 10)
        further = breaker(f"{name}-further", clock)
        for each in (known, new, further):
            assert not await rejected(each)
        faults.fault = ""
        faults.goes_on.set()
        await soon(lambda: new.state == "isolated")
        await soon(lambda: faults(further.name).state == "closed" == further.state)


async def test_one_that_is_closed_tells_no_breaker(name: str, clock: ManualClock) -> None:
    """After close, and where exchanges are made by hand only, breakers that are made later are left alone."""
    store = memory()
    first = breaker(name, clock)
    shared = SharedState(store.of, clock=clock)
    for _ in range(2):
        await shared.force_open(name)
        await shared.refresh()
        assert ("isolated", "closed") == (first.state, breaker(name, clock).state)
        async with shared:
            assert "isolated" == breaker(name, clock).state
        first.reset()


# -- when it exchanges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chance", "expected"), [(0.0, 18.0), (0.5, 20.0), (1.0, 22.0)])
async def test_it_exchanges_every_so_often_with_jitter(
    faults: Faults, name: str, chance: float, expected: float
) -> None:
    """Between two exchanges lie `every` seconds, a tenth more or less by chance."""
    guarded = breaker(name, ManualClock())
    clock = ManualClock(hold=True, chance=chance)
    shared = SharedState(lambda wanted: faults(wanted) if wanted.startswith(name) else None, every=20, clock=clock)
    async with shared:
        await shared.start()
        faults.asked.clear()
        await clock.advance(expected - 0.01)
        # Nor is anything under way.
        assert not any(task.get_name() == f"{shared.name}: exchange" for task in asyncio.all_tasks())
        assert [] == faults.asked
        await clock.advance(0.02)
        await soon(lambda: faults.asked != [])
    assert "closed" == guarded.state


async def test_it_can_be_started_again(name: str, clock: ManualClock) -> None:
    """After a close it starts anew, and takes back what it had switched before."""
    guarded = breaker(name, clock)
    store = memory()
    operator = SharedState(store.of, clock=clock)
    await operator.force_open(name)
    shared = SharedState(store.of, clock=clock)
    async with shared:
        assert "isolated" == guarded.state
    await operator.release(name)
    assert "isolated" == guarded.state
    async with shared:
        assert "closed" == guarded.state
    await shared.close()


async def test_only_changes_are_written(faults: Faults, name: str, clock: ManualClock) -> None:
    """A breaker that is as it was costs two reads an exchange and no write."""
    shared = SharedState(lambda wanted: faults(wanted) if wanted.startswith(name) else None, clock=clock)
    guarded = breaker(name, clock)
    await shared.refresh()
    faults.asked.clear()
    await guarded(fine)()
    await shared.refresh()
    assert ["counter", "state"] == [what for what, _ in faults.asked]


async def test_a_mapping_shares_what_stands_in_it(name: str, clock: ManualClock) -> None:
    """Storages that one has can be given by name; a breaker without one is not shared, and one without a switch has
    none."""
    mine = pybreaker.CircuitMemoryStorage("closed")
    shared = SharedState({name: mine}, clock=clock)
    guarded, other = breaker(name, clock), breaker(f"{name}-other", clock)
    await trip(guarded)
    await trip(other)
    assert await shared.refresh()
    assert "open" == mine.state
    with pytest.raises(ConfigurationError, match="cannot be switched"):
        await shared.force_open(name)


# -- what is refused --------------------------------------------------------------------------------------------------


async def test_wrong_values_say_what_would_be_right(name: str) -> None:
    """A storage object instead of a function, a mapping of what are no storages or of nothing, what is no clock, and
    lengths that are none, are refused."""

    async def later(name: str) -> None: ...

    wrong: Any
    for wrong in (pybreaker.CircuitMemoryStorage("closed"), None, 3, later):
        with pytest.raises(ConfigurationError, match="makes the storage of each breaker from its name"):
            SharedState(wrong)
    for wrong in ({"a": 3}, {"a": None}, {3: pybreaker.CircuitMemoryStorage("closed")}):
        with pytest.raises(ConfigurationError, match="has a pybreaker storage for each name of a breaker, not "):
            SharedState(wrong)
    with pytest.raises(ConfigurationError, match="is empty, so no breaker would be shared"):
        SharedState({})
    for wrong in (3, None, time, ManualClock):
        with pytest.raises(ConfigurationError, match="clock is where the time comes from"):
            SharedState(memory().of, clock=wrong)
    for wrong in (0, -1, float("inf"), float("nan"), "5", True, None):
        with pytest.raises(ConfigurationError, match="every is how many seconds"):
            SharedState(memory().of, every=wrong)
    for seconds in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ConfigurationError, match="seconds is how long"):
            await SharedState(memory().of).force_open(name, seconds=seconds)


async def test_an_operator_is_told_of_a_store_that_fails(faults: Faults, name: str, clock: ManualClock) -> None:
    """A switch that could not be written, or is not there when read back, is an error with a code."""
    operator = SharedState(faults, clock=clock)
    for fault, words in (("down", "refused"), ("swallows", "does not hold what it is given")):
        faults.fault = fault
        with pytest.raises(MeshkitError, match=words) as caught:
            await operator.force_open(name)
        assert "MK102" == caught.value.code
    faults.fault = "hangs"
    asking = asyncio.create_task(operator.release(name))
    for _ in range(5):
        await asyncio.sleep(0)
    await clock.advance(5)
    with pytest.raises(MeshkitError, match="no answer for 5 s"):
        await asking


def test_a_switch_reads_as_it_was_written() -> None:
    """The text in the store holds the whole word, and what is no word is refused or nothing."""
    word = Switch(on=True, until=1_700_000_600.5, at=1_700_000_000.0, version="x", reason="INC-42 “zu”", by="a@b")
    assert word == Switch.parse(word.text())
    for stock in ("closed", "open", "half-open"):
        assert Switch.parse(stock) is None
    for garbage in ("", "nonsense", "[]", "7", "null", '{"switch": "open"}', '{"switch": 1, "until": null}'):
        with pytest.raises(ValueError, match="is no switch"):
            Switch.parse(garbage)


async def test_a_listener_may_fail(name: str, clock: ManualClock) -> None:
    """A breaker whose listener raises is switched all the same, and so are those after it."""

    class Raises(pybreaker.CircuitBreakerListener):
        def state_change(self, *_: Any) -> None:
            raise RuntimeError("mine")

    guarded = [breaker(name, clock, listeners=[Raises()]), breaker(name, clock)]
    store = memory()
    await SharedState(store.of, clock=clock).force_open(name)
    with contextlib.suppress(RuntimeError):
        await SharedState(store.of, clock=clock).refresh()
    assert ["isolated", "isolated"] == [each.state for each in guarded]
