"""Make no more calls a second than the other side allows, by waiting a little or refusing at once."""

from __future__ import annotations

import asyncio
import math
import threading
import weakref
from collections import OrderedDict
from typing import TypeVar, cast

from meshkit.core.call import Call, Next, NextSync
from meshkit.core.clock import SYSTEM_CLOCK, Clock, Timer, check_clock, running_loop
from meshkit.core.events import RateLimited, emit
from meshkit.core.scope import current_scope
from meshkit.core.trace import TRACING, tracer
from meshkit.errors import ConfigurationError, RateLimitedError

T = TypeVar("T")

# A permit may be taken so many seconds early: timers ring, and binary fractions add up, that exactly.
_SLACK = 1e-6
# Seconds between two permits at least: clocks count nanoseconds.
_FINEST = 1e-9

_rate_limiters: weakref.WeakSet[RateLimiter] = weakref.WeakSet()
_rate_limiters_lock = threading.Lock()


def rate_limiters() -> list[RateLimiter]:
    """All rate limiters of this process that are alive: what a scrape reads."""
    with _rate_limiters_lock:
        return list(_rate_limiters)


class _Waiter:
    """Somebody who waits for a permit: a task, by the future it waits for, or a thread, by its event.

    Attributes:
        when: when it has its permit at the latest, before `RateLimiter._late` is added: earlier where somebody in front
            leaves. At least the time between two permits after that of the one in front.
        until: how long it would wait.
    """

    __slots__ = ("event", "future", "gone", "loop", "served", "timer", "until", "when")

    def __init__(self, loop: asyncio.AbstractEventLoop | None, when: float, until: float) -> None:
        self.loop = loop
        self.until = until
        self.future = None if loop is None else loop.create_future()
        self.event = threading.Event() if loop is None else None
        self.when = when
        self.timer: Timer | None = None
        self.served = False
        self.gone = False

    def here(self) -> bool:
        """Whether there is anybody to give a permit to."""
        if self.gone or (self.future is not None and self.future.done()):
            return False
        return self.loop is None or not self.loop.is_closed()


