"""The OTLP receiver, spoken to by OpenTelemetry's own exporter and by clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import sys
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from google.rpc import status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from meshkit.embedded.otlp import OtlpReceiver, SpanEvent, SpanLink, SpanRecord, decode_spans, read_recorded

TRACE, SPAN, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "53995c3f42cd8ad8"
PROTOBUF = {"content-type": "application/x-protobuf"}
JSON = {"content-type": "application/json"}


def body(count: int = 1, *, trace_id: str = TRACE, first: int = 1) -> bytes:
    """A protobuf export request of `count` spans of one trace."""
    request = trace_service_pb2.ExportTraceServiceRequest()
    scope = request.resource_spans.add().scope_spans.add()
    for number in range(first, first + count):
        scope.spans.add(
            trace_id=bytes.fromhex(trace_id),
            span_id=number.to_bytes(8, "big"),
            name=f"span {number}",
            start_time_unix_nano=number,
            end_time_unix_nano=number + 1,
        )
    return request.SerializeToString()


@contextlib.asynccontextmanager
async def raw(receiver: OtlpReceiver) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, port = receiver.url.removeprefix("http://").rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)


async def answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    line, *rest = head.rstrip("\r\n").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (h.partition(":") for h in rest)}
    return Answer(int(line.split()[1]), headers, await reader.readexactly(int(headers.get("content-length", 0))))


async def talk(receiver: OtlpReceiver, request: bytes) -> Answer:
    async with raw(receiver) as (reader, writer):
        writer.write(request)
        return await answer(reader)


def post(headers: str, rest: bytes = b"") -> bytes:
    return (
        f"POST /v1/traces HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-protobuf\r\n{headers}\r\n".encode() + rest
    )


# --- what OpenTelemetry sends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", list(Compression))
async def test_takes_what_the_real_exporter_sends(compression: Compression) -> None:
    """Spans from OpenTelemetry's own OTLP exporter arrive whole, in each of its compressions."""
    async with OtlpReceiver() as receiver:

        def export() -> None:
            provider = TracerProvider(resource=Resource({"service.name": "course-service", "host.name": "h1"}))
            exporter = OTLPSpanExporter(endpoint=f"{receiver.url}/v1/traces", compression=compression)
            provider.add_span_processor(BatchSpanProcessor(exporter))
            tracer = provider.get_tracer("meshkit", "1.2")
            other = trace.SpanContext(int(TRACE, 16), int(SPAN, 16), is_remote=True)
            with (
                tracer.start_as_current_span("POST /enrollments", kind=trace.SpanKind.SERVER),
                tracer.start_as_current_span(
                    "publish enrollment-events",
                    kind=trace.SpanKind.PRODUCER,
                    links=[trace.Link(other, {"why": "batch"})],
                    attributes={"meshkit.attempt": 2, "ok": True, "seconds": 0.5, "tags": ["a", "b"]},
                ) as span,
            ):
                span.add_event("meshkit.fallback", {"meshkit.fallback.reason": "timeout"})
                span.set_status(trace.StatusCode.ERROR, "nacked")
            provider.shutdown()

        await asyncio.to_thread(export)
        server, producer = receiver.spans()

    assert ("", "POST /enrollments", "server", "unset") == (
        server.parent_span_id,
        server.name,
        server.kind,
        server.status,
    )
    assert (server.trace_id, server.span_id) == (producer.trace_id, producer.parent_span_id)
    assert ("producer", "error", "nacked") == (producer.kind, producer.status, producer.status_message)
    assert ("course-service", "h1", "meshkit") == (producer.service, producer.resource["host.name"], producer.scope)
    assert {"meshkit.attempt": 2, "ok": True, "seconds": 0.5, "tags": ["a", "b"]} == producer.attributes
    assert (SpanLink(trace_id=TRACE, span_id=SPAN, attributes={"why": "batch"}),) == producer.links
    assert [("meshkit.fallback", {"meshkit.fallback.reason": "timeout"})] == [
        (event.name, event.attributes) for event in producer.events
    ]
    assert server.start <= producer.start <= producer.events[0].time <= producer.end <= server.end
    assert 0 < server.duration < 60


