"""Declaring, checking and deleting."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel
from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
)
from contract_steps import Connect, Declare, ignore, put, ready, until_ready


async def test_names_a_queue_for_whoever_asks(channel: AbstractChannel):
    """An empty name gets one of the broker's choice."""
    first = await channel.declare_queue("", exclusive=True)
    second = await channel.declare_queue("", exclusive=True)

    assert first.name.startswith("amq.gen-")
    assert first.name != second.name


async def test_redeclares_the_same(channel: AbstractChannel, declare: Declare):
    """Declaring a queue again as it is changes nothing, and counts what is in it."""
    await declare("same", queue_type="quorum", delivery_limit=5)
    await put(channel, "same", b"1")
    await until_ready(channel, "same", 1)

    again = await declare("same", queue_type="quorum", delivery_limit=5)

    assert 1 == again.declaration_result.message_count


@pytest.mark.parametrize(
    ("first", "then", "complaint"),
    [
        ({"durable": True}, {}, "inequivalent arg 'durable' for queue 'it' in vhost '[^']+': received 'false' but current is 'true'"),
        ({"auto_delete": True}, {}, "inequivalent arg 'auto_delete' for queue 'it' in vhost '[^']+': received 'false' but current is 'true'"),
        ({"arguments": {"x-message-ttl": 100_000}}, {"arguments": {"x-message-ttl": 200_000}}, "inequivalent arg 'x-message-ttl' for queue 'it' in vhost '[^']+': received '200000' but current is '100000'"),
        ({"arguments": {"x-message-ttl": 100_000}}, {}, "inequivalent arg 'x-message-ttl' for queue 'it' in vhost '[^']+': received none but current is the value '100000' of type 'signedint'"),
        ({}, {"arguments": {"x-dead-letter-exchange": "there"}}, "inequivalent arg 'x-dead-letter-exchange' for queue 'it' in vhost '[^']+': received the value 'there' of type 'longstr' but current is none"),
        ({"durable": True, "arguments": {"x-queue-type": "quorum"}}, {"durable": True}, "inequivalent arg 'x-queue-type' for queue 'it' in vhost '[^']+': received none but current is the value 'quorum' of type 'longstr'"),
    ],
)  # fmt: skip
async def test_names_what_differs(connect: Connect, first: dict[str, Any], then: dict[str, Any], complaint: str):
    """Declaring a queue otherwise than it is ends the channel with 406, which names the argument and both values."""
    connection = await connect()
    await (await connection.channel()).declare_queue("it", **first)

    with pytest.raises(ChannelPreconditionFailed, match=complaint):
        await (await connection.channel()).declare_queue("it", **then)


@pytest.mark.parametrize(
    ("kind", "arguments", "complaint"),
    [
        ("classic", {"x-message-ttl": -1}, "invalid arg 'x-message-ttl' for queue 'it' in vhost '[^']+': {value_negative,-1}"),
        ("classic", {"x-expires": 0}, "invalid arg 'x-expires' for queue 'it' in vhost '[^']+': {value_zero,0}"),
        ("classic", {"x-dead-letter-routing-key": "k"}, "invalid arg 'x-dead-letter-routing-key' for queue 'it' in vhost '[^']+': routing_key_but_no_dlx_defined"),
        ("classic", {"x-overflow": "explode"}, "invalid arg 'x-overflow' for queue 'it'"),
        ("classic", {"x-max-length": "many"}, "invalid arg 'x-max-length' for queue 'it'"),
        ("never", {}, "invalid arg 'x-queue-type' for queue 'it'"),
        ("quorum", {"x-max-priority": 5}, "invalid arg 'x-max-priority' for queue 'it' in vhost '[^']+' of queue type rabbit_quorum_queue"),
        ("classic", {"x-delivery-limit": 5}, "invalid arg 'x-delivery-limit' for queue 'it' in vhost '[^']+' of queue type rabbit_classic_queue"),
    ],
)  # fmt: skip
async def test_refuses_arguments_that_make_no_sense(
    channel: AbstractChannel, kind: str, arguments: dict[str, Any], complaint: str
):
    """A queue argument out of place or range ends the channel with 406."""
    with pytest.raises(ChannelPreconditionFailed, match=complaint):
        await channel.declare_queue("it", durable=True, arguments={"x-queue-type": kind, **arguments})


@pytest.mark.parametrize(
    ("properties", "complaint"),
    [
        ({"durable": False}, "invalid property 'non-durable' for queue 'it' in vhost"),
        ({"durable": True, "exclusive": True}, "invalid property 'exclusive-owner' for queue 'it' in vhost"),
        ({"durable": True, "auto_delete": True}, "invalid property 'auto-delete' for queue 'it' in vhost"),
    ],
)
async def test_refuses_a_fleeting_quorum_queue(channel: AbstractChannel, properties: dict[str, bool], complaint: str):
    """A quorum queue is durable and everybody's."""
    with pytest.raises(ChannelPreconditionFailed, match=complaint):
        await channel.declare_queue("it", arguments={"x-queue-type": "quorum"}, **properties)


async def test_says_what_is_not_there(connect: Connect):
    """Passive declares of what does not exist end the channel with 404."""
    connection = await connect()

    with pytest.raises(ChannelNotFoundEntity, match=r"no queue 'missing' in vhost"):
        await (await connection.channel()).declare_queue("missing", passive=True)
    with pytest.raises(ChannelNotFoundEntity, match=r"no exchange 'missing' in vhost"):
        await (await connection.channel()).declare_exchange("missing", passive=True)


