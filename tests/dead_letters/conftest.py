"""A broker of each kind, with a queue and its dead-letter queue on it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from dlq_steps import declare

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
async def channel(broker: str) -> AsyncIterator[AbstractChannel]:
    """A channel of somebody else's; queue and dead-letter queue are there."""
    connection = await aio_pika.connect(broker)
    channel = await connection.channel(on_return_raises=True)
    await declare(channel)
    yield channel
    await connection.close()
