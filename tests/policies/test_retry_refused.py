"""A retry that a breaker or another refusal ends: what comes out, when, and who learns of it."""

import asyncio
import gc
import traceback
import weakref

import pytest

from meshkit import (
    Backoff,
    Bulkhead,
    BulkheadFullError,
    CircuitBreaker,
    CircuitOpenError,
    DeadlineTooCloseError,
    Fallback,
    Pipeline,
    RateLimitedError,
    Retry,
    RetryBudget,
    Scope,
    listen,
    retry_end,
)
from meshkit.core.call import Call, Judgement, Outcome
from meshkit.core.events import FallbackUsed, RetryEnded, RetryScheduled
from meshkit.core.scope import scope_open

NONE = Backoff(jitter="none")
AT_ONCE = Backoff(first=0)

KINDS = pytest.mark.parametrize("sync", [False, True], ids=["async", "plain"])


def scripted(sync, *outcomes):
    """A function that comes to one of `outcomes` a call, and the list of its calls."""
    left, seen = list(outcomes), []

    def fn():
        outcome = left.pop(0)
        seen.append(outcome)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def afn():
        return fn()

    return (fn if sync else afn), seen


async def called(pipeline, sync, fn):
    return pipeline.call_sync(fn) if sync else await pipeline.call(fn)


def notes(error):
    return getattr(error, "__notes__", [])


@pytest.fixture
def ends():
    heard = []
    stop = listen(heard.append, kind=RetryEnded)
    yield heard
    stop()


def refused(retry_after=3.0):
    return CircuitOpenError(policy="b", retry_after=retry_after)


# -- an attempt that opens the breaker --------------------------------------------------------------------------------


@KINDS
async def test_a_breaker_that_opens_ends_it_without_a_wait(clock, sync, ends):
    """The error that opened the breaker comes out at once: nobody waits for an attempt that cannot be made."""
    errors = [ConnectionError("1"), ConnectionError("2")]
    fn, seen = scripted(sync, *errors)
    breaker = CircuitBreaker("b", min_calls=2, clock=clock)
    pipeline = Pipeline("x", Retry(attempts=9, backoff=NONE, clock=clock), breaker)
    with scope_open(Scope()) as scope, pytest.raises(ConnectionError) as caught:
        await called(pipeline, sync, fn)
    assert errors[1] is caught.value
    assert (None, None) == (caught.value.__cause__, caught.value.__context__)
    assert ["meshkit: gave up on 'x' after 2 attempts, ended by breaker"] == notes(caught.value)
    assert "breaker" == retry_end(caught.value)
    assert ([0.1], 2, 0) == (clock.sleeps, len(seen), breaker.counts["rejected"])
    assert [RetryEnded(source="x", attempts=2, reason="breaker", error_type="ConnectionError")] == ends
    assert (True, 15.0) == (scope.exhausted, scope.opened)


@KINDS
async def test_a_breaker_that_opens_by_the_first_attempt_leaves_a_note_too(clock, sync):
    """One attempt of several was made, and the note says why."""
    fn, _ = scripted(sync, ConnectionError())
    pipeline = Pipeline("x", Retry(clock=clock), CircuitBreaker("b", min_calls=1, clock=clock))
    with pytest.raises(ConnectionError) as caught:
        await called(pipeline, sync, fn)
    assert ["meshkit: gave up on 'x' after 1 attempt, ended by breaker"] == notes(caught.value)
    assert [] == clock.sleeps


async def test_the_last_attempt_is_the_last_one_whatever_it_opens(clock):
    """Where there would have been no further attempt anyway, the breaker did not end it."""
    fn, _ = scripted(False, ConnectionError(), ConnectionError())
    pipeline = Pipeline("x", Retry(attempts=2, clock=clock), CircuitBreaker("b", min_calls=2, clock=clock))
    with pytest.raises(ConnectionError) as caught:
        await pipeline.call(fn)
    assert "attempts" == retry_end(caught.value)


