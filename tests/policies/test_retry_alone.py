"""A Retry that is alone around a function, one inside a pipeline, and what both owe the rest of the house."""

import asyncio
import contextlib
import gc
import inspect
import sys
import threading
import traceback
import weakref
from dataclasses import FrozenInstanceError

import pytest

from meshkit import (
    Backoff,
    BulkheadFullError,
    CircuitOpenError,
    ConfigurationError,
    Pipeline,
    Retry,
    RetryBudget,
    Scope,
    Timeout,
    current_attempt,
    listen,
    retry_end,
)
from meshkit.core.call import Call, Judgement, Outcome
from meshkit.core.events import RetryBudgetExhausted, RetryEnded, RetryScheduled
from meshkit.core.scope import current_scope, scope_open
from meshkit.core.trace import tracer, use_tracer
from meshkit.testing.clock import ManualClock

AT_ONCE = Backoff(first=0)
NONE = Backoff(jitter="none")


class Neighbour:
    """A policy that does nothing: with it a pipeline takes no shortcut."""

    def __init__(self):
        self.ended = []

    async def run(self, call, call_next):
        call.on_end(lambda outcome: self.ended.append(type(outcome.error).__name__))
        return await call_next(call)

    def run_sync(self, call, call_next):
        call.on_end(lambda outcome: self.ended.append(type(outcome.error).__name__))
        return call_next(call)

    def describe(self):
        return {"kind": "neighbour"}


SHAPES = pytest.mark.parametrize("shape", ["alone", "outer", "inner", "edge"])
KINDS = pytest.mark.parametrize("sync", [False, True], ids=["async", "plain"])


def guarded(shape, retry, fn):
    """`fn` (plain or async) as it is called through `retry` in each of its places."""
    if shape == "alone":
        return Pipeline("prices", retry)(fn)
    if shape == "outer":
        return Pipeline("prices", retry, Neighbour())(fn)
    if shape == "inner":
        return Pipeline("prices", Neighbour(), retry)(fn)
    if inspect.iscoroutinefunction(fn):

        async def send(call):
            return await fn()

        async def edge():
            with scope_open(Scope()):
                return await retry.run(Call("prices"), send)

        return edge

    def edge_sync():
        with scope_open(Scope()):
            return retry.run_sync(Call("prices"), lambda call: fn())

    return edge_sync


def scripted(sync, *outcomes):
    left, seen = list(outcomes), []

    def fn():
        seen.append((current_attempt(), current_scope() is not None))
        outcome = left.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def afn():
        return fn()

    return (fn if sync else afn), seen


async def called(fn):
    result = fn()
    return await result if inspect.isawaitable(result) else result


# -- the same in every place ------------------------------------------------------------------------------------------


@SHAPES
@KINDS
async def test_the_decisions_are_the_same_in_every_place(clock, shape, sync):
    """Alone, around others, inside others, and led by an edge: attempts, waits, error, note, reason and events agree."""
    heard, errors = [], [OSError("1"), OSError("2"), OSError("3")]
    stops = [listen(heard.append, kind=kind) for kind in (RetryScheduled, RetryEnded)]
    fn, seen = scripted(sync, *errors)
    try:
        with pytest.raises(OSError, match="3") as caught:
            await called(guarded(shape, Retry(backoff=NONE, clock=clock), fn))
    finally:
        for stop in stops:
            stop()
    assert 3 == len(seen)
    assert [0.1, 0.2] == clock.sleeps
    assert caught.value is errors[2]
    assert "attempts" == retry_end(caught.value)
    assert ["meshkit: gave up on 'prices' after 3 attempts, ended by attempts"] == caught.value.__notes__
    assert [
        RetryScheduled(source="prices", attempt=1, delay=0.1, error_type="OSError"),
        RetryScheduled(source="prices", attempt=2, delay=0.2, error_type="OSError"),
        RetryEnded(source="prices", attempts=3, reason="attempts", error_type="OSError"),
    ] == heard


@KINDS
@pytest.mark.parametrize("shape", ["alone", "outer", "inner"])
async def test_attempts_are_numbered_and_share_a_scope(clock, shape, sync):
    """Each attempt sees its number; from the second on there is a scope, as a pipeline opens one, and after the call
    there is none."""
    fn, seen = scripted(sync, OSError(), OSError(), "ok")
    assert "ok" == await called(guarded(shape, Retry(clock=clock), fn))
    assert [(1, shape != "alone"), (2, True), (3, True)] == seen
    assert (1, None) == (current_attempt(), current_scope())


