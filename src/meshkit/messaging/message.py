"""A message on its way out, and a delivery of one on its way in."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from meshkit.core.clock import Clock
from meshkit.core.scope import Handling
from meshkit.messaging import headers as h

_NAMES = uuid.UUID("6f2a0c9e-3f0b-5c49-9d0e-8d6f3a1b7c55")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message with its envelope, as it goes to a broker. It is always stored persistently.

    Attributes:
        message_id: stays the same over retries and replays.
        headers: plain values; own names are those of `meshkit.messaging.headers`.
        timestamp: when the producer says it was made.
        expiration: milliseconds as text, as AMQP has it; meshkit itself never sets one.
    """

    body: bytes
    message_id: str = ""
    type: str | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)
    content_type: str | None = None
    content_encoding: str | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    timestamp: datetime | None = None
    app_id: str | None = None
    priority: int | None = None
    expiration: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A message that arrived. What it says of itself is what it first came with, whatever rung it came back through.

    Attributes:
        queue: where it was taken from.
        exchange: where its producer published it; empty for the default exchange.
        routing_key: what its producer published it with.
        attempt: the number of this try, from 1.
        max_attempts: with which attempt the schedule ends.
        redelivered: the broker has handed it out before.
        delivery_count: how often it came back to the queue unsettled (a crash, a lost connection).
        first_published_at: seconds since the epoch, `None` where the message does not say.
        deadline: seconds since the epoch after which nobody wants it handled any more, `None` for never.
        replay_count: how often it was sent back from the dead-letter queue.
        raw: what the broker's library handed over.
    """

    message: Message
    queue: str
    exchange: str
    routing_key: str
    attempt: int = 1
    max_attempts: int = 1
    redelivered: bool = False
    delivery_count: int = 0
    first_published_at: float | None = None
    deadline: float | None = None
    replay_count: int = 0
    raw: object = field(default=None, repr=False, compare=False)

    @property
    def message_id(self) -> str:
        return self.message.message_id

    @property
    def body(self) -> bytes:
        return self.message.body

    @property
    def headers(self) -> Mapping[str, Any]:
        return self.message.headers

    def age(self, now: float) -> float | None:
        """Seconds since it was first published, at `now` (seconds since the epoch); never negative, since the clocks of
        two hosts differ. `None` where the message does not say."""
        return None if self.first_published_at is None else max(0.0, now - self.first_published_at)


def received(
    message: Message,
    *,
    queue: str,
    exchange: str,
    routing_key: str,
    redelivered: bool,
    max_attempts: int,
    raw: object = None,
) -> Delivery:
    """Make a delivery of what the broker handed over, with the first facts put back in place.

    Args:
        message: properties, headers and body as they came.
        exchange: where this copy was published: a rung's, for one that was retried.
        routing_key: what this copy was published with.

    Raises:
        EnvelopeError: a header of meshkit's holds what it cannot hold.
    """
    headers = message.headers
    if h.EXCHANGE in headers or h.ROUTING_KEY in headers:
        exchange = h.name(headers, h.EXCHANGE)
        routing_key = h.name(headers, h.ROUTING_KEY)
    published = h.time(headers, h.FIRST_PUBLISHED_AT)
    if published is None and message.timestamp is not None:
        published = message.timestamp.timestamp()
    return Delivery(
        message=message,
        queue=queue,
        exchange=exchange,
        routing_key=routing_key,
        attempt=h.number(headers, h.ATTEMPT, 1, least=1),
        max_attempts=max_attempts,
        redelivered=redelivered,
        delivery_count=delivery_count(headers),
        first_published_at=published,
        deadline=h.time(headers, h.DEADLINE),
        replay_count=h.number(headers, h.REPLAY_COUNT, 0, least=0),
        raw=raw,
    )


def delivery_count(headers: Mapping[str, Any]) -> int:
    """How often the broker says that the message came back unsettled; 0 where it does not say."""
    count = headers.get(h.DELIVERY_COUNT)
    return count if isinstance(count, int) and count > 0 else 0


def unread(message: Message, *, queue: str, exchange: str, routing_key: str, redelivered: bool) -> Delivery:
    """A delivery whose envelope cannot be read: what the broker itself says of it."""
    return Delivery(
        message=message,
        queue=queue,
        exchange=exchange,
        routing_key=routing_key,
        redelivered=redelivered,
        delivery_count=delivery_count(message.headers),
    )


def new_id(clock: Clock) -> str:
    """A new message id: a UUID of version 7 (RFC 9562), which databases like for keys, since later ones sort later."""
    millis = int(clock.time() * 1000)
    value = (millis & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10))
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


def derived_id(handling: Handling, kind: str) -> str:
    """The id of what a handler publishes: the same again when the message it handles is delivered again."""
    ordinal = handling.ordinal(kind)
    return str(uuid.uuid5(_NAMES, f"{handling.message_id}\n{handling.queue}\n{kind}\n{ordinal}"))
