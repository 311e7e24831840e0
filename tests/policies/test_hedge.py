import asyncio
import contextlib
import contextvars
import gc
import weakref

import pytest

from meshkit import (
    AttemptTimeoutError,
    Backoff,
    Bulkhead,
    ConfigurationError,
    Fallback,
    Hedge,
    LastGood,
    Pipeline,
    RateLimiter,
    Retry,
    RetryBudget,
    Timeout,
    current_attempt,
    listen,
)
from meshkit.core.call import Call, Judgement, Outcome, numbered
from meshkit.core.events import Event, HedgeEnded, HedgeStarted, RetryBudgetExhausted
from meshkit.testing.clock import ManualClock


@pytest.fixture
def clock():
    return ManualClock(hold=True)


@pytest.fixture
def events():
    heard = []
    stops = [listen(heard.append, kind=kind) for kind in (HedgeStarted, HedgeEnded, RetryBudgetExhausted)]
    yield heard
    for stop in stops:
        stop()


class Service:
    """Attempt n takes `takes[n - 1]` seconds, then raises or answers `results[n - 1]`."""

    def __init__(self, clock, *takes, results=()):
        self.clock, self.takes, self.results = clock, takes, results
        self.begun, self.cancelled = [], []

    async def __call__(self, *_):
        number = current_attempt()
        self.begun.append(number)
        try:
            await self.clock.sleep(self.takes[number - 1])
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise
        result = self.results[number - 1] if self.results else f"answer {number}"
        if isinstance(result, BaseException):
            raise result
        return result


async def started(pipeline, service):
    task = asyncio.create_task(pipeline.call(service))
    await turns()
    return task


async def turns():
    for _ in range(10):
        await asyncio.sleep(0)


# -- who wins ---------------------------------------------------------------------------------------------------------


async def test_a_quick_answer_is_the_only_attempt(clock, events):
    """Where the answer is there before `delay`, nothing else is called, and no timer is left."""
    service = Service(clock, 0.9)
    task = await started(Pipeline("prices", Hedge(1.0, clock=clock)), service)
    await clock.advance(0.9)
    assert ("answer 1", [1], []) == (task.result(), service.begun, events)
    assert 0 == sum(not timer.cancelled for _, _, timer in clock._timers)


async def test_a_slow_one_is_asked_beside_and_cancelled_when_the_other_answers(clock, events):
    """After `delay` attempt 2 starts; its answer wins, and attempt 1 is cancelled and seen to end, as Polly's
    `ExecuteAsync_EnsurePrimaryTaskCancelled_Ok`."""
    service = Service(clock, 60, 1)
    task = await started(Pipeline("prices", Hedge(1.0, clock=clock)), service)
    await clock.advance(0.9)
    assert [1] == service.begun
    await clock.advance(0.1)
    assert [1, 2] == service.begun
    await clock.advance(1.0)
    assert ("answer 2", [1]) == (task.result(), service.cancelled)
    assert [
        HedgeStarted(source="prices", attempt=2, delay=1.0),
        HedgeEnded(source="prices", attempts=2, winner=2),
    ] == events


async def test_the_first_one_may_still_win(clock, events):
    """The further attempt is cancelled where the first one answers after all, as Polly's
    `ExecuteAsync_EnsureHedgedTasksCancelled_Ok`."""
    service = Service(clock, 2, 60)
    task = await started(Pipeline("prices", Hedge(1.0, clock=clock)), service)
    await clock.advance(2)
    assert ("answer 1", [2], 1) == (task.result(), service.cancelled, events[-1].winner)


async def test_attempts_come_one_by_one(clock, events):
    """Each further attempt waits for another `delay`, up to `attempts`."""
    service = Service(clock, 60, 60, 60, 60)
    task = await started(Pipeline("prices", Hedge(1.0, attempts=3, clock=clock)), service)
    for begun in ([1], [1, 2], [1, 2, 3], [1, 2, 3]):
        assert begun == service.begun
        await clock.advance(1.0)
    await clock.advance(56.0)
    assert ("answer 1", [2, 3]) == (task.result(), service.cancelled)


