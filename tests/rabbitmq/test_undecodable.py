"""A header that the protocol allows and the library cannot read does not stop the consumer."""

from __future__ import annotations

import struct

import aiormq
import pytest
from aiormq.abc import ChannelFrame
from bus_steps import QUEUE, MakeBus, Outside, UserCreated, until
from pamqp import commands
from pamqp.header import ContentHeader

from meshkit.messaging.message import Delivery

FAR = (1 << 62).to_bytes(8)


async def publish_raw(url: str, body: bytes, properties: commands.Basic.Properties, *, was: bytes, now: bytes) -> None:
    """Publish a message with some bytes of its frames replaced by others of the same length."""
    assert len(was) == len(now)
    connection = await aiormq.connect(url)
    channel = await connection.channel(publisher_confirms=False)
    header = ContentHeader(properties=properties, body_size=len(body))
    publish = commands.Basic.Publish(exchange="", routing_key=QUEUE)
    made = ChannelFrame.marshall(channel.number, [publish, header, *channel._split_body(body)])
    assert was in made.payload
    drained = connection.loop.create_future()
    await channel.write_queue.put(
        ChannelFrame(payload=made.payload.replace(was, now), should_close=False, drain_future=drained)
    )
    await drained
    await connection.close()


@pytest.mark.parametrize(
    ("properties", "was", "now"),
    [
        ({"headers": {"when": 1 << 40}}, b"when" + b"l" + (1 << 40).to_bytes(8), b"when" + b"T" + FAR),
        ({"correlation_id": "Gruss"}, b"\x05Gruss", b"\x05Gr\xfc\xdfe"),
        ({"correlation_id": "u" * 200}, b"u" * 200, b"\xfc" * 200),
        ({"headers": {"greeting": "Gruss"}}, b"Gruss", b"Gr\xfc\xdfe"),
        ({"headers": {"many": ["Gruss"]}}, b"Gruss", b"Gr\xfc\xdfe"),
        ({"headers": {"wide": 1 << 40}}, b"l" + (1 << 40).to_bytes(8), b"d" + struct.pack(">d", 1e300)),
        ({"headers": {"meshkit-foo": "x" * 60_000}}, b"foo", b"bar"),
    ],
    ids=["timestamp", "text", "long-text", "header", "list", "double", "large"],
)
async def test_such_a_message_is_handled_like_others(
    make_bus: MakeBus, outside: Outside, properties: dict[str, object], was: bytes, now: bytes
):
    """It reaches the handler, is tried again, and ends as a dead letter; others are not touched by it."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        seen.append((event.number, delivery.attempt))
        if event.number == 1:
            raise OSError

    await bus.start()
    own = commands.Basic.Properties(message_id="1", content_type="application/json", delivery_mode=2, **properties)
    await publish_raw(outside.url, b'{"number": 1}', own, was=was, now=now)
    await bus.publish(UserCreated(number=2))
    await until(lambda: (2, 1) in seen)
    await outside.wait_for(f"{QUEUE}.dlq", 1)
    assert [(1, 1), (1, 2), (1, 3), (1, 4)] == [one for one in seen if one[0] == 1]
