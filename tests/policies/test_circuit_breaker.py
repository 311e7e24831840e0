"""The circuit breaker among the other policies: what opens it, who hears of it, and what is left behind."""

import asyncio
import contextlib
import gc
import threading

import pybreaker
import pytest

from meshkit import (
    Backoff,
    CircuitBreaker,
    CircuitOpenError,
    Pipeline,
    Retry,
    Scope,
    Timeout,
    listen,
    retry_end,
)
from meshkit.core.call import Call, Judgement, Outcome
from meshkit.core.events import CircuitChanged, CircuitRejected
from meshkit.core.scope import scope_open
from meshkit.policies.circuit_breaker import breakers


async def fine():
    return "ok"


async def broken():
    raise ConnectionError("no")


def breaker(clock, **options):
    return CircuitBreaker("payments", **{"min_calls": 4, "window": 10, "open_for": 10.0, "clock": clock, **options})


async def fail(guard, times):
    for _ in range(times):
        with pytest.raises(ConnectionError):
            await guard.call(broken)


@pytest.fixture
def changes():
    heard = []
    stop = listen(heard.append, kind=CircuitChanged)
    yield heard
    stop()


async def test_a_mixed_rate_opens(clock):
    """Half of the calls failing opens it, although they never fail twice in a row."""
    guarded = breaker(clock)
    guard = Pipeline("payments", guarded)
    for _ in range(2):
        await guard.call(fine)
        await fail(guard, 1)
    assert "open" == guarded.state


async def test_the_edge_decides_what_a_failure_is(clock):
    """Where an edge judges, results count as it says, and neutral ones count as nothing."""
    guarded = breaker(clock)
    sayings = {"down": "failure", "busy": "neutral", "fine": "success"}

    async def come_to(result):
        call = Call("payments", judge=lambda outcome: Judgement(breaker=sayings[outcome.result]))

        async def send(_):
            return result

        call.end(Outcome(await guarded.run(call, send)))

    for result in ("busy", "busy", "busy", "busy", "down", "down", "fine"):
        await come_to(result)
    assert "closed" == guarded.state
    await come_to("down")
    assert "open" == guarded.state
    assert {"success": 1, "failure": 3, "ignored": 4, "rejected": 0, "shadowed": 0} == guarded.counts


async def test_the_request_hears_that_a_breaker_opened(clock):
    """The failure that opens the circuit leaves `retry_after` in the Scope; a failure before it does not."""
    guard = Pipeline("payments", breaker(clock))
    with scope_open(Scope()) as scope:
        await fail(guard, 3)
        assert scope.opened is None
        await fail(guard, 1)
        assert 10.0 == scope.opened


async def test_a_timeout_inside_counts_as_a_failure(clock):
    """An attempt that is stopped for its time counts against the dependency."""
    clock.hold = True
    guarded = breaker(clock, min_calls=1)
    call = asyncio.create_task(Pipeline("payments", guarded, Timeout(1.0, clock=clock)).call(asyncio.Event().wait))
    await asyncio.sleep(0)
    await clock.advance(1.0)
    with pytest.raises(TimeoutError):
        await call
    assert "open" == guarded.state


