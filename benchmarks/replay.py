"""A message moved from one quorum queue to another, confirmed before it is acknowledged: replay, retry hop, bare mover."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Mapping

import aio_pika
from aio_pika.abc import AbstractIncomingMessage

from benchmarks import Row, Sample
from benchmarks._queues import WINDOW, Gate, Source, bare_channel, broker, source, taking
from benchmarks._worker import Steps, worker

_REPLAY = "meshkit replay, counted"
_REPLAY_TRACED = "meshkit replay, traced and counted"
_MOVER = "bare mover of dead letters"
_MOVER_ONE = "bare mover of dead letters, one by one"
_HOP = "meshkit retry hop, traced and counted"
_HOP_MOVER = "bare mover"

ROWS = (
    Row(what=_REPLAY, against=_MOVER, target=0.8),
    Row(what=_HOP, against=_HOP_MOVER, target=1.0),
    Row(what=_REPLAY_TRACED, against=_MOVER, target=None),
    Row(what=_MOVER_ONE, against=_MOVER, target=None),
)

# Each contender takes from a queue of its own; a dead letter goes back to the queue whose name is that without `.dlq`.
_QUEUES = {
    _REPLAY: "bench-replay.dlq",
    _REPLAY_TRACED: "bench-replay-traced.dlq",
    _MOVER: "bench-mover.dlq",
    _MOVER_ONE: "bench-mover-one.dlq",
    _HOP: "bench-hop",
    _HOP_MOVER: "bench-hop-mover",
}
# How meshkit declares a dead-letter queue, which a replay makes sure of.
_QUORUM = {"x-queue-type": "quorum", "x-delivery-limit": 2_000_000_000}
# Short, so that what was moved in the last round does not weigh on the next.
_SHORT = {"x-queue-type": "quorum", "x-max-length": 1000}
_RUNG = "meshkit.delay.1d"

# What a consumer of meshkit writes onto a message that it gives up.
_DEAD = {
    "meshkit-attempt": "10",
    "meshkit-reason": "retries_exhausted",
    "meshkit-error-type": "ValueError",
    "meshkit-error-message": "the amount is no number",
    "meshkit-error-stack": "Traceback (most recent call last):\n" + '  File "payments.py", line 12, in charge\n' * 12,
    "meshkit-error-fingerprint": "0123456789abcdef",
    "meshkit-exchange": "bench-events",
    "meshkit-routing-key": "bench.happened",
    "meshkit-first-published-at": "2026-01-02T03:04:05.678Z",
    "meshkit-first-failed-at": "2026-01-02T03:04:05.690Z",
    "meshkit-last-failed-at": "2026-01-02T03:34:05.690Z",
    "meshkit-dead-lettered-at": "2026-01-02T03:34:05.700Z",
    "meshkit-service": "bench",
    "meshkit-host": "bench-0",
}


@contextlib.asynccontextmanager
async def work(contender: str, url: str) -> AsyncIterator[Steps]:
    name = _QUEUES[contender]
    if contender == _HOP:
        async with source(url, name, _QUORUM) as queue, _hop(url, queue) as steps:
            yield steps
        return
    if contender == _HOP_MOVER:
        target, headers = f"{name}-moved", None
    else:
        target = name.removesuffix(".dlq")
        headers = {**_DEAD, "meshkit-queue": target}
    async with source(url, target, _SHORT), source(url, name, _QUORUM, headers=headers) as queue:
        if contender in (_REPLAY, _REPLAY_TRACED):
            moving = _replay(url, queue, traced=contender == _REPLAY_TRACED)
        else:
            moving = _bare(url, queue, target, one_by_one=contender == _MOVER_ONE)
        async with moving as steps:
            yield steps


@contextlib.asynccontextmanager
async def _bare(url: str, queue: Source, target: str, *, one_by_one: bool) -> AsyncIterator[Steps]:
    gate = Gate()
    turn = asyncio.Lock() if one_by_one else contextlib.nullcontext()

    async def move(message: AbstractIncomingMessage) -> None:
        await gate.passing()
        async with turn:
            copy = aio_pika.Message(
                message.body,
                headers=message.headers,
                content_type=message.content_type,
                delivery_mode=message.delivery_mode,
                message_id=message.message_id,
                type=message.type,
            )
            await channel.default_exchange.publish(copy, target)
            await message.ack()

    async with bare_channel(url) as channel:
        await (await channel.get_queue(queue.name)).consume(move)
        async with taking(queue, gate):
            yield Steps(prepare=queue.fill, run=gate.let)


@contextlib.asynccontextmanager
async def _replay(url: str, queue: Source, *, traced: bool) -> AsyncIterator[Steps]:
    from benchmarks import _telemetry
    from meshkit.rabbitmq.dead_letters import DeadLetters

    if traced:
        _telemetry.everything_on()
    else:
        _telemetry.metrics_on()
    async with contextlib.AsyncExitStack() as stack:
        letters: DeadLetters

        async def prepare(count: int) -> None:
            # One for each round, as each command has its own.
            nonlocal letters
            await stack.aclose()
            letters = await stack.enter_async_context(DeadLetters(url))
            await queue.fill(count)

        async def run(count: int) -> None:
            receipt = await letters.replay(queue.name)
            if len(receipt.replayed) != count or receipt.left:
                raise RuntimeError(f"of {count} dead letters {len(receipt.replayed)} were replayed; {receipt.stopped}")

        yield Steps(prepare=prepare, run=run)


@contextlib.asynccontextmanager
async def _hop(url: str, queue: Source) -> AsyncIterator[Steps]:
    from benchmarks import _telemetry
    from meshkit.messaging.schedule import Schedule
    from meshkit.rabbitmq import consume

    gate = Gate()

    async def refuse(message: AbstractIncomingMessage) -> None:
        await gate.passing()
        raise ValueError("the amount is no number")

    async def prepare(count: int) -> None:
        await queue.purge(_RUNG)
        await queue.fill(count)

    _telemetry.everything_on()
    # The line about each failure is made, and then dropped, as the spans are.
    logging.getLogger("meshkit").addHandler(logging.NullHandler())
    # One rung, from which nothing comes back while this runs.
    retry = Schedule(steps=(86_400.0,) * 3, jitter=0)
    consumer = await consume(queue.name, refuse, retry=retry, url=url, service="bench", prefetch=WINDOW)
    try:
        async with taking(queue, gate):
            yield Steps(prepare=prepare, run=gate.let)
    finally:
        await consumer.close()


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    with broker() as url, contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(worker("replay", name, url)) for name in _QUEUES}
