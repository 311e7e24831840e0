"""What every broker must do for meshkit, written once: each test runs on the embedded server and on RabbitMQ."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractQueue
from contract_steps import Connect, Declare

from meshkit.embedded import AmqpServer


@pytest.fixture(params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.real("rabbitmq"))])
async def broker(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The URL of an empty broker."""
    if request.param == "embedded":
        async with AmqpServer() as server:
            yield server.url
    else:
        yield request.getfixturevalue("rabbitmq_url")


@pytest.fixture
async def connect(broker: str) -> AsyncIterator[Connect]:
    """Opens connections, and closes those that are left at the end."""
    opened: list[AbstractConnection] = []

    async def open_one(**properties: Any) -> AbstractConnection:
        connection = await aio_pika.connect(broker, client_properties=properties)
        opened.append(connection)
        return connection

    yield open_one
    for connection in opened:
        await connection.close()


@pytest.fixture
async def channel(connect: Connect) -> AbstractChannel:
    """A channel with confirms, on a connection of its own; an unroutable publish raises."""
    return await (await connect()).channel(on_return_raises=True)


@pytest.fixture
def declare(channel: AbstractChannel) -> Declare:
    """Declares a durable queue from keyword arguments: `message_ttl=5` is `x-message-ttl: 5`."""

    async def queue(name: str, **arguments: Any) -> AbstractQueue:
        given = {f"x-{key.replace('_', '-')}": value for key, value in arguments.items()}
        return await channel.declare_queue(name, durable=True, arguments=given)

    return queue