async def test_an_error_that_is_not_retried_is_told_as_that(clock):
    """It ends by its kind also where it opens the breaker."""
    fn, _ = scripted(False, KeyError())
    pipeline = Pipeline("x", Retry(on=OSError, clock=clock), CircuitBreaker("b", min_calls=1, clock=clock))
    with pytest.raises(KeyError) as caught:
        await pipeline.call(fn)
    assert ("not_retryable", []) == (retry_end(caught.value), notes(caught.value))


async def test_patience_waits_for_the_breaker_that_it_has_opened(clock):
    """A patient retry makes its next attempt when the breaker probes, and none before that could only be refused."""
    clock.chance = 0.0
    fn, seen = scripted(False, ConnectionError(), "ok")
    breaker = CircuitBreaker("b", min_calls=1, open_for=5.0, clock=clock)
    assert "ok" == await Pipeline("x", Retry(attempts=2, patient=True, clock=clock), breaker).call(fn)
    assert ([5.0], 2, 0) == (clock.sleeps, len(seen), breaker.counts["rejected"])


async def test_a_breaker_costs_the_budget_nothing(clock):
    """A retry that is not made because the breaker has opened is not taken out of the budget."""
    fn, _ = scripted(False, ConnectionError())
    budget = RetryBudget("b", at_least=3, clock=clock)
    pipeline = Pipeline("x", Retry(budget=budget, clock=clock), CircuitBreaker("b", min_calls=1, clock=clock))
    with pytest.raises(ConnectionError):
        await pipeline.call(fn)
    assert 3 == budget.balance


@KINDS
async def test_a_breaker_that_opens_at_the_end_of_the_call_opens_by_an_error_at_once(clock, sync):
    """Where an edge leads the call, a breaker judges at the end: an attempt that has failed has ended."""
    seen = []

    def fails(call):
        seen.append(call.attempt)
        raise ConnectionError

    async def afails(call):
        fails(call)

    breaker = CircuitBreaker("b", min_calls=2, clock=clock)
    pipeline = Pipeline("x", Retry(attempts=9, backoff=NONE, clock=clock), breaker)
    call = Call("x")
    with pytest.raises(ConnectionError) as caught:
        _ = pipeline.run_sync(call, fails) if sync else await pipeline.run(call, afails)
    assert ("breaker", [1, 2], [0.1]) == (retry_end(caught.value), seen, clock.sleeps)
    call.end(Outcome(error=caught.value))
    assert (2, 0) == (breaker.counts["failure"], breaker.counts["rejected"])


@KINDS
@pytest.mark.parametrize("disposed", [True, False], ids=["disposed", "kept"])
async def test_a_breaker_that_opens_by_the_end_of_a_result_is_not_waited_for(clock, sync, disposed):
    """Such a breaker opens when the result has been let go of: the refusal of the next attempt follows at once, and is
    raised only where the result is no longer to be had."""
    discarded = []

    async def discard(result):
        discarded.append(result)

    def answers(call):
        return 503

    async def aanswers(call):
        return 503

    breaker = CircuitBreaker("b", min_calls=1, clock=clock)
    pipeline = Pipeline("x", Retry(backoff=NONE, clock=clock), breaker)
    call = Call(
        "x",
        judge=lambda outcome: Judgement(retry=outcome.error is None, breaker="failure", error_type="503"),
        discard=discard if disposed else None,
    )
    with scope_open(Scope()) as scope:
        if disposed:
            with pytest.raises(CircuitOpenError) as caught:
                _ = pipeline.run_sync(call, answers) if sync else await pipeline.run(call, aanswers)
            assert "breaker" == retry_end(caught.value)
        else:
            assert 503 == (pipeline.run_sync(call, answers) if sync else await pipeline.run(call, aanswers))
    assert [503] * disposed == discarded
    assert [] == clock.sleeps
    # A refusal says itself that trying again is of no use.
    assert (not disposed) == scope.exhausted


