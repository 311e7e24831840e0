"""Cancellation at every point at which a call can be cancelled, of every policy and of the full pipeline.

`SCENARIOS` are swept: run once to count the points, and once more for each, cancelled there (`sweep.py`). What is swept
is complete by construction: a policy that meshkit offers and no scenario covers fails here, and so does an `await` of a
policy at which nothing was ever cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import tenacity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sweep import (
    HANG,
    SCENARIOS,
    Answer,
    Stage,
    Sweep,
    Work,
    World,
    at_an_edge,
    drained,
    module_of,
    points_of,
    policies,
    scenario,
    sweep,
    swept,
    timeouts,
)

from meshkit import (
    AttemptTimeoutError,
    Backoff,
    Bulkhead,
    Call,
    CircuitBreaker,
    CircuitBreakers,
    Fallback,
    Hedge,
    Judgement,
    LastGood,
    Outcome,
    Pipeline,
    Policy,
    RateLimiter,
    Retry,
    RetryBudget,
    Scope,
    Timeout,
    standard,
)
from meshkit.core.call import ATTEMPT
from meshkit.core.events import HedgeStarted, RetryScheduled
from meshkit.core.scope import scope_open

WAIT = Backoff(first=1.0, jitter="none")


async def fine() -> str:
    await asyncio.sleep(0)
    return "ok"


def through(work: Work, *around: Policy, **more: object) -> Stage:
    """A stage on which a Pipeline of these policies calls `work`; once more means a call that works."""
    pipeline = Pipeline("prices", *around, allow=ANYTHING)
    return Stage(
        call=lambda: pipeline.call(work), work=work, policies=around, again=lambda: pipeline.call(fine), **more
    )


def alone(work: Work, policy: Policy, **more: object) -> Stage:
    """A stage on which a policy alone is around `work`, as a decorator."""
    guarded = Pipeline("prices", policy, allow=ANYTHING)(work)
    return Stage(call=guarded, work=work, policies=(policy,), again=lambda: Pipeline("p", policy)(fine)(), **more)


def every(*checks: Callable[[], None]) -> Callable[[], None]:
    def check() -> None:
        for each in checks:
            each()

    return check


# What explain() finds in pipelines that are made for a sweep and not for a service is of no interest.
ANYTHING: dict[str, str] = {}


# -- what must be as before -------------------------------------------------------------------------------------------


def judged(world: World, work: Work, breaker: CircuitBreaker) -> Callable[[], None]:
    """A breaker has counted the runs that ended by themselves or for their time, and of the others nothing."""
    counts, snapshot = breaker.counts, breaker.snapshot()

    def check() -> None:
        now = breaker.counts
        calls = work.returned + work.failed + timeouts(world)
        extra = now["success"] - counts["success"] - work.returned
        # One more call that works is made to see whether it can be.
        assert extra in (0, 1), f"{extra} successes too many"
        assert work.failed + timeouts(world) == now["failure"] - counts["failure"], "failures"
        assert counts["rejected"] == now["rejected"], "rejections"
        if snapshot.state == breaker.state == "closed":
            assert calls + extra == breaker.snapshot().calls - snapshot.calls, "calls in the window"

    return check


def opened(world: World, breaker: CircuitBreaker, *, ready: bool) -> None:
    """Open a breaker, and let the time pass after which it probes."""
    breaker.force_open()
    if ready:
        world.advance(breaker.open_for)
    assert ("half_open" if ready else "open") == breaker.state


# -- circuit breaker --------------------------------------------------------------------------------------------------


@scenario
def breaker_closed(world: World) -> Stage:
    work, breaker = world.work("ok"), CircuitBreaker("b", clock=world.clock)
    return through(work, breaker, check=judged(world, work, breaker))


@scenario
def breaker_alone(world: World) -> Stage:
    work, breaker = world.work("ok"), CircuitBreaker("b", clock=world.clock)
    return alone(work, breaker, check=judged(world, work, breaker))


@scenario
def breaker_by_time(world: World) -> Stage:
    work = world.work(OSError("no"))
    breaker = CircuitBreaker("b", window_for=30, min_calls=1, failure_rate=1.0, slow_after=5, clock=world.clock)
    for _ in range(3):
        with breaker.calling():
            pass
    return through(work, breaker, check=judged(world, work, breaker))


@scenario
def breaker_probe(world: World) -> Stage:
    """Hystrix's `testUnsubscriptionDoesNotLeaveCircuitStuckHalfOpen`."""
    work, breaker = world.work("ok"), CircuitBreaker("b", clock=world.clock, probes=1)
    opened(world, breaker, ready=True)
    return through(work, breaker, check=judged(world, work, breaker))


@scenario
def breaker_probe_alone(world: World) -> Stage:
    work, breaker = world.work("ok"), CircuitBreaker("b", clock=world.clock, probes=2, concurrent_probes=1)
    opened(world, breaker, ready=True)
    return alone(work, breaker, check=judged(world, work, breaker))


@scenario
def breaker_probe_at_an_edge(world: World) -> Stage:
    """Where the end of a call may come late."""
    work, breaker = world.work("ok"), CircuitBreaker("b", clock=world.clock)
    opened(world, breaker, ready=True)
    return Stage(
        call=lambda: at_an_edge(work, breaker),
        work=work,
        policies=(breaker,),
        check=judged(world, work, breaker),
        again=lambda: Pipeline("p", breaker).call(fine),
    )


@scenario
def breaker_block(world: World) -> Stage:
    work, breaker = world.work("ok"), CircuitBreaker("b", clock=world.clock)
    opened(world, breaker, ready=True)

    async def block() -> None:
        async with breaker.calling():
            await work()

    async def again() -> None:
        async with breaker.calling():
            await fine()

    return Stage(call=block, work=work, policies=(breaker,), check=judged(world, work, breaker), again=again)


