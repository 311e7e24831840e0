"""Each event moves its metric, each metric has an event, and nothing that a stranger names makes series without end."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from meshkit._version import __version__
from meshkit.core import events
from meshkit.core.events import Event, emit
from meshkit.core.pipeline import Pipeline
from meshkit.core.trace import tracer, use_tracer
from meshkit.policies.bulkhead import Bulkhead
from meshkit.policies.circuit_breaker import CircuitBreaker, CircuitOpenError
from meshkit.policies.rate_limiter import RateLimiter
from meshkit.policies.retry_budget import RetryBudget
from meshkit.telemetry import recorder as recorders
from meshkit.telemetry import tracing
from meshkit.telemetry.catalogue import METRICS
from meshkit.telemetry.recorder import GENERATED, MOST_ERROR_TYPES, MOST_VALUES, OTHER, Recorder
from meshkit.testing.clock import ManualClock

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03"
NOT_SAMPLED = SAMPLED[:-2] + "02"
EXEMPLAR = {"trace_id": SAMPLED[3:35], "span_id": SAMPLED[36:52]}
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def recorder(registry: CollectorRegistry) -> Iterator[Recorder]:
    made = Recorder(registry)
    yield made
    made.close()


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def settled(**more: object) -> events.MessageSettled:
    facts = {"source": "orders", "handler": "charge", "outcome": "ack", "seconds": 0.04, "attempt": 1, **more}
    return events.MessageSettled(**facts)


# --- each event moves its metric -------------------------------------------------------------------------------------------------

# What happens, and the sample that shows it: name, labels, and by how much it grows (or what it then is: "=").
MOVES: list[tuple[Event | None, str, dict[str, str], object]] = [
    (
        events.ServerRequestEnded(source="s", method="GET", route="/users/{id}", status=200, seconds=0.25),
        "meshkit_http_server_request_duration_seconds_sum",
        {"http_request_method": "GET", "http_route": "/users/{id}", "http_response_status_code": "200"},
        0.25,
    ),
    (
        events.ServerRequestStarted(source="s", method="GET"),
        "meshkit_http_server_active_requests",
        {"http_request_method": "GET"},
        1,
    ),
    (
        events.ServerRequestEnded(source="s", method="GET", route="/", status=200, seconds=0.25),
        "meshkit_http_server_active_requests",
        {"http_request_method": "GET"},
        -1,
    ),
    (
        events.ClientCallEnded(source="users", operation="get", outcome="fallback", attempts=3, seconds=2.5),
        "meshkit_client_call_duration_seconds_sum",
        {"client": "users", "operation": "get", "outcome": "fallback"},
        2.5,
    ),
    (
        events.ClientAttemptEnded(source="users", status=503, error_type="503", seconds=0.5),
        "meshkit_client_attempt_duration_seconds_sum",
        {"client": "users", "http_response_status_code": "503", "error_type": "503"},
        0.5,
    ),
    (
        events.ClientAttemptEnded(source="users", status=0, error_type="httpx.ConnectError", seconds=0.5),
        "meshkit_client_attempt_duration_seconds_count",
        {"client": "users", "http_response_status_code": "", "error_type": "httpx.ConnectError"},
        1,
    ),
    (
        events.RetryScheduled(source="users", attempt=1, delay=0.1, error_type="503"),
        "meshkit_retries_total",
        {"client": "users", "error_type": "503"},
        1,
    ),
    (
        events.CircuitChanged(source="users", old="closed", new="open"),
        "meshkit_circuitbreaker_transitions_total",
        {"breaker": "users", "from_state": "closed", "to_state": "open"},
        1,
    ),
    (
        events.FallbackUsed(source="users", reason="breaker_open", result="success", error_type=""),
        "meshkit_fallbacks_total",
        {"client": "users", "reason": "breaker_open", "result": "success"},
        1,
    ),
    (
        events.MessagePublished(source="user-events", outcome="confirmed", seconds=0.5),
        "meshkit_publish_duration_seconds_sum",
        {"destination": "user-events", "outcome": "confirmed"},
        0.5,
    ),
    (
        events.MessageReceived(source="orders", redelivered=True),
        "meshkit_messages_received_total",
        {"queue": "orders", "redelivered": "true"},
        1,
    ),
    (
        events.MessageReceived(source="orders", redelivered=False),
        "meshkit_messages_in_progress",
        {"queue": "orders"},
        1,
    ),
    (settled(), "meshkit_messages_in_progress", {"queue": "orders"}, -1),
    (
        settled(outcome="retry", error_type="builtins.OSError", seconds=0.5),
        "meshkit_message_process_duration_seconds_sum",
        {"queue": "orders", "handler": "charge", "outcome": "retry", "error_type": "builtins.OSError"},
        0.5,
    ),
    (settled(age=120.0), "meshkit_message_age_seconds_sum", {"queue": "orders"}, 120.0),
    (
        events.MessageRetried(source="orders", attempt=2, delay=10),
        "meshkit_message_retries_total",
        {"queue": "orders", "attempt": "2"},
        1,
    ),
    (
        events.MessageRetried(source="orders", attempt=31, delay=10),
        "meshkit_message_retries_total",
        {"queue": "orders", "attempt": "10+"},
        1,
    ),
    (
        events.MessageDeadLettered(source="orders", reason="permanent", error_type="x.Y", message_id="m"),
        "meshkit_dead_letters_total",
        {"queue": "orders", "reason": "permanent"},
        1,
    ),
    (
        events.DeadLetterReplayed(source="orders", result="republished"),
        "meshkit_dead_letters_replayed_total",
        {"queue": "orders", "result": "republished"},
        1,
    ),
    (
        events.ConsumerPaused(source="orders", retry_after=5, policy="x"),
        "meshkit_consumer_paused",
        {"queue": "orders"},
        "= 1",
    ),
    (events.ConsumerResumed(source="orders", paused=5), "meshkit_consumer_paused", {"queue": "orders"}, "= 0"),
    (
        events.BrokerConnectionChanged(source="publish", connected=True),
        "meshkit_broker_connected",
        {"connection": "publish"},
        "= 1",
    ),
    (
        events.BrokerConnectionChanged(source="publish", connected=False),
        "meshkit_broker_connected",
        {"connection": "publish"},
        "= 0",
    ),
    (
        events.BrokerConnectionChanged(source="publish", connected=True, reconnect=True),
        "meshkit_broker_reconnects_total",
        {"connection": "publish"},
        1,
    ),
    (events.BrokerBlocked(source="publish", blocked=True), "meshkit_broker_blocked", {"connection": "publish"}, "= 1"),
    (
        events.BrokerConnectionChanged(source="publish", connected=False),
        "meshkit_broker_blocked",
        {"connection": "publish"},
        "= 0",
    ),
    (
        events.OutboxMeasured(source="outbox", pending=3, oldest=1_700_000_000.0),
        "meshkit_outbox_pending_messages",
        {"outbox": "outbox"},
        "= 3",
    ),
    (
        events.OutboxMeasured(source="outbox", pending=3, oldest=1_700_000_000.0),
        "meshkit_outbox_oldest_message_timestamp_seconds",
        {"outbox": "outbox"},
        "= 1700000000",
    ),
    (
        events.OutboxMeasured(source="outbox", pending=0, oldest=None),
        "meshkit_outbox_oldest_message_timestamp_seconds",
        {"outbox": "outbox"},
        "= 0",
    ),
    (
        events.DuplicateSkipped(source="orders", message_id="m"),
        "meshkit_inbox_duplicates_total",
        {"queue": "orders"},
        1,
    ),
    (
        events.InvalidContext(source="amqp", reason="type"),
        "meshkit_invalid_context_total",
        {"carrier": "amqp", "reason": "type"},
        1,
    ),
    (
        events.RetryBudgetExhausted(source="provider", kind="hedge"),
        "meshkit_retry_budget_exhausted_total",
        {"client": "provider", "kind": "hedge"},
        1,
    ),
    (
        events.HedgeStarted(source="provider", attempt=2, delay=0.1),
        "meshkit_hedges_total",
        {"client": "provider"},
        1,
    ),
    *(
        (
            events.HedgeEnded(source="provider", attempts=2, winner=winner),
            "meshkit_hedged_calls_total",
            {"client": "provider", "winner": word},
            1,
        )
        for winner, word in ((1, "first"), (2, "hedge"), (None, "none"))
    ),
    (
        events.BulkheadRejected(source="provider", reason="full"),
        "meshkit_bulkhead_rejections_total",
        {"bulkhead": "provider", "reason": "full"},
        1,
    ),
    (
        events.RateLimited(source="provider", retry_after=1),
        "meshkit_ratelimiter_rejections_total",
        {"ratelimiter": "provider"},
        1,
    ),
]
# Shown by tests of their own below.
ELSEWHERE = {
    "meshkit_circuitbreaker_state",
    "meshkit_circuitbreaker_calls_total",
    "meshkit_retry_budget_balance",
    "meshkit_bulkhead_calls",
    "meshkit_bulkhead_limit",
    "meshkit_ratelimiter_available",
    "meshkit_consumer_last_settle_timestamp_seconds",
    "meshkit_metric_label_overflow_total",
    "meshkit_build_info",
}


@pytest.mark.parametrize(
    ("event", "name", "labels", "change"), MOVES, ids=lambda each: each if isinstance(each, str) else ""
)
def test_an_event_moves_its_metric(recorder, registry, event, name, labels, change):
    """What happened shows in the metric that the catalogue promises for it, under the labels it promises."""
    before = value(registry, name, **labels) or 0.0
    emit(event)
    after = value(registry, name, **labels)
    assert after is not None
    if isinstance(change, str):
        assert float(change.removeprefix("= ")) == after
    else:
        assert change == after - before


def test_every_row_of_the_catalogue_is_moved_by_something():
    """No metric is promised that nothing records, and none is recorded that is not promised."""
    shown = {re.sub("_(sum|count)$", "", name) for _, name, _, _ in MOVES}
    assert {metric.name for metric in METRICS} == shown | ELSEWHERE
    assert not shown & ELSEWHERE


def test_settling_and_starting_show_that_the_consumer_lives(registry):
    """The time of the last settle is that of the start at first, so that a consumer stuck from its start is seen."""
    clock = ManualClock()
    recorder = Recorder(registry, clock=clock)
    name = "meshkit_consumer_last_settle_timestamp_seconds"
    emit(events.ConsumerStarted(source="orders", handler="charge"))
    started = clock.time()
    assert started == value(registry, name, queue="orders")
    clock.block(60)
    emit(settled())
    assert started + 60 == value(registry, name, queue="orders")
    recorder.close()


def test_an_unknown_age_is_not_recorded(recorder, registry):
    """A message that does not say when it was first published has no age, rather than one of 0."""
    emit(settled(age=None))
    assert not value(registry, "meshkit_message_age_seconds_count", queue="orders")


def test_versions_can_be_read(recorder, registry):
    """`meshkit_build_info` names the versions of meshkit and of Python."""
    python = ".".join(map(str, sys.version_info[:3]))
    assert 1 == value(registry, "meshkit_build_info", version=__version__, python=python)


# --- counters begin at 0 ---------------------------------------------------------------------------------------------------------


def test_a_queues_counters_exist_before_anything_happens(recorder, registry):
    """With its consumer's start each reason for a dead letter is at 0: the first one is an increase."""
    emit(events.ConsumerStarted(source="orders", handler="charge"))
    for metric in METRICS:
        if metric.kind == "counter" and metric.label_names[0] == "queue" and "replayed" not in metric.name:
            for labels in metric.children(queue="orders"):
                assert 0 == value(registry, metric.name, **labels), (metric.name, labels)


