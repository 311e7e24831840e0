"""`for attempt in retry.context(…)`: the idiom of tenacity and stamina, with our decisions."""

import asyncio
import contextlib

import pytest
import tenacity

from meshkit import (
    Backoff,
    ConfigurationError,
    Pipeline,
    Retry,
    RetryBudget,
    Scope,
    current_attempt,
    current_scope,
    listen,
    retry_end,
)
from meshkit.core.events import RetryEnded
from meshkit.core.scope import scope_open

NONE = Backoff(jitter="none")


async def loop(retry, *outcomes, name="prices", result=False):
    """A loop with an `async for`; what it came to."""
    left, value = list(outcomes), None
    async for attempt in retry.context(name):
        with attempt:
            assert attempt.number == current_attempt()
            value = left.pop(0)
            if isinstance(value, BaseException):
                raise value
            if result:
                attempt.set_result(value)
    return value


def plain_loop(retry, *outcomes, result=False):
    """As `loop`, with a plain `for`."""
    left, value = list(outcomes), None
    for attempt in retry.context("prices"):
        with attempt:
            assert attempt.number == current_attempt()
            value = left.pop(0)
            if isinstance(value, BaseException):
                raise value
            if result:
                attempt.set_result(value)
    return value


BOTH = pytest.mark.parametrize("sync", [False, True], ids=["async", "plain"])


async def either(sync, retry, *outcomes, **options):
    return plain_loop(retry, *outcomes, **options) if sync else await loop(retry, *outcomes, **options)


@BOTH
async def test_a_block_is_tried_until_it_works(clock, sync):
    """Waits and attempt numbers are those of a decorated function."""
    assert "ok" == await either(sync, Retry(backoff=NONE, clock=clock), OSError(), OSError(), "ok")
    assert [0.1, 0.2] == clock.sleeps
    assert 1 == current_attempt()


@BOTH
async def test_the_last_error_comes_out_as_it_is(clock, sync):
    """The loop raises the last real error, with the note, the reason and the event."""
    heard, last = [], OSError("third")
    stop = listen(heard.append, kind=RetryEnded)
    try:
        with pytest.raises(OSError, match="third") as caught:
            await either(sync, Retry(clock=clock), OSError("first"), OSError("second"), last)
    finally:
        stop()
    assert caught.value is last
    assert "attempts" == retry_end(last)
    assert ["meshkit: gave up on 'prices' after 3 attempts, ended by attempts"] == last.__notes__
    assert [RetryEnded(source="prices", attempts=3, reason="attempts", error_type="OSError")] == heard


@BOTH
async def test_an_error_that_is_not_listed_ends_the_loop(clock, sync):
    """One attempt, and the error."""
    with pytest.raises(KeyError) as caught:
        await either(sync, Retry(on=OSError, clock=clock), KeyError("x"), "ok")
    assert "not_retryable" == retry_end(caught.value)


@BOTH
async def test_a_result_is_judged_where_it_is_shown(clock, sync):
    """`set_result` has `on_result` and tenacity's predicates asked; without it, a block that ends well is done."""
    wanted = {"on_result": lambda result: result is None}
    assert "ok" == await either(sync, Retry(**wanted, clock=clock), None, None, "ok", result=True)
    assert "ok" == await either(sync, Retry(**wanted, clock=clock), "ok", "again", result=True)
    assert await either(sync, Retry(**wanted, clock=clock), None, "ok") is None
    none = Retry(retry=tenacity.retry_if_result(lambda result: result is None), clock=clock)
    assert "ok" == await either(sync, none, None, "ok", result=True)
    assert await either(sync, none, None, "ok") is None
    assert await either(sync, none, None, None, None, "ok", result=True) is None


@BOTH
async def test_a_result_of_a_block_that_fails_after_all_is_none(clock, sync):
    """An error after `set_result` is what the block came to."""
    seen = []

    def body(attempt):
        seen.append(attempt.number)
        attempt.set_result("early")
        if attempt.number == 1:
            raise OSError

    context = Retry(clock=clock).context("prices")
    if sync:
        for attempt in context:
            with attempt:
                body(attempt)
    else:
        async for attempt in context:
            with attempt:
                body(attempt)
    assert [1, 2] == seen


async def test_async_strategies_are_awaited_in_an_async_loop_only(clock):
    """As in a decorated function: a plain `for` cannot wait for them."""

    async def wanted(error):
        await asyncio.sleep(0)
        return True

    retry = Retry(retry=tenacity.asyncio.retry_if_exception(wanted), clock=clock)
    assert "ok" == await loop(retry, OSError(), "ok")
    with pytest.raises(ConfigurationError, match="async tenacity strategy"):
        plain_loop(retry, OSError(), "ok")


@BOTH
async def test_a_deadline_and_a_budget_end_the_loop(clock, sync):
    """Time and budget are asked as elsewhere; the loop counts as one call."""
    with scope_open(Scope(deadline=clock.now() + 0.05)), pytest.raises(OSError) as caught:
        await either(sync, Retry(backoff=NONE, clock=clock), OSError())
    assert "deadline" == retry_end(caught.value)
    budget = RetryBudget(ratio=1.0, at_least=0, clock=clock)
    retry = Retry(attempts=5, budget=budget, clock=clock)
    with pytest.raises(OSError) as caught:
        await either(sync, retry, OSError(), OSError(), "ok")
    assert "budget" == retry_end(caught.value)


