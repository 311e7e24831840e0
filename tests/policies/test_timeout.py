import asyncio

import pytest

from meshkit import AttemptTimeoutError, ConfigurationError, DeadlineExceededError, Pipeline, Scope, Timeout
from meshkit.core.scope import current_scope, scope_open


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
    """Who cancels from outside gets CancelledError, and the task is cancelled."""
    task = await running(Pipeline("prices", Timeout(2.0, clock=clock)), clock, 1.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_cancellation_at_the_same_time_wins(clock):
    """A caller's cancellation in the turn of the timeout is not lost."""
    task = asyncio.create_task(Pipeline("prices", Timeout(2.0, clock=clock)).call(asyncio.Event().wait))
    await asyncio.sleep(0)
    clock.block(2.0)  # the timer fires, and nothing else has run yet
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


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


@pytest.mark.parametrize("wrong", [{}, {"seconds": 1, "total": 2}, {"seconds": 0}, {"total": -1}], ids=str)
def test_wrong_options_are_refused(wrong):
    """Exactly one limit, above 0."""
    with pytest.raises(ConfigurationError):
        Timeout(**wrong)


def test_a_plain_function_is_refused_by_name():
    """A pipeline with a Timeout says, when it decorates a plain function, which policy cannot guard it."""
    with pytest.raises(ConfigurationError, match="Timeout in pipeline 'prices'"):
        Pipeline("prices", Timeout(1.0))(lambda: None)
