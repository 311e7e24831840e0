import asyncio
import copy
import math
import pickle
from dataclasses import dataclass, replace

import pytest
import tenacity

from meshkit import (
    Backoff,
    CircuitOpenError,
    ConfigurationError,
    DeadlineExceededError,
    Pipeline,
    Retry,
    Scope,
    current_attempt,
    listen,
    retry_end,
)
from meshkit.core.call import Call, Judgement, Outcome
from meshkit.core.events import RetryEnded, RetryScheduled
from meshkit.core.scope import current_scope, scope_open

FULL = Backoff(jitter=lambda cap: cap)


def scripted(*outcomes):
    """An async function that comes to one of `outcomes` a call, and a list of the attempts it saw."""
    left, seen = list(outcomes), []

    async def fn():
        seen.append(current_attempt())
        outcome = left.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return fn, seen


async def test_waits_double_until_a_try_succeeds(clock):
    """Each wait is twice the one before."""
    fn, seen = scripted(OSError(), OSError(), "ok")
    retry = Retry(on=OSError, attempts=3, backoff=FULL, clock=clock)
    assert "ok" == await Pipeline("prices", retry).call(fn)
    assert [0.1, 0.2] == clock.sleeps
    assert [1, 2, 3] == seen


async def test_the_last_real_error_is_raised_with_a_note(clock):
    """When attempts run out, the last error itself comes out, and a note on it says what ended the retry."""
    last = OSError("third")
    fn, _ = scripted(OSError("first"), OSError("second"), last)
    with pytest.raises(OSError, match="third") as caught:
        await Pipeline("prices", Retry(on=OSError, backoff=FULL, clock=clock)).call(fn)
    assert caught.value is last
    assert ["meshkit: gave up on 'prices' after 3 attempts, ended by attempts"] == last.__notes__


async def test_an_error_that_is_not_listed_ends_it_at_once(clock):
    """An error that `on` does not list is raised after one attempt, without a note."""
    fn, seen = scripted(KeyError("x"))
    with pytest.raises(KeyError) as caught:
        await Pipeline("prices", Retry(on=OSError, clock=clock)).call(fn)
    assert [1] == seen
    assert not hasattr(caught.value, "__notes__")


async def test_cancellation_is_never_retried(clock):
    """A cancelled attempt is the last one, and the cancellation comes out as it is."""
    fn, seen = scripted(asyncio.CancelledError(), "ok")
    with pytest.raises(asyncio.CancelledError):
        await Pipeline("prices", Retry(clock=clock)).call(fn)
    assert [1] == seen


async def test_a_wait_that_would_pass_the_deadline_is_not_begun(clock):
    """With 1 s left and 2 s to wait, the error is raised now and not in 1 s."""
    fn, seen = scripted(OSError(), "ok")
    with scope_open(Scope(deadline=clock.now() + 1.0)), pytest.raises(OSError):
        await Pipeline("prices", Retry(backoff=Backoff(first=2, jitter=lambda cap: cap), clock=clock)).call(fn)
    assert [1] == seen
    assert [] == clock.sleeps


async def test_what_the_other_side_asks_for_is_the_least_that_is_waited(clock):
    """`retry_after` of an error is honoured, with up to 10 % on top."""

    class Busy(Exception):
        retry_after = 4.0

    fn, _ = scripted(Busy(), "ok")
    clock.chance = 0.5
    assert "ok" == await Pipeline("prices", Retry(backoff=FULL, clock=clock)).call(fn)
    assert [pytest.approx(4.2)] == clock.sleeps


async def test_an_open_breaker_ends_it(clock):
    """A rejection is not retried: nothing was sent, and nothing would be."""
    fn, seen = scripted(CircuitOpenError(policy="prices", retry_after=3.0), "ok")
    with pytest.raises(CircuitOpenError):
        await Pipeline("prices", Retry(clock=clock)).call(fn)
    assert [1] == seen


async def test_a_patient_retry_waits_for_the_breaker(clock):
    """With `patient`, the breaker's `retry_after` joins the wait."""
    fn, seen = scripted(CircuitOpenError(policy="prices", retry_after=3.0), "ok")
    clock.chance = 0.0
    assert "ok" == await Pipeline("prices", Retry(patient=True, clock=clock)).call(fn)
    assert [3.0] == clock.sleeps
    assert [1, 2] == seen


async def test_results_are_retried_where_the_edge_says_so_and_disposed_of(clock):
    """A result that the judge would retry is discarded before the next attempt; the last one is handed out."""
    discarded = []

    async def discard(result):
        discarded.append(result)

    def judge(outcome):
        return Judgement(retry=outcome.result != 200, breaker="failure", error_type=str(outcome.result))

    answers = [503, 502, 504]

    async def send(call):
        return answers[call.attempt - 1]

    call = Call("prices", judge=judge, discard=discard)
    assert 504 == await Retry(clock=clock).run(call, send)
    assert [503, 502] == discarded