async def test_a_cancelled_block_is_the_end_of_the_loop(clock):
    """The cancellation comes out, and there is no further attempt: not in the block, not in the wait."""
    clock.hold = True
    for at in ("block", "wait"):
        began, waits = [], asyncio.Event()

        async def work(at=at, began=began, waits=waits):
            async for attempt in Retry(clock=clock).context("prices"):
                with attempt:
                    began.append(attempt.number)
                    if at == "wait":
                        raise OSError
                    await waits.wait()

        task = asyncio.ensure_future(work())
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert [1] == began


@pytest.mark.parametrize("leave", ["break", "return", "break after a failure"])
async def test_a_loop_may_be_left_early(clock, leave):
    """Nothing stays behind: no scope, no attempt number, no warning of something unfinished."""
    scopes = []

    async def work():
        async for attempt in Retry(clock=clock).context("prices"):
            with attempt:
                scopes.append(current_scope())
                if leave == "break":
                    break
                if leave == "return":
                    return
                raise OSError
            break

    await work()
    assert [True] == [isinstance(scope, Scope) for scope in scopes]
    assert (1, None) == (current_attempt(), current_scope())


async def test_a_block_in_a_request_shares_its_scope(clock):
    """Where there is a scope already, the block is in that one."""
    with scope_open(Scope()) as scope:
        async for attempt in Retry(clock=clock).context("prices"):
            with attempt:
                inside = current_scope()
        assert inside is scope is current_scope()


async def test_a_cancellation_that_is_caught_ends_the_loop_too(clock):
    """Whoever catches a cancellation around the attempt gets no further one, whatever the block had shown before."""
    seen = []
    async for attempt in Retry(on_result=lambda result: True, clock=clock).context("prices"):
        seen.append(attempt.number)
        with contextlib.suppress(asyncio.CancelledError), attempt:
            attempt.set_result("early")
            raise asyncio.CancelledError
    assert [1] == seen


@BOTH
async def test_an_attempt_that_is_not_entered_is_refused(clock, sync):
    """A loop without the `with` would try nothing again: it says so instead."""
    context = Retry(clock=clock).context("prices")
    with pytest.raises(ConfigurationError, match="with attempt"):
        _ = list(context) if sync else [attempt async for attempt in context]


@BOTH
@pytest.mark.parametrize("end", [StopIteration, StopAsyncIteration])
async def test_the_end_of_another_loop_is_not_taken_for_the_end_of_this_one(clock, sync, end):
    """What `next()` raises in the block comes out of it: raised from the loop it would vanish."""
    seen = []

    def plain():
        for attempt in Retry(clock=clock).context("prices"):
            with attempt:
                seen.append(attempt.number)
                raise end

    async def coroutine():
        if sync:
            plain()
        async for attempt in Retry(clock=clock).context("prices"):
            with attempt:
                seen.append(attempt.number)
                raise end

    # A StopIteration that leaves a coroutine is made a RuntimeError by Python.
    with pytest.raises((end, RuntimeError)):
        await coroutine()
    assert [1] == seen


async def test_one_context_serves_many_loops_at_once(clock):
    """Where tenacity's shared object loses failures of concurrent loops, each loop here is a call of its own: as
    tenacity's `test_attempt_number_is_correct_for_interleaved_coroutines`."""
    context = Retry(attempts=6, backoff=Backoff(first=0), clock=clock).context("prices")

    async def work(failures):
        seen = []
        async for attempt in context:
            with attempt:
                seen.append((attempt.number, current_attempt()))
                await asyncio.sleep(0)
                if attempt.number <= failures:
                    raise OSError
        return seen

    results = await asyncio.gather(*(work(failures) for failures in range(6)))
    assert [[(n, n) for n in range(1, failures + 2)] for failures in range(6)] == results


async def test_a_hundred_loops_at_once_make_exactly_two_attempts_each(clock):
    """Every loop fails once and works the second time."""
    context = Retry(clock=clock).context("prices")

    async def work():
        count = 0
        async for attempt in context:
            with attempt:
                count += 1
                await asyncio.sleep(0)
                if count == 1:
                    raise OSError
        return count

    assert [2] * 100 == await asyncio.gather(*(work() for _ in range(100)))


async def test_a_loop_in_a_later_attempt_counts_from_one(clock):
    """Inside the second attempt of a pipeline the loop's first attempt is 1, and afterwards it is the second again."""
    seen = []

    async def fetch():
        before = current_attempt()
        seen.append((before, await loop(Retry(clock=clock), OSError(), "ok"), current_attempt()))
        if before == 1:
            raise OSError

    await Pipeline("outer", Retry(clock=clock)).call(fetch)
    assert [(1, "ok", 1), (2, "ok", 2)] == seen


async def test_a_strategy_that_fails_in_a_loop_keeps_the_blocks_error(clock):
    """The strategy's error carries what the block came to."""
    real = OSError("real")
    for sync in (False, True):
        with pytest.raises(ZeroDivisionError) as caught:
            await either(sync, Retry(wait=lambda state: 1 / 0, clock=clock), real)
        assert caught.value.__context__ is real