async def test_reads_the_json_encoding() -> None:
    """OTLP's JSON encoding, with ids in hex, numbers as text and unknown fields, gives the same spans as protobuf."""
    document = {
        "resourceSpans": [
            {
                "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "shop"}}]},
                "scopeSpans": [
                    {
                        "scope": {"name": "meshkit", "fromTheFuture": 1},
                        "spans": [
                            {
                                "traceId": TRACE.upper(),
                                "spanId": SPAN,
                                "parentSpanId": PARENT,
                                "name": "process orders",
                                "kind": 5,
                                "startTimeUnixNano": "1544712660000000000",
                                "endTimeUnixNano": 1544712661000000000,
                                "attributes": [
                                    {"key": "n", "value": {"intValue": "7"}},
                                    {"key": "raw", "value": {"bytesValue": "AAE="}},
                                    {"key": "l", "value": {"arrayValue": {"values": [{"boolValue": True}]}}},
                                    {"key": "m", "value": {"kvlistValue": {"values": [{"key": "k", "value": {}}]}}},
                                ],
                                "events": [{"name": "e", "timeUnixNano": "5"}],
                                "links": [{"traceId": TRACE, "spanId": PARENT}],
                                "status": {"code": 2, "message": "no"},
                            }
                        ],
                    }
                ],
            }
        ]
    }
    async with OtlpReceiver() as receiver, httpx.AsyncClient() as client:
        response = await client.post(
            f"{receiver.url}/v1/traces", json=document, headers={"content-type": "application/json; charset=utf-8"}
        )
        (span,) = receiver.trace(TRACE.upper())

    assert (200, "application/json", {}) == (response.status_code, response.headers["content-type"], response.json())
    expected = SpanRecord(
        trace_id=TRACE,
        span_id=SPAN,
        parent_span_id=PARENT,
        name="process orders",
        kind="consumer",
        start=1544712660000000000,
        end=1544712661000000000,
        attributes={"n": 7, "raw": b"\x00\x01", "l": [True], "m": {"k": None}},
        events=(SpanEvent(name="e", time=5),),
        links=(SpanLink(trace_id=TRACE, span_id=PARENT),),
        status="error",
        status_message="no",
        service="shop",
        resource={"service.name": "shop"},
        scope="meshkit",
    )
    assert expected == span
    assert hash(expected) == hash(span)