async def test_a_retry_around_a_retry_learns_of_the_breaker(clock):
    """The outer one ends with the inner one, whatever ended that: it would only find the breaker open."""
    for attempts, reason in ((9, "breaker"), (2, "breaker")):
        fn, seen = scripted(False, *[ConnectionError() for _ in range(2)])
        breaker = CircuitBreaker("b", min_calls=2, clock=clock)
        outer, inner = (Retry(attempts=n, backoff=AT_ONCE, clock=clock) for n in (3, attempts))
        with pytest.raises(ConnectionError) as caught:
            await Pipeline("x", outer, inner, breaker).call(fn)
        assert (reason, 2, 0) == (retry_end(caught.value), len(seen), breaker.counts["rejected"])


@KINDS
async def test_what_an_attempt_has_left_behind_is_forgotten_with_the_next(clock, sync):
    """A breaker that opened and has closed again during a patient retry ends no other one around it."""
    clock.chance = 0.0
    fn, seen = scripted(sync, ConnectionError(), "odd", "ok")
    breaker = CircuitBreaker("b", min_calls=1, open_for=5.0, clock=clock)
    outer = Retry(on_result=lambda result: result == "odd", backoff=AT_ONCE, clock=clock)
    inner = Retry(patient=True, clock=clock)
    assert "ok" == await called(Pipeline("x", outer, inner, breaker), sync, fn)
    assert 3 == len(seen)


# -- an attempt that is refused ---------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(
    ("refusal", "reason", "by", "opened"),
    [
        (refused(), "breaker", "'b'", 3.0),
        (refused(None), "breaker", "'b'", 0.0),
        (BulkheadFullError(policy="places"), "rejected", "'places'", None),
        (RateLimitedError(retry_after=7.0), "rejected", "a policy", 7.0),
        (DeadlineTooCloseError(policy="t"), "deadline", "'t'", None),
    ],
    ids=["open", "probes under way", "full", "limited", "too close"],
)
async def test_the_last_real_error_comes_out(clock, sync, refusal, reason, by, opened, ends):
    """A refusal after it is in its note and its `retry_end`; the scope tells those who answer for the request, and pause
    a consumer, of it."""
    first, last = ConnectionError("1"), ConnectionError("2")
    last.__context__ = context = KeyError()
    fn, _ = scripted(sync, first, last, refusal)
    with scope_open(Scope()) as scope, pytest.raises(ConnectionError) as caught:
        await called(Pipeline("x", Retry(attempts=9, backoff=AT_ONCE, clock=clock)), sync, fn)
    assert last is caught.value
    assert (None, context) == (last.__cause__, last.__context__)
    assert [f"meshkit: gave up on 'x' after 2 attempts, ended by {reason}: {by} refused the next one"] == notes(last)
    assert reason == retry_end(last)
    assert [RetryEnded(source="x", attempts=2, reason=reason, error_type="ConnectionError")] == ends
    assert (True, opened) == (scope.exhausted, scope.opened)
    assert "in fn" in "".join(traceback.format_tb(last.__traceback__))
    assert (None, []) == (retry_end(refusal), notes(refusal))


@KINDS
async def test_a_refusal_of_the_first_attempt_is_raised_as_it_is(clock, sync):
    """Nothing real came before it: there is nothing else to tell."""
    refusal = refused()
    fn, _ = scripted(sync, refusal)
    with scope_open(Scope()) as scope, pytest.raises(CircuitOpenError) as caught:
        await called(Pipeline("x", Retry(clock=clock)), sync, fn)
    assert refusal is caught.value
    assert ("breaker", []) == (retry_end(refusal), notes(refusal))
    assert (False, None) == (scope.exhausted, scope.opened)


async def test_a_breaker_that_others_open_ends_it_with_the_real_error(clock):
    """While this call waited, others opened the breaker: it ends with what it came to itself."""
    clock.hold = True
    breaker = CircuitBreaker("b", clock=clock)
    fn, seen = scripted(False, ConnectionError("mine"))
    pipeline = Pipeline("x", Retry(backoff=NONE, clock=clock), breaker)
    task = asyncio.create_task(pipeline.call(fn))
    await asyncio.sleep(0)
    breaker.force_open(60.0)
    await clock.advance(1.0)
    with pytest.raises(ConnectionError, match="mine") as caught:
        await task
    assert (1, "breaker") == (len(seen), retry_end(caught.value))


