"""What the tests of dead letters share: queues as meshkit declares them, dead letters as its consumer writes them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from meshkit.messaging import headers as h
from meshkit.rabbitmq.topology import dead_letter_arguments, queue_arguments

QUEUE = "course-service.user-created"
DLQ = f"{QUEUE}.dlq"
TRACE = "0af7651916cd43dd8448eb211c80319c"
CREATED = f"00-{TRACE}-b7ad6b7169203331-01"
FAILED = f"00-{TRACE}-00f067aa0ba902b7-01"


async def declare(channel: AbstractChannel, queue: str = QUEUE) -> None:
    """A queue and its dead-letter queue."""
    await channel.declare_queue(queue, durable=True, arguments=queue_arguments(queue))
    await channel.declare_queue(f"{queue}.dlq", durable=True, arguments=dead_letter_arguments())


def dead_letter(message_id: str, **headers: Any) -> aio_pika.Message:
    """A dead letter as the consumer leaves it. Keywords replace headers: `replay_count="2"`."""
    written = {
        h.TRACEPARENT: CREATED,
        h.FIRST_PUBLISHED_AT: "2026-11-21T12:00:00.000Z",
        h.FIRST_FAILED_AT: "2026-11-21T12:00:01.000Z",
        h.LAST_FAILED_AT: "2026-11-21T12:30:00.000Z",
        h.DEAD_LETTERED_AT: f"2026-11-21T12:30:{sum(message_id.encode()) % 60:02d}.000Z",
        h.QUEUE: QUEUE,
        h.EXCHANGE: "user-events",
        h.ROUTING_KEY: "user.created",
        h.REASON: "retries_exhausted",
        h.ERROR_TYPE: "ValueError",
        h.ERROR_MESSAGE: "no such course",
        h.ERROR_STACK: "Traceback…\nValueError: no such course",
        h.ERROR_FINGERPRINT: "aaaa",
        h.FAILED_TRACEPARENT: FAILED,
        h.SERVICE: "course-service",
        h.VERSION: "1.2",
        h.HOST: "web-1",
        h.ATTEMPT: "10",
        h.DEADLINE: "2026-11-21T12:05:00.000Z",
        "theirs": "kept",
    }
    written |= {f"meshkit-{name.replace('_', '-')}": value for name, value in headers.items()}
    return aio_pika.Message(
        f'{{"id": "{message_id}"}}'.encode(),
        headers={name: value for name, value in written.items() if value is not None},
        message_id=message_id,
        type="user.created",
        content_type="application/json",
        correlation_id="c-1",
        app_id="user-service",
        delivery_mode=2,
    )


async def put(channel: AbstractChannel, *messages: aio_pika.Message, queue: str = DLQ) -> None:
    """Publish to a queue by its name, confirmed."""
    for message in messages:
        await channel.default_exchange.publish(message, queue)


async def take_all(channel: AbstractChannel, queue: str) -> list[AbstractIncomingMessage]:
    """All that is ready in a queue, in order, acked."""
    source = await channel.get_queue(queue)
    found = []
    while (message := await source.get(fail=False)) is not None:
        await message.ack()
        found.append(message)
    return found


async def ids(channel: AbstractChannel, queue: str) -> list[str]:
    """The ids of all that is in a queue, in order; it is empty afterwards."""
    return [message.message_id or "" for message in await take_all(channel, queue)]


async def depth(channel: AbstractChannel, queue: str) -> int:
    return (await channel.declare_queue(queue, passive=True)).declaration_result.message_count or 0


async def until_depth(channel: AbstractChannel, queue: str, count: int) -> None:
    """Wait until so many are ready; what was given back shows after a moment."""
    for _ in range(500):
        found = await depth(channel, queue)
        if found == count:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{queue} has {found} ready, not {count}")


def environment(**more: str) -> dict[str, str]:
    """The environment of a child process, without settings of whoever runs the tests."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("MESHKIT_", "OTEL_"))}
    return {**mine, **more}