async def test_no_delay_starts_all_at_once(clock):
    """As Polly's `ExecuteAsync_ZeroHedgingDelay_EnsureAllTasksSpawnedAtOnce`."""
    service = Service(clock, 9, 9, 1)
    task = await started(Pipeline("prices", Hedge(0, attempts=3, clock=clock)), service)
    assert [1, 2, 3] == service.begun
    await clock.advance(1)
    assert "answer 3" == task.result()


async def test_an_infinite_delay_starts_nothing_beside(clock):
    """As Polly's `ExecuteAsync_InfiniteHedgingDelay_EnsureNoConcurrentExecutions`."""
    service = Service(clock, 1000)
    task = await started(Pipeline("prices", Hedge(float("inf"), clock=clock)), service)
    await clock.advance(1000)
    assert ("answer 1", [1]) == (task.result(), service.begun)


# -- failures ---------------------------------------------------------------------------------------------------------


async def test_a_failure_does_not_win_while_another_is_under_way(clock):
    """The answer of attempt 2 is waited for where attempt 1 fails meanwhile."""
    service = Service(clock, 1.5, 1, results=(OSError("first"), "good"))
    task = await started(Pipeline("prices", Hedge(1.0, clock=clock)), service)
    await clock.advance(1.5)
    assert not task.done()
    await clock.advance(0.5)
    assert "good" == task.result()


async def test_where_all_fail_the_first_error_is_raised(clock, events):
    """As Polly's `ExecuteAsync_ExceptionsHandled_ShouldThrowLastException`, which raises the primary's, whichever failed
    first; it is the error itself."""
    first = OSError("first")
    service = Service(clock, 3, 1, results=(first, ValueError("second")))
    task = await started(Pipeline("prices", Hedge(1.0, clock=clock)), service)
    await clock.advance(3)
    with pytest.raises(OSError) as caught:
        await task
    assert first is caught.value
    assert "__call__" in {entry.name for entry in caught.traceback}
    assert HedgeEnded(source="prices", attempts=2, winner=None) == events[-1]


async def test_a_failure_alone_is_not_hedged(clock, events):
    """A quick failure is the caller's, or Retry's, at once, as failsafe-go's composition "when hedge returns error"."""
    service = Service(clock, 0.1, results=(OSError("no"),))
    task = await started(Pipeline("prices", Hedge(1.0, clock=clock)), service)
    await clock.advance(0.1)
    assert isinstance(task.exception(), OSError)
    assert ([1], []) == (service.begun, events)


async def test_an_answer_that_the_edge_calls_a_failure_does_not_win(clock):
    """A 503 waits for the other attempt, and is disposed of when that answers."""
    discarded = []

    async def discard(result):
        discarded.append(result)

    service = Service(clock, 1.5, 1.5, results=(503, 200))

    async def send(call):
        return await numbered(call.attempt, service)

    call = Call(
        "prices",
        judge=lambda outcome: Judgement(breaker="failure" if outcome.result == 503 else "success"),
        discard=discard,
    )
    task = asyncio.create_task(Hedge(1.0, clock=clock).run(call, send))
    await turns()
    await clock.advance(2.5)
    assert (200, [503]) == (task.result(), discarded)


async def test_what_is_no_failure_ends_the_race(clock):
    """An attempt that cancels itself, or exits, ends the call as it would without a hedge, and the other attempt."""

    class Exit(BaseException):
        pass

    for error in (asyncio.CancelledError(), Exit()):
        service = Service(clock, 2, 60, results=(error, "unused"))
        task = await started(Pipeline("prices", Hedge(1.0, clock=clock)), service)
        await clock.advance(2)
        with pytest.raises(type(error)):
            await task
        assert [2] == service.cancelled


# -- what is got and not wanted ---------------------------------------------------------------------------------------


async def test_what_a_loser_has_got_is_disposed_of(clock):
    """An answer that comes although its attempt was cancelled is disposed of, and the winner's is not, as Polly's
    `ExecuteAsync_EnsureDiscardedResultDisposed`."""
    discarded = []

    async def discard(result):
        discarded.append(result)

    async def send(call):
        try:
            await clock.sleep(60 if call.attempt == 1 else 1)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return call.attempt

    task = asyncio.create_task(Hedge(1.0, clock=clock).run(Call("prices", discard=discard), send))
    await turns()
    await clock.advance(2)
    assert (2, [1]) == (task.result(), discarded)


