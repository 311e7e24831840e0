"""A circuit breaker that decorates a function which does nothing: closed, and open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import cast

import circuitbreaker
import pybreaker

import meshkit
from benchmarks import Row, Sample, each_async

ROWS = (
    Row(what="meshkit breaker, closed", against="circuitbreaker, closed", target=0.55),
    Row(what="meshkit breaker, open", against="bare raise", target=1.5),
    Row(what="bare call", against="circuitbreaker, closed", target=None),
    Row(what="pybreaker calling(), closed", against="circuitbreaker, closed", target=None),
    Row(what="circuitbreaker, open", against="bare raise", target=None),
    Row(what="pybreaker calling(), open", against="bare raise", target=None),
)

Fn = Callable[[], Awaitable[object]]


class _Refused(Exception):
    pass


async def _nothing() -> None: ...


async def _raises() -> None:
    raise _Refused


def _rejected(fn: Callable[[], Awaitable[object]]) -> Sample:
    async def once() -> None:
        try:
            await fn()
        except Exception:
            return
        raise AssertionError("the call was let through")

    return each_async(once)


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    ours = meshkit.CircuitBreaker("closed")
    isolated = meshkit.CircuitBreaker("open", min_calls=1, window=1, open_for=3600)
    isolated.core.open()

    # What it says of the types of what it makes holds for all that it can decorate at once.
    theirs = cast("Fn", circuitbreaker.CircuitBreaker(failure_threshold=5, name="closed")(_nothing))
    theirs_open = circuitbreaker.CircuitBreaker(failure_threshold=5, recovery_timeout=3600, name="open")
    guarded = cast("Fn", theirs_open(_raises))

    async def open_theirs() -> None:
        for _ in range(5):
            with contextlib.suppress(_Refused):
                await guarded()

    asyncio.run(open_theirs())

    stock = pybreaker.CircuitBreaker()
    stock_open = pybreaker.CircuitBreaker(reset_timeout=3600)
    stock_open.open()

    async def through_stock() -> None:
        with stock.calling():
            await _nothing()

    async def through_open_stock() -> None:
        with stock_open.calling():
            await _nothing()

    yield {
        "bare call": each_async(_nothing),
        "circuitbreaker, closed": each_async(theirs),
        "meshkit breaker, closed": each_async(ours(_nothing)),
        "pybreaker calling(), closed": each_async(through_stock),
        "bare raise": _rejected(_raises),
        "meshkit breaker, open": _rejected(isolated(_nothing)),
        "circuitbreaker, open": _rejected(guarded),
        "pybreaker calling(), open": _rejected(through_open_stock),
    }
