"""The table of metrics: its names, its closed sets, and that every row is recorded."""

import re
from typing import get_args, get_type_hints

import pytest
from busy_service import one_round, policies, starting
from prometheus_client import CollectorRegistry, generate_latest

from meshkit.core import events
from meshkit.telemetry.catalogue import HTTP_BUCKETS, METRICS, Metric
from meshkit.telemetry.recorder import Recorder

BY_NAME = {metric.name: metric for metric in METRICS}


def values(metric: str, label: str) -> set[str]:
    return set(next(entry for entry in BY_NAME[metric].labels if entry.name == label).values)


def test_every_name_stands_once():
    """No two rows share a name."""
    assert len(METRICS) == len(BY_NAME)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_name_says_kind_and_unit_as_prometheus_wants_it(metric: Metric):
    """Counters end in `_total`, nothing else does; seconds and messages that are measured show in the name."""
    assert re.fullmatch(r"meshkit_[a-z][a-z0-9_]*", metric.name)
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert (metric.kind == "info") == metric.name.endswith("_info")
    assert not metric.name.endswith(("_count", "_sum", "_bucket", "_milliseconds", "_minutes"))
    assert (metric.unit == "seconds") == metric.name.endswith("_seconds")


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_help_is_one_sentence(metric: Metric):
    """The help of a metric is one sentence that begins with a capital, or with the value it explains."""
    assert re.fullmatch(r"[A-Z1][^\n]*[^.]\.", metric.help)
    assert ". " not in metric.help


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_what_a_kind_needs_it_has(metric: Metric):
    """A histogram has ascending buckets, a gauge says how processes are joined, exemplars are where they can be."""
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert sorted(set(metric.buckets)) == list(metric.buckets)
    assert (metric.joined is not None) == (metric.kind == "gauge")
    assert not (metric.exemplars and metric.kind in ("gauge", "info"))
    assert len(set(metric.label_names)) == len(metric.label_names)


def test_label_values_are_lower_case():
    """Closed label values are lower case words, so that nobody has to remember which is which."""
    for metric in METRICS:
        for label in metric.labels:
            for value in label.values:
                assert re.fullmatch(r"[a-z0-9_+]+", value), (metric.name, label.name, value)


def test_a_p95_of_200_ms_can_be_measured():
    """0.2 is a boundary, and so are those of the conventions."""
    conventions = {0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10}
    assert conventions | {0.15, 0.2, 0.3} == set(HTTP_BUCKETS)


@pytest.mark.parametrize(
    ("event", "attribute", "metric", "label"),
    [
        (events.MessageDeadLettered, "reason", "meshkit_dead_letters_total", "reason"),
        (events.MessageSettled, "outcome", "meshkit_message_process_duration_seconds", "outcome"),
        (events.MessagePublished, "outcome", "meshkit_publish_duration_seconds", "outcome"),
        (events.ClientCallEnded, "outcome", "meshkit_client_call_duration_seconds", "outcome"),
        (events.CircuitChanged, "new", "meshkit_circuitbreaker_state", "state"),
        (events.CircuitChanged, "old", "meshkit_circuitbreaker_transitions_total", "from_state"),
        (events.CircuitChanged, "new", "meshkit_circuitbreaker_transitions_total", "to_state"),
        (events.FallbackUsed, "reason", "meshkit_fallbacks_total", "reason"),
        (events.RetryBudgetExhausted, "kind", "meshkit_retry_budget_exhausted_total", "kind"),
        (events.BulkheadRejected, "reason", "meshkit_bulkhead_rejections_total", "reason"),
        (events.FallbackUsed, "result", "meshkit_fallbacks_total", "result"),
        (events.DeadLetterReplayed, "result", "meshkit_dead_letters_replayed_total", "result"),
        (events.InvalidContext, "reason", "meshkit_invalid_context_total", "reason"),
    ],
)
def test_closed_values_are_those_that_events_carry(event, attribute, metric, label):
    """What a policy or an edge says and what a label may say are one set."""
    assert set(get_args(get_type_hints(event)[attribute])) == values(metric, label)


def test_children_are_named_once_the_open_labels_are():
    """A queue that shows itself gets a dead-letter counter for every reason; before that there is none."""
    dead_letters = BY_NAME["meshkit_dead_letters_total"]
    assert () == dead_letters.children()
    reasons = values("meshkit_dead_letters_total", "reason")
    assert [{"queue": "orders", "reason": reason} for reason in sorted(reasons)] == sorted(
        dead_letters.children(queue="orders"), key=lambda child: child["reason"]
    )
    assert ({"queue": "orders"},) == BY_NAME["meshkit_messages_in_progress"].children(queue="orders", handler="x")


def test_every_row_is_recorded_and_nothing_else():
    """After one round of all that may happen, each series of each row is exposed, and none that the table lacks."""
    registry = CollectorRegistry()
    recorder = Recorder(registry)
    there = policies()
    try:
        for event in (*starting(), *one_round(1)):
            events.emit(event)
        lines = generate_latest(registry).decode().splitlines()
    finally:
        recorder.close()
    assert 4 == len(there)
    exposed = {re.split(r"[ {]", line)[0] for line in lines if not line.startswith("#")}
    promised = {name for metric in METRICS for name in metric.series}
    created = {name for name in exposed if name.endswith("_created")}
    assert promised == exposed - created
