"""What a retry hands on and leaves behind: results, what is said, the budget, and nothing that keeps an error alive."""

import asyncio
import gc
import weakref

import pytest
import tenacity

from meshkit import Backoff, BulkheadFullError, ConfigurationError, Pipeline, Retry, RetryBudget
from meshkit.core.call import Call, Judgement
from meshkit.testing.clock import ManualClock


async def test_a_result_that_needs_no_retry_is_handed_on(clock):
    """The first attempt's result comes out, of coroutines and plain functions, called or guarded."""
    for retry in (Retry(clock=clock), Retry(on_result=lambda result: result == "bad", clock=clock)):
        pipeline = Pipeline("prices", retry)
        assert "ok" == await pipeline.call(asyncio.sleep, 0, "ok")
        assert "ok" == pipeline.call_sync(lambda: "ok")
        assert "ok" == pipeline(lambda: "ok")()
        assert "ok" == await retry.run(Call("prices"), lambda _: asyncio.sleep(0, "ok"))
        assert "ok" == retry.run_sync(Call("prices"), lambda _: "ok")


@pytest.mark.parametrize("plain", [True, False])
async def test_an_edge_may_ask_for_another_attempt_at_a_result(clock, plain):
    """Where the user gave no rule, an answer that the edge calls worth it is tried again, and any other is handed on."""
    answers = ["busy", "busy", "fine", "never"]
    retry = Retry(backoff=Backoff(jitter="none"), clock=clock)
    call = Call("prices", judge=lambda outcome: Judgement(retry=outcome.result == "busy"))
    if plain:
        result = retry.run_sync(call, lambda _: answers.pop(0))
    else:
        result = await retry.run(call, lambda _: asyncio.sleep(0, answers.pop(0)))
    assert ("fine", ["never"]) == (result, answers)


@pytest.mark.parametrize("plain", [True, False])
async def test_a_loop_deposits_into_the_budget(clock, plain):
    """A call that is a loop counts for the budget as any other one."""
    budget = RetryBudget(ratio=1.0, at_least=0, clock=clock)
    retry = Retry(budget=budget, clock=clock)
    if plain:
        for attempt in retry.context("prices"):
            with attempt:
                pass
    else:
        async for attempt in retry.context("prices"):
            with attempt:
                pass
    assert 1 == budget.balance


async def test_an_attempt_that_is_not_made_costs_nothing():
    """A loop that is cancelled during its wait, or whose plain wait is broken off, gives the retry back."""

    class BrokenOff(ManualClock):
        def block(self, seconds):
            raise KeyboardInterrupt

    clock = BrokenOff(hold=True)
    budget = RetryBudget(at_least=3, clock=clock)
    retry = Retry(budget=budget, clock=clock)

    def plain():
        for attempt in retry.context("prices"):
            with attempt:
                raise ConnectionError

    async def loop():
        async for attempt in retry.context("prices"):
            with attempt:
                raise ConnectionError

    with pytest.raises(KeyboardInterrupt):
        plain()
    assert 3 == budget.balance
    waiting = asyncio.create_task(loop())
    await asyncio.sleep(0)
    assert 2 == budget.balance
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert 3 == budget.balance


def test_a_plain_loop_without_a_wait_does_not_hold_the_thread(clock):
    """A wait of no length is none."""
    left = 2
    for attempt in Retry(backoff=Backoff(first=0), clock=clock).context("prices"):
        with attempt:
            left -= 1
            if left:
                raise ConnectionError
    assert [] == clock.sleeps


async def test_a_loop_can_be_begun_by_hand(clock):
    """What `iter` and `aiter` give can be looped over, `with` gives the attempt, and each says what it is."""
    context = Retry(clock=clock).context("prices")
    numbers = []
    for attempt in iter(iter(context)):
        with attempt as entered:
            numbers.append(entered.number)
    async for attempt in aiter(aiter(context)):
        with attempt as entered:
            numbers.append(entered.number)
    assert ([1, 1], "<attempt 1>", "<retry of 'prices'>") == (numbers, repr(attempt), repr(context))


@pytest.mark.parametrize("plain", [True, False])
async def test_a_loop_that_gives_up_keeps_no_error_alive(clock, plain):
    """The error that came out is freed when its caller lets go of it, without the collector."""

    class Flaw(Exception):
        pass

    async def loop():
        async for attempt in Retry(attempts=2, on=Flaw, clock=clock).context("prices"):
            with attempt:
                raise Flaw

    def plain_loop():
        for attempt in Retry(attempts=2, on=Flaw, clock=clock).context("prices"):
            with attempt:
                raise Flaw

    gc.collect()
    gc.disable()
    try:
        try:
            plain_loop() if plain else await loop()
        except Flaw as error:
            left = weakref.ref(error)
        assert left() is None
    finally:
        gc.enable()