async def test_a_full_bulkhead_ends_it_with_the_real_error(clock):
    """Others have taken the place while this call waited: its own error comes out."""
    clock.hold = True
    bulkhead = Bulkhead("places", limit=1)
    fn, _ = scripted(False, ConnectionError())
    task = asyncio.create_task(Pipeline("x", Retry(backoff=NONE, clock=clock), bulkhead).call(fn))
    await asyncio.sleep(0)
    other = asyncio.create_task(Pipeline("y", bulkhead).call(lambda: clock.sleep(60)))
    await clock.advance(1.0)
    with pytest.raises(ConnectionError) as caught:
        await task
    assert "rejected" == retry_end(caught.value)
    await clock.advance(60.0)
    await other
    assert 0 == bulkhead.in_use


async def test_patience_that_runs_out_tells_the_real_error_too(clock):
    """Attempts that were refused count, but what comes out is what the last one came to that was not."""
    clock.chance = 0.0
    fn, _ = scripted(False, ConnectionError(), refused(), refused(4.0))
    with scope_open(Scope()) as scope, pytest.raises(ConnectionError) as caught:
        await Pipeline("x", Retry(patient=True, backoff=AT_ONCE, clock=clock)).call(fn)
    assert ["meshkit: gave up on 'x' after 1 attempt, ended by attempts: 'b' refused the next one"] == notes(
        caught.value
    )
    assert ("attempts", 4.0, [3.0]) == (retry_end(caught.value), scope.opened, clock.sleeps)


async def test_a_later_failure_goes_before_an_earlier_one(clock):
    """After a refusal that was waited for, the next real error is the last one."""
    fn, _ = scripted(False, ConnectionError("1"), refused(), ConnectionError("2"))
    with pytest.raises(ConnectionError, match="2") as caught:
        await Pipeline("x", Retry(patient=True, clock=clock)).call(fn)
    assert ["meshkit: gave up on 'x' after 2 attempts, ended by attempts"] == notes(caught.value)


@KINDS
async def test_a_result_comes_back_where_the_next_attempt_is_refused(clock, sync, ends):
    """A result that was to be tried again is still the call's, if nobody has disposed of it."""
    fn, _ = scripted(sync, OSError(), None, refused())
    retry = Retry(attempts=9, on=OSError, on_result=lambda result: result is None, backoff=AT_ONCE, clock=clock)
    with scope_open(Scope()) as scope:
        assert await called(Pipeline("x", retry), sync, fn) is None
    assert [RetryEnded(source="x", attempts=2, reason="breaker", error_type="result")] == ends
    assert (True, 3.0) == (scope.exhausted, scope.opened)


@KINDS
async def test_a_result_that_opens_the_breaker_comes_back_and_is_not_disposed_of(clock, sync):
    """Whoever asked gets it, open."""
    discarded = []
    fn, _ = scripted(sync, None)
    breaker = CircuitBreaker("b", min_calls=1, failed=lambda outcome: outcome.result is None, clock=clock)
    retry = Retry(on_result=lambda result: result is None, discard=discarded.append, clock=clock)
    assert await called(Pipeline("x", retry, breaker), sync, fn) is None
    assert ("open", [], []) == (breaker.state, discarded, clock.sleeps)


@KINDS
async def test_a_result_that_was_disposed_of_does_not_come_back(clock, sync):
    """Nor does an error from before it, which is not what the last attempt came to: the refusal is raised."""
    discarded = []
    refusal = refused()
    fn, _ = scripted(sync, OSError(), "turned down", refusal)
    retry = Retry(
        attempts=9,
        on=OSError,
        on_result=lambda result: result == "turned down",
        discard=discarded.append,
        backoff=AT_ONCE,
        clock=clock,
    )
    with pytest.raises(CircuitOpenError) as caught:
        await called(Pipeline("x", retry), sync, fn)
    assert refusal is caught.value
    assert ["turned down"] == discarded
    assert ["meshkit: gave up on 'x' after 2 attempts, ended by breaker"] == notes(refusal)