@scenario
def breakers_by_key(world: World) -> Stage:
    work = world.work("ok")
    breakers = CircuitBreakers("db", key=lambda: "tenant", most=1, clock=world.clock)
    breaker = breakers.get("tenant")
    assert breaker is not None
    opened(world, breaker, ready=True)
    return through(work, breakers, check=judged(world, work, breaker))


@scenario
def breakers_without_a_place(world: World) -> Stage:
    work = world.work("ok")
    breakers = CircuitBreakers("db", key=lambda: "tenant", most=1, clock=world.clock)
    other = breakers.get("other")
    assert other is not None
    other.isolate()
    return through(work, breakers, check=lambda: _same(1, len(breakers)))


def _same(expected: object, actual: object) -> None:
    assert expected == actual


# -- timeout ----------------------------------------------------------------------------------------------------------


@scenario
def timeout_of_an_attempt(world: World) -> Stage:
    return through(world.work("ok"), Timeout(2.0, clock=world.clock))


@scenario
def timeout_alone(world: World) -> Stage:
    return alone(world.work("ok"), Timeout(2.0, clock=world.clock))


@scenario
def timeout_of_a_future(world: World) -> Stage:
    """What is called is a plain function that returns something to await."""
    work, timeout = world.work("ok"), Timeout(2.0, clock=world.clock)
    pipeline = Pipeline("prices", timeout)
    return Stage(
        call=lambda: pipeline.call(lambda: world.loop.create_task(work())),
        work=work,
        policies=(timeout,),
        again=lambda: pipeline.call(fine),
        # A task is cancelled by whoever awaits it and is cancelled, and goes on where he is dropped.
        drops=False,
    )


@scenario
def timeout_that_is_over(world: World) -> Stage:
    """Polly's `Execute_Cancelled_EnsureNoTimeout`: cancelled in any turn up to the one in which it is over."""
    return through(world.work(HANG), Timeout(2.0, clock=world.clock))


@scenario
def timeout_with_the_result(world: World) -> Stage:
    """The result and the end of the time fall due at once."""
    return through(world.work("ok", needs=2.0), Timeout(2.0, clock=world.clock))


@scenario
def timeouts_in_each_other(world: World) -> Stage:
    return through(world.work(HANG), Timeout(total=3.0, clock=world.clock), Timeout(2.0, clock=world.clock))


@scenario
def timeouts_at_once(world: World) -> Stage:
    return through(world.work(HANG), Timeout(total=2.0, clock=world.clock), Timeout(2.0, clock=world.clock))


@scenario
def timeout_by_the_deadline(world: World) -> Stage:
    work, timeout = world.work(HANG), Timeout(2.0, clock=world.clock)
    pipeline = Pipeline("prices", timeout)

    async def call() -> object:
        with scope_open(Scope(deadline=world.clock.now() + 1)):
            return await pipeline.call(work)

    return Stage(call=call, work=work, policies=(timeout,), again=lambda: pipeline.call(fine))


# -- retry ------------------------------------------------------------------------------------------------------------


def not_overdrawn(world: World, work: Work, budget: RetryBudget) -> Callable[[], None]:
    """A budget has paid for the retries that were made, and for no other."""
    balance = budget.balance

    def check() -> None:
        assert balance - max(0, work.began - 1) == budget.balance, "retries that were not made"

    return check


@scenario
def retry_alone(world: World) -> Stage:
    """Polly's `ExecuteAsync_CanceledDuringDelay_EnsureNotExecutedAgain`."""
    budget = RetryBudget("b", ratio=0, at_least=5, clock=world.clock)
    work = world.work(OSError(), OSError(), "ok")
    return alone(
        work,
        Retry(on=OSError, backoff=WAIT, budget=budget, clock=world.clock),
        check=not_overdrawn(world, work, budget),
    )


@scenario
def retry_that_gives_up(world: World) -> Stage:
    work = world.work(OSError(), OSError())
    budget = RetryBudget("b", ratio=0, at_least=5, clock=world.clock)
    return through(
        work,
        Retry(on=OSError, attempts=2, backoff=WAIT, budget=budget, clock=world.clock),
        check=not_overdrawn(world, work, budget),
    )


@scenario
def retry_without_waits(world: World) -> Stage:
    """So often that it gives way to others in between."""
    work = world.work(*[OSError()] * 66, needs=None)
    return through(work, Retry(on=OSError, attempts=70, backoff=Backoff(first=0), clock=world.clock))


@scenario
def retry_of_a_block_without_waits(world: World) -> Stage:
    work = world.work(*[OSError()] * 66, needs=None)
    retry = Retry(on=OSError, attempts=70, backoff=Backoff(first=0), clock=world.clock)

    async def block() -> None:
        async for attempt in retry.context("prices"):
            with attempt:
                await work()

    return Stage(call=block, work=work, policies=(retry,))


@scenario
def retry_whose_strategy_fails(world: World) -> Stage:
    """The answer that nobody decides on is disposed of."""

    async def wait(state: tenacity.RetryCallState) -> float:
        await asyncio.sleep(0)
        raise ZeroDivisionError

    work, retry = world.work(), Retry(**strategies() | {"wait": wait}, clock=world.clock)
    return Stage(call=lambda: at_an_edge(work, retry), work=work, policies=(retry,))


def strategies() -> dict[str, Callable[..., object]]:
    """tenacity's strategies as coroutine functions that wait."""

    async def wanted(state: tenacity.RetryCallState) -> bool:
        await asyncio.sleep(0)
        assert state.outcome is not None
        return state.outcome.failed or getattr(state.outcome.result(), "attempt", 9) < 3

    async def wait(state: tenacity.RetryCallState) -> float:
        await asyncio.sleep(0)
        return 1.0

    async def stop(state: tenacity.RetryCallState) -> bool:
        await asyncio.sleep(0)
        return state.attempt_number >= 5

    return {"retry": wanted, "wait": wait, "stop": stop}