async def test_says_how_many_spans_had_no_valid_id() -> None:
    """Spans without a valid id are refused one by one, and the answer counts them, in both encodings."""
    request = trace_service_pb2.ExportTraceServiceRequest.FromString(body(2))
    request.resource_spans[0].scope_spans[0].spans[0].trace_id = bytes(16)
    as_json = {"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "ab", "spanId": SPAN, "name": "short"}]}]}]}
    async with OtlpReceiver() as receiver, httpx.AsyncClient(base_url=receiver.url) as client:
        first = await client.post("/v1/traces", content=request.SerializeToString(), headers=PROTOBUF)
        second = await client.post("/v1/traces", json=as_json)

    said = trace_service_pb2.ExportTraceServiceResponse.FromString(first.content)
    assert (200, 1) == (first.status_code, said.partial_success.rejected_spans)
    assert (200, "1") == (second.status_code, second.json()["partialSuccess"]["rejectedSpans"])
    assert ["span 2"] == [span.name for span in receiver.spans()]


async def test_a_repeated_export_adds_nothing() -> None:
    """An exporter that repeats a body it got no answer to leaves each span there once."""
    async with OtlpReceiver() as receiver, httpx.AsyncClient(base_url=receiver.url) as client:
        for _ in range(2):
            await client.post("/v1/traces", content=body(3), headers=PROTOBUF)
        assert ["span 1", "span 2", "span 3"] == [span.name for span in receiver.trace(TRACE)]


# --- HTTP ---------------------------------------------------------------------------------------------------------------


async def test_one_connection_takes_many_requests() -> None:
    """Requests that were written at once on one connection are answered in order, until one asks to close."""
    one = body()
    async with OtlpReceiver() as receiver, raw(receiver) as (reader, writer):
        writer.write(post(f"Content-Length: {len(one)}\r\n", one) * 2)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = [await answer(reader) for _ in range(3)]
        rest = await reader.read()

    assert [(200, "keep-alive"), (200, "keep-alive"), (200, "close")] == [
        (one.status, one.headers["connection"]) for one in answers
    ]
    assert {"status": "ok", "receives": "POST /v1/traces", "spans": 1, "traces": 1} == json.loads(answers[2].body)
    assert b"" == rest


async def test_takes_chunked_bodies_with_trailers() -> None:
    """A body in chunks, with chunk extensions and trailers, is one body."""
    whole = body(3)
    chunks = (
        b"5;ext=1\r\n" + whole[:5] + b"\r\n" + f"{len(whole) - 5:X}\r\n".encode() + whole[5:] + b"\r\n0\r\nT: 1\r\n\r\n"
    )
    async with OtlpReceiver() as receiver:
        got = await talk(receiver, post("Transfer-Encoding: chunked\r\n", chunks))
        assert (200, 3) == (got.status, len(receiver.spans()))


async def test_identity_is_no_encoding() -> None:
    """A body that says `Content-Encoding: identity` is read as it is."""
    async with OtlpReceiver() as receiver, httpx.AsyncClient(base_url=receiver.url) as client:
        response = await client.post("/v1/traces", content=body(), headers=PROTOBUF | {"content-encoding": "identity"})
        assert (200, 1) == (response.status_code, len(receiver.spans()))


async def test_asks_for_the_body_where_the_client_waits() -> None:
    """A client that sends `Expect: 100-continue` gets its 100 before it has to send the body."""
    one = body()
    async with OtlpReceiver() as receiver, raw(receiver) as (reader, writer):
        writer.write(post(f"Content-Length: {len(one)}\r\nExpect: 100-continue\r\n"))
        assert b"HTTP/1.1 100 Continue\r\n\r\n" == await reader.readuntil(b"\r\n\r\n")
        writer.write(one)
        assert 200 == (await answer(reader)).status


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status", "code"),
    [
        ("POST", "/v1/metrics", PROTOBUF, body(), 404, 5),
        ("POST", "/", PROTOBUF, body(), 405, 12),
        ("PUT", "/v1/traces", PROTOBUF, body(), 405, 12),
        ("POST", "/v1/traces", PROTOBUF, b"\xff\xff\xff", 400, 3),
        ("POST", "/v1/traces", PROTOBUF | {"content-encoding": "gzip"}, b"no gzip", 400, 3),
        ("POST", "/v1/traces", PROTOBUF | {"content-encoding": "gzip"}, gzip.compress(body())[:-9], 400, 3),
        ("POST", "/v1/traces", PROTOBUF | {"content-encoding": "br"}, body(), 415, 3),
        ("POST", "/v1/traces", JSON, b"{", 400, 3),
        ("POST", "/v1/traces", JSON, b"[]", 400, 3),
        ("POST", "/v1/traces", JSON, b'{"resourceSpans": 1}', 400, 3),
        ("POST", "/v1/traces", JSON, b"[" * 100_000, 400, 3),
        ("POST", "/v1/traces", JSON, b'{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"xyz"}]}]}]}', 400, 3),
        ("POST", "/v1/traces", {"content-type": "text/plain"}, body(), 415, 3),
        ("POST", "/v1/traces", {}, body(), 415, 3),
    ],
)
async def test_a_refusal_says_why_and_keeps_the_connection(
    method: str, path: str, headers: dict[str, str], content: bytes, status: int, code: int
) -> None:
    """Every refused request gets its status and a google.rpc.Status in its own encoding; the next one is served."""
    async with OtlpReceiver() as receiver, httpx.AsyncClient(base_url=receiver.url) as client:
        response = await client.request(method, path, headers=headers, content=content)
        after = await client.post("/v1/traces", headers=PROTOBUF, content=body())

    assert (status, "keep-alive") == (response.status_code, response.headers["connection"])
    if headers.get("content-type") == "application/x-protobuf":
        said = status_pb2.Status.FromString(response.content)
        assert "application/x-protobuf" == response.headers["content-type"]
        assert (code, True) == (said.code, bool(said.message))
    else:
        assert code == response.json()["code"]
        assert response.json()["message"]
    assert (status == 405) == ("allow" in response.headers)
    assert (200, 1) == (after.status_code, len(receiver.spans()))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST /v1/traces HTTP/2.0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nNo colon here\r\n\r\n", 400),
        (b"GET http://[ HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: a\nEvil: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (post("Content-Length: -1\r\n"), 400),
        (post("Content-Length: 1\r\nContent-Length: 2\r\n"), 400),
        (post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), 400),
        (post("Transfer-Encoding: gzip\r\n"), 400),
        (post("Transfer-Encoding: chunked\r\n", b"0x5\r\n"), 400),
        (post("Transfer-Encoding: chunked\r\n", b"2\r\nabc\r\n"), 400),
        (post("Transfer-Encoding: chunked\r\n", b"a" * 70_000), 400),
        (post("Transfer-Encoding: chunked\r\n", b"0\r\n" + b"T: 12345678\r\n" * 7_000), 431),
    ],
)
async def test_what_is_not_http_is_refused_and_the_connection_closed(request_: bytes, status: int) -> None:
    """Where the end of a request cannot be trusted, the answer is the connection's last."""
    async with OtlpReceiver() as receiver:
        got = await talk(receiver, request_)
    assert (status, "close") == (got.status, got.headers["connection"])


