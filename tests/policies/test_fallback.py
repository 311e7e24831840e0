import asyncio
import functools
import gc
import weakref

import pytest

from meshkit import (
    Backoff,
    CircuitBreaker,
    CircuitOpenError,
    ConfigurationError,
    Fallback,
    LastGood,
    Pipeline,
    Retry,
    Scope,
    Timeout,
    listen,
)
from meshkit.core.call import Call, Judgement, Outcome
from meshkit.core.events import FallbackUsed, error_type
from meshkit.core.scope import scope_open


async def broken():
    raise OSError("no")


async def plainly(outcome):
    return f"instead of {outcome.error}"


@pytest.mark.parametrize(
    ("answer", "given"),
    [(7, 7), (lambda outcome: f"after {outcome.error}", "after no"), (plainly, "instead of no")],
    ids=["value", "function", "coroutine function"],
)
async def test_answers_a_failed_call_and_says_so(answer, given):
    """A value, a function or a coroutine function answers, and the scope is marked, as failsafe-go's
    `TestFallbackOfResult` and `TestShouldFallbackOfFn`."""
    with scope_open(Scope()) as scope:
        assert given == await Pipeline("prices", Fallback(answer=answer, name="cached")).call(broken)
    assert ("cached",) == scope.degraded


async def test_a_call_that_works_is_left_alone():
    """No mark, no event, where nothing failed, as failsafe-go's `TestShouldNotFallback`."""

    async def fine():
        return 1

    with scope_open(Scope()) as scope:
        assert 1 == await Pipeline("prices", Fallback(answer=7)).call(fine)
    assert () == scope.degraded


async def test_cancellation_is_never_answered():
    """A cancelled call is cancelled, whatever the fallback would say, as failsafe-go's "should not fallback when
    canceled"."""

    async def cancelled():
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await Pipeline("prices", Fallback(answer=7)).call(cancelled)


async def test_only_the_listed_errors_are_answered():
    """An error that `on` does not list is raised."""
    with pytest.raises(OSError, match="no"):
        await Pipeline("prices", Fallback(answer=7, on=KeyError)).call(broken)


async def test_its_own_error_carries_the_first_one():
    """Where the fallback itself fails, its error is raised with the first one as its cause, as failsafe-go's
    `TestShouldFallbackOfError`."""

    def fails(outcome):
        raise KeyError("cache")

    with pytest.raises(KeyError) as caught:
        await Pipeline("prices", Fallback(answer=fails)).call(broken)
    assert isinstance(caught.value.__cause__, OSError)


async def test_results_that_the_edge_calls_failures_are_answered():
    """A 503 is answered like an error, and disposed of, as failsafe-go's `TestShouldFallbackWithFailureConditions`."""
    discarded = []

    async def discard(result):
        discarded.append(result)

    async def send(call):
        return 503

    call = Call("prices", judge=lambda outcome: Judgement(breaker="failure"), discard=discard)
    assert 7 == await Fallback(answer=7).run(call, send)
    assert [503] == discarded


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CircuitOpenError(policy="prices", retry_after=1), "breaker_open"),
        (TimeoutError(), "timeout"),
        (OSError(), "error"),
    ],
    ids=["open", "timeout", "error"],
)
async def test_the_event_says_why(error, reason):
    """The reason of a fallback is told in one word."""
    heard = []
    stop = listen(heard.append, kind=FallbackUsed)

    async def fails():
        raise error

    await Pipeline("prices", Fallback(answer=7)).call(fails)
    stop()
    assert [FallbackUsed(source="prices", reason=reason, result="success", error_type=error_type(error))] == heard


async def test_retries_come_first(clock):
    """Outside a retry, the fallback answers after the last attempt, and says that retries were used up."""
    heard = []
    stop = listen(heard.append, kind=FallbackUsed)
    assert 7 == await Pipeline("prices", Fallback(answer=7), Retry(clock=clock)).call(broken)
    stop()
    assert ["retries_exhausted"] == [event.reason for event in heard]
    assert 2 == len(clock.sleeps)


