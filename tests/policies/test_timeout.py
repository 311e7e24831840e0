import asyncio
import copy
import gc
import pickle
import threading
import weakref

import pytest

from meshkit import (
    AttemptTimeoutError,
    Backoff,
    CircuitBreaker,
    ConfigurationError,
    DeadlineExceededError,
    Fallback,
    Pipeline,
    Retry,
    Scope,
    Timeout,
    listen,
)
from meshkit.core.events import TimedOut
from meshkit.core.scope import current_scope, scope_open
from meshkit.testing.clock import ManualClock


async def running(pipeline, clock, after, fn=None):
    """Start a call that never ends by itself, and let `after` seconds pass."""
    task = asyncio.create_task(pipeline.call(fn or asyncio.Event().wait))
    await asyncio.sleep(0)
    await clock.advance(after)
    return task


async def test_an_attempt_is_stopped_for_its_time(clock):
    """After `seconds` the call is cancelled, and the caller gets an AttemptTimeoutError, which is a TimeoutError."""
    task = await running(Pipeline("prices", Timeout(2.0, clock=clock)), clock, 2.0)
    with pytest.raises(AttemptTimeoutError, match="attempt 1 at 'prices' took longer than 2 s") as caught:
        await task
    assert isinstance(caught.value, TimeoutError)


async def test_the_deadline_of_the_request_comes_first(clock):
    """Where the request has less time left than an attempt may take, it is the deadline that is exceeded."""
    with scope_open(Scope(deadline=clock.now() + 1.0)):
        task = await running(Pipeline("prices", Timeout(2.0, clock=clock)), clock, 1.0)
    with pytest.raises(DeadlineExceededError):
        await task


async def test_total_narrows_what_is_left_inside(clock):
    """Inside `total`, the scope's deadline is the earlier one; outside it is as before."""

    async def left():
        return current_scope().deadline - clock.now()

    with scope_open(Scope(deadline=clock.now() + 60)) as scope:
        assert 30 == await Pipeline("prices", Timeout(total=30, clock=clock)).call(left)
        assert 60 == await Pipeline("prices", Timeout(total=90, clock=clock)).call(left)
        assert clock.now() + 60 == scope.deadline


async def test_no_time_left_starts_nothing(clock):
    """With the deadline in the past the function is not called."""

    async def never():
        raise AssertionError("called")

    with scope_open(Scope(deadline=clock.now())), pytest.raises(DeadlineExceededError):
        await Pipeline("prices", Timeout(1.0, clock=clock)).call(never)


async def test_cancellation_by_the_caller_stays_cancellation(clock):
    """Who cancels from outside gets CancelledError, and the task is cancelled, as in Polly's
    `Execute_Cancelled_EnsureNoTimeout`."""
    task = await running(Pipeline("prices", Timeout(2.0, clock=clock)), clock, 1.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_cancellation_at_the_same_time_wins(clock):
    """A caller's cancellation in the turn of the timeout is not lost, and carries the caller's message, as in Polly's
    `Execute_CallerCancellation_EnsureExceptionCarriesCallerToken`."""
    task = asyncio.create_task(Pipeline("prices", Timeout(2.0, clock=clock)).call(asyncio.Event().wait))
    await asyncio.sleep(0)
    task.cancel("the caller's")
    clock.block(2.0)  # the timer fires, and nothing else has run yet
    with pytest.raises(asyncio.CancelledError, match="the caller's"):
        await task
    assert task.cancelled()


async def test_a_result_in_the_turn_of_the_timeout_leaves_no_cancellation_behind(clock):
    """A call that swallows the cancellation and returns has its result kept, and the task can go on waiting."""

    async def stubborn():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "ended"

    async def caller():
        result = await Pipeline("prices", Timeout(2.0, clock=clock)).call(stubborn)
        await asyncio.sleep(0)
        return result, asyncio.current_task().cancelling()

    task = asyncio.create_task(caller())
    await asyncio.sleep(0)
    await clock.advance(2.0)
    assert ("ended", 0) == await task


async def test_nested_limits_are_told_apart(clock):
    """The inner limit raises the inner error, the outer one the outer."""
    inner_first = Pipeline("prices", Timeout(total=5, clock=clock), Timeout(2.0, clock=clock))
    task = await running(inner_first, clock, 2.0)
    with pytest.raises(AttemptTimeoutError):
        await task
    outer_first = Pipeline("prices", Timeout(total=1, clock=clock), Timeout(2.0, clock=clock))
    task = await running(outer_first, clock, 1.0)
    with pytest.raises(DeadlineExceededError):
        await task


async def test_asyncio_timeout_around_it_still_works(clock):
    """An `asyncio.timeout` of the caller is not taken for ours."""
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0):
            await Pipeline("prices", Timeout(60.0, clock=clock)).call(asyncio.Event().wait)
    assert not isinstance(caught.value, AttemptTimeoutError)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"seconds": 1, "total": 2},
        {"seconds": 0},
        {"total": -1},
        {"seconds": "5"},
        {"total": float("nan")},
        {"seconds": 1, "clock": 3},
    ],
    ids=str,
)
def test_wrong_options_are_refused(wrong):
    """Exactly one limit, above 0."""
    with pytest.raises(ConfigurationError):
        Timeout(**wrong)