@scenario
def retry_by_async_strategies(world: World) -> Stage:
    work = world.work(OSError(), OSError(), "ok")
    budget = RetryBudget("b", ratio=0, at_least=5, clock=world.clock)
    return through(
        work, Retry(**strategies(), budget=budget, clock=world.clock), check=not_overdrawn(world, work, budget)
    )


@scenario
def retry_of_results_by_async_strategies(world: World) -> Stage:
    """Each answer that is turned down is disposed of, and so is the one that nobody gets."""
    work, retry = world.work(), Retry(**strategies(), clock=world.clock)
    return Stage(call=lambda: at_an_edge(work, retry), work=work, policies=(retry,))


@scenario
def retry_of_results(world: World) -> Stage:
    work = world.work()
    budget = RetryBudget("b", ratio=0, at_least=5, clock=world.clock)
    retry = Retry(on_result=lambda answer: answer.attempt < 3, backoff=WAIT, budget=budget, clock=world.clock)
    return Stage(
        call=lambda: at_an_edge(work, retry),
        work=work,
        policies=(retry,),
        check=not_overdrawn(world, work, budget),
    )


@scenario
def retry_that_disposes(world: World) -> Stage:
    """What `discard=` disposes of, where no edge does."""
    work = world.work()

    async def discard(answer: object) -> None:
        answer.disposed += 1
        await asyncio.sleep(0)

    retry = Retry(on_result=lambda answer: answer.attempt < 3, backoff=WAIT, discard=discard, clock=world.clock)
    pipeline = Pipeline("prices", retry)
    return Stage(call=lambda: pipeline.call(work.answer), work=work, policies=(retry,))


@scenario
def retry_alone_that_disposes(world: World) -> Stage:
    work = world.work()

    async def discard(answer: object) -> None:
        answer.disposed += 1
        await asyncio.sleep(0)

    async def fn() -> object:
        return await work.answer()

    retry = Retry(on_result=lambda answer: answer.attempt < 3, backoff=WAIT, discard=discard, clock=world.clock)
    return Stage(call=Pipeline("prices", retry)(fn), work=work, policies=(retry,))


def _cannot_judge(answer: object) -> bool:
    raise ZeroDivisionError


@scenario
def retry_that_cannot_judge(world: World) -> Stage:
    """Nobody gets the first answer either: it is disposed of."""
    work, retry = world.work(), Retry(on_result=_cannot_judge, clock=world.clock)
    return Stage(call=lambda: at_an_edge(work, retry), work=work, policies=(retry,))


@scenario
def retry_alone_that_cannot_judge(world: World) -> Stage:
    work = world.work()

    async def discard(answer: object) -> None:
        answer.disposed += 1
        await asyncio.sleep(0)

    async def fn() -> object:
        return await work.answer()

    retry = Retry(on_result=_cannot_judge, discard=discard, clock=world.clock)
    return Stage(call=Pipeline("prices", retry)(fn), work=work, policies=(retry,))


@scenario
def retry_of_a_block(world: World) -> Stage:
    budget = RetryBudget("b", ratio=0, at_least=5, clock=world.clock)
    work, retry = (
        world.work(OSError(), OSError(), "ok"),
        Retry(on=OSError, backoff=WAIT, budget=budget, clock=world.clock),
    )

    async def block() -> object:
        async for attempt in retry.context("prices"):
            with attempt:
                result = await work()
        return result

    return Stage(call=block, work=work, policies=(retry,), check=not_overdrawn(world, work, budget))


@scenario
def retry_of_a_block_by_async_strategies(world: World) -> Stage:
    budget = RetryBudget("b", ratio=0, at_least=5, clock=world.clock)
    work, retry = world.work(OSError(), OSError(), "ok"), Retry(**strategies(), budget=budget, clock=world.clock)

    async def block() -> object:
        async for attempt in retry.context("prices"):
            with attempt:
                result = await work()
                attempt.set_result(result)
        return result

    return Stage(call=block, work=work, policies=(retry,), check=not_overdrawn(world, work, budget))


@scenario
def retry_waits_for_a_breaker(world: World) -> Stage:
    work, breaker = world.work("ok"), CircuitBreaker("b", clock=world.clock)
    opened(world, breaker, ready=False)
    rejected = breaker.counts["rejected"]

    def check() -> None:
        assert breaker.counts["rejected"] - rejected <= 2
        assert 0 == breaker.counts["failure"]
        assert work.returned <= breaker.counts["success"] <= work.returned + 1

    return through(work, Retry(patient=True, clock=world.clock), breaker, check=check)


@scenario
def retries_at_an_edge(world: World) -> Stage:
    """The breaker further inside is told of each attempt's end, and of the cancelled one's that it was cancelled."""
    work, breaker = world.work(OSError(), OSError(), "ok"), CircuitBreaker("b", clock=world.clock)
    retry = Retry(on=OSError, backoff=WAIT, clock=world.clock)
    return Stage(
        call=lambda: at_an_edge(work, retry, breaker),
        work=work,
        policies=(retry, breaker),
        check=judged(world, work, breaker),
        again=lambda: Pipeline("p", breaker).call(fine),
    )


# -- fallback ---------------------------------------------------------------------------------------------------------


async def asked_elsewhere(outcome: object) -> str:
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return "instead"


@scenario
def fallback_that_waits(world: World) -> Stage:
    """failsafe-go's "should not fallback when canceled"."""
    return through(world.work(OSError()), Fallback(answer=asked_elsewhere))


@scenario
def fallback_that_fails(world: World) -> Stage:
    async def answer(outcome: object) -> str:
        await asyncio.sleep(0)
        raise LookupError("nothing kept")

    return through(world.work(OSError()), Fallback(answer=answer))


