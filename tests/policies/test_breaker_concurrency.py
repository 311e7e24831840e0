"""One circuit breaker, shared by tasks, threads and event loops."""

import asyncio
import concurrent.futures
import contextlib
import sys
import threading

import pytest

from meshkit import CircuitBreaker, CircuitOpenError, Pipeline, Timeout, listen
from meshkit.core.events import CircuitChanged
from meshkit.core.trace import TRACING
from meshkit.testing.clock import ManualClock


def make(clock, **options):
    return CircuitBreaker("payments", **{"min_calls": 4, "window": 10, "open_for": 10.0, "clock": clock, **options})


def fail(breaker, times=1):
    for _ in range(times):
        with pytest.raises(ConnectionError), breaker.calling():
            raise ConnectionError("no")


def half_opened(clock, **options):
    """A breaker whose next caller is a probe."""
    breaker = make(clock, **options)
    fail(breaker, breaker.min_calls)
    clock.block(10)
    return breaker


@pytest.fixture
def changes():
    heard = []
    stop = listen(heard.append, kind=CircuitChanged)
    yield heard
    stop()


@pytest.fixture(autouse=True)
def switching():
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(number, run):
    """Run `run(index)` in so many threads at the same time, and hand on the first error."""
    start = threading.Barrier(number, timeout=30)

    def thread(index):
        start.wait()
        return run(index)

    with concurrent.futures.ThreadPoolExecutor(number) as pool:
        return [future.result(60) for future in [pool.submit(thread, index) for index in range(number)]]