@KINDS
async def test_a_loop_ends_with_the_real_error_too(clock, sync):
    """Around a block it is the same, and a block that was refused never passes for one that went well."""

    async def loop(*outcomes):
        fn, _ = scripted(True, *outcomes)
        context = Retry(
            attempts=9, on=OSError, on_result=lambda result: result is None, backoff=AT_ONCE, clock=clock
        ).context("x")
        if sync:
            for attempt in context:
                with attempt:
                    attempt.set_result(fn())
        else:
            async for attempt in context:
                with attempt:
                    attempt.set_result(fn())

    last = OSError("2")
    with scope_open(Scope()) as scope, pytest.raises(OSError, match="2") as caught:
        await loop(OSError("1"), last, refused())
    assert last is caught.value
    assert "breaker" == retry_end(last)
    assert ["meshkit: gave up on 'x' after 2 attempts, ended by breaker: 'b' refused the next one"] == notes(last)
    assert 3.0 == scope.opened
    with pytest.raises(CircuitOpenError):
        await loop(None, refused())


@KINDS
async def test_a_kept_error_is_freed_without_the_collector(clock, sync):
    """Neither the error that comes out nor one that another attempt has overtaken is kept alive by the retry."""
    left = []

    class Flaw(Exception):
        def __init__(self):
            left.append(weakref.ref(self))

    def fn():
        if len(left) == 2:
            raise refused()
        raise Flaw

    async def afn():
        fn()

    pipeline = Pipeline("x", Retry(attempts=9, backoff=AT_ONCE, clock=clock))

    async def gives_up():
        with pytest.raises(Flaw):
            await called(pipeline, sync, fn if sync else afn)

    gc.collect()
    gc.disable()
    try:
        await gives_up()
        assert [None, None] == [flaw() for flaw in left]
    finally:
        gc.enable()


async def test_an_error_of_one_and_the_same_object_gets_one_note_a_reason(clock):
    """A refusal tells in how many seconds: the note does not, or a library's own error object would grow without end."""
    shared = ConnectionError()
    for after in range(1, 20):
        fn, _ = scripted(False, shared, refused(float(after)))
        with pytest.raises(ConnectionError):
            await Pipeline("x", Retry(backoff=AT_ONCE, clock=clock)).call(fn)
    assert 1 == len(shared.__notes__)


async def test_no_wait_is_told_that_does_not_happen(clock):
    """A retry that the breaker ends schedules nothing."""
    heard = []
    stop = listen(heard.append, kind=RetryScheduled)
    try:
        fn, _ = scripted(False, ConnectionError())
        with pytest.raises(ConnectionError):
            await Pipeline("x", Retry(clock=clock), CircuitBreaker("b", min_calls=1, clock=clock)).call(fn)
    finally:
        stop()
    assert [] == heard


@pytest.mark.parametrize(
    ("refusal", "reason"), [(refused(), "breaker_open"), (BulkheadFullError(), "rejected")], ids=["open", "full"]
)
async def test_a_fallback_knows_what_ended_the_retry_inside(clock, refusal, reason):
    """The real error comes out of the retry, and the fallback still tells that something was shut off."""
    heard = []
    stop = listen(heard.append, kind=FallbackUsed)
    try:
        fn, _ = scripted(False, ConnectionError(), refusal)
        pipeline = Pipeline("x", Fallback(answer="kept"), Retry(backoff=AT_ONCE, clock=clock))
        with scope_open(Scope()) as scope:
            assert "kept" == await pipeline.call(fn)
    finally:
        stop()
    assert [(reason, "ConnectionError")] == [(event.reason, event.error_type) for event in heard]
    assert not scope.exhausted


# -- what is told -----------------------------------------------------------------------------------------------------