@KINDS
async def test_a_retry_in_a_later_attempt_of_another_counts_from_one(clock, sync):
    """The first attempt of a retry that is alone is 1 also in the second attempt of the pipeline around it."""
    inner, seen = scripted(sync, OSError(), OSError(), OSError(), "ok")
    decorated = Pipeline("inner", Retry(attempts=2, backoff=AT_ONCE, clock=clock))(inner)
    outer_seen = []

    if sync:

        def outer():
            outer_seen.append(current_attempt())
            try:
                return decorated()
            finally:
                outer_seen.append(current_attempt())

    else:

        async def outer():
            outer_seen.append(current_attempt())
            try:
                return await decorated()
            finally:
                outer_seen.append(current_attempt())

    assert "ok" == await called(Pipeline("outer", Retry(backoff=AT_ONCE, clock=clock), Neighbour())(outer))
    assert [1, 2, 1, 2] == [number for number, _ in seen]
    assert [1, 1, 2, 2] == outer_seen


async def test_arguments_and_the_functions_face_are_kept(clock):
    """Name, docstring and arguments of the function are its own, and it stays a coroutine function."""
    left = [OSError()]

    @Pipeline("prices", Retry(clock=clock))
    async def fetch(a, /, b, *, c=3):
        """Fetch it."""
        if left:
            raise left.pop()
        return a, b, c

    assert (1, 2, 4) == await fetch(1, b=2, c=4)
    assert inspect.iscoroutinefunction(fetch)
    assert ("fetch", "Fetch it.") == (fetch.__name__, fetch.__doc__)


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_plain_function_that_returns_a_coroutine_is_refused(clock, attempt):
    """It has not run, so it is no success: tenacity takes it for one."""
    left = [OSError()] * (attempt - 1)

    async def work():
        raise AssertionError

    @Pipeline("prices", Retry(clock=clock))
    def fetch():
        if left:
            raise left.pop()
        return work()

    with pytest.raises(ConfigurationError, match="async def"):
        fetch()


async def test_many_calls_at_once_make_exactly_two_attempts_each(clock):
    """100 concurrent calls of one decorated function, each failing once, make 200 attempts."""
    count = {}

    @Pipeline("prices", Retry(clock=clock))
    async def fetch(name):
        count[name] = count.get(name, 0) + 1
        assert count[name] == current_attempt()
        await asyncio.sleep(0)
        if count[name] == 1:
            raise OSError
        return count[name]

    assert [2] * 100 == await asyncio.gather(*(fetch(n) for n in range(100)))


async def test_interleaved_calls_keep_their_own_attempt_numbers(clock):
    """Calls that fail different numbers of times through one object never see each other's: as tenacity's
    `test_attempt_number_is_correct_for_interleaved_coroutines`."""

    @Pipeline("prices", Retry(attempts=9, backoff=AT_ONCE, clock=clock))
    async def fetch(failures, seen):
        seen.append(current_attempt())
        await asyncio.sleep(0)
        if len(seen) <= failures:
            raise OSError
        return seen

    results = await asyncio.gather(*(fetch(failures, []) for failures in range(8)))
    assert [list(range(1, failures + 2)) for failures in range(8)] == results


def test_threads_share_a_retry():
    """32 threads through one decorated plain function: each makes its own two attempts."""
    local, results = threading.local(), []

    @Pipeline("prices", Retry(backoff=AT_ONCE))
    def fetch():
        local.count = getattr(local, "count", 0) + 1
        if local.count == 1:
            raise OSError
        return local.count, current_attempt()

    threads = [threading.Thread(target=lambda: results.append(fetch())) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(2, 2)] * 32 == results


@KINDS
async def test_the_traceback_reaches_down_to_where_it_failed(clock, sync):
    """The last error keeps its own traceback, and no error of ours stands before it."""
    fn, _ = scripted(sync, OSError("1"), OSError("2"), OSError("3"))
    with pytest.raises(OSError, match="3") as caught:
        await called(guarded("alone", Retry(backoff=AT_ONCE, clock=clock), fn))
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "fn" == names[-1]
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@SHAPES
@KINDS
@pytest.mark.parametrize("attempts", [1, 2, 3])
async def test_a_failed_call_leaves_nothing_for_the_collector(clock, shape, sync, attempts):
    """The errors of all attempts are gone with the last reference to them: no cycle keeps any."""

    class Big(Exception):
        pass

    known, left = [], [Big() for _ in range(attempts)]
    known += map(weakref.ref, left)

    def fn():
        raise left.pop(0)

    async def afn():
        raise left.pop(0)

    decorated = guarded(shape, Retry(attempts=attempts, backoff=AT_ONCE, clock=clock), fn if sync else afn)
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(Big):
            await called(decorated)
        assert [None] * attempts == [error() for error in known]
    finally:
        gc.enable()


