"""Time and chance, from one object that a test can replace."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

from meshkit.errors import ConfigurationError


class Timer(Protocol):
    """A callback that was asked for and has perhaps not run yet."""

    def cancel(self) -> None:
        """Make sure that the callback does not run; nothing happens if it already has."""
        ...


class Clock(Protocol):
    """Where meshkit asks for the time, waits, and rolls dice. All lengths are seconds."""

    def now(self) -> float:
        """Seconds on a clock that never goes back. Its zero means nothing: only differences do."""
        ...

    def time(self) -> float:
        """Seconds since the epoch (UTC), as people and other machines see them."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Let other tasks run for so long."""
        ...

    def block(self, seconds: float, until: threading.Event | None = None) -> None:
        """Hold this thread for so long, or until `until` is set: what a synchronous function has instead of `sleep`.

        `seconds` may be infinite where there is an `until`.
        """
        ...

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        """Call `callback` from the running event loop once `now()` has reached `when`."""
        ...

    def random(self) -> float:
        """A number in [0, 1)."""
        ...


class _SystemClock:
    """The machine's own clocks and the default random generator."""

    __slots__ = ()

    now = staticmethod(time.monotonic)
    time = staticmethod(time.time)
    random = staticmethod(random.random)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def block(self, seconds: float, until: threading.Event | None = None) -> None:
        if until is None:
            time.sleep(seconds)
        else:
            until.wait(min(seconds, threading.TIMEOUT_MAX))

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        # By the length, not the point: another event loop than asyncio's may count from another zero.
        return asyncio.get_running_loop().call_later(max(0.0, when - time.monotonic()), callback)

    def __repr__(self) -> str:
        return "SYSTEM_CLOCK"

    def __reduce__(self) -> str:
        # There is one, also after a policy that holds it was copied or sent to another process.
        return "SYSTEM_CLOCK"


SYSTEM_CLOCK: Clock = _SystemClock()

_ASKED: Final = ("now", "time", "sleep", "block", "call_at", "random")


def check_clock(clock: object) -> None:
    """Make sure that a policy is given a clock, so that it is not the first call that finds out.

    Raises:
        ConfigurationError: it is none.
    """
    if clock is SYSTEM_CLOCK:
        return
    # A class has the methods of its objects, so it would pass for one of them.
    if isinstance(clock, type) or not all(callable(getattr(clock, name, None)) for name in _ASKED):
        raise ConfigurationError(
            f"clock is where the time comes from, and {clock!r} is none.",
            "Leave it out, or give an object with the methods of meshkit.core.clock.Clock: ManualClock() in a test.",
        )


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs in this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