@pytest.mark.parametrize("how", ["length", "chunks", "gzip", "deflate"])
async def test_a_body_over_the_limit_is_refused(how: str) -> None:
    """A body over the limit is answered with 413, whether it says so, comes in chunks, or is small until unpacked."""
    large = b"\0" * 3_000_000
    request = {
        "length": post(f"Content-Length: {len(large)}\r\n", large),
        "chunks": post(
            "Transfer-Encoding: chunked\r\n", (b"40000\r\n" + large[:0x40000] + b"\r\n") * 11 + b"0\r\n\r\n"
        ),
        "gzip": post(
            f"Content-Encoding: gzip\r\nContent-Length: {len(gzip.compress(large))}\r\n", gzip.compress(large)
        ),
        "deflate": post(
            f"Content-Encoding: deflate\r\nContent-Length: {len(zlib.compress(large))}\r\n", zlib.compress(large)
        ),
    }[how]
    async with OtlpReceiver(max_body=1_000_000) as receiver:
        got = await talk(receiver, request)
    assert 413 == got.status
    assert "1000000 bytes" in status_pb2.Status.FromString(got.body).message


async def test_joined_gzip_members_are_one_body() -> None:
    """A body that was compressed in two gzip members is unpacked whole."""
    packed = gzip.compress(body(1)) + gzip.compress(body(1, first=2))
    async with OtlpReceiver() as receiver, httpx.AsyncClient(base_url=receiver.url) as client:
        await client.post("/v1/traces", content=packed, headers=PROTOBUF | {"content-encoding": "gzip"})
        assert ["span 1", "span 2"] == [span.name for span in receiver.spans()]