# -- cancellation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["alone", "outer", "inner", "edge"])
async def test_a_cancellation_comes_out_of_every_suspension_point(shape):
    """Drive the coroutine and throw at each point where it waits, in an attempt or between two: `CancelledError` comes
    out, no further attempt is made, and the retry that was not made costs the budget nothing: as Polly's
    `ExecuteAsync_CanceledDuringDelay_EnsureNotExecutedAgain` and failsafe-go's `test/cancellation_test.go`."""
    point = 0
    while True:
        clock = ManualClock()
        budget = RetryBudget(ratio=0, at_least=9, clock=clock)
        retry, began = Retry(backoff=NONE, budget=budget, clock=clock), []

        async def fn(began=began):
            began.append(1)
            await asyncio.sleep(0)
            if len(began) < 3:
                raise OSError
            return "ok"

        coroutine = guarded(shape, retry, fn)()
        try:
            for _ in range(point + 1):
                coroutine.send(None)
        except StopIteration:
            break
        attempts = len(began)
        with pytest.raises(asyncio.CancelledError):
            coroutine.throw(asyncio.CancelledError())
        assert attempts == len(began)
        assert 9 - (attempts - 1) == budget.balance
        assert (1, None) == (current_attempt(), current_scope())
        point += 1
    # Three attempts and two waits.
    assert 5 == point


async def test_a_cancelled_task_is_cancelled(clock):
    """In a task group and in a task: `cancelled()` is true, in an attempt and in a wait alike."""
    clock.hold = True

    @Pipeline("prices", Retry(clock=clock))
    async def fetch(hang):
        if hang:
            await asyncio.Event().wait()
        raise OSError

    for hang in (True, False):
        task = asyncio.ensure_future(fetch(hang))
        for _ in range(4):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(fetch(True))
        await asyncio.sleep(0)
        task.cancel()
    assert task.cancelled()


async def test_an_outer_timeout_ends_a_wait(clock):
    """`asyncio.timeout` around a retry gives TimeoutError, though the retry would go on."""
    clock.hold = True

    @Pipeline("prices", Retry(clock=clock))
    async def fetch():
        raise OSError

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await fetch()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@KINDS
async def test_exits_are_not_touched(clock, error, sync):
    """A KeyboardInterrupt comes out of the first attempt as it is."""
    fn, seen = scripted(sync, error(), "ok")
    decorated = guarded("alone", Retry(clock=clock), fn)
    with pytest.raises(error):
        # By hand: a loop would end with it.
        decorated() if sync else decorated().send(None)
    assert 1 == len(seen)


# -- results ----------------------------------------------------------------------------------------------------------


@SHAPES
@KINDS
async def test_a_result_can_be_turned_down(clock, shape, sync):
    """`on_result` says which results are worth another attempt, asked once for each."""
    asked = []

    def empty(result):
        asked.append(result)
        return result is None

    fn, seen = scripted(sync, None, OSError(), None, "ok")
    retry = Retry(attempts=4, on=OSError, on_result=empty, backoff=AT_ONCE, clock=clock)
    assert "ok" == await called(guarded(shape, retry, fn))
    assert 4 == len(seen)
    assert [None, None, "ok"] == asked


@KINDS
async def test_the_last_result_is_returned_and_its_end_told(clock, sync):
    """A result that never satisfies is handed out; the event says that the attempts ended it."""
    heard = []
    stops = [listen(heard.append, kind=kind) for kind in (RetryScheduled, RetryEnded)]
    fn, _ = scripted(sync, 1, 2)
    try:
        retry = Retry(attempts=2, on_result=lambda result: True, backoff=NONE, clock=clock)
        with scope_open(Scope()) as scope:
            assert 2 == await called(guarded("alone", retry, fn))
    finally:
        for stop in stops:
            stop()
    assert scope.exhausted
    assert [
        RetryScheduled(source="prices", attempt=1, delay=0.1, error_type="result"),
        RetryEnded(source="prices", attempts=2, reason="attempts", error_type="result"),
    ] == heard


@KINDS
async def test_a_result_that_satisfies_is_no_event(clock, sync):
    """A call that comes to its result has no end to tell of, also where a predicate was asked."""
    heard = []
    stop = listen(heard.append, kind=RetryEnded)
    fn, _ = scripted(sync, None, "ok")
    try:
        await called(guarded("alone", Retry(on_result=lambda result: result is None, clock=clock), fn))
    finally:
        stop()
    assert [] == heard


@SHAPES
@KINDS
@pytest.mark.parametrize("slow", [False, True], ids=["plain discard", "async discard"])
async def test_results_that_are_turned_down_are_disposed_of(clock, shape, sync, slow):
    """Each discarded result, and not the one that is handed out, is disposed of before the next attempt: as Polly's
    `ExecuteAsync_MultipleRetries_EnsureDiscardedResultsDisposed`."""
    closed = []

    async def discard(result):
        closed.append(result)

    fn, _ = scripted(sync, 1, 2, 3)
    retry = Retry(
        on_result=lambda result: result < 3, discard=discard if slow else closed.append, backoff=AT_ONCE, clock=clock
    )
    assert 3 == await called(guarded(shape, retry, fn))
    assert [1, 2] == closed


