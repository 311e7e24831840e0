"""How long a call, or one attempt at it, may take."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal, TypeVar

from meshkit.core.call import Call, Next
from meshkit.core.clock import SYSTEM_CLOCK, Clock
from meshkit.core.events import TimedOut, emit
from meshkit.core.scope import Scope, current_scope, scope_open
from meshkit.errors import AttemptTimeoutError, ConfigurationError, DeadlineExceededError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Timeout:
    """Stop a call whose time is over.

    `Timeout(5)` inside a Retry bounds each attempt; `Timeout(total=30)` outside it bounds everything, and narrows the
    deadline that the request carries on. Either way the earlier of the limit and the request's own deadline holds, with
    one timer. The call is cancelled, so what it has begun elsewhere may still take effect.

    Args:
        seconds: what one attempt may take.
        total: what all attempts and waits may take together. Exactly one of the two is given.
        clock: where the time comes from.

    Raises:
        AttemptTimeoutError: `seconds` are over.
        DeadlineExceededError: `total` or the request's deadline is over.
    """

    seconds: float | None = None
    total: float | None = None
    clock: Clock = SYSTEM_CLOCK

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.total is None):
            raise ConfigurationError(
                "a timeout bounds either one attempt or the whole call.", "Give seconds, or total=, not both."
            )
        limit = self.seconds if self.seconds is not None else self.total
        if limit is None or not limit > 0:
            raise ConfigurationError(f"a timeout is how long a call may take in seconds, so above 0, not {limit}.")

    def describe(self) -> dict[str, object]:
        return {"kind": "timeout", "seconds": self.seconds, "total": self.total}

    async def run(self, call: Call, call_next: Next[T]) -> T:
        scope = current_scope()
        now = self.clock.now()
        if self.total is None:
            assert self.seconds is not None
            limit = now + self.seconds
            if scope is not None and scope.deadline is not None and scope.deadline < limit:
                return await self._within(scope.deadline, "total", call, call_next, now)
            return await self._within(limit, "attempt", call, call_next, now)
        narrowed = Scope(deadline=now + self.total) if scope is None else scope.narrowed(now + self.total)
        assert narrowed.deadline is not None
        with scope_open(narrowed):
            return await self._within(narrowed.deadline, "total", call, call_next, now)

    async def _within(
        self, limit: float, kind: Literal["attempt", "total"], call: Call, call_next: Next[T], now: float
    ) -> T:
        if limit <= now:
            raise self._error(kind, call, 0.0)
        task = asyncio.current_task()
        assert task is not None
        cancelling = task.cancelling()
        fired = False

        def fire() -> None:
            nonlocal fired
            fired = True
            task.cancel()

        timer = self.clock.call_at(limit, fire)
        try:
            return await call_next(call)
        except asyncio.CancelledError:
            # Ours, and nobody else's besides: a caller who cancelled at the same time gets the cancellation.
            if fired and task.uncancel() <= cancelling:
                fired = False
                raise self._error(kind, call, limit - now) from None
            fired = False
            raise
        finally:
            timer.cancel()
            if fired:
                # The call ended by itself in the very turn in which its time was over.
                task.uncancel()

    def _error(
        self, kind: Literal["attempt", "total"], call: Call, seconds: float
    ) -> AttemptTimeoutError | DeadlineExceededError:
        emit(TimedOut(source=call.name, seconds=seconds, kind=kind))
        if kind == "attempt":
            return AttemptTimeoutError(
                f"attempt {call.attempt} at {call.name!r} took longer than {seconds:.3g} s.", seconds=seconds
            )
        return DeadlineExceededError(
            f"{call.name!r} did not end within the {seconds:.3g} s that were left.", seconds=seconds
        )
