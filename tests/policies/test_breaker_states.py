"""The circuit breaker's state machine, row by row, in each form that a guarded call can have."""

import asyncio
import concurrent.futures
import contextlib
import itertools
from datetime import timedelta

import pytest

from meshkit import CircuitBreaker, CircuitOpenError, Pipeline, listen
from meshkit.core.call import Call, Outcome
from meshkit.core.events import CircuitChanged, CircuitRejected
from meshkit.testing.clock import ManualClock


class Running:
    """A call that has been let through, for a test to end as it likes."""

    def __init__(self, task, ending):
        self._task = task
        self._ending = ending

    async def end(self, result=None, error=None):
        if error is not None:
            self._ending.set_exception(error)
        else:
            self._ending.set_result(result)
        await asyncio.wait({self._task})
        assert error is self._task.exception(), "what the function raises is what the caller gets"
        if error is None:
            assert self._task.result() in (result, None), "what it returns, too; a stream returns nothing"

    async def cancel(self):
        if isinstance(self._ending, concurrent.futures.Future):
            # Nobody can cancel a thread; what it waits for can be.
            self._ending.cancel()
        else:
            self._task.cancel()
        await asyncio.wait({self._task})


class Caller:
    """Calls through a breaker in one form: a guarded function of a kind, a pipeline, an edge, or a block."""

    def __init__(self, form):
        self.form = form
        self.calls = 0

    async def begin(self, breaker):
        """A call under way. Raises what refuses it."""
        loop = asyncio.get_running_loop()
        ending = concurrent.futures.Future() if self.form.startswith("plain") else loop.create_future()
        started = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._call(breaker, ending, started))
        await asyncio.wait({task, started}, return_when="FIRST_COMPLETED")
        if not started.done():
            await task
            raise AssertionError("it has neither begun nor been refused")
        return Running(task, ending)

    async def once(self, breaker, result=None, error=None):
        await (await self.begin(breaker)).end(result, error)

    async def fail(self, breaker, times, error=None):
        for _ in range(times):
            await self.once(breaker, error=error or ConnectionError("no"))

    async def refused(self, breaker):
        """The error of a call that is refused."""
        before = self.calls
        with pytest.raises(CircuitOpenError) as caught:
            await self.begin(breaker)
        assert before == self.calls, "a refused call does not run"
        return caught.value

    async def _call(self, breaker, ending, started):
        loop = asyncio.get_running_loop()

        def begun():
            self.calls += 1
            started.set_result(None)

        async def work():
            begun()
            return await ending

        if self.form == "decorated":
            return await breaker(work)()
        if self.form == "pipeline":
            return await Pipeline("payments", breaker).call(work)
        if self.form == "block":
            async with breaker.calling():
                return await work()
        if self.form == "edge":
            call = Call("payments")
            try:
                # The answer's head is there at once, and its body later.
                body = await breaker.run(call, lambda _: asyncio.sleep(0, work))
                result = await body()
            except BaseException as error:
                call.end(Outcome(error=error))
                raise
            call.end(Outcome(result))
            return result
        if self.form == "stream":

            @breaker
            async def items():
                begun()
                yield "first"
                await ending

            async for _ in items():
                pass
            return None

        @breaker
        def plain():
            loop.call_soon_threadsafe(begun)
            try:
                return ending.result(timeout=30)
            except concurrent.futures.CancelledError:
                raise asyncio.CancelledError from None

        if self.form == "plain pipeline":
            return await loop.run_in_executor(None, Pipeline("payments", breaker).call_sync, plain.__wrapped__)
        return await loop.run_in_executor(None, plain)


FORMS = ["decorated", "pipeline", "block", "edge", "stream", "plain", "plain pipeline"]


@pytest.fixture(params=FORMS)
def caller(request):
    return Caller(request.param)


@pytest.fixture
def simple():
    """For rows that do not depend on the form."""
    return Caller("decorated")


@pytest.fixture
def changes():
    heard = []
    stop = listen(heard.append, kind=CircuitChanged)
    yield heard
    stop()


@pytest.fixture(autouse=True)
def no_rule_fails(caplog):
    """What counts as nothing does so by a rule, and not because the rule has failed."""
    yield
    assert [] == [record for record in caplog.get_records("call") if "the rule of circuit" in record.getMessage()]


def make(clock, **options):
    return CircuitBreaker("payments", **{"min_calls": 4, "window": 10, "open_for": 10.0, "clock": clock, **options})


async def opened(clock, caller, **options):
    breaker = make(clock, **options)
    await caller.fail(breaker, breaker.min_calls)
    assert "open" == breaker.state
    return breaker


async def half_opened(clock, caller, **options):
    """A breaker whose next caller is a probe."""
    breaker = await opened(clock, caller, **options)
    await clock.advance(breaker.retry_after)
    return breaker


def path(changes):
    return [(change.old, change.new) for change in changes]


