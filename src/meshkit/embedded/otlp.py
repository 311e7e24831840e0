"""Receives traces over OTLP/HTTP inside this process, so that a story can be seen without a collector or a trace viewer.

`OtlpReceiver` is for a demo, a test, a laptop: it binds loopback, asks for no password, and keeps the newest spans in
memory until it ends. It takes what every OpenTelemetry SDK sends to `OTEL_EXPORTER_OTLP_ENDPOINT` with the
`http/protobuf` or `http/json` protocol, and can pass the same bodies on to a real collector or Jaeger.

OTLP bodies are decoded by `opentelemetry-proto`, which comes with the `otlp` extra and is loaded when first needed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import json
import logging
import re
import ssl
import time
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from meshkit.embedded.story import SpanEvent, SpanLink, SpanRecord

__all__ = ["OtlpReceiver", "SpanEvent", "SpanLink", "SpanRecord", "decode_spans", "read_recorded"]

logger = logging.getLogger("meshkit.embedded.otlp")

PROTOBUF, JSON = "application/x-protobuf", "application/json"
_TRACES = "/v1/traces"
_HEAD_LIMIT = 64 * 1024
# Below this a body is decoded where it arrived: handing it to a thread costs more than the few milliseconds it takes.
_DECODE_IN_THREAD = 256 * 1024


# --- from bytes to spans ------------------------------------------------------------------------------------------------


class _Proto(NamedTuple):
    """What is used of the generated protobuf code, which has no types of its own."""

    request: Any
    response: Any
    status: Any
    parse_json: Any
    decode_error: type[Exception]
    parse_error: type[Exception]


def _proto() -> _Proto:
    try:
        from google.protobuf import json_format, message  # type: ignore[import-untyped,unused-ignore]
        from google.rpc import status_pb2  # type: ignore[import-untyped,unused-ignore]
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
    except ImportError as missing:
        raise ImportError(
            f"OTLP traces are read with opentelemetry-proto, which is not installed ({missing}). "
            'Install it: pip install "meshkit-py[otlp]"'
        ) from missing
    return _Proto(
        trace_service_pb2.ExportTraceServiceRequest,
        trace_service_pb2.ExportTraceServiceResponse,
        status_pb2.Status,
        json_format.ParseDict,
        message.DecodeError,
        json_format.ParseError,
    )


def decode_spans(body: bytes, *, content_type: str = PROTOBUF) -> list[SpanRecord]:
    """The spans of one OTLP export request, in the order they stand in it.

    `content_type` is `application/x-protobuf` or `application/json`. Spans whose ids are not valid by W3C Trace Context
    are left out. Raises ValueError where the body is no such request, ImportError where the `otlp` extra is missing.
    """
    return _decode(body, content_type)[0]


def _decode(body: bytes, content_type: str) -> tuple[list[SpanRecord], int]:
    """The valid spans, and how many were not."""
    proto = _proto()
    request = proto.request()
    if content_type == JSON:
        try:
            proto.parse_json(_with_base64_ids(json.loads(body)), request, ignore_unknown_fields=True)
        except (proto.parse_error, ValueError, TypeError, RecursionError) as wrong:
            raise ValueError(
                f"the body is not an ExportTraceServiceRequest in OTLP's JSON encoding: {wrong}"
            ) from wrong
    else:
        try:
            request.ParseFromString(body)
        except proto.decode_error as wrong:
            raise ValueError(f"the body is not a protobuf ExportTraceServiceRequest: {wrong}") from wrong
    spans: list[SpanRecord] = []
    rejected = 0
    for resource_spans in request.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        service = str(resource.get("service.name", ""))
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                if _valid(span.trace_id, 16) and _valid(span.span_id, 8):
                    spans.append(_record(span, service, resource, scope_spans.scope.name))
                else:
                    rejected += 1
    return spans, rejected


def _valid(id_: bytes, length: int) -> bool:
    return len(id_) == length and any(id_)


_KINDS = ("internal", "internal", "server", "client", "producer", "consumer")
_STATUS = ("unset", "ok", "error")


def _record(span: Any, service: str, resource: Mapping[str, Any], scope: str) -> SpanRecord:
    return SpanRecord(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex() if any(span.parent_span_id) else "",
        name=span.name,
        # Numbers of a newer protocol version read as the plain case.
        kind=_KINDS[span.kind] if 0 <= span.kind < len(_KINDS) else "internal",
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=tuple(
            SpanEvent(name=event.name, time=event.time_unix_nano, attributes=_attributes(event.attributes))
            for event in span.events
        ),
        links=tuple(
            SpanLink(trace_id=link.trace_id.hex(), span_id=link.span_id.hex(), attributes=_attributes(link.attributes))
            for link in span.links
        ),
        status=_STATUS[span.status.code] if 0 <= span.status.code < len(_STATUS) else "unset",
        status_message=span.status.message,
        service=service,
        resource=resource,
        scope=scope,
    )


def _attributes(pairs: Iterable[Any]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return getattr(value, kind) if kind else None


def _with_base64_ids(document: Any) -> Any:
    """The document with its ids as protobuf's own JSON mapping has them: OTLP writes ids in hex, protobuf reads base64."""
    if not isinstance(document, dict):
        raise ValueError(f"an object is expected, not {type(document).__name__}")
    for resource_spans in _objects(document, "resourceSpans"):
        for scope_spans in _objects(resource_spans, "scopeSpans"):
            for span in _objects(scope_spans, "spans"):
                for holder in (span, *_objects(span, "links")):
                    for key in ("traceId", "spanId", "parentSpanId"):
                        if isinstance(id_ := holder.get(key), str):
                            holder[key] = base64.b64encode(bytes.fromhex(id_)).decode()
    return document