def test_a_plain_function_is_answered_too():
    """A plain function gets the value of a plain fallback; a coroutine function is refused."""

    def fails():
        raise OSError

    assert 7 == Pipeline("prices", Fallback(answer=7)).call_sync(fails)
    with pytest.raises(ConfigurationError):
        Pipeline("prices", Fallback(answer=plainly)).call_sync(fails)


async def test_an_attempt_that_is_answered_has_failed_even_if_its_result_cannot_be_disposed_of():
    """A result that cannot be disposed of is answered like any other, and a breaker hears what it was."""
    ended = []

    async def discard(result):
        raise OSError("cannot be closed")

    async def send(call):
        call.on_end(ended.append)
        return 503

    call = Call("prices", judge=lambda outcome: Judgement(breaker="failure"), discard=discard)
    assert 7 == await Fallback(answer=7).run(call, send)
    assert [503] == [outcome.result for outcome in ended]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "a,b"},
        {"name": "a;b"},
        {"name": "a\r\nx: y"},
        {"name": "préis"},
        {"name": ""},
        {"name": 3},
        {"on": asyncio.CancelledError},
        {"on": ()},
        {"last_good": 3},
    ],
    ids=str,
)
def test_wrong_options_are_refused(wrong):
    """A name that no header can hold, or a class that is never answered, is refused when the policy is made."""
    with pytest.raises(ConfigurationError):
        Fallback(answer=7, **wrong)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (lambda: 1, "takes 0|too many"),
        (lambda outcome, user: 1, "missing a required argument: 'user'"),
        (lambda *, outcome: 1, "too many"),
        (Outcome.__repr__.__get__(Outcome()), "too many"),
    ],
    ids=["nothing", "two", "keyword", "method"],
)
def test_an_answer_that_takes_no_outcome_is_refused(answer, why):
    """It would otherwise fail when it is needed for the first time: in the outage."""
    with pytest.raises(ConfigurationError, match=rf"called with the Outcome that failed, .* ({why})"):
        Fallback(answer=answer)


@pytest.mark.parametrize(
    "answer",
    [lambda outcome: 1, lambda *_: 1, lambda outcome, more=2: 1, functools.partial(max, 1), dict, str, OSError, len],
    ids=["one", "any", "default", "partial", "dict", "str", "exception", "len"],
)
def test_an_answer_that_may_take_an_outcome_is_taken(answer):
    """With further arguments that have a default, and where nobody can say: a function of C's, a class."""
    assert answer is Fallback(answer=answer).answer


async def test_retries_that_were_used_up_earlier_are_not_this_calls(clock):
    """The reason concerns this call, and not what happened before in the same request."""
    heard = []
    stop = listen(heard.append, kind=FallbackUsed)
    with scope_open(Scope()) as scope:
        await Pipeline("prices", Fallback(answer=7), Retry(clock=clock)).call(broken)
        scope.mark_exhausted()
        await Pipeline("stock", Fallback(answer=7)).call(broken)
    stop()
    assert ["retries_exhausted", "error"] == [event.reason for event in heard]


async def test_a_result_whose_retries_were_used_up_is_told_as_such(clock):
    """For a result, which can carry nothing, it counts what the request has learnt during the call."""
    heard = []
    stop = listen(heard.append, kind=FallbackUsed)

    async def send(call):
        return 503

    judged = Judgement(retry=True, breaker="failure")
    with scope_open(Scope()):
        for _ in range(2):
            call = Call("prices", judge=lambda outcome: judged)
            await Pipeline("prices", Fallback(answer=7), Retry(attempts=2, clock=clock)).run(call, send)
    stop()
    assert "retries_exhausted" == heard[0].reason


# -- the last good answer ---------------------------------------------------------------------------------------------


class Prices:
    """Answers with a number that goes up, or raises what it is told to."""

    def __init__(self):
        self.count, self.error = 0, None

    async def of(self, *args, **kwargs):
        return self.plain_of(*args, **kwargs)

    def plain_of(self, *args, **kwargs):
        if self.error is not None:
            raise self.error
        self.count += 1
        return (*args, self.count)