async def test_binds_only_what_is_there(connect: Connect):
    """Binding to an exchange that does not exist is a 404; unbinding from it is not."""
    connection = await connect()
    channel = await connection.channel()
    queue = await channel.declare_queue("it")
    await queue.unbind("missing", "key")

    with pytest.raises(ChannelNotFoundEntity, match=r"no exchange 'missing' in vhost"):
        await queue.bind("missing", "key")


async def test_deletes_what_is_not_there(channel: AbstractChannel):
    """Deleting, and unbinding, what does not exist is no error."""
    await channel.queue_delete("missing")
    await channel.exchange_delete("missing")
    queue = await channel.get_queue("missing", ensure=False)
    await queue.unbind("amq.direct", "key")


async def test_keeps_reserved_names(connect: Connect):
    """Names that begin with `amq.` are the broker's, and the default exchange is nobody's to change."""
    connection = await connect()

    with pytest.raises(ChannelAccessRefused, match=r"queue name 'amq.mine' contains reserved prefix 'amq"):
        await (await connection.channel()).declare_queue("amq.mine")
    with pytest.raises(ChannelAccessRefused, match=r"exchange name 'amq.mine' contains reserved prefix 'amq"):
        await (await connection.channel()).declare_exchange("amq.mine")
    queue = await (await connection.channel()).declare_queue("it")
    with pytest.raises(ChannelAccessRefused, match=r"operation not permitted on the default exchange"):
        await queue.bind("", "key")


async def test_refuses_a_changed_exchange(connect: Connect):
    """Declaring an exchange otherwise than it is names what differs."""
    connection = await connect()
    await (await connection.channel()).declare_exchange("events", ExchangeType.TOPIC)

    with pytest.raises(ChannelPreconditionFailed, match=r"inequivalent arg 'type' for exchange 'events' in vhost '[^']+': received 'fanout' but current is 'topic'"):  # fmt: skip
        await (await connection.channel()).declare_exchange("events", ExchangeType.FANOUT)


async def test_deletes_on_condition(connect: Connect):
    """if_empty and if_unused are kept."""
    connection = await connect()
    channel = await connection.channel()
    await channel.declare_queue("it")
    await put(channel, "it", b"1")

    with pytest.raises(ChannelPreconditionFailed, match=r"queue 'it' in vhost '[^']+' (is )?not empty"):
        await (await connection.channel()).queue_delete("it", if_empty=True)
    await (await channel.get_queue("it")).consume(ignore)
    with pytest.raises(ChannelPreconditionFailed, match=r"queue 'it' in vhost '[^']+' in use"):
        await (await connection.channel()).queue_delete("it", if_unused=True)


async def test_purges_what_is_ready(channel: AbstractChannel, declare: Declare):
    """Purge drops the ready messages, says how many, and leaves unacked ones alone."""
    queue = await declare("it")
    await put(channel, "it", b"1", b"2", b"3")
    held = await queue.get()

    purged = await queue.purge()
    await held.nack()

    assert 2 == purged.message_count
    await until_ready(channel, "it", 1)


async def test_exclusive_queues_are_their_connections(connect: Connect):
    """Another connection cannot use an exclusive queue, and it ends with its connection."""
    mine, other = await connect(), await connect()
    await (await mine.channel()).declare_queue("mine", exclusive=True)

    with pytest.raises(ChannelLockedResource, match=r"cannot obtain exclusive access to locked queue 'mine' in vhost"):
        await (await other.channel()).declare_queue("mine", passive=True)

    await mine.close()
    for _ in range(100):
        try:
            await (await other.channel()).declare_queue("mine", passive=True)
        except ChannelNotFoundEntity:
            return
        except ChannelLockedResource:
            await asyncio.sleep(0.02)
    pytest.fail("the exclusive queue outlived its connection")


async def test_auto_delete_queues_end_with_their_last_consumer(channel: AbstractChannel):
    """An auto-delete queue goes when its last consumer does, not before its first."""
    queue = await channel.declare_queue("fleeting", auto_delete=True)
    first = await queue.consume(ignore)
    second = await queue.consume(ignore)

    await queue.cancel(first)
    assert 0 == await ready(channel, "fleeting")
    await queue.cancel(second)

    with pytest.raises(ChannelNotFoundEntity):
        await ready(channel, "fleeting")


async def test_auto_delete_exchanges_end_with_their_last_binding(channel: AbstractChannel, declare: Declare):
    """An auto-delete exchange goes when its last binding does, that of a deleted queue too."""
    exchange = await channel.declare_exchange("fleeting", ExchangeType.FANOUT, auto_delete=True)
    queue = await declare("it")
    await queue.bind(exchange)

    await queue.delete(if_empty=False, if_unused=False)

    with pytest.raises(ChannelNotFoundEntity):
        await channel.declare_exchange("fleeting", passive=True)


async def test_a_deleted_queue_cancels_its_consumers(connect: Connect):
    """A consumer hears that its queue was deleted."""
    connection = await connect()
    channel = await connection.channel()
    cancelled: asyncio.Queue[str | None] = asyncio.Queue()
    (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(
        lambda frame: cancelled.put_nowait(frame.consumer_tag)
    )
    tag = await (await channel.declare_queue("it")).consume(ignore)

    await (await connection.channel()).queue_delete("it")

    assert tag == await asyncio.wait_for(cancelled.get(), 5)


async def test_unused_queues_expire(channel: AbstractChannel, declare: Declare):
    """x-expires deletes a queue that nobody uses."""
    await declare("it", expires=100)
    await asyncio.sleep(0.4)

    with pytest.raises(ChannelNotFoundEntity):
        await ready(channel, "it")
