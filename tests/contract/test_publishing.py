"""Publishing: confirms, returns, full queues, routing, and what arrives unchanged."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from aio_pika import ExchangeType, Message
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    DeliveryError,
    PublishError,
)
from contract_steps import Connect, Declare, put, ready, take, take_bodies
from pamqp import commands


async def test_confirms_what_it_has_stored(channel: AbstractChannel, declare: Declare):
    """A publish returns with an ack, and then the message is in the queue."""
    await declare("orders")

    confirm = await channel.default_exchange.publish(Message(b"1"), "orders")

    assert isinstance(confirm, commands.Basic.Ack)
    assert 1 == await ready(channel, "orders")


async def test_returns_what_no_queue_takes(channel: AbstractChannel):
    """A mandatory message without a queue comes back, with the names it was published with."""
    with pytest.raises(PublishError) as caught:
        await channel.default_exchange.publish(Message(b"lost?", message_id="7"), "nowhere")

    returned = caught.value.message
    assert (312, "NO_ROUTE", "nowhere") == (
        returned.delivery.reply_code,
        returned.delivery.reply_text,
        returned.delivery.routing_key,
    )
    assert b"lost?" == returned.body


async def test_confirms_what_nobody_wants(channel: AbstractChannel):
    """Without `mandatory` an unroutable message is confirmed and gone."""
    confirm = await channel.default_exchange.publish(Message(b"1"), "nowhere", mandatory=False)

    assert isinstance(confirm, commands.Basic.Ack)


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_nacks_when_full(channel: AbstractChannel, declare: Declare, kind: str):
    """A full queue with reject-publish answers a publish with a nack."""
    await declare("small", queue_type=kind, max_length=2, overflow="reject-publish")

    with pytest.raises(DeliveryError):
        # RabbitMQ's limit on a quorum queue is soft, so a few more than two may pass.
        await put(channel, "small", *(b"x" for _ in range(20)))


async def test_drops_the_oldest_when_full(channel: AbstractChannel, declare: Declare):
    """Without reject-publish a full queue makes room at its head, and a dead letter of what was there."""
    dead = await declare("small.dlq")
    small = await declare("small", max_length=2, dead_letter_exchange="", dead_letter_routing_key="small.dlq")

    await put(channel, "small", b"1", b"2", b"3")

    assert [b"2", b"3"] == await take_bodies(small, 2)
    letter = await take(dead)
    assert (b"1", "maxlen") == (letter.body, letter.headers["x-death"][0]["reason"])
    await letter.ack()


async def test_limits_by_bytes(channel: AbstractChannel, declare: Declare):
    """x-max-length-bytes counts bodies."""
    small = await declare("small", max_length_bytes=10)

    await put(channel, "small", b"aaaa", b"bbbb", b"cccc")

    assert [b"bbbb", b"cccc"] == await take_bodies(small, 2)


async def test_closes_the_channel_of_a_publish_to_no_exchange(connect: Connect):
    """A publish to an exchange that does not exist ends the channel with 404; the connection lives."""
    connection = await connect()
    channel = await connection.channel()
    exchange = await channel.get_exchange("missing", ensure=False)

    with pytest.raises(ChannelNotFoundEntity, match=r"no exchange 'missing' in vhost"):
        await exchange.publish(Message(b"1"), "key")

    assert not connection.is_closed


async def test_routes_by_topic(channel: AbstractChannel, declare: Declare):
    """`*` is one word, `#` any number, none too; two matching bindings are one copy."""
    exchange = await channel.declare_exchange("topics", ExchangeType.TOPIC)
    queues = {}
    for name, patterns in {
        "one": ["user.*"],
        "any": ["user.#"],
        "all": ["#", "user.created"],
        "middle": ["*.created.#"],
        "exact": ["user.created"],
    }.items():
        queues[name] = await declare(name)
        for pattern in patterns:
            await queues[name].bind(exchange, pattern)

    for key in ("user", "user.created", "user.created.v2", "course.created"):
        await exchange.publish(Message(key.encode()), key)

    assert {
        "one": [b"user.created"],
        "any": [b"user", b"user.created", b"user.created.v2"],
        "all": [b"user", b"user.created", b"user.created.v2", b"course.created"],
        "middle": [b"user.created", b"user.created.v2", b"course.created"],
        "exact": [b"user.created"],
    } == {name: await take_bodies(queue, await ready(channel, name)) for name, queue in queues.items()}


async def test_routes_by_headers(channel: AbstractChannel, declare: Declare):
    """A headers exchange compares all or any of the values a binding names."""
    exchange = await channel.declare_exchange("by-headers", ExchangeType.HEADERS)
    both, either = await declare("both"), await declare("either")
    await both.bind(exchange, "", arguments={"x-match": "all", "kind": "a", "size": 1})
    await either.bind(exchange, "", arguments={"x-match": "any", "kind": "a", "size": 1})

    await exchange.publish(Message(b"both", headers={"kind": "a", "size": 1}), "")
    await exchange.publish(Message(b"one", headers={"kind": "a", "size": 2}), "")
    with pytest.raises(PublishError):
        await exchange.publish(Message(b"none", headers={"kind": "b"}), "")

    assert [b"both"] == await take_bodies(both, await ready(channel, "both"))
    assert [b"both", b"one"] == await take_bodies(either, await ready(channel, "either"))


async def test_routes_over_exchanges(channel: AbstractChannel, declare: Declare):
    """An exchange bound to another passes on what it gets, in a ring too, and each queue gets one copy."""
    first = await channel.declare_exchange("first", ExchangeType.FANOUT)
    second = await channel.declare_exchange("second", ExchangeType.TOPIC)
    queue = await declare("end")
    await second.bind(first, "")
    await first.bind(second, "#")
    await queue.bind(second, "a.#")
    await queue.bind(first, "")

    await first.publish(Message(b"1"), "a.b")

    assert 1 == await ready(channel, "end")


async def test_falls_back_to_the_alternate_exchange(channel: AbstractChannel, declare: Declare):
    """What an exchange cannot route goes to its alternate exchange, and counts as routed."""
    await channel.declare_exchange("spare", ExchangeType.FANOUT)
    main = await channel.declare_exchange("main", ExchangeType.DIRECT, arguments={"alternate-exchange": "spare"})
    await (await declare("caught")).bind("spare", "")

    await main.publish(Message(b"1"), "unknown")

    assert 1 == await ready(channel, "caught")


async def test_refuses_an_internal_exchange(channel: AbstractChannel):
    """Nobody publishes to an internal exchange."""
    await channel.declare_exchange("inside", ExchangeType.FANOUT, internal=True)
    plain = await channel.get_underlay_channel()

    with pytest.raises(ChannelAccessRefused, match=r"cannot publish to internal exchange 'inside'"):
        await plain.basic_publish(b"1", exchange="inside")


async def test_copies_to_the_keys_of_cc_and_bcc(channel: AbstractChannel, declare: Declare):
    """CC and BCC route like the routing key; nobody sees BCC."""
    queues = [await declare(name) for name in ("to", "cc", "bcc")]

    await put(channel, "to", b"1", headers={"CC": ["cc"], "BCC": ["bcc"]})

    for queue in queues:
        message = await take(queue)
        assert {"CC": ["cc"]} == message.headers
        await message.ack()


async def test_keeps_every_property(channel: AbstractChannel, declare: Declare):
    """All properties arrive as they were sent."""
    queue = await declare("whole")
    sent = Message(
        b"body",
        content_type="application/json",
        content_encoding="utf-8",
        headers={"a": "b"},
        delivery_mode=2,
        priority=3,
        correlation_id="correlation",
        reply_to="replies",
        expiration=60,
        message_id="id-1",
        timestamp=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        type="user.created",
        user_id="guest",
        app_id="tests",
    )

    await channel.default_exchange.publish(sent, "whole")

    got = await take(queue)
    await got.ack()
    for name in ("content_type", "content_encoding", "headers", "delivery_mode", "priority", "correlation_id", "reply_to", "expiration", "message_id", "timestamp", "type", "user_id", "app_id"):  # fmt: skip
        assert (name, getattr(sent, name)) == (name, getattr(got, name))


async def test_keeps_every_type_of_header(channel: AbstractChannel, declare: Declare):
    """Headers of all types, nested ones too, arrive as they were sent."""
    queue = await declare("headers")
    headers = {
        "text": "grün",
        "true": True,
        "byte": -1,
        "short": 3_000,
        "int": 300_000,
        "long": 2**40,
        "float": 0.5,
        "decimal": Decimal("1.25"),
        "timestamp": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "nothing": None,
        "bytes": bytearray(b"\x00\xff"),
        "list": [1, "two", {"three": [3.0]}],
        "table": {"in": {"deep": True, "when": datetime(1999, 1, 1, tzinfo=UTC)}},
    }

    await put(channel, "headers", b"1", headers=headers)

    got = await take(queue)
    await got.ack()
    assert headers == got.headers


@pytest.mark.parametrize("size", [0, 1, 131_064, 131_065, 1_000_000])
async def test_keeps_a_body_of_any_size(channel: AbstractChannel, declare: Declare, size: int):
    """Bodies arrive whole, in as many frames as they need."""
    queue = await declare("bodies")
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)

    await put(channel, "bodies", body)

    got = await take(queue)
    await got.ack()
    assert body == got.body


async def test_confirms_many_in_flight(channel: AbstractChannel, declare: Declare):
    """A thousand publishes at once are each confirmed, and stored in their order."""
    queue = await declare("burst")
    bodies = [str(number).encode() for number in range(1000)]

    confirms = await asyncio.gather(*(channel.default_exchange.publish(Message(body), "burst") for body in bodies))

    assert {commands.Basic.Ack} == {type(confirm) for confirm in confirms}
    iterator = queue.iterator(no_ack=True)
    assert bodies == [(await iterator.__anext__()).body for _ in bodies]
    await iterator.close()


@pytest.mark.parametrize(
    ("properties", "complaint"),
    [
        ({"user_id": "somebody"}, "user_id property set to 'somebody' but authenticated user was 'guest'"),
        ({"reply_to": "amq.rabbitmq.reply-to"}, "fast reply consumer does not exist"),
    ],
)
async def test_refuses_properties_that_lie(channel: AbstractChannel, properties: dict[str, str], complaint: str):
    """Another's user id, and replies to nobody, end the channel with 406."""
    with pytest.raises(ChannelPreconditionFailed, match=complaint):
        await put(channel, "anywhere", b"1", **properties)


async def test_replies_directly(connect: Connect):
    """A consumer of amq.rabbitmq.reply-to gets the replies to its own requests, with no queue between."""
    asking = await (await connect()).channel()
    answering = await (await connect()).channel(on_return_raises=True)
    requests = await answering.declare_queue("requests", exclusive=True)
    replies: asyncio.Queue[bytes] = asyncio.Queue()
    direct = await asking.get_queue("amq.rabbitmq.reply-to", ensure=False)

    async def on_reply(message: AbstractIncomingMessage) -> None:
        replies.put_nowait(message.body)

    await direct.consume(on_reply, no_ack=True)
    # The queue of requests is another connection's own, but publishing to it is not using it.
    await asking.default_exchange.publish(Message(b"?", reply_to="amq.rabbitmq.reply-to"), "requests")

    request = await take(requests)
    await request.ack()
    assert request.reply_to.startswith("amq.rabbitmq.reply-to.")
    # Not mandatory: RabbitMQ delivers a mandatory reply and returns it too, for no queue took it.
    await answering.default_exchange.publish(Message(b"!"), request.reply_to, mandatory=False)

    assert b"!" == await asyncio.wait_for(replies.get(), 5)
