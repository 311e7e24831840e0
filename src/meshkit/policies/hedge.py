"""Not to wait for one slow answer: ask a second time beside it, and take what comes first."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic, TypeVar, cast

from meshkit.core.call import Call, Next, Outcome
from meshkit.core.clock import SYSTEM_CLOCK, Clock, check_clock
from meshkit.core.events import HedgeEnded, HedgeStarted, RetryBudgetExhausted, emit
from meshkit.core.trace import TRACING, tracer
from meshkit.errors import ConfigurationError
from meshkit.policies.retry_budget import RetryBudget

T = TypeVar("T")

_log = logging.getLogger("meshkit")

# Seconds that an answer waits for the attempts that lost, to see them end.
_GRACE = 0.1

# What lost and does not end: the loop itself holds its tasks weakly.
_stubborn: set[asyncio.Task[Any]] = set()


@dataclass(frozen=True, slots=True)
class Hedge:
    """Start a further attempt where one has not answered after `delay` seconds, and take the first good answer.

    It cuts the slowest few of many calls. **The same call is made more than once at the same time, so it must be one that
    may be: saying so is up to you, nothing here can tell.** A `delay` near the time that 95 % of the calls take makes one
    further call in twenty (Dean and Barroso, "The Tail at Scale", 2013).

    Attempts that lose are cancelled and seen to end, and what they have already got is disposed of: by the edge that made
    the call, or by `discard`. Around a function whose result has to be closed, give that. A failure, or what
    the edge that made the call takes for one, does not win while another attempt is under way; where all fail, the caller
    gets what the first attempt came to. A failure does not start the next attempt: that is Retry's, which stands around
    this. Each attempt runs in a task of its own with a copy of the caller's context variables.

    Args:
        delay: seconds without an answer after which the next attempt is started beside those under way. 0 starts all
            attempts at once, infinity none but the first.
        attempts: how many may be under way at once, the first one counted.
        budget: what further attempts are taken out of, shared with the Retry towards the same destination, which counts
            the calls. (Without one, `Retry(attempts=1, budget=…)` around this does.) Where it is empty, the call goes on
            with the attempts that there are.
        discard: disposes of what an attempt that lost has got: a plain or an async function of it. What an edge leads,
            the edge disposes of.
        clock: where the time comes from.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    delay: float
    _: KW_ONLY
    attempts: int = 2
    budget: RetryBudget | None = None
    discard: Callable[[Any], Any] | None = None
    clock: Clock = SYSTEM_CLOCK

    def __post_init__(self) -> None:
        delay, attempts = cast("object", self.delay), cast("object", self.attempts)
        if isinstance(delay, bool) or not isinstance(delay, int | float) or not delay >= 0:
            raise ConfigurationError(
                f"delay is how many seconds to wait for an answer before asking again, so 0 or above, not {delay!r}."
            )
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 2:
            raise ConfigurationError(
                f"attempts is how many may be under way at once, the first one counted, so 2 or above, not {attempts!r}.",
                "Leave the Hedge out where there is to be one.",
            )
        if not isinstance(cast("object", self.budget), RetryBudget | None):
            raise ConfigurationError(f"budget is a RetryBudget, not {self.budget!r}.")
        if self.discard is not None and not callable(cast("object", self.discard)):
            raise ConfigurationError(f"discard is a function of the result, not {self.discard!r}.")
        check_clock(self.clock)

    def describe(self) -> dict[str, object]:
        return {"kind": "hedge", "delay": self.delay, "attempts": self.attempts}

    async def run(self, call: Call, call_next: Next[T]) -> T:
        if self.delay == math.inf:
            return await call_next(call)
        return await _Race(self, call, call_next).run()


class _Attempt(Generic[T]):
    """One attempt of a race, with a Call of its own: it ends by itself, before the others or after them."""

    __slots__ = ("call", "dropped", "outcome", "task")

    def __init__(self, call: Call, task: asyncio.Task[T]) -> None:
        self.call = call
        self.task = task
        self.outcome: Outcome | None = None
        self.dropped = False


