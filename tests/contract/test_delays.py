"""Time to live, dead letters, and the delay rungs that retries are made of."""

from __future__ import annotations

import asyncio
import time

import aio_pika
import pytest
from aio_pika import ExchangeType, Message
from aio_pika.abc import AbstractChannel, AbstractQueue
from aiormq.exceptions import DeliveryError
from contract_steps import Connect, Declare, put, ready, take, take_bodies, until_ready

BOTH = pytest.mark.parametrize("kind", ["classic", "quorum"])


async def declare_rung(declare: Declare, channel: AbstractChannel, milliseconds: int) -> aio_pika.abc.AbstractExchange:
    """One delay rung as meshkit declares it: a fanout exchange and a queue of the same name."""
    name = f"meshkit.delay.{milliseconds}ms"
    exchange = await channel.declare_exchange(name, ExchangeType.FANOUT, durable=True)
    queue = await declare(
        name,
        queue_type="quorum",
        message_ttl=milliseconds,
        dead_letter_exchange="",
        dead_letter_strategy="at-least-once",
        overflow="reject-publish",
    )
    await queue.bind(exchange)
    return exchange


async def declare_work(declare: Declare, name: str) -> AbstractQueue:
    """A work queue as meshkit declares it, beside its dead-letter queue."""
    await declare(f"{name}.dlq", queue_type="quorum", delivery_limit=2_000_000_000)
    return await declare(
        name,
        queue_type="quorum",
        delivery_limit=10,
        overflow="reject-publish",
        dead_letter_exchange="",
        dead_letter_routing_key=f"{name}.dlq",
        dead_letter_strategy="at-least-once",
    )


async def test_a_rung_returns_a_message_to_the_queue_of_its_key(channel: AbstractChannel, declare: Declare):
    """What waited in a rung comes to the queue named by its routing key, not before its time, with headers intact."""
    work, other = await declare_work(declare, "user-service.user-created"), await declare_work(declare, "other")
    rung = await declare_rung(declare, channel, 300)
    started = time.monotonic()

    await rung.publish(Message(b"again", headers={"meshkit-attempt": "2"}, message_id="7"), work.name)
    came = await take(work)
    waited = time.monotonic() - started
    await came.ack()

    assert 0.29 <= waited < 3
    assert ("2", "7") == (came.headers["meshkit-attempt"], came.message_id)
    assert "meshkit.delay.300ms" == came.headers["x-death"][0]["queue"]
    assert 0 == await ready(channel, other.name)


async def test_the_whole_way_of_a_retry(channel: AbstractChannel, declare: Declare):
    """Publish, fail, wait in two rungs, give up into the dead-letter queue: each hop a confirmed copy, then an ack."""
    work = await declare_work(declare, "orders")
    rungs = [await declare_rung(declare, channel, milliseconds) for milliseconds in (50, 100)]
    events = await channel.declare_exchange("order-events", ExchangeType.TOPIC, durable=True)
    await work.bind(events, "order.created")
    await events.publish(Message(b"order", message_id="id"), "order.created")

    for attempt, rung in enumerate(rungs, start=2):
        message = await take(work)
        kept = {name: value for name, value in message.headers.items() if not name.startswith("x-")}
        copy = Message(message.body, message_id=message.message_id, headers={**kept, "meshkit-attempt": str(attempt)})
        await rung.publish(copy, work.name)
        await message.ack()
    message = await take(work)
    await channel.default_exchange.publish(
        Message(message.body, message_id="id", headers=message.headers), "orders.dlq"
    )
    await message.ack()

    letter = await take(await channel.get_queue("orders.dlq"))
    assert ("id", "3") == (letter.message_id, letter.headers["meshkit-attempt"])
    assert 0 == await ready(channel, "orders")


async def test_rungs_do_not_hold_each_other_up(channel: AbstractChannel, declare: Declare):
    """A short delay published after a long one ends first: each rung is a queue of its own."""
    work = await declare_work(declare, "orders")
    slow, fast = await declare_rung(declare, channel, 600), await declare_rung(declare, channel, 50)

    await slow.publish(Message(b"slow"), "orders")
    await fast.publish(Message(b"fast"), "orders")

    assert [b"fast", b"slow"] == await take_bodies(work, 2)


@BOTH
async def test_a_message_expires_by_its_own_time(channel: AbstractChannel, declare: Declare, kind: str):
    """The earlier of the message's expiration and the queue's TTL counts; the dead letter tells the expiration."""
    dead = await declare("it.dlq")
    await declare("it", queue_type=kind, message_ttl=60_000, dead_letter_exchange="", dead_letter_routing_key="it.dlq")

    await put(channel, "it", b"1", expiration=0.05)
    letter = await take(dead)
    await letter.ack()

    death = letter.headers["x-death"][0]
    assert ("expired", "it", "50") == (death["reason"], death["queue"], death["original-expiration"])
    assert letter.expiration is None


