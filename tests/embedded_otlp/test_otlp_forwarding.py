"""Passing traces on to a real collector, or one that is down, slow or refuses."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from meshkit.embedded.otlp import OtlpReceiver
from meshkit.testing.servers import Jaeger

PACKED = {"content-type": "application/x-protobuf; charset=x", "content-encoding": "gzip"}


def body(first: int = 1, count: int = 1) -> bytes:
    """A compressed export request of `count` spans."""
    request = trace_service_pb2.ExportTraceServiceRequest()
    scope = request.resource_spans.add().scope_spans.add()
    for number in range(first, first + count):
        scope.spans.add(
            trace_id=b"t" * 16, span_id=number.to_bytes(8, "big"), name=f"span {number}", start_time_unix_nano=number
        )
    return gzip.compress(request.SerializeToString(), mtime=0)


@dataclass
class Collector:
    """An OTLP endpoint that gives the answers it was told to, the last one for ever, and keeps what it was sent."""

    answers: list[str]
    heads: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(line for line in head.split("\r\n") if line.startswith("content-length:"))
            self.heads.append(head)
            self.bodies.append(await reader.readexactly(int(length.partition(":")[2])))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if answer == "silence":
                await reader.read()
            elif answer != "hang up":
                writer.write(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()


@contextlib.asynccontextmanager
async def collector(*answers: str) -> AsyncIterator[Collector]:
    it = Collector(list(answers))
    server = await asyncio.start_server(it.serve, "127.0.0.1", 0)
    it.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield it
    finally:
        server.close()
        await server.wait_closed()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def send(receiver: OtlpReceiver, data: bytes) -> None:
    async with httpx.AsyncClient() as client:
        assert 200 == (await client.post(f"{receiver.url}/v1/traces", content=data, headers=PACKED)).status_code


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110  (looks from outside at what has no event to wait for)
            await asyncio.sleep(0.005)


async def test_bodies_are_passed_on_unchanged() -> None:
    """The other endpoint gets each accepted body byte for byte, still compressed, at `/v1/traces` below its base."""
    async with collector("200 OK") as other:
        async with OtlpReceiver(forward_to=f"{other.url}/otlp/") as receiver:
            await send(receiver, body())
        assert [body()] == other.bodies
        assert other.heads[0].startswith("POST /otlp/v1/traces HTTP/1.1\r\n")
        assert "content-encoding: gzip\r\n" in other.heads[0]
        assert "content-type: application/x-protobuf\r\n" in other.heads[0]
    assert (1, 0, "") == (receiver.forwarded, receiver.not_forwarded, receiver.forward_error)


async def test_a_second_receiver_gets_the_same_spans() -> None:
    """Two receivers in a row hold the same spans once the first has ended: the end flushes."""
    async with OtlpReceiver() as second:
        async with OtlpReceiver(forward_to=f"{second.url}/v1/traces") as first:
            for number in range(1, 31):
                await send(first, body(number))
        assert 30 == len(first.spans())
        assert first.spans() == second.spans()
    assert (30, 0) == (first.forwarded, first.not_forwarded)


async def test_only_accepted_bodies_are_passed_on() -> None:
    """What the receiver refuses, and what holds no span, it does not pass on."""
    async with collector("200 OK") as other:
        async with OtlpReceiver(forward_to=other.url) as receiver, httpx.AsyncClient() as client:
            await client.post(f"{receiver.url}/v1/traces", content=b"bad", headers=PACKED)
            await client.post(
                f"{receiver.url}/v1/traces", content=b"", headers={"content-type": "application/x-protobuf"}
            )
        assert [] == other.bodies


async def test_a_collector_that_starts_late_gets_everything(caplog: pytest.LogCaptureFixture) -> None:
    """Spans wait while nobody listens, which one warning says, and all arrive in order once somebody does."""
    port = free_port()
    with caplog.at_level(logging.WARNING, "meshkit.embedded.otlp"):
        async with OtlpReceiver(forward_to=f"http://127.0.0.1:{port}") as receiver:
            for number in range(1, 6):
                await send(receiver, body(number))
            await until(lambda: receiver.forward_error != "")
            async with OtlpReceiver(port=port) as late:
                await until(lambda: receiver.forwarded == 5)
                assert receiver.spans() == late.spans()
    assert (5, 0, "") == (receiver.forwarded, receiver.not_forwarded, receiver.forward_error)
    assert 1 == len(caplog.records)


async def test_an_end_with_nobody_there_is_quick_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Where the other endpoint is down at the end, the receiver does not wait; it counts the spans and says why."""
    started = asyncio.get_running_loop().time()
    with caplog.at_level(logging.WARNING, "meshkit.embedded.otlp"):
        async with OtlpReceiver(forward_to=f"http://127.0.0.1:{free_port()}", flush_timeout=30) as receiver:
            for number in (1, 4):
                await send(receiver, body(number, count=3))
            assert 6 == len(receiver.spans())
    assert asyncio.get_running_loop().time() - started < 5
    assert (0, 6) == (receiver.forwarded, receiver.not_forwarded)
    assert "6 spans were not passed on" in caplog.text
    assert receiver.forward_error in caplog.text


