"""What tests of the bus share: events, a look into queues from outside, and waiting for something to become true."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import aio_pika
import aiormq.exceptions
import pika
import pytest
from pydantic import BaseModel

from meshkit.embedded import AmqpServer
from meshkit.messaging.events import event
from meshkit.rabbitmq import RabbitBus

QUICK = "20ms, 50ms*2"
QUEUE = "course-service.user-created"


@event("user.created", exchange="user-events")
class UserCreated(BaseModel):
    number: int


@event("course.granted", exchange="course-events")
class CourseGranted(BaseModel):
    number: int


class MakeBus(Protocol):
    """Makes a bus that the test's end closes."""

    def __call__(self, url: str | None = None, service: str = "course-service", **options: Any) -> RabbitBus: ...


@dataclass(frozen=True)
class Broker:
    """Where a broker is, and the server itself where it is the embedded one."""

    url: str
    server: AmqpServer | None


embedded = pytest.mark.parametrize("broker", ["embedded"], indirect=True)
"""For tests that need a broker which misbehaves on request."""


async def until(true: Callable[[], object], *, within: float = 15.0) -> None:
    """Return once `true()` holds."""
    async with asyncio.timeout(within):
        while not true():  # noqa: ASYNC110 - of things outside, nobody tells
            await asyncio.sleep(0.005)


class Outside:
    """Somebody else's connection to the broker, to look and to make trouble."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection: aio_pika.abc.AbstractConnection | None = None

    async def channel(self) -> aio_pika.abc.AbstractChannel:
        if self._connection is None or self._connection.is_closed:
            self._connection = await aio_pika.connect(self.url)
        return await self._connection.channel()

    async def declare(self, queue: str, **arguments: Any) -> None:
        channel = await self.channel()
        given = {f"x-{name.replace('_', '-')}": value for name, value in arguments.items()}
        await channel.declare_queue(queue, durable=True, arguments=given)
        await channel.close()

    async def bind(self, queue: str, exchange: str, key: str) -> None:
        """A queue of somebody else's for events of one kind."""
        channel = await self.channel()
        await channel.declare_exchange(exchange, "topic", durable=True)
        declared = await channel.declare_queue(queue, durable=True, arguments={"x-queue-type": "quorum"})
        await declared.bind(exchange, key)
        await channel.close()

    async def publish(self, body: bytes, *, queue: str = "", exchange: str = "", **properties: Any) -> None:
        channel = await self.channel()
        message = aio_pika.Message(body, **{"content_type": "application/json", **properties})
        target = await channel.get_exchange(exchange, ensure=False) if exchange else channel.default_exchange
        await target.publish(message, routing_key=queue)
        await channel.close()

    async def publish_without_id(self, body: bytes, *, queue: str) -> None:
        """As a client does that sets no message id; aio-pika always sets one."""

        def send() -> None:
            connection = pika.BlockingConnection(pika.URLParameters(self.url))
            connection.channel().basic_publish("", queue, body)
            connection.close()

        await asyncio.to_thread(send)

    async def depth(self, queue: str) -> int:
        """How many messages are ready in a queue; -1 where there is none."""
        channel = await self.channel()
        try:
            declared = await channel.declare_queue(queue, passive=True)
        except aiormq.exceptions.ChannelNotFoundEntity:
            return -1
        await channel.close()
        return declared.declaration_result.message_count or 0

    async def wait_for(self, queue: str, count: int, *, within: float = 15.0) -> None:
        """Return once so many messages are ready in a queue."""
        async with asyncio.timeout(within):
            while await self.depth(queue) != count:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.02)

    async def take(self, queue: str) -> list[aio_pika.abc.AbstractIncomingMessage]:
        """Take all messages out of a queue."""
        channel = await self.channel()
        source = await channel.get_queue(queue, ensure=False)
        taken = []
        while (message := await source.get(no_ack=True, fail=False)) is not None:
            taken.append(message)
        await channel.close()
        return taken

    async def delete(self, queue: str) -> None:
        channel = await self.channel()
        await channel.queue_delete(queue)
        await channel.close()

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()
