import asyncio

import pytest

from meshkit import CircuitOpenError, ConfigurationError, Fallback, Pipeline, Retry, Scope, listen
from meshkit.core.call import Call, Judgement
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
    """A value, a function or a coroutine function answers, and the scope is marked."""
    with scope_open(Scope()) as scope:
        assert given == await Pipeline("prices", Fallback(answer=answer, name="cached")).call(broken)
    assert ("cached",) == scope.degraded


async def test_a_call_that_works_is_left_alone():
    """No mark, no event, where nothing failed."""

    async def fine():
        return 1

    with scope_open(Scope()) as scope:
        assert 1 == await Pipeline("prices", Fallback(answer=7)).call(fine)
    assert () == scope.degraded


async def test_cancellation_is_never_answered():
    """A cancelled call is cancelled, whatever the fallback would say."""

    async def cancelled():
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await Pipeline("prices", Fallback(answer=7)).call(cancelled)


async def test_only_the_listed_errors_are_answered():
    """An error that `on` does not list is raised."""
    with pytest.raises(OSError, match="no"):
        await Pipeline("prices", Fallback(answer=7, on=KeyError)).call(broken)


async def test_its_own_error_carries_the_first_one():
    """Where the fallback itself fails, its error is raised with the first one as its cause."""

    def fails(outcome):
        raise KeyError("cache")

    with pytest.raises(KeyError) as caught:
        await Pipeline("prices", Fallback(answer=fails)).call(broken)
    assert isinstance(caught.value.__cause__, OSError)


async def test_results_that_the_edge_calls_failures_are_answered():
    """A 503 is answered like an error, and disposed of."""
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
    [{"name": "a,b"}, {"name": "a\r\nx: y"}, {"name": "préis"}, {"name": ""}, {"on": asyncio.CancelledError}],
    ids=str,
)
def test_wrong_options_are_refused(wrong):
    """A name that no header can hold, or a class that is never answered, is refused when the policy is made."""
    with pytest.raises(ConfigurationError):
        Fallback(answer=7, **wrong)