# -- closed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{"window": 10}, {"window": None, "window_for": 60.0}], ids=["count", "time"])
async def test_a_window_below_the_minimum_of_calls_does_not_open(clock, caller, kind):
    """All calls failing, one less than `min_calls` leave it closed and the next one opens it, as Resilience4j's
    `shouldOpenAfterFailureRateThresholdExceeded` and Hystrix's `testLowVolumeDoesNotTripCircuit`."""
    breaker = make(clock, **kind)
    await caller.fail(breaker, 3)
    assert "closed" == breaker.state
    await caller.fail(breaker, 1)
    assert "open" == breaker.state


@pytest.mark.parametrize("kind", [{"window": 10}, {"window": None, "window_for": 60.0}], ids=["count", "time"])
async def test_opens_at_the_rate_with_one_event_and_keeps_the_window(clock, caller, changes, kind):
    """Exactly at `failure_rate` it opens, with one event that says for how long and at what rate; what the window held
    can still be read, as Resilience4j's `shouldOpenAfterFailureRateThresholdExceeded`."""
    breaker = make(clock, failure_rate=0.6, min_calls=5, **kind)
    await caller.once(breaker, "ok")
    await caller.fail(breaker, 2)
    await caller.once(breaker, "ok")
    assert "closed" == breaker.state
    await caller.fail(breaker, 1)
    assert [CircuitChanged(source="payments", old="closed", new="open", retry_after=10.0, failure_rate=0.6)] == changes
    snapshot = breaker.snapshot()
    assert ("open", 5, 3, 0.6, 10.0) == (
        snapshot.state,
        snapshot.calls,
        snapshot.failures,
        snapshot.failure_rate,
        snapshot.retry_after,
    )


async def test_stays_closed_just_below_the_rate(clock, caller):
    """Four failures of nine do not make a half."""
    breaker = make(clock, min_calls=9)
    for _ in range(5):
        await caller.once(breaker, "ok")
    await caller.fail(breaker, 4)
    assert ("closed", 9, 4) == (breaker.state, breaker.snapshot().calls, breaker.snapshot().failures)


async def test_failures_that_have_left_the_window_no_longer_count(clock, caller):
    """A count window judges the last `window` calls: older failures are forgotten, and successes push them out."""
    breaker = make(clock, window=4, min_calls=4, failure_rate=0.75)
    await caller.fail(breaker, 2)
    for _ in range(3):
        await caller.once(breaker, "ok")
    await caller.fail(breaker, 2)
    assert ("closed", 2) == (breaker.state, breaker.snapshot().failures)
    await caller.fail(breaker, 1)
    assert "open" == breaker.state


async def test_a_time_window_forgets(clock, caller):
    """Failures of longer ago than `window_for` count no more."""
    breaker = make(clock, window=None, window_for=60.0)
    await caller.fail(breaker, 3)
    await clock.advance(60)
    await caller.fail(breaker, 3)
    assert ("closed", 3) == (breaker.state, breaker.snapshot().calls)


async def test_a_time_window_forgets_successes(clock, caller):
    """They count at the time at which they ended, whenever somebody looks."""
    breaker = make(clock, window=None, window_for=60.0, min_calls=1)
    for _ in range(3):
        await caller.once(breaker, "ok")
    await clock.advance(60)
    await caller.fail(breaker, 1)
    assert ("open", 1) == (breaker.state, breaker.snapshot().calls)


async def test_slow_calls_open_it_without_any_error(clock, caller, changes):
    """At `slow_rate` it opens although nothing failed, as Resilience4j's
    `shouldOpenAfterSlowCallRateThresholdExceededUsingMockClock`."""
    breaker = make(clock, slow_after=2.0, slow_rate=0.5)
    for seconds in (1.9, 1.9, 2.0):
        call = await caller.begin(breaker)
        await clock.advance(seconds)
        await call.end("ok")
    assert "closed" == breaker.state
    call = await caller.begin(breaker)
    await clock.advance(3)
    await call.end("ok")
    assert [("closed", "open")] == path(changes)
    snapshot = breaker.snapshot()
    assert (4, 0, 2, 0.5) == (snapshot.calls, snapshot.failures, snapshot.slow, snapshot.slow_rate)


async def test_slow_calls_below_their_rate_do_not_open_it(clock, caller):
    """Two slow calls of five are less than a half; a failure that is no slow call does not make them more."""
    breaker = make(clock, slow_after=2.0, slow_rate=0.5, min_calls=5)
    for seconds in (1, 1, 2, 2):
        call = await caller.begin(breaker)
        await clock.advance(seconds)
        await call.end("ok")
    await caller.fail(breaker, 1)
    assert ("closed", 5, 1, 2) == (
        breaker.state,
        breaker.snapshot().calls,
        breaker.snapshot().failures,
        breaker.snapshot().slow,
    )


async def test_a_fast_success_opens_nothing(clock, simple):
    """The rate is judged where something bad happened, and successes alone never open it."""
    breaker = make(clock, slow_after=2.0, slow_rate=0.5, min_calls=2)
    call = await simple.begin(breaker)
    await clock.advance(3)
    await call.end("ok")
    await simple.once(breaker, "ok")
    assert ("closed", 0.5) == (breaker.state, breaker.snapshot().slow_rate)