async def test_exhausted_below_is_not_multiplied(clock):
    """Where the other side says that it has retried enough, there is one attempt, and the scope says so further up."""
    tried = []

    async def send(call):
        tried.append(call.attempt)
        return 503

    call = Call("prices", judge=lambda outcome: Judgement(retry=True, exhausted=True))
    with scope_open(Scope()) as scope:
        assert 503 == await Retry(clock=clock).run(call, send)
    assert [1] == tried
    assert scope.exhausted


async def test_each_attempt_has_its_own_end(clock):
    """What an inner policy asked for by `on_end` is told once for each attempt, as that attempt ends."""
    told = []

    async def send(call):
        call.on_end(lambda outcome, n=call.attempt: told.append((n, type(outcome.error).__name__)))
        if call.attempt < 3:
            raise OSError
        return "ok"

    call = Call("prices")
    call.on_end(lambda outcome: told.append(("all", outcome.result)))
    result = await Retry(clock=clock).run(call, send)
    assert [(1, "OSError"), (2, "OSError")] == told
    call.end(Outcome(result))
    assert [(1, "OSError"), (2, "OSError"), (3, "NoneType"), ("all", "ok")] == told


async def test_events_say_what_was_scheduled_and_what_ended_it(clock):
    """Each wait is an event, and so is the end, with its reason."""
    heard = []
    stops = [listen(heard.append, kind=RetryScheduled), listen(heard.append, kind=RetryEnded)]
    try:
        fn, _ = scripted(OSError(), OSError())
        with pytest.raises(OSError):
            await Pipeline("prices", Retry(attempts=2, backoff=FULL, clock=clock)).call(fn)
    finally:
        for stop in stops:
            stop()
    assert [
        RetryScheduled(source="prices", attempt=1, delay=0.1, error_type="OSError"),
        RetryEnded(source="prices", attempts=2, reason="attempts", error_type="OSError"),
    ] == heard


@pytest.mark.parametrize("sync", [False, True], ids=["async", "plain"])
async def test_tenacity_strategies_decide(clock, sync):
    """tenacity's retry, wait and stop objects are asked, with attempt numbers and idle time as they know them."""
    strategies = {
        "retry": tenacity.retry_if_exception_type(OSError) | tenacity.retry_if_result(lambda result: result is None),
        "wait": tenacity.wait_incrementing(start=1, increment=2),
        "stop": tenacity.stop_after_attempt(4),
    }
    outcomes = [OSError(), None, OSError(), "ok"]

    def fn():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def afn():
        return fn()

    pipeline = Pipeline("prices", Retry(**strategies, clock=clock))
    assert "ok" == (pipeline.call_sync(fn) if sync else await pipeline.call(afn))
    assert [1, 3, 5] == clock.sleeps


async def test_async_tenacity_strategies_are_awaited(clock):
    """An async predicate is awaited in a coroutine, and refused in a plain function that would have to wait for it."""

    async def wanted(error):
        await asyncio.sleep(0)
        return isinstance(error, OSError)

    strategy = tenacity.asyncio.retry_if_exception(wanted)
    fn, seen = scripted(OSError(), "ok")
    assert "ok" == await Pipeline("prices", Retry(retry=strategy, clock=clock)).call(fn)
    assert [1, 2] == seen

    def plain():
        raise OSError

    with pytest.raises(ConfigurationError, match="async tenacity strategy"):
        Pipeline("prices", Retry(retry=strategy, clock=clock)).call_sync(plain)


def test_a_plain_function_is_retried_too(clock):
    """A plain function is called again after a wait that holds the thread."""
    outcomes = [OSError(), "ok"]

    @Pipeline("prices", Retry(backoff=FULL, clock=clock))
    def fetch():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert "ok" == fetch()
    assert [0.1] == clock.sleeps


async def test_concurrent_calls_keep_their_own_attempts(clock):
    """100 calls at the same time through one Retry take two attempts each."""
    retry = Retry(backoff=Backoff(first=0), clock=clock)

    async def one():
        seen = []

        async def fn():
            seen.append(current_attempt())
            await asyncio.sleep(0)
            if len(seen) == 1:
                raise OSError
            return seen

        return await Pipeline("prices", retry).call(fn)

    assert [[1, 2]] * 100 == await asyncio.gather(*(one() for _ in range(100)))