class _Race(Generic[T]):
    """The attempts at one call."""

    __slots__ = ("_attempts", "_call", "_call_next", "_finished", "_hedge", "_turn")

    def __init__(self, hedge: Hedge, call: Call, call_next: Next[T]) -> None:
        self._hedge = hedge
        self._call = call
        self._call_next = call_next
        self._attempts: list[_Attempt[T]] = []
        # In the order in which they ended; taken out when they are looked at.
        self._finished: deque[_Attempt[T]] = deque()
        self._turn: asyncio.Future[None] | None = None

    async def run(self) -> T:
        try:
            winner = await self._first()
            await self._drop_others(winner)
            chosen = winner if winner is not None else self._attempts[0]
            # What the attempt holds is held up to the end of the call.
            self._call.on_end(chosen.call.end)
            if HedgeEnded.heard and len(self._attempts) > 1:
                number = None if winner is None else winner.call.attempt
                emit(HedgeEnded(source=self._call.name, attempts=len(self._attempts), winner=number))
            outcome = cast("Outcome", chosen.outcome)
        except GeneratorExit:
            self._leave_all()
            raise
        except BaseException:
            # The caller was cancelled, or one attempt came to something that is no answer at all.
            try:
                await self._cancel_all()
            except GeneratorExit:
                self._leave_all()
                raise
            raise
        finally:
            self._attempts = []
        if outcome.error is None:
            return cast("T", outcome.result)
        try:
            raise outcome.error
        finally:
            del outcome, chosen, winner

    async def _first(self) -> _Attempt[T] | None:
        """The first attempt with a good answer; `None` where all that were made have failed.

        Raises:
            BaseException: an attempt has ended with what is neither answer nor failure (a cancellation of its own, say).
        """
        hedge, clock = self._hedge, self._hedge.clock
        due = clock.now() + hedge.delay
        more = hedge.attempts - 1
        first = self._call.again()
        first.attempt = self._call.attempt
        self._start(first)
        while True:
            while self._finished:
                attempt = self._finished.popleft()
                outcome = attempt.outcome = _outcome_of(attempt.task)
                if outcome.error is not None and not isinstance(outcome.error, Exception):
                    try:
                        raise outcome.error
                    finally:
                        # An error holds its traceback, and that this frame, which holds the error.
                        del attempt, outcome
                if not self._failed(outcome):
                    return attempt
                if outcome.error is not None:
                    # It is over: another attempt may be waiting for the place that it had.
                    attempt.call.end(outcome)
            if all(attempt.outcome is not None for attempt in self._attempts):
                return None
            if more and clock.now() >= due:
                more = more - 1 if self._start_beside() else 0
                due += hedge.delay
            else:
                await self._wait(due if more else math.inf)

    def _failed(self, outcome: Outcome) -> bool:
        if outcome.error is not None:
            return True
        if self._call.judge is None:
            return False
        judgement = self._call.judge(outcome)
        return judgement.retry or judgement.breaker == "failure"

    # -- attempts -----------------------------------------------------------------------------------------------------

    def _start(self, call: Call) -> None:
        async def attempt() -> T:
            return await self._call_next(call)

        task = asyncio.create_task(attempt(), name=f"meshkit {call.name} attempt {call.attempt}")
        started = _Attempt(call, task)
        self._attempts.append(started)
        task.add_done_callback(lambda _: self._ended(started))

    def _start_beside(self) -> bool:
        """Start a further attempt, if the budget has one."""
        hedge = self._hedge
        if hedge.budget is not None and not hedge.budget.withdraw():
            if RetryBudgetExhausted.heard:
                emit(RetryBudgetExhausted(source=hedge.budget.name or self._call.name, kind="hedge"))
            return False
        call = self._attempts[-1].call.again()
        self._start(call)
        if HedgeStarted.heard:
            emit(HedgeStarted(source=call.name, attempt=call.attempt, delay=hedge.delay))
        if TRACING.on:
            span = tracer().current()
            if span.recording:
                span.event("meshkit.hedge", {"meshkit.attempt": call.attempt, "meshkit.hedge.delay": hedge.delay})
        return True

    def _ended(self, attempt: _Attempt[T]) -> None:
        self._finished.append(attempt)
        self._wake()

    def _wake(self) -> None:
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    async def _wait(self, until: float) -> None:
        """Until an attempt ends, or `until`."""
        self._turn = asyncio.get_running_loop().create_future()
        timer = self._hedge.clock.call_at(until, self._wake) if until < math.inf else None
        try:
            await self._turn
        finally:
            self._turn = None
            if timer is not None:
                timer.cancel()

    # -- the end ------------------------------------------------------------------------------------------------------

    async def _drop_others(self, winner: _Attempt[T] | None) -> None:
        """End what did not win: cancel it, give it a moment to end, and dispose of what it has got."""
        chosen = winner if winner is not None else self._attempts[0]
        others = [attempt for attempt in self._attempts if attempt is not chosen]
        running = [attempt.task for attempt in others if not attempt.task.done()]
        for task in running:
            task.cancel()
        if running:
            until = self._hedge.clock.now() + _GRACE
            while not all(task.done() for task in running) and self._hedge.clock.now() < until:
                await self._wait(until)
        for attempt in others:
            if attempt.task.done():
                await self._drop(attempt)
            else:
                # It does not heed its cancellation; the caller has an answer, and waits for nobody.
                self._leave(attempt)

    def _leave(self, attempt: _Attempt[T]) -> None:
        """Have an attempt end without us."""
        _stubborn.add(attempt.task)
        attempt.task.add_done_callback(_stubborn.discard)
        attempt.task.add_done_callback(lambda _: _keep(self._drop(attempt)))
        attempt.task.cancel()

    def _leave_all(self) -> None:
        """Where the caller was dropped in the middle, with its loop it may be: nothing can be waited for."""
        for attempt in self._attempts:
            with contextlib.suppress(RuntimeError):
                self._leave(attempt)

    async def _cancel_all(self) -> None:
        """End all attempts, as `await` does when it is cancelled: nothing is left running, however long that takes."""
        while running := [attempt.task for attempt in self._attempts if not attempt.task.done()]:
            for task in running:
                task.cancel()
            try:
                while not all(task.done() for task in running):
                    await self._wait(math.inf)
            except asyncio.CancelledError:
                # Once more: passed on once more.
                continue
        for attempt in self._attempts:
            # Cancelled once more, it goes on with the others: what is raised in the end is a cancellation anyway.
            with contextlib.suppress(asyncio.CancelledError):
                await self._drop(attempt)

    async def _drop(self, attempt: _Attempt[T]) -> None:
        """Dispose of what an attempt has come to, and end it."""
        if attempt.dropped:
            return
        attempt.dropped = True
        # What nobody has looked at was cancelled, or has come too late.
        late = attempt.outcome or _outcome_of(attempt.task)
        outcome = attempt.outcome or Outcome(error=asyncio.CancelledError())
        try:
            await self._dispose(attempt.call, late)
        finally:
            attempt.call.end(outcome)

    async def _dispose(self, call: Call, outcome: Outcome) -> None:
        """By the edge's own way; by the user's where no edge leads the call."""
        discard = self._hedge.discard
        if call.discard is not None or discard is None or outcome.error is not None:
            await call.dispose(outcome)
            return
        try:
            done = discard(outcome.result)
            if inspect.isawaitable(done):
                await done
        except Exception:
            _log.warning("a discarded result of call %r could not be disposed of", call.name, exc_info=True)


def _outcome_of(task: asyncio.Task[Any]) -> Outcome:
    if task.cancelled():
        return Outcome(error=asyncio.CancelledError())
    error = task.exception()
    return Outcome(task.result()) if error is None else Outcome(error=error)


def _keep(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    _stubborn.add(task)
    task.add_done_callback(_stubborn.discard)