async def test_an_ignored_error_counts_as_nothing(clock, caller):
    """It is not in the window, and the caller gets it all the same, as Resilience4j's
    `shouldReleasePermissionWhenExceptionIgnored`."""
    breaker = make(clock, ignore=(KeyError, LookupError))
    await caller.fail(breaker, 10, KeyError("unknown user"))
    assert ("closed", 0, 10) == (breaker.state, breaker.snapshot().calls, breaker.counts["ignored"])


async def test_an_ignored_probe_gives_its_place_back(clock, caller):
    """An ignored error decides nothing in half-open, and the next caller is the probe, as Resilience4j's
    `shouldIgnoreExceptionsAndThenTransitionToClosed`."""
    breaker = await half_opened(clock, caller, ignore=KeyError)
    await caller.fail(breaker, 5, KeyError("unknown user"))
    assert "half_open" == breaker.state
    await caller.once(breaker, "ok")
    assert "closed" == breaker.state


@pytest.mark.parametrize("form", ["decorated", "pipeline", "edge", "plain", "plain pipeline"])
async def test_a_result_can_be_a_failure(clock, form):
    """A result that the rule calls bad counts in closed and decides in half-open, as Resilience4j's
    `CircuitBreakerResultHandlingTest`."""
    caller = Caller(form)
    breaker = make(clock, failed=lambda outcome: outcome.result == 503)
    for result in (200, 503, 200, 503):
        await caller.once(breaker, result)
    assert "open" == breaker.state
    await clock.advance(10)
    await caller.once(breaker, 503)
    assert "open" == breaker.state
    await clock.advance(10)
    await caller.once(breaker, 200)
    assert "closed" == breaker.state


async def test_the_rule_may_forgive_an_error(clock, caller):
    """What `failed` says goes for errors too: `False` is a success, `None` counts as nothing."""
    verdicts = {"a": False, "b": None, "c": True}
    breaker = make(clock, failed=lambda outcome: verdicts[str(outcome.error)])
    for text in "aaabbc":
        await caller.once(breaker, error=ValueError(text))
    assert {"success": 3, "failure": 1, "ignored": 2, "rejected": 0, "shadowed": 0} == breaker.counts
    assert (4, 1) == (breaker.snapshot().calls, breaker.snapshot().failures)


# -- open -------------------------------------------------------------------------------------------------------------


async def test_refuses_while_open_and_says_for_how_long(clock, caller):
    """The function is not called, and `retry_after` falls as time passes: Resilience4j's
    `shouldTransitionToHalfOpenAfterWaitDuration`, up to the wait's last moment."""
    breaker = await opened(clock, caller)
    for passed, left in ((0, 10.0), (4, 6.0), (5.5, 0.5)):
        await clock.advance(passed)
        error = await caller.refused(breaker)
        assert (left, "open", "payments") == (pytest.approx(error.retry_after), error.state, error.policy)
        assert left == pytest.approx(breaker.retry_after)
    assert 3 == breaker.counts["rejected"]


async def test_the_first_caller_after_the_wait_is_a_probe(clock, caller, changes):
    """At the very end of the wait the next caller finds it half-open, and is let through as probe 1, as Resilience4j's
    `shouldTransitionToHalfOpenAfterWaitDuration`."""
    breaker = await opened(clock, caller, probes=2)
    await clock.advance(10)
    probe = await caller.begin(breaker)
    assert [("closed", "open"), ("open", "half_open")] == path(changes)
    await probe.end("ok")
    assert "half_open" == breaker.state
    await caller.once(breaker, "ok")
    assert "closed" == breaker.state


async def test_without_traffic_it_says_that_it_is_ready(clock, simple, changes):
    """With the wait over and nobody calling, `state` is half-open and `retry_after` 0; the gauge needs no traffic, as in
    Resilience4j's `CircuitBreakerAutoTransitionStateMachineTest`."""
    breaker = await opened(clock, simple)
    await clock.advance(9.99)
    assert ("open", "open") == (breaker.state, breaker.snapshot().state)
    await clock.advance(0.01)
    assert ("half_open", "half_open", 0.0) == (breaker.state, breaker.snapshot().state, breaker.retry_after)
    assert [("closed", "open")] == path(changes)


@pytest.mark.parametrize("error", [None, ConnectionError("late")], ids=["success", "failure"])
async def test_what_ends_late_changes_nothing_while_open(clock, caller, changes, error):
    """A call of before the opening neither closes it nor prolongs its wait, and is no event, as Polly's
    `OnActionSuccess_EnsureCorrectBehavior` and `OnActionFailureAsync_EnsureCorrectBehavior`."""
    breaker = make(clock)
    late = await caller.begin(breaker)
    await caller.fail(breaker, 4)
    await clock.advance(4)
    await late.end("ok", error)
    assert ("open", 6.0, 4) == (breaker.state, breaker.retry_after, breaker.snapshot().calls)
    assert [("closed", "open")] == path(changes)