async def test_the_edge_disposes_of_what_it_leads(clock):
    """Where an edge says how to dispose of its results, that is done and nothing else."""
    closed = []

    async def close(result):
        closed.append(("edge", result))

    async def send(call):
        return call.attempt

    retry = Retry(on_result=lambda result: result < 2, discard=lambda r: closed.append(("own", r)), clock=clock)
    assert 2 == await retry.run(Call("prices", discard=close), send)
    assert [("edge", 1)] == closed


@KINDS
async def test_a_result_that_cannot_be_disposed_of_keeps_nobody_from_going_on(clock, sync, caplog):
    """What `discard` raises is logged."""

    def discard(result):
        raise OSError("stuck")

    fn, _ = scripted(sync, 1, 2)
    retry = Retry(on_result=lambda result: result < 2, discard=discard, clock=clock)
    assert 2 == await called(guarded("alone", retry, fn))
    assert "could not be disposed of" in caplog.text
    assert "stuck" in caplog.text


async def test_a_rule_for_results_leaves_errors_to_the_edge(clock):
    """With `on_result` alone, errors are judged as without it: by the edge, or by what is worth another attempt."""

    async def send(call):
        raise OSError

    retry = Retry(on_result=lambda result: True, clock=clock)
    with pytest.raises(OSError) as caught:
        await retry.run(Call("prices", judge=lambda outcome: Judgement(error_type="OSError")), send)
    assert "not_retryable" == retry_end(caught.value)
    with pytest.raises(OSError) as caught:
        await retry.run(Call("prices"), send)
    assert "attempts" == retry_end(caught.value)


# -- budget -----------------------------------------------------------------------------------------------------------


@SHAPES
@KINDS
async def test_an_empty_budget_ends_it(clock, shape, sync):
    """The retry that the budget does not allow is not made, ends the call with reason "budget", and is an event: as
    failsafe-go's `TestBudget` "when retries exceeded"."""
    heard = []
    stops = [listen(heard.append, kind=kind) for kind in (RetryBudgetExhausted, RetryEnded)]
    budget = RetryBudget("prices-host", ratio=1.0, at_least=0, clock=clock)
    fn, seen = scripted(sync, *[OSError() for _ in range(9)])
    try:
        with pytest.raises(OSError) as caught:
            await called(guarded(shape, Retry(attempts=9, budget=budget, backoff=AT_ONCE, clock=clock), fn))
    finally:
        for stop in stops:
            stop()
    assert 2 == len(seen)
    assert "budget" == retry_end(caught.value)
    assert [
        RetryBudgetExhausted(source="prices-host", kind="retry"),
        RetryEnded(source="prices", attempts=2, reason="budget", error_type="OSError"),
    ] == heard


async def test_a_budget_that_is_not_exceeded_is_not_noticed(clock):
    """One retry among two calls, half of which may be retried: as failsafe-go's `TestBudget` "when retries not
    exceeded"."""
    budget = RetryBudget(ratio=0.5, at_least=0, clock=clock)
    fn, _ = scripted(False, "ok", OSError(), "ok")
    decorated = guarded("alone", Retry(budget=budget, clock=clock), fn)
    assert ["ok", "ok"] == [await decorated(), await decorated()]
    assert 0 == budget.balance


async def test_a_nameless_budget_is_told_by_the_calls_name(clock):
    """The event names what was called where the budget has no name."""
    heard = []
    stop = listen(heard.append, kind=RetryBudgetExhausted)
    fn, _ = scripted(False, OSError())
    try:
        with pytest.raises(OSError):
            await called(guarded("alone", Retry(budget=RetryBudget(ratio=0, at_least=0), clock=clock), fn))
    finally:
        stop()
    assert [RetryBudgetExhausted(source="prices", kind="retry")] == heard


async def test_only_a_retry_that_would_be_made_draws_on_the_budget(clock):
    """What ends by its attempts, its time or its kind takes nothing; nor does waiting for a breaker, which sent
    nothing."""
    budget = RetryBudget(ratio=0, at_least=1, clock=clock)
    for error, options in (
        (OSError(), {"attempts": 1}),
        (KeyError(), {"on": OSError}),
        (OSError(), {"within": 0.01}),
    ):
        fn, _ = scripted(False, error)
        with pytest.raises(type(error)):
            await called(guarded("alone", Retry(budget=budget, backoff=NONE, clock=clock, **options), fn))
    fn, _ = scripted(False, BulkheadFullError(), "ok")
    assert "ok" == await called(guarded("alone", Retry(budget=budget, patient=True, clock=clock), fn))
    assert 1 == budget.balance