async def test_many_exporters_at_once() -> None:
    """Forty connections that send at once, in pieces and large, each get their answer, and no span is missing."""

    async def exporter(receiver: OtlpReceiver, number: int) -> int:
        # Some are large enough to be decoded in a thread.
        count = 8_000 if number % 20 == 0 else 20
        data = body(count, trace_id=f"{number + 1:032x}")
        async with raw(receiver) as (reader, writer):
            request = post(f"Content-Length: {len(data)}\r\n", data)
            for piece in (request[:10], request[10:150], request[150:]):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            assert 200 == (await answer(reader)).status
        return count

    async with OtlpReceiver() as receiver:
        counts = await asyncio.gather(*(exporter(receiver, number) for number in range(40)))
        assert counts == [len(receiver.trace(f"{number + 1:032x}")) for number in range(40)]
        assert 40 == len(receiver.traces())


async def test_a_client_that_leaves_disturbs_nobody() -> None:
    """Clients that go away within a head, a body or an answer leave the receiver as it was."""
    async with OtlpReceiver() as receiver:
        for start in (b"POST /v1", post("Content-Length: 100\r\n", b"half"), post("Content-Length: 1\r\n", b"\xff")):
            async with raw(receiver) as (_, writer):
                writer.write(start)
                await writer.drain()
        got = await talk(receiver, post(f"Content-Length: {len(body())}\r\n", body()))
        assert (200, 1) == (got.status, len(receiver.spans()))


async def test_ends_with_clients_connected_and_frees_its_port() -> None:
    """Leaving the receiver closes idle connections and stuck ones, and another receiver can have the port at once."""
    async with contextlib.AsyncExitStack() as clients:
        async with OtlpReceiver() as receiver:
            idle, writer = await clients.enter_async_context(raw(receiver))
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert 200 == (await answer(idle)).status
            waiting, _ = await clients.enter_async_context(raw(receiver))
            port = int(receiver.url.rsplit(":", 1)[1])
        assert b"" == await idle.read()
        assert b"" == await waiting.read()
        async with OtlpReceiver(port=port) as again:
            assert receiver.url == again.url


# --- bounds and settings ------------------------------------------------------------------------------------------------


async def test_the_traces_quiet_for_longest_leave_first() -> None:
    """Over the bound whole traces leave, the one that was added to least recently first; what left is counted."""
    a, b, c = (f"{number:032x}" for number in (1, 2, 3))
    async with OtlpReceiver(keep=6) as receiver, httpx.AsyncClient(base_url=receiver.url) as client:
        for trace_id, first, count in ((a, 1, 2), (b, 1, 3), (a, 3, 1), (c, 1, 2)):
            data = body(count, trace_id=trace_id, first=first)
            await client.post("/v1/traces", content=data, headers=PROTOBUF)
        assert {a: 3, c: 2} == {trace_id: len(spans) for trace_id, spans in receiver.traces().items()}
        assert 3 == receiver.evicted


async def test_one_endless_trace_keeps_its_newest_spans() -> None:
    """A single trace larger than the bound loses its oldest spans, not all of them."""
    async with OtlpReceiver(keep=5) as receiver, httpx.AsyncClient(base_url=receiver.url) as client:
        await client.post("/v1/traces", content=body(8), headers=PROTOBUF)
        assert ["span 4", "span 5", "span 6", "span 7", "span 8"] == [span.name for span in receiver.spans()]
        assert 3 == receiver.evicted


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_binds_loopback_only(host: str) -> None:
    """A host that others can reach is refused, with the reason and what to do instead."""
    with pytest.raises(ValueError, match=r"loopback only, because .* Use 127\.0\.0\.1; for other machines run"):
        OtlpReceiver(host=host)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
