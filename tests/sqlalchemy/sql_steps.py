"""What the tests of inbox and outbox share: a bus that writes down what it is told, and how to read a table."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from meshkit.messaging.message import Delivery, Message
from meshkit.sqlalchemy import outbox_table

Sessions = async_sessionmaker[AsyncSession]

effects = sa.Table("effects", sa.MetaData(), sa.Column("what", sa.String(100)))


class RecordingBus:
    """A bus on which an event is a text. `refuse` says what goes wrong with a message, if anything."""

    def __init__(self) -> None:
        self.published: list[Message] = []
        self.tried = 0
        self.refuse: Callable[[Message], Exception | None] = lambda message: None
        self.pause = 0.0

    def envelope(self, event: str, *, key: str | None = None) -> tuple[Message, str, str]:
        message = Message(
            body=event.encode(),
            message_id=str(uuid.uuid4()),
            type="said",
            headers={"traceparent": f"00-{uuid.uuid4().hex}-{uuid.uuid4().hex[:16]}-01", "raw": b"\xff", "n": 1},
            content_type="text/plain",
            timestamp=datetime(2026, 11, 21, tzinfo=UTC),
        )
        return message, "sayings", key or "said"

    async def publish_message(self, message: Message, exchange: str, routing_key: str) -> None:
        self.tried += 1
        await asyncio.sleep(self.pause)
        error = self.refuse(message)
        if error is not None:
            raise error
        self.published.append(message)

    @property
    def said(self) -> list[str]:
        return [message.body.decode() for message in self.published]


def delivery(message_id: str, queue: str = "course-service.user-created") -> Delivery:
    return Delivery(message=Message(body=b"", message_id=message_id), queue=queue, exchange="", routing_key=queue)


async def until(true: Callable[[], bool], within: float = 10.0) -> None:
    """Wait until something has happened; fails where it does not in time."""
    end = time.monotonic() + within
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.005)


async def waiting(engine: AsyncEngine) -> list[Any]:
    """The outbox's rows, in order."""
    async with engine.connect() as connection:
        return list((await connection.execute(sa.select(outbox_table).order_by(outbox_table.c.id))).all())


async def count(engine: AsyncEngine, table: sa.Table) -> int:
    async with engine.connect() as connection:
        return int(await connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0)
