"""A clock that a test moves by hand, so that no test waits."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
import threading
from collections.abc import Callable


class _ManualTimer:
    __slots__ = ("callback", "cancelled")

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class ManualClock:
    """Time that passes only when somebody sleeps or says `advance`.

    Args:
        start: what `now()` says at first, seconds.
        epoch: what `time()` says at first, seconds since 1970.
        chance: what `random()` says.
        hold: `False` (default): a sleep passes at once and moves the clock. `True`: sleepers wait for `advance`.

    Attributes:
        sleeps: the lengths that were slept, in order.
    """

    def __init__(
        self, *, start: float = 1000.0, epoch: float = 1_700_000_000.0, chance: float = 0.5, hold: bool = False
    ) -> None:
        self._now = start
        self._offset = epoch - start
        self.chance = chance
        self.hold = hold
        self.sleeps: list[float] = []
        self._timers: list[tuple[float, int, _ManualTimer]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    def time(self) -> float:
        return self._now + self._offset

    def random(self) -> float:
        return self.chance

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        if self.hold:
            woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            timer = self.call_at(self._now + seconds, lambda: _wake(woken))
            try:
                await woken
            finally:
                timer.cancel()
            return
        self._pass(self._now + max(0.0, seconds))
        await asyncio.sleep(0)

    def block(self, seconds: float, until: threading.Event | None = None) -> None:
        self.sleeps.append(seconds)
        target = self._now + max(0.0, seconds)
        if until is None:
            self._pass(target)
            return
        while not until.is_set() and self._run_next(target):
            pass
        if target == math.inf:
            # Nothing here ends it, so another thread does.
            until.wait()
        elif not until.is_set():
            self._now = max(self._now, target)

    def call_at(self, when: float, callback: Callable[[], object]) -> _ManualTimer:
        timer = _ManualTimer(callback)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Let so much time pass, running what falls due on the way, in order, and giving tasks their turn after each."""
        target = self._now + seconds
        while self._run_next(target):
            await self._settle()
        self._now = target
        await self._settle()

    def _pass(self, target: float) -> None:
        while self._run_next(target):
            pass
        self._now = max(self._now, target)

    def _run_next(self, target: float) -> bool:
        while self._timers and self._timers[0][0] <= target:
            when, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                self._now = max(self._now, when)
                timer.callback()
                return True
        return False

    async def _settle(self) -> None:
        # A woken task may need a few turns of the loop until it waits again.
        for _ in range(10):
            await asyncio.sleep(0)


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
