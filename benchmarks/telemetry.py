"""What telemetry adds to one hop, in a loop: a span with its attributes, its context in the headers, and its metrics."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

from benchmarks import MICROSECOND, Row, Sample
from benchmarks._worker import worker

ROWS = (
    Row(what="meshkit: span, inject and metrics of a hop", against=MICROSECOND, target=20),
    Row(what="OpenTelemetry alone: span and inject", against=MICROSECOND, target=None),
)

# As an attempt of the HTTP client has them.
_ATTRIBUTES: dict[str, str | int] = {
    "http.request.method": "GET",
    "server.address": "127.0.0.1",
    "server.port": 8000,
    "url.full": "http://127.0.0.1:8000/users/1",
    "meshkit.client.name": "users",
    "meshkit.attempt": 1,
}
_ANSWER: dict[str, str | int] = {"http.response.status_code": 200, "network.protocol.version": "1.1"}


@contextlib.asynccontextmanager
async def work(contender: str) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    yield _meshkit() if contender.startswith("meshkit") else _opentelemetry()


def _meshkit() -> Callable[[int], Awaitable[None]]:
    from benchmarks import _telemetry
    from meshkit.core.events import ClientAttemptEnded, emit
    from meshkit.core.trace import tracer

    _telemetry.everything_on()

    async def run(count: int) -> None:
        for _ in range(count):
            headers: dict[str, str] = {}
            span = tracer().start("GET", kind="client", attributes=_ATTRIBUTES)
            tracer().inject(headers, span=span)
            context = span.context
            assert context is not None
            span.set(_ANSWER)
            emit(
                ClientAttemptEnded(
                    source="users", status=200, error_type="", seconds=0.01, traceparent=context.traceparent
                )
            )
            span.end()

    return run


def _opentelemetry() -> Callable[[int], Awaitable[None]]:
    from opentelemetry import propagate, trace

    from benchmarks import _telemetry

    tracer = _telemetry.provider().get_tracer("bench")

    async def run(count: int) -> None:
        for _ in range(count):
            headers: dict[str, str] = {}
            span = tracer.start_span("GET", kind=trace.SpanKind.CLIENT, attributes=_ATTRIBUTES)
            propagate.inject(headers, trace.set_span_in_context(span))
            span.set_attributes(_ANSWER)
            span.end()

    return run


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    with contextlib.ExitStack() as stack:
        names = [row.what for row in ROWS]
        yield {name: stack.enter_context(worker("telemetry", name)) for name in names}
