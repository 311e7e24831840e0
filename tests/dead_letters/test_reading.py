"""Looking at dead letters changes nothing."""

from __future__ import annotations

import asyncio

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from dlq_steps import DLQ, QUEUE, TRACE, dead_letter, depth, ids, put, until_depth

from meshkit.errors import ConfigurationError, MeshkitError, TopologyError
from meshkit.rabbitmq import dead_letters as dl
from meshkit.rabbitmq.dead_letters import DeadLetters, groups_of


async def test_tells_what_failed(broker: str, channel: AbstractChannel):
    """A record says what failed, where, why, how often and in which trace, with the body as it came."""
    await put(channel, dead_letter("m1", replay_count="2", replayed_by="ana@ops"))

    async with DeadLetters(broker) as letters:
        (record,), total = await letters.read(DLQ)

    assert 1 == total
    assert ("m1", "user.created", DLQ, QUEUE) == (
        record.message_id,
        record.type,
        record.dead_letter_queue,
        record.queue,
    )
    assert ("user-events", "user.created") == (record.exchange, record.routing_key)
    assert ("retries_exhausted", "ValueError", "no such course") == (
        record.reason,
        record.error_type,
        record.error_message,
    )
    assert (10, 2, "ana@ops") == (record.attempt, record.replay_count, record.replayed_by)
    assert ("course-service", "1.2", "web-1", TRACE) == (record.service, record.version, record.host, record.trace_id)
    assert b'{"id": "m1"}' == record.body
    assert '{"id": "m1"}' == record.as_json(body=True)["body"]
    assert "body" not in record.as_json(body=False)


@pytest.mark.parametrize("limit", [1, 3, 5, 100])
async def test_changes_nothing(broker: str, channel: AbstractChannel, limit: int):
    """However many are read, and however often, all stay, in order."""
    await put(channel, *(dead_letter(f"m{n}") for n in range(5)))

    async with DeadLetters(broker) as letters:
        for _ in range(3):
            records, total = await letters.read(DLQ, limit=limit)
            assert ([f"m{n}" for n in range(min(limit, 5))], 5) == ([record.message_id for record in records], total)
            await until_depth(channel, DLQ, 5)

    assert [f"m{n}" for n in range(5)] == await ids(channel, DLQ)


async def test_reads_more_than_it_holds_at_a_time(
    broker: str, channel: AbstractChannel, monkeypatch: pytest.MonkeyPatch
):
    """A queue that is longer than the window is read whole, and stays in order."""
    monkeypatch.setattr(dl, "_WINDOW", 4)
    await put(channel, *(dead_letter(f"m{n:02d}") for n in range(30)))

    async with DeadLetters(broker) as letters:
        records, _ = await letters.read(DLQ)

    assert [f"m{n:02d}" for n in range(30)] == [record.message_id for record in records]
    await until_depth(channel, DLQ, 30)
    assert [f"m{n:02d}" for n in range(30)] == await ids(channel, DLQ)


async def test_many_keep_their_order(broker: str, channel: AbstractChannel):
    """Hundreds that are read stay in order: RabbitMQ shuffles what comes back in one nack, above 32 messages."""
    names = [f"m{n:04d}" for n in range(700)]
    await asyncio.gather(*(put(channel, dead_letter(name)) for name in names))
    async with DeadLetters(broker) as letters:
        first, _ = await letters.read(DLQ)
        second, _ = await letters.read(DLQ)

    assert names == sorted(record.message_id for record in first)
    assert [record.message_id for record in first] == [record.message_id for record in second]


async def test_survives_being_cancelled(broker: str, channel: AbstractChannel):
    """Cancelled at any moment, a reader gives back what it holds by nack, and order stays."""
    await put(channel, *(dead_letter(f"m{n:02d}") for n in range(20)))

    async with DeadLetters(broker) as letters:
        for turns in range(0, 60, 4):
            reading = asyncio.create_task(letters.read(DLQ))
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncio.sleep(turns / 5000)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await until_depth(channel, DLQ, 20)

    assert [f"m{n:02d}" for n in range(20)] == await ids(channel, DLQ)


async def test_waits_for_another_look_to_end(broker: str, channel: AbstractChannel):
    """Two who look at the same time both see everything."""
    await put(channel, *(dead_letter(f"m{n}") for n in range(3)))

    async with DeadLetters(broker) as one, DeadLetters(broker) as other:
        (first, _), (second, _) = await asyncio.gather(one.read(DLQ), other.read(DLQ))

    assert ["m0", "m1", "m2"] == [record.message_id for record in first] == [record.message_id for record in second]