async def test_a_dead_destination_gets_a_fifth_more_and_not_three_times_as_much(clock):
    """1,000 calls at 100/s against what always fails, three attempts each: the budget lets 1,200 through, and a little
    for its floor."""
    budget, count = RetryBudget("dead", clock=clock), 0

    @Pipeline("prices", Retry(budget=budget, backoff=AT_ONCE, clock=clock))
    async def fetch():
        nonlocal count
        count += 1
        raise OSError

    for _ in range(1_000):
        with pytest.raises(OSError):
            await fetch()
        clock.block(0.01)
    assert 1_200 <= count <= 1_203


class Interrupted(ManualClock):
    """A clock on which wait number `at` ends with `error`."""

    def __init__(self, at, error):
        super().__init__()
        self._at = at
        self._error = error

    def _wait(self):
        self._at -= 1
        if self._at == 0:
            raise self._error

    async def sleep(self, seconds):
        self._wait()

    def block(self, seconds):
        self._wait()


@KINDS
@pytest.mark.parametrize(
    ("errors", "at", "left"),
    [
        ([OSError()], 1, 9),
        ([OSError(), OSError()], 2, 8),
        ([OSError(), BulkheadFullError()], 2, 8),
        ([BulkheadFullError(), BulkheadFullError()], 2, 9),
    ],
)
@pytest.mark.parametrize("with_budget", [True, False])
async def test_only_the_retry_that_is_not_made_costs_nothing(sync, errors, at, left, with_budget):
    """A wait that is interrupted gives back what was taken for it and nothing else; without a budget there is nothing to
    give back."""
    clock = Interrupted(at, KeyboardInterrupt())
    budget = RetryBudget(ratio=0, at_least=9, clock=clock)
    retry = Retry(budget=budget if with_budget else None, patient=True, backoff=NONE, clock=clock)
    fn, seen = scripted(sync, *errors)
    decorated = guarded("alone", retry, fn)
    with pytest.raises(KeyboardInterrupt):
        decorated() if sync else decorated().send(None)
    assert len(errors) == len(seen)
    assert (left if with_budget else 9) == budget.balance


# -- listeners --------------------------------------------------------------------------------------------------------


async def test_a_listener_that_raises_or_calls_back_changes_nothing(clock):
    """One that raises, and one that makes calls through the same retry, leave the call as it is."""
    inner = []

    def raising(event):
        raise ZeroDivisionError

    def re_entrant(event):
        if not inner:
            inner.append(event)
            fn, _ = scripted(True, OSError(), "inner")
            inner.append(Pipeline("inner", retry)(fn)())

    retry = Retry(backoff=NONE, clock=clock)
    stops = [listen(raising, kind=RetryScheduled), listen(re_entrant, kind=RetryScheduled)]
    fn, seen = scripted(False, OSError(), OSError(), "ok")
    try:
        assert "ok" == await called(guarded("alone", retry, fn))
    finally:
        for stop in stops:
            stop()
    assert 3 == len(seen)
    assert "inner" == inner[1]


async def test_a_slow_listener_does_not_move_the_deadline(clock):
    """Time that a listener takes counts as time: no attempt begins after the deadline because of it... unless its wait
    had begun."""
    began = []
    stop = listen(lambda event: clock.block(1.0), kind=RetryScheduled)

    async def fails():
        began.append(clock.now())
        raise OSError

    deadline = clock.now() + 2.5
    try:
        with scope_open(Scope(deadline=deadline)), pytest.raises(OSError) as caught:
            await Pipeline("prices", Retry(attempts=50, backoff=NONE, clock=clock)).call(fails)
    finally:
        stop()
    assert "deadline" == retry_end(caught.value)
    assert max(began) < deadline


async def test_ten_thousand_failures_grow_no_traceback(clock):
    """One error object that a library raises over and over keeps a traceback of one call: as Polly's
    `OnActionPreExecute_CircuitOpened_EnsureExceptionStackTraceDoesNotGrow`."""
    shared = OSError("closed")

    @Pipeline("prices", Retry(attempts=2, backoff=AT_ONCE, clock=clock))
    async def fetch():
        raise shared.with_traceback(None)

    depths = set()
    for _ in range(100):
        try:
            await fetch()
        except OSError as error:
            depths.add(len(traceback.extract_tb(error.__traceback__)))
    assert 1 == len(depths)


class Span:
    def __init__(self, recording):
        self.recording = recording
        self.events = []

    def event(self, name, attributes):
        self.events.append((name, attributes))


class Tracer:
    def __init__(self, span):
        self._span = span

    def current(self):
        return self._span