@pytest.mark.parametrize("error", [None, ConnectionError("late")], ids=["success", "failure"])
async def test_what_ends_late_is_not_in_the_next_window(clock, caller, error):
    """A call of before the opening is not counted in the window that begins when it has closed again."""
    breaker = make(clock)
    late = await caller.begin(breaker)
    await caller.fail(breaker, 4)
    await clock.advance(10)
    await caller.once(breaker, "ok")
    await late.end("ok", error)
    assert ("closed", 0) == (breaker.state, breaker.snapshot().calls)


# -- half-open --------------------------------------------------------------------------------------------------------


async def test_more_than_the_probes_are_refused(clock, caller):
    """With all probes under way, further callers are refused, and nobody can say for how long, as Resilience4j's
    `shouldOnlyPermitFourCallsInHalfOpenState` and failsafe-go's "should reject excessive attempts when breaker
    half-open"."""
    breaker = await half_opened(clock, caller, probes=4)
    probes = [await caller.begin(breaker) for _ in range(4)]
    error = await caller.refused(breaker)
    assert (None, "half_open") == (error.retry_after, error.state)
    assert breaker.retry_after is None
    for probe in probes:
        assert "half_open" == breaker.state
        await probe.end("ok")
    assert "closed" == breaker.state


async def test_probes_that_passed_take_their_places_with_them(clock, caller):
    """Of four probes two have passed and two are under way: a fifth call is refused."""
    breaker = await half_opened(clock, caller, probes=4)
    await caller.once(breaker, "ok")
    await caller.once(breaker, "ok")
    under_way = [await caller.begin(breaker) for _ in range(2)]
    await caller.refused(breaker)
    for probe in under_way:
        await probe.end("ok")
    assert "closed" == breaker.state


async def test_no_more_than_concurrent_probes_at_once(clock, caller):
    """Of three probes one at a time, the next is let through when the one before is over."""
    breaker = await half_opened(clock, caller, probes=3, concurrent_probes=1)
    for number in range(3):
        probe = await caller.begin(breaker)
        await caller.refused(breaker)
        await probe.end("ok")
        assert ("closed" if number == 2 else "half_open", 0.0) == (breaker.state, breaker.retry_after)


async def test_all_probes_passing_closes_it_with_a_new_window(clock, caller, changes):
    """Closed again, the failures of before count no more, as Resilience4j's
    `shouldTransitionBackToClosedStateWhenFailureIsBelowThreshold`."""
    breaker = await half_opened(clock, caller, probes=2)
    await caller.once(breaker, "ok")
    await caller.once(breaker, "ok")
    assert [("closed", "open"), ("open", "half_open"), ("half_open", "closed")] == path(changes)
    assert ("closed", 0, 0, 0.0) == (
        breaker.state,
        breaker.snapshot().calls,
        breaker.snapshot().failures,
        breaker.snapshot().failure_rate,
    )
    await caller.fail(breaker, 3)
    assert "closed" == breaker.state


async def test_a_failed_probe_opens_it_for_longer_each_time(clock, caller, changes):
    """Each half-open that fails makes the wait `open_backoff` times as long, up to `open_at_most`; closing starts over,
    as Polly's `BreakDurationGenerator_EnsureHalfOpenAttempts`."""
    breaker = await opened(clock, caller, open_backoff=2, open_at_most=35.0)
    for expected in (20.0, 35.0, 35.0):
        await clock.advance(breaker.retry_after)
        await caller.fail(breaker, 1)
        assert expected == breaker.retry_after == changes[-1].retry_after
    await clock.advance(35)
    await caller.once(breaker, "ok")
    await caller.fail(breaker, 4)
    assert 10.0 == breaker.retry_after


async def test_without_backoff_each_wait_is_as_long(clock, simple):
    """`open_backoff` left out, it is open for `open_for` each time."""
    breaker = await half_opened(clock, simple)
    for _ in range(3):
        await simple.fail(breaker, 1)
        assert 10.0 == breaker.retry_after
        await clock.advance(10)


async def test_a_slow_probe_opens_it(clock, caller):
    """A probe that succeeds too slowly shows no recovery, as Polly's `BreakDurationGenerator_EnsureHalfOpenAttempts`
    for one that fails."""
    breaker = await half_opened(clock, caller, slow_after=2.0)
    probe = await caller.begin(breaker)
    await clock.advance(2)
    await probe.end("ok")
    assert ("open", 10.0) == (breaker.state, breaker.retry_after)


async def test_one_bad_probe_is_enough(clock, caller):
    """One failure among many probes opens it, and the others, under way, decide nothing more."""
    breaker = await half_opened(clock, caller, probes=3)
    others = [await caller.begin(breaker) for _ in range(2)]
    await caller.fail(breaker, 1)
    for other in others:
        await other.end("ok")
    assert ("open", 10.0) == (breaker.state, breaker.retry_after)