def test_a_breakers_transitions_exist_from_the_first_scrape(recorder, registry):
    """A breaker that has never opened has transitions at 0."""
    breaker = CircuitBreaker("quiet")
    recorder.refresh()
    labels = {"breaker": breaker.name, "from_state": "closed", "to_state": "open"}
    assert 0 == value(registry, "meshkit_circuitbreaker_transitions_total", **labels)


def test_one_call_makes_all_outcomes_and_fallbacks_of_its_client(recorder, registry):
    """A client's failures and fallbacks are at 0 once it has made a call that went well."""
    emit(events.ClientCallEnded(source="users", operation="", outcome="success", attempts=1, seconds=0.1))
    for outcome in ("error", "fallback", "rejected", "cancelled"):
        name = "meshkit_client_call_duration_seconds_count"
        assert 0 == value(registry, name, client="users", operation="", outcome=outcome)
    labels = {"client": "users", "reason": "timeout", "result": "failure"}
    assert 0 == value(registry, "meshkit_fallbacks_total", **labels)


# --- label values ----------------------------------------------------------------------------------------------------------------


def test_values_beyond_the_cap_share_one_series(recorder, registry):
    """The 201st route of a service is counted under `__other__`, and that this happened is counted too."""
    for number in range(MOST_VALUES + 3):
        emit(events.ServerRequestEnded(source="s", method="GET", route=f"/{number}", status=200, seconds=0.1))
    name = "meshkit_http_server_request_duration_seconds"
    labels = {"http_request_method": "GET", "http_response_status_code": "200"}
    assert 1 == value(registry, f"{name}_count", http_route=f"/{MOST_VALUES - 1}", **labels)
    assert 3 == value(registry, f"{name}_count", http_route=OTHER, **labels)
    assert value(registry, f"{name}_count", http_route=f"/{MOST_VALUES}", **labels) is None
    assert 3 == value(registry, "meshkit_metric_label_overflow_total", metric=name, label="http_route")


