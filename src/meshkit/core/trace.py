"""Trace context as text (W3C Trace Context), and the Tracer that does nothing until telemetry fills it."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, Literal, Protocol

SpanKind = Literal["internal", "client", "server", "producer", "consumer"]
AttributeValue = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, AttributeValue]
Carrier = Literal["http", "amqp"]

# https://www.w3.org/TR/trace-context/#traceparent-header: version ff is forbidden, later versions may have more fields.
_TRACEPARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
LONGEST_TRACEPARENT: Final = 512

# What may stand in a header at all: a line break in it would be a header of somebody else's choosing further on.
_PRINTABLE: Final = re.compile(r"[\t\x20-\x7e]*")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where in which trace something happened.

    Attributes:
        trace_id: 32 lower-case hex digits, not all zero.
        span_id: 16 lower-case hex digits, not all zero.
        flags: the trace-flags byte; bit 0 is "sampled".
        tracestate: the vendor list, as it came.
    """

    trace_id: str
    span_id: str
    flags: int = 1
    tracestate: str = ""

    @property
    def sampled(self) -> bool:
        return bool(self.flags & 1)

    @property
    def traceparent(self) -> str:
        """The value of a `traceparent` header."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def parse_traceparent(value: object, tracestate: object = "") -> TraceContext | None:
    """The context that a `traceparent` header holds, `None` if it holds none.

    Args:
        value: the header as it came: anything, since a producer may put anything into a message's headers.
        tracestate: the `tracestate` header as it came; left out of the result where it is no text that a header can
            hold.
    """
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    if not isinstance(value, str) or len(value) > LONGEST_TRACEPARENT:
        return None
    match = _TRACEPARENT.fullmatch(value.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    if isinstance(tracestate, bytes):
        tracestate = tracestate.decode("ascii", "replace")
    if not isinstance(tracestate, str) or len(tracestate) > LONGEST_TRACEPARENT or not _PRINTABLE.fullmatch(tracestate):
        tracestate = ""
    return TraceContext(trace_id, span_id, int(flags, 16), tracestate)


class Span(Protocol):
    """A piece of work in a trace. None of its methods raises."""

    @property
    def context(self) -> TraceContext | None:
        """Where this span is, `None` where nothing is traced."""
        ...

    @property
    def recording(self) -> bool:
        """Whether attributes and events go anywhere: lets a caller leave them unmade."""
        ...

    def rename(self, name: str) -> None:
        """Give the span its name once that is known (a route, say)."""
        ...

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""
        ...

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Add an event, at the present time."""
        ...

    def fail(self, error_type: str, message: str = "") -> None:
        """Set the status to error, and `error.type`."""
        ...

    def end(self) -> None:
        """The work is over. Calling it twice does nothing."""
        ...

    def active(self) -> AbstractContextManager[None]:
        """Make this the current span for the block, and for tasks that are started in it."""
        ...


class Ambient:
    """Stands for "the span that is current here"."""

    def __repr__(self) -> str:
        return "AMBIENT"


AMBIENT: Final = Ambient()


class Tracer(Protocol):
    """What policies and edges need of tracing."""

    def start(
        self,
        name: str,
        *,
        kind: SpanKind = "internal",
        parent: Span | TraceContext | Ambient | None = AMBIENT,
        links: Sequence[TraceContext] = (),
        attributes: Attributes | None = None,
    ) -> Span:
        """Begin a span. `parent=None` makes a new trace."""
        ...

    def current(self) -> Span:
        """The span that is current here; one that does nothing where there is none."""
        ...

    def inject(self, carrier: MutableMapping[str, str], *, span: Span | None = None) -> None:
        """Write `traceparent`, `tracestate` and the allowed baggage of `span` (the current one) into `carrier`."""
        ...

    def extract(self, headers: Mapping[str, object], *, carrier: Carrier) -> TraceContext | None:
        """The context that came with `headers` (lower-case names), whatever their values are; a malformed one is
        dropped and told as an `InvalidContext` event."""
        ...

    def alone(self) -> AbstractContextManager[None]:
        """Keep other instrumentation of the same call quiet for the block, so that it makes no second span."""
        ...


class _NoSpan:
    __slots__ = ()
    context: TraceContext | None = None
    recording = False

    def rename(self, name: str) -> None: ...
    def set(self, attributes: Attributes) -> None: ...
    def event(self, name: str, attributes: Attributes | None = None) -> None: ...
    def fail(self, error_type: str, message: str = "") -> None: ...
    def end(self) -> None: ...

    def active(self) -> AbstractContextManager[None]:
        return nullcontext()


NO_SPAN: Final[Span] = _NoSpan()


class _NoTracer:
    __slots__ = ()

    def start(
        self,
        name: str,
        *,
        kind: SpanKind = "internal",
        parent: Span | TraceContext | Ambient | None = AMBIENT,
        links: Sequence[TraceContext] = (),
        attributes: Attributes | None = None,
    ) -> Span:
        return NO_SPAN

    def current(self) -> Span:
        return NO_SPAN

    def inject(self, carrier: MutableMapping[str, str], *, span: Span | None = None) -> None: ...

    def extract(self, headers: Mapping[str, object], *, carrier: Carrier) -> TraceContext | None:
        return None

    def alone(self) -> AbstractContextManager[None]:
        return nullcontext()


class _Tracing:
    __slots__ = ("on",)

    def __init__(self) -> None:
        self.on = False


TRACING: Final = _Tracing()
"""Whether `tracer()` makes spans: `.on` is what the hottest paths read before they ask for it."""

_tracer: Tracer = _NoTracer()


def tracer() -> Tracer:
    """The tracer of this process."""
    return _tracer


def use_tracer(new: Tracer) -> None:
    """Have `tracer()` return `new` from now on."""
    global _tracer
    _tracer = new
    TRACING.on = not isinstance(new, _NoTracer)