@BOTH
async def test_only_the_head_expires(channel: AbstractChannel, declare: Declare, kind: str):
    """A short-lived message behind a long-lived one waits with it."""
    dead = await declare("it.dlq")
    await declare("it", queue_type=kind, dead_letter_exchange="", dead_letter_routing_key="it.dlq")

    await put(channel, "it", b"long", expiration=0.4)
    await put(channel, "it", b"short", expiration=0.05)
    await asyncio.sleep(0.2)

    assert 0 == await ready(channel, "it.dlq")
    assert [b"long", b"short"] == await take_bodies(dead, 2)


async def test_death_headers_tell_the_way(channel: AbstractChannel, declare: Declare):
    """x-death lists each queue and reason once, latest first, with counts; x-first-death-* stay."""
    await declare("end")
    await declare("second", message_ttl=30, dead_letter_exchange="", dead_letter_routing_key="end")
    first = await declare("first", dead_letter_exchange="", dead_letter_routing_key="second")
    await put(channel, "first", b"1")

    await (await take(first)).reject()
    letter = await take(await channel.get_queue("end"))
    await letter.ack()

    latest, oldest = letter.headers["x-death"]
    assert ("expired", "second", 1, "", ["second"]) == tuple(latest[k] for k in ("reason", "queue", "count", "exchange", "routing-keys"))  # fmt: skip
    assert ("rejected", "first", 1, "", ["first"]) == tuple(oldest[k] for k in ("reason", "queue", "count", "exchange", "routing-keys"))  # fmt: skip
    assert ("first", "rejected", "") == tuple(letter.headers[f"x-first-death-{k}"] for k in ("queue", "reason", "exchange"))  # fmt: skip
    assert abs(latest["time"].timestamp() - time.time()) < 60


async def test_dying_again_counts_up(channel: AbstractChannel, declare: Declare):
    """A message rejected twice from one queue has one entry with count 2: a cycle with a rejection in it goes on."""
    await declare("wait", message_ttl=30, dead_letter_exchange="", dead_letter_routing_key="work")
    work = await declare("work", dead_letter_exchange="", dead_letter_routing_key="wait")
    await put(channel, "work", b"1")

    await (await take(work)).reject()
    await (await take(work)).reject()
    again = await take(work)
    await again.ack()

    assert [("wait", 2), ("work", 2)] == [(death["queue"], death["count"]) for death in again.headers["x-death"]]


async def test_a_cycle_without_a_rejection_ends(channel: AbstractChannel, declare: Declare):
    """A message that would go round by expiry alone is dropped when it comes to a queue again."""
    await declare("ping", message_ttl=30, dead_letter_exchange="", dead_letter_routing_key="pong")
    await declare("pong", message_ttl=30, dead_letter_exchange="", dead_letter_routing_key="ping")
    await put(channel, "ping", b"1")

    await until_ready(channel, "pong", 1)
    await until_ready(channel, "pong", 0)
    await asyncio.sleep(0.2)

    assert (0, 0) == (await ready(channel, "ping"), await ready(channel, "pong"))


async def test_dead_letters_keep_their_key_where_none_is_given(channel: AbstractChannel, declare: Declare):
    """Without x-dead-letter-routing-key a dead letter is routed by the keys it came with."""
    exchange = await channel.declare_exchange("dead", ExchangeType.TOPIC)
    graveyard = await declare("graveyard")
    await graveyard.bind(exchange, "it")
    queue = await declare("it", dead_letter_exchange="dead")
    await put(channel, "it", b"1")

    await (await take(queue)).reject()
    letter = await take(graveyard)
    await letter.ack()

    assert ("dead", "it") == (letter.exchange, letter.routing_key)


async def test_dead_letters_without_a_queue_are_lost_at_most_once(channel: AbstractChannel, declare: Declare):
    """The default strategy drops a dead letter that no queue takes, where a later one does not bring it back."""
    queue = await declare("it", dead_letter_exchange="", dead_letter_routing_key="nowhere")
    await put(channel, "it", b"1")

    await (await take(queue)).reject()

    assert 0 == await ready(channel, "it")
    await declare("nowhere")
    assert 0 == await ready(channel, "nowhere")


async def test_a_full_queue_may_dead_letter_what_it_rejects(channel: AbstractChannel, declare: Declare):
    """reject-publish-dlx nacks the publish and dead-letters the message."""
    dead = await declare("it.dlq")
    await declare(
        "it", max_length=1, overflow="reject-publish-dlx", dead_letter_exchange="", dead_letter_routing_key="it.dlq"
    )
    await put(channel, "it", b"1")

    with pytest.raises(DeliveryError):
        await put(channel, "it", b"2")

    letter = await take(dead)
    await letter.ack()
    assert (b"2", "maxlen") == (letter.body, letter.headers["x-death"][0]["reason"])


async def test_a_ttl_of_zero_is_now_or_never(connect: Connect, channel: AbstractChannel, declare: Declare):
    """With a TTL of 0 a message reaches a consumer that is free, and nobody later."""
    await declare("it", message_ttl=0)
    await put(channel, "it", b"nobody there")
    await until_ready(channel, "it", 0)
    queue = await (await (await connect()).channel()).get_queue("it")

    async with queue.iterator(no_ack=True) as messages:
        await put(channel, "it", b"caught")
        assert b"caught" == (await asyncio.wait_for(messages.__anext__(), 5)).body
