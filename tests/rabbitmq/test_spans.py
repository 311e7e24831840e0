"""Every event is one story: publish, attempts, hops and replay as spans, with the decision on each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from bus_steps import QUEUE, CourseGranted, MakeBus, Outside, UserCreated, embedded, until
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from meshkit.core.events import Event, MessageDeadLettered, MessagePublished, MessageSettled
from meshkit.core.trace import tracer, use_tracer
from meshkit.errors import BulkheadFullError, UnroutableError
from meshkit.messaging.message import Delivery, Message
from meshkit.telemetry import tracing

DLQ = f"{QUEUE}.dlq"
pytestmark = embedded


class Spans:
    """The spans that have ended."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def all(self) -> list[ReadableSpan]:
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all() if span.name == name]


@pytest.fixture
def spans() -> Iterator[Spans]:
    before = tracer()
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.install(provider=provider)
    yield Spans(exporter)
    use_tracer(before)
    provider.shutdown()


def ids(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def parent(span: ReadableSpan) -> tuple[int, int] | None:
    return (span.parent.trace_id, span.parent.span_id) if span.parent is not None else None


def links(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


def outcomes(told: list[Event]) -> list[str]:
    return [event.outcome for event in told if isinstance(event, MessageSettled)]


async def test_the_story_of_a_message_that_fails(spans: Spans, make_bus: MakeBus, outside: Outside, told: list[Event]):
    """One trace: the publish, under it each attempt as a sibling, under each failed one the hop it took."""
    bus = make_bus(retry="20ms, 50ms")

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        raise ValueError("no")

    await bus.start()
    request = tracer().start("request", kind="server", parent=None)
    with request.active():
        message_id = await bus.publish(UserCreated(number=1))
    request.end()
    await until(
        lambda: any(isinstance(event, MessageDeadLettered) for event in told) and "dead_letter" in outcomes(told)
    )

    (publish,) = spans.named("publish user-events")
    assert (SpanKind.PRODUCER, ids(spans.named("request")[0])) == (publish.kind, parent(publish))
    assert {
        "messaging.system": "rabbitmq",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.name": "user-events",
        "messaging.rabbitmq.destination.routing_key": "user.created",
        "messaging.message.id": message_id,
        "server.address": "127.0.0.1",
        "meshkit.publish.outcome": "confirmed",
    }.items() <= dict(publish.attributes or {}).items()

    attempts = spans.named(f"process {QUEUE}")
    assert [SpanKind.CONSUMER] * 3 == [span.kind for span in attempts]
    assert [ids(publish)] * 3 == [parent(span) for span in attempts]
    assert [1, 2, 3] == [attribute(span, "meshkit.message.attempt") for span in attempts]
    assert {3} == {attribute(span, "meshkit.message.max_attempts") for span in attempts}
    assert ["retry", "retry", "dead_letter"] == [attribute(span, "meshkit.message.outcome") for span in attempts]
    assert [StatusCode.ERROR] * 3 == [span.status.status_code for span in attempts]
    assert ["ValueError"] * 3 == [attribute(span, "error.type") for span in attempts]
    # The creation context, and from the second attempt on the attempt before.
    assert [[ids(publish)], [ids(publish), ids(attempts[0])], [ids(publish), ids(attempts[1])]] == [
        links(span) for span in attempts
    ]

    (retry,) = spans.named("publish meshkit.delay.50ms")
    assert (SpanKind.CLIENT, ids(attempts[1]), [ids(publish)]) == (retry.kind, parent(retry), links(retry))
    assert (0.05, 3) == (attribute(retry, "meshkit.retry.delay"), attribute(retry, "meshkit.message.attempt"))

    (dead,) = spans.named(f"publish {DLQ}")
    assert (SpanKind.CLIENT, ids(attempts[2]), [ids(publish)]) == (dead.kind, parent(dead), links(dead))
    assert ("retries_exhausted", QUEUE, 3, True) == tuple(
        attribute(dead, name)
        for name in (
            "meshkit.dead_letter.reason",
            "meshkit.dead_letter.source_queue",
            "meshkit.dead_letter.attempts",
            "meshkit.sampling.keep",
        )
    )
    assert 1 == len({ids(span)[0] for span in spans.all()})
    (letter,) = await outside.take(DLQ)
    assert f"-{ids(publish)[1]:016x}-" in letter.headers["traceparent"]
    assert f"-{ids(attempts[2])[1]:016x}-" in letter.headers["meshkit-failed-traceparent"]


def attribute(span: ReadableSpan, name: str) -> Any:
    return (span.attributes or {}).get(name)


async def test_what_a_handler_does_is_under_its_attempt(
    spans: Spans, make_bus: MakeBus, outside: Outside, told: list[Event]
):
    """The attempt is the current span in the handler, so an event that follows is in the same trace, below it."""
    await outside.bind("grants", "course-events", "course.granted")
    bus = make_bus()

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        await bus.publish(CourseGranted(number=1))

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: outcomes(told))
    (attempt,) = spans.named(f"process {QUEUE}")
    (follows,) = spans.named("publish course-events")
    assert ids(attempt) == parent(follows)
    assert StatusCode.UNSET == attempt.status.status_code
    assert "ack" == attribute(attempt, "meshkit.message.outcome")


async def test_what_is_current_where_the_bus_starts_is_no_parent(spans: Spans, make_bus: MakeBus, told: list[Event]):
    """A bus that is started within a request does not put every later message into that request's trace."""
    bus = make_bus()
    bus.subscribe(UserCreated)(lambda event: None)
    request = tracer().start("request", parent=None)
    with request.active():
        await bus.start()
    request.end()
    await bus.publish(UserCreated(number=1))
    await until(lambda: outcomes(told))
    (attempt,) = spans.named(f"process {QUEUE}")
    assert ids(spans.named("request")[0])[0] != ids(attempt)[0]


async def test_a_message_without_a_trace_begins_one(
    spans: Spans, make_bus: MakeBus, outside: Outside, told: list[Event]
):
    """Its producer traces nothing, or wrote nonsense: all attempts at it are still tied to each other by links."""
    bus = make_bus(retry="20ms")

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        if delivery.attempt == 1:
            raise OSError

    await bus.start()
    await outside.publish(b'{"number": 1}', queue=QUEUE, headers={"traceparent": "nonsense"})
    await until(lambda: outcomes(told))
    first, second = spans.named(f"process {QUEUE}")
    assert [None, None] == [parent(first), parent(second)]
    assert [[], [ids(first)]] == [links(first), links(second)]


async def test_an_outbox_row_is_the_creation_context(spans: Spans, make_bus: MakeBus, told: list[Event]):
    """The span of the row is the producer's; the relay's publish and the attempts are below it."""
    bus = make_bus()
    bus.subscribe(UserCreated)(lambda event: None)
    await bus.start()
    message, exchange, key = bus.envelope(UserCreated(number=1))
    await bus.publish_message(message, exchange, key)
    await until(lambda: outcomes(told))
    (row,) = spans.named("create user-events")
    (relay,) = spans.named("publish user-events")
    (attempt,) = spans.named(f"process {QUEUE}")
    assert (SpanKind.PRODUCER, SpanKind.CLIENT) == (row.kind, relay.kind)
    assert [ids(row)] * 2 == [parent(relay), parent(attempt)]


async def test_a_replayed_message_is_linked_to_its_story(
    spans: Spans, make_bus: MakeBus, outside: Outside, told: list[Event]
):
    """It has a new creation context, and its attempt leads back to the original one."""
    bus = make_bus()
    bus.subscribe(UserCreated)(lambda event: None)
    await bus.start()
    original = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    replay = "00-11111111111111111111111111111111-2222222222222222-01"
    headers = {"traceparent": replay, "meshkit-original-traceparent": original, "meshkit-replay-count": "1"}
    await outside.publish(b'{"number": 1}', queue=QUEUE, headers=headers)
    await until(lambda: outcomes(told))
    (attempt,) = spans.named(f"process {QUEUE}")
    assert [int("1" * 32, 16), int("0af7651916cd43dd8448eb211c80319c", 16)] == [one[0] for one in links(attempt)]
    assert int("1" * 32, 16) == ids(attempt)[0]


async def test_a_publish_that_fails_says_how(spans: Spans, make_bus: MakeBus, outside: Outside, told: list[Event]):
    """An unroutable message is an error on its span, and its metric leads to that span."""
    await outside.bind("audit", "user-events", "other")
    bus = make_bus()
    await bus.start()
    with pytest.raises(UnroutableError):
        await bus.publish(UserCreated(number=1))
    (publish,) = spans.named("publish user-events")
    assert (StatusCode.ERROR, "returned", "returned") == (
        publish.status.status_code,
        attribute(publish, "error.type"),
        attribute(publish, "meshkit.publish.outcome"),
    )
    (event,) = (event for event in told if isinstance(event, MessagePublished))
    assert f"-{ids(publish)[1]:016x}-" in event.traceparent


async def test_a_rejected_message_is_seen_waiting(spans: Spans, make_bus: MakeBus, told: list[Event]):
    """Its attempt ends with "requeue", and the next one has the same number."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        seen.append(event)
        if len(seen) == 1:
            raise BulkheadFullError("full", retry_after=0.05)

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: "ack" in outcomes(told))
    first, second = spans.named(f"process {QUEUE}")
    assert ["requeue", "ack"] == [attribute(span, "meshkit.message.outcome") for span in (first, second)]
    assert [1, 1] == [attribute(span, "meshkit.message.attempt") for span in (first, second)]
    (hop,) = (span for span in spans.all() if span.name.startswith("publish meshkit.delay."))
    assert ids(first) == parent(hop)


async def test_a_message_that_was_not_given_a_trace_stays_without(make_bus: MakeBus, outside: Outside):
    """Without a provider nothing is recorded, and what came with a message is passed on as it is."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus()
    await bus.start()
    theirs = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await bus.publish_message(
        Message(body=b"", message_id="1", headers={"traceparent": theirs}), "user-events", "user.created"
    )
    (found,) = await outside.take("audit")
    assert theirs == found.headers["traceparent"]