@scenario
def fallback_for_a_bad_answer(world: World) -> Stage:
    work, fallback = world.work(), Fallback(answer=asked_elsewhere)
    return Stage(
        call=lambda: at_an_edge(work, fallback, judge=lambda outcome: Judgement(breaker="failure")),
        work=work,
        policies=(fallback,),
    )


@scenario
def last_good_answer(world: World) -> Stage:
    """Nothing that was not answered is kept."""
    kept = LastGood(key=None, clock=world.clock)
    work = world.work("ok")

    def check() -> None:
        assert len(kept) <= work.returned

    fallback = Fallback(last_good=kept)
    pipeline = Pipeline("prices", fallback)
    return Stage(call=lambda: pipeline.call(work), work=work, policies=(fallback,), check=check)


# -- bulkhead ---------------------------------------------------------------------------------------------------------


class Holder:
    """Somebody else who is in a bulkhead, until he is told to go."""

    def __init__(self, world: World, bulkhead: Bulkhead) -> None:
        self.inside = 0
        self._go = asyncio.Event()
        world.actor(Pipeline("other", bulkhead).call(self._stay))

    async def _stay(self) -> None:
        self.inside += 1
        try:
            await self._go.wait()
        finally:
            self.inside -= 1

    def go(self) -> None:
        self._go.set()


def taken(work: Work, bulkhead: Bulkhead, *holders: Holder) -> Callable[[], None]:
    """A bulkhead's places are those of the calls that run, and nobody waits who has gone."""

    def check() -> None:
        inside = sum(holder.inside for holder in holders)
        assert inside == bulkhead.in_use, "places"
        assert 0 == bulkhead.waiting or inside == bulkhead.limit, "queue"

    return check


@scenario
def bulkhead_with_a_place(world: World) -> Stage:
    work, bulkhead = world.work("ok"), Bulkhead("b", limit=1)
    return through(work, bulkhead, check=taken(work, bulkhead))


@scenario
def bulkhead_at_an_edge(world: World) -> Stage:
    work, bulkhead = world.work("ok"), Bulkhead("b", limit=1)
    return Stage(
        call=lambda: at_an_edge(work, bulkhead),
        work=work,
        policies=(bulkhead,),
        check=taken(work, bulkhead),
        again=lambda: Pipeline("p", bulkhead).call(fine),
    )


@scenario
def bulkhead_in_its_queue(world: World) -> Stage:
    """Up to the turn in which the place is handed over, and beyond."""
    work, bulkhead = world.work("ok"), Bulkhead("b", limit=1, queue=1, clock=world.clock)
    holder = Holder(world, bulkhead)
    world.after(1.0, holder.go)
    return through(work, bulkhead, check=taken(work, bulkhead, holder), free=holder.go)


@scenario
def bulkhead_whose_wait_is_over(world: World) -> Stage:
    work, bulkhead = world.work("ok"), Bulkhead("b", limit=1, queue=1, wait=1.0, clock=world.clock)
    holder = Holder(world, bulkhead)
    return through(work, bulkhead, check=taken(work, bulkhead, holder), free=holder.go)


@scenario
def bulkhead_handed_over_at_the_end_of_the_wait(world: World) -> Stage:
    work, bulkhead = world.work("ok"), Bulkhead("b", limit=1, queue=1, wait=1.0, clock=world.clock)
    holder = Holder(world, bulkhead)
    world.after(1.0, holder.go)
    return through(work, bulkhead, check=taken(work, bulkhead, holder), free=holder.go)


@scenario
def bulkhead_with_others_behind(world: World) -> Stage:
    """Whoever is next in the queue gets the place that a cancelled call does not take."""
    work, bulkhead = world.work("ok"), Bulkhead("b", limit=1, queue=2, clock=world.clock)
    first = Holder(world, bulkhead)
    second: list[Holder] = []

    async def call() -> object:
        # Behind us, as soon as we wait.
        asyncio.get_running_loop().call_soon(lambda: second.append(Behind(world, bulkhead)))
        return await Pipeline("prices", bulkhead).call(work)

    def free() -> None:
        for holder in (first, *second):
            holder.go()

    world.after(1.0, first.go)
    return Stage(
        call=call,
        work=work,
        policies=(bulkhead,),
        check=lambda: taken(work, bulkhead, first, *second)(),
        again=lambda: Pipeline("p", bulkhead).call(fine),
        free=free,
    )


@scenario
def bulkhead_behind_others(world: World) -> Stage:
    work, bulkhead = world.work("ok"), Bulkhead("b", limit=1, queue=2, clock=world.clock)
    first, second = Holder(world, bulkhead), Holder(world, bulkhead)
    world.after(1.0, first.go)
    world.after(2.0, second.go)

    def free() -> None:
        first.go()
        second.go()

    return through(work, bulkhead, check=taken(work, bulkhead, first, second), free=free)


class Behind(Holder):
    """One who comes while a loop runs."""

    def __init__(self, world: World, bulkhead: Bulkhead) -> None:
        self.inside = 0
        self._go = asyncio.Event()
        world.join(Pipeline("other", bulkhead).call(self._stay))


# -- rate limiter -----------------------------------------------------------------------------------------------------


def spent(world: World, work: Work, limiter: RateLimiter) -> Callable[[], None]:
    """A permit is gone for each call that was made, and for no other."""
    full, again = limiter._full, 0

    def check() -> None:
        nonlocal again
        calls = work.began + again
        assert pytest.approx(full + calls * limiter._interval) == limiter._full, "permits"
        assert 0 == limiter.waiting, "queue"
        again = 1

    return check


