"""A contender in a process of its own, for what changes a whole process: instrumentation, a package that is not there, a global provider.

A bench that wants it has ``async def work(contender, *arguments)``, an async context manager that gives ``run(count)``: a coroutine function
that does the operation ``count`` times. ``worker(...)`` is the sample; only the worker's own processor time counts. What has to be there
before so many operations can be done, a queue with so many messages, is filled by ``Steps.prepare(count)``, which does not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

from benchmarks import Sample

# How long one round of a worker takes, in processor seconds: an operation of these is a hundred microseconds and more.
_ROUND = 0.25

Run = Callable[[int], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What ``work`` gives where a round needs something of its own: ``prepare(count)``, uncounted, then ``run(count)``."""

    prepare: Run
    run: Run


@contextlib.contextmanager
def worker(bench: str, contender: str, *arguments: str, prelude: str = "") -> Iterator[Sample]:
    """A process that runs one contender of ``benchmarks.<bench>``; ``prelude`` is code that it runs before anything is imported."""
    code = f"{prelude}\nfrom benchmarks._worker import serve\nserve()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, bench, contender, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def run(count: int) -> float:
        requests.write(f"{count}\n")
        requests.flush()
        answer = answers.readline()
        if not answer:
            raise RuntimeError(f"the worker for {contender!r} ended; its own lines above say why")
        return float(answer)

    count = 0

    def sample() -> float:
        nonlocal count
        if count == 0:
            count = 16
            while run(count) < _ROUND / 4:
                count *= 2
            count *= 4
        return run(count) / count

    try:
        yield sample
    finally:
        requests.close()
        process.wait()
        answers.close()


def serve() -> None:
    """The worker's side: a count comes in, the processor seconds that it took go out, until the pipe ends."""
    bench, contender, *arguments = sys.argv[1:]
    asyncio.run(_serve(bench, contender, arguments))


async def _serve(bench: str, contender: str, arguments: list[str]) -> None:
    async with importlib.import_module(f"benchmarks.{bench}").work(contender, *arguments) as given:
        prepare, run = (given.prepare, given.run) if isinstance(given, Steps) else (None, given)
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            if prepare is not None:
                await prepare(int(line))
            # The collector stays on, as it is in a service; what earlier rounds left is not this one's.
            gc.collect()
            before = time.process_time()
            await run(int(line))
            print(time.process_time() - before, flush=True)