@KINDS
@pytest.mark.parametrize("recording", [True, False])
async def test_a_span_that_records_is_told_of_each_wait(clock, sync, recording):
    """The current span gets an event a retry, with wait, reason, attempt, and whether the other side asked for it."""

    class Busy(Exception):
        retry_after = 4.0

    clock.chance = 0.0
    span, before = Span(recording), tracer()
    use_tracer(Tracer(span))
    try:
        fn, _ = scripted(sync, OSError(), Busy(), "ok")
        assert "ok" == await called(guarded("alone", Retry(backoff=NONE, clock=clock), fn))
    finally:
        use_tracer(before)
    told = [
        (
            "meshkit.retry",
            {
                "meshkit.retry.delay": delay,
                "meshkit.retry.reason": reason,
                "meshkit.attempt": attempt,
                "meshkit.retry.after_header": asked,
            },
        )
        for delay, reason, attempt, asked in (
            (0.1, "OSError", 1, False),
            (4.0, f"{__name__}.{Busy.__qualname__}", 2, True),
        )
    ]
    assert (told if recording else []) == span.events


@pytest.mark.parametrize("form", ["function", "loop"])
async def test_every_64th_attempt_without_a_wait_gives_way(clock, form):
    """130 attempts without waits let others run twice, and no more than that."""
    retry = Retry(attempts=130, backoff=AT_ONCE, clock=clock)

    async def fails():
        raise OSError

    async def loop():
        async for attempt in retry.context("prices"):
            with attempt:
                raise OSError

    with pytest.raises(OSError):
        await (Pipeline("prices", retry)(fails)() if form == "function" else loop())
    assert [0, 0] == clock.sleeps


# -- what ended it ----------------------------------------------------------------------------------------------------


async def test_an_error_says_what_ended_its_retry():
    """`retry_end` is None for an error that came out of no retry, and for one that cannot be written to."""

    class Slotted(Exception):
        def __setattr__(self, name, value):
            raise AttributeError(name)

    assert retry_end(OSError()) is None
    fn, _ = scripted(False, Slotted())
    with pytest.raises(Slotted) as caught:
        await called(guarded("alone", Retry(attempts=1), fn))
    assert retry_end(caught.value) is None


async def test_the_outermost_retry_has_the_last_word(clock):
    """Of two retries in each other, the error says what ended the outer one."""
    fn, seen = scripted(False, *[OSError() for _ in range(4)])
    inner = Retry(attempts=2, backoff=AT_ONCE, clock=clock)
    outer = Retry(attempts=9, within=1.0, backoff=Backoff(first=0.9, jitter="none"), clock=clock)
    with pytest.raises(OSError) as caught:
        await Pipeline("prices", outer, inner).call(fn)
    assert 4 == len(seen)
    assert "deadline" == retry_end(caught.value)


@pytest.mark.parametrize("attempts", [1, 2])
async def test_a_note_is_written_where_there_was_a_retry(clock, attempts):
    """After two attempts there is a note, after one there is nothing to explain."""
    fn, _ = scripted(False, OSError(), OSError())
    with pytest.raises(OSError) as caught:
        await called(guarded("alone", Retry(attempts=attempts, backoff=AT_ONCE, clock=clock), fn))
    assert (attempts == 2) == hasattr(caught.value, "__notes__")
    assert "attempts" == retry_end(caught.value)


@KINDS
@pytest.mark.parametrize(
    ("reason", "exhausts", "error", "options"),
    [
        ("attempts", True, OSError(), {"attempts": 2}),
        # Nothing was tried again, so nothing was used up.
        ("attempts", False, OSError(), {"attempts": 1}),
        ("deadline", True, OSError(), {"within": 0.01}),
        ("budget", True, OSError(), {"budget": RetryBudget(ratio=0, at_least=0)}),
        ("breaker", False, CircuitOpenError(policy="prices", retry_after=3.0), {}),
        ("rejected", False, BulkheadFullError(), {}),
        ("not_retryable", False, OSError(), {"on": KeyError}),
    ],
)
async def test_what_used_retries_up_is_known_further_up(clock, sync, reason, exhausts, error, options):
    """The scope learns that retries were used up; an error that no retry helps, or a refusal, used none."""
    fn, _ = scripted(sync, error, error)
    with scope_open(Scope()) as scope, pytest.raises(type(error)) as caught:
        await called(guarded("alone", Retry(backoff=NONE, clock=clock, **options), fn))
    assert reason == retry_end(caught.value)
    assert exhausts == scope.exhausted


# -- what it says of itself -------------------------------------------------------------------------------------------