def test_error_types_have_a_lower_cap(recorder, registry):
    """At most 50 error types a metric: an exception's class is named by code that meshkit does not know."""
    for number in range(MOST_ERROR_TYPES + 1):
        emit(events.RetryScheduled(source="users", attempt=1, delay=0.1, error_type=f"app.E{number}"))
    assert 1 == value(registry, "meshkit_retries_total", client="users", error_type=OTHER)


def test_memory_does_not_grow_with_values_beyond_the_cap(recorder):
    """Values that were folded are not remembered."""
    for number in range(5_000):
        emit(events.ServerRequestEnded(source="s", method="GET", route=f"/{number}", status=200, seconds=0.1))
    assert MOST_VALUES == len(recorder._requests._children)


def test_a_method_that_is_none_is_other(recorder, registry):
    """A client cannot make series by inventing methods."""
    emit(events.ServerRequestStarted(source="s", method="BREW"))
    assert 1 == value(registry, "meshkit_http_server_active_requests", http_request_method="_OTHER")


@pytest.mark.parametrize(
    "queue",
    [
        "amq.gen-JzTY20BRgKO-HjmUJj0wLg",
        "amq_0123456789abcdef0123456789abcdef",
        "reply-6f1c9a52-7bb1-4f2e-9f06-0d5a3a6b7c8d",
    ],
)
def test_generated_queue_names_are_one(recorder, registry, queue):
    """Queues that live for one connection share a series: their names never come again."""
    emit(events.MessageReceived(source=queue, redelivered=False))
    emit(events.MessagePublished(source=queue, outcome="confirmed", seconds=0.1))
    assert 1 == value(registry, "meshkit_messages_received_total", queue=GENERATED, redelivered="false")
    assert 1 == value(registry, "meshkit_publish_duration_seconds_count", destination=GENERATED, outcome="confirmed")
    assert queue not in generate_latest(registry).decode()


