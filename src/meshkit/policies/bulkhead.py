"""Keep one slow dependency from taking all there is: so many calls at once, a few more in a queue, the rest refused."""

from __future__ import annotations

import asyncio
import math
import threading
import weakref
from collections import OrderedDict
from typing import Literal, TypeVar, cast

from meshkit.core.call import Call, Next, NextSync, Outcome
from meshkit.core.clock import SYSTEM_CLOCK, Clock, check_clock, running_loop
from meshkit.core.events import BulkheadRejected, emit
from meshkit.core.scope import current_scope
from meshkit.core.trace import TRACING, tracer
from meshkit.errors import BulkheadFullError, ConfigurationError

T = TypeVar("T")

# One entry a place is kept. More calls at once than this bound nothing in one process.
_MOST = 1_000_000

_bulkheads: weakref.WeakSet[Bulkhead] = weakref.WeakSet()
_bulkheads_lock = threading.Lock()


def bulkheads() -> list[Bulkhead]:
    """All bulkheads of this process that are alive: what a scrape reads."""
    with _bulkheads_lock:
        return list(_bulkheads)


class _Waiter:
    """Somebody in the queue: a task, by the future it waits for, or a thread, by its event."""

    __slots__ = ("event", "future", "gone", "loop", "served")

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop
        self.future = None if loop is None else loop.create_future()
        self.event = threading.Event() if loop is None else None
        self.served = False
        self.gone = False

    def wake(self) -> bool:
        """Whether there is anybody to wake."""
        if self.gone:
            return False
        future = self.future
        if future is None or self.loop is None:
            assert self.event is not None
            self.event.set()
            return True
        if future.done():
            # Cancelled, and not come to leave yet.
            return False
        if running_loop() is self.loop:
            future.set_result(None)
            return True
        try:
            self.loop.call_soon_threadsafe(_settle, future)
        except RuntimeError:
            # Its loop was closed around it.
            return False
        return True


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Bulkhead:
    """At most `limit` calls at once; up to `queue` more wait, first come first served; whoever is left is refused.

    Nobody waits past the deadline of the request. A call holds its place up to its real end: a stream, until it was read
    or closed. Threads and event loops may share one. A cancelled call gives back its place, or its place in the queue,
    and counts as nothing.

    Args:
        name: what it guards, for events, metrics and errors.
        limit: how many calls may be under way at once.
        queue: how many more may wait for a place.
        wait: seconds that one of them waits at most; `None` for as long as the request's deadline allows.
        clock: where the time comes from.

    Raises:
        BulkheadFullError: all places are taken, and so is the queue, or the wait in it is over.
        ConfigurationError: a value that cannot work.
    """

    # The free places are entries of a list, because taking and adding one are single steps that no other thread comes
    # between (with the interpreter's lock, and without it by the list's own). So a call that finds a place takes no
    # lock. What keeps that fair: who sees a queue joins it; who has joined serves it; who has freed a place looks for a
    # queue *after* that. Whichever of the two comes second sees what the other one did.

    __slots__ = ("__weakref__", "_clock", "_free", "_lock", "_waiters", "limit", "name", "queue", "wait")

    def __init__(
        self,
        name: str = "bulkhead",
        *,
        limit: int,
        queue: int = 0,
        wait: float | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not isinstance(cast("object", name), str) or not name:
            raise ConfigurationError(f"a bulkhead begins with the name of what it guards, and {name!r} is none.")
        if not isinstance(cast("object", limit), int) or isinstance(limit, bool) or not 1 <= limit <= _MOST:
            raise ConfigurationError(f"limit is how many calls may run at once, so 1 to {_MOST}, not {limit!r}.")
        if not isinstance(cast("object", queue), int) or isinstance(queue, bool) or queue < 0:
            raise ConfigurationError(f"queue is how many calls may wait for a place, so 0, 1, 2 …, not {queue!r}.")
        if wait is not None and not queue:
            raise ConfigurationError("wait is how long a call stays in the queue, and there is none.", "Give queue=.")
        if wait is not None and (
            isinstance(wait, bool) or not isinstance(cast("object", wait), int | float) or not 0 < wait < math.inf
        ):
            raise ConfigurationError(
                f"wait is how many seconds a call stays in the queue, so above 0, not {wait!r}.",
                "Without a queue (queue=0) no call waits; with wait=None the request's deadline bounds it.",
            )
        check_clock(clock)
        self.name = name
        self.limit = limit
        self.queue = queue
        self.wait = wait
        self._clock = clock
        self._free: list[None] = [None] * limit
        # In order of their coming.
        self._waiters: OrderedDict[_Waiter, None] = OrderedDict()
        # Re-entrant, because what runs under it may come back: a destructor that the collector calls ends a call.
        self._lock = threading.RLock()
        with _bulkheads_lock:
            _bulkheads.add(self)

    def __repr__(self) -> str:
        return f"Bulkhead({self.name!r}, limit={self.limit}, in_use={self.in_use}, waiting={self.waiting})"

    @property
    def in_use(self) -> int:
        """Calls that are under way."""
        return self.limit - len(self._free)

    @property
    def waiting(self) -> int:
        """Calls that wait for a place."""
        return len(self._waiters)

    def describe(self) -> dict[str, object]:
        wait = 0.0 if not self.queue else math.inf if self.wait is None else self.wait
        return {"kind": "bulkhead", "name": self.name, "limit": self.limit, "queue": self.queue, "wait": wait}

    # -- as a policy --------------------------------------------------------------------------------------------------

    async def run(self, call: Call, call_next: Next[T]) -> T:
        free = self._free
        if self._waiters:
            await self._enter()
        else:
            try:
                free.pop()
            except IndexError:
                await self._enter()
        if call.late:
            call.on_end(self._leave)
            return await call_next(call)
        try:
            return await call_next(call)
        finally:
            free.append(None)
            if self._waiters:
                self._serve()

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        self._enter_sync()
        if call.late:
            call.on_end(self._leave)
            return call_next(call)
        try:
            return call_next(call)
        finally:
            self._leave()

    def _leave(self, outcome: Outcome | None = None) -> None:
        self._free.append(None)
        if self._waiters:
            self._serve()

    # -- waiting ------------------------------------------------------------------------------------------------------

    async def _enter(self) -> None:
        waiter = _Waiter(asyncio.get_running_loop())
        if self._join(waiter):
            return
        assert waiter.future is not None
        timer = None
        try:
            until = self._until()
            if until < math.inf:
                timer = self._clock.call_at(until, lambda: self._give_up(waiter))
            await waiter.future
        except BaseException:
            self._quit(waiter)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if not waiter.served:
            raise self._refused("timeout")

    def _enter_sync(self) -> None:
        if not self._waiters:
            try:
                self._free.pop()
            except IndexError:
                pass
            else:
                return
        waiter = _Waiter()
        if self._join(waiter):
            return
        assert waiter.event is not None
        try:
            until = self._until()
            while not waiter.served:
                left = until - self._clock.now()
                if left <= 0:
                    self._give_up(waiter)
                    break
                self._clock.block(left, until=waiter.event)
        except BaseException:
            self._quit(waiter)
            raise
        if not waiter.served:
            raise self._refused("timeout")

    def _until(self) -> float:
        """The point in time up to which a call may wait.

        Raises:
            BulkheadFullError: it is over.
        """
        now = self._clock.now()
        until = math.inf if self.wait is None else now + self.wait
        scope = current_scope()
        if scope is not None and scope.deadline is not None:
            until = min(until, scope.deadline)
        if until <= now:
            raise self._refused("timeout")
        return until

    def _join(self, waiter: _Waiter) -> bool:
        """Take a place in the queue; whether that has come to a place already.

        Raises:
            BulkheadFullError: the queue is full.
        """
        with self._lock:
            self._serve()
            # A place may have come free since, and without anybody in front it is ours.
            room = len(self._waiters) < (self.queue or (1 if self._free else 0))
            if room:
                self._waiters[waiter] = None
                self._serve()
                if waiter.served:
                    return True
                if self.queue:
                    return False
                # Another thread was quicker, and there is no queue to stay in.
                del self._waiters[waiter]
        raise self._refused("full")

    def _serve(self) -> None:
        """Hand the free places to those who have waited longest."""
        with self._lock:
            while self._waiters:
                try:
                    self._free.pop()
                except IndexError:
                    return
                try:
                    waiter, _ = self._waiters.popitem(last=False)
                except KeyError:
                    # A destructor was here.
                    self._free.append(None)
                    return
                # Said first, because who is woken looks at it. A destructor may come in between here, too: then it has
                # taken it back, and the place is free already.
                waiter.served = True
                if not waiter.wake() and waiter.served:
                    waiter.served = False
                    self._free.append(None)

    def _give_up(self, waiter: _Waiter) -> None:
        """Take somebody whose time is over out of the queue; nothing happens to one who has a place by now."""
        with self._lock:
            if waiter in self._waiters:
                del self._waiters[waiter]
                waiter.wake()

    def _quit(self, waiter: _Waiter) -> None:
        """As if it had not come: a place that it was handed meanwhile goes to the next one."""
        with self._lock:
            waiter.gone = True
            self._waiters.pop(waiter, None)
            if not waiter.served:
                return
            waiter.served = False
        self._leave()

    def _refused(self, reason: Literal["full", "timeout"]) -> BulkheadFullError:
        if BulkheadRejected.heard:
            emit(BulkheadRejected(source=self.name, reason=reason))
        if TRACING.on:
            span = tracer().current()
            if span.recording:
                span.event(
                    "meshkit.bulkhead.rejected",
                    {"meshkit.bulkhead.name": self.name, "meshkit.bulkhead.reason": reason},
                )
        if reason == "timeout":
            return BulkheadFullError(
                f"all {self.limit} places of bulkhead {self.name!r} stayed taken for as long as the call could wait.",
                policy=self.name,
            )
        waits = f", and so are the {self.queue} of its queue" if self.queue else ""
        return BulkheadFullError(
            f"all {self.limit} places of bulkhead {self.name!r} are taken{waits}.", policy=self.name
        )
