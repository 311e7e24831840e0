"""The usual policies, in their usual order, around a function that does nothing; with the recorder, without a tracer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import cast

import circuitbreaker
from prometheus_client import CollectorRegistry

import meshkit
from benchmarks import Row, Sample, each_async
from meshkit.policies.presets import messaging
from meshkit.telemetry import recorder

ROWS = (
    Row(what="standard pipeline", against="circuitbreaker, closed", target=9),
    # What each part of it adds: the pipeline with that part left out.
    *(
        Row(what=f"standard pipeline, no {part}", against="circuitbreaker, closed", target=None)
        for part in ("total", "retry", "breaker", "bulkhead", "attempt timeout")
    ),
    Row(what="messaging pipeline", against="circuitbreaker, closed", target=None),
    Row(what="empty pipeline", against="circuitbreaker, closed", target=None),
    Row(what="standard pipeline, wrapped client", against="circuitbreaker, closed", target=None),
    # A call that has to wait, if only for a turn of the loop, is one for which a timer is set.
    Row(what="standard pipeline, one wait", against="circuitbreaker, closed, one wait", target=None),
)


async def _nothing() -> None: ...


async def _waits() -> None:
    await asyncio.sleep(0)


class _Client:
    async def nothing(self) -> None: ...


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    registry = CollectorRegistry()
    recorder.install(registry)
    standard = meshkit.standard("bench")
    without = {
        "total": meshkit.standard("bench", total=None),
        "retry": meshkit.standard("bench", retry=None),
        "breaker": meshkit.standard("bench", breaker=None),
        "bulkhead": meshkit.standard("bench", bulkhead=None),
        "attempt timeout": meshkit.standard("bench", attempt_timeout=None),
    }
    wrapped = meshkit.wrap(_Client(), standard)

    def theirs(fn: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
        # What it says of the type of what it makes holds for all that it can decorate at once.
        return cast("Callable[[], Awaitable[object]]", circuitbreaker.CircuitBreaker(name="bench")(fn))

    yield {
        "standard pipeline": each_async(standard(_nothing)),
        **{f"standard pipeline, no {part}": each_async(made(_nothing)) for part, made in without.items()},
        "messaging pipeline": each_async(messaging("bench")(_nothing)),
        "empty pipeline": each_async(meshkit.Pipeline("empty")(_nothing)),
        "standard pipeline, wrapped client": each_async(lambda: wrapped.nothing()),
        "standard pipeline, one wait": each_async(standard(_waits)),
        "circuitbreaker, closed": each_async(theirs(_nothing)),
        "circuitbreaker, closed, one wait": each_async(theirs(_waits)),
    }
    recorder.uninstall(registry)