@scenario
def limiter_with_a_permit(world: World) -> Stage:
    work, limiter = world.work("ok"), RateLimiter("l", permits=2, per=1.0, wait=None, clock=world.clock)
    world.run(Pipeline("p", limiter).call(fine))
    return through(work, limiter, check=spent(world, work, limiter))


@scenario
def limiter_without_permits(world: World) -> Stage:
    """While it waits, and in the turn in which it gets its permit."""
    work, limiter = world.work("ok"), RateLimiter("l", permits=1, per=1.0, wait=None, clock=world.clock)
    for _ in range(3):
        world.actor(Pipeline("p", limiter).call(fine))
    world.advance(2.0)
    return through(work, limiter, check=spent(world, work, limiter))


# -- hedge ------------------------------------------------------------------------------------------------------------


def hedged(world: World, *script: object, fails: bool = False, **options: object) -> Stage:
    """A stage on which a Hedge is at an edge: what it has got and does not give is disposed of."""
    work, budget = world.work(*script), RetryBudget("b", ratio=0, at_least=5, clock=world.clock)
    hedge = Hedge(1.0, budget=budget, clock=world.clock, **options)
    bulkhead = Bulkhead("b", limit=9)

    def check() -> None:
        assert 0 == bulkhead.in_use
        assert 5 - world.heard(HedgeStarted) == budget.balance

    judge = (lambda outcome: Judgement(breaker="failure")) if fails else None
    return Stage(
        call=lambda: at_an_edge(work, hedge, bulkhead, judge=judge),
        work=work,
        policies=(hedge, bulkhead),
        check=check,
    )


@scenario
def hedge_that_is_not_needed(world: World) -> Stage:
    return hedged(world, "ok")


@scenario
def hedge_that_wins(world: World) -> Stage:
    """Polly's `HedgingResilienceStrategyTests`: two attempts under way, and the loser seen to end."""
    return hedged(world, HANG, "ok")


@scenario
def hedge_stopped_for_its_time(world: World) -> Stage:
    """Two attempts under way, which are being ended when the call is cancelled, or dropped, as well."""
    work, bulkhead = world.work(HANG, HANG), Bulkhead("b", limit=2)
    around = (Timeout(2.0, clock=world.clock), Hedge(1.0, clock=world.clock), bulkhead)
    return Stage(call=lambda: at_an_edge(work, *around), work=work, policies=around, check=taken(work, bulkhead))


@scenario
def hedge_of_three_that_win_at_once(world: World) -> Stage:
    work = world.work("ok", "ok", "ok")
    hedge = Hedge(0, attempts=3, clock=world.clock)
    return Stage(call=lambda: at_an_edge(work, hedge), work=work, policies=(hedge,))


@scenario
def hedge_of_which_all_fail(world: World) -> Stage:
    return hedged(world, OSError("first"), OSError("second"), attempts=3)


@scenario
def hedge_of_bad_answers(world: World) -> Stage:
    """All answers are failures for the edge: the first one's is given, the others are disposed of."""
    stage = hedged(world, "ok", "ok", fails=True)
    stage.work._needs = 1.5
    return stage


@scenario
def hedge_whose_loser_takes_its_time(world: World) -> Stage:
    """What has lost does not end at once, and comes to an answer that nobody wants."""
    work, hedge = world.work(HANG, "ok"), Hedge(1.0, clock=world.clock)

    async def dispose(answer: object) -> None:
        if isinstance(answer, Answer):
            answer.disposed += 1

    async def step(call: object) -> object:
        try:
            return await work.answer()
        except asyncio.CancelledError:
            for _ in range(3):
                await asyncio.sleep(0)
            late = Answer(9)
            work.answers.append(late)
            return late

    async def call() -> object:
        lead = Call("edge", discard=dispose)
        try:
            result = await hedge.run(lead, step)
        except BaseException as error:
            lead.end(Outcome(error=error))
            raise
        lead.end(Outcome(result))
        return result

    return Stage(call=call, work=work, policies=(hedge,))


@scenario
def hedge_that_disposes(world: World) -> Stage:
    """What `discard=` disposes of, where no edge does."""
    work = world.work("ok", "ok", "ok")

    async def discard(answer: object) -> None:
        answer.disposed += 1
        await asyncio.sleep(0)

    hedge = Hedge(0, attempts=3, discard=discard, clock=world.clock)
    pipeline = Pipeline("prices", hedge)
    return Stage(call=lambda: pipeline.call(work.answer), work=work, policies=(hedge,))


@scenario
def hedge_without_an_end(world: World) -> Stage:
    return through(world.work("ok"), Hedge(float("inf"), clock=world.clock))


# -- pipelines --------------------------------------------------------------------------------------------------------


@scenario
def pipeline_without_policies(world: World) -> Stage:
    work = world.work("ok")
    pipeline = Pipeline("prices", Pipeline("inner"))
    return Stage(call=lambda: pipeline.call(work), work=work, policies=(pipeline,))


def full(world: World, *script: object, in_half_open: bool = False) -> tuple[tuple[Policy, ...], Callable[..., None]]:
    """All policies in their usual order, and what must be of them afterwards."""
    clock = world.clock
    budget = RetryBudget("b", ratio=0, at_least=9, clock=clock)
    breaker = CircuitBreaker("b", clock=clock)
    limiter = RateLimiter("l", permits=1, per=0.5, wait=None, clock=clock)
    bulkhead = Bulkhead("b", limit=1, queue=1, clock=clock)
    holder = Holder(world, bulkhead)
    world.after(1.0, holder.go)
    if in_half_open:
        opened(world, breaker, ready=True)
        world.after(1.0, holder.go)
    world.run(Pipeline("p", limiter).call(fine))
    around = (
        Timeout(total=9.0, clock=clock),
        Fallback(answer=asked_elsewhere),
        Retry(on=(OSError, AttemptTimeoutError), backoff=WAIT, budget=budget, clock=clock),
        Hedge(1.5, budget=budget, clock=clock),
        breaker,
        limiter,
        bulkhead,
        Timeout(2.0, clock=clock),
    )

    def check(work: Work) -> None:
        taken(work, bulkhead, holder)()
        assert 0 == limiter.waiting
        assert 9 - world.heard(HedgeStarted) - world.heard(RetryScheduled) <= budget.balance
        assert budget.balance <= 9 - world.heard(HedgeStarted)
        assert breaker.counts["failure"] <= work.failed + timeouts(world)
        assert 0 == breaker._probing

    return around, check