def test_huge_attempt_numbers_do_not_overflow(clock):
    """The wait after attempt 5,000 is the longest one, not an error."""
    assert 10.0 == FULL.wait(5000, clock)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"attempts": 0}, "1 or above"),
        ({"attempts": "3"}, "1 or above, not '3'"),
        ({"within": 0}, "above 0"),
        ({"within": "5s"}, "above 0, not '5s'. None is no limit"),
        ({"within": True}, "above 0"),
        ({"within": math.nan}, "above 0"),
        ({"within": math.inf}, "above 0"),
        ({"patient": "no"}, "True or False, not 'no'"),
        ({"patient": None}, "True or False"),
        ({"clock": 3}, "^MK100  clock is"),
        ({"clock": None}, "^MK100  clock is"),
        ({"on": ()}, "has none"),
        ({"on_result": lambda: True}, "^MK100  on_result is called with the result"),
        ({"discard": lambda: None}, "^MK100  discard is called with the result"),
        ({"on": asyncio.CancelledError}, "never retried"),
        ({"on": OSError, "retry": tenacity.retry_always}, "Give one"),
    ],
)
def test_wrong_options_say_what_would_be_right(wrong, said):
    """A value that cannot work is refused when the policy is made."""
    with pytest.raises(ConfigurationError, match=said):
        Retry(**wrong)


async def test_a_result_is_disposed_of_and_its_attempt_ends_also_where_that_fails(clock):
    """A result that cannot be disposed of keeps nobody from the next attempt, and its attempt ends as what it was."""
    ended = []

    async def discard(result):
        raise OSError("cannot be closed")

    async def send(call):
        call.on_end(lambda outcome: ended.append(outcome.result))
        return 503 if call.attempt == 1 else 200

    call = Call("prices", judge=lambda outcome: Judgement(retry=outcome.result == 503), discard=discard)
    assert 200 == await Retry(clock=clock).run(call, send)
    call.end(Outcome(200))
    assert [503, 200] == ended


def test_a_plain_function_disposes_of_results_that_it_need_not_wait_for(clock):
    """In a plain function a result is disposed of where that waits for nothing, and refused where it does."""
    discarded = []

    async def at_once(result):
        discarded.append(result)

    async def slowly(result):
        await asyncio.sleep(0)

    def judge(outcome):
        return Judgement(retry=outcome.result == 503)

    def send(call):
        return 503 if call.attempt == 1 else 200

    assert 200 == Retry(clock=clock).run_sync(Call("prices", judge=judge, discard=at_once), send)
    assert [503] == discarded
    with pytest.raises(ConfigurationError, match="disposed of"):
        Retry(clock=clock).run_sync(Call("prices", judge=judge, discard=slowly), send)


async def test_what_ends_late_ends_in_every_layer(clock):
    """Retry inside retry: each attempt is told its own end once, and the last one the end of the whole call."""
    ended, left = [], [OSError("1"), OSError("2"), OSError("3"), "ok"]

    async def send(call):
        outcome = left.pop(0)
        call.on_end(lambda told: ended.append(str(told.error or told.result)))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    call = Call("prices")
    pipeline = Pipeline("prices", Retry(attempts=2, clock=clock), Retry(attempts=2, clock=clock))
    assert "ok" == await pipeline.run(call, send)
    assert ["1", "2", "3"] == ended
    call.end(Outcome("body read"))
    assert ["1", "2", "3", "body read"] == ended


async def test_a_strategy_that_fails_keeps_what_the_call_came_to(clock):
    """The error of a user's strategy carries the call's own as its context."""

    def jitter(longest):
        raise ZeroDivisionError

    fn, _ = scripted(OSError("real"))
    with pytest.raises(ZeroDivisionError) as caught:
        await Pipeline("prices", Retry(backoff=Backoff(jitter=jitter), clock=clock)).call(fn)
    assert "real" == str(caught.value.__context__)


@pytest.mark.parametrize("delay", [-1.0, math.nan], ids=["negative", "no number"])
async def test_a_jitter_out_of_its_mind_waits_not_at_all(clock, delay):
    """A wait that is negative, or not a number, is none."""
    fn, _ = scripted(OSError(), "ok")
    assert "ok" == await Pipeline("prices", Retry(backoff=Backoff(jitter=lambda _: delay), clock=clock)).call(fn)
    assert [] == clock.sleeps


async def test_an_error_that_is_raised_again_and_again_gets_one_note(clock):
    """A library's own error object, raised by every call, does not grow."""
    shared = OSError("closed")

    async def fails():
        raise shared

    for _ in range(5):
        with pytest.raises(OSError, match="closed"):
            await Pipeline("prices", Retry(clock=clock)).call(fails)
    assert 1 == len(shared.__notes__)


async def test_an_error_that_cannot_be_written_to_comes_out_as_it_is(clock):
    """A frozen error takes no note, and is raised all the same."""

    @dataclass(frozen=True)
    class Frozen(Exception):
        code: int

    fn, _ = scripted(Frozen(1), Frozen(2), Frozen(3))
    with pytest.raises(Frozen) as caught:
        await Pipeline("prices", Retry(clock=clock)).call(fn)
    assert 3 == caught.value.code