def test_a_plain_function_is_refused_by_name():
    """A pipeline with a Timeout says, when it decorates a plain function, which policy cannot guard it."""
    with pytest.raises(ConfigurationError, match="Timeout in pipeline 'prices'"):
        Pipeline("prices", Timeout(1.0))(lambda: None)


# -- timeout, retry and fallback in each order ------------------------------------------------------------------------


@pytest.fixture
def held():
    """A clock on which sleepers wait for `advance`."""
    return ManualClock(hold=True)


@pytest.fixture
def timed_out():
    heard = []
    stop = listen(heard.append, kind=TimedOut)
    yield heard
    stop()


class Service:
    """Waits for `takes[n]` seconds at call n, the last one for all further ones, then raises or answers."""

    def __init__(self, clock, *takes, error=None):
        self.clock, self.takes, self.error, self.calls = clock, takes, error, 0

    async def __call__(self):
        takes = self.takes[min(self.calls, len(self.takes) - 1)]
        self.calls += 1
        if takes:
            await self.clock.sleep(takes)
        if self.error is not None:
            raise self.error
        return "answer"


def waits(seconds):
    return Backoff(first=seconds, jitter=lambda longest: longest)


async def ended(pipeline, clock, service, after):
    """What a call has come to `after` seconds."""
    task = asyncio.create_task(pipeline.call(service))
    await asyncio.sleep(0)
    await clock.advance(after)
    assert task.done()
    return task


async def test_a_call_within_its_time_is_left_alone(held, timed_out):
    """As failsafe-go's `TestShouldNotTimeout`."""
    task = await ended(Pipeline("prices", Timeout(2.0, clock=held)), held, Service(held, 1.9), 1.9)
    assert ("answer", []) == (task.result(), timed_out)


async def test_retry_timeout_with_blocked_function(held, timed_out):
    """As failsafe-go's `TestRetryTimeoutWithBlockedFunc`: attempts that hang are stopped and made again."""
    pipeline = Pipeline("prices", Retry(backoff=waits(0), clock=held), Timeout(1.0, clock=held))
    service = Service(held, 5, 5, 0)
    task = await ended(pipeline, held, service, 2.0)
    assert ("answer", 3, ["attempt", "attempt"]) == (task.result(), service.calls, [event.kind for event in timed_out])


async def test_retry_timeout_with_pending_retry(held, timed_out):
    """As failsafe-go's `TestRetryTimeoutWithPendingRetry`: the limit of an attempt does not reach the wait after it."""
    pipeline = Pipeline("prices", Retry(backoff=waits(2.0), clock=held), Timeout(1.0, clock=held))
    service = Service(held, 0, error=OSError("no"))
    task = await ended(pipeline, held, service, 6.0)
    assert isinstance(task.exception(), OSError)
    assert (3, []) == (service.calls, timed_out)


