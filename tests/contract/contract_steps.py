"""Steps that the contract tests share: put, take, count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage, AbstractQueue

Connect = Callable[..., Awaitable[AbstractConnection]]
Declare = Callable[..., Awaitable[AbstractQueue]]


async def put(channel: AbstractChannel, queue: str, *bodies: bytes, **properties: Any) -> None:
    """Publish to a queue by its name, confirmed and mandatory, one after the other."""
    for body in bodies:
        await channel.default_exchange.publish(aio_pika.Message(body, **properties), queue)


async def take(queue: AbstractQueue, within: float = 5.0) -> AbstractIncomingMessage:
    """The next message, unacked; fails where none comes in time."""
    until = time.monotonic() + within
    while True:
        message = await queue.get(fail=False)
        if message is not None:
            return message
        assert time.monotonic() < until, f"nothing came to {queue.name} within {within} s"
        await asyncio.sleep(0.01)


async def take_bodies(queue: AbstractQueue, count: int) -> list[bytes]:
    """The bodies of the next messages, acked."""
    bodies = []
    for _ in range(count):
        message = await take(queue)
        await message.ack()
        bodies.append(message.body)
    return bodies


async def ready(channel: AbstractChannel, queue: str) -> int:
    """How many messages are ready, by a passive declare."""
    return (await channel.declare_queue(queue, passive=True)).declaration_result.message_count or 0


async def until_ready(channel: AbstractChannel, queue: str, count: int, within: float = 5.0) -> None:
    """Wait until so many are ready; fails where they do not become so many in time."""
    until = time.monotonic() + within
    while (found := await ready(channel, queue)) != count:
        assert time.monotonic() < until, f"{queue} has {found} messages ready, not {count}, after {within} s"
        await asyncio.sleep(0.01)


async def ignore(message: AbstractIncomingMessage) -> None:
    """A consumer's callback that does nothing, so the message stays unacked."""
