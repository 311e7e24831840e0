"""The story of one enrollment, span by span, from the raw OTLP bodies that the services sent."""

from __future__ import annotations

import itertools

import pytest
from demo_runs import Run

from meshkit.embedded.otlp import SpanRecord
from meshkit.embedded.story import Node, tree

pytestmark = [pytest.mark.once, pytest.mark.timeout(240)]

QUEUE = "payment-service.enrollment-requested"


def lines(spans: list[SpanRecord]) -> list[str]:
    """The trace as indented lines, each span once: what follows what, without times."""

    def below(node: Node, depth: int) -> list[str]:
        span = node.span
        own = f"{'  ' * depth}{span.service}: {span.kind} {span.name}"
        return [own, *(line for child in node.children for line in below(child, depth + 1))]

    return [line for top in tree(spans) for line in below(top, 0)]


def children(spans: list[SpanRecord], parent: SpanRecord) -> list[SpanRecord]:
    return [span for span in spans if span.parent_span_id == parent.span_id]


def one(spans: list[SpanRecord], name: str, service: str = "") -> SpanRecord:
    found = [span for span in spans if span.name == name and (not service or span.service == service)]
    assert 1 == len(found), [span.name for span in spans]
    return found[0]


def test_the_story_is_one_trace_with_one_root(run: Run):
    """One trace, one root, every other span under a parent that is there; the summary counts what is there."""
    story = run.trace("story_trace_id")
    known = {span.span_id for span in story}
    assert ["PUT /enrollments/{enrollment_id}"] == [span.name for span in story if not span.parent_span_id]
    assert all(span.parent_span_id in known for span in story if span.parent_span_id)
    assert run.summary["story_spans"] == len(story)


def test_the_story_goes_over_http_and_amqp_through_five_services(run: Run):
    """Whoever took part is in it; driver and provider do not count and are not."""
    story = run.trace("story_trace_id")
    services = {span.service for span in story}
    assert {
        "user-service",
        "course-service",
        "enrollment-service",
        "payment-service",
        "notification-content-worker",
    } == services
    assert services == set(run.summary["story_services"])
    assert {"server", "client", "producer", "consumer", "internal"} == {span.kind for span in story}


def test_http_is_a_logical_call_with_its_attempts_and_the_other_side_below(run: Run):
    """Each call is one INTERNAL span, its attempt a CLIENT span below it, and the called service's span below that."""
    story = run.trace("story_trace_id")
    root = one(story, "PUT /enrollments/{enrollment_id}")
    for called, route in (
        ("course-service", "GET /courses/{course_id}/offers/{user_id}"),
        ("payment-service", "GET /payment-methods"),
    ):
        call = one(story, f"meshkit.call {called}")
        assert (root.span_id, "internal") == (call.parent_span_id, call.kind)
        # The last one is the one that was answered.
        attempt = children(story, call)[-1]
        assert ("client", "GET", 200) == (
            attempt.kind,
            attempt.attributes["http.request.method"],
            attempt.attributes["http.response.status_code"],
        )
        (answered,) = children(story, attempt)
        assert (called, "server", route) == (answered.service, answered.kind, answered.name)


def test_the_event_is_created_in_the_request_and_published_below(run: Run):
    """The PRODUCER span is made where the outbox row is written; the relay's publish is its CLIENT child."""
    story = run.trace("story_trace_id")
    created = one(story, "create enrollment-events")
    assert "producer" == created.kind
    assert one(story, "PUT /enrollments/{enrollment_id}").span_id == created.parent_span_id
    published = one(story, "publish enrollment-events")
    assert ("client", created.span_id) == (published.kind, published.parent_span_id)
    assert "confirmed" == published.attributes["meshkit.publish.outcome"]


def test_the_attempts_stand_side_by_side(run: Run):
    """Six attempts at the message, numbered, all children of the event's creation, each failed, none within another."""
    story = run.trace("story_trace_id")
    created = one(story, "create enrollment-events")
    attempts = [span for span in children(story, created) if span.name == f"process {QUEUE}"]
    assert [1, 2, 3, 4, 5, 6] == [span.attributes["meshkit.message.attempt"] for span in attempts]
    assert {6} == {span.attributes["meshkit.message.max_attempts"] for span in attempts}
    assert 1 == len({span.attributes["messaging.message.id"] for span in attempts})
    assert {("consumer", "error", "ValueError")} == {
        (span.kind, span.status, span.attributes["error.type"]) for span in attempts
    }
    assert ["retry"] * 5 + ["dead_letter"] == [span.attributes["meshkit.message.outcome"] for span in attempts]
    assert all(before.start < after.start for before, after in itertools.pairwise(attempts))