@pytest.mark.parametrize("busy", ["503 Busy", "429 Slow", "502 Bad", "504 Late", "hang up"])
async def test_what_may_work_later_is_tried_again(busy: str) -> None:
    """Answers that the OTLP specification calls retryable, and lost connections, are followed by another try."""
    async with collector(busy, busy, "200 OK") as other, OtlpReceiver(forward_to=other.url) as receiver:
        await send(receiver, body())
        await until(lambda: receiver.forwarded == 1)
        assert [body()] * 3 == other.bodies
        assert 0 == receiver.not_forwarded


async def test_what_is_refused_for_good_is_lost_at_once() -> None:
    """A refusal is not tried again and does not hold up what comes after it."""
    async with collector("400 Bad Request", "200 OK") as other, OtlpReceiver(forward_to=other.url) as receiver:
        await send(receiver, body(1, count=2))
        await send(receiver, body(3))
        await until(lambda: receiver.forwarded == 1)
        assert (2, "it answered 400") == (receiver.not_forwarded, receiver.forward_error)
        assert 2 == len(other.bodies)


async def test_a_silent_collector_holds_up_the_end_for_the_bound_only() -> None:
    """An endpoint that accepts and never answers costs the end `flush_timeout`, and exporters nothing."""
    async with collector("silence") as other:
        async with OtlpReceiver(forward_to=other.url, flush_timeout=0.1) as receiver:
            for number in range(1, 4):
                await send(receiver, body(number))
            await until(lambda: len(other.bodies) == 1)
        assert (0, 3) == (receiver.forwarded, receiver.not_forwarded)


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the other endpoint is down, no more than the bound waits for it; the rest is counted and still held here."""
    monkeypatch.setattr("meshkit.embedded.otlp._Forwarder._ROOM", 2 * len(body()))
    async with OtlpReceiver(forward_to=f"http://127.0.0.1:{free_port()}") as receiver:
        for number in range(1, 6):
            await send(receiver, body(number))
        assert 3 == receiver.not_forwarded
        assert 5 == len(receiver.spans())
    assert 5 == receiver.not_forwarded


async def test_a_real_jaeger_shows_what_was_passed_on(jaeger_server: Jaeger) -> None:
    """A trace passed on to Jaeger is found there through its query API (checked with Jaeger 1.42)."""
    trace_id = uuid.uuid4().bytes
    request = trace_service_pb2.ExportTraceServiceRequest.FromString(gzip.decompress(body(1, count=3)))
    now = time.time_ns()
    for span in request.resource_spans[0].scope_spans[0].spans:
        span.trace_id = trace_id
        span.start_time_unix_nano, span.end_time_unix_nano = now, now + 1000
    async with OtlpReceiver(forward_to=jaeger_server.otlp_url) as receiver:
        await send(receiver, gzip.compress(request.SerializeToString()))
    assert (3, 0, "") == (receiver.forwarded, receiver.not_forwarded, receiver.forward_error)
    found = await asyncio.to_thread(jaeger_server.trace, trace_id.hex())
    assert found is not None
    assert {"span 1", "span 2", "span 3"} == {span["operationName"] for span in found["spans"]}