async def test_a_cancelled_probe_gives_its_place_back(clock, caller):
    """It counts as nothing, and the next caller is the probe, as Hystrix's
    `testUnsubscriptionDoesNotLeaveCircuitStuckHalfOpen` and Resilience4j's `shouldIncreaseCounterOnReleasePermission`."""
    breaker = await half_opened(clock, caller)
    for _ in range(3):
        probe = await caller.begin(breaker)
        await caller.refused(breaker)
        await probe.cancel()
        assert ("half_open", 0.0) == (breaker.state, breaker.retry_after)
    await caller.once(breaker, "ok")
    assert ("closed", 3) == (breaker.state, breaker.counts["ignored"])


async def test_cancelled_calls_do_not_open_it(clock, caller):
    """While closed, a cancelled call is not in the window."""
    breaker = make(clock)
    for _ in range(10):
        await (await caller.begin(breaker)).cancel()
    assert ("closed", 0, 10) == (breaker.state, breaker.snapshot().calls, breaker.counts["ignored"])


async def test_a_probe_that_hangs_opens_it_again(clock, caller, changes):
    """With no decision after `probe_for` it is open, for a wait that has grown, and the late success of that probe closes
    nothing, as Resilience4j's
    `circuitBreakerTransitionsToOpenAfterWaitDurationInHalfOpenState`."""
    breaker = await half_opened(clock, caller, probe_for=30.0, open_backoff=3.0)
    hanging = await caller.begin(breaker)
    await clock.advance(29.9)
    assert "half_open" == (await caller.refused(breaker)).state
    await clock.advance(0.1)
    error = await caller.refused(breaker)
    assert ("open", 30.0) == (error.state, error.retry_after)
    await hanging.end("ok")
    assert "open" == breaker.state
    assert [("closed", "open"), ("open", "half_open"), ("half_open", "open")] == path(changes)


async def test_probes_that_hang_while_nobody_calls_open_it_from_that_moment_on(clock, caller, changes):
    """With no caller either, it has been open since `probe_for` was over: whoever looks then sees how long it still is,
    and whoever calls after that time is a probe."""
    breaker = await half_opened(clock, caller, probe_for=30.0, open_backoff=3.0)
    hanging = await caller.begin(breaker)
    await clock.advance(40)
    assert ("open", 20.0) == (breaker.state, breaker.retry_after)
    assert ("half_open", "open", 20.0) == (changes[-1].old, changes[-1].new, changes[-1].retry_after)
    await clock.advance(3600)
    assert ("half_open", 0.0) == (breaker.snapshot().state, breaker.snapshot().retry_after)
    await (await caller.begin(breaker)).end("ok")
    await hanging.end("ok", ConnectionError("late"))
    assert ("closed", 0) == (breaker.state, breaker.snapshot().calls)


async def test_a_result_that_comes_when_the_time_of_its_probe_is_over_decides_nothing(clock, caller):
    """Nobody has looked in between, and still the success of a probe that took longer than `probe_for` closes nothing."""
    breaker = await half_opened(clock, caller, probe_for=30.0)
    slow = await caller.begin(breaker)
    await clock.advance(30.5)
    await slow.end("ok")
    assert ("open", 9.5) == (breaker.state, breaker.retry_after)


async def test_probe_for_is_counted_from_the_last_probe(clock, caller):
    """As long as probes are let through, those under way may still decide."""
    breaker = await half_opened(clock, caller, probes=2, probe_for=30.0)
    first = await caller.begin(breaker)
    await clock.advance(29)
    second = await caller.begin(breaker)
    await clock.advance(29)
    assert "half_open" == (await caller.refused(breaker)).state
    await first.end("ok")
    await second.end("ok")
    assert "closed" == breaker.state


@pytest.mark.parametrize("error", [None, ConnectionError("late")], ids=["success", "failure"])
async def test_a_probe_of_an_earlier_half_open_decides_nothing(clock, caller, changes, error):
    """The result of a probe that outlived its half-open changes nothing in the next one (the case in which a fence that
    compares only the state, as nopanic's, closes the circuit)."""
    breaker = await half_opened(clock, caller, probes=2)
    late = await caller.begin(breaker)
    await caller.fail(breaker, 1)
    await clock.advance(10)
    probes = [await caller.begin(breaker), await caller.begin(breaker)]
    seen = len(changes)
    await late.end("ok", error)
    assert ("half_open", seen) == (breaker.state, len(changes))
    # Nor has it given back a place that is not its own.
    await caller.refused(breaker)
    for probe in probes:
        await probe.end("ok")
    assert "closed" == breaker.state


# -- what the numbers say after each transition -----------------------------------------------------------------------


