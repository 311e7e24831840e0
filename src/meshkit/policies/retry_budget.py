"""How many retries a destination bears: a share of the calls that it gets anyway."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from typing import cast

from meshkit.core.clock import SYSTEM_CLOCK, Clock, check_clock
from meshkit.errors import ConfigurationError

# Each call of the window is remembered, so the window is short. Finagle draws the same line.
_LONGEST = 60.0

# What no longer counts is dropped so many times a window, not at every call: that would take the lock each time.
_SWEEPS = 16

_budgets: weakref.WeakSet[RetryBudget] = weakref.WeakSet()
_budgets_lock = threading.Lock()


def budgets() -> list[RetryBudget]:
    """All retry budgets of this process that are alive: what a scrape reads."""
    with _budgets_lock:
        return list(_budgets)


def _is_number(value: object) -> bool:
    # bool is one only by descent.
    return isinstance(value, int | float) and not isinstance(value, bool)


class RetryBudget:
    """Let retries be a share of the calls to a destination, so that its outage does not multiply the load on it.

    While few calls fail, the budget is never noticed; when most fail, at most `ratio` more of them reach the
    destination than callers asked for, however many attempts each Retry would make. Give the same budget to every Retry
    and Hedge towards one destination, and another one to the next. Threads and event loops may share it.

    Share and window are Finagle's, the floor of 3 is Envoy's and failsafe-go's. Calls are counted, not attempts: call
    `deposit` once a call, in whichever policy is outermost. It is exact: each call and each retry counts for `window`
    seconds, for which 32 bytes a call are kept.

    Args:
        name: the destination, for metrics and for the event that tells of an empty budget.
        ratio: retries that each call of the window allows: 0.2 is one in five, 2.0 is two each, 0 is none.
        window: how long a call and a retry count, seconds, up to 60.
        at_least: retries that are allowed in each window whatever the calls are: what a quiet destination lives on.
        clock: where time comes from.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    __slots__ = (
        "__weakref__",
        "_calls",
        "_clock",
        "_given_back",
        "_lock",
        "_spent",
        "_sweep_at",
        "_sweeping",
        "at_least",
        "name",
        "ratio",
        "window",
    )

    def __init__(
        self,
        name: str = "",
        *,
        ratio: float = 0.2,
        window: float = 10.0,
        at_least: int = 3,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not isinstance(cast("object", name), str):
            raise ConfigurationError(f"a budget's name is that of the destination, and {name!r} is none.")
        if not _is_number(ratio) or not 0 <= ratio < math.inf:
            raise ConfigurationError(f"ratio is how many retries each call allows, so 0 or above, not {ratio!r}.")
        if not _is_number(window) or not 0 < window <= _LONGEST:
            raise ConfigurationError(
                f"window is how long a call counts, so above 0 up to {_LONGEST:g} s, not {window!r}."
            )
        if not isinstance(cast("object", at_least), int) or isinstance(at_least, bool) or at_least < 0:
            raise ConfigurationError(f"at_least is a number of retries a window, so 0, 1, 2 …, not {at_least!r}.")
        check_clock(clock)
        self.name = name
        self.ratio = ratio
        self.window = window
        self.at_least = at_least
        self._clock = clock
        self._calls: deque[float] = deque()
        self._spent: deque[float] = deque()
        # Retries of `_spent` that were not made after all: one entry each, until somebody looks.
        self._given_back: deque[None] = deque()
        self._sweep_at = clock.now() + window
        self._sweeping = False
        # Re-entrant, because what runs under it may come back: the collector closes a coroutine that was dropped while
        # its retry waited, and that retry is given back.
        self._lock = threading.RLock()
        with _budgets_lock:
            _budgets.add(self)

    def __repr__(self) -> str:
        return (
            f"RetryBudget({self.name!r}, ratio={self.ratio}, window={self.window}, at_least={self.at_least}, "
            f"balance={self.balance})"
        )

    def deposit(self) -> None:
        """Count a call. This is on the path of every call, so it is an append, which takes no lock."""
        now = self._clock.now()
        self._calls.append(now)
        if now >= self._sweep_at:
            with self._lock:
                self._forget(now)

    def withdraw(self) -> bool:
        """Take one retry out of the budget; `False`, and nothing is taken, where there is none."""
        with self._lock:
            now = self._clock.now()
            if self._left(now) < 1:
                return False
            self._spent.append(now)
            return True

    def give_back(self) -> None:
        """Put back a retry that was withdrawn and then not made. A destructor may: it is an append, which takes no lock."""
        self._given_back.append(None)

    @property
    def balance(self) -> int:
        """Retries that could be made now."""
        with self._lock:
            return self._left(self._clock.now())

    # -- with the lock held: nothing in here waits, or calls a user's code --------------------------------------------

    def _left(self, now: float) -> int:
        self._forget(now)
        # A hair more, because a tenth of thirty is to be three, whatever binary fractions make of it.
        allowed = max(self.at_least, int(self.ratio * len(self._calls) + 1e-9))
        return max(0, allowed - len(self._spent))

    def _forget(self, now: float) -> None:
        if self._sweeping:
            # A destructor has come back in the middle of it: what is left to drop is dropped by the one further down.
            return
        try:
            self._sweeping = True
            while self._given_back:
                self._given_back.popleft()
                if self._spent:
                    self._spent.pop()
            until = now - self.window
            for counted in (self._calls, self._spent):
                while counted and counted[0] <= until:
                    counted.popleft()
            self._sweep_at = now + self.window / _SWEEPS
        finally:
            self._sweeping = False