async def test_a_wait_for_the_breaker_is_not_told_as_the_other_sides(clock):
    """It is our own breaker that asks for it; what the other side asks for is told as its own."""
    heard = []
    stop = listen(heard.append, kind=RetryScheduled)
    clock.chance = 0.0
    busy = ConnectionError()
    busy.retry_after = 2.0
    try:
        for error in (ConnectionError(), busy):
            fn, _ = scripted(False, error, "ok")
            breaker = CircuitBreaker("b", min_calls=1, open_for=5.0, heed_retry_after=False, clock=clock)
            assert "ok" == await Pipeline("x", Retry(patient=True, clock=clock), breaker).call(fn)
    finally:
        stop()
    assert [(5.0, False), (5.0, True)] == [(event.delay, event.from_server) for event in heard]


async def test_attempts_that_were_all_refused_are_told_as_attempts(clock, ends):
    """Where no attempt reached the function, those that were refused are counted."""
    fn, _ = scripted(False, *[refused() for _ in range(3)])
    with scope_open(Scope()) as scope, pytest.raises(CircuitOpenError) as caught:
        await Pipeline("x", Retry(patient=True, clock=clock)).call(fn)
    assert ["meshkit: gave up on 'x' after 3 attempts, ended by attempts"] == notes(caught.value)
    assert [(3, "attempts")] == [(event.attempts, event.reason) for event in ends]
    assert (True, None) == (scope.exhausted, scope.opened)


@pytest.mark.parametrize(
    ("refusal", "tried"), [(refused(), 1), (refused(None), 1), (BulkheadFullError(), 3)], ids=["open", "busy", "full"]
)
async def test_a_retry_around_a_retry_learns_of_a_refusal_by_a_breaker(clock, refusal, tried):
    """The outer one does not take the real error for one that another attempt could help. A full bulkhead is no such
    thing: the next attempt may find a place."""
    fn, seen = scripted(
        False, ConnectionError("1"), refusal, ConnectionError("2"), refusal, ConnectionError("3"), refusal
    )
    outer, inner = (Retry(backoff=AT_ONCE, clock=clock) for _ in range(2))
    with pytest.raises(ConnectionError, match=str(tried)):
        await Pipeline("x", outer, inner).call(fn)
    assert 2 * tried == len(seen)


@KINDS
async def test_patience_waits_after_a_result_that_opens_the_breaker_at_its_end(clock, sync):
    """The next attempt comes after the backoff, and the one after it when the breaker lets it."""
    clock.chance = 0.0
    answers = [503, 200]

    def send(call):
        return answers.pop(0)

    async def asend(call):
        return send(call)

    breaker = CircuitBreaker("b", min_calls=1, open_for=5.0, clock=clock)
    pipeline = Pipeline("x", Retry(backoff=NONE, patient=True, clock=clock), breaker)
    call = Call(
        "x",
        judge=lambda outcome: Judgement(
            retry=outcome.result == 503, breaker="failure" if outcome.result == 503 else "success"
        ),
    )
    assert 200 == (pipeline.run_sync(call, send) if sync else await pipeline.run(call, asend))
    call.end(Outcome(200))
    assert ([0.1, 4.9], "closed") == ([round(slept, 3) for slept in clock.sleeps], breaker.state)


def test_outside_of_any_request_a_refusal_ends_it_all_the_same(clock):
    """Without a Scope there is nobody to tell of the breaker; in one, a refusal that cannot say when to come back leaves
    what others have told."""
    errors = [OSError("real"), refused(3.0)]

    def send(call):
        raise errors[call.attempt - 1]

    retry = Retry(backoff=AT_ONCE, clock=clock)
    with pytest.raises(OSError, match="real"):
        retry.run_sync(Call("prices"), send)
    errors[1] = BulkheadFullError(policy="b")
    with scope_open(Scope()) as scope:
        scope.note_opened(7.0)
        with pytest.raises(OSError, match="real"):
            retry.run_sync(Call("prices"), send)
    assert 7.0 == scope.opened