async def test_what_the_window_holds_after_each_transition(clock, caller):
    """Kept when it opens, for inspection; untouched by probes; empty when it has closed or was reset, as Resilience4j's
    `shouldResetMetrics`. The counts are never reset."""
    breaker = await opened(clock, caller)
    assert (4, 4) == (breaker.snapshot().calls, breaker.core.fail_counter)
    await clock.advance(10)
    await caller.fail(breaker, 1)
    assert (4, 4) == (breaker.snapshot().calls, breaker.core.fail_counter)
    await clock.advance(10)
    await caller.once(breaker, "ok")
    assert (0, 0) == (breaker.snapshot().calls, breaker.core.fail_counter)
    await caller.fail(breaker, 2)
    breaker.reset()
    assert (0, 0) == (breaker.snapshot().calls, breaker.core.fail_counter)
    assert {"success": 1, "failure": 7, "ignored": 0, "rejected": 0, "shadowed": 0} == breaker.counts


async def test_the_failure_counter_of_pybreaker_forgets_as_the_window_does(clock, caller):
    """`core.fail_counter` is the failures in the window now, also where successes have pushed them out since."""
    breaker = make(clock)
    await caller.fail(breaker, 3)
    for _ in range(9):
        await caller.once(breaker, "ok")
    assert 1 == breaker.core.fail_counter
    await caller.once(breaker, "ok")
    assert 0 == breaker.core.fail_counter


async def test_leaving_shadow_keeps_what_was_seen(clock, caller, changes):
    """Switching shadow mode on and off resets nothing: what it has judged meanwhile stands, and is enforced from then
    on (Resilience4j's `shouldResetMetricsAfterMetricsOnlyStateTransition` begins anew; ours is a flag, no state)."""
    breaker = make(clock, shadow=True)
    await caller.fail(breaker, 4)
    await caller.once(breaker, "ok")
    assert ("open", 4, 1) == (breaker.state, breaker.snapshot().calls, breaker.counts["shadowed"])
    breaker.shadow = False
    await caller.refused(breaker)
    assert [("closed", "open")] == path(changes)
    breaker.shadow = True
    await caller.once(breaker, "ok")
    assert (1, 2) == (breaker.counts["rejected"], breaker.counts["shadowed"])
    breaker.reset()
    breaker.shadow = False
    await caller.fail(breaker, 4)
    await caller.refused(breaker)
    breaker.shadow = True
    await caller.once(breaker, "ok")
    assert (2, 3) == (breaker.counts["rejected"], breaker.counts["shadowed"])


# -- by hand, in every state ------------------------------------------------------------------------------------------

STATES = ["closed", "open", "ready", "half_open", "isolated", "disabled"]


async def brought_to(state, clock, caller, **options):
    """A breaker in that state. In half-open, its only probe is under way and is handed back with it."""
    if state == "closed":
        breaker = make(clock, **options)
        await caller.fail(breaker, 2)
        return breaker, None
    if state == "open":
        return await opened(clock, caller, **options), None
    if state == "ready":
        return await half_opened(clock, caller, **options), None
    if state == "half_open":
        breaker = await half_opened(clock, caller, **options)
        return breaker, await caller.begin(breaker)
    breaker = make(clock, **options)
    breaker.isolate() if state == "isolated" else breaker.disable()
    return breaker, None


@pytest.mark.parametrize("state", STATES)
async def test_force_open_from_every_state(clock, caller, changes, state):
    """It rejects from now on for the time given, then probes as usual, whatever it was before, as Resilience4j's
    `shouldForceOpenCircuitBreaker`."""
    breaker, probe = await brought_to(state, clock, caller, open_backoff=2.0)
    breaker.force_open(7)
    assert ("open", 7.0) == (breaker.state, breaker.retry_after)
    assert "open" == changes[-1].new
    if probe is not None:
        await probe.end("ok")
    await clock.advance(6.9)
    await caller.refused(breaker)
    await clock.advance(0.1)
    await caller.fail(breaker, 1)
    assert 20.0 == breaker.retry_after, "from open_for on, not from the time that was given by hand"


async def test_force_open_without_a_time_lasts_open_for(clock, simple):
    """`open_for` is its length where none is given, also while a longer one runs."""
    breaker = make(clock)
    breaker.force_open(100)
    breaker.force_open()
    assert 10.0 == breaker.retry_after
    assert 10.0 == (await simple.refused(breaker)).retry_after


async def test_force_open_starts_the_backoff_over(clock, simple):
    """What has grown by failed probes is forgotten when somebody opens it by hand."""
    breaker = await half_opened(clock, simple, open_backoff=2.0)
    await simple.fail(breaker, 1)
    breaker.force_open()
    await clock.advance(10)
    await simple.fail(breaker, 1)
    assert 20.0 == breaker.retry_after


@pytest.mark.parametrize("state", STATES)
async def test_isolate_from_every_state(clock, caller, changes, state):
    """It rejects everything, however long it takes, until `reset`, as Polly's `IsolateAsync_Ok`."""
    breaker, probe = await brought_to(state, clock, caller)
    breaker.isolate()
    assert ("isolated", None) == (breaker.state, breaker.retry_after)
    assert "isolated" == changes[-1].new
    if probe is not None:
        await probe.end("ok")
    await clock.advance(1_000_000)
    error = await caller.refused(breaker)
    assert ("isolated", None) == (error.state, error.retry_after)
    assert "isolated" == breaker.state
    breaker.reset()
    await caller.once(breaker, "ok")
    assert ("closed", "closed") == (breaker.state, changes[-1].new)


