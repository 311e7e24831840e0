"""Sending dead letters back: each to the queue it failed in, one copy confirmed before its dead letter goes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel
from dlq_steps import CREATED, DLQ, FAILED, QUEUE, dead_letter, declare, ids, put, take_all, until_depth
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from meshkit.core.events import DeadLetterReplayed, listen
from meshkit.core.trace import tracer, use_tracer
from meshkit.errors import ConfigurationError, TopologyError
from meshkit.messaging import headers as h
from meshkit.rabbitmq import dead_letters as dl
from meshkit.rabbitmq.dead_letters import DeadLetters, Receipt
from meshkit.telemetry.tracing import OtelTracer


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """The spans that are made during the test."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    before = tracer()
    use_tracer(OtelTracer(provider=provider))
    yield exporter
    use_tracer(before)
    provider.shutdown()


@pytest.fixture
def told() -> Iterator[list[DeadLetterReplayed]]:
    """The events of replays."""
    heard: list[DeadLetterReplayed] = []
    stop = listen(heard.append, kind=DeadLetterReplayed)
    yield heard
    stop()


async def replay(url: str, **options: object) -> Receipt:
    async with DeadLetters(url) as letters:
        return await letters.replay(DLQ, **options)  # type: ignore[arg-type]


async def test_sends_all_back_in_order(broker: str, channel: AbstractChannel, told: list[DeadLetterReplayed]):
    """All dead letters go to the queue they failed in, oldest first, and leave the dead-letter queue."""
    names = [f"m{n}" for n in range(5)]
    await put(channel, *map(dead_letter, names))

    receipt = await replay(broker)

    assert (5, names, [], [], "", 0) == (
        *(receipt.planned, receipt.replayed, receipt.guarded, receipt.failed, receipt.stopped, receipt.left),
    )
    assert names == await ids(channel, QUEUE)
    assert [] == await ids(channel, DLQ)
    assert [(QUEUE, "republished")] * 5 == [(event.source, event.result) for event in told]


async def test_one_connection_replays_as_often_as_one_likes(broker: str, channel: AbstractChannel):
    """One after another: first one message, to see that it is mended, then the rest."""
    await put(channel, *map(dead_letter, ("m1", "m2")))

    async with DeadLetters(broker) as letters:
        first = await letters.replay(DLQ, limit=1)
        rest = await letters.replay(DLQ)

    assert (["m1"], ["m2"]) == (first.replayed, rest.replayed)
    assert ["m1", "m2"] == await ids(channel, QUEUE)


async def test_the_copy_begins_anew(broker: str, channel: AbstractChannel):
    """A replayed message keeps id, body, properties and where it came from; attempt, deadline and failure are gone."""
    await put(channel, dead_letter("m1", replay_count="1"))

    await replay(broker, by="ana@ops")

    (message,) = await take_all(channel, QUEUE)
    assert ("m1", b'{"id": "m1"}', "user.created") == (message.message_id, message.body, message.type)
    assert ("application/json", "c-1", "user-service") == (message.content_type, message.correlation_id, message.app_id)
    assert aio_pika.DeliveryMode.PERSISTENT == message.delivery_mode
    headers = {name: value for name, value in message.headers.items() if not name.startswith("x-")}
    assert headers.pop(h.REPLAYED_AT) > "2026"
    assert {
        "traceparent": CREATED,
        "theirs": "kept",
        h.FIRST_PUBLISHED_AT: "2026-11-21T12:00:00.000Z",
        h.FIRST_FAILED_AT: "2026-11-21T12:00:01.000Z",
        h.QUEUE: QUEUE,
        h.EXCHANGE: "user-events",
        h.ROUTING_KEY: "user.created",
        h.REPLAY_COUNT: "2",
        h.REPLAYED_BY: "ana@ops",
    } == headers


@pytest.mark.parametrize(
    ("selection", "back"),
    [
        ({"ids": ["m3", "m1"]}, ["m1", "m3"]),
        ({"ids": ["m"]}, ["m0", "m1", "m2", "m3", "m4"]),
        ({"fingerprint": "bbbb"}, ["m2", "m4"]),
        ({"limit": 2}, ["m0", "m1"]),
        ({"fingerprint": "bbbb", "limit": 1}, ["m2"]),
        ({"newest": 3}, ["m0", "m1", "m2"]),
        ({"ids": ["nothing"]}, []),
    ],
)
async def test_sends_back_only_what_is_selected(
    broker: str, channel: AbstractChannel, selection: dict[str, object], back: list[str]
):
    """A selection goes back in order; what is kept stays in order."""
    names = [f"m{n}" for n in range(5)]
    await put(channel, *(dead_letter(m, error_fingerprint="bbbb" if m in ("m2", "m4") else "aaaa") for m in names))

    plan = await replay(broker, dry_run=True, **selection)
    receipt = await replay(broker, **selection)

    assert (len(back), [], 5) == (plan.planned, plan.replayed, plan.left)
    kept = [name for name in names if name not in back]
    assert (back, len(kept)) == (receipt.replayed, receipt.left)
    assert back == await ids(channel, QUEUE)
    assert kept == await ids(channel, DLQ)


