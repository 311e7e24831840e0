"""Log lines that can be found from a trace, and a formatter that takes whatever is logged."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from opentelemetry.sdk.trace import TracerProvider

from meshkit.core.scope import Handling, Scope, scope_open
from meshkit.core.trace import tracer, use_tracer
from meshkit.telemetry import logs, tracing


@pytest.fixture
def written() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def log(written: io.StringIO) -> Iterator[logging.Logger]:
    """A logger of its own whose lines are JSON."""
    logger = logging.getLogger("tests.telemetry.logs")
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs.JsonFormatter())
    handler.addFilter(logs.Context("course-service"))
    logger.addHandler(handler)
    logger.propagate = False
    yield logger
    logger.removeHandler(handler)
    logger.propagate = True


def line(written: io.StringIO) -> dict[str, object]:
    assert 1 == written.getvalue().count("\n")
    return json.loads(written.getvalue())


def test_a_line_is_one_json_object(log, written):
    """Time in UTC, level, logger, message and service; nothing that is empty."""
    log.warning("paid %s\nin full", "7.00")
    found = line(written)
    age = datetime.now(UTC) - datetime.fromisoformat(str(found.pop("time")).replace("Z", "+00:00"))
    assert 0 <= age.total_seconds() < 60
    assert {
        "level": "WARNING",
        "logger": "tests.telemetry.logs",
        "message": "paid 7.00\nin full",
        "service": "course-service",
    } == found


def test_a_line_names_its_trace_and_the_message_in_hand(log, written):
    """Inside a span and a delivery the ids are on the line; what the caller says in `extra` stays as it is."""
    former = tracer()
    span = tracing.install(provider=TracerProvider(shutdown_on_exit=False)).start("process", parent=None)
    with span.active(), scope_open(Scope(handling=Handling(message_id="m-1", queue="orders"))):
        log.warning("failed", extra={"attempt": 3, "queue": "another"})
    use_tracer(former)
    found = line(written)
    assert span.context is not None
    assert (span.context.trace_id, span.context.span_id, True) == (
        found["trace_id"],
        found["span_id"],
        found["trace_sampled"],
    )
    assert ("m-1", "another", 3) == (found["message_id"], found["queue"], found["attempt"])


def test_an_exception_has_its_type_and_stack(log, written):
    """The type is `module.Class`, without a module where it is built in, as in metrics and spans."""
    try:
        raise TimeoutError("late")
    except TimeoutError:
        log.exception("failed")
    found = line(written)
    assert "TimeoutError" == found["error_type"]
    assert str(found["stack"]).endswith("TimeoutError: late")


@pytest.mark.parametrize("value", [math.nan, {("a", "b"): 1}, object(), b"\xff", {1, 2}, datetime.now(UTC)])
def test_any_extra_makes_a_valid_line(log, written, value):
    """What JSON has no form for is written as text; the line is never lost."""
    log.warning("odd", extra={"odd": value})
    assert "odd" in json.loads(written.getvalue(), parse_constant=pytest.fail)


def test_an_extra_that_contains_itself_makes_a_valid_line(log, written):
    """A loop among the extras does not cost the line either."""
    loop: list[object] = []
    loop.append(loop)
    log.warning("odd", extra={"loop": loop})
    assert "odd" == line(written)["message"]


def test_a_format_string_may_name_what_is_empty(written):
    """With the filter on a text handler, `%(trace_id)s` and the others always exist."""
    record = logging.makeLogRecord({"msg": "x"})
    assert logs.Context().filter(record)
    assert "x ///" == logging.Formatter("%(message)s %(trace_id)s/%(message_id)s/%(queue)s/%(service)s").format(record)


def test_the_root_logger_is_taken_over_only_by_install(monkeypatch, written):
    """`install` gives the root logger's handlers formatter and filter, once each, and adds a handler only where there is
    none."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", logging.WARNING)
    logs.install(service="a", stream=written)
    logs.install(service="b", stream=io.StringIO())
    logging.getLogger("app").info("started")
    assert "b" == line(written)["service"]
    assert 1 == len(root.handlers)
