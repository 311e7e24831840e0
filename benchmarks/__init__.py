"""What meshkit costs, as CPU ratios: `./run bench NAME [--json]`.

Each file of this folder is a bench: a docstring, the rows it declares (``ROWS``), and ``contenders()``, a context manager that starts what
is needed and gives a sample function per contender. The contenders are measured in turn, round by round, so that whatever else the
machine does meets all of them; a row's ratio is taken inside a round, and its median over the rounds is held against the target. What is
counted is processor time of the measured process, which does not move when other work takes the processors away for a while.

A bench may also have ``behaviour()``: tables, by name, of what its contenders do where a speed alone would say too little.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["MICROSECOND", "Row", "Sample", "compare", "each_async", "each_sync", "present"]

# One round of one contender: its processor seconds an operation.
Sample = Callable[[], float]

# How far over its target a median may lie and still meet it: what runs of one day differ by.
TOLERANCE = 0.1

# How long one round of one contender takes, in processor seconds: long against the clock's own step, short against the machine's moods.
_ROUND = 0.04

# For a row that is no ratio: ``against=MICROSECOND`` gives processor microseconds an operation.
MICROSECOND = "one microsecond"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``what`` ÷ ``against``, two contenders of the bench by name; a peer's row has no target."""

    what: str
    against: str
    target: float | None


def present(rows: Sequence[Row], contenders: Mapping[str, Sample]) -> list[Row]:
    """The rows whose contenders are there. Only one that has a target must be: another library may be missing here."""
    there = {*contenders, MICROSECOND}
    return [row for row in rows if row.target is not None or {row.what, row.against} <= there]


def compare(rows: Sequence[Row], contenders: Mapping[str, Sample], *, rounds: int) -> list[dict[str, object]]:
    """Measure all contenders in turn, ``rounds`` times, after one round that only warms up; one dict a row."""
    samples: dict[str, Sample] = {**contenders, MICROSECOND: lambda: 1e-6}
    needed = [name for name in samples if any(name in (row.what, row.against) for row in rows)]
    taken: dict[str, list[float]] = {name: [] for name in needed}
    for name in needed:
        samples[name]()
    for turn in range(rounds):
        # Each round begins with another contender, so that none always follows the same one.
        start = turn % len(needed)
        for name in needed[start:] + needed[:start]:
            taken[name].append(samples[name]())
    answers: list[dict[str, object]] = []
    for row in rows:
        ratios = [ours / theirs for ours, theirs in zip(taken[row.what], taken[row.against], strict=True)]
        answers.append(
            {
                "what": row.what,
                "against": row.against,
                "ratio": round(statistics.median(ratios), 4),
                "low": round(min(ratios), 4),
                "high": round(max(ratios), 4),
                "target": row.target,
            }
        )
    return answers


def met(answer: Mapping[str, object]) -> bool:
    """Whether a measured row meets its target; a row without one does."""
    target, ratio = answer["target"], answer["ratio"]
    return not isinstance(target, int | float) or (isinstance(ratio, int | float) and ratio <= target * (1 + TOLERANCE))


def each_async(operation: Callable[[], Awaitable[object]]) -> Sample:
    """A sample that awaits ``operation`` over and over on an event loop."""

    async def many(count: int) -> float:
        before = time.process_time()
        for _ in range(count):
            await operation()
        return time.process_time() - before

    return _many(lambda count: asyncio.run(many(count)))


def each_sync(operation: Callable[[], object]) -> Sample:
    """A sample that calls ``operation`` over and over."""

    def many(count: int) -> float:
        before = time.process_time()
        for _ in range(count):
            operation()
        return time.process_time() - before

    return _many(many)


def _many(run: Callable[[int], float]) -> Sample:
    count = 0

    def sample() -> float:
        nonlocal count
        gc.collect()
        gc.disable()
        try:
            if count == 0:
                # How many operations fill a round is found once, by doubling.
                count = 1
                while run(count) < _ROUND / 4:
                    count *= 2
                count *= 4
            return run(count) / count
        finally:
            gc.enable()

    return sample