def test_it_says_what_the_linter_asks():
    """Attempts, time, the longest that its waits can be, jitter, budget, patience, and which errors."""
    assert {
        "kind": "retry",
        "attempts": 3,
        "seconds": 60.0,
        "waits": pytest.approx(0.3),
        "jitter": True,
        "budget": False,
        "patient": False,
        "on": None,
        "rule": None,
    } == Retry().describe()
    described = Retry(
        attempts=5,
        on=(OSError, KeyError),
        within=None,
        backoff=Backoff(first=1, jitter="none"),
        budget=RetryBudget(),
        patient=True,
    ).describe()
    assert {
        "kind": "retry",
        "attempts": 5,
        "seconds": None,
        "waits": 15.0,
        "jitter": False,
        "budget": True,
        "patient": True,
        "on": ["OSError", "KeyError"],
        "rule": "on",
    } == described
    foreign = Retry(on=OSError, wait=lambda state: 1, stop=lambda state: True).describe()
    assert (None, None, None, ["OSError"]) == tuple(foreign[key] for key in ("attempts", "waits", "jitter", "on"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"attempts": 2.5}, "1 or above"),
        ({"attempts": True}, "1 or above"),
        ({"attempts": "3"}, "1 or above"),
        ({"within": float("inf")}, "None is no limit"),
        ({"within": float("nan")}, "above 0"),
        ({"within": -1}, "above 0"),
        ({"backoff": 0.5}, "a Backoff"),
        ({"budget": 0.2}, "a RetryBudget"),
        ({"on_result": 3}, "on_result is a function of the result"),
        ({"discard": "close"}, "discard is a function of the result"),
        ({"on": [OSError]}, "exception classes"),
        ({"on": OSError()}, "exception classes"),
        ({"on": BulkheadFullError}, "patient=True"),
    ],
    ids=str,
)
def test_wrong_options_say_what_would_be_right(wrong, said):
    """A value that cannot work is refused when the policy is made."""
    with pytest.raises(ConfigurationError, match=said):
        Retry(**wrong)


def test_its_options_cannot_be_changed():
    """What many calls share stays what it was checked to be."""
    with pytest.raises(FrozenInstanceError):
        Retry().attempts = 5
    with pytest.raises(FrozenInstanceError):
        Backoff().first = 5.0
    with pytest.raises(TypeError):
        Retry(3)
    with pytest.raises(TypeError):
        Backoff(0.1)


def test_an_async_predicate_of_results_is_refused():
    """Nobody would await it, and a coroutine is always true."""

    async def empty(result):
        return result is None

    with pytest.raises(ConfigurationError, match="plain function"):
        Retry(on_result=empty)


# -- streams ----------------------------------------------------------------------------------------------------------


async def test_a_stream_is_retried_before_its_first_item_only(clock):
    """An async generator that fails before it has given anything begins again; one that fails later does not."""
    began = []

    @Pipeline("prices", Retry(backoff=NONE, clock=clock))
    async def items(fail_before, fail_after):
        began.append(current_attempt())
        if len(began) <= fail_before:
            raise OSError("before")
        yield 1
        yield 2
        if fail_after:
            raise OSError("after")

    assert [1, 2] == [item async for item in items(2, False)]
    assert [1, 2, 3] == began
    assert [0.1, 0.2] == clock.sleeps
    began.clear()
    stream = items(1, True)
    assert [1, 2] == [await anext(stream), await anext(stream)]
    with pytest.raises(OSError, match="after"):
        await anext(stream)
    assert [1, 2] == began


async def test_a_stream_that_never_begins_ends_like_a_call(clock):
    """The last error comes out of the first read, with its reason."""

    @Pipeline("prices", Retry(clock=clock))
    async def items():
        raise OSError
        yield

    with pytest.raises(OSError) as caught:
        await anext(items())
    assert "attempts" == retry_end(caught.value)


async def test_a_streams_first_item_can_be_timed_out_and_retried(clock):
    """A Timeout inside ends an attempt that gives nothing, and the next one is made."""
    began = []

    @Pipeline("prices", Retry(backoff=AT_ONCE, clock=clock), Timeout(1.0, clock=clock))
    async def items():
        began.append(1)
        if len(began) == 1:
            clock.block(2.0)
            await asyncio.Event().wait()
        yield "ok"

    stream = items()
    assert "ok" == await anext(stream)
    await stream.aclose()
    assert 2 == len(began)


# -- ends -------------------------------------------------------------------------------------------------------------


@KINDS
async def test_what_is_inside_hears_each_attempts_own_end(clock, sync):
    """Of three attempts, two have failed and the third is what the call came to."""
    neighbour = Neighbour()
    fn, _ = scripted(sync, OSError(), KeyError(), "ok")
    await called(Pipeline("prices", Retry(backoff=AT_ONCE, clock=clock), neighbour)(fn))
    assert ["OSError", "KeyError", "NoneType"] == neighbour.ended


@KINDS
async def test_what_is_outside_hears_the_calls_end_alone(clock, sync):
    """A policy around the retry is told once, when the call is over, and not when an attempt fails."""
    outside, inside = Neighbour(), Neighbour()
    fn, _ = scripted(sync, OSError(), KeyError(), "ok")
    await called(Pipeline("prices", outside, Retry(backoff=AT_ONCE, clock=clock), inside)(fn))
    assert ["NoneType"] == outside.ended
    assert ["OSError", "KeyError", "NoneType"] == inside.ended