def _objects(holder: dict[str, Any], key: str) -> list[dict[str, Any]]:
    # What is not a list of objects is left for the parser, which says where and what is wrong.
    items = holder.get(key)
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def read_recorded(folder: str | Path) -> list[SpanRecord]:
    """The spans of every body that an `OtlpReceiver(record_to=folder)` wrote, in the order they came.

    A span that was exported twice (an exporter repeats what it got no answer to) is there once.
    """
    found: dict[tuple[str, str], SpanRecord] = {}
    for file in sorted(Path(folder).iterdir()):
        if file.suffix in (".pb", ".json"):
            kind = JSON if file.suffix == ".json" else PROTOBUF
            found.update(((s.trace_id, s.span_id), s) for s in decode_spans(file.read_bytes(), content_type=kind))
    return list(found.values())


# --- HTTP/1.1, as much as an exporter speaks ----------------------------------------------------------------------------


class _Refused(Exception):
    """The request gets this answer; `close` says that what follows on the connection cannot be told from its body."""

    def __init__(self, status: HTTPStatus, reason: str, *, close: bool = False, allow: str = "") -> None:
        super().__init__(reason)
        self.status, self.reason, self.close, self.allow = status, reason, close, allow


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    headers: Mapping[str, str]
    keep_alive: bool

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


def _parse_head(head: bytes) -> _Request:
    request_line, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    parts = request_line.split(" ")
    if len(parts) != 3 or not re.fullmatch(r"HTTP/1\.[0-9]", parts[2]):
        raise _Refused(HTTPStatus.BAD_REQUEST, "the request line is not that of HTTP/1.1", close=True)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or re.search(r"[\r\n\0]", value):
            raise _Refused(HTTPStatus.BAD_REQUEST, "a header line is malformed", close=True)
        name, value = name.lower(), value.strip(" \t")
        if headers.setdefault(name, value) != value:
            if name in ("content-length", "transfer-encoding"):
                raise _Refused(HTTPStatus.BAD_REQUEST, f"{name} is given twice", close=True)
            headers[name] += f", {value}"
    connection = headers.get("connection", "").lower()
    keep_alive = "keep-alive" in connection if parts[2] == "HTTP/1.0" else "close" not in connection
    try:
        path = urlsplit(parts[1]).path
    except ValueError as wrong:
        raise _Refused(HTTPStatus.BAD_REQUEST, "the request target is malformed", close=True) from wrong
    return _Request(parts[0], path, headers, keep_alive)