async def test_leaves_foreign_queues_alone(broker: str, channel: AbstractChannel):
    """A queue that meshkit did not declare is read only when asked for."""
    await channel.declare_queue("errors", durable=True, arguments={"x-queue-type": "quorum", "x-delivery-limit": 20})
    await put(channel, aio_pika.Message(b"1"), queue="errors")

    async with DeadLetters(broker) as letters:
        with pytest.raises(TopologyError, match="not declared by meshkit"):
            await letters.read("errors")
        records, _ = await letters.read("errors", foreign=True)

    assert [b"1"] == [record.body for record in records]
    assert 1 == await depth(channel, "errors")


async def test_says_that_there_is_no_such_queue(broker: str):
    """A name that is no queue is said to be none, and is not made one."""
    async with DeadLetters(broker) as letters:
        for _ in range(2):
            with pytest.raises(TopologyError, match=r"no queue 'nothing\.dlq'"):
                await letters.read("nothing.dlq")
        assert [] == await letters.depths(["nothing.dlq"])


async def test_tells_how_full_queues_are(broker: str, channel: AbstractChannel):
    """Depth and readers of the queues that exist."""
    await put(channel, dead_letter("m1"), dead_letter("m2"))

    async with DeadLetters(broker) as letters:
        found = await letters.depths([DLQ, "nothing.dlq"])

    assert [(DLQ, 2, 0)] == [(one.queue, one.depth, one.consumers) for one in found]


async def test_reads_whatever_headers_hold(broker: str, channel: AbstractChannel):
    """A dead letter with nonsense in its headers, or without any, is shown as far as it makes sense."""
    odd = dead_letter(
        "m1", attempt="many", replay_count=["?"], queue={"a": 1}, error_message=bytearray(b"\xff"), reason=7
    )
    odd.headers["traceparent"] = 12
    await put(channel, odd, aio_pika.Message(b"\xff\x00"))

    async with DeadLetters(broker) as letters:
        (first, second), _ = await letters.read(DLQ)

    assert (1, 0, QUEUE, "") == (first.attempt, first.replay_count, first.queue, first.trace_id)
    assert (QUEUE, "", None) == (second.queue, second.reason, second.text)


async def test_knows_what_the_broker_dead_lettered(broker: str, channel: AbstractChannel):
    """A message that its queue gave up without meshkit's consumer says so by the broker's own notes."""
    await channel.declare_queue(
        "plain", durable=True, arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": DLQ}
    )
    await put(channel, aio_pika.Message(b"1", message_id="m1"), queue="plain")
    message = await (await channel.get_queue("plain")).get()
    await message.reject(requeue=False)
    await until_depth(channel, DLQ, 1)

    async with DeadLetters(broker) as letters:
        (record,), _ = await letters.read(DLQ)

    assert ("rejected", "plain", "", "plain") == (record.reason, record.queue, record.exchange, record.routing_key)


async def test_groups_by_cause(broker: str, channel: AbstractChannel):
    """Dead letters with one fingerprint are one group, the largest first, with its time span and samples."""
    await put(
        channel,
        dead_letter("a", error_fingerprint="ffff", error_type="KeyError"),
        *(dead_letter(f"m{n}", dead_lettered_at=f"2026-11-21T12:0{n}:00.000Z") for n in range(4)),
    )

    async with DeadLetters(broker) as letters:
        records, _ = await letters.read(DLQ)
    groups = groups_of(records)

    assert [("aaaa", 4, "ValueError"), ("ffff", 1, "KeyError")] == [
        (g.fingerprint, g.count, g.error_type) for g in groups
    ]
    assert ("2026-11-21T12:00:00.000Z", "2026-11-21T12:03:00.000Z") == (groups[0].first, groups[0].last)
    assert ("m0", "m1", "m2") == groups[0].sample_ids


async def test_an_empty_queue_has_nothing(broker: str, channel: AbstractChannel):
    """Of an empty queue nothing is read, at once."""
    async with DeadLetters(broker) as letters:
        assert ([], 0) == await letters.read(DLQ)


async def test_refuses_a_url_that_is_none():
    """An address that is none of AMQP is refused without repeating it: it may hold a password."""
    with pytest.raises(ConfigurationError, match="not one of AMQP") as refused:
        DeadLetters("http://guest:secret@localhost")
    assert "secret" not in str(refused.value)


async def test_says_that_the_login_is_refused(broker: str):
    """A wrong password is one sentence, without the password."""
    with pytest.raises(MeshkitError, match="refused the login") as refused:
        async with DeadLetters(broker.replace("guest:guest", "guest:secret")):
            pass
    assert "MK102" == refused.value.code
    assert "secret" not in str(refused.value)


async def test_says_that_nobody_is_there(unused_tcp_port: int):
    """A broker that is not there is one sentence."""
    with pytest.raises(MeshkitError, match=f"127.0.0.1:{unused_tcp_port} cannot be used"):
        async with DeadLetters(f"amqp://127.0.0.1:{unused_tcp_port}/"):
            pass
