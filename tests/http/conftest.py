"""A host that misbehaves by script, and clients of both libraries before it."""

from __future__ import annotations

import importlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import meshkit.httpx
from meshkit.core.events import Event, listen
from meshkit.core.trace import tracer, use_tracer
from meshkit.telemetry import tracing
from meshkit.testing.clock import ManualClock
from tests.http.fault_host import FaultHost


@pytest.fixture
async def host() -> AsyncIterator[FaultHost]:
    host = FaultHost()
    await host.start()
    yield host
    await host.close()


@pytest.fixture
def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["httpx", "httpx2"])
def library(request: pytest.FixtureRequest) -> Any:
    """The module httpx, then httpx2."""
    return importlib.import_module(request.param)


@pytest.fixture
async def client(library: Any, host: FaultHost, clock: ManualClock) -> AsyncIterator[Callable[..., Any]]:
    """Makes clients of the fault host; they are closed at the end."""
    made: list[Any] = []

    def make(name: str = "prices", **options: Any) -> Any:
        options = {"base_url": host.url, "clock": clock, "library": library.__name__} | options
        made.append(meshkit.httpx.client(name, **options))
        return made[-1]

    yield make
    for one in made:
        await one.aclose()


@pytest.fixture
def events() -> Iterator[list[Event]]:
    heard: list[Event] = []
    stop = listen(heard.append, kind=Event)
    yield heard
    stop()


class Spans:
    """The spans that have ended, by name."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]


@pytest.fixture
def spans() -> Iterator[Spans]:
    before = tracer()
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.install(provider=provider)
    yield Spans(exporter)
    use_tracer(before)
    provider.shutdown()