async def test_keeps_more_than_it_holds_at_a_time(
    broker: str, channel: AbstractChannel, monkeypatch: pytest.MonkeyPatch
):
    """However many are kept on the way to the selected ones, they are reached, and the kept ones stay in order."""
    monkeypatch.setattr(dl, "_WINDOW", 4)
    names = [f"m{n:02d}" for n in range(40)]
    await put(channel, *map(dead_letter, names))

    receipt = await replay(broker, ids=["m05", "m38"])

    assert ["m05", "m38"] == receipt.replayed
    await until_depth(channel, DLQ, 38)
    assert [name for name in names if name not in ("m05", "m38")] == await ids(channel, DLQ)


async def test_a_dry_run_tells_and_leaves_no_trace(
    broker: str, channel: AbstractChannel, told: list[DeadLetterReplayed], spans: InMemorySpanExporter
):
    """A dry run moves nothing, counts nothing and makes no span."""
    await put(channel, dead_letter("m1"), dead_letter("m2", replay_count="3"))

    plan = await replay(broker, dry_run=True)

    assert (2, ["m2"], [], "") == (plan.planned, plan.guarded, plan.replayed, plan.trace_id)
    assert ([], ()) == (told, spans.get_finished_spans())
    assert ["m1", "m2"] == await ids(channel, DLQ)


async def test_stops_a_message_that_goes_round(broker: str, channel: AbstractChannel, told: list[DeadLetterReplayed]):
    """What was replayed three times and is back again is left."""
    await put(channel, dead_letter("m1", replay_count="3"), dead_letter("m2", replay_count="2"))

    receipt = await replay(broker)

    assert (["m2"], ["m1"], 1) == (receipt.replayed, receipt.guarded, receipt.left)
    assert ["skipped", "republished"] == [event.result for event in told]
    assert ["m1"] == await ids(channel, DLQ)


async def test_leaves_what_fails_again_meanwhile(broker: str, channel: AbstractChannel):
    """Dead letters that come during a replay are not part of it, so it ends."""
    await put(channel, *(dead_letter(f"m{n}") for n in range(5)))
    again: list[asyncio.Task[None]] = []

    def fails_again(receipt: Receipt) -> None:
        again.append(asyncio.create_task(put(channel, dead_letter(f"again-{receipt.replayed[-1]}"))))

    receipt = await replay(broker, progress=fails_again)
    await asyncio.gather(*again)

    assert 5 == len(receipt.replayed)
    assert [f"again-m{n}" for n in range(5)] == sorted(await ids(channel, DLQ))


async def test_a_copy_that_nobody_takes_stays(broker: str, channel: AbstractChannel, told: list[DeadLetterReplayed]):
    """Where the queue it failed in is gone, or nothing says which it was, the dead letter stays and the others go."""
    nowhere = dead_letter("m1", queue="gone.queue")
    await put(channel, nowhere, dead_letter("m2"), dead_letter("m3", queue=DLQ))

    receipt = await replay(broker)

    assert (["m2"], ["m1", "m3"]) == (receipt.replayed, [one for one, _ in receipt.failed])
    assert "reached no queue" in receipt.failed[0][1]
    assert "does not say which queue" in receipt.failed[1][1]
    assert ["failed", "republished", "failed"] == [event.result for event in told]
    assert ["m1", "m3"] == await ids(channel, DLQ)


async def test_a_full_queue_keeps_the_rest(broker: str, channel: AbstractChannel):
    """Where the queue takes no more, what it did not take stays."""
    await channel.declare_queue(
        "full", durable=True, arguments={"x-queue-type": "classic", "x-max-length": 1, "x-overflow": "reject-publish"}
    )
    await put(channel, *(dead_letter(f"m{n}", queue="full") for n in range(3)))

    receipt = await replay(broker)

    assert (["m0"], ["m1", "m2"]) == (receipt.replayed, [one for one, _ in receipt.failed])
    assert "refused" in receipt.failed[0][1]
    assert ["m1", "m2"] == await ids(channel, DLQ)


async def test_goes_to_one_queue_only(broker: str, channel: AbstractChannel):
    """Others who are bound to the exchange that the message came from get no second copy."""
    exchange = await channel.declare_exchange("user-events", "topic", durable=True)
    await declare(channel, "mail.user-created")
    for queue in (QUEUE, "mail.user-created"):
        await (await channel.get_queue(queue)).bind(exchange, "user.created")
    await put(channel, dead_letter("m1"))

    await replay(broker)

    assert (["m1"], []) == (await ids(channel, QUEUE), await ids(channel, "mail.user-created"))


