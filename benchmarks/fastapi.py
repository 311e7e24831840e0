"""A FastAPI request with one path parameter and a JSON answer, on uvicorn, with 1 and with 100 routes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

from benchmarks import Row, Sample
from benchmarks._worker import worker

ROWS = (
    Row(what="meshkit, 1 route", against="bare, 1 route", target=1.50),
    Row(what="meshkit, 100 routes", against="bare, 100 routes", target=1.28),
    Row(what="meshkit without spans, 1 route", against="bare, 1 route", target=1.05),
    Row(what="OpenTelemetry's instrumentation, 1 route", against="bare, 1 route", target=None),
    Row(what="OpenTelemetry's instrumentation, 100 routes", against="bare, 100 routes", target=None),
)

_CONTENDERS = ("bare", "meshkit", "meshkit without spans", "OpenTelemetry's instrumentation")


def _app(contender: str, routes: int) -> Any:
    from fastapi import FastAPI

    app = FastAPI(openapi_url=None)

    async def read(item_id: int) -> dict[str, int]:
        return {"item_id": item_id}

    # The one that is asked for comes last: the router tries them in order.
    for number in range(routes):
        app.get(f"/resource-{number}/{{item_id}}")(read)
    if contender.startswith("meshkit"):
        import meshkit.fastapi
        from benchmarks import _telemetry

        if contender == "meshkit":
            _telemetry.everything_on()
        else:
            _telemetry.metrics_on()
        meshkit.fastapi.install(app, service="bench")
    if contender == "OpenTelemetry's instrumentation":
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        from benchmarks import _telemetry

        FastAPIInstrumentor.instrument_app(app, tracer_provider=_telemetry.provider())
    return app


@contextlib.asynccontextmanager
async def work(contender: str, routes: str) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """One contender's app on uvicorn, in a worker; what asks it is a process of its own, whose time does not count."""
    import uvicorn

    app = _app(contender, int(routes))
    listener = socket.create_server(("127.0.0.1", 0))
    # A connection waits through the rounds of the other contenders.
    config = uvicorn.Config(
        app,
        http="httptools",
        loop="asyncio",
        access_log=False,
        log_level="warning",
        lifespan="on",
        # A connection waits through the rounds of the other contenders.
        timeout_keep_alive=600,
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started:
        if serving.done():
            raise RuntimeError(f"the app of {contender!r} did not start; its own lines above say why")
        await asyncio.sleep(0.01)
    path = f"/resource-{int(routes) - 1}/42"
    command = (sys.executable, "-m", "benchmarks._http_load", str(listener.getsockname()[1]), path)
    load = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    assert load.stdin is not None
    assert load.stdout is not None
    requests, answers = load.stdin, load.stdout

    async def run(count: int) -> None:
        requests.write(f"{count}\n".encode())
        if not await answers.readline():
            raise RuntimeError("what asks the app has ended; its own lines above say why")

    try:
        yield run
    finally:
        requests.close()
        await load.wait()
        server.should_exit = True
        await serving


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    with contextlib.ExitStack() as stack:
        yield {
            f"{name}, {routes} route{'s' if routes > 1 else ''}": stack.enter_context(
                worker("fastapi", name, str(routes))
            )
            for name in _CONTENDERS
            for routes in (1, 100)
        }