def test_each_attempt_but_the_first_retry_ends_in_a_hop(run: Run):
    """The first retry is waited for in process; the next four go through a rung; the last one ends in the dead letter."""
    story = run.trace("story_trace_id")
    attempts = [span for span in story if span.name == f"process {QUEUE}"]
    hops = [children(story, attempt) for attempt in attempts]
    assert [0, 1, 1, 1, 1, 1] == [len(found) for found in hops]
    for number, (hop,) in enumerate(hops[1:5], 2):
        assert hop.name.startswith("publish meshkit.delay.")
        assert "client" == hop.kind
        assert number + 1 == hop.attributes["meshkit.message.attempt"]
        assert hop.attributes["meshkit.retry.delay"] > 0
        # The wait in the rung is really waited for.
        assert attempts[number].start - hop.start >= hop.attributes["meshkit.retry.delay"] * 1e9 * 0.95


def test_the_dead_letter_hop_says_why(run: Run):
    """The last attempt publishes to the dead-letter queue, with reason, queue and attempts on the span."""
    story = run.trace("story_trace_id")
    hop = one(story, f"publish {QUEUE}.dlq")
    last = [span for span in story if span.name == f"process {QUEUE}"][-1]
    assert ("client", last.span_id) == (hop.kind, hop.parent_span_id)
    assert ("retries_exhausted", QUEUE, 6) == (
        hop.attributes["meshkit.dead_letter.reason"],
        hop.attributes["meshkit.dead_letter.source_queue"],
        hop.attributes["meshkit.dead_letter.attempts"],
    )


def test_the_other_subscriber_is_not_touched_by_it(run: Run):
    """The worker takes the same event once, and what it publishes goes on to user-service in the same trace."""
    told = [
        line.strip()
        for line in lines(run.trace("story_trace_id"))
        if "notification" in line.split(":")[0] or "user-service: consumer" in line
    ]
    assert [
        "notification-content-worker: consumer process notification-content-worker.enrollment-requested",
        "notification-content-worker: producer create notification-events",
        "notification-content-worker: client publish notification-events",
        "user-service: consumer process user-service.notification-sent",
    ] == told


def test_the_replay_is_a_trace_of_its_own_that_is_linked_to_the_story(run: Run):
    """A new root of the operator's tool; what it takes, publishes and what is then processed is linked to the story."""
    summary, replay = run.summary, run.trace("story_replay_trace_id")
    assert summary["story_trace_id"] != summary["story_replay_trace_id"]
    (root,) = [span for span in replay if not span.parent_span_id]
    assert ("meshkit-dlq", f"meshkit.replay {QUEUE}.dlq") == (root.service, root.name)
    linked = {span.name for span in replay for link in span.links if link.trace_id == summary["story_trace_id"]}
    assert {f"receive {QUEUE}.dlq", f"publish {QUEUE}", f"process {QUEUE}"} <= linked
    story = {span.span_id for span in run.trace("story_trace_id")}
    targets = {link.span_id for span in replay for link in span.links if link.trace_id == summary["story_trace_id"]}
    assert targets <= story


def test_the_replay_ends_what_the_story_began(run: Run):
    """In the replay the message is handled at its first attempt: charged, and everybody hears of it."""
    replay = run.trace("story_replay_trace_id")
    processed = one(replay, f"process {QUEUE}")
    assert (1, "ack") == (
        processed.attributes["meshkit.message.attempt"],
        processed.attributes["meshkit.message.outcome"],
    )
    assert one(replay, "meshkit.call payment-provider").parent_span_id == processed.span_id
    assert {
        f"process {QUEUE}",
        "process enrollment-service.payment-completed",
        "process notification-content-worker.payment-completed",
        "process course-service.content-granted",
        "process user-service.notification-sent",
    } == {span.name for span in replay if span.kind == "consumer"}


def test_calls_of_the_outage_are_retried_as_siblings(run: Run):
    """In the outage a logical call holds several attempts side by side, and the breaker's opening is told on a span."""
    spans = run.spans
    several = [
        attempts
        for call in spans
        if call.name == "meshkit.call payment-provider"
        and len(attempts := [span for span in spans if span.parent_span_id == call.span_id]) > 1
    ]
    assert several
    for attempts in several:
        assert {"client"} == {span.kind for span in attempts}
        numbers = [span.attributes["meshkit.attempt"] for span in sorted(attempts, key=lambda span: span.start)]
        assert list(range(1, len(numbers) + 1)) == numbers
    changes = [event for span in spans for event in span.events if event.name == "meshkit.circuit_breaker.state_change"]
    assert "open" in {event.attributes["meshkit.circuit_breaker.to"] for event in changes}
