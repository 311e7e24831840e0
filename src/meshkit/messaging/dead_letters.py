"""What a message carries after it has failed: why, where, since when, and a fingerprint by which causes are grouped."""

from __future__ import annotations

import hashlib
import re
import socket
import sysconfig
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from meshkit.core.events import DeadLetterReason, error_type
from meshkit.messaging import headers as h
from meshkit.messaging.message import Delivery

HOSTNAME: Final = socket.gethostname()


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Which program failed.

    Attributes:
        service: its name.
        version: its version, empty where nobody said.
    """

    service: str
    version: str = ""
    host: str = HOSTNAME


def failure_headers(
    delivery: Delivery, *, error: BaseException | None, note: str, at: float, origin: Origin, failed_in: str = ""
) -> dict[str, Any]:
    """The headers of the copy that is tried again or dead-lettered: those it came with, without the broker's own, and
    what is known of the failure.

    Args:
        error: what the handler raised; `None` where it raised nothing (an expired message, a verdict).
        note: said instead of the error's message, where there is no error.
        at: when it failed, seconds since the epoch.
        failed_in: `traceparent` of the span in which it failed.
    """
    headers = first_facts(delivery)
    now = h.rfc3339(at)
    headers.setdefault(h.FIRST_FAILED_AT, now)
    headers[h.LAST_FAILED_AT] = now
    facts = {
        h.ERROR_TYPE: error_type(error) if error is not None else "",
        h.ERROR_MESSAGE: h.cut(message_of(error) if error is not None else note, h.MOST_MESSAGE),
        h.ERROR_STACK: h.tail(stack_of(error), h.MOST_STACK) if error is not None else "",
        h.ERROR_FINGERPRINT: fingerprint(error, note),
        h.SERVICE: origin.service,
        h.VERSION: origin.version,
        h.HOST: origin.host,
        h.FAILED_TRACEPARENT: failed_in,
    }
    for name, value in facts.items():
        if value:
            headers[name] = value
        else:
            # What an earlier failure left behind says nothing of this one.
            headers.pop(name, None)
    return headers


def first_facts(delivery: Delivery) -> dict[str, Any]:
    """The headers of a copy that says where the message first came from; set once, so they survive every rung."""
    headers = h.without_broker_headers(delivery.headers)
    headers[h.QUEUE] = delivery.queue
    headers[h.EXCHANGE] = delivery.exchange
    headers[h.ROUTING_KEY] = delivery.routing_key
    if h.FIRST_PUBLISHED_AT not in headers and delivery.first_published_at is not None:
        headers[h.FIRST_PUBLISHED_AT] = h.rfc3339(delivery.first_published_at)
    return headers


def dead_letter_headers(headers: dict[str, Any], *, reason: DeadLetterReason, at: float) -> dict[str, Any]:
    """`failure_headers` of a message that is given up."""
    headers[h.REASON] = reason
    headers[h.DEAD_LETTERED_AT] = h.rfc3339(at)
    return headers


# -- what failed ------------------------------------------------------------------------------------------------------


def message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        # An error whose text fails must not keep its message from being settled.
        return f"<{type(error).__qualname__} has no text>"


def stack_of(error: BaseException) -> str:
    """The traceback as Python prints it, causes included."""
    try:
        return "".join(traceback.format_exception(error))
    except Exception:
        return f"<the stack of {type(error).__qualname__} cannot be printed>"


# Most specific first: what has been masked is not looked at again.
_MASKS: Final = (
    (re.compile(r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b", re.I), "<uuid>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?"), "<time>"),
    (re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), "<address>"),
    (re.compile(r"\b0x[0-9a-f]+\b", re.I), "<n>"),
    (re.compile(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{8,}\b", re.I), "<id>"),
    (re.compile(r"\b[A-Za-z_]*\d+[\w]*\b"), "<n>"),
)


def masked(text: str) -> str:
    """A message without what differs from case to case: ids, numbers, times, addresses."""
    for pattern, word in _MASKS:
        text = pattern.sub(word, text)
    return text


def fingerprint(error: BaseException | None, note: str = "") -> str:
    """Sixteen hex digits that are the same for failures with one cause: type, place in the service's own code, and the
    message without ids and numbers."""
    if error is None:
        parts = ("", "", masked(note))
    else:
        parts = (error_type(error), _place(error.__traceback__), masked(message_of(error)[: h.MOST_MESSAGE]))
    return hashlib.sha256("\n".join(parts).encode("utf-8", "replace")).hexdigest()[:16]


_FOREIGN: Final = tuple(
    str(path)
    for path in {
        *(
            Path(folder)
            for name, folder in sysconfig.get_paths().items()
            if name in ("stdlib", "platstdlib", "purelib")
        ),
        Path(__file__).parents[1],
    }
)


def _place(trace: TracebackType | None) -> str:
    """The innermost frame in code of the service's own: file name and function. No line: that moves with each edit."""
    place = last = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        last = f"{Path(code.co_filename).name}:{code.co_name}"
        if not code.co_filename.startswith(_FOREIGN) and not code.co_filename.startswith("<"):
            place = last
        trace = trace.tb_next
    return place or last


def error_fields(headers: Mapping[str, Any]) -> dict[str, str]:
    """What a log record says of a failure, from the headers that were made of it."""
    return {
        "error_type": h.text(headers, h.ERROR_TYPE),
        "error_message": h.text(headers, h.ERROR_MESSAGE),
        "fingerprint": h.text(headers, h.ERROR_FINGERPRINT),
    }