async def test_timeout_retry_with_blocked_function(held, timed_out):
    """As failsafe-go's `TestTimeoutRetryWithBlockedFunc`: the outer limit ends the attempt under way, and the retry."""
    pipeline = Pipeline("prices", Timeout(total=1.5, clock=held), Retry(backoff=waits(0), clock=held))
    service = Service(held, 0.6, error=OSError("no"))
    task = await ended(pipeline, held, service, 1.5)
    assert isinstance(task.exception(), DeadlineExceededError)
    assert (3, ["total"]) == (service.calls, [event.kind for event in timed_out])


async def test_timeout_retry_with_pending_retry(held, timed_out):
    """As failsafe-go's `TestTimeoutRetryWithPendingRetry`, but better: a wait that would outlast the limit is not begun,
    and the caller gets the error that there was."""
    pipeline = Pipeline("prices", Timeout(total=1.0, clock=held), Retry(backoff=waits(10), clock=held))
    service = Service(held, 0, error=OSError("no"))
    task = await ended(pipeline, held, service, 0)
    assert isinstance(task.exception(), OSError)
    assert (1, []) == (service.calls, timed_out)


async def test_fallback_timeout_with_blocked_function(held, timed_out):
    """As failsafe-go's `TestFallbackTimeoutWithBlockedFunc`: the fallback answers for what was stopped."""
    pipeline = Pipeline("prices", Fallback(answer="instead"), Timeout(1.0, clock=held))
    task = await ended(pipeline, held, Service(held, 5), 1.0)
    assert ("instead", 1) == (task.result(), len(timed_out))


async def test_fallback_with_inner_timeout(held, timed_out):
    """As failsafe-go's `TestFallbackWithInnerTimeout`: an inner limit does not reach an outer fallback."""

    async def slowly(outcome):
        await held.sleep(5)
        return "instead"

    pipeline = Pipeline("prices", Fallback(answer=slowly), Timeout(1.0, clock=held))
    task = await ended(pipeline, held, Service(held, 0, error=OSError("no")), 5.0)
    assert ("instead", []) == (task.result(), timed_out)


async def test_timeout_fallback_with_blocked_function(held, timed_out):
    """As failsafe-go's `TestTimeoutFallbackWithBlockedFunc`: the outer limit ends the call, and no fallback answers."""
    pipeline = Pipeline("prices", Timeout(1.0, clock=held), Fallback(answer="instead"))
    task = await ended(pipeline, held, Service(held, 5), 1.0)
    assert isinstance(task.exception(), AttemptTimeoutError)
    assert 1 == len(timed_out)


async def test_timeout_fallback_with_blocked_fallback(held, timed_out):
    """As failsafe-go's `TestTimeoutFallbackWithBlockedFallback`: a fallback inside takes no longer than the limit."""

    async def slowly(outcome):
        await held.sleep(5)

    pipeline = Pipeline("prices", Timeout(1.0, clock=held), Fallback(answer=slowly))
    task = await ended(pipeline, held, Service(held, 0, error=OSError("no")), 1.0)
    assert isinstance(task.exception(), AttemptTimeoutError)
    assert 1 == len(timed_out)


async def test_a_breaker_around_it_counts_what_was_stopped(held, timed_out):
    """As failsafe-go's composition "CircuitBreaker with Timeout": a call that was stopped is a failure, and opens it."""
    breaker = CircuitBreaker("prices", min_calls=1, clock=held)
    task = await ended(Pipeline("prices", breaker, Timeout(1.0, clock=held)), held, Service(held, 5), 1.0)
    assert isinstance(task.exception(), AttemptTimeoutError)
    assert "open" == breaker.state


# -- cancellation and asyncio's own tools -----------------------------------------------------------------------------


async def test_a_timeout_inside_a_task_group_is_an_error_of_its_task(clock):
    """A TaskGroup ends its other tasks for our error, and raises it in its group."""
    others = []

    async def other():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            others.append("cancelled")
            raise

    async def grouped():
        async with asyncio.TaskGroup() as group:
            group.create_task(other())
            group.create_task(Pipeline("prices", Timeout(2.0, clock=clock)).call(asyncio.Event().wait))

    task = asyncio.create_task(grouped())
    await clock.advance(0)  # everybody comes to wait
    await clock.advance(2.0)
    with pytest.raises(ExceptionGroup) as caught:
        await task
    assert [AttemptTimeoutError] == [type(error) for error in caught.value.exceptions]
    assert ["cancelled"] == others