# --- circuit breakers ------------------------------------------------------------------------------------------------------------


async def fail() -> None:
    raise OSError


async def test_a_scrape_shows_state_and_calls_of_each_breaker(recorder, registry):
    """State is one-hot, calls are counted by result, both as they are when somebody looks."""
    breaker = CircuitBreaker("scraped provider", min_calls=2, window=2)
    guarded = breaker(fail)
    for _ in range(2):
        with pytest.raises(OSError):
            await guarded()
    for _ in range(3):
        with pytest.raises(CircuitOpenError):
            await guarded()
    generate_latest(registry)
    states = {
        state: value(registry, "meshkit_circuitbreaker_state", breaker="scraped provider", state=state)
        for state in ("closed", "open", "half_open", "isolated")
    }
    assert {"closed": 0, "open": 1, "half_open": 0, "isolated": 0} == states
    calls = {
        result: value(registry, "meshkit_circuitbreaker_calls_total", breaker="scraped provider", result=result)
        for result in ("success", "failure", "ignored", "rejected")
    }
    assert {"success": 0, "failure": 2, "ignored": 0, "rejected": 3} == calls
    labels = {"breaker": "scraped provider", "from_state": "closed", "to_state": "open"}
    assert 1 == value(registry, "meshkit_circuitbreaker_transitions_total", **labels)