@KINDS
async def test_a_late_end_of_the_last_attempt_is_the_end_of_the_call(clock, sync):
    """What the last attempt's inner policies ask for after the answer is there, as a stream does, is told when the body
    is over, not when `run` returns."""
    ended, calls = [], []

    def send(call):
        calls.append(call)
        if call.attempt == 1:
            raise OSError
        return "headers"

    async def asend(call):
        return send(call)

    call = Call("prices", late=True)
    result = Retry(clock=clock).run_sync(call, send) if sync else await Retry(clock=clock).run(call, asend)
    assert "headers" == result
    calls[-1].on_end(lambda outcome: ended.append(outcome.result))
    call.end(Outcome("body"))
    assert ["body"] == ended


@KINDS
async def test_a_call_without_a_retry_has_nothing_to_end(clock, sync):
    """Where there was one attempt, nobody waits for the end of the call because of it."""
    fn, _ = scripted(sync, OSError())
    call = Call("prices")

    async def asend(_):
        return await fn()

    with pytest.raises(OSError):
        _ = (
            Retry(attempts=1, clock=clock).run_sync(call, lambda _: fn())
            if sync
            else await Retry(attempts=1, clock=clock).run(call, asend)
        )
    assert not call.ends


def test_a_retry_makes_nothing_where_nothing_fails():
    """Alone around a function, 1,000 calls that work leave not one object more behind than the function itself."""

    def fetch():
        return None

    decorated = Pipeline("prices", Retry())(fetch)
    decorated()
    before = sys.getallocatedblocks()
    for _ in range(1_000):
        decorated()
    assert sys.getallocatedblocks() - before < 50


@pytest.mark.parametrize("first_fails", [False, True])
@pytest.mark.parametrize("alone", [True, False])
async def test_a_result_that_could_not_be_judged_is_disposed_of(clock, alone, first_fails):
    """Where `on_result` itself raises, its error comes out and nobody gets the result, also that of the first attempt:
    it is disposed of, once."""
    disposed, slowly, left = [], [], [OSError()] if first_fails else []

    def judge(result):
        raise ZeroDivisionError(result)

    async def discard(result):
        await asyncio.sleep(0)
        slowly.append(result)

    def send():
        if left:
            raise left.pop()
        return "open connection"

    async def send_slowly():
        return send()

    beside = [] if alone else [Neighbour()]
    quick = Pipeline("prices", *beside, Retry(on_result=judge, discard=disposed.append, backoff=AT_ONCE, clock=clock))
    with pytest.raises(ZeroDivisionError):
        quick(send)()
    left[:] = [OSError()] if first_fails else []
    with pytest.raises(ZeroDivisionError):
        await quick(send_slowly)()
    assert ["open connection"] * 2 == disposed
    left[:] = [OSError()] if first_fails else []
    slow = Pipeline("prices", *beside, Retry(on_result=judge, discard=discard, backoff=AT_ONCE, clock=clock))
    with pytest.raises(ZeroDivisionError):
        await slow(send_slowly)()
    assert ["open connection"] == slowly


async def test_what_an_edge_leads_is_disposed_of_where_the_edge_cannot_judge_it(clock):
    """A judge that raises on the first response loses no connection: the edge's own `discard` gets the response, and not
    the one of the retry."""
    disposed = []

    async def discard(result):
        disposed.append(result)

    def judge(outcome):
        raise ZeroDivisionError

    async def send(call):
        return "response"

    retry = Retry(discard=lambda result: disposed.append("own"), clock=clock)
    with pytest.raises(ZeroDivisionError):
        await retry.run(Call("prices", judge=judge, discard=discard), send)
    with pytest.raises(ZeroDivisionError):
        retry.run_sync(Call("prices", judge=judge, discard=discard), lambda call: "plain response")
    assert ["response", "plain response"] == disposed


async def test_an_error_that_is_kept_tells_of_the_last_retry_that_it_came_out_of(clock):
    """What ended a retry is written on the error itself, so an object that is raised over and over keeps it until the next
    retry that it comes out of."""
    kept = ConnectionError("the only one")

    async def fails():
        raise kept

    with pytest.raises(ConnectionError):
        await fails()
    assert retry_end(kept) is None
    with pytest.raises(ConnectionError):
        await Pipeline("prices", Retry(attempts=2, backoff=AT_ONCE, clock=clock)).call(fails)
    assert "attempts" == retry_end(kept)
    with pytest.raises(ConnectionError):
        await fails()
    assert "attempts" == retry_end(kept)
    with pytest.raises(ConnectionError):
        await Pipeline("prices", Retry(on=KeyError, clock=clock)).call(fails)
    assert "not_retryable" == retry_end(kept)