class Connection:
    """What has to be closed, and counts how many of it are open."""

    open = 0

    def __init__(self):
        Connection.open += 1

    async def aclose(self):
        Connection.open -= 1

    def close(self):
        Connection.open -= 1


@pytest.mark.parametrize("discard", [Connection.aclose, Connection.close], ids=["async", "plain"])
async def test_what_a_loser_of_a_function_has_got_is_disposed_of_by_discard(clock, monkeypatch, discard):
    """Around a function, where no edge knows how a result is closed, `discard` is told of all but the one that wins."""
    monkeypatch.setattr(Connection, "open", 0)

    async def connect():
        return Connection()

    pipeline = Pipeline("db", Hedge(0, attempts=3, discard=discard, clock=clock))
    assert isinstance(await pipeline.call(connect), Connection)
    assert 1 == Connection.open


async def test_what_comes_too_late_is_disposed_of_by_discard(clock):
    """A loser that ignores its cancellation is not waited for, and what it opens later is closed."""
    discarded, go = [], asyncio.Event()

    async def connect():
        if current_attempt() == 1:
            while not go.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await go.wait()
        return current_attempt()

    pipeline = Pipeline("db", Hedge(1.0, discard=discarded.append, clock=clock))
    task = asyncio.create_task(pipeline.call(connect))
    await turns()
    await clock.advance(1.0)
    await turns()
    await clock.advance(1.0)
    assert (2, []) == (await task, discarded)
    go.set()
    await turns()
    assert [1] == discarded


async def test_the_edge_disposes_before_discard_does(clock):
    """What an edge leads, it disposes of itself; a failure has nothing to dispose of, and a result is disposed of once."""
    by_edge, by_discard = [], []

    async def close(result):
        by_edge.append(result)

    async def send(call):
        return call.attempt

    hedge = Hedge(0, discard=by_discard.append, clock=clock)
    won = await hedge.run(Call("prices", discard=close), send)
    assert ([3 - won], []) == (by_edge, by_discard)

    async def refuse(call):
        raise OSError

    with pytest.raises(OSError):
        await hedge.run(Call("prices"), refuse)
    assert [] == by_discard


async def test_a_result_that_cannot_be_disposed_of_keeps_no_answer_back(clock, caplog):
    """What `discard` raises goes to the log, which is all that is left to tell; the caller has its answer."""

    def fail(result):
        raise OSError("gone already")

    async def connect():
        return "connection"

    assert "connection" == await Pipeline("db", Hedge(0, discard=fail, clock=clock)).call(connect)
    assert "a discarded result of call 'db' could not be disposed of" in caplog.text


async def test_two_answers_in_one_turn_are_one_answer(clock):
    """Of two that come at once the first one wins, and the other one is disposed of."""
    discarded = []

    async def discard(result):
        discarded.append(result)

    async def send(call):
        await clock.sleep(2 if call.attempt == 1 else 1)
        return call.attempt

    task = asyncio.create_task(Hedge(1.0, clock=clock).run(Call("prices", discard=discard), send))
    await turns()
    clock.block(1)
    await turns()
    clock.block(1)
    await turns()
    assert [1, 2] == sorted([task.result(), *discarded])


async def test_an_attempt_that_does_not_end_keeps_nobody_waiting(clock):
    """A loser that ignores its cancellation is waited for a moment only; what it comes to later is disposed of, and what
    it holds is held until then."""
    discarded, ended, go = [], [], asyncio.Event()

    async def discard(result):
        discarded.append(result)

    async def send(call):
        number = call.attempt
        call.on_end(lambda outcome: ended.append((number, outcome)))
        if number == 2:
            await clock.sleep(1)
            return 2
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue
        return 1

    call = Call("prices", discard=discard)
    task = asyncio.create_task(Hedge(1.0, clock=clock).run(call, send))
    await turns()
    await clock.advance(2)
    assert not task.done()
    await clock.advance(0.1)
    assert (2, [], []) == (task.result(), discarded, ended)
    call.end(Outcome(2))
    assert [(2, Outcome(2))] == ended
    go.set()
    await turns()
    assert [1] == discarded
    assert (1, asyncio.CancelledError) == (ended[1][0], type(ended[1][1].error))