async def test_what_holds_places_and_permits_is_read_when_somebody_looks(recorder, registry):
    """Bulkheads, rate limiters and budgets of one name are added up; what nobody has any more is taken away."""
    bulkheads = [Bulkhead("provider", limit=2, queue=5) for _ in range(2)]
    limiter = RateLimiter("provider", permits=7)
    budgets = [RetryBudget("provider", at_least=3), RetryBudget("", at_least=9)]

    @Pipeline("provider", bulkheads[0])
    async def look(seen):
        generate_latest(registry)
        seen["running"] = value(registry, "meshkit_bulkhead_calls", bulkhead="provider", state="running")

    seen = {}
    await Pipeline("provider", limiter).call(look, seen)
    generate_latest(registry)
    assert {"running": 1} == seen
    assert 0 == value(registry, "meshkit_bulkhead_calls", bulkhead="provider", state="running")
    assert 0 == value(registry, "meshkit_bulkhead_calls", bulkhead="provider", state="waiting")
    assert 4 == value(registry, "meshkit_bulkhead_limit", bulkhead="provider")
    assert 6 == value(registry, "meshkit_ratelimiter_available", ratelimiter="provider")
    assert 3 == value(registry, "meshkit_retry_budget_balance", client="provider")
    assert value(registry, "meshkit_retry_budget_balance", client="") is None
    assert 0 == value(registry, "meshkit_retry_budget_exhausted_total", client="provider", kind="retry")
    budgets.clear()
    generate_latest(registry)
    assert value(registry, "meshkit_retry_budget_balance", client="provider") is None


@pytest.mark.parametrize("name", ["\udcff-tenant", "x" * 1_000_000], ids=["surrogate", "book"])
def test_no_name_ends_all_scrapes(recorder, registry, name):
    """A name that no text encoding holds, or that is a book, is shown as far as it can be."""
    there = (CircuitBreaker(name), Bulkhead(name, limit=1), RateLimiter(name, permits=1), RetryBudget(name))
    emit(events.RetryScheduled(source=name, attempt=1, delay=0.1, error_type=name))
    text = recorder.render()[1]
    assert 4 == len(there)
    assert len(text) < 200_000
    shown = "?-tenant" if len(name) < 100 else "x" * 200
    assert 1 == value(registry, "meshkit_circuitbreaker_state", breaker=shown, state="closed")


def test_an_idle_breaker_whose_time_is_over_shows_that_it_would_probe(recorder, registry):
    """Nobody calls: the gauge says open until the time is over, and half-open from then on, as the first caller would
    find it (a stock pybreaker says open for ever)."""
    clock = ManualClock()
    breaker = CircuitBreaker("idle", open_for=10, clock=clock)
    breaker.force_open()

    def shown():
        generate_latest(registry)
        return {
            state
            for state in ("closed", "open", "half_open")
            if value(registry, "meshkit_circuitbreaker_state", breaker="idle", state=state)
        }

    assert {"open"} == shown()
    clock.block(10)
    assert {"half_open"} == shown()


def test_an_isolated_breaker_says_so(recorder, registry):
    """`isolated` is a state of its own, not a kind of open."""
    breaker = CircuitBreaker("isolated-one")
    breaker.isolate()
    generate_latest(registry)
    assert 1 == value(registry, "meshkit_circuitbreaker_state", breaker="isolated-one", state="isolated")
    assert 0 == value(registry, "meshkit_circuitbreaker_state", breaker="isolated-one", state="open")


def test_breakers_of_one_name_are_one_series(recorder, registry):
    """Where two breakers share a name, the state that rejects more is shown, and their calls are added."""
    one, two = CircuitBreaker("twin"), CircuitBreaker("twin")
    one(lambda: None)()
    two(lambda: None)()
    two.isolate()
    generate_latest(registry)
    assert 1 == value(registry, "meshkit_circuitbreaker_state", breaker="twin", state="isolated")
    assert 2 == value(registry, "meshkit_circuitbreaker_calls_total", breaker="twin", result="success")


