"""A story made by hand: an enrolment over HTTP and AMQP, retried, dead-lettered and replayed, in the shape meshkit's spans have."""

from __future__ import annotations

import hashlib
from typing import Any

from meshkit.embedded.story import SpanEvent, SpanLink, SpanRecord

BEGAN = 1_790_000_000_000_000_000
STORY = "4bf92f3577b34da6a3ce929d0e0e4736"
REPLAY = "9c41d0e2a7b84f6c8f1e5b7a3d2c1e0f"
QUEUE = "payment-service.enrollment-requested"


def span_id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


class Telling:
    """Collects spans whose times are given in seconds from the story's beginning; returns each span's id."""

    def __init__(self, trace_id: str) -> None:
        self.trace_id = trace_id
        self.spans: list[SpanRecord] = []

    def add(
        self,
        service: str,
        name: str,
        start: float,
        took: float,
        *,
        parent: str = "",
        kind: str = "internal",
        error: str = "",
        events: tuple[SpanEvent, ...] = (),
        links: tuple[SpanLink, ...] = (),
        **attributes: Any,
    ) -> str:
        own = span_id(f"{self.trace_id}{len(self.spans)}")
        said = {key.replace("__", "."): value for key, value in attributes.items()}
        if error:
            said["error.type"] = error
        began = BEGAN + round(start * 1e9)
        self.spans.append(
            SpanRecord(
                trace_id=self.trace_id,
                span_id=own,
                parent_span_id=parent,
                name=name,
                kind=kind,
                start=began,
                end=began + round(took * 1e9),
                attributes=said,
                events=events,
                links=links,
                status="error" if error else "unset",
                service=service,
            )
        )
        return own

    def http(self, service: str, name: str, start: float, took: float, *, parent: str, kind: str, **more: Any) -> str:
        more.setdefault("http__request__method", name.split()[0])
        return self.add(service, name, start, took, parent=parent, kind=kind, **more)

    def amqp(self, service: str, name: str, start: float, took: float, *, parent: str, kind: str, **more: Any) -> str:
        more.setdefault("messaging__system", "rabbitmq")
        return self.add(service, name, start, took, parent=parent, kind=kind, **more)


def enrolment(*, attempts: tuple[float, ...] = (0.19, 0.25, 1.31, 6.35)) -> tuple[list[SpanRecord], list[SpanRecord]]:
    """The story and its replay: four attempts (the second in process, then rungs of 1 s and 5 s), a dead letter, a repair."""
    t = Telling(STORY)
    root = t.add("driver", "enrol a student", 0.0, 0.171)
    post = t.http("driver", "POST", 0.002, 0.168, parent=root, kind="client", http__response__status_code=202)
    enrol = t.http("enrollment-service", "POST /enrollments", 0.004, 0.163, parent=post, kind="server")
    call = t.add("enrollment-service", "meshkit.call course-service", 0.008, 0.131, parent=enrol, meshkit__attempts=2)
    t.http(
        "enrollment-service", "GET /courses/{id}", 0.009, 0.012, parent=call, kind="client", error="503",
        http__response__status_code=503, meshkit__attempt=1,
    )  # fmt: skip
    again = t.http(
        "enrollment-service", "GET /courses/{id}", 0.118, 0.02, parent=call, kind="client",
        http__response__status_code=200, meshkit__attempt=2, http__request__resend_count=1,
    )  # fmt: skip
    t.http(
        "course-service",
        "GET /courses/{course_id}",
        0.12,
        0.016,
        parent=again,
        kind="server",
        http__response__status_code=200,
    )
    event = t.amqp("enrollment-service", "publish enrollment-events", 0.145, 0.014, parent=enrol, kind="producer")
    creation = SpanLink(trace_id=STORY, span_id=event)

    for number, at in enumerate(attempts, start=1):
        last = number == len(attempts)
        one = t.amqp(
            "payment-service", f"process {QUEUE}", at, 0.036, parent=event, kind="consumer", links=(creation,),
            error="examples.payment.CurrencyError", meshkit__message__attempt=number,
            meshkit__message__max_attempts=len(attempts), meshkit__message__outcome="dead_letter" if last else "retry",
        )  # fmt: skip
        if last:
            dead = t.amqp(
                "payment-service", f"publish {QUEUE}.dlq", at + 0.03, 0.004, parent=one, kind="client", links=(creation,),
                meshkit__dead_letter__reason="retries_exhausted", meshkit__dead_letter__source_queue=QUEUE,
            )  # fmt: skip
        elif number > 1:
            rung = {2: 1, 3: 5}[number]
            t.amqp(
                "payment-service", f"publish meshkit.delay.{rung}s", at + 0.03, 0.004, parent=one, kind="client",
                links=(creation,), meshkit__retry__delay=float(rung), meshkit__message__attempt=number + 1,
            )  # fmt: skip

    r = Telling(REPLAY)
    root = r.add("meshkit", f"meshkit.replay {QUEUE}.dlq", 12.0, 0.4, meshkit__replay__count=1)
    r.amqp(
        "meshkit", f"receive {QUEUE}.dlq", 12.1, 0.003, parent=root, kind="client",
        links=(creation, SpanLink(trace_id=STORY, span_id=dead)),
    )  # fmt: skip
    back = r.amqp("meshkit", f"publish {QUEUE}", 12.11, 0.005, parent=root, kind="producer", links=(creation,))
    work = r.amqp(
        "payment-service", f"process {QUEUE}", 12.12, 0.31, parent=back, kind="consumer",
        meshkit__message__attempt=1, meshkit__message__max_attempts=4, meshkit__message__outcome="ack",
    )  # fmt: skip
    charge = r.add("payment-service", "meshkit.call payment-provider charge", 12.13, 0.21, parent=work)
    sent = r.http(
        "payment-service", "POST /charges", 12.131, 0.2, parent=charge, kind="client", http__response__status_code=201
    )
    r.http(
        "payment-provider", "POST /charges", 12.14, 0.18, parent=sent, kind="server", http__response__status_code=201
    )
    paid = r.amqp("payment-service", "publish payment-events", 12.41, 0.01, parent=work, kind="producer")
    r.amqp(
        "notification-worker", "process content-service.payment-completed", 12.43, 0.05, parent=paid, kind="consumer",
        meshkit__message__attempt=1, meshkit__message__outcome="ack",
    )  # fmt: skip
    return t.spans, r.spans


def outage() -> list[SpanRecord]:
    """A request while its provider is down: the breaker rejects the call and a fallback answers."""
    t = Telling(STORY)
    server = t.http(
        "enrollment-service", "POST /enrollments", 0.0, 0.02, parent="", kind="server", http__response__status_code=202
    )
    t.add(
        "enrollment-service", "meshkit.call payment-service", 0.004, 0.001, parent=server, meshkit__outcome="fallback",
        events=(
            SpanEvent(
                name="meshkit.circuit_breaker.rejected",
                time=BEGAN,
                attributes={"meshkit.circuit_breaker.name": "payment-service", "meshkit.circuit_breaker.state": "open"},
            ),
            SpanEvent(name="meshkit.fallback", time=BEGAN, attributes={"meshkit.fallback.reason": "breaker_open"}),
        ),
    )  # fmt: skip
    return t.spans
