"""The names that messages carry over the wire, in one place, and what may be read from and written into them.

All of meshkit's own values are strings: AMQP's timestamps and integers have widths that clients disagree about. No own
name begins with `x-`: those belong to the broker. What others put into the headers is kept as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from meshkit.errors import EnvelopeError

TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"
BAGGAGE: Final = "baggage"

DEADLINE: Final = "meshkit-deadline"
ATTEMPT: Final = "meshkit-attempt"
DEGRADED: Final = "meshkit-degraded"

FIRST_PUBLISHED_AT: Final = "meshkit-first-published-at"
FIRST_FAILED_AT: Final = "meshkit-first-failed-at"
LAST_FAILED_AT: Final = "meshkit-last-failed-at"
DEAD_LETTERED_AT: Final = "meshkit-dead-lettered-at"

QUEUE: Final = "meshkit-queue"
EXCHANGE: Final = "meshkit-exchange"
ROUTING_KEY: Final = "meshkit-routing-key"

REASON: Final = "meshkit-reason"
ERROR_TYPE: Final = "meshkit-error-type"
ERROR_MESSAGE: Final = "meshkit-error-message"
ERROR_STACK: Final = "meshkit-error-stack"
ERROR_FINGERPRINT: Final = "meshkit-error-fingerprint"

FAILED_TRACEPARENT: Final = "meshkit-failed-traceparent"
ORIGINAL_TRACEPARENT: Final = "meshkit-original-traceparent"

SERVICE: Final = "meshkit-service"
VERSION: Final = "meshkit-version"
HOST: Final = "meshkit-host"

REPLAY_COUNT: Final = "meshkit-replay-count"
REPLAYED_AT: Final = "meshkit-replayed-at"
REPLAYED_BY: Final = "meshkit-replayed-by"

CE_SPECVERSION: Final = "ce-specversion"
CE_ID: Final = "ce-id"
CE_SOURCE: Final = "ce-source"
CE_TYPE: Final = "ce-type"
CE_TIME: Final = "ce-time"
CE_DATASCHEMA: Final = "ce-dataschema"

DELIVERY_COUNT: Final = "x-delivery-count"
"""What the broker writes: how often a quorum queue's message came back without having been settled."""

DROPPED_ON_REPLAY: Final = frozenset(
    {
        ATTEMPT,
        DEADLINE,
        DEGRADED,
        LAST_FAILED_AT,
        DEAD_LETTERED_AT,
        REASON,
        ERROR_TYPE,
        ERROR_MESSAGE,
        ERROR_STACK,
        ERROR_FINGERPRINT,
        FAILED_TRACEPARENT,
        SERVICE,
        VERSION,
        HOST,
    }
)
"""What a replay leaves out: it begins to count anew, and the failure it mends is over. Where the message came from and
when it was first published and first failed stays."""

# The whole header table travels in one frame with the properties; RabbitMQ closes the connection over one that is too
# large (frame_max is 131,072 bytes by default, 8,192 the least a 4.x broker takes), and all in flight comes again.
MOST_BYTES: Final = 32 * 1024
MOST_MESSAGE: Final = 1024
MOST_STACK: Final = 8 * 1024

# The broker's notes about deaths make RabbitMQ up to 3.13 drop a republished message as "a cycle", and its counts begin
# anew with each copy. CC and BCC would send the copy to everybody again.
_BROKERS_OWN: Final = frozenset({DELIVERY_COUNT, "x-acquired-count", "x-death", "CC", "BCC"})
_BROKERS_OWN_STARTS: Final = ("x-first-death-", "x-last-death-")


def without_broker_headers(headers: Mapping[str, Any] | None) -> dict[str, Any]:
    """The headers a copy of a message may carry: all but what the broker wrote about this one's fate."""
    return {
        name: value
        for name, value in (headers or {}).items()
        if name not in _BROKERS_OWN and not name.startswith(_BROKERS_OWN_STARTS)
    }


# -- times ------------------------------------------------------------------------------------------------------------


def rfc3339(epoch: float) -> str:
    """A point in time (seconds since the epoch) as text, in UTC with milliseconds: `2026-11-21T13:00:00.000Z`."""
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


# https://www.rfc-editor.org/rfc/rfc3339#section-5.6
_RFC3339: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")


def parse_rfc3339(text: str) -> float:
    """The point in time that `rfc3339` wrote, or any other producer in that format, as seconds since the epoch.

    Raises:
        ValueError: the text is no RFC 3339 time.
    """
    if _RFC3339.fullmatch(text) is None:
        raise ValueError(f"{text[:64]!r} is no RFC 3339 time such as 2026-11-21T13:00:00.000Z")
    # In UTC, since an offset may carry it beyond the years that can be written again.
    return datetime.fromisoformat(text.upper()).astimezone(UTC).timestamp()


# -- reading ----------------------------------------------------------------------------------------------------------


def text(headers: Mapping[str, Any], name: str) -> str:
    """The header as text, empty where there is none or it is no text."""
    value = headers.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "replace")
    return ""