@scenario
def full_pipeline(world: World) -> Stage:
    work = world.work(OSError(), HANG, "ok")
    around, check = full(world)
    return through(work, *around, check=lambda: check(work))


@scenario
def full_pipeline_whose_breaker_probes(world: World) -> Stage:
    work = world.work("ok")
    around, check = full(world, in_half_open=True)
    return through(work, *around, check=lambda: check(work))


@scenario
def full_pipeline_at_an_edge(world: World) -> Stage:
    work = world.work(OSError(), HANG, OSError(), "ok")
    around, check = full(world)
    return Stage(
        call=lambda: at_an_edge(work, *around),
        work=work,
        policies=around,
        check=lambda: check(work),
        again=lambda: Pipeline("p", *around).call(fine),
    )


@scenario
def standard_pipeline(world: World) -> Stage:
    work = world.work(OSError(), HANG, "ok")
    pipeline = standard("prices", clock=world.clock)
    return Stage(call=lambda: pipeline.call(work), work=work, policies=(pipeline,), again=lambda: pipeline.call(fine))


@scenario
def pipeline_as_a_decorator(world: World) -> Stage:
    work = world.work("ok")
    pipeline = Pipeline("prices", Timeout(2.0, clock=world.clock), Fallback(answer=1))
    return Stage(call=pipeline(work), work=work, policies=(pipeline,))


# -- streams ----------------------------------------------------------------------------------------------------------


def streamed(work: Work, *around: Policy, **more: object) -> Stage:
    """A stage on which a stream of three items is read, each of them a run of `work`."""

    async def prices() -> AsyncIterator[object]:
        for _ in range(3):
            yield await work()

    guarded = Pipeline("prices", *around)(prices)
    once_more = {"again": lambda: drained(Pipeline("p", *around)(one_item)())}
    # Up to Python 3.12, a generator does not hear of it where a read of it is closed: it ends when it is collected.
    return Stage(call=lambda: drained(guarded()), work=work, policies=around, drops=False, **{**once_more, **more})


async def one_item() -> AsyncIterator[int]:
    await asyncio.sleep(0)
    yield 1


@scenario
def stream(world: World) -> Stage:
    work, bulkhead = world.work(), Bulkhead("b", limit=1)
    return streamed(work, bulkhead, check=taken(work, bulkhead))


@scenario
def stream_in_its_time(world: World) -> Stage:
    return streamed(
        world.work("ok", HANG), Timeout(total=3.0, clock=world.clock), Timeout(total=3.0, clock=world.clock)
    )


async def elsewhere(outcome: Outcome) -> AsyncIterator[int]:
    await asyncio.sleep(0)
    return one_item()


@scenario
def stream_that_a_fallback_answers(world: World) -> Stage:
    return streamed(world.work(OSError()), Fallback(answer=elsewhere))


@scenario
def stream_as_a_probe(world: World) -> Stage:
    """Up to its last item, a probe that is cancelled gives its place back."""
    work, breaker = world.work(), CircuitBreaker("b", clock=world.clock)
    opened(world, breaker, ready=True)

    def check() -> None:
        assert (0, 0) == (breaker._probing, breaker.counts["failure"])
        assert breaker.counts["success"] <= (3 == work.returned) + 1

    return streamed(work, breaker, check=check)


@scenario
def stream_through_everything(world: World) -> Stage:
    work = world.work(OSError(), HANG, "ok", "ok")
    around, check = full(world)
    return streamed(work, *around, check=lambda: check(work))


@scenario
def stream_that_values_go_into(world: World) -> Stage:
    work, bulkhead = world.work(), Bulkhead("b", limit=1)

    async def echo() -> AsyncIterator[object]:
        for _ in range(3):
            try:
                await work()
                yield 1
            except KeyError:
                yield await work()

    async def call() -> object:
        items = Pipeline("prices", bulkhead)(echo)()
        await anext(items)
        await items.asend("more")
        await items.athrow(KeyError())
        return await drained(items)

    return Stage(call=call, work=work, policies=(bulkhead,), check=taken(work, bulkhead), drops=False)


@scenario
def stream_whose_reader_stalls(world: World) -> Stage:
    """The time is over while nobody reads; the read that is told of it closes the generator, which takes a while."""
    work, bulkhead = world.work(), Bulkhead("b", limit=1)
    around = (bulkhead, Timeout(1.0, clock=world.clock))

    async def prices() -> AsyncIterator[object]:
        try:
            while True:
                yield await work()
        finally:
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def call() -> object:
        async with contextlib.aclosing(Pipeline("prices", *around)(prices)()) as items:
            await anext(items)
            await world.clock.sleep(2.0)
            return await anext(items)

    return Stage(call=call, work=work, policies=around, check=taken(work, bulkhead), drops=False)


@scenario
def stream_that_is_closed(world: World) -> Stage:
    """Cancelled while it is closed, it is closed all the same."""
    work, bulkhead = world.work(), Bulkhead("b", limit=1)
    closed: list[str] = []

    async def prices() -> AsyncIterator[object]:
        try:
            yield await work()
            yield 2
        finally:
            closed.append("begun")
            await asyncio.sleep(0)

    guarded = Pipeline("prices", bulkhead)(prices)

    async def call() -> object:
        async with contextlib.aclosing(guarded()) as items:
            async for item in items:
                return item
        return None

    def check() -> None:
        taken(work, bulkhead)()
        assert len(closed) == (1 if work.began else 0)

    return Stage(call=call, work=work, policies=(bulkhead,), check=check, drops=False)


