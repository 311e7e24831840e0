"""How long a call, or one attempt at it, may take."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Generator
from dataclasses import dataclass
from types import CoroutineType, coroutine
from typing import Any, Literal, TypeVar, cast

from meshkit.core.call import Call, Next
from meshkit.core.clock import SYSTEM_CLOCK, Clock, Timer, check_clock
from meshkit.core.events import TimedOut, emit
from meshkit.core.scope import Scope, close_scope, current_scope, open_scope
from meshkit.errors import AttemptTimeoutError, ConfigurationError, DeadlineExceededError

T = TypeVar("T")
_Kind = Literal["attempt", "total"]


@dataclass(frozen=True, slots=True)
class Timeout:
    """Stop a call whose time is over.

    `Timeout(5)` inside a Retry bounds each attempt; `Timeout(total=30)` outside it bounds everything, and narrows the
    deadline that the request carries on. Either way the earlier of the limit and the request's own deadline holds, with
    one timer; where the deadline is over already, nothing is called. The call is cancelled, so what it has begun
    elsewhere may still take effect. A stream may take so long up to its last item.

    A cancellation by anybody else comes out as such, also in the turn in which the time is over.

    Args:
        seconds: what one attempt may take.
        total: what all attempts and waits may take together. Exactly one of the two is given.
        clock: where the time comes from.

    Raises:
        ConfigurationError: a value that cannot work.
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
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise ConfigurationError(f"a timeout is how long a call may take in seconds, so above 0, not {limit!r}.")
        check_clock(self.clock)

    def describe(self) -> dict[str, object]:
        return {"kind": "timeout", "seconds": self.seconds, "total": self.total}

    async def run(self, call: Call, call_next: Next[T]) -> T:
        clock = self.clock
        now = clock.now()
        scope = current_scope()
        deadline = None if scope is None else scope.deadline
        kind: _Kind
        if self.seconds is not None:
            limit, kind = now + self.seconds, "attempt"
        else:
            assert self.total is not None
            limit, kind = now + self.total, "total"
        if deadline is not None and deadline < limit:
            limit, kind = deadline, "total"
            if deadline <= now:
                raise _error(kind, call.name, call.attempt, 0.0)
        opened = None
        if self.total is not None:
            opened = open_scope(Scope(deadline=limit) if scope is None else scope.narrowed(limit))
        try:
            # A timer costs more than all else here, and what does not wait cannot be stopped. So the first step is made
            # by hand and without one: a call that ends in it (answered at once, refused by a policy) has no need of it.
            work = call_next(call)
            steps: CoroutineType[Any, Any, T] = work if isinstance(work, CoroutineType) else cast("Any", _awaited(work))
            try:
                waits = steps.send(None)
            except StopIteration as done:
                result: T = done.value
            else:
                result = await _stopped(limit, kind, now, clock, call, steps, waits)
            if call.stop is not None:
                _watch(limit, kind, now, clock, call)
            return result
        finally:
            if opened is not None:
                close_scope(opened)


async def _awaited(work: Awaitable[T]) -> T:
    return await work


@coroutine
def _stopped(
    limit: float, kind: _Kind, now: float, clock: Clock, call: Call, steps: CoroutineType[Any, Any, T], waits: Any
) -> Generator[Any, Any, T]:
    """Await `steps`, which have come to wait for `waits`, and stop them at `limit`."""
    alarm = _Alarm(limit, clock)
    thrown: BaseException
    try:
        # From here on as `await` does it.
        while True:
            try:
                yield waits
            except BaseException as error:
                thrown = error
            else:
                waits = None
                result: T = yield from cast("Generator[Any, Any, T]", steps)
                break
            try:
                waits = steps.throw(thrown)
            except StopIteration as done:
                result = done.value
                break
            finally:
                # An error holds its traceback, and that this frame, which holds the error.
                del thrown
    except BaseException as error:
        if alarm.over() and isinstance(error, asyncio.CancelledError):
            raise _error(kind, call.name, call.attempt, limit - now) from None
        raise
    alarm.over()
    return result


class _Alarm:
    """The timer of one call, which cancels the task that waits for it."""

    __slots__ = ("_cancelling", "_rang", "_task", "_timer")

    def __init__(self, limit: float, clock: Clock) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a Timeout cancels the task that it runs in, and here is none")
        self._task = task
        self._cancelling = task.cancelling()
        self._rang = False
        self._timer: Timer | None = None
        if clock.now() < limit:
            self._timer = clock.call_at(limit, self._ring)
        else:
            # The first step has held the thread for all of the time.
            self._ring()

    def _ring(self) -> None:
        self._rang = True
        self._task.cancel()

    def over(self) -> bool:
        """Disarm. Whether the time was over, and nobody else has cancelled the task as well."""
        if self._timer is not None:
            self._timer.cancel()
        task = self._task
        # It ends with the error whose traceback leads here.
        del self._task
        # What rang in the very turn in which the call ended by itself leaves no cancellation behind.
        return self._rang and task.uncancel() <= self._cancelling


def _watch(limit: float, kind: _Kind, now: float, clock: Clock, call: Call) -> None:
    """Stop, at `limit`, a stream that goes on after its first item."""
    # Not the call itself: what is on the loop is not to keep its arguments alive.
    name, attempt, seconds, stop = call.name, call.attempt, limit - now, call.stop
    assert stop is not None
    timer = clock.call_at(limit, lambda: stop(lambda: _error(kind, name, attempt, seconds)))
    call.on_end(lambda outcome: timer.cancel())


def _error(kind: _Kind, name: str, attempt: int, seconds: float) -> AttemptTimeoutError | DeadlineExceededError:
    if TimedOut.heard:
        emit(TimedOut(source=name, seconds=seconds, kind=kind))
    if kind == "attempt":
        return AttemptTimeoutError(f"attempt {attempt} at {name!r} took longer than {seconds:.3g} s.", seconds=seconds)
    return DeadlineExceededError(f"{name!r} did not end within the {seconds:.3g} s that were left.", seconds=seconds)