def name(headers: Mapping[str, Any], header: str) -> str:
    """The header as a name of AMQP's: an exchange, a routing key.

    Raises:
        EnvelopeError: it is longer than such a name can be.
    """
    value = text(headers, header)
    if len(value.encode("utf-8", "replace")) > 255:
        raise EnvelopeError(f"header {header} is {_shown(value)}, longer than a name can be.")
    return value


def number(headers: Mapping[str, Any], name: str, default: int, *, least: int, most: int = 1_000_000_000) -> int:
    """The header as a whole number, cut to `most`; `default` where there is none.

    Raises:
        EnvelopeError: the header is there and holds no such number.
    """
    value = headers.get(name)
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    else:
        written = text(headers, name).strip()
        if not (written.isascii() and written.isdigit() and len(written) <= 18):
            raise EnvelopeError(f"header {name} is {_shown(value)} and not a whole number.")
        found = int(written)
    if found < least:
        raise EnvelopeError(f"header {name} is {found}, and {least} is the least it can be.")
    return min(found, most)


def time(headers: Mapping[str, Any], name: str) -> float | None:
    """The header as seconds since the epoch, `None` where there is none.

    Raises:
        EnvelopeError: the header is there and holds no RFC 3339 time.
    """
    value = headers.get(name)
    if value is None:
        return None
    try:
        return parse_rfc3339(text(headers, name))
    except (ValueError, OverflowError) as error:
        raise EnvelopeError(f"header {name} is {_shown(value)} and not an RFC 3339 time.") from error


def lower(headers: Mapping[str, Any]) -> Mapping[str, object]:
    """The headers by lower-case name, for a reader of trace headers: producers write them in any case."""
    return {
        name.lower(): value for name, value in headers.items() if name.lower() in (TRACEPARENT, TRACESTATE, BAGGAGE)
    }


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 64 else shown[:61] + "…"


# -- writing ----------------------------------------------------------------------------------------------------------


def cut(value: str, most: int) -> str:
    """The beginning of a text, in at most `most` bytes of UTF-8."""
    encoded = value.encode("utf-8", "replace")
    return encoded[:most].decode("utf-8", "ignore") if len(encoded) > most else encoded.decode()


def tail(value: str, most: int) -> str:
    """The end of a text, in at most `most` bytes of UTF-8: of a stack, what failed stands last."""
    encoded = value.encode("utf-8", "replace")
    return encoded[len(encoded) - most :].decode("utf-8", "ignore") if len(encoded) > most else encoded.decode()


def size(headers: Mapping[str, Any]) -> int:
    """About how many bytes the header table takes on the wire; never less than it does for what headers usually hold."""
    return sum(len(name.encode("utf-8", "replace")) + 2 + _size(value) for name, value in headers.items())


def _surely_fits(headers: Mapping[str, Any], most: int) -> bool:
    """A cheap look, enough for nearly every message: texts only, none of which can be large in any encoding."""
    total = 0
    for name, value in headers.items():
        if type(value) is not str:
            return False
        total += 6 + 4 * (len(name) + len(value))
    return total <= most


def _size(value: object) -> int:
    if isinstance(value, str):
        return 4 + len(value.encode("utf-8", "replace"))
    if isinstance(value, bytes | bytearray):
        return 4 + len(value)
    if isinstance(value, Mapping):
        return 4 + size(value)
    if isinstance(value, list | tuple):
        return 4 + sum(1 + _size(item) for item in value)
    return 16


# What a copy is nothing without; each is written anew for each copy, so none of them is ever large.
_KEPT: Final = frozenset({ATTEMPT, QUEUE, EXCHANGE, ROUTING_KEY, REASON, DEAD_LETTERED_AT})


def fitted(headers: dict[str, Any], *, most: int = MOST_BYTES) -> dict[str, Any]:
    """The same headers, made to fit: the stack is shortened first, then the error's message, then those of others that
    are largest are left out. meshkit's own and the trace headers stay, unless it is they that are too large.

    A table that does not fit closes the connection, so that everything in flight comes again and fails in the same way.

    Raises:
        ValueError: what has to stay does not fit.
    """
    if _surely_fits(headers, most):
        return headers
    over = size(headers) - most
    if over <= 0:
        return headers
    for name, shorten in ((ERROR_STACK, tail), (ERROR_MESSAGE, cut)):
        value = headers.get(name)
        if isinstance(value, str) and over > 0:
            headers[name] = shorten(value, max(0, len(value.encode()) - over))
            over = size(headers) - most
    # Last of all what others wrote under meshkit's names: a message whose copy can never be stored stays in hand.
    for choose in (_others, _spared):
        for name in sorted(choose(headers), key=lambda name: _size(headers[name]), reverse=True):
            if over <= 0:
                break
            del headers[name]
            over = size(headers) - most
    if over > 0:
        raise ValueError(f"its headers take more than {most} bytes")
    return headers


def _others(headers: Iterable[str]) -> list[str]:
    return [
        name for name in headers if not name.startswith(("meshkit-", "ce-")) and name not in (TRACEPARENT, TRACESTATE)
    ]


def _spared(headers: Iterable[str]) -> list[str]:
    return [name for name in headers if name not in _KEPT]
