"""For benches that take from a queue: a broker, messages to take, and a way to take exactly so many of them."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractQueue

from meshkit import embedded
from meshkit.testing import servers

# The prefetch of every contender, and how many messages it has in hand between rounds.
WINDOW = 100

# A round whose messages do not come within so many seconds ends the bench.
_LONGEST_ROUND = 120.0
_AT_ONCE = 200


@contextlib.contextmanager
def broker() -> Iterator[str]:
    """The URL of a RabbitMQ of one's own, or of the embedded server where RabbitMQ is not installed."""
    if servers.available()["rabbitmq"] is None:
        with embedded.run_in_thread() as stand_in:
            yield stand_in.url
    else:
        with servers.rabbitmq() as server:
            yield server.url


class Source:
    """A queue to take from, and the messages that go into it; a connection of its own."""

    def __init__(self, queue: AbstractQueue, headers: Mapping[str, Any]) -> None:
        self._queue = queue
        self._headers = dict(headers)

    @property
    def name(self) -> str:
        return self._queue.name

    async def fill(self, count: int) -> None:
        """Put so many messages into it, each confirmed, as a traced producer sends them."""
        exchange = self._queue.channel.default_exchange
        left = count
        while left > 0:
            batch = min(left, _AT_ONCE)
            await asyncio.gather(*(exchange.publish(self._message(), self.name) for _ in range(batch)))
            left -= batch

    def _message(self) -> aio_pika.Message:
        identity = uuid.uuid4().hex
        return aio_pika.Message(
            b"x" * 256,
            message_id=identity,
            type="bench.happened",
            content_type="text/plain",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            headers={"traceparent": f"00-{identity}-{identity[:16]}-01", **self._headers},
        )

    async def purge(self, queue: str) -> None:
        """Empty another queue, so that what was moved in one round does not weigh on the next."""
        await (await self._queue.channel.get_queue(queue)).purge()


@contextlib.asynccontextmanager
async def source(
    url: str, name: str, arguments: Mapping[str, Any], *, headers: Mapping[str, Any] | None = None
) -> AsyncIterator[Source]:
    """Declare the queue; ``headers`` come with each of its messages beside the trace context."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        yield Source(await channel.declare_queue(name, durable=True, arguments=dict(arguments)), headers or {})


class Gate:
    """Lets exactly so many deliveries through a handler that awaits ``passing()`` first.

    Before and after, the window is full of deliveries that wait here. The broker sends the next one only for one that was settled, so when
    ``count`` were let through and the window is full again, ``count`` were received, handled and acknowledged: no more, and no less.
    """

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(0)
        self._arrived = 0
        self._let_in = 0
        self._full = asyncio.Event()

    async def passing(self) -> None:
        self._arrived += 1
        if self._arrived >= self._let_in + WINDOW:
            self._full.set()
        await self._places.acquire()

    async def let(self, count: int) -> None:
        """Let so many through; so many more must lie in the queue."""
        self._let_in += count
        if self._arrived < self._let_in + WINDOW:
            self._full.clear()
        for _ in range(count):
            self._places.release()
        async with asyncio.timeout(_LONGEST_ROUND):
            await self._full.wait()

    def open(self) -> None:
        """Let what is still in hand through, so that the consumer can end."""
        for _ in range(WINDOW):
            self._places.release()


@contextlib.asynccontextmanager
async def taking(source: Source, gate: Gate) -> AsyncIterator[None]:
    """Around the rounds of a consumer that has just begun: fills its window, and waits until it has come up to speed."""
    # meshkit begins with one message in hand, and has doubled it up to the window after as many in all; twice that to spare.
    warm = 4 * WINDOW
    await source.fill(warm + WINDOW)
    await gate.let(warm)
    try:
        yield
    finally:
        gate.open()


@contextlib.asynccontextmanager
async def bare_channel(url: str) -> AsyncIterator[AbstractChannel]:
    """A channel as every tutorial opens it, with the window as its prefetch."""
    async with await aio_pika.connect_robust(url) as connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        await channel.set_qos(prefetch_count=WINDOW)
        yield channel
