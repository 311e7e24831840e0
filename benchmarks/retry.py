"""A retry around a function: where nothing fails, and with two failures before the success."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping

import stamina
import tenacity

import meshkit
from benchmarks import Row, Sample, each_async

ROWS = (
    Row(what="meshkit retry, nothing fails", against="hand-written loop, nothing fails", target=1.4),
    Row(what="meshkit retry, two failures", against="hand-written loop, two failures", target=3.5),
    Row(what="tenacity, nothing fails", against="hand-written loop, nothing fails", target=None),
    Row(what="stamina, nothing fails", against="hand-written loop, nothing fails", target=None),
    Row(what="tenacity, two failures", against="hand-written loop, two failures", target=None),
    Row(what="stamina, two failures", against="hand-written loop, two failures", target=None),
)

Fn = Callable[[], Awaitable[object]]


async def _nothing() -> None: ...


def _fails_twice() -> Fn:
    calls = 0

    async def flaky() -> None:
        nonlocal calls
        calls += 1
        if calls % 3:
            raise OSError

    return flaky


def _by_hand(fn: Fn) -> Fn:
    async def call() -> object:
        for attempt in range(3):
            try:
                return await fn()
            except OSError:
                if attempt == 2:
                    raise
                await asyncio.sleep(0)
        raise AssertionError

    return call


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    ours = meshkit.Retry(on=OSError, attempts=3, backoff=meshkit.Backoff(first=0, jitter=lambda longest: longest))
    pipeline = meshkit.Pipeline("bench", ours)
    decorators: dict[str, Callable[[Fn], Fn]] = {
        "hand-written loop": _by_hand,
        "meshkit retry": pipeline,
        "tenacity": lambda fn: tenacity.retry(
            retry=tenacity.retry_if_exception_type(OSError),
            stop=tenacity.stop_after_attempt(3),
            wait=tenacity.wait_none(),
        )(fn),
        "stamina": lambda fn: stamina.retry(on=OSError, attempts=3, wait_initial=0, wait_max=0, wait_jitter=0)(fn),
    }
    # Its default hooks write a log line a retry, which is not what is compared.
    stamina.instrumentation.set_on_retry_hooks([])
    samples: dict[str, Sample] = {}
    for name, decorate in decorators.items():
        samples[f"{name}, nothing fails"] = each_async(decorate(_nothing))
        samples[f"{name}, two failures"] = each_async(decorate(_fails_twice()))
    try:
        yield samples
    finally:
        stamina.instrumentation.set_on_retry_hooks(None)