# -- tasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["decorated", "pipeline", "block"])
@pytest.mark.parametrize(("probes", "at_once"), [(1, 1), (5, 5), (10, 3), (3, 1)])
async def test_500_tasks_make_exactly_the_probes(clock, form, probes, at_once):
    """500 tasks storm a half-open breaker, again and again until it closes: exactly `probes` get through, never more than
    `concurrent_probes` at once (Resilience4j's issues 1432 and 1090, and our finding E)."""
    breaker = half_opened(clock, probes=probes, concurrent_probes=at_once)
    running = most = admitted = 0
    going = asyncio.Event()

    async def probe():
        nonlocal running, most, admitted
        admitted += 1
        running += 1
        most = max(most, running)
        await going.wait()
        running -= 1

    async def block():
        async with breaker.calling():
            await probe()

    calls = {"decorated": breaker(probe), "pipeline": lambda: Pipeline("payments", breaker).call(probe), "block": block}
    refused = rounds = 0
    while breaker.state == "half_open":
        rounds += 1
        tasks = [asyncio.create_task(calls[form]()) for _ in range(500)]
        for _ in range(3):
            await asyncio.sleep(0)
        going.set()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, CircuitOpenError)
            refused += result is not None
        going.clear()
    assert (probes, at_once) == (admitted, most)
    assert -(-probes // at_once) == rounds
    assert 500 * rounds - probes == refused == breaker.counts["rejected"]
    assert "closed" == breaker.state


async def test_500_tasks_of_which_the_probe_fails(clock, changes):
    """The probe of a storm fails: one event, open again, and nobody else got through."""
    breaker = half_opened(clock)
    admitted = 0

    @breaker
    async def probe():
        nonlocal admitted
        admitted += 1
        await asyncio.sleep(0)
        raise ConnectionError

    results = await asyncio.gather(*(probe() for _ in range(500)), return_exceptions=True)
    assert 1 == admitted == sum(isinstance(result, ConnectionError) for result in results)
    assert ["open", "half_open", "open"] == [change.new for change in changes]


async def test_cancelling_500_tasks_takes_nothing_along(clock):
    """All of a storm are cancelled, wherever they are: every place is back, and nothing was counted."""
    breaker = half_opened(clock, probes=3)
    guarded = breaker(asyncio.Event().wait)
    tasks = [asyncio.create_task(guarded()) for _ in range(500)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert 3 == sum(isinstance(result, asyncio.CancelledError) for result in results)
    assert 497 == sum(isinstance(result, CircuitOpenError) for result in results)
    assert ("half_open", 3) == (breaker.state, breaker.counts["ignored"])
    for _ in range(3):
        async with breaker.calling():
            pass
    assert "closed" == breaker.state


async def test_in_a_task_group_and_under_asyncio_timeout(clock):
    """A probe that a TaskGroup or `asyncio.timeout` cancels is a cancellation there too: pybreaker makes it a
    CircuitBreakerError (finding D2)."""
    breaker = half_opened(clock)
    guarded = breaker(asyncio.Event().wait)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await guarded()

    async def broken():
        await asyncio.sleep(0)
        raise ZeroDivisionError

    probes = []

    async def grouped():
        async with asyncio.TaskGroup() as group:
            probes.append(group.create_task(guarded()))
            group.create_task(broken())

    with pytest.raises(ExceptionGroup) as caught:
        await grouped()
    assert probes[0].cancelled()
    assert caught.group_contains(ZeroDivisionError, depth=1)
    assert ("half_open", 2) == (breaker.state, breaker.counts["ignored"])


async def test_a_probe_cancelled_by_a_timeout_further_out_has_failed(clock):
    """The time of the whole call is over while the probe hangs: that is a failure of what it called, and the place is
    free again when it opens anew."""
    clock.hold = True
    breaker = half_opened(clock)
    call = asyncio.create_task(Pipeline("payments", Timeout(total=5, clock=clock), breaker).call(asyncio.Event().wait))
    await asyncio.sleep(0)
    await clock.advance(5)
    with pytest.raises(TimeoutError):
        await call
    assert ("open", 10.0) == (breaker.state, breaker.retry_after)


async def test_a_call_that_its_total_time_has_ended_was_slow_too(clock):
    """How long it took is counted from where it began, also where a timeout further out has ended it."""
    clock.hold = True
    breaker = make(clock, slow_after=3.0)
    call = asyncio.create_task(Pipeline("payments", Timeout(total=5, clock=clock), breaker).call(asyncio.Event().wait))
    await asyncio.sleep(0)
    await clock.advance(5)
    with pytest.raises(TimeoutError):
        await call
    assert (1, 1, 1) == (breaker.snapshot().calls, breaker.snapshot().failures, breaker.snapshot().slow)


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"window": None, "window_for": 60.0}, {"slow_after": 1.0}], ids=str)
def test_32_threads_trip_it_once(clock, changes, kind):
    """32 threads fail at the same time, 20 times each: one trip, one event (interlock's `tests/test_concurrency.py`)."""
    breaker = make(clock, **kind)

    @breaker
    def broken():
        raise ConnectionError

    def run(_):
        for _ in range(20):
            with contextlib.suppress(ConnectionError, CircuitOpenError):
                broken()

    together(32, run)
    assert ["open"] == [change.new for change in changes]
    assert 32 * 20 == breaker.counts["failure"] + breaker.counts["rejected"]
    assert (4, 4) == (breaker.snapshot().calls, breaker.snapshot().failures)


def test_32_threads_make_exactly_the_probes(clock, changes):
    """32 threads storm a half-open breaker at the same time: exactly `probes` run, and it closes once."""
    breaker = half_opened(clock, probes=5, concurrent_probes=5)
    gathered = threading.Event()
    admitted = []

    def run(index):
        with contextlib.suppress(CircuitOpenError), breaker.calling():
            admitted.append(index)
            gathered.wait(30)
        if breaker.counts["rejected"] == 27:
            gathered.set()

    together(32, run)
    assert (5, 27) == (len(admitted), breaker.counts["rejected"])
    assert ["open", "half_open", "closed"] == [change.new for change in changes]


@pytest.mark.parametrize("form", ["decorated", "pipeline", "block"])
def test_10_threads_run_in_parallel(clock, form):
    """All ten are inside of their calls at the same time: nothing is held while a call runs (pybreaker lets in one after
    another, finding H)."""
    breaker = make(clock)
    meeting = threading.Barrier(10, timeout=30)

    def block():
        with breaker.calling():
            meeting.wait()

    calls = {
        "decorated": breaker(meeting.wait),
        "pipeline": lambda: Pipeline("payments", breaker).call_sync(meeting.wait),
        "block": block,
    }
    together(10, lambda _: calls[form]())
    assert 10 == breaker.counts["success"]


