"""FastAPI apps served by uvicorn on a real socket, in the test's own event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from meshkit.core.events import Event, listen
from meshkit.core.trace import tracer, use_tracer
from meshkit.telemetry import tracing

Serve = Callable[[FastAPI], Awaitable[httpx.AsyncClient]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serves apps, and gives a plain client for each; all end in order at the end of the test."""
    running: list[tuple[uvicorn.Server, asyncio.Task[None], socket.socket, httpx.AsyncClient]] = []

    async def start(app: FastAPI) -> httpx.AsyncClient:
        sock = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on", access_log=False))
        task = asyncio.create_task(server.serve(sockets=[sock]))
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}")
        running.append((server, task, sock, client))
        while not server.started:
            await asyncio.sleep(0.002)
            assert not task.done()
        return client

    yield start
    for server, task, sock, client in running:
        await client.aclose()
        server.should_exit = True
        await task
        sock.close()


@pytest.fixture
def events() -> Iterator[list[Event]]:
    heard: list[Event] = []
    stop = listen(heard.append, kind=Event)
    yield heard
    stop()


class Spans:
    """The spans that have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    def ended(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()


@pytest.fixture
def spans() -> Iterator[Spans]:
    before = tracer()
    spans = Spans()
    tracing.install(provider=spans.provider)
    yield spans
    use_tracer(before)
    spans.provider.shutdown()