async def test_the_winner_is_held_to_the_end_of_the_call_and_the_losers_are_not(clock):
    """What policies inside ask for by `on_end` runs at once for what lost, as cancelled, and for what won at the end."""
    ended = []

    async def send(call):
        number = call.attempt
        call.on_end(lambda outcome: ended.append((number, outcome.result, type(outcome.error))))
        await clock.sleep(60 if number == 1 else 1)
        return number

    call = Call("prices")
    call.on_end(lambda outcome: ended.append("outer"))
    task = asyncio.create_task(Hedge(1.0, clock=clock).run(call, send))
    await turns()
    await clock.advance(2)
    assert 2 == await task
    assert [(1, None, asyncio.CancelledError)] == ended
    call.end(Outcome(2))
    assert [(1, None, asyncio.CancelledError), (2, 2, type(None)), "outer"] == ended


async def test_a_stream_is_hedged_up_to_its_first_item(clock):
    """The stream whose first item comes first is read on, and the other one is closed."""
    closed = []

    @Pipeline("rows", Hedge(1.0, clock=clock))
    async def rows():
        number = current_attempt()
        try:
            await clock.sleep(60 if number == 1 else 1)
            yield number
            yield "more"
        finally:
            closed.append(number)

    async def read():
        return [row async for row in rows()]

    task = asyncio.create_task(read())
    await turns()
    await clock.advance(2)
    assert ([2, "more"], [1, 2]) == (task.result(), closed)


# -- cancellation -----------------------------------------------------------------------------------------------------


async def test_the_callers_cancellation_ends_all_attempts(clock, events):
    """Who cancels the call cancels each attempt, and waits for them to end, as Polly's
    `ExecuteAsync_CancellationLinking_Ok`; a second cancellation changes nothing."""
    cleaned = []

    async def work():
        try:
            await clock.sleep(60)
        finally:
            await clock.sleep(1)
            cleaned.append(current_attempt())

    task = await started(Pipeline("prices", Hedge(1.0, clock=clock)), work)
    await clock.advance(1)
    del events[:]
    task.cancel()
    await turns()
    assert not task.done()
    await clock.advance(1)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (True, [1, 2], []) == (task.cancelled(), sorted(cleaned), events)


async def test_a_second_cancellation_is_passed_on(clock):
    """Attempts that are slow to clean up hear of it again."""
    heard = []

    async def work():
        for _ in range(2):
            try:
                await clock.sleep(60)
            except asyncio.CancelledError:
                heard.append(current_attempt())
        raise asyncio.CancelledError

    task = await started(Pipeline("prices", Hedge(1.0, clock=clock)), work)
    await clock.advance(1)
    task.cancel()
    await turns()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [1, 1, 2, 2] == sorted(heard)


async def test_a_cancellation_while_losers_end_disposes_of_the_answer(clock):
    """Where the caller is cancelled after the answer came and before it has it, the answer is disposed of."""
    discarded, ended = [], []

    async def discard(result):
        discarded.append(result)

    async def send(call):
        number = call.attempt
        call.on_end(lambda outcome: ended.append(number))
        try:
            await clock.sleep(60 if number == 1 else 1)
        except asyncio.CancelledError:
            await clock.sleep(0.05)
            raise
        return number

    task = asyncio.create_task(Hedge(1.0, clock=clock).run(Call("prices", discard=discard), send))
    await turns()
    await clock.advance(2)
    assert not task.done()
    task.cancel()
    await turns()
    await clock.advance(1)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ([2], [1, 2]) == (discarded, sorted(ended))


async def test_a_call_that_is_dropped_leaves_no_attempt_running(clock):
    """A coroutine that is closed half way cancels its attempts without waiting for them."""
    service = Service(clock, 60)
    coroutine = Pipeline("prices", Hedge(1.0, clock=clock)).call(service)
    coroutine.send(None)
    await turns()
    coroutine.close()
    await turns()
    assert [1] == service.cancelled


# -- budget -----------------------------------------------------------------------------------------------------------