async def test_a_task_group_inside_a_timeout_is_ended(clock):
    """What a guarded call has in a TaskGroup is cancelled with it."""
    inner = []

    async def waits_forever():
        try:
            await asyncio.Event().wait()
        finally:
            inner.append("ended")

    async def grouped():
        async with asyncio.TaskGroup() as group:
            group.create_task(waits_forever())
            group.create_task(waits_forever())

    task = await running(Pipeline("prices", Timeout(2.0, clock=clock)), clock, 2.0, grouped)
    with pytest.raises(AttemptTimeoutError):
        await task
    assert ["ended", "ended"] == inner


async def test_asyncio_timeout_that_ends_in_the_same_turn_is_the_callers(clock):
    """Where our limit and an `asyncio.timeout` around us end at once, the outer one wins."""

    async def caller():
        async with asyncio.timeout(0):
            await Pipeline("prices", Timeout(2.0, clock=clock)).call(asyncio.Event().wait)

    task = asyncio.create_task(caller())
    await asyncio.sleep(0)
    clock.block(2.0)
    with pytest.raises(TimeoutError) as caught:
        await task
    assert not isinstance(caught.value, AttemptTimeoutError)


@pytest.mark.parametrize("waits_first", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, ZeroDivisionError])
async def test_what_the_function_raises_comes_out_as_it_is(clock, error, waits_first):
    """KeyboardInterrupt and the like pass untouched."""
    raised = error()

    async def fails():
        if waits_first:
            await asyncio.sleep(0)
        raise raised

    with pytest.raises(error) as caught:
        await Pipeline("prices", Timeout(2.0, clock=clock)).call(fails)
    assert raised is caught.value


async def test_a_call_goes_through_all_of_its_waits(clock):
    """A call that waits several times, is thrown at and goes on, gets what it waits for."""
    seen = []

    async def waits():
        for number in range(3):
            await asyncio.sleep(0)
            seen.append(number)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            await asyncio.sleep(0)
        return "ended"

    task = await running(Pipeline("prices", Timeout(2.0, clock=clock)), clock, 1.0, waits)
    task.cancel()
    assert "ended" == await task
    assert [0, 1, 2, "cancelled"] == seen


async def test_any_awaitable_is_awaited(clock):
    """A function that returns a future is guarded like a coroutine function."""
    future = asyncio.get_running_loop().create_future()
    task = await running(Pipeline("prices", Timeout(2.0, clock=clock)), clock, 1.0, lambda: future)
    future.set_result("there")
    assert "there" == await task


async def test_a_first_step_that_holds_the_thread_is_stopped_where_it_waits(clock):
    """Time that passes before the call has to wait for anything counts."""

    async def holds():
        clock.block(3.0)
        await asyncio.Event().wait()

    with pytest.raises(AttemptTimeoutError):
        await Pipeline("prices", Timeout(2.0, clock=clock)).call(holds)


# -- streams ----------------------------------------------------------------------------------------------------------


async def test_a_stream_has_its_time_up_to_its_last_item(clock):
    """The limit reaches what is read after the first item, tells the reader, and closes the generator."""
    closed = []

    @Pipeline("rows", Timeout(5.0, clock=clock))
    async def rows():
        try:
            yield 1
            await asyncio.Event().wait()
            yield 2
        finally:
            closed.append(True)

    async def read():
        return [row async for row in rows()]

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    await clock.advance(4.9)
    assert not task.done()
    await clock.advance(0.1)
    with pytest.raises(AttemptTimeoutError, match="attempt 1 at 'rows' took longer than 5 s"):
        await task
    assert [True] == closed


async def test_a_stream_that_waits_for_its_first_item_is_stopped(clock):
    """Before the first item the limit is that of any call."""

    @Pipeline("rows", Timeout(5.0, clock=clock))
    async def rows():
        await asyncio.Event().wait()
        yield 1

    task = asyncio.create_task(anext(rows()))
    await clock.advance(0)
    await clock.advance(5.0)
    with pytest.raises(AttemptTimeoutError):
        await task