@pytest.mark.parametrize("kind", [{}, {"window": None, "window_for": 60.0}], ids=["tallied", "locked"])
@pytest.mark.parametrize("hand", [None, "reset", "core", "modes"])
def test_counts_are_exact_after_32_threads(clock, kind, hand):
    """Every call is counted once, whatever it came to and whatever is done by hand meanwhile: success + failure + ignored
    + rejected is the number of calls."""
    breaker = make(clock, ignore=KeyError, failure_rate=1.0, **kind)
    ending = threading.Event()

    @breaker
    def work(number):
        if number % 10 == 3:
            raise ConnectionError
        if number % 10 == 7:
            raise KeyError
        return number

    def by_hand():
        while not ending.is_set():
            if hand == "reset":
                breaker.reset()
            elif hand == "core":
                breaker.core.open()
                breaker.core.close()
            else:
                breaker.isolate()
                breaker.disable()
                breaker.force_open()
                breaker.reset()

    def run(_):
        came_to = dict.fromkeys(("success", "failure", "ignored", "rejected"), 0)
        for number in range(150):
            try:
                work(number)
            except ConnectionError:
                came_to["failure"] += 1
            except KeyError:
                came_to["ignored"] += 1
            except CircuitOpenError:
                came_to["rejected"] += 1
            else:
                came_to["success"] += 1
        return came_to

    meddler = threading.Thread(target=by_hand)
    if hand is not None:
        meddler.start()
    seen = together(32, run)
    ending.set()
    if hand is not None:
        meddler.join(30)
    expected = {key: sum(each[key] for each in seen) for key in seen[0]}
    assert 32 * 150 == sum(expected.values())
    assert {**expected, "shadowed": 0} == breaker.counts
    if hand is None:
        assert {"success": 32 * 120, "failure": 32 * 15, "ignored": 32 * 15, "rejected": 0} == expected


def test_a_success_in_the_middle_of_a_reset_is_counted():
    """One that ends just when the tally of its period is read for the last time goes nowhere but into the counts."""

    class Interrupting(ManualClock):
        then = None

        def now(self):
            if self.then is not None:
                then, self.then = self.then, None
                then()
            return super().now()

    clock = Interrupting()
    breaker = make(clock)

    @breaker
    async def work():
        await asyncio.sleep(0)

    def end():
        with pytest.raises(StopIteration):
            under_way.send(None)

    under_way = work()
    under_way.send(None)
    with breaker.calling():
        pass
    clock.then = end
    breaker.reset()
    assert clock.then is None
    assert (2, 0) == (breaker.counts["success"], breaker.snapshot().calls)


def test_reading_while_threads_call(clock):
    """Scrapes at any moment see numbers that fit together, and add nothing to them."""
    breaker = make(clock, failure_rate=1.0)
    guarded = breaker(lambda number: number)
    ending = threading.Event()
    odd = []

    def read():
        before = 0
        while not ending.is_set():
            snapshot, success = breaker.snapshot(), breaker.counts["success"]
            if not (0 <= snapshot.calls <= 10 and snapshot.failures == 0 and before <= success):
                odd.append((snapshot, success))
            before = success

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    together(8, lambda _: [guarded(number) for number in range(1000)])
    ending.set()
    for reader in readers:
        reader.join(30)
    assert [] == odd
    assert (8000, 10) == (breaker.counts["success"], breaker.snapshot().calls)


@pytest.mark.parametrize("state", ["closed", "open"])
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_neither_a_success_nor_a_refusal_waits_for_anybody(clock, state, kind, monkeypatch):
    """While closed, a guarded function's success takes no lock, and neither does its refusal while open where nobody
    wants to be told of it: they are made also where another thread is inside of the breaker."""
    # Some test before may have put a tracer in place, which every test after it then has.
    monkeypatch.setattr(TRACING, "on", False)
    breaker = make(clock)

    async def later():
        return "ok"

    plain, coroutine = breaker(lambda: "ok"), breaker(later)
    guarded = plain if kind == "plain" else lambda: asyncio.run(coroutine())
    assert "ok" == guarded()
    if state == "open":
        breaker.force_open()
        clock.block(9.5)
    came_to = []

    def run():
        try:
            came_to.append(guarded())
        except CircuitOpenError as error:
            came_to.append(error.retry_after)

    with breaker._lock:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(10)
        assert [{"closed": "ok", "open": 0.5}[state]] == came_to
    thread.join()


