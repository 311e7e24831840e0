"""The usual policies, in their usual order, around a function that does nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import cast

import circuitbreaker

import meshkit
from benchmarks import Row, Sample, each_async

ROWS = (
    Row(what="standard pipeline", against="circuitbreaker, closed", target=9),
    Row(what="empty pipeline", against="circuitbreaker, closed", target=None),
)


async def _nothing() -> None: ...


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    standard = meshkit.Pipeline(
        "bench",
        meshkit.Timeout(total=30),
        meshkit.Retry(attempts=3),
        meshkit.CircuitBreaker("bench"),
        meshkit.Timeout(5),
    )
    empty = meshkit.Pipeline("empty")
    # What it says of the type of what it makes holds for all that it can decorate at once.
    theirs = cast("Callable[[], Awaitable[object]]", circuitbreaker.CircuitBreaker(name="bench")(_nothing))
    yield {
        "standard pipeline": each_async(standard(_nothing)),
        "empty pipeline": each_async(empty(_nothing)),
        "circuitbreaker, closed": each_async(theirs),
    }