@pytest.fixture
def prices():
    return Prices()


@pytest.fixture
def used():
    heard = []
    stop = listen(heard.append, kind=FallbackUsed)
    yield heard
    stop()


async def test_the_last_good_answer_is_given_with_its_age(clock, prices, used):
    """While the call fails, the answer is the newest one that was good, and mark and event say how old it is."""
    fallback = Fallback(last_good=LastGood(key=lambda user: user, clock=clock), name="known-prices")
    guarded = Pipeline("prices", fallback)
    await guarded.call(prices.of, "ann")
    await guarded.call(prices.of, "ann")
    prices.error = OSError("no")
    await clock.advance(42)
    with scope_open(Scope()) as scope:
        assert ("ann", 2) == await guarded.call(prices.of, "ann")
    assert ("known-prices;age=42",) == scope.degraded
    assert [FallbackUsed(source="prices", reason="error", result="success", error_type="OSError", age=42.0)] == used


async def test_what_was_answered_for_one_is_not_given_to_another(clock, prices, used):
    """Another key has no answer: the call's own error is raised, and the event says that nothing was there."""
    guarded = Pipeline("prices", Fallback(last_good=LastGood(key=lambda user, **_: user, clock=clock)))
    await guarded.call(prices.of, "ann", page=1)
    prices.error = OSError("no")
    with pytest.raises(OSError) as caught:
        await guarded.call(prices.of, "bob")
    assert prices.error is caught.value
    assert ["failure"] == [event.result for event in used]


@pytest.mark.parametrize("key", [lambda user: user, None], ids=["key", "all"])
async def test_what_one_function_answered_is_not_given_for_another(clock, prices, key):
    """Functions behind one pipeline are told apart, methods by their object; one made anew for each call has no answer."""
    guarded = Pipeline("shop", Fallback(last_good=LastGood(key=key, clock=clock)))
    other = Prices()
    await guarded.call(prices.of, "ann")
    prices.error = other.error = OSError("no")
    assert ("ann", 1) == await guarded.call(prices.of, "ann")
    for fn in (other.of, lambda user: prices.of(user)):
        with pytest.raises(OSError, match="no"):
            await guarded.call(fn, "ann")


async def test_one_answer_for_all_has_to_be_said(clock, prices):
    """Without `key` it cannot be made; `key=None` is the word for a call that is the same for everybody."""
    with pytest.raises(TypeError, match="key"):
        LastGood()
    guarded = Pipeline("prices", Fallback(last_good=LastGood(key=None, clock=clock)))
    await guarded.call(prices.of, "ann")
    prices.error = OSError("no")
    assert ("ann", 1) == await guarded.call(prices.of, "bob")


async def test_an_answer_that_is_too_old_is_not_given(clock, prices):
    """After `max_age` seconds there is nothing to answer with; `answer`, if there is one, comes next."""
    last_good = LastGood(key=None, max_age=300, clock=clock)
    guarded = Pipeline("prices", Fallback(last_good=last_good))
    await guarded.call(prices.of)
    prices.error = OSError("no")
    await clock.advance(300)
    assert (1,) == await guarded.call(prices.of)
    await clock.advance(1)
    with pytest.raises(OSError, match="no"):
        await guarded.call(prices.of)
    assert 0 == len(last_good)
    assert 7 == await Pipeline("prices", Fallback(last_good=last_good, answer=7)).call(prices.of)


@pytest.mark.parametrize("key", [lambda user: user, None], ids=["key", "all"])
async def test_none_is_an_answer(clock, key):
    """A function that returned None is answered with None."""
    fails = False

    async def find(user):
        if fails:
            raise OSError

    guarded = Pipeline("users", Fallback(last_good=LastGood(key=key, clock=clock), answer="unused"))
    await guarded.call(find, "ann")
    fails = True
    assert await guarded.call(find, "ann") is None