def test_a_breaker_that_is_gone_has_no_state_and_its_calls_stay(recorder, registry):
    """A counter never goes back because a breaker was thrown away; its state is nobody's any more."""
    breaker = CircuitBreaker("short-lived")
    breaker(lambda: None)()
    generate_latest(registry)
    del breaker
    gc.collect()
    generate_latest(registry)
    assert value(registry, "meshkit_circuitbreaker_state", breaker="short-lived", state="closed") is None
    assert 1 == value(registry, "meshkit_circuitbreaker_calls_total", breaker="short-lived", result="success")


def test_a_breaker_that_was_opened_by_hand_is_seen_by_the_scrape(recorder, registry):
    """Opening the pybreaker object itself shows at the next scrape, with its transition."""
    breaker = CircuitBreaker("by-hand")
    recorder.refresh()
    breaker.core.open()
    recorder.refresh()
    assert 1 == value(registry, "meshkit_circuitbreaker_state", breaker="by-hand", state="open")
    labels = {"breaker": "by-hand", "from_state": "closed", "to_state": "open"}
    assert 1 == value(registry, "meshkit_circuitbreaker_transitions_total", **labels)


# --- what a scrape is answered ---------------------------------------------------------------------------------------------------


def exemplars(body: bytes) -> dict[str, dict[str, str]]:
    return {
        sample.name: sample.exemplar.labels
        for family in parse_openmetrics(body.decode())
        for sample in family.samples
        if sample.exemplar
    }


def test_exemplars_lead_to_sampled_traces_only(recorder):
    """Histograms and counters carry the trace of a sampled span, where OpenMetrics is asked for."""
    emit(settled(traceparent=NOT_SAMPLED))
    emit(events.MessageRetried(source="orders", attempt=2, delay=1, traceparent=""))
    content_type, body = recorder.render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    assert {} == exemplars(body)
    emit(settled(age=3.0, traceparent=SAMPLED))
    emit(events.MessageDeadLettered(source="q", reason="expired", error_type="", message_id="m", traceparent=SAMPLED))
    found = exemplars(recorder.render(OPENMETRICS)[1])
    assert {
        "meshkit_message_process_duration_seconds_bucket": EXEMPLAR,
        "meshkit_message_age_seconds_bucket": EXEMPLAR,
        "meshkit_dead_letters_total": EXEMPLAR,
    } == found


def test_a_busy_histogram_gets_an_exemplar_now_and_then(registry):
    """Of many alike one stands for all for a tenth of a second; a slower one is always shown."""
    clock = ManualClock()
    recorder = Recorder(registry, clock=clock)

    def shown(seconds: float, span: str) -> list[str]:
        traceparent = SAMPLED.replace(EXEMPLAR["span_id"], span)
        emit(events.MessagePublished(source="x", outcome="confirmed", seconds=seconds, traceparent=traceparent))
        families = parse_openmetrics(recorder.render(OPENMETRICS)[1].decode())
        samples = [sample for family in families for sample in family.samples if sample.exemplar]
        return [sample.exemplar.labels["span_id"] for sample in samples]

    assert ["1" * 16] == shown(0.001, "1" * 16)
    assert ["1" * 16] == shown(0.001, "2" * 16)
    assert ["1" * 16, "3" * 16] == shown(4.0, "3" * 16)
    clock.block(0.1)
    assert ["4" * 16, "3" * 16] == shown(0.001, "4" * 16)
    recorder.close()


def test_rows_without_exemplars_have_none(recorder):
    """Exactly the rows that the catalogue marks can carry an exemplar."""
    for event, *_ in MOVES:
        if hasattr(event, "traceparent"):
            emit(type(event)(**{**{name: getattr(event, name) for name in _fields(event)}, "traceparent": SAMPLED}))
    former = tracer()
    span = tracing.install(provider=TracerProvider(shutdown_on_exit=False)).start("call", parent=None)
    with span.active():
        emit(events.RetryScheduled(source="users", attempt=1, delay=0.1, error_type="503"))
    use_tracer(former)
    found = exemplars(recorder.render(OPENMETRICS)[1])
    assert {metric.name for metric in METRICS if metric.exemplars} == {name.removesuffix("_bucket") for name in found}
    assert {"trace_id": span.context.trace_id, "span_id": span.context.span_id} == found["meshkit_retries_total"]