async def test_a_stream_that_nobody_reads_is_over_too(clock):
    """A reader that comes back after the limit is told, and the generator is closed."""
    closed = []

    @Pipeline("rows", Timeout(total=5.0, clock=clock))
    async def rows():
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    stream = rows()
    assert 1 == await anext(stream)
    await clock.advance(5.0)
    with pytest.raises(DeadlineExceededError):
        await anext(stream)
    assert [True] == closed


@pytest.mark.parametrize("way", ["read", "closed", "dropped"])
async def test_a_stream_that_is_over_leaves_no_timer(clock, way):
    """At its last item, when it is closed, or when it is dropped half read, a stream's timer is taken off."""

    @Pipeline("rows", Timeout(5.0, clock=clock))
    async def rows():
        yield 1
        yield 2

    stream = rows()
    await anext(stream)
    assert 1 == pending(clock)
    if way == "read":
        assert [2] == [row async for row in stream]
    elif way == "closed":
        await stream.aclose()
    del stream
    gc.collect()
    for _ in range(3):
        await asyncio.sleep(0)
    assert 0 == pending(clock)


def pending(clock):
    return sum(not timer.cancelled for _, _, timer in clock._timers)


# -- what is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "later"])
def test_a_loop_is_left_as_it_was(waits):
    """After calls in sequence and at once no timer is left on the loop, none is kept, and tasks and loop can go."""
    timeout = Timeout(60.0)
    guarded = Pipeline("prices", timeout)

    async def work():
        if waits:
            await asyncio.sleep(0)

    async def main():
        loop = asyncio.get_running_loop()
        for _ in range(300):
            await guarded.call(work)
        await asyncio.gather(*(guarded.call(work) for _ in range(300)))
        live = [handle for handle in loop._scheduled if not handle.cancelled()]
        return len(live), len(loop._scheduled), weakref.ref(loop)

    live, scheduled, loop = asyncio.run(main())
    gc.collect()
    assert 0 == live
    # asyncio drops cancelled timers once they are more than a hundred and half of all.
    assert scheduled <= 300
    assert loop() is None


class Hasty(ManualClock):
    """Rings at the next turn of the loop that asked for it."""

    def call_at(self, when, callback):
        return asyncio.get_running_loop().call_soon(callback)


def test_loops_in_threads_share_one():
    """Loops in several threads, one after the other too, each stop their own calls."""
    guarded = Pipeline("prices", Timeout(5.0, clock=Hasty()))
    ends = []

    def run():
        async def main():
            results = await asyncio.gather(
                *(guarded.call(asyncio.Event().wait) for _ in range(5)), return_exceptions=True
            )
            ends.extend(type(result) for result in results)

        for _ in range(2):
            asyncio.run(main())

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [AttemptTimeoutError] * 30 == ends


async def test_a_call_that_is_dropped_with_its_loop_says_nothing(clock):
    """A coroutine that is closed half way is closed inside, and takes its timer along."""
    closed = []

    async def waits():
        try:
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def call():
        coroutine = Pipeline("prices", Timeout(2.0, clock=clock)).call(waits)
        coroutine.send(None)
        coroutine.close()

    await call()
    assert ([True], 0) == (closed, pending(clock))


async def test_a_call_that_fails_leaves_no_cycle(clock):
    """Error, task and arguments go with the last reference: nothing waits for the collector."""

    class Problem(Exception):
        pass

    async def fails():
        await asyncio.sleep(0)
        raise Problem

    gc.disable()
    try:
        task = asyncio.create_task(
            Pipeline("prices", Timeout(total=9, clock=clock), Timeout(2.0, clock=clock)).call(fails)
        )
        await asyncio.wait([task])
        kept = weakref.ref(task.exception()), weakref.ref(task)
        del task
        await asyncio.sleep(0)
        assert (None, None) == (kept[0](), kept[1]())
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda timeout: pickle.loads(pickle.dumps(timeout))])
def test_it_can_be_copied(make):
    """A Timeout is its options, wherever it is sent."""
    assert Timeout(2.0) == make(Timeout(2.0))


def test_it_describes_itself():
    """For explain and the linter: which of the two limits it is."""
    assert {"kind": "timeout", "seconds": None, "total": 30} == Timeout(total=30).describe()