async def test_so_many_answers_are_kept(clock, prices):
    """The one that was used least recently goes first, and nothing else holds on to it."""
    last_good = LastGood(key=lambda user: user, most=2, clock=clock)
    guarded = Pipeline("prices", Fallback(last_good=last_good))

    class Answer:
        pass

    async def answer(user):
        if prices.error:
            raise prices.error
        return Answer()

    first = weakref.ref(await guarded.call(answer, "ann"))
    await guarded.call(answer, "bob")
    await guarded.call(answer, "cid")
    gc.collect()
    assert (2, None) == (len(last_good), first())
    for number in range(10_000):
        await guarded.call(answer, number)
    assert 2 == len(last_good)


class HTTPError(Exception):
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Response:
    def __init__(self, status_code):
        self.status_code = status_code


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("no"),
        HTTPError(status=403),
        HTTPError(status_code=401),
        HTTPError(code=401),
        HTTPError(response=Response(403)),
    ],
    ids=repr,
)
async def test_a_refusal_for_want_of_rights_is_not_answered_unless_said(clock, prices, error):
    """A caller who may not see it gets the error, also where another error was made of it, and what was kept is gone."""
    last_good = LastGood(key=None, clock=clock)
    guarded = Pipeline("prices", Fallback(last_good=last_good))
    await guarded.call(prices.of)
    prices.error = error
    with pytest.raises(type(error)):
        await guarded.call(prices.of)
    assert 0 == len(last_good)

    prices.error = None
    await guarded.call(prices.of)
    prices.error = RuntimeError("wrapped")
    prices.error.__cause__ = error
    with pytest.raises(RuntimeError):
        await guarded.call(prices.of)

    prices.error = None
    said = Pipeline("prices", Fallback(last_good=LastGood(key=None, denied=True, clock=clock)))
    await said.call(prices.of)
    prices.error = error
    assert (3,) == await said.call(prices.of)


async def test_on_can_say_it_too(clock, prices):
    """A PermissionError that `on` names is answered; one that it only covers (as an OSError) is not."""
    for on, answered in ((PermissionError, True), (OSError, False)):
        guarded = Pipeline("prices", Fallback(last_good=LastGood(key=None, clock=clock), on=on))
        prices.error = None
        await guarded.call(prices.of)
        prices.error = PermissionError("no")
        if answered:
            await guarded.call(prices.of)
        else:
            with pytest.raises(PermissionError):
                await guarded.call(prices.of)


async def test_a_cancelled_call_is_not_answered_with_what_is_kept(clock):
    """Cancellation comes out, and is no reason to forget anything."""
    last_good = LastGood(key=None, clock=clock)
    wait = False

    async def fetch():
        if wait:
            await asyncio.Event().wait()
        return 1

    guarded = Pipeline("prices", Fallback(last_good=last_good))
    await guarded.call(fetch)
    wait = True
    task = asyncio.create_task(guarded.call(fetch))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (True, 1) == (task.cancelled(), len(last_good))


def test_plain_functions_have_a_last_good_answer_too(clock, prices, used):
    """A plain function is answered with what it last returned."""
    guarded = Pipeline("prices", Fallback(last_good=LastGood(key=lambda user: user, clock=clock)))
    guarded.call_sync(prices.plain_of, "ann")
    prices.error = OSError("no")
    assert ("ann", 1) == guarded.call_sync(prices.plain_of, "ann")
    with pytest.raises(OSError, match="no"):
        guarded.call_sync(prices.plain_of, "bob")
    assert [(0.0, "success"), (None, "failure")] == [(event.age, event.result) for event in used]


async def test_streams_and_responses_cannot_be_kept(clock):
    """What can be read once is refused before anything is called, with what to do instead."""
    fallback = Fallback(last_good=LastGood(key=None, clock=clock))

    @Pipeline("rows", fallback)
    async def rows():
        raise AssertionError("called")
        yield

    with pytest.raises(ConfigurationError, match="around the function that reads it"):
        await anext(rows())

    async def send(call):
        raise AssertionError("called")

    with pytest.raises(ConfigurationError, match="a stream or a response"):
        await fallback.run(Call("prices"), send)


