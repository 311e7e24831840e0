"""What a circuit breaker remembers of the calls behind it: the last so many, or those of the last so many seconds."""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple, Protocol


class Totals(NamedTuple):
    """How many calls a window holds, and how many of them failed or were slow (or both)."""

    calls: int
    failures: int
    slow: int


class Window(Protocol):
    """Not safe for threads by itself: a breaker asks it under its lock."""

    def add(self, now: float, *, failed: bool = False, slow: bool = False) -> None:
        """Remember one call."""
        ...

    def add_successes(self, now: float, count: int) -> None:
        """Remember `count` calls that neither failed nor were slow."""
        ...

    def totals(self, now: float) -> Totals:
        """What is remembered at `now`."""
        ...

    def clear(self) -> None:
        """Forget all of it."""
        ...


_FAILED: Final = 1
_SLOW: Final = 2


class CountWindow:
    """The last `size` calls."""

    __slots__ = ("_calls", "_failures", "_size", "_slow")

    def __init__(self, size: int) -> None:
        self._size = size
        self._calls: deque[int] = deque()
        self._failures = 0
        self._slow = 0

    def add(self, now: float, *, failed: bool = False, slow: bool = False) -> None:
        calls = self._calls
        if len(calls) == self._size:
            self._drop()
        calls.append(_FAILED * failed + _SLOW * slow)
        self._failures += failed
        self._slow += slow

    def add_successes(self, now: float, count: int) -> None:
        calls = self._calls
        count = min(count, self._size)
        for _ in range(len(calls) + count - self._size):
            self._drop()
        calls.extend([0] * count)

    def totals(self, now: float) -> Totals:
        return Totals(len(self._calls), self._failures, self._slow)

    def clear(self) -> None:
        self._calls.clear()
        self._failures = self._slow = 0

    def _drop(self) -> None:
        oldest = self._calls.popleft()
        self._failures -= oldest & _FAILED
        self._slow -= oldest >> 1


class TimeWindow:
    """The calls of the last `seconds`, to a tenth: they are counted in ten slices, and the oldest goes as a whole."""

    SLICES: Final = 10

    __slots__ = ("_slices", "_width")

    def __init__(self, seconds: float) -> None:
        self._width = seconds / self.SLICES
        # Number of the slice, calls, failures, slow calls; the newest stands last.
        self._slices: deque[list[int]] = deque()

    def add(self, now: float, *, failed: bool = False, slow: bool = False) -> None:
        current = self._current(now)
        current[1] += 1
        current[2] += failed
        current[3] += slow

    def add_successes(self, now: float, count: int) -> None:
        if count:
            self._current(now)[1] += count

    def totals(self, now: float) -> Totals:
        self._forget(math.floor(now / self._width))
        calls = failures = slow = 0
        for _, in_slice, failed, was_slow in self._slices:
            calls += in_slice
            failures += failed
            slow += was_slow
        return Totals(calls, failures, slow)

    def clear(self) -> None:
        self._slices.clear()

    def _current(self, now: float) -> list[int]:
        number = math.floor(now / self._width)
        self._forget(number)
        slices = self._slices
        # A thread that read the clock before another one may come after it: its call counts where the newest ones do.
        if not slices or slices[-1][0] < number:
            slices.append([number, 0, 0, 0])
        return slices[-1]

    def _forget(self, number: int) -> None:
        slices = self._slices
        while slices and slices[0][0] <= number - self.SLICES:
            slices.popleft()