# -- event loops ------------------------------------------------------------------------------------------------------


def test_two_event_loops_share_it_without_a_stall(clock, changes):
    """While a call of one loop is under way, another loop in another thread calls, trips it, and is refused; the first
    loop then is refused too (under Tornado, pybreaker stalls there: finding X)."""
    breaker = make(clock)
    inside, tripped = threading.Event(), threading.Event()

    @breaker
    async def work(error=None):
        await asyncio.sleep(0)
        if error is not None:
            raise error

    async def first():
        async with breaker.calling():
            inside.set()
            await asyncio.get_running_loop().run_in_executor(None, tripped.wait, 30)
        with pytest.raises(CircuitOpenError):
            await work()
        return "first"

    async def second():
        await asyncio.get_running_loop().run_in_executor(None, inside.wait, 30)
        for _ in range(4):
            with pytest.raises(ConnectionError):
                await work(ConnectionError("no"))
        with pytest.raises(CircuitOpenError):
            await work()
        tripped.set()
        return "second"

    assert ["first", "second"] == together(2, lambda index: asyncio.run((first, second)[index]()))
    assert ["open"] == [change.new for change in changes]


def test_two_event_loops_share_its_probes(clock):
    """500 tasks in each of two loops at a half-open breaker: one probe in all."""
    breaker = half_opened(clock)
    admitted = []
    stormed = threading.Barrier(2, timeout=30)

    @breaker
    async def probe():
        admitted.append(threading.get_ident())
        await asyncio.get_running_loop().run_in_executor(None, stormed.wait)

    async def storm():
        tasks = [asyncio.create_task(probe()) for _ in range(500)]
        await asyncio.sleep(0)
        if admitted[0] != threading.get_ident():
            await asyncio.get_running_loop().run_in_executor(None, stormed.wait)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        return sum(result is None for result in results)

    assert 1 == sum(together(2, lambda _: asyncio.run(storm())))
    assert (1, "closed") == (len(admitted), breaker.state)


# -- nested -----------------------------------------------------------------------------------------------------------


async def test_a_job_that_uses_the_same_breaker_does_not_deadlock(clock):
    """A guarded coroutine awaits an executor job that calls through the same breaker: both are made (pybreaker hangs
    there, finding ZZ; failsafe-go's nested circuit breakers)."""
    breaker = make(clock)
    inner = breaker(lambda: "inner")

    @breaker
    async def outer():
        return await asyncio.get_running_loop().run_in_executor(None, inner)

    assert "inner" == await asyncio.wait_for(outer(), 30)
    assert 2 == breaker.counts["success"]


@pytest.mark.parametrize("deep", [2, 3])
async def test_nested_calls_are_a_probe_each(clock, deep):
    """Where the same breaker is nested n deep, n probes at once let the whole of it through, and it closes."""
    breaker = half_opened(clock, probes=deep)

    @breaker
    async def nested(left):
        return "ok" if left == 1 else await nested(left - 1)

    assert "ok" == await nested(deep)
    assert "closed" == breaker.state


async def test_nested_deeper_than_the_probes_it_stays_half_open(clock):
    """With fewer probes than levels the inner call is refused, which says nothing of the outer one: its place is back, so
    that a call which is not nested can close it."""
    breaker = half_opened(clock)

    @breaker
    async def inner():
        return "ok"

    @breaker
    async def outer():
        return await inner()

    for _ in range(3):
        with pytest.raises(CircuitOpenError):
            await outer()
    assert ("half_open", 3) == (breaker.state, breaker.counts["ignored"])
    assert "ok" == await inner()
    assert "closed" == breaker.state


async def test_an_inner_failure_that_opens_it_is_not_told_twice(clock, changes):
    """The inner call opens the circuit; its error, passing through the outer call, is of an earlier period."""
    breaker = make(clock, min_calls=1)

    @breaker
    async def inner():
        raise ConnectionError

    @breaker
    async def outer():
        await inner()

    with pytest.raises(ConnectionError):
        await outer()
    assert ["open"] == [change.new for change in changes]
    assert (1, 2) == (breaker.snapshot().failures, breaker.counts["failure"])