async def test_a_key_that_is_none_is_refused(clock, prices):
    """A key that cannot be looked up is refused before the call, with what would be right."""
    guarded = Pipeline("prices", Fallback(last_good=LastGood(key=lambda *users: list(users), clock=clock)))
    with pytest.raises(ConfigurationError, match="is list, which cannot be looked up"):
        await guarded.call(prices.of, "ann")
    assert 0 == prices.count


async def test_the_oldest_of_several_ages_is_told(clock):
    """Where one fallback has answered several times in a request, its mark stands once, with the oldest age."""
    with scope_open(Scope()) as scope:
        scope.mark_degraded("prices", age=3.0)
        scope.mark_degraded("prices", age=9.4)
        scope.mark_degraded("prices")
        scope.mark_degraded("stock")
    assert ("prices;age=9", "stock") == scope.degraded


# -- with other policies ----------------------------------------------------------------------------------------------


async def test_what_a_timeout_stopped_is_answered(clock, used):
    """As failsafe-go's composition "Fallback with Timeout": the fallback is given the error, and the event its kind."""
    given = []
    fallback = Fallback(answer=lambda outcome: given.append(type(outcome.error).__name__) or "instead")
    pipeline = Pipeline("prices", fallback, Timeout(1.0, clock=clock))
    task = asyncio.create_task(pipeline.call(asyncio.Event().wait))
    await asyncio.sleep(0)
    await clock.advance(1)
    assert "instead" == await task
    assert (["AttemptTimeoutError"], ["timeout"]) == (given, [event.reason for event in used])


async def test_a_retry_around_it_sees_no_failure(clock):
    """As failsafe-go's composition "RetryPolicy with Fallback": what is answered is not tried again."""
    calls = []

    async def fails():
        calls.append(1)
        raise OSError

    allow = {"fallback-inside-retry": "the answer is as good as any"}
    assert 7 == await Pipeline("prices", Retry(clock=clock), Fallback(answer=7), allow=allow).call(fails)
    assert [1] == calls


@pytest.mark.parametrize("state", ["closed", "open"])
async def test_an_open_breaker_inside_is_answered_like_a_failure(clock, used, state):
    """As failsafe-go's compositions "Fallback with CircuitBreaker - closed" and "- open"."""
    breaker = CircuitBreaker("prices", clock=clock)
    if state == "open":
        breaker.core.open()
    calls = []

    async def fails():
        calls.append(1)
        raise OSError

    assert 7 == await Pipeline("prices", Fallback(answer=7), breaker).call(fails)
    expected = (1, "error") if state == "closed" else (0, "breaker_open")
    assert expected == (len(calls), used[0].reason)


async def test_fallback_around_retry_around_breaker(clock, used):
    """As failsafe-go's composition "with Fallback -> RetryPolicy -> CircuitBreaker": each attempt is judged, the fallback
    answers for the last one, and nobody takes its answer for a success of the service."""
    breaker = CircuitBreaker("prices", min_calls=5, window=5, clock=clock)
    pipeline = Pipeline("prices", Fallback(answer="instead"), Retry(clock=clock), breaker)
    assert "instead" == await pipeline.call(broken)
    assert (0, 3, "closed") == (breaker.counts["success"], breaker.counts["failure"], breaker.state)
    assert ["retries_exhausted"] == [event.reason for event in used]


def test_something_to_answer_with_is_needed():
    """Neither answer nor last_good, or a last_good that is none, is refused."""
    with pytest.raises(ConfigurationError, match="Give answer=, or last_good="):
        Fallback()
    with pytest.raises(ConfigurationError, match="LastGood"):
        Fallback(last_good=300)


@pytest.mark.parametrize(
    "wrong",
    [{"key": "user"}, {"max_age": 0}, {"max_age": "1h"}, {"most": 0}, {"most": 1.5}, {"denied": "yes"}, {"clock": 3}],
    ids=str,
)
def test_wrong_options_of_last_good_are_refused(wrong):
    """Each value that cannot work is refused when it is made."""
    with pytest.raises(ConfigurationError):
        LastGood(**{"key": None, **wrong})


