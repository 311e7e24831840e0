"""Spans of OpenTelemetry behind `core.trace.Tracer`, and the trace context on the wire.

`install()` is all that an edge needs. Spans go to whatever provider the app has set, also if it sets one later; without
a provider nothing is recorded, and a context that came in is still passed on. Headers are read and written here and not
by OpenTelemetry's global propagator: that one trusts every producer's baggage, logs what a stranger sends, and fails on
a header that is no text.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final
from urllib.parse import quote, unquote

from opentelemetry import baggage, trace
from opentelemetry import context as otel_context
from opentelemetry.context import Context

from meshkit._version import __version__
from meshkit.core.events import InvalidContext, emit
from meshkit.core.settings import setting
from meshkit.core.trace import (
    AMBIENT,
    LONGEST_TRACEPARENT,
    NO_SPAN,
    Ambient,
    Attributes,
    Carrier,
    Span,
    SpanKind,
    TraceContext,
    parse_traceparent,
    tracer,
    use_tracer,
)

_log = logging.getLogger("meshkit")

SCOPE: Final = "meshkit"
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.44.0"
LONGEST_MESSAGE: Final = 256

_KINDS: Final[dict[SpanKind, trace.SpanKind]] = {
    "internal": trace.SpanKind.INTERNAL,
    "client": trace.SpanKind.CLIENT,
    "server": trace.SpanKind.SERVER,
    "producer": trace.SpanKind.PRODUCER,
    "consumer": trace.SpanKind.CONSUMER,
}

# This and `bytes.hex` write a header in half the time that format strings take.
_FLAGS: Final = tuple(f"{flags:02x}" for flags in range(256))

# https://www.w3.org/TR/trace-context/#tracestate-header; checked before OpenTelemetry sees it, which logs what is wrong.
_TRACESTATE_MEMBER: Final = re.compile(
    r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
    r"=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
)
_TRACESTATE_MEMBERS: Final = 32
# https://www.w3.org/TR/baggage/#limits
_BAGGAGE_BYTES: Final = 8192
_BAGGAGE_MEMBERS: Final = 64


@dataclass(frozen=True, slots=True)
class _Arrived(TraceContext):
    """A context that came with baggage of allowed keys."""

    baggage: Mapping[str, str] = field(default_factory=dict)


# -- spans ------------------------------------------------------------------------------------------------------------


class _Span:
    """An OpenTelemetry span, and the OpenTelemetry context that it was started in (baggage, say)."""

    __slots__ = ("_around", "_context", "_span")

    def __init__(self, span: trace.Span, around: Context) -> None:
        self._span = span
        self._around = around
        self._context: TraceContext | None = None

    @property
    def context(self) -> TraceContext | None:
        if self._context is None:
            held = self._span.get_span_context()
            if held.is_valid:
                self._context = TraceContext(
                    held.trace_id.to_bytes(16, "big").hex(),
                    held.span_id.to_bytes(8, "big").hex(),
                    int(held.trace_flags),
                    _tracestate(held),
                )
        return self._context

    @property
    def recording(self) -> bool:
        return self._span.is_recording()

    # The SDK logs a warning for each call on a span that has ended, and an app's own span processor may raise anything:
    # neither is to reach the work that is being watched.

    def rename(self, name: str) -> None:
        if self._span.is_recording():
            self._span.update_name(name)

    def set(self, attributes: Attributes) -> None:
        if self._span.is_recording():
            self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        if self._span.is_recording():
            self._span.add_event(name, attributes)

    def fail(self, error_type: str, message: str = "") -> None:
        if self._span.is_recording():
            self._span.set_attribute("error.type", error_type)
            self._span.set_status(trace.StatusCode.ERROR, scrub(message) or None)

    def end(self) -> None:
        try:
            if self._span.is_recording():
                self._span.end()
        except Exception:
            _log.warning("a span processor failed; the call goes on", exc_info=True)

    def active(self) -> AbstractContextManager[None]:
        return _Active(self.within())

    def within(self) -> Context:
        """The OpenTelemetry context in which this span is the current one."""
        return trace.set_span_in_context(self._span, self._around)


class _Active:
    """The block in which a context is the current one."""

    __slots__ = ("_context", "_token")

    def __init__(self, context: Context) -> None:
        self._context = context
        self._token: Token[Context] | None = None

    def __enter__(self) -> None:
        self._token = otel_context.attach(self._context)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        token, self._token = self._token, None
        if isinstance(token, Token):
            # Not `detach`, which is this and an ERROR with a stack where it fails. It fails where the block is left in
            # another context than it was entered in (a generator closed by the event loop); that one keeps its own.
            try:
                token.var.reset(token)
            except ValueError:
                _log.debug("a span's block was left in another context than it was entered in")
        elif token is not None:
            # OTEL_PYTHON_CONTEXT names a context of another kind.
            otel_context.detach(token)


_SECRETS: Final = (
    (re.compile(r"(://)[^/\s@]+@"), r"\1***@"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+)[\w.~+/=-]{6,}"), r"\1\2***"),
    (
        re.compile(
            r"(?i)((?:password|passwd|pwd|secret|token|api[-_]?key|access[-_]?key|signature|credential|authorization)\w{0,20}"
            r"[\"']?\s{0,4}[:=]\s{0,4}[\"']?)(?!bearer|basic)[^\s&,;\"']+"
        ),
        r"\1***",
    ),
    (re.compile(r"(?i)([?&](?:sig|key|code)=)[^\s&\"']+"), r"\1***"),
)


def scrub(message: str, *, longest: int = LONGEST_MESSAGE) -> str:
    """An error's text without what looks like a credential, and at most `longest` characters of it.

    Passwords in URLs, tokens in query strings and `Authorization` values go; what else a text gives away nobody can
    know, which is why only its beginning is kept.
    """
    message = message[: 4 * longest]
    for pattern, instead in _SECRETS:
        message = pattern.sub(instead, message)
    return message if len(message) <= longest else f"{message[: longest - 1]}…"


# -- the tracer -------------------------------------------------------------------------------------------------------


class OtelTracer:
    """`core.trace.Tracer` on the OpenTelemetry API.

    Args:
        provider: where spans come from; the global one, also if it is set later, where left out.
        baggage_keys: the only baggage that is taken in and passed on.
    """

    __slots__ = ("_baggage_keys", "_tracer")

    def __init__(self, *, provider: trace.TracerProvider | None = None, baggage_keys: Collection[str] = ()) -> None:
        self._tracer = (provider or trace.get_tracer_provider()).get_tracer(SCOPE, __version__, SCHEMA_URL)
        self._baggage_keys = frozenset(baggage_keys)

    def start(
        self,
        name: str,
        *,
        kind: SpanKind = "internal",
        parent: Span | TraceContext | Ambient | None = AMBIENT,
        links: Sequence[TraceContext] = (),
        attributes: Attributes | None = None,
    ) -> Span:
        around = otel_context.get_current() if parent is AMBIENT else _around(parent)
        try:
            linked = [trace.Link(_held(link)) for link in links] if links else None
            span = self._tracer.start_span(name, around, _KINDS[kind], attributes, linked)
        except Exception:
            _log.warning("a sampler or span processor failed; the call goes on without a span", exc_info=True)
            return NO_SPAN
        return _Span(span, around)

    def current(self) -> Span:
        span = trace.get_current_span()
        return NO_SPAN if span is trace.INVALID_SPAN else _Span(span, otel_context.get_current())

    def inject(self, carrier: MutableMapping[str, str], *, span: Span | None = None) -> None:
        if span is None:
            around = otel_context.get_current()
            held = trace.get_current_span(around).get_span_context()
        elif isinstance(span, _Span):
            around = span._around
            held = span._span.get_span_context()
        elif span.context is not None:
            around, held = Context(), _held(span.context)
        else:
            return
        if held.is_valid:
            trace_id, span_id = held.trace_id.to_bytes(16, "big").hex(), held.span_id.to_bytes(8, "big").hex()
            carrier["traceparent"] = f"00-{trace_id}-{span_id}-{_FLAGS[held.trace_flags & 0xFF]}"
            if state := _tracestate(held):
                carrier["tracestate"] = state
            elif "tracestate" in carrier:
                # It belonged to the traceparent that stood here before.
                del carrier["tracestate"]
        if self._baggage_keys and (allowed := ",".join(self._baggage_out(around))):
            carrier["baggage"] = allowed

    def extract(self, headers: Mapping[str, object], *, carrier: Carrier) -> TraceContext | None:
        traceparent = _text(headers, "traceparent", carrier)
        if traceparent is None:
            return None
        context = parse_traceparent(traceparent)
        if context is None:
            emit(InvalidContext(source=carrier, reason="malformed"))
            return None
        tracestate = _text(headers, "tracestate", carrier)
        if tracestate:
            if _is_tracestate(tracestate):
                context = TraceContext(context.trace_id, context.span_id, context.flags, tracestate)
            else:
                emit(InvalidContext(source=carrier, reason="malformed"))
        if self._baggage_keys and (
            allowed := dict(self._baggage_in(_text(headers, "baggage", carrier, longest=_BAGGAGE_BYTES) or ""))
        ):
            return _Arrived(context.trace_id, context.span_id, context.flags, context.tracestate, allowed)
        return context

    def alone(self) -> AbstractContextManager[None]:
        # This module is what other instrumentation asks before it makes a span: where nobody has loaded it, there is
        # no other instrumentation, and loading it would cost more than the call.
        utils = sys.modules.get("opentelemetry.instrumentation.utils")
        if utils is None:
            return nullcontext()
        quiet: AbstractContextManager[None] = utils.suppress_instrumentation()
        return quiet

    def _baggage_out(self, around: Context) -> Iterator[str]:
        for key, value in baggage.get_all(around).items():
            if key in self._baggage_keys:
                yield f"{key}={quote(str(value), safe='')}"

    def _baggage_in(self, header: str) -> Iterator[tuple[str, str]]:
        for member in header.split(",")[:_BAGGAGE_MEMBERS]:
            key, equals, value = member.partition(";")[0].partition("=")
            if equals and (key := key.strip()) in self._baggage_keys:
                yield key, unquote(value.strip())


def _around(parent: Span | TraceContext | Ambient | None) -> Context:
    """The OpenTelemetry context in which `parent` is current, and nothing of what is ambient here."""
    if isinstance(parent, _Span):
        return parent.within()
    if parent is None or isinstance(parent, Ambient):
        return Context()
    place = parent if isinstance(parent, TraceContext) else parent.context
    if place is None:
        return Context()
    around = trace.set_span_in_context(trace.NonRecordingSpan(_held(place)), Context())
    if isinstance(place, _Arrived):
        for key, value in place.baggage.items():
            around = baggage.set_baggage(key, value, around)
    return around


def _tracestate(held: trace.SpanContext) -> str:
    state = held.trace_state
    # Nearly always the one empty list that all share; asking any other for its length takes longer.
    return "" if state is trace.DEFAULT_TRACE_STATE else state.to_header()


def _held(context: TraceContext) -> trace.SpanContext:
    state = context.tracestate
    return trace.SpanContext(
        int(context.trace_id, 16),
        int(context.span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(context.flags),
        trace_state=trace.TraceState.from_header([state]) if state and _is_tracestate(state) else None,
    )


# -- headers, whatever a stranger put into them -----------------------------------------------------------------------


def _text(
    headers: Mapping[str, object], name: str, carrier: Carrier, *, longest: int = LONGEST_TRACEPARENT
) -> str | None:
    """The text of one header, `None` where it is not there or no text; the latter is told."""
    value = headers.get(name)
    if value is None and carrier == "http":
        # HTTP knows no case, and a mapping may. The length is looked at first: it is nearly always another one.
        for known in headers:
            if len(known) == len(name) and known.lower() == name:
                value = headers[known]
                break
    if value is None:
        return None
    if isinstance(value, bytes | bytearray):
        if len(value) > longest:
            emit(InvalidContext(source=carrier, reason="oversize"))
            return None
        return value.decode("ascii", "replace")
    if not isinstance(value, str):
        emit(InvalidContext(source=carrier, reason="type"))
        return None
    if len(value) > longest:
        emit(InvalidContext(source=carrier, reason="oversize"))
        return None
    return value


def _is_tracestate(text: str) -> bool:
    members = [stripped for member in text.split(",") if (stripped := member.strip(" \t"))]
    return (
        len(members) <= _TRACESTATE_MEMBERS
        and all(_TRACESTATE_MEMBER.fullmatch(member) for member in members)
        and len(members) == len({member.partition("=")[0] for member in members})
    )


# -- putting it in place ----------------------------------------------------------------------------------------------


def install(*, provider: trace.TracerProvider | None = None, baggage_keys: Collection[str] | None = None) -> OtelTracer:
    """Have meshkit's spans made by OpenTelemetry. Cheap; without arguments, calling it again changes nothing.

    Args:
        provider: where spans come from; the global one, also if it is set later, where left out.
        baggage_keys: the only baggage that is taken in and passed on; `MESHKIT_BAGGAGE_KEYS` (separated by commas)
            where left out, and none where that is not set.
    """
    present = tracer()
    if isinstance(present, OtelTracer) and provider is None and baggage_keys is None:
        return present
    new = OtelTracer(
        provider=provider,
        baggage_keys=setting("baggage_keys", baggage_keys, parse=_names, default=()),
    )
    use_tracer(new)
    return new


def _names(text: str) -> Collection[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