@pytest.mark.parametrize("state", STATES)
async def test_disable_from_every_state(clock, caller, changes, state):
    """It lets everything through and judges nothing until `reset`, as Resilience4j's `shouldDisableCircuitBreaker`."""
    breaker, probe = await brought_to(state, clock, caller)
    breaker.disable()
    seen = len(changes)
    assert ("disabled", 0.0) == (breaker.state, breaker.retry_after)
    await caller.fail(breaker, 20)
    if probe is not None:
        await probe.end(error=ConnectionError("late"))
    await clock.advance(1000)
    await caller.fail(breaker, 20)
    assert ("disabled", "disabled", seen) == (breaker.state, changes[-1].new, len(changes))
    breaker.reset()
    assert ("closed", 0) == (breaker.state, breaker.snapshot().calls)


@pytest.mark.parametrize("state", STATES)
async def test_reset_from_every_state(clock, caller, changes, state):
    """It is closed with an empty window, and what is under way counts no more, as Resilience4j's `shouldResetMetrics`."""
    breaker, probe = await brought_to(state, clock, caller, open_backoff=2.0)
    breaker.reset()
    assert ("closed", 0.0, 0) == (breaker.state, breaker.retry_after, breaker.snapshot().calls)
    assert (["closed"] if state != "closed" else []) == [change.new for change in changes][-1:]
    if probe is not None:
        await probe.end(error=ConnectionError("late"))
    await caller.fail(breaker, 3)
    assert ("closed", 3) == (breaker.state, breaker.snapshot().calls)
    await caller.fail(breaker, 1)
    assert 10.0 == breaker.retry_after, "and the backoff has started over"


@pytest.mark.parametrize("state", STATES)
async def test_shadow_in_every_state(clock, caller, state):
    """In shadow mode every call is let through; each that would have been rejected is one event and one count, as
    Resilience4j's `shouldPublishEachEventOnceInMetricOnlyState`."""
    breaker, probe = await brought_to(state, clock, caller, shadow=True)
    heard = []
    stop = listen(heard.append, kind=CircuitRejected)
    before = breaker.counts["shadowed"]
    call = await caller.begin(breaker)
    other = await caller.begin(breaker)
    stop()
    rejected = {"closed": 0, "open": 2, "ready": 1, "half_open": 2, "isolated": 2, "disabled": 0}[state]
    left = {"open": 10.0}.get(state)
    assert [CircuitRejected(source="payments", retry_after=left, shadow=True)] * rejected == heard
    assert rejected == breaker.counts["shadowed"] - before
    assert 0 == breaker.counts["rejected"]
    for each in (call, other, *([probe] if probe else [])):
        await each.end("ok")
    assert {"ready": "closed", "half_open": "closed"}.get(state, state) == breaker.state


async def test_a_call_let_through_in_shadow_decides_nothing(clock, caller):
    """What would have been rejected is not judged: while open its success closes nothing and its failure is in no
    window."""
    breaker = await opened(clock, caller, shadow=True)
    await caller.once(breaker, "ok")
    await caller.fail(breaker, 3)
    assert ("open", 4, 10.0) == (breaker.state, breaker.snapshot().calls, breaker.retry_after)
    await clock.advance(10)
    probe = await caller.begin(breaker)
    await caller.fail(breaker, 3)
    await probe.end("ok")
    assert "closed" == breaker.state


@pytest.mark.parametrize(("first", "second"), list(itertools.product(["isolate", "disable"], repeat=2)))
async def test_the_last_word_by_hand_counts(clock, simple, changes, first, second):
    """Isolated after disabled is isolated, and the other way round; said twice it is said once."""
    breaker = make(clock)
    getattr(breaker, first)()
    getattr(breaker, second)()
    names = {"isolate": "isolated", "disable": "disabled"}
    assert names[second] == breaker.state
    expected = [("closed", names[first])] + ([(names[first], names[second])] if first != second else [])
    assert expected == path(changes)
    breaker.reset()
    assert (names[second], "closed") == path(changes)[-1]


async def test_there_is_no_way_to_half_open_by_itself(clock, simple, changes):
    """Only a wait that is over leads to half-open (Resilience4j's `shouldNotAllowTransitionFromClosedToHalfOpen`): the
    breaker has no such operation, and neither reading nor time nor a reset moves a closed one there."""
    assert not hasattr(CircuitBreaker, "half_open")
    breaker = make(clock)
    breaker.reset()
    await clock.advance(1000)
    await simple.once(breaker, "ok")
    assert ("closed", []) == (breaker.state, changes)


# -- Retry-After ------------------------------------------------------------------------------------------------------


class Busy(Exception):
    def __init__(self, retry_after):
        super().__init__("busy")
        self.retry_after = retry_after