async def _read_body(
    request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int
) -> bytes:
    """The body as it came, undone of chunks. Raises `_Refused`, always closing: the rest of the body is not read."""
    length = request.headers.get("content-length")
    coding = request.headers.get("transfer-encoding", "").lower()
    if coding and (coding != "chunked" or length is not None):
        # Two ways to tell where a body ends are two different ends (RFC 9112, 6.3).
        raise _Refused(
            HTTPStatus.BAD_REQUEST, "transfer-encoding must be chunked and without content-length", close=True
        )
    if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
        raise _Refused(HTTPStatus.BAD_REQUEST, "content-length is not a number", close=True)
    if length is not None and int(length) > limit:
        raise _too_large(limit)
    if request.headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if not coding:
        return await reader.readexactly(int(length or 0))
    chunks: list[bytes] = []
    left = limit
    try:
        while size := _chunk_size(await reader.readuntil(b"\r\n")):
            if size > left:
                raise _too_large(limit)
            left -= size
            chunks.append(await reader.readexactly(size))
            if await reader.readexactly(2) != b"\r\n":
                raise _Refused(HTTPStatus.BAD_REQUEST, "a chunk is longer than it says", close=True)
        trailers = 0
        while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
            trailers += len(line)
            if trailers > _HEAD_LIMIT:
                raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the trailers are too long", close=True)
    except asyncio.LimitOverrunError as wrong:
        raise _Refused(HTTPStatus.BAD_REQUEST, "a chunk line is too long", close=True) from wrong
    return b"".join(chunks)


def _chunk_size(line: bytes) -> int:
    size = line.partition(b";")[0].strip()
    if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
        raise _Refused(HTTPStatus.BAD_REQUEST, "a chunk size is not a hexadecimal number", close=True)
    return int(size, 16)


def _too_large(limit: int) -> _Refused:
    return _Refused(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"a body may have {limit} bytes, unpacked; export fewer spans at once (OTEL_BSP_MAX_EXPORT_BATCH_SIZE)",
        close=True,
    )


def _unpacked(body: bytes, encoding: str, limit: int) -> bytes:
    if not encoding:
        return body
    if encoding not in ("gzip", "deflate"):
        raise _Refused(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"content-encoding may be gzip, deflate or identity, not {encoding}"
        )
    # A small body may unpack to gigabytes, so it is never unpacked further than the limit.
    out: list[bytes] = []
    left = limit
    while True:
        unpacker = zlib.decompressobj(31 if encoding == "gzip" else 15)
        try:
            out.append(unpacker.decompress(body, left + 1))
        except zlib.error as wrong:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"the body is not {encoding}: {wrong}") from wrong
        left -= len(out[-1])
        if left < 0:
            refusal = _too_large(limit)
            refusal.close = False  # it was read whole
            raise refusal
        if not unpacker.eof:
            raise _Refused(HTTPStatus.BAD_REQUEST, f"the body ends in the middle of its {encoding} data")
        body = unpacker.unused_data  # gzip files may be joined
        if not body:
            return b"".join(out)


# google.rpc.Code for the answers that have one; OTLP wants a google.rpc.Status in every refusal.
_RPC_CODES = {400: 3, 404: 5, 405: 12, 413: 8, 415: 3, 431: 8, 500: 13}


# --- the receiver -------------------------------------------------------------------------------------------------------