async def test_two_at_once_are_refused(broker: str, channel: AbstractChannel):
    """While one replays a queue, a second one is told so, and each message goes back once."""
    await put(channel, *(dead_letter(f"m{n}") for n in range(3)))
    source = await channel.get_queue(DLQ)

    async def hold(_: object) -> None:
        pass

    tag = await source.consume(hold, exclusive=True)
    with pytest.raises(TopologyError, match="somebody else reads"):
        await replay(broker)
    await source.cancel(tag)
    await channel.close()

    first, second = await asyncio.gather(replay(broker), replay(broker), return_exceptions=True)

    done = [one for one in (first, second) if isinstance(one, Receipt)]
    assert ["m0", "m1", "m2"] == sorted(name for one in done for name in one.replayed)


async def test_interrupted_it_finishes_the_message_in_hand(broker: str, channel: AbstractChannel):
    """Cancelled at any moment, a replay leaves each message in exactly one of the two queues."""
    for turns in range(0, 200, 10):
        await put(channel, *(dead_letter(f"m{n}") for n in range(6)))
        async with DeadLetters(broker) as letters:
            replaying = asyncio.create_task(letters.replay(DLQ))
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncio.sleep(turns / 10_000)
            replaying.cancel()
            await asyncio.gather(replaying, return_exceptions=True)

        back = await ids(channel, QUEUE)
        await until_depth(channel, DLQ, 6 - len(back))
        assert [f"m{n}" for n in range(6)] == [*back, *await ids(channel, DLQ)]


async def test_its_trace_leads_back(broker: str, channel: AbstractChannel, spans: InMemorySpanExporter):
    """A replay is a trace of its own; each message gets a new creation context, with links to the old story."""
    await put(channel, dead_letter("m1"))

    receipt = await replay(broker)

    by_name: dict[str, ReadableSpan] = {span.name: span for span in spans.get_finished_spans()}
    run, received, published = (
        by_name[name] for name in (f"meshkit.replay {DLQ}", f"receive {DLQ}", f"publish {QUEUE}")
    )
    assert [None, "INTERNAL", "CLIENT", "PRODUCER"] == [
        run.parent,
        *(one.kind.name for one in (run, received, published)),
    ]
    assert [run.context.span_id] * 2 == [one.parent.span_id if one.parent else 0 for one in (received, published)]
    assert receipt.trace_id == f"{run.context.trace_id:032x}"
    assert {CREATED[36:52], FAILED[36:52]} == {f"{link.context.span_id:016x}" for link in received.links}
    assert [CREATED[36:52]] == [f"{link.context.span_id:016x}" for link in published.links]
    assert 1 == (run.attributes or {})["meshkit.replay.count"]
    (message,) = await take_all(channel, QUEUE)
    assert f"00-{receipt.trace_id}-{published.context.span_id:016x}" == str(message.headers["traceparent"])[:52]
    assert CREATED == message.headers[h.ORIGINAL_TRACEPARENT]


async def test_a_second_replay_keeps_the_first_story(
    broker: str, channel: AbstractChannel, spans: InMemorySpanExporter
):
    """However often a message is replayed, it says in which trace it was first published."""
    first = f"00-{'1' * 32}-{'2' * 16}-01"
    await put(channel, dead_letter("m1", original_traceparent=first, replay_count="1"))

    await replay(broker)

    (message,) = await take_all(channel, QUEUE)
    assert first == message.headers[h.ORIGINAL_TRACEPARENT]


@pytest.mark.parametrize("nonsense", [{"limit": 0}, {"ids": [""]}])
async def test_refuses_a_selection_that_is_none(broker: str, channel: AbstractChannel, nonsense: dict[str, object]):
    """A limit of nothing, or an id that every message begins with, is a mistake."""
    with pytest.raises(ConfigurationError):
        await replay(broker, **nonsense)


async def test_what_the_broker_gave_up_goes_back_too(broker: str, channel: AbstractChannel):
    """A message that the broker itself dead-lettered goes back to the queue that its notes name, without the notes."""
    await channel.declare_queue(
        "plain", durable=True, arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": DLQ}
    )
    await put(channel, aio_pika.Message(b"1", message_id="m1"), queue="plain")
    message = await (await channel.get_queue("plain")).get()
    await message.reject(requeue=False)
    await until_depth(channel, DLQ, 1)

    receipt = await replay(broker)

    assert ["m1"] == receipt.replayed
    (message,) = await take_all(channel, "plain")
    assert ("plain", "1") == (message.headers[h.QUEUE], message.headers[h.REPLAY_COUNT])
    assert not [name for name in message.headers if name.startswith(("x-death", "x-first", "x-last"))]
