"""A message of RabbitMQ consumed and acknowledged, 100 in hand, by a handler that does nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping

from aio_pika.abc import AbstractIncomingMessage

from benchmarks import Row, Sample
from benchmarks._queues import WINDOW, Gate, Source, bare_channel, broker, source, taking
from benchmarks._worker import Steps, worker

_BARE = "bare aio-pika consumer, ack()"
_BARE_PROCESS = "bare aio-pika consumer, process()"
_MESHKIT = "meshkit consume and ack, traced and counted"

ROWS = (
    Row(what=_MESHKIT, against=_BARE, target=1.05),
    Row(what=_BARE_PROCESS, against=_BARE, target=None),
)

_QUEUES = {_BARE: "bench-ack", _BARE_PROCESS: "bench-process", _MESHKIT: "bench-meshkit"}


@contextlib.asynccontextmanager
async def work(contender: str, url: str) -> AsyncIterator[Steps]:
    gate = Gate()
    async with source(url, _QUEUES[contender], {"x-queue-type": "classic"}) as queue:
        consumer = _meshkit(url, queue, gate) if contender == _MESHKIT else _bare(url, queue, gate, contender)
        async with consumer, taking(queue, gate):
            yield Steps(prepare=queue.fill, run=gate.let)


@contextlib.asynccontextmanager
async def _bare(url: str, queue: Source, gate: Gate, contender: str) -> AsyncIterator[None]:
    async def take(message: AbstractIncomingMessage) -> None:
        await gate.passing()
        await message.ack()

    async def take_in_process(message: AbstractIncomingMessage) -> None:
        async with message.process():
            await gate.passing()

    async with bare_channel(url) as channel:
        taken = await channel.get_queue(queue.name)
        await taken.consume(take if contender == _BARE else take_in_process)
        yield


@contextlib.asynccontextmanager
async def _meshkit(url: str, queue: Source, gate: Gate) -> AsyncIterator[None]:
    from benchmarks import _telemetry
    from meshkit.rabbitmq import consume

    async def take(message: AbstractIncomingMessage) -> None:
        await gate.passing()

    _telemetry.everything_on()
    consumer = await consume(queue.name, take, url=url, service="bench", prefetch=WINDOW)
    try:
        yield
    finally:
        await consumer.close()


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    with broker() as url, contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(worker("consume", name, url)) for name in _QUEUES}