class OtlpReceiver:
    """An OTLP/HTTP trace endpoint on loopback, used as an async context manager.

        async with OtlpReceiver() as receiver:
            ...  # services started with OTEL_EXPORTER_OTLP_ENDPOINT=receiver.url
            print(waterfall(receiver.trace(trace_id)))

    A span can be read as soon as its exporter has its answer, so a flush in the service is all one waits for.

    `port` 0 takes a free one. `forward_to` is the base of another OTLP/HTTP endpoint ("http://localhost:4318"; `/v1/traces`
    is added), to which every accepted body goes as well, byte for byte and in the background; credentials are not sent.
    `record_to` is a folder into which every accepted body is written, unpacked, for `read_recorded`. `keep` bounds the
    spans in memory; the traces that have been quiet for longest leave first. `flush_timeout` (seconds) bounds how long
    the end waits for the forwarding.

    Raises ValueError for settings that cannot be right, ImportError without the `otlp` extra, OSError where the port is
    taken or `record_to` cannot be written.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        forward_to: str | None = None,
        record_to: str | Path | None = None,
        keep: int = 50_000,
        max_body: int = 16 * 1024 * 1024,
        flush_timeout: float = 5.0,
    ) -> None:
        if not _is_loopback(host):
            raise ValueError(
                f"the OTLP receiver binds loopback only, because it takes spans from anyone who can reach it, so host "
                f"cannot be {host!r}. Use 127.0.0.1; for other machines run an OpenTelemetry collector."
            )
        if not 0 <= port <= 65535:
            raise ValueError(f"port is 0 (any free one) to 65535, not {port}")
        if keep < 1 or max_body < 1:
            raise ValueError(f"keep and max_body are at least 1, not {keep} and {max_body}")
        # One name, two addresses: with port 0 they would get two different ports.
        self._host = "127.0.0.1" if host == "localhost" else host
        self._port = port
        self._keep, self._max_body, self._flush_timeout = keep, max_body, flush_timeout
        self._forwarder = _Forwarder(forward_to) if forward_to is not None else None
        self._folder = Path(record_to) if record_to is not None else None
        self._recorded = 0
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self._idle: set[asyncio.StreamWriter] = set()
        self._ending = False
        # By trace, the one that was added to last at the end; within it by span id, so a repeated export adds nothing.
        self._traces: dict[str, dict[str, SpanRecord]] = {}
        self._held = 0
        self._evicted = 0

    # what was received

    @property
    def url(self) -> str:
        """The base address, as OTEL_EXPORTER_OTLP_ENDPOINT wants it: "http://127.0.0.1:PORT"."""
        if not self._port:
            raise RuntimeError(
                "the receiver has no address before it is entered: async with OtlpReceiver() as receiver"
            )
        return f"http://[{self._host}]:{self._port}" if ":" in self._host else f"http://{self._host}:{self._port}"

    def spans(self) -> list[SpanRecord]:
        """All spans held, oldest first."""
        return sorted((span for trace in self._traces.values() for span in trace.values()), key=lambda span: span.start)

    def trace(self, trace_id: str) -> list[SpanRecord]:
        """The spans of one trace, oldest first; none for a trace that is not known."""
        return sorted(self._traces.get(trace_id.lower(), {}).values(), key=lambda span: span.start)

    def traces(self) -> dict[str, list[SpanRecord]]:
        """All spans held, by trace id; traces and spans oldest first."""
        found: dict[str, list[SpanRecord]] = {}
        for span in self.spans():
            found.setdefault(span.trace_id, []).append(span)
        return found

    @property
    def evicted(self) -> int:
        """How many spans have left because there were more than `keep`."""
        return self._evicted

    @property
    def forwarded(self) -> int:
        """How many spans `forward_to` has taken."""
        return self._forwarder.passed if self._forwarder else 0

    @property
    def not_forwarded(self) -> int:
        """How many spans could not be passed on to `forward_to`, and will not be; final once the receiver has ended."""
        return self._forwarder.lost if self._forwarder else 0

    @property
    def forward_error(self) -> str:
        """Why spans were last not passed on; "" as long as all is well."""
        return self._forwarder.error if self._forwarder else ""

    # life

    async def __aenter__(self) -> OtlpReceiver:
        _proto()
        self._ending = False
        if self._folder is not None:
            self._recorded = _make_folder(self._folder)
        self._server = await asyncio.start_server(self._serve, self._host, self._port, limit=_HEAD_LIMIT)
        self._port = self._server.sockets[0].getsockname()[1]
        if self._forwarder is not None:
            self._forwarder.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        self._ending = True
        server.close()
        try:
            for writer in list(self._idle):
                writer.close()
            if self._connections:
                # What is being received is still taken: its exporter would count it as lost.
                await asyncio.wait(set(self._connections), timeout=2.0)
        finally:
            for writer in list(self._connections.values()):
                writer.transport.abort()
            if self._forwarder is not None:
                await self._forwarder.stop(self._flush_timeout)
        if self._connections:
            await asyncio.wait(set(self._connections), timeout=1.0)
        await server.wait_closed()

    # one connection

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        try:
            while not self._ending and await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away
        finally:
            self._idle.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            del self._connections[task]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Reads one request and answers it. Says whether the connection can take another."""
        request: _Request | None = None
        self._idle.add(writer)
        try:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.LimitOverrunError as wrong:
                raise _Refused(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the head may have {_HEAD_LIMIT} bytes", close=True
                ) from wrong
            finally:
                self._idle.discard(writer)
            request = _parse_head(head)
            body = await _read_body(request, reader, writer, self._max_body)
            content_type, answer = await self._handle(request, body)
        except _Refused as refusal:
            keep_alive = request is not None and request.keep_alive and not refusal.close and not self._ending
            content_type, answer = _refusal(request, refusal)
            extra = f"Allow: {refusal.allow}\r\n" if refusal.allow else ""
            await _write(writer, request, refusal.status, content_type, answer, keep_alive=keep_alive, extra=extra)
            if refusal.close:
                await _linger(reader, writer)
            return keep_alive
        keep_alive = request.keep_alive and not self._ending
        await _write(writer, request, HTTPStatus.OK, content_type, answer, keep_alive=keep_alive)
        return keep_alive

    async def _handle(self, request: _Request, body: bytes) -> tuple[str, bytes]:
        """The content type and body of a good answer."""
        if request.path == "/":
            if request.method not in ("GET", "HEAD"):
                raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered here", allow="GET, HEAD")
            health = {"status": "ok", "receives": f"POST {_TRACES}", "spans": self._held, "traces": len(self._traces)}
            return JSON, json.dumps(health).encode()
        if request.path != _TRACES:
            raise _Refused(HTTPStatus.NOT_FOUND, f"traces are received at POST {_TRACES}; there is nothing else here")
        if request.method != "POST":
            raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "traces are sent with POST", allow="POST")
        if request.content_type not in (PROTOBUF, JSON):
            raise _Refused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"content-type must be {PROTOBUF} or {JSON}, not {request.content_type or 'absent'}",
            )
        encoding = request.headers.get("content-encoding", "").lower()
        if encoding == "identity":
            encoding = ""
        plain = _unpacked(body, encoding, self._max_body)
        try:
            if len(plain) < _DECODE_IN_THREAD:
                spans, rejected = _decode(plain, request.content_type)
            else:
                spans, rejected = await asyncio.to_thread(_decode, plain, request.content_type)
        except ValueError as wrong:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(wrong)) from wrong
        if self._folder is not None:
            self._record(plain, request.content_type)
        self._hold(spans)
        if self._forwarder is not None and spans:
            self._forwarder.put(_Batch(body, request.content_type, encoding, len(spans), time.monotonic()))
        return request.content_type, _accepted(request.content_type, rejected)

    def _record(self, body: bytes, content_type: str) -> None:
        assert self._folder is not None
        self._recorded += 1
        file = self._folder / f"{self._recorded:06}{'.json' if content_type == JSON else '.pb'}"
        try:
            file.write_bytes(body)
        except OSError as wrong:
            # Who asks for a record relies on it, so the exporter hears of the hole and says so in the service's log.
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, f"the body could not be recorded: {wrong}") from wrong

    def _hold(self, spans: list[SpanRecord]) -> None:
        for span in spans:
            # To the end, because a story that is still being told is not the one to forget.
            trace = self._traces.pop(span.trace_id, {})
            self._traces[span.trace_id] = trace
            self._held += span.span_id not in trace
            trace[span.span_id] = span
            while self._held > self._keep:
                oldest = next(iter(self._traces))
                if len(self._traces) > 1:
                    gone = len(self._traces.pop(oldest))
                else:  # one trace larger than all there is room for
                    trace.pop(next(iter(trace)))
                    gone = 1
                self._held -= gone
                self._evicted += gone


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _make_folder(folder: Path) -> int:
    """Makes the folder. Returns the number of the last body in it, so that a second run adds to the first."""
    folder.mkdir(parents=True, exist_ok=True)
    return max((int(file.stem) for file in folder.iterdir() if file.stem.isdecimal()), default=0)