def test_a_refusal_is_no_matter_for_a_predicate(clock):
    """What was refused further inside is not retried, whatever tenacity's predicate would say; nor is it asked."""
    asked = []
    calls = []

    def refused():
        calls.append(1)
        raise BulkheadFullError("full", policy="other")

    retry = Retry(retry=lambda state: asked.append(state) or True, clock=clock)
    with pytest.raises(BulkheadFullError):
        Pipeline("prices", retry).call_sync(refused)
    assert (1, []) == (len(calls), asked)


def test_a_strategy_that_fails_keeps_its_own_context(clock):
    """Its error says what it was raised in; where it was raised in nothing, it says what the call came to."""

    def within(state):
        try:
            raise KeyError("inner")
        except KeyError:
            raise ZeroDivisionError from None

    def alone(state):
        raise ZeroDivisionError

    def broken():
        raise ConnectionError

    contexts = []
    for strategy in (within, alone):
        with pytest.raises(ZeroDivisionError) as caught:
            Pipeline("prices", Retry(retry=strategy, clock=clock)).call_sync(broken)
        contexts.append(type(caught.value.__context__))
    assert [KeyError, ConnectionError] == contexts


@pytest.mark.parametrize("form", ["function", "loop"])
def test_what_a_plain_function_cannot_have_is_named(clock, form):
    """An async strategy is refused by its own name."""

    async def strategy(state):
        await asyncio.sleep(0)

    retry = Retry(retry=strategy, clock=clock)

    def broken():
        raise ConnectionError

    def loop():
        for attempt in retry.context("prices"):
            with attempt:
                broken()

    with pytest.raises(
        ConfigurationError, match=r"^MK100  an async tenacity strategy cannot be had in a plain function"
    ):
        loop() if form == "loop" else Pipeline("prices", retry).call_sync(broken)


def test_a_result_that_cannot_be_disposed_of_is_named(clock):
    """Nor can a plain function wait while a result is thrown away."""

    async def discard(result):
        await asyncio.sleep(0)

    call = Call("prices", discard=discard)
    retry = Retry(on_result=lambda result: True, attempts=2, clock=clock)
    with pytest.raises(ConfigurationError, match=r"^MK100  a result that has to be waited for when it is disposed of"):
        retry.run_sync(call, lambda _: "bad")


def test_a_plain_function_that_returns_a_coroutine_hears_what_to_do(clock):
    """Alone around it as in a pipeline."""
    with pytest.raises(ConfigurationError, match=r"coroutine\. Make it `async def`, so that the pipeline awaits it\.$"):
        Pipeline("prices", Retry(clock=clock))(lambda: asyncio.sleep(0))()


@pytest.mark.parametrize(("asked", "waited"), [(0.5, 0.5), (b"1", 0.0), (0, 0.0)])
def test_less_than_a_second_is_heeded_too(asked, waited):
    """An error's `retry_after` of half a second is waited for; what is no length of time is not."""
    clock = ManualClock(chance=0.0)
    left = 2

    class Busy(Exception):
        retry_after = asked

    def busy():
        nonlocal left
        left -= 1
        if left:
            raise Busy

    Pipeline("prices", Retry(on=Busy, backoff=Backoff(first=0), clock=clock)).call_sync(busy)
    assert [waited] * (waited > 0) == [slept for slept in clock.sleeps if slept]


async def test_a_discard_that_fails_is_in_the_log_of_meshkit(clock, caplog):
    """It keeps no attempt from being made."""
    results = ["bad", "ok"]

    def discard(result):
        raise ZeroDivisionError

    retry = Retry(on_result=lambda result: result == "bad", discard=discard, clock=clock)
    assert "ok" == await Pipeline("prices", retry).call(lambda: asyncio.sleep(0, results.pop(0)))
    assert [("meshkit", "a discarded result of call 'prices' could not be disposed of")] == [
        (record.name, record.getMessage()) for record in caplog.records
    ]


def test_tenacity_is_asked_of_a_success_too(clock):
    """A predicate that wants a result again gets it again, and no more often than it says."""
    results = ["bad", "ok"]
    retry = Retry(retry=tenacity.retry_if_result(lambda result: result == "bad"), clock=clock)
    assert "ok" == Pipeline("prices", retry).call_sync(lambda: results.pop(0))