def test_threads_run_in_parallel_and_trip_once(clock, changes):
    """32 threads call at the same time (none waits for another), and one trip is one event."""
    together = threading.Barrier(32, timeout=10)
    guard = Pipeline("payments", breaker(clock))

    def meet():
        together.wait()
        raise ConnectionError

    def caller():
        with pytest.raises(ConnectionError):
            guard.call_sync(meet)

    threads = [threading.Thread(target=caller) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ["open"] == [change.new for change in changes]


async def test_rejections_are_told(clock):
    """A rejection is an event with its `retry_after`, and a count."""
    heard = []
    stop = listen(heard.append, kind=CircuitRejected)
    guarded = breaker(clock)
    guarded.core.open()
    with pytest.raises(CircuitOpenError):
        await Pipeline("payments", guarded).call(fine)
    stop()
    assert [CircuitRejected(source="payments", retry_after=10.0)] == heard
    assert 1 == guarded.counts["rejected"]


def test_living_breakers_are_known(clock):
    """A scrape finds every breaker that is alive."""
    guarded = breaker(clock)
    assert guarded in breakers()


async def opened(clock, **options):
    """A breaker that lets a probe through now."""
    guarded = breaker(clock, **options)
    await fail(Pipeline("payments", guarded), 4)
    await clock.advance(10)
    return guarded


async def test_a_rule_that_fails_leaves_no_probe_behind(clock, caplog):
    """Where the rule for what is a failure raises, the call counts as nothing, and the next caller is the probe."""

    def rule(outcome):
        if outcome.result == "odd":
            raise KeyError("status")
        return outcome.error is not None

    async def odd():
        return "odd"

    guarded = await opened(clock, failed=rule)
    guard = Pipeline("payments", guarded)
    assert "odd" == await guard.call(odd)
    assert "has failed" in caplog.text
    assert "ok" == await guard.call(fine)
    assert "closed" == guarded.state


@pytest.mark.parametrize("breaks", ["jitter", "strategy", "cancellation"])
async def test_a_second_attempt_gives_its_place_back_however_it_ends(clock, breaks):
    """A probe that is a second attempt is free again where what decides about a third one raises, or it is cancelled."""
    calls = 0

    def jitter(longest):
        if calls > 1 and breaks == "jitter":
            raise ZeroDivisionError
        return 10.0

    def strategy(state):
        if calls > 1 and breaks == "strategy":
            raise ZeroDivisionError
        return state.outcome.failed

    async def flaky():
        nonlocal calls
        calls += 1
        if calls > 1 and breaks == "cancellation":
            raise asyncio.CancelledError
        raise ConnectionError

    # Opens by the first attempt; the second one is the probe, whose failure counts as nothing.
    guarded = breaker(
        clock, min_calls=1, failed=lambda outcome: True if calls == 1 else None if outcome.error else False
    )
    retry = Retry(retry=strategy, backoff=Backoff(jitter=jitter), patient=True, clock=clock)
    with pytest.raises(asyncio.CancelledError if breaks == "cancellation" else ZeroDivisionError):
        await Pipeline("payments", retry, guarded).call(flaky)
    assert (2, "half_open") == (calls, guarded.state)
    assert "ok" == await Pipeline("payments", guarded).call(fine)
    assert "closed" == guarded.state


async def test_a_second_attempt_stopped_by_the_deadline_counts_as_the_first_one_does(clock):
    """A dependency that hangs until the time of the whole call is over has failed, whichever attempt that was."""
    clock.hold = True
    counts = []
    for failures in (0, 1):
        guarded, left = breaker(clock), failures

        async def hang():
            nonlocal left
            left -= 1
            if left >= 0:
                raise ConnectionError
            await asyncio.Event().wait()

        retry = Retry(backoff=Backoff(first=0), clock=clock)
        call = asyncio.create_task(Pipeline("payments", Timeout(total=5, clock=clock), retry, guarded).call(hang))
        await asyncio.sleep(0)
        await clock.advance(5)
        with pytest.raises(TimeoutError):
            await call
        counts.append(guarded.counts["failure"] - failures)
    assert [1, 1] == counts


async def test_a_reset_forgets_what_is_under_way(clock):
    """Calls that began before a reset count for nothing after it, also where the circuit was closed."""
    guarded = breaker(clock)
    guard = Pipeline("payments", guarded)
    release = asyncio.Event()

    async def late():
        await release.wait()
        raise ConnectionError

    calls = [asyncio.create_task(guard.call(late)) for _ in range(10)]
    await asyncio.sleep(0)
    guarded.reset()
    release.set()
    await asyncio.gather(*calls, return_exceptions=True)
    assert ("closed", 0) == (guarded.state, guarded.core.fail_counter)


@pytest.mark.parametrize("raises", [False, True], ids=["looks", "raises"])
async def test_a_listener_of_the_pybreaker_object_itself_cannot_block_it(clock, changes, raises):
    """One that was added to `core` and asks the breaker, or raises, is heard, and each change is one event."""
    seen = []

    class Listener(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            seen.append(guarded.state)
            if raises:
                raise RuntimeError("listener")

    guarded = breaker(clock)
    guarded.core.add_listener(Listener())
    await asyncio.wait_for(fail(Pipeline("payments", guarded), 4), 5)
    assert ["open"] == seen
    assert ["open"] == [change.new for change in changes]
    with pytest.raises(CircuitOpenError):
        await Pipeline("payments", guarded).call(fine)


async def test_a_listener_may_act_on_the_breaker(clock):
    """A listener that resets the circuit inside the event of its opening leaves it closed."""
    guarded = breaker(clock)
    stop = listen(lambda change: guarded.reset() if change.new == "open" else None, kind=CircuitChanged)
    await fail(Pipeline("payments", guarded), 4)
    stop()
    assert "closed" == guarded.state
    assert "ok" == await Pipeline("payments", guarded).call(fine)


def test_hand_and_threads_agree(clock):
    """While a thread opens and closes `core` by hand, others call; at the end the circuit is as the hand left it."""
    guarded = breaker(clock, min_calls=10)
    guard, ending = Pipeline("payments", guarded), threading.Event()

    def call():
        while not ending.is_set():
            with contextlib.suppress(CircuitOpenError):
                guard.call_sync(lambda: None)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for _ in range(300):
        guarded.core.open()
        guarded.core.close()
    guarded.core.open()
    ending.set()
    for caller in callers:
        caller.join()
    with pytest.raises(CircuitOpenError):
        guard.call_sync(lambda: None)
    guarded.core.close()
    guard.call_sync(lambda: None)
    assert "closed" == guarded.state


async def test_a_rejection_is_free_when_it_is_dropped(clock):
    """An error holds no cycle, so that its memory does not wait for the collector while a circuit is open."""
    guarded = breaker(clock)
    guarded.isolate()

    def alive():
        return sum(isinstance(found, CircuitOpenError) for found in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        with contextlib.suppress(CircuitOpenError):
            await Pipeline("payments", Retry(clock=clock), guarded).call(fine)
        assert before == alive()
    finally:
        gc.enable()


async def test_what_an_inner_breaker_has_said_an_outer_one_leaves_alone(clock):
    """A retry around both hears of the one that opened, though the other one stays closed, and does not wait for it."""
    seen = 0

    async def fails():
        nonlocal seen
        seen += 1
        raise ConnectionError

    outer, inner = breaker(clock, min_calls=4), breaker(clock, min_calls=1)
    with pytest.raises(ConnectionError) as caught:
        await Pipeline("payments", Retry(clock=clock), outer, inner).call(fails)
    assert ("breaker", 1, []) == (retry_end(caught.value), seen, clock.sleeps)
