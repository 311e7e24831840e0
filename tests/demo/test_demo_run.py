"""What `./run demo` must show, on the embedded broker and on a real RabbitMQ."""

from __future__ import annotations

import os
import re
import sqlite3

import pytest
from demo_runs import Run

from meshkit.testing import servers

pytestmark = [pytest.mark.once, pytest.mark.timeout(240)]

KEYS = [
    "broker",
    "enrollments_accepted",
    "enrollments_completed",
    "enrollments_compensated",
    "lost",
    "double_effects",
    "retries",
    "breaker_opened",
    "outage_dead_letters",
    "dead_lettered",
    "replayed",
    "left_in_dlq",
    "story_trace_id",
    "story_replay_trace_id",
    "story_services",
    "story_spans",
    "seconds",
]


def test_the_demo_ends_well(run: Run):
    """It exits 0 and prints one JSON object with the promised keys, and nothing else, on stdout."""
    assert 0 == run.code, run.tale[-3000:]
    assert 1 == len(run.stdout.splitlines())
    assert list(run.summary) == KEYS


def test_every_accepted_enrollment_has_ended_once(run: Run):
    """Accepted is completed and compensated together; nothing is lost, nothing took effect twice."""
    summary = run.summary
    assert 0 < summary["enrollments_compensated"] < summary["enrollments_accepted"]
    assert summary["enrollments_accepted"] == summary["enrollments_completed"] + summary["enrollments_compensated"]
    assert (0, 0) == (summary["lost"], summary["double_effects"])


def test_the_outage_costs_no_dead_letter(run: Run):
    """In the outage calls were retried and the breaker opened, and no message was given up."""
    summary = run.summary
    assert 0 == summary["outage_dead_letters"]
    assert summary["breaker_opened"] >= 1
    assert summary["retries"] >= 1


def test_what_the_defect_killed_is_replayed(run: Run):
    """All dead letters of the defect were replayed, and none is left."""
    summary = run.summary
    assert summary["dead_lettered"] > 0
    assert (summary["dead_lettered"], 0) == (summary["replayed"], summary["left_in_dlq"])


def test_it_takes_no_longer_than_promised(run: Run):
    """The demo takes at most two minutes once it is installed."""
    assert run.summary["seconds"] < 120


def test_five_acts_are_told(run: Run):
    """The tale has five acts, says what people were told in the outage, and shows cause and stack of a dead letter."""
    assert ["1", "2", "3", "4", "5"] == re.findall(r"^Act (\d):", run.tale, re.MULTILINE)
    assert '"enrollment pending" (degraded)' in run.tale
    assert "pricing.py" in run.tale
    assert "ValueError: invalid literal for int() with base 10: 'G5'" in run.tale
    assert "$ meshkit dlq list payment-service.enrollment-requested" in run.tale
    assert run.summary["story_trace_id"] in run.tale


def test_each_service_has_a_database_of_its_own(embedded_run: Run):
    """Five services, five databases, and the provider's books beside them."""
    assert [
        "course-service.db",
        "enrollment-service.db",
        "notification-content-worker.db",
        "payment-provider.db",
        "payment-service.db",
        "user-service.db",
    ] == sorted(file.name for file in embedded_run.folder.glob("*.db"))


def test_the_provider_was_asked_more_often_than_it_charged(embedded_run: Run):
    """Its own books: one charge for each completed enrollment, though some were asked for several times."""
    books = sqlite3.connect(embedded_run.folder / "payment-provider.db")
    requests, keys = books.execute("SELECT count(*), count(DISTINCT key) FROM requests").fetchone()
    charges, charged = books.execute("SELECT count(*), count(DISTINCT key) FROM charges").fetchone()
    books.close()
    assert requests > keys
    assert embedded_run.summary["enrollments_completed"] == charges == charged


def test_nobody_was_charged_in_the_outage(embedded_run: Run):
    """While it failed, the provider was asked a few times, and then left alone: the breaker was open."""
    books = sqlite3.connect(embedded_run.folder / "payment-provider.db")
    (failed,) = books.execute("SELECT count(*) FROM requests WHERE behaviour = 'fail'").fetchone()
    books.close()
    # Without a breaker each of the messages would have been asked for three times an attempt.
    assert 0 < failed < 24 * 3


@pytest.mark.real("jaeger")
def test_jaeger_tells_the_same_story(embedded_run: Run, jaeger_of_the_run: servers.Jaeger | None):
    """A real Jaeger has the story as one trace and the replay as a second one that refers to it."""
    assert jaeger_of_the_run is not None
    summary = embedded_run.summary
    story, replay = (jaeger_of_the_run.trace(summary[key]) for key in ("story_trace_id", "story_replay_trace_id"))
    assert story is not None
    assert replay is not None
    assert summary["story_spans"] == len(story["spans"])
    services = {process["serviceName"] for process in story["processes"].values()}
    assert set(summary["story_services"]) == services
    here = {span["spanID"] for span in story["spans"]}
    parents = [
        [reference["spanID"] for reference in span["references"] if reference["refType"] == "CHILD_OF"]
        for span in story["spans"]
    ]
    assert 1 == parents.count([])
    assert all(parent in here for found in parents for parent in found)
    referred = {
        reference["traceID"]
        for span in replay["spans"]
        for reference in span["references"]
        if reference["refType"] == "FOLLOWS_FROM"
    }
    assert summary["story_trace_id"] in referred


@pytest.mark.real("jaeger")
def test_jaeger_finds_the_dead_letter_by_its_reason(embedded_run: Run, jaeger_of_the_run: servers.Jaeger | None):
    """An operator finds the story in Jaeger by the reason that stands on the dead-letter hop."""
    assert jaeger_of_the_run is not None
    tags = "%7B%22meshkit.dead_letter.reason%22%3A%22retries_exhausted%22%7D"
    found = jaeger_of_the_run.api(f"/api/traces?service=payment-service&limit=50&lookback=1h&tags={tags}")
    assert embedded_run.summary["story_trace_id"] in {trace["traceID"] for trace in found}


def test_nothing_is_left_in_the_temporary_folder(embedded_run: Run):
    """The kept folder is the only one; no other was made for this run."""
    assert str(embedded_run.folder) in embedded_run.tale
    assert os.listdir(embedded_run.folder / "traces")