def test_it_describes_itself():
    """For explain and the linter: which errors it answers."""
    described = {"kind": "fallback", "name": "cached", "on": [], "last_good": None}
    assert described == Fallback(answer=1, name="cached").describe()
    assert 60.0 == Fallback(last_good=LastGood(key=None, max_age=60.0)).describe()["last_good"]
    assert ["OSError", "KeyError"] == Fallback(answer=1, on=(OSError, KeyError)).describe()["on"]


@pytest.mark.parametrize("before", [False, True])
async def test_what_is_answered_for_is_not_used_up(before):
    """Retries that end in an answer leave no mark of exhaustion on the request; one from before stays."""

    async def fails():
        raise OSError

    with scope_open(Scope()) as scope:
        if before:
            scope.mark_exhausted()
        guard = Pipeline("prices", Fallback(answer=1), Retry(attempts=2, backoff=Backoff(first=0)))
        assert 1 == await guard.call(fails)
        assert before is scope.exhausted
        with pytest.raises(OSError):
            await Pipeline("prices", Retry(attempts=2, backoff=Backoff(first=0))).call(fails)
        assert scope.exhausted


def grouped():
    raise ExceptionGroup("tasks", [OSError(), PermissionError("no")])


def led_to_another():
    try:
        raise PermissionError("no")
    except PermissionError:
        raise OSError("went wrong")  # noqa: B904 - as careless code does it


def as_text():
    error = OSError("no")
    error.status_code = "403"
    raise error


def as_a_fraction():
    error = OSError("no")
    error.status = 401.0
    raise error


@pytest.mark.parametrize("denies", [grouped, led_to_another, as_text, as_a_fraction])
async def test_a_refusal_in_any_disguise_gives_nothing_that_was_kept(denies):
    """Grouped by a TaskGroup, behind an error that came of it, or said as text: the kept answer stays where it is."""
    denied = False

    async def look():
        if denied:
            denies()
        return "secret"

    guard = Pipeline("files", Fallback(last_good=LastGood(key=None)))
    assert "secret" == await guard.call(look)
    denied = True
    with pytest.raises((OSError, ExceptionGroup)):
        await guard.call(look)


async def test_functions_that_say_they_are_equal_share_no_answer():
    """A callable client of one user and that of another are two, whatever their `__eq__` says; an unhashable one too."""

    class Client:
        def __init__(self, user):
            self.user = user

        __hash__ = None

        def __eq__(self, other):
            return True

        async def __call__(self, fails):
            if fails:
                raise OSError
            return f"secret of {self.user}"

    guard = Pipeline("files", Fallback(last_good=LastGood(key=lambda fails: 1)))
    alice, bob = Client("alice"), Client("bob")
    assert "secret of alice" == await guard.call(alice, False)
    with pytest.raises(OSError):
        await guard.call(bob, True)
    assert "secret of alice" == await guard.call(alice, True)


async def test_a_key_is_a_plain_function():
    """A coroutine function as key is refused: each of its coroutines is a key that never comes again."""

    async def key():
        return 1

    with pytest.raises(ConfigurationError, match="key is a plain function"):
        LastGood(key=key)


@pytest.mark.parametrize("answered", [True, False])
async def test_a_failed_call_leaves_nothing_for_the_collector(answered):
    """What the call held is let go of when it ends, not when the collector comes."""
    kept = []

    class Load:
        pass

    async def fails():
        load = Load()
        kept.append(weakref.ref(load))
        raise OSError

    guard = Pipeline("prices", Fallback(answer=1, on=OSError if answered else KeyError))
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            if answered:
                assert 1 == await guard.call(fails)
            else:
                with pytest.raises(OSError):
                    await guard.call(fails)
        assert [None, None, None] == [each() for each in kept]
    finally:
        gc.enable()