class RateLimiter:
    """At most `permits` calls each `per` seconds, evenly, after a burst of up to `burst` at once; in order of coming.

    A bucket of `burst` permits that fills at `permits / per` a second (GCRA, the leaky bucket as a meter; ITU-T I.371):
    within any `per` seconds at most `burst + permits` calls are made, and with `burst=1` they are evenly spaced. What has
    been called is not given back; a permit that somebody waited for and did not use is. Threads and event loops may share
    one. Each call counts, so inside a Retry each attempt does.

    Args:
        name: what it guards, for events, metrics and errors.
        permits: how many calls each `per` seconds.
        per: seconds.
        burst: how many calls at once after a quiet time; `permits` where left out.
        wait: seconds that a call waits for its permit at most; 0 for not at all, `None` for as long as the request's
            deadline allows. How long it would take is known when the call comes, so what is refused is refused at once.
        clock: where the time comes from.

    Raises:
        RateLimitedError: no permit within that time. Its `retry_after` says when there is one.
        ConfigurationError: a value that cannot work.
    """

    __slots__ = (
        "__weakref__",
        "_clock",
        "_full",
        "_interval",
        "_late",
        "_lock",
        "_waiters",
        "burst",
        "name",
        "per",
        "permits",
        "wait",
    )

    def __init__(
        self,
        name: str = "rate limiter",
        *,
        permits: int,
        per: float = 1.0,
        burst: int | None = None,
        wait: float | None = 0.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not isinstance(cast("object", name), str) or not name:
            raise ConfigurationError(f"a rate limiter begins with the name of what it guards, and {name!r} is none.")
        if not isinstance(cast("object", permits), int) or isinstance(permits, bool) or permits < 1:
            raise ConfigurationError(
                f"permits is how many calls may be made each `per` seconds, so 1, 2, 3 …, not {permits!r}.",
                "Fewer than one a second is permits=1 with a longer per.",
            )
        if isinstance(per, bool) or not isinstance(cast("object", per), int | float) or not 0 < per < math.inf:
            raise ConfigurationError(f"per is the seconds in which permits calls may be made, so above 0, not {per!r}.")
        if burst is not None and (not isinstance(cast("object", burst), int) or isinstance(burst, bool) or burst < 1):
            raise ConfigurationError(f"burst is how many calls may be made at once, so 1, 2, 3 …, not {burst!r}.")
        if wait is not None and (
            isinstance(wait, bool) or not isinstance(cast("object", wait), int | float) or not 0 <= wait < math.inf
        ):
            raise ConfigurationError(
                f"wait is how many seconds a call waits for its permit, so 0 or above, not {wait!r}.",
                "With wait=None the request's deadline bounds it.",
            )
        check_clock(clock)
        burst = permits if burst is None else burst
        try:
            interval = per / permits
            # So long the bucket takes to fill.
            filled = burst * interval
        except OverflowError:
            interval = filled = math.inf
        if not (interval >= _FINEST and filled < math.inf):
            # Without the numbers: some have more digits than anybody reads.
            raise ConfigurationError(
                "permits, per and burst are a rate that can be timed, and these are none: per / permits is the seconds "
                "between two permits, 1e-9 or more, and burst times that is a number of seconds that a float holds."
            )
        self.name = name
        self.permits = permits
        self.per = per
        self.burst = burst
        self.wait = wait
        self._clock = clock
        self._interval = interval
        # When the bucket is full, if nobody takes anything: all there is to know about it.
        self._full = -math.inf
        # In order of their coming.
        self._waiters: OrderedDict[_Waiter, None] = OrderedDict()
        # By how much those who wait get their permits later than they were told, because an event loop was held up for so
        # long that the bucket ran over meanwhile.
        self._late = 0.0
        # Re-entrant, because what runs under it may come back: a destructor that the collector calls ends a call.
        self._lock = threading.RLock()
        with _rate_limiters_lock:
            _rate_limiters.add(self)

    def __repr__(self) -> str:
        return (
            f"RateLimiter({self.name!r}, permits={self.permits}, per={self.per}, available={self.available}, "
            f"waiting={self.waiting})"
        )

    @property
    def available(self) -> int:
        """Calls that could be made now, without waiting."""
        with self._lock:
            missing = max(0.0, self._full - self._clock.now() - _SLACK) / self._interval
            return max(0, self.burst - math.ceil(missing) - len(self._waiters))

    @property
    def waiting(self) -> int:
        """Calls that wait for a permit."""
        return len(self._waiters)

    def describe(self) -> dict[str, object]:
        return {
            "kind": "rate_limiter",
            "name": self.name,
            "permits": self.permits,
            "per": self.per,
            "burst": self.burst,
            "wait": math.inf if self.wait is None else self.wait,
        }

    # -- as a policy --------------------------------------------------------------------------------------------------

    async def run(self, call: Call, call_next: Next[T]) -> T:
        if not self._take():
            await self._queue()
        return await call_next(call)

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        if not self._take():
            self._queue_sync()
        return call_next(call)

    # -- waiting ------------------------------------------------------------------------------------------------------

    async def _queue(self) -> None:
        waiter = self._join(asyncio.get_running_loop())
        if waiter is None:
            return
        assert waiter.future is not None
        try:
            self._called(waiter)
            await waiter.future
        except BaseException:
            self._quit(waiter)
            raise
        finally:
            if waiter.timer is not None:
                waiter.timer.cancel()
        if not waiter.served:
            raise self._refused(self._delay())

    def _queue_sync(self) -> None:
        waiter = self._join(None)
        if waiter is None:
            return
        assert waiter.event is not None
        try:
            while True:
                # Cleared before it looks, so that nobody's word is missed.
                waiter.event.clear()
                at = self._look(waiter)
                if at is None:
                    break
                left = at - self._clock.now()
                if left > 0:
                    self._clock.block(left, until=waiter.event)
        except BaseException:
            self._quit(waiter)
            raise
        if not waiter.served:
            raise self._refused(self._delay())

    def _called(self, waiter: _Waiter) -> None:
        """In the waiter's own event loop: go on where it need wait no more, else look when its time has come."""
        assert waiter.future is not None
        if waiter.timer is not None:
            waiter.timer.cancel()
            waiter.timer = None
        if waiter.future.done():
            return
        at = self._at(waiter)
        if at is None:
            waiter.future.set_result(None)
        else:
            waiter.timer = self._clock.call_at(at, lambda: self._rung(waiter))

    def _rung(self, waiter: _Waiter) -> None:
        self._look(waiter)
        self._called(waiter)

    # -- with the lock held: nothing in here waits, or calls a user's code --------------------------------------------

    def _next(self, now: float) -> float:
        """When there is a permit, for whoever is next."""
        return max(self._full, now) - (self.burst - 1) * self._interval

    def _delay(self) -> float:
        """Seconds until a call that came now would have its permit."""
        with self._lock:
            now = self._clock.now()
            return max(0.0, self._next(now) + len(self._waiters) * self._interval - now)

    def _take(self) -> bool:
        with self._lock:
            now = self._clock.now()
            if self._waiters or self._next(now) > now + _SLACK:
                return False
            self._full = max(self._full, now) + self._interval
            return True

    def _join(self, loop: asyncio.AbstractEventLoop | None) -> _Waiter | None:
        """Take a place in the queue, where its time comes early enough; `None` where there is a permit after all.

        Raises:
            RateLimitedError: it would take longer than the call may wait.
        """
        scope = current_scope()
        with self._lock:
            self._serve()
            if self._take():
                return None
            now, delay = self._clock.now(), self._delay()
            longest = math.inf if self.wait is None else self.wait
            if scope is not None and scope.deadline is not None:
                longest = min(longest, scope.deadline - now)
            if 0 < longest and delay <= longest + _SLACK:
                when = now + delay - self._late
                if self._waiters:
                    # Where somebody in the middle has left, those behind still have the times that they came with.
                    when = max(when, next(reversed(self._waiters)).when + self._interval)
                waiter = _Waiter(loop, when, now + longest)
                self._waiters[waiter] = None
                return waiter
        raise self._refused(delay)

    def _serve(self) -> None:
        """Give the permits that there are to those who have waited longest, and see to it that the first of the others
        looks in time. Those that are gone, or would wait for too long, are in the queue no more.

        Whoever is called in here does not come back to this, so that it takes no more stack for more waiters.
        """
        with self._lock:
            now = self._clock.now()
            while (first := next(iter(self._waiters), None)) is not None:
                at = self._next(now)
                off = at - (first.when + self._late)
                if not first.here():
                    self._waiters.pop(first, None)
                elif at <= now + _SLACK:
                    self._waiters.pop(first, None)
                    self._full = max(self._full, now) + self._interval
                    # Said first, because who is woken looks at it.
                    first.served = True
                    if not self._call(first):
                        first.served = False
                        self._full -= self._interval
                elif at > first.until + _SLACK:
                    self._waiters.pop(first, None)
                    self._call(first)
                elif abs(off) <= _SLACK:
                    return
                else:
                    if off > 0:
                        self._late += off
                    else:
                        # Somebody in front of it has left. The others come in time still: each one that has its permit
                        # calls the next.
                        first.when += off
                    if self._call(first):
                        return
                    self._waiters.pop(first, None)
            self._late = 0.0

    def _look(self, waiter: _Waiter) -> float | None:
        """Give the permits that there are, and say when this waiter looks again: `None` where it has its permit, or has
        waited for as long as it would, and is in the queue no more."""
        with self._lock:
            # Asked first: who gets a permit at the last moment has it.
            over = self._clock.now() >= waiter.until
            self._serve()
            if over:
                self._waiters.pop(waiter, None)
            return self._at(waiter)

    def _at(self, waiter: _Waiter) -> float | None:
        """When a waiter looks: the first one when there is a permit. The others only in case nobody calls them, because
        the event loop of the one in front stands still, and so never before the first one."""
        with self._lock:
            if waiter not in self._waiters:
                return None
            first = self._next(self._clock.now())
            if waiter is next(iter(self._waiters)):
                return first
            return min(max(waiter.when + self._late, first), waiter.until)

    def _call(self, waiter: _Waiter) -> bool:
        """Wake a waiter that is in the queue no more, or have one look again whose time has changed.

        Returns:
            Whether there is anybody: `False` where its event loop was closed around it.
        """
        if waiter.loop is None:
            assert waiter.event is not None
            waiter.event.set()
        elif running_loop() is waiter.loop:
            self._called(waiter)
        else:
            try:
                waiter.loop.call_soon_threadsafe(self._called, waiter)
            except RuntimeError:
                return False
        return True

    def _quit(self, waiter: _Waiter) -> None:
        """As if it had not come: the next one moves up, and a permit that it was given meanwhile is there again."""
        with self._lock:
            waiter.gone = True
            self._waiters.pop(waiter, None)
            if waiter.served:
                waiter.served = False
                self._full -= self._interval
            self._serve()

    def _refused(self, retry_after: float) -> RateLimitedError:
        if RateLimited.heard:
            emit(RateLimited(source=self.name, retry_after=retry_after))
        if TRACING.on:
            span = tracer().current()
            if span.recording:
                span.event(
                    "meshkit.rate_limiter.rejected",
                    {"meshkit.rate_limiter.name": self.name, "meshkit.rate_limiter.retry_after": retry_after},
                )
        return RateLimitedError(
            f"rate limiter {self.name!r} allows {self.permits} calls each {self.per:g} s, and has a permit in "
            f"{retry_after:.3g} s.",
            policy=self.name,
            retry_after=retry_after,
        )