async def test_an_empty_budget_does_not_fail_the_call(clock, events):
    """Where the budget has no attempt left, the first one is waited for, as failsafe-go's issue 141 asks for."""
    budget = RetryBudget("prices", ratio=0, at_least=0, clock=clock)
    service = Service(clock, 5)
    task = await started(Pipeline("prices", Hedge(1.0, attempts=3, budget=budget, clock=clock)), service)
    await clock.advance(5)
    assert ("answer 1", [1]) == (task.result(), service.begun)
    assert [RetryBudgetExhausted(source="prices", kind="hedge")] == events


async def test_a_budget_is_shared_with_retry(clock):
    """What a hedge takes, a retry has no more, and the other way round."""
    budget = RetryBudget(ratio=0, at_least=1, clock=clock)
    service = Service(clock, 1.5, 0.6, results=(OSError("first"), OSError("second")))
    pipeline = Pipeline(
        "prices", Retry(backoff=Backoff(first=0), budget=budget, clock=clock), Hedge(1.0, budget=budget, clock=clock)
    )
    task = await started(pipeline, service)
    await clock.advance(5)
    assert isinstance(task.exception(), OSError)
    assert [1, 2] == service.begun


# -- with other policies ----------------------------------------------------------------------------------------------


async def test_each_attempt_has_a_timeout_of_its_own(clock, events):
    """As failsafe-go's composition "HedgePolicy with Timeout": three attempts, each stopped by its own limit."""
    pipeline = Pipeline("prices", Hedge(1.0, attempts=3, clock=clock), Timeout(10.0, clock=clock))
    service = Service(clock, 60, 60, 60)
    task = await started(pipeline, service)
    await clock.advance(12)
    with pytest.raises(AttemptTimeoutError, match="attempt 1 "):
        await task
    assert ([1, 2, 3], [1, 2, 3]) == (service.begun, service.cancelled)


async def test_a_retry_around_it_hedges_each_attempt(clock, events):
    """As failsafe-go's composition "when hedge runs multiple times": three tries of two attempts each."""
    pipeline = Pipeline("prices", Retry(backoff=Backoff(first=0), clock=clock), Hedge(1.0, clock=clock))
    service = Service(clock, *[2] * 9, results=[OSError("no")] * 9)
    task = await started(pipeline, service)
    await clock.advance(20)
    assert isinstance(task.exception(), OSError)
    assert (6, 3) == (len(service.begun), sum(isinstance(event, HedgeStarted) for event in events))


async def test_a_fallback_around_it_answers(clock):
    """As failsafe-go's composition "Fallback with HedgePolicy"."""
    service = Service(clock, 5, 5, results=(OSError(), OSError()))
    task = await started(Pipeline("prices", Fallback(answer="instead"), Hedge(1.0, clock=clock)), service)
    await clock.advance(6)
    assert "instead" == task.result()


async def test_each_attempt_takes_a_place(clock):
    """A bulkhead inside counts the attempts, and has all its places back when the call is over."""
    bulkhead = Bulkhead(limit=5)
    service = Service(clock, 60, 1)
    task = await started(Pipeline("prices", Hedge(1.0, clock=clock), bulkhead), service)
    await clock.advance(1)
    assert 2 == bulkhead.in_use
    await clock.advance(1)
    assert ("answer 2", 0) == (task.result(), bulkhead.in_use)


async def test_attempts_have_the_callers_context(clock):
    """Context variables of the caller are there in each attempt, and what one sets is its own, as Polly's
    `ExecuteAsync_EveryHedgedTaskShouldHaveDifferentContexts`."""
    user, seen = contextvars.ContextVar("user"), []

    async def work():
        seen.append(user.get())
        user.set("somebody else")
        await clock.sleep(3)

    async def caller():
        user.set("ann")
        await Pipeline("prices", Hedge(1.0, clock=clock)).call(work)
        return user.get()

    task = asyncio.create_task(caller())
    await turns()
    await clock.advance(5)
    assert ("ann", ["ann", "ann"]) == (task.result(), seen)


def everything(clock):
    """All policies of this kind in one pipeline, and what of them can be held."""
    bulkhead = Bulkhead(limit=1, queue=3, wait=5, clock=clock)
    limiter = RateLimiter(permits=1, burst=1, wait=5, clock=clock)
    pipeline = Pipeline(
        "prices",
        Timeout(total=20, clock=clock),
        Fallback(last_good=LastGood(key=None, clock=clock)),
        Retry(backoff=Backoff(first=0.5, jitter=lambda longest: longest), clock=clock),
        Hedge(0.3, clock=clock),
        limiter,
        bulkhead,
        Timeout(2, clock=clock),
    )
    return pipeline, bulkhead, limiter