@pytest.mark.parametrize(
    ("asked", "lasts"),
    [
        (25.0, 25.0),
        (25, 25.0),
        (3.0, 10.0),
        (10.5, 10.5),
        (1e9, 300.0),
        (0, 10.0),
        (-5, 10.0),
        (float("inf"), 10.0),
        (float("nan"), 10.0),
        ("25", 25.0),
        (timedelta(seconds=25), 25.0),
        ("Tue, 14 Nov 2023 22:13:45 GMT", 25.0),
        ("Mon, 20 Nov 99999999999999999999 10:00:00 GMT", 10.0),
        ("soon", 10.0),
        (None, 10.0),
    ],
    ids=str,
)
async def test_it_stays_open_as_long_as_the_failure_that_opens_it_asks(clock, caller, asked, lasts):
    """The longer of `open_for` and `retry_after`, up to `open_at_most`; what is no length of time is not heeded."""
    breaker = make(clock)
    await caller.fail(breaker, 3)
    await caller.fail(breaker, 1, Busy(asked))
    assert lasts == breaker.retry_after


async def test_an_error_that_cannot_be_asked_is_a_failure_like_any_other(clock, caller):
    """A `retry_after` that raises when it is read says nothing, and keeps no failure from being counted."""

    class Odd(ConnectionError):
        @property
        def retry_after(self):
            raise RuntimeError("property")

    breaker = make(clock)
    await caller.fail(breaker, 4, Odd())
    assert ("open", 10.0, 4) == (breaker.state, breaker.retry_after, breaker.counts["failure"])


async def test_less_than_a_second_is_heeded_too(clock, simple):
    """A breaker that is open for a tenth of a second may be asked for half of one."""
    breaker = make(clock, open_for=0.1)
    await simple.fail(breaker, 4, Busy(0.5))
    assert 0.5 == breaker.retry_after


async def test_a_probe_that_asks_for_time_gets_it(clock, caller, changes):
    """A probe's `retry_after` counts where it is longer than the backoff, and does not multiply afterwards."""
    breaker = await half_opened(clock, caller, open_backoff=2.0, open_at_most=100.0)
    for asked, lasts in ((50.0, 50.0), (50.0, 50.0), (50.0, 80.0), (500.0, 100.0)):
        await caller.fail(breaker, 1, Busy(asked))
        assert lasts == breaker.retry_after == changes[-1].retry_after
        await clock.advance(lasts)


async def test_it_can_be_told_not_to_heed(clock, simple):
    """`heed_retry_after=False` leaves the length to `open_for`."""
    breaker = make(clock, heed_retry_after=False)
    await simple.fail(breaker, 4, Busy(50.0))
    assert 10.0 == breaker.retry_after


async def test_an_open_time_of_its_own_bounds_retry_after(clock, simple):
    """Where `open_for` is above 300 s, that is also the most that `Retry-After` can ask for."""
    breaker = make(clock, open_for=500.0)
    await simple.fail(breaker, 4, Busy(1000.0))
    assert (500.0, 500.0) == (breaker.open_at_most, breaker.retry_after)


# -- the clock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [2, -2])
async def test_the_wall_clock_changes_nothing(caller, hours):
    """Two hours forward or back on the wall: the wait is as long as before, on the monotonic clock."""
    clock = ManualClock()
    breaker = await opened(clock, caller, half_open_by_timer=True)
    clock._offset += hours * 3600
    assert 10.0 == (await caller.refused(breaker)).retry_after
    await clock.advance(10)
    await caller.once(breaker, "ok")
    assert "closed" == breaker.state


@pytest.mark.parametrize("start", [0.0, -1000.0, 1e12], ids=["zero", "negative", "huge"])
@pytest.mark.parametrize("kind", [{"window": 10}, {"window": None, "window_for": 60.0}], ids=["count", "time"])
async def test_where_the_clock_begins_does_not_matter(caller, start, kind):
    """The whole circle goes the same at time 0, below it, and after thirty thousand years."""
    clock = ManualClock(start=start)
    breaker = make(clock, slow_after=5.0, **kind)
    await caller.fail(breaker, 3)
    await clock.advance(1)
    assert ("closed", 3) == (breaker.state, breaker.snapshot().calls)
    await caller.fail(breaker, 1)
    assert ("open", 10.0) == (breaker.state, breaker.retry_after)
    await clock.advance(9)
    assert 1.0 == (await caller.refused(breaker)).retry_after
    await clock.advance(1)
    await caller.once(breaker, "ok")
    assert ("closed", 0) == (breaker.state, breaker.snapshot().slow)


@pytest.mark.parametrize("factor", [1.5, 2.0, 1e6, 1e300])
async def test_the_wait_never_reaches_infinity(clock, simple, factor):
    """After 1,200 failed probes the wait is `open_at_most`, whatever the factor (interlock's `MAX_BACKOFF_ROUNDS`)."""
    breaker = await half_opened(clock, simple, open_backoff=factor, open_at_most=1e6)
    for _ in range(1200):
        with contextlib.suppress(ConnectionError), breaker.calling():
            raise ConnectionError
        left = breaker.retry_after
        clock.block(left)
    assert 1e6 == left