def _fields(event: Event) -> list[str]:
    return [name for cls in type(event).__mro__ for name in getattr(cls, "__slots__", ())]


@pytest.mark.parametrize("accept", ["", "text/plain;version=0.0.4", "*/*"])
def test_others_get_plain_text(recorder, accept):
    """Who does not ask for OpenMetrics gets the older text format."""
    content_type, body = recorder.render(accept)
    assert content_type.startswith("text/plain")
    assert "meshkit_build" in {family.name.removesuffix("_info") for family in parse_text(body.decode())}


def test_an_apps_own_metrics_are_in_the_same_answer(recorder, registry):
    """One registry, one `/metrics`: what the app keeps itself stands beside meshkit's."""
    Counter("app_orders", "Orders.", registry=registry).inc()
    assert b"app_orders_total 1.0" in recorder.render()[1]


def test_install_is_once_a_registry(registry):
    """Several edges of a process share one recorder, and after `uninstall` nothing of it is left."""
    first = recorders.install(registry)
    assert first is recorders.install(registry)
    emit(events.DuplicateSkipped(source="orders", message_id="m"))
    assert 1 == value(registry, "meshkit_inbox_duplicates_total", queue="orders")
    recorders.uninstall(registry)
    recorders.uninstall(registry)
    assert b"" == generate_latest(registry)
    again = recorders.install(registry)
    assert again is not first
    assert value(registry, "meshkit_inbox_duplicates_total", queue="orders") is None
    recorders.uninstall(registry)


# --- several processes -----------------------------------------------------------------------------------------------------------

_WORKER = """
import sys, time, warnings
warnings.simplefilter("error")
from prometheus_client import CollectorRegistry
from meshkit.core import events
from meshkit.core.events import emit
from meshkit.policies.circuit_breaker import CircuitBreaker
from meshkit.telemetry import recorder
made = recorder.install(CollectorRegistry())
breaker = CircuitBreaker("provider")
breaker(lambda: None)()
emit(events.MessageReceived(source="orders", redelivered=False))
traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
emit(events.MessageDeadLettered(source="orders", reason="expired", error_type="", message_id="m", traceparent=traceparent))
breaker.isolate()
print("ready", flush=True)
if sys.argv[1] == "render":
    sys.stdin.readline()
    sys.stdout.write(made.render("application/openmetrics-text;version=1.0.0")[1].decode())
else:
    time.sleep(600)
"""


@pytest.mark.once
def test_processes_of_one_service_are_joined(tmp_path: Path, monkeypatch):
    """With PROMETHEUS_MULTIPROC_DIR counters are added, gauges joined, those of a killed process forgotten; there are
    no exemplars, and one warning says what to prefer."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))

    def start(what: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert "ready\n" == process.stdout.readline()
        return process

    living, killed, rendering = start("wait"), start("wait"), start("render")
    try:
        killed.kill()
        killed.wait(10)
        text, said = rendering.communicate("\n", timeout=60)
    finally:
        for process in (living, killed, rendering):
            process.kill()
            process.communicate()
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_openmetrics(text)
        for sample in family.samples
    }
    assert 3 == samples["meshkit_dead_letters_total", (("queue", "orders"), ("reason", "expired"))]
    assert 2 == samples["meshkit_messages_in_progress", (("queue", "orders"),)]
    assert 1 == samples["meshkit_circuitbreaker_state", (("breaker", "provider"), ("state", "isolated"))]
    assert 3 == samples["meshkit_circuitbreaker_calls_total", (("breaker", "provider"), ("result", "success"))]
    assert any(name == "meshkit_build_info" for name, _ in samples)
    assert "trace_id" not in text
    assert 1 == said.count("PROMETHEUS_MULTIPROC_DIR is set")