async def test_cancelled_anywhere_in_the_full_pipeline_leaves_nothing(clock, events):
    """At each tenth of a second of two calls that wait in every policy, and at each turn of the loop after it, a
    cancellation comes out as such, and places, permits, timers and tasks are as if the call had not been made."""
    reached = set()
    for tenths in range(60):
        for extra in range(4):
            clock = ManualClock(hold=True)
            pipeline, bulkhead, limiter = everything(clock)
            before, heard = asyncio.all_tasks(), []
            service = Service(clock, *[1.1] * 9, results=[OSError("no"), "good", OSError("no"), *["good"] * 6])
            tasks = [asyncio.create_task(pipeline.call(service)) for _ in range(2)]
            for _ in range(tenths):
                await clock.advance(0.1)
            clock.block(0.1)
            for _ in range(extra):
                await asyncio.sleep(0)
            cancelled = [task for task in tasks if not task.done()]
            reached.add(len(cancelled))
            stop = listen(heard.append, kind=Event)
            for task in cancelled:
                task.cancel()
            await turns()
            stop()
            for task in cancelled:
                assert task.cancelled(), (tenths, extra, task)
            assert (0, 0, 0) == (bulkhead.in_use, bulkhead.waiting, limiter.waiting)
            assert 0 == sum(not timer.cancelled for _, _, timer in clock._timers)
            assert set() == asyncio.all_tasks() - before
            assert [] == [event for event in heard if cancelled]
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.exception()
    assert {0, 1, 2} == reached


# -- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Exception, BaseException])
async def test_a_call_that_fails_leaves_no_cycle(clock, base):
    """The error goes with the last reference to it: nothing waits for the collector."""

    class Problem(base):
        pass

    async def fails():
        await clock.sleep(2)
        raise Problem

    gc.disable()
    try:
        task = await started(Pipeline("prices", Hedge(1.0, clock=clock)), fails)
        await clock.advance(4)
        kept = weakref.ref(task.exception())
        assert kept() is not None
        del task
        await turns()
        assert kept() is None
    finally:
        gc.enable()


async def test_an_attempt_that_has_failed_gives_up_its_place_at_once(clock):
    """Where the end of a call may come late, too: a second attempt that waits in the bulkhead for the place of the first
    one gets it when that has failed, not only when the race is over."""
    service = Service(clock, 3.0, 1.0, results=[OSError(), "answer 2"])
    pipeline = Pipeline("prices", Hedge(1.0, clock=clock), Bulkhead("b", limit=1, queue=1, clock=clock))
    call = Call("edge", late=True)
    task = asyncio.create_task(pipeline.run(call, lambda attempt: numbered(attempt.attempt, service)))
    await clock.advance(0)
    await clock.advance(4.0)
    assert task.done()
    assert "answer 2" == task.result()
    call.end(Outcome("answer 2"))


def test_a_plain_function_is_refused_by_name():
    """A pipeline with a Hedge says, when it decorates a plain function, which policy cannot guard it."""
    with pytest.raises(ConfigurationError, match="Hedge in pipeline 'prices'"):
        Pipeline("prices", Hedge(1.0))(lambda: None)


def test_it_describes_itself():
    """For explain and the linter: how many attempts, and how far apart."""
    assert {"kind": "hedge", "delay": 0.2, "attempts": 3} == Hedge(0.2, attempts=3).describe()


@pytest.mark.parametrize(
    "wrong",
    [
        {"delay": -1},
        {"delay": float("nan")},
        {"delay": "1s"},
        {"delay": True},
        {"attempts": 1},
        {"attempts": 2.5},
        {"budget": 0.2},
        {"discard": "close"},
        {"clock": 3},
        {"clock": None},
        {"clock": ManualClock},
    ],
    ids=str,
)
def test_wrong_options_are_refused(wrong):
    """Each value that cannot work is refused when the policy is made."""
    with pytest.raises(ConfigurationError):
        Hedge(**{"delay": 1.0, **wrong})