# -- the sweep --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "twice", "again", "close"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_cancelled_at_any_point_a_call_leaves_nothing_behind(name, how):
    """At each point, CancelledError comes out, nothing leaks, nothing is counted, and the next call works; also where
    the call is cancelled twice, or is dropped in the middle and closed by the collector."""
    found = swept(name, how)
    assert [] == found.faults
    assert [] == found.complaints


# Where nothing is ever waited for: to be cancelled there is not possible.
NEVER_WAITS: dict[tuple[str, str], str] = {}


def missed(covered: Sweep, module: str) -> list[str]:
    return sorted(
        str(point) for point in points_of(module) - covered.points if (point.function, point.text) not in NEVER_WAITS
    )


def everything() -> Sweep:
    """All sweeps together."""
    together = Sweep()
    for name in SCENARIOS:
        for how in ("cancel", "again"):
            found = swept(name, how)
            together.points |= found.points
            together.policies |= found.policies
    return together


@pytest.mark.parametrize("name", policies())
def test_each_policy_is_cancelled_wherever_it_waits(name):
    """A policy that meshkit offers has a scenario, and each `await` in its file is one at which a call was cancelled."""
    kind, covered = policies()[name], everything()
    assert kind in covered.policies, f"no scenario has a {name}"
    assert [] == missed(covered, module_of(kind))


@pytest.mark.parametrize("module", ["core/call.py", "core/pipeline.py", "core/stream.py"])
def test_what_policies_stand_on_is_cancelled_wherever_it_waits(module):
    """So is each `await` of calls, pipelines and streams."""
    assert points_of(module)
    assert [] == missed(everything(), module)


def test_no_task_and_no_coroutine_is_dropped_unfinished():
    """When all that the sweeps have made is collected, no loop hears of an error that nobody retrieved."""
    found = [swept(name) for name in SCENARIOS]
    gc.collect()
    assert [] == [complaint for each in found for complaint in each.complaints]


# -- a sweep finds what it is for -------------------------------------------------------------------------------------


class Leaky:
    """A policy with one fault."""

    def __init__(self, world: World, fault: str) -> None:
        self._world = world
        self._fault = fault
        self.held = 0

    def describe(self) -> dict[str, object]:
        return {"kind": "leaky"}

    async def run(self, call: Call, call_next: Callable[[Call], Awaitable[object]]) -> object:
        clock, loop = self._world.clock, self._world.loop
        if self._fault == "timer":
            clock.call_at(clock.now() + 60, lambda: None)
        elif self._fault == "place":
            self.held += 1
            result = await call_next(call)
            self.held -= 1
            return result
        elif self._fault == "task":
            return await asyncio.shield(loop.create_task(call_next(call)))
        elif self._fault == "swallows":
            with contextlib.suppress(asyncio.CancelledError):
                return await call_next(call)
        elif self._fault == "context":
            ATTEMPT.set(7)
        elif self._fault == "answer":
            result = await call_next(call)
            await asyncio.sleep(0)
            return result
        elif self._fault == "never again" and self.held:
            raise LookupError
        self.held += 1
        return await call_next(call)


@pytest.mark.parametrize("fault", ["timer", "place", "task", "swallows", "context", "answer", "never again"])
def test_a_policy_with_a_fault_is_found(fault):
    """Each thing that can be left behind, or lost, is one that a sweep sees."""

    def leaks(world: World) -> Stage:
        work, policy = world.work(), Leaky(world, fault)
        return Stage(
            call=lambda: at_an_edge(work, policy),
            work=work,
            policies=(policy,),
            check=lambda: _same(0, policy.held if fault == "place" else 0),
            again=lambda: Pipeline("p", policy).call(fine),
        )

    assert sweep(leaks).faults


def test_an_await_that_no_scenario_reaches_is_found():
    """Without sweeps, all places at which a policy waits are missing: they are read from its source."""
    assert len(missed(Sweep(), "policies/retry.py")) > 10


# -- by other hands than a caller's -----------------------------------------------------------------------------------

ALONE: dict[str, Callable[[World], Policy]] = {
    "Bulkhead": lambda world: Bulkhead("b", limit=1, queue=1, clock=world.clock),
    "CircuitBreaker": lambda world: CircuitBreaker("b", clock=world.clock),
    "CircuitBreakers": lambda world: CircuitBreakers("b", key=lambda: "tenant", clock=world.clock),
    "Fallback": lambda world: Fallback(answer=asked_elsewhere, last_good=LastGood(key=None, clock=world.clock)),
    "Hedge": lambda world: Hedge(0.5, clock=world.clock),
    "Pipeline": lambda world: standard("prices", clock=world.clock, hedge=Hedge(0.3, clock=world.clock)),
    "RateLimiter": lambda world: RateLimiter("l", permits=9, wait=None, clock=world.clock),
    "Retry": lambda world: Retry(on=OSError, clock=world.clock),
    "Timeout": lambda world: Timeout(5.0, clock=world.clock),
}


def idle(policy: Policy) -> None:
    """Nobody is in it, and nobody waits."""
    if isinstance(policy, Pipeline):
        for each in policy.policies:
            idle(each)
    elif isinstance(policy, Bulkhead):
        assert (0, 0) == (policy.in_use, policy.waiting)
    elif isinstance(policy, RateLimiter):
        assert 0 == policy.waiting
    elif isinstance(policy, CircuitBreaker):
        assert 0 == policy._probing


@pytest.fixture
def world():
    made = World()
    yield made
    made.end_actors()
    assert [] == made.left()
    gc.collect()
    assert [] == made.loop.complaints
    made.close()


