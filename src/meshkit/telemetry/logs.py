"""Log lines that can be found from a trace, and traces from a log line.

Nothing here touches logging by itself. An app adds `Context()` to a handler it has, takes `JsonFormatter` where its
logs are read by a machine, or has `install()` (`telemetry.setup(logs="json")`) do both.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from meshkit.core.events import error_type
from meshkit.core.scope import current_scope
from meshkit.core.trace import tracer

# What every record has; anything else came in `extra=` or from a filter.
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Context(logging.Filter):
    """Puts `trace_id`, `span_id`, `trace_sampled`, `service`, `message_id` and `queue` on each record.

    They are empty where there is nothing to say, so that a format string may name them. What the caller gave in
    `extra=` stays.

    Args:
        service: name of the service.
    """

    def __init__(self, service: str = "") -> None:
        super().__init__()
        self.service = service

    def filter(self, record: logging.LogRecord) -> bool:
        here = tracer().current().context
        scope = current_scope()
        handling = None if scope is None else scope.handling
        facts = {
            "trace_id": here.trace_id if here else "",
            "span_id": here.span_id if here else "",
            "trace_sampled": here.sampled if here else False,
            "service": self.service,
            "message_id": handling.message_id if handling else "",
            "queue": handling.queue if handling else "",
        }
        for name, value in facts.items():
            record.__dict__.setdefault(name, value)
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, all extras that are not empty, and
    of an exception `error_type` and `stack`."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in vars(record).items():
            if (
                name not in _OWN
                and name not in line
                and value is not None
                and not (isinstance(value, str) and not value)
            ):
                line[name] = value
        if "trace_id" not in line:
            line.pop("trace_sampled", None)
        if record.exc_info and record.exc_info[0]:
            if record.exc_info[1] is not None:
                line.setdefault("error_type", error_type(record.exc_info[1]))
            line["stack"] = record.exc_text or self.formatException(record.exc_info)
        elif record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        try:
            return json.dumps(line, default=str, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError):
            # An extra that JSON has no form for (a NaN, a table with keys that are no text): the line is worth more.
            plain = {name: value if isinstance(value, str) else str(value) for name, value in line.items()}
            return json.dumps(plain, separators=(",", ":"))


def install(*, service: str = "", stream: TextIO | None = None) -> None:
    """Write what reaches the root logger as JSON lines.

    The root logger's handlers get the formatter and the filter; where it has none, one is added that writes to
    `stream` (standard error where left out), and the level becomes INFO. Loggers with handlers of their own keep them.
    """
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.StreamHandler(stream or sys.stderr))
        root.setLevel(logging.INFO)
    for handler in root.handlers:
        handler.setFormatter(JsonFormatter())
        handler.filters = [kept for kept in handler.filters if not isinstance(kept, Context)]
        handler.addFilter(Context(service))
