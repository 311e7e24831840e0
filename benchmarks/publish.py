"""A typed event published to RabbitMQ with confirms, 100 in flight, through a topic exchange into a quorum queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import aio_pika
import pydantic

from benchmarks import Row, Sample
from benchmarks._queues import broker
from benchmarks._worker import worker

ROWS = (Row(what="meshkit publish, traced and counted", against="bare aio-pika publish", target=1.35),)

_IN_FLIGHT = 100
_EXCHANGE = "bench-events"
_KEY = "bench.happened"


class Happened(pydantic.BaseModel):
    number: int
    text: str


_EVENT = Happened(number=1, text="x" * 220)


@contextlib.asynccontextmanager
async def work(contender: str, url: str) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    async with contextlib.AsyncExitStack() as stack:
        publish = await (_meshkit if contender.startswith("meshkit") else _bare)(url, stack)

        async def one_after_the_other(numbers: Iterator[int]) -> None:
            for _ in numbers:
                await publish()

        async def run(count: int) -> None:
            # All take from the same count, so that so many are in flight until the last ones.
            numbers = iter(range(count))
            await asyncio.gather(*(one_after_the_other(numbers) for _ in range(_IN_FLIGHT)))

        yield run


async def _bare(url: str, stack: contextlib.AsyncExitStack) -> Callable[[], Awaitable[object]]:
    connection = await stack.enter_async_context(await aio_pika.connect_robust(url))
    channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
    exchange = await channel.get_exchange(_EXCHANGE)

    async def publish() -> object:
        body = _EVENT.model_dump_json().encode()
        message = aio_pika.Message(
            body, content_type="application/json", delivery_mode=aio_pika.DeliveryMode.PERSISTENT
        )
        return await exchange.publish(message, _KEY)

    return publish


async def _meshkit(url: str, stack: contextlib.AsyncExitStack) -> Callable[[], Awaitable[object]]:
    import meshkit
    from benchmarks import _telemetry
    from meshkit.rabbitmq import RabbitBus

    _telemetry.everything_on()
    meshkit.event(_KEY, exchange=_EXCHANGE)(Happened)
    bus = await stack.enter_async_context(RabbitBus(url, service="bench"))
    return lambda: bus.publish(_EVENT)


async def _declare(url: str) -> None:
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        exchange = await channel.declare_exchange(_EXCHANGE, "topic", durable=True)
        # Short, so that what was published in the last round does not weigh on the next.
        arguments: dict[str, Any] = {"x-queue-type": "quorum", "x-max-length": 1000}
        queue = await channel.declare_queue("bench.happened", durable=True, arguments=arguments)
        await queue.bind(exchange, _KEY)


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    with broker() as url, contextlib.ExitStack() as stack:
        asyncio.run(_declare(url))
        names = ("bare aio-pika publish", "meshkit publish, traced and counted")
        yield {name: stack.enter_context(worker("publish", name, url)) for name in names}
