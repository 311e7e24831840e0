import asyncio
import contextlib
import copy
import gc
import pickle
import threading

import pybreaker
import pytest

from meshkit import (
    Backoff,
    CircuitBreaker,
    CircuitOpenError,
    ConfigurationError,
    Pipeline,
    Retry,
    Scope,
    Timeout,
    listen,
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


async def test_stays_closed_below_the_minimum_of_calls(clock):
    """Three failures of three calls do not open a breaker that judges from four."""
    guarded = breaker(clock)
    await fail(Pipeline("payments", guarded), 3)
    assert "closed" == guarded.state


async def test_opens_at_the_rate_with_one_event(clock, changes):
    """At the minimum of calls and the rate it opens, once, and the error that opened it is the caller's own."""
    guarded = breaker(clock)
    await fail(Pipeline("payments", guarded), 4)
    assert "open" == guarded.state
    assert [("closed", "open", 10.0)] == [(c.old, c.new, c.retry_after) for c in changes]


async def test_a_mixed_rate_opens(clock):
    """Half of the calls failing opens it, although they never fail twice in a row."""
    guarded = breaker(clock)
    guard = Pipeline("payments", guarded)
    for _ in range(2):
        await guard.call(fine)
        await fail(guard, 1)
    assert "open" == guarded.state


async def test_rejects_while_open_and_says_for_how_long(clock):
    """The function is not called, and `retry_after` falls as time passes."""
    guarded = breaker(clock)
    guard = Pipeline("payments", guarded)
    await fail(guard, 4)
    await clock.advance(4)
    with pytest.raises(CircuitOpenError) as caught:
        await guard.call(fine)
    assert pytest.approx(6.0) == caught.value.retry_after
    assert isinstance(caught.value, pybreaker.CircuitBreakerError)
    assert "MK501  circuit 'payments' is open; it lets a probe through in 6 s." == str(caught.value)


async def test_one_probe_of_many_callers(clock):
    """Of 500 callers after the wait, one gets through, and its success closes the circuit."""
    guarded = breaker(clock)
    guard = Pipeline("payments", guarded)
    await fail(guard, 4)
    await clock.advance(10)
    release = asyncio.Event()
    called = 0

    async def probe():
        nonlocal called
        called += 1
        await release.wait()

    callers = [asyncio.create_task(guard.call(probe)) for _ in range(500)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert 1 == called
    assert "half_open" == guarded.state
    release.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert 499 == sum(isinstance(result, CircuitOpenError) for result in results)
    assert "closed" == guarded.state


async def test_a_failed_probe_opens_again(clock, changes):
    """A probe that fails opens the circuit for another full wait."""
    guarded = breaker(clock)
    guard = Pipeline("payments", guarded)
    await fail(guard, 4)
    await clock.advance(10)
    await fail(guard, 1)
    assert ["open", "half_open", "open"] == [change.new for change in changes]
    assert 10.0 == guarded.retry_after


async def test_a_cancelled_probe_gives_its_place_back(clock):
    """A cancelled probe counts as nothing: the next caller is the probe."""
    guarded = breaker(clock)
    guard = Pipeline("payments", guarded)
    await fail(guard, 4)
    await clock.advance(10)
    probe = asyncio.create_task(guard.call(asyncio.Event().wait))
    await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert "half_open" == guarded.state
    assert "ok" == await guard.call(fine)
    assert "closed" == guarded.state


async def test_results_of_an_earlier_period_are_dropped(clock):
    """A call that began before the circuit opened neither closes it nor prolongs its wait."""
    guarded = breaker(clock)
    guard = Pipeline("payments", guarded)
    release = asyncio.Event()

    async def slow(error=None):
        await release.wait()
        if error:
            raise error

    late_success = asyncio.create_task(guard.call(slow))
    late_failure = asyncio.create_task(guard.call(slow, OSError()))
    await asyncio.sleep(0)
    await fail(guard, 4)
    await clock.advance(5)
    release.set()
    await asyncio.gather(late_success, late_failure, return_exceptions=True)
    assert "open" == guarded.state
    assert 5.0 == guarded.retry_after


async def test_a_probe_of_an_earlier_half_open_period_changes_nothing(clock):
    """The success of a probe that outlived its half-open period does not close a circuit that opened again since."""
    guarded = breaker(clock, probes=2)
    guard = Pipeline("payments", guarded)
    await fail(guard, 4)
    await clock.advance(10)
    release = asyncio.Event()
    late = [asyncio.create_task(guard.call(release.wait))]
    await asyncio.sleep(0)
    await fail(guard, 1)  # the other probe: opens again
    await clock.advance(10)
    late.append(asyncio.create_task(guard.call(release.wait)))  # a probe of the new half-open period
    await asyncio.sleep(0)
    release.set()
    await asyncio.gather(*late)
    assert "half_open" == guarded.state


async def test_the_wall_clock_does_not_matter(clock):
    """Setting the clock on the wall forward by two hours opens no circuit early."""
    guarded = breaker(clock)
    guard = Pipeline("payments", guarded)
    await fail(guard, 4)
    clock._offset += 7200
    with pytest.raises(CircuitOpenError):
        await guard.call(fine)


async def test_what_is_done_to_the_pybreaker_object_by_hand_is_honoured(clock, changes):
    """Opening `core` rejects calls; closing it lets them through again."""
    guarded = breaker(clock)
    guarded.core.open()
    with pytest.raises(CircuitOpenError):
        await Pipeline("payments", guarded).call(fine)
    guarded.core.close()
    assert "ok" == await Pipeline("payments", guarded).call(fine)
    assert ["open", "closed"] == [change.new for change in changes]


async def test_pybreaker_is_the_state_of_record(clock):
    """`core.current_state` and `core.fail_counter` say what is so."""
    guarded = breaker(clock)
    await fail(Pipeline("payments", guarded), 3)
    assert ("closed", 3) == (guarded.core.current_state, guarded.core.fail_counter)
    await fail(Pipeline("payments", guarded), 1)
    assert "open" == guarded.core.current_state


async def test_a_raising_listener_changes_nothing(clock):
    """A pybreaker listener that raises is told of the new state, and the circuit opens all the same."""
    seen = []

    class Listener(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            seen.append((cb.current_state, old_state.name, new_state.name))
            raise RuntimeError("listener")

    guarded = breaker(clock, listeners=[Listener()])
    await fail(Pipeline("payments", guarded), 4)
    assert [("open", "closed", "open")] == seen
    assert "open" == guarded.state


async def test_isolated_rejects_until_reset(clock):
    """`isolate` rejects however long it takes; `reset` ends it with an empty window."""
    guarded = breaker(clock)
    guarded.isolate()
    await clock.advance(1_000_000)
    with pytest.raises(CircuitOpenError) as caught:
        await Pipeline("payments", guarded).call(fine)
    assert (None, "isolated") == (caught.value.retry_after, guarded.state)
    guarded.reset()
    assert "ok" == await Pipeline("payments", guarded).call(fine)


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


async def test_rejections_do_not_grow_a_traceback(clock):
    """Each rejection is an error of its own, with a traceback as short as the first one's."""
    guarded = breaker(clock)
    guarded.isolate()

    async def depth():
        try:
            await Pipeline("payments", guarded).call(fine)
        except CircuitOpenError as error:
            traceback, frames = error.__traceback__, 0
            while traceback is not None:
                traceback, frames = traceback.tb_next, frames + 1
            return frames
        raise AssertionError("let through")

    assert 1 == len({await depth() for _ in range(1000)})


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


@pytest.mark.parametrize(
    "wrong",
    [{"failure_rate": 0}, {"failure_rate": 1.1}, {"min_calls": 11}, {"open_for": 0}, {"probes": 0}, {"probe_for": 0}],
    ids=str,
)
def test_wrong_options_are_refused(clock, wrong):
    """A value that cannot work is refused when the breaker is made."""
    with pytest.raises(ConfigurationError):
        breaker(clock, **wrong)


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


async def test_a_probe_that_hangs_opens_the_circuit_again(clock, changes):
    """After `probe_for` without a decision the circuit is open, and probes anew after its wait."""
    guarded = await opened(clock, probe_for=30.0)
    guard = Pipeline("payments", guarded)
    probe = asyncio.create_task(guard.call(asyncio.Event().wait))
    await asyncio.sleep(0)
    await clock.advance(29)
    with pytest.raises(CircuitOpenError, match="half-open"):
        await guard.call(fine)
    await clock.advance(1)
    with pytest.raises(CircuitOpenError) as caught:
        await guard.call(fine)
    assert (10.0, "open") == (caught.value.retry_after, guarded.state)
    await clock.advance(10)
    assert "ok" == await guard.call(fine)
    assert "closed" == guarded.state
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe


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
    retry = Retry(retry=strategy, backoff=Backoff(jitter=jitter), clock=clock)
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


def test_an_error_can_be_copied_and_sent_to_another_process():
    """A rejection keeps what it says, whatever way it travels."""
    error = CircuitOpenError(policy="payments", retry_after=3.0)
    for copied in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(error), 3.0, "payments") == (str(copied), copied.retry_after, copied.policy)


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