async def test_every_loopback_name_will_do(host: str) -> None:
    """`localhost` and the other loopback addresses are taken, and the url says which it became."""
    async with OtlpReceiver(host=host) as receiver, httpx.AsyncClient() as client:
        assert 200 == (await client.get(receiver.url)).status_code


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70_000},
        {"keep": 0},
        {"max_body": 0},
        {"forward_to": "localhost:4318"},
        {"forward_to": "grpc://localhost:4317"},
        {"forward_to": "http://localhost:port"},
        {"forward_to": "http://user:secret@localhost:4318"},
    ],
)
def test_settings_that_cannot_be_right_are_refused(wrong: dict[str, object]) -> None:
    """A wrong setting is refused when the receiver is made, by a sentence that shows no password."""
    with pytest.raises(ValueError, match=next(iter(wrong))) as refused:
        OtlpReceiver(**wrong)  # type: ignore[arg-type]
    assert "secret" not in str(refused.value)


def test_no_address_before_it_is_entered() -> None:
    """Asking for the address too early is told what is missing."""
    with pytest.raises(RuntimeError, match="async with"):
        _ = OtlpReceiver().url


async def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without opentelemetry-proto the receiver says which extra brings it, when it is entered."""
    monkeypatch.setitem(sys.modules, "opentelemetry.proto.collector.trace.v1", None)
    with pytest.raises(ImportError, match=r'pip install "meshkit-py\[otlp\]"'):
        async with OtlpReceiver():
            pass


# --- records ------------------------------------------------------------------------------------------------------------


async def test_raw_bodies_are_kept_for_later(tmp_path: Path) -> None:
    """With `record_to` every accepted body is on disk as it was exported, unpacked; a second run adds to it."""
    folder = tmp_path / "otlp"
    as_json = {"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": TRACE, "spanId": SPAN, "name": "json"}]}]}]}
    for run in (1, 2):
        async with OtlpReceiver(record_to=folder) as receiver, httpx.AsyncClient(base_url=receiver.url) as client:
            await client.post(
                "/v1/traces", content=gzip.compress(body(2)), headers=PROTOBUF | {"content-encoding": "gzip"}
            )
            await client.post("/v1/traces", content=b"bad", headers=PROTOBUF)
            if run == 1:
                await client.post("/v1/traces", json=as_json)

    assert ["000001.pb", "000002.json", "000003.pb"] == sorted(file.name for file in folder.iterdir())
    assert body(2) == (folder / "000001.pb").read_bytes()
    assert ["span 1", "span 2", "json"] == [span.name for span in read_recorded(folder)]


async def test_a_body_that_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    """Where the record would get a hole, the exporter is told, and nothing is held that is not on disk."""
    folder = tmp_path / "otlp"
    async with OtlpReceiver(record_to=folder) as receiver, httpx.AsyncClient(base_url=receiver.url) as client:
        folder.rmdir()
        response = await client.post("/v1/traces", content=body(), headers=PROTOBUF)
        assert (500, []) == (response.status_code, receiver.spans())


# --- decoding -----------------------------------------------------------------------------------------------------------

_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
_KEYS = st.sampled_from(
    ["resourceSpans", "scopeSpans", "spans", "traceId", "links", "kind", "attributes", "value", "arrayValue", "status"]
)
_DOCUMENTS = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4)
)


@settings(max_examples=300, deadline=None)
@given(_DOCUMENTS)
def test_any_json_is_read_or_refused(document: object) -> None:
    """Whatever JSON comes, decoding it gives spans or a ValueError, nothing else."""
    with contextlib.suppress(ValueError):
        decode_spans(json.dumps(document).encode(), content_type="application/json")


@settings(max_examples=300, deadline=None)
@given(st.integers(min_value=0, max_value=10_000), st.integers(min_value=0, max_value=255))
def test_any_damaged_protobuf_is_read_or_refused(place: int, byte: int) -> None:
    """Whatever a byte is changed to, decoding gives spans or a ValueError, nothing else."""
    data = bytearray(body(3))
    data[place % len(data)] = byte
    with contextlib.suppress(ValueError):
        decode_spans(bytes(data))