def test_a_plain_function_sees_its_attempt_and_shares_a_scope(clock):
    """`current_attempt` counts in plain functions too, and from the first failure on a scope is open for them: the
    first attempt of a Retry that is alone runs bare."""
    seen = []

    @Pipeline("prices", Retry(clock=clock))
    def fetch():
        seen.append((current_attempt(), current_scope() is not None))
        if len(seen) < 3:
            raise OSError

    fetch()
    assert [(1, False), (2, True), (3, True)] == seen
    assert (1, None) == (current_attempt(), current_scope())


def test_no_wait_stays_none_however_often(clock):
    """`first=0` never waits, and whole numbers do not grow without end."""
    assert 0.0 == Backoff(first=0, factor=3.0, jitter=lambda cap: cap).wait(1_000_000, clock)
    assert 10.0 == Backoff(first=1, factor=3, jitter=lambda cap: cap).wait(1_000_000, clock)


def test_what_cannot_be_inspected_is_taken_as_it_is(clock):
    """A function that does not tell its arguments is found out only when it is called."""

    class Odd:
        @property
        def __signature__(self):
            raise NameError

        def __call__(self, result):
            return False

    assert "bool" == Retry(on_result=bool).on_result.__name__
    assert "ok" == Pipeline("prices", Retry(on_result=Odd(), clock=clock)).call_sync(lambda: "ok")


def test_a_default_is_as_good_as_the_same_value_said():
    """What nobody has said equals what says the same, and may be replaced by another way of saying it."""
    assert Retry() == Retry(attempts=3, backoff=Backoff())
    assert "attempts=3" in repr(Retry())
    stop, wait = tenacity.stop_after_attempt(5), tenacity.wait_none()
    assert (5, None) == tuple(replace(Retry(), stop=stop, wait=wait).describe()[key] for key in ("attempts", "jitter"))


def test_copies_share_the_one_clock():
    """A policy that was copied or pickled equals the one it was made from."""
    assert Retry() == copy.deepcopy(Retry()) == pickle.loads(pickle.dumps(Retry()))


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize(
    "error", [ConfigurationError("misspelt"), DeadlineExceededError("late")], ids=["wrong", "late"]
)
async def test_what_another_attempt_cannot_help_is_not_retried(clock, sync, error):
    """Without a rule of the user's, what is wrong by construction and what ran out of the request's time come out at
    once."""
    tried = []

    def fails():
        tried.append(current_attempt())
        raise error

    async def fails_later():
        fails()

    pipeline = Pipeline("prices", Retry(clock=clock))
    with pytest.raises(type(error)) as caught:
        _ = pipeline.call_sync(fails) if sync else await pipeline.call(fails_later)
    assert (error, [1], "not_retryable") == (caught.value, tried, retry_end(error))


@pytest.mark.parametrize("sync", [False, True])
async def test_each_attempt_whose_result_is_turned_down_has_its_own_end(clock, sync):
    """It ends as it is disposed of, with all that was asked for within it; whoever asked further out is told of the end of
    the call."""
    told = []

    def send(call):
        for nth in (2, 1):
            call.on_end(lambda outcome, n=call.attempt, nth=nth: told.append((n, nth, outcome.result)))
        return "ok" if call.attempt == 3 else f"bad {call.attempt}"

    async def send_later(call):
        return send(call)

    call = Call("prices")
    call.on_end(lambda outcome: told.append(("all", outcome.result)))
    retry = Retry(on_result=lambda result: result != "ok", discard=told.append, clock=clock)
    result = retry.run_sync(call, send) if sync else await retry.run(call, send_later)
    first = ["bad 1", (1, 1, "bad 1"), (1, 2, "bad 1"), "bad 2", (2, 1, "bad 2"), (2, 2, "bad 2")]
    assert first == told
    call.end(Outcome(result))
    assert [*first, (3, 1, "ok"), (3, 2, "ok"), ("all", "ok")] == told


async def test_the_other_side_that_has_retried_enough_is_what_ended_it(clock):
    """The error says so, and the event too."""
    heard, error = [], OSError()

    def judge(outcome):
        return Judgement(retry=True, exhausted=True, error_type="503")

    async def send(call):
        raise error

    stop = listen(heard.append, kind=RetryEnded)
    try:
        with pytest.raises(OSError):
            await Retry(clock=clock).run(Call("prices", judge=judge), send)
    finally:
        stop()
    assert "server" == retry_end(error)
    assert [RetryEnded(source="prices", attempts=1, reason="server", error_type="503")] == heard