def _accepted(content_type: str, rejected: int) -> bytes:
    reason = "their trace or span id is not valid"
    if content_type == JSON:
        partial = {"partialSuccess": {"rejectedSpans": str(rejected), "errorMessage": reason}} if rejected else {}
        return json.dumps(partial).encode()
    response = _proto().response()
    if rejected:
        response.partial_success.rejected_spans = rejected
        response.partial_success.error_message = reason
    encoded: bytes = response.SerializeToString()
    return encoded


def _refusal(request: _Request | None, refusal: _Refused) -> tuple[str, bytes]:
    code = _RPC_CODES.get(refusal.status, 2)
    if request is not None and request.content_type == PROTOBUF:
        return PROTOBUF, _proto().status(code=code, message=refusal.reason).SerializeToString()
    return JSON, json.dumps({"code": code, "message": refusal.reason}).encode()


async def _write(
    writer: asyncio.StreamWriter,
    request: _Request | None,
    status: HTTPStatus,
    content_type: str,
    body: bytes,
    *,
    keep_alive: bool,
    extra: str = "",
) -> None:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n{extra}\r\n"
    )
    writer.write(head.encode() + (b"" if request is not None and request.method == "HEAD" else body))
    await writer.drain()


async def _linger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads on for a moment after a refusal: closing with unread bytes resets the connection, and the answer with it."""
    if writer.can_write_eof():
        writer.write_eof()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2.0):
            while await reader.read(_HEAD_LIMIT):
                pass


# --- passing on ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Batch:
    body: bytes
    content_type: str  # without parameters: collectors compare it as it stands
    content_encoding: str
    spans: int
    since: float


class _NotNow(Exception):
    """The other side may take it later; `after` is how many seconds it asks for."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class _Forwarder:
    """Passes bodies on to another OTLP/HTTP endpoint, one after the other, without holding anybody up.

    A collector that starts a little later than the demo still gets everything: a body is tried for a minute. What
    waits is bounded in bytes; what finds no room, is refused, or runs out of time is counted as lost.
    """

    _ROOM = 64 * 1024 * 1024
    _PATIENCE = 60.0
    _ONE_TRY = 10.0

    def __init__(self, base: str) -> None:
        wrong = f"forward_to is the base of an OTLP/HTTP endpoint, such as http://localhost:4318 ({_TRACES} is added)"
        try:
            parts = urlsplit(base)
            port = parts.port
        except ValueError as bad:
            raise ValueError(f"{wrong}; its port or host is malformed") from bad
        if "@" in parts.netloc:
            raise ValueError(f"{wrong}, without user or password: they are not sent")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"{wrong}, not {base!r}")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, port or (443 if self._tls else 80)
        self._netloc = parts.netloc
        self._path = parts.path.rstrip("/").removesuffix(_TRACES) + _TRACES
        self.target = f"{parts.scheme}://{parts.netloc}{self._path}"
        self._waiting: deque[_Batch] = deque()
        self._bytes = 0
        self._more = asyncio.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.passed = 0
        self.lost = 0
        self.error = ""

    def start(self) -> None:
        self._stopping.clear()
        self._task = asyncio.create_task(self._run(), name="meshkit-otlp-forward")

    def put(self, batch: _Batch) -> None:
        if self._bytes + len(batch.body) > self._ROOM:
            self._lose(batch, f"more than {self._ROOM} bytes wait for it")
            return
        self._waiting.append(batch)
        self._bytes += len(batch.body)
        self._more.set()

    async def stop(self, within: float) -> None:
        """Passes on what waits, for at most `within` seconds; the rest is counted as lost."""
        assert self._task is not None
        self._stopping.set()
        self._more.set()
        try:
            await asyncio.wait({self._task}, timeout=within)
        finally:
            self._task.cancel()
            await asyncio.wait({self._task})
            for batch in self._waiting:
                self._lose(batch, self.error or f"it took longer than {within:g} s")
            self._waiting.clear()
            self._bytes = 0
        if self.lost:
            logger.warning("%d spans were not passed on to %s: %s", self.lost, self.target, self.error)

    def _lose(self, batch: _Batch, reason: str) -> None:
        self.lost += batch.spans
        self.error = reason

    async def _run(self) -> None:
        while True:
            if not self._waiting:
                if self._stopping.is_set():
                    return
                self._more.clear()
                await self._more.wait()
                continue
            # It stays in line until its fate is known, so that a stop in between counts it.
            batch = self._waiting[0]
            if await self._pass(batch):
                self._waiting.popleft()
                self._bytes -= len(batch.body)
            else:
                return

    async def _pass(self, batch: _Batch) -> bool:
        """Tries until the batch is taken or lost. False where the receiver ends and nobody answers: no use going on."""
        backoff = 0.1
        while True:
            try:
                async with asyncio.timeout(self._ONE_TRY):
                    refused = await self._post(batch)
            except (OSError, EOFError, UnicodeError, asyncio.LimitOverrunError, _NotNow) as wrong:
                # EOFError: the connection ended within the answer. OSError holds TimeoutError and TLS errors, and a
                # host that cannot be a name is a UnicodeError.
                reason = str(wrong) or type(wrong).__name__
                if not self.error:
                    logger.warning("spans cannot be passed on to %s for now: %s", self.target, reason)
                self.error = reason
                if self._stopping.is_set():
                    return False
                if time.monotonic() - batch.since > self._PATIENCE:
                    self._lose(batch, reason)
                    return True
                wait = max(backoff, min(wrong.after, 30.0) if isinstance(wrong, _NotNow) else 0.0)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._stopping.wait()
                backoff = min(backoff * 2, 5.0)
                continue
            if refused:
                self._lose(batch, refused)
            else:
                self.passed += batch.spans
                self.error = "" if not self.lost else self.error
            return True

    async def _post(self, batch: _Batch) -> str:
        """Sends one body on a connection of its own. Returns why it was refused for good, "" where it was taken."""
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=_HEAD_LIMIT)
        try:
            encoding = f"content-encoding: {batch.content_encoding}\r\n" if batch.content_encoding else ""
            head = (
                f"POST {self._path} HTTP/1.1\r\nhost: {self._netloc}\r\ncontent-type: {batch.content_type}\r\n{encoding}"
                f"content-length: {len(batch.body)}\r\nuser-agent: meshkit-otlp-receiver\r\nconnection: close\r\n\r\n"
            )
            writer.write(head.encode("latin-1") + batch.body)
            await writer.drain()
            answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        status_line, *lines = answer.split("\r\n")
        code = status_line.split(" ")[1] if status_line.startswith("HTTP/1.") and " " in status_line else ""
        if code.startswith("2"):
            return ""
        if code in ("429", "502", "503", "504"):  # those the OTLP specification calls retryable
            after = next(
                (line.partition(":")[2].strip() for line in lines if line.lower().startswith("retry-after:")), ""
            )
            raise _NotNow(f"it answered {code}", float(after) if after.isdecimal() else 0.0)
        return f"it answered {code or 'nothing that is HTTP'}"
