"""When a failed message is tried again: `"50ms, 10s*3, 1m*3, 10m*2"`.

The first step may be waited for in the process, where it is at most a second; all others are spent in delay rungs,
queues that hold a message for one fixed time. A rung's name tells how long: `meshkit.delay.10s`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from meshkit.core.clock import Clock
from meshkit.core.settings import UNITS
from meshkit.errors import ConfigurationError

DEFAULT: Final = "50ms, 10s*3, 1m*3, 10m*2"
MOST_ATTEMPTS: Final = 1000
RUNG_PREFIX: Final = "meshkit.delay."

_STEP: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)\s*(?:\*\s*(\d+))?\s*")
# Longer ones would hold a slot of the prefetch for too long, and are lost to a crash.
_LONGEST_IN_PROCESS: Final = 1.0
# RabbitMQ takes x-message-ttl up to 2^32 - 1 milliseconds.
_LONGEST: Final = 49 * 86_400.0

# Rungs are shared by all services of a vhost, so all choose from the same lengths. Neighbours differ by a third to a
# half: two or three of them lie between half a step and the whole of it.
_LADDER: Final = (
    *(0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0),
    *(420.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0, 7200.0, 10_800.0, 21_600.0, 43_200.0, 86_400.0),
)


def rung_name(delay: float) -> str:
    """The exchange and queue that hold a message for `delay` seconds: `meshkit.delay.10s`, `meshkit.delay.50ms`."""
    millis = round(delay * 1000)
    for unit, length in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if millis % length == 0:
            return f"{RUNG_PREFIX}{millis // length}{unit}"
    return f"{RUNG_PREFIX}{millis}ms"


def rung_at_least(delay: float) -> float:
    """The shortest rung of the ladder that is not shorter than `delay`; above a day, whole days."""
    if delay >= _LONGEST:
        return _LONGEST
    for length in _LADDER:
        # Asked this way round, what is no number has an answer too.
        if not length < delay:
            return length
    return math.ceil(delay / 86_400.0) * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Where a message spends the time until its next attempt."""

    seconds: float
    in_process: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The waits between the attempts at one message.

    Args:
        steps: seconds before the second attempt, the third, and so on.
        jitter: share of a step of a second or more by which it may be cut short, so that messages that failed together
            do not come together: a rung between `step * (1 - jitter)` and `step` is chosen by chance. 0 for none.
    """

    steps: tuple[float, ...]
    jitter: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.jitter < 1:
            raise ConfigurationError(f"jitter is a share of each wait, 0 or above and below 1, not {self.jitter}.")
        if len(self.steps) >= MOST_ATTEMPTS:
            raise ConfigurationError(f"a schedule has fewer than {MOST_ATTEMPTS} steps, not {len(self.steps)}.")
        for step in self.steps:
            if not 0.001 <= step <= _LONGEST:
                raise ConfigurationError(f"a step of a schedule is 1ms to 49d long, not {step:g} s.")

    @classmethod
    def parse(cls, text: str, *, jitter: float = 0.5) -> Schedule:
        """Read `"50ms, 10s*3, 1m*3, 10m*2"`: lengths with a unit (ms, s, m, h, d), each once or so many times, commas
        between. An empty text is a schedule without a second attempt.

        Raises:
            ConfigurationError: the text is no schedule; it says which step.
        """
        if not text.strip():
            return cls(steps=(), jitter=jitter)
        steps: list[float] = []
        for written in text.split(","):
            match = _STEP.fullmatch(written)
            if match is None:
                raise ConfigurationError(
                    f"{written.strip()!r} in the retry schedule {text!r} is no step.",
                    'A step is a length and how often it is waited for: "50ms", "10s*3", "1.5m", "2h*4".',
                )
            length, unit, times = match.groups()
            count = 1 if times is None else int(times)
            if not 1 <= count < MOST_ATTEMPTS:
                raise ConfigurationError(
                    f"{written.strip()!r} in the retry schedule {text!r} repeats {count} times.",
                    f"A step is taken 1 to {MOST_ATTEMPTS - 1} times.",
                )
            steps.extend([round(float(length) * UNITS[unit], 3)] * count)
        return cls(steps=tuple(steps), jitter=jitter)

    @property
    def max_attempts(self) -> int:
        return len(self.steps) + 1

    def wait(self, attempt: int, clock: Clock) -> Wait | None:
        """What comes after attempt number `attempt` has failed; `None` where that was the last one."""
        if attempt > len(self.steps):
            return None
        step = self.steps[attempt - 1]
        if attempt == 1 and step <= _LONGEST_IN_PROCESS:
            return Wait(seconds=step, in_process=True)
        choice = self._choice(step)
        return Wait(seconds=choice[int(clock.random() * len(choice))], in_process=False)

    def rungs(self) -> tuple[float, ...]:
        """All rungs that `wait` may answer with, shortest first."""
        first = 1 if self.steps and self.steps[0] <= _LONGEST_IN_PROCESS else 0
        return tuple(sorted({rung for step in self.steps[first:] for rung in self._choice(step)}))

    def _choice(self, step: float) -> list[float]:
        if step < 1.0 or not self.jitter:
            return [step]
        least = step * (1 - self.jitter)
        return [*(rung for rung in _LADDER if least <= rung < step), step]


def schedule(given: str | Schedule) -> Schedule:
    """The schedule that somebody wrote down either way."""
    return given if isinstance(given, Schedule) else Schedule.parse(given)