@pytest.mark.parametrize("name", policies())
def test_an_exit_of_the_program_comes_out_untouched(world, name):
    """KeyboardInterrupt out of the function is that very object when it comes out; it counts as nothing, and nothing is
    held."""
    policy, leaving = ALONE[name](world), KeyboardInterrupt()
    work = world.work(leaving)
    main, seen = world.loop.create_task(Pipeline("prices", policy).call(work)), []
    for _ in range(100):
        try:
            if not (world.loop.step() or world.loop.pass_time()):
                break
        except KeyboardInterrupt as error:
            seen.append(error)
    assert main.exception() is leaving
    assert {id(leaving)} == {id(error) for error in seen}
    assert 1 == work.began
    idle(policy)
    if isinstance(policy, CircuitBreaker):
        assert {"ignored": 1} == {kind: number for kind, number in policy.counts.items() if number}
    assert "ok" == world.run(Pipeline("prices", policy).call(fine))


@pytest.mark.parametrize("name", [name for name, kind in policies().items() if hasattr(kind, "run_sync")])
def test_an_exit_of_the_program_comes_out_of_a_plain_function_untouched(world, name):
    """So it does from a plain function, with those policies that can guard one."""
    policy, leaving = ALONE[name](world), KeyboardInterrupt()
    if name == "Pipeline":
        policy = Pipeline("inner", ALONE["CircuitBreaker"](world), ALONE["Bulkhead"](world))

    def leave() -> None:
        raise leaving

    with pytest.raises(KeyboardInterrupt) as caught:
        Pipeline("prices", policy).call_sync(leave)
    assert caught.value is leaving
    idle(policy)
    assert "ok" == Pipeline("prices", policy).call_sync(lambda: "ok")


@pytest.mark.parametrize("around", ["asyncio.timeout", "asyncio.wait_for", "asyncio.TaskGroup"])
@pytest.mark.parametrize("name", policies())
def test_structured_concurrency_of_asyncio_works_around_it(world, name, around):
    """asyncio's own timeout raises its own TimeoutError, and a group whose other task fails cancels the call: each
    leaves the task without a cancellation."""
    policy, work = ALONE[name](world), world.work(HANG, HANG, HANG)
    pipeline = Pipeline("prices", policy)

    async def fail() -> None:
        await world.clock.sleep(1.0)
        raise LookupError

    async def caller() -> tuple[object, int]:
        came: object = None
        try:
            if around == "asyncio.timeout":
                async with asyncio.timeout(1.0):
                    await pipeline.call(work)
            elif around == "asyncio.wait_for":
                await asyncio.wait_for(pipeline.call(work), 1.0)
            else:
                async with asyncio.TaskGroup() as group:
                    calls.append(group.create_task(pipeline.call(work)))
                    group.create_task(fail())
        except TimeoutError as error:
            came = type(error)
        except ExceptionGroup as errors:
            came = [type(error) for error in errors.exceptions]
        task = asyncio.current_task()
        assert task is not None
        # A group's own cancellation of the task that it is in stays with it up to Python 3.12.
        return came, 0 if calls else task.cancelling()

    calls: list[asyncio.Task[object]] = []
    expected = [LookupError] if around == "asyncio.TaskGroup" else TimeoutError
    assert (expected, 0) == world.run(caller())
    assert all(call.cancelled() for call in calls)
    assert work.began == work.cancelled
    idle(policy)


@pytest.mark.parametrize("name", policies())
def test_a_function_that_keeps_its_cancellation_keeps_the_call(world, name):
    """Where the function deals with it and answers, its answer is the call's, and nothing is left behind."""
    policy = ALONE[name](world)

    async def stubborn() -> str:
        try:
            await world.loop.create_future()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return "kept"

    main = world.loop.create_task(Pipeline("prices", policy).call(stubborn))
    world.loop.settle()
    main.cancel()
    world.loop.settle()
    # Not so in a task of its own, whose cancellation is Hedge's doing: who was cancelled is the caller.
    hedged = name in ("Hedge", "Pipeline")
    assert hedged == main.cancelled()
    if not hedged:
        assert "kept" == main.result()
    idle(policy)


# -- pipelines of chance ----------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.sampled_from(sorted(set(ALONE) - {"Pipeline"})), min_size=1, max_size=6),
    script=st.lists(st.sampled_from(["ok", "no", "hang"]), max_size=4),
    form=st.sampled_from(["call", "edge", "stream"]),
    how=st.sampled_from(["cancel", "twice", "again", "close"]),
    step=st.integers(0, 200),
)
def test_any_pipeline_cancelled_anywhere_leaves_nothing_behind(kinds, script, form, how, step):
    """Policies in any order and number, whatever the function comes to, and wherever it is cancelled."""

    def make(world: World) -> Stage:
        ends = [{"ok": "ok", "no": OSError(), "hang": HANG}[end] for end in script]
        work = world.work(*ends)
        around = tuple(
            # What is read item by item cannot be kept, and another one stands in for it.
            Fallback(answer=elsewhere if form == "stream" else asked_elsewhere)
            if kind == "Fallback" and form != "call"
            else ALONE[kind](world)
            for kind in kinds
            # An edge has no arguments to take a key from.
            if not (kind == "CircuitBreakers" and form == "edge")
        )

        def check() -> None:
            for policy in around:
                idle(policy)

        if form == "stream":
            return streamed(work, *around, check=check, again=None)
        pipeline = Pipeline("prices", *around)
        call = (lambda: at_an_edge(work, pipeline)) if form == "edge" else (lambda: pipeline.call(work))
        return Stage(call=call, work=work, policies=around, check=check)

    found = sweep(make, how=how, only=step)
    assert [] == found.faults
    assert [] == found.complaints
