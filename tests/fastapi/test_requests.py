"""One request through the middleware: span, metrics, deadline, refusals, marks."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import pytest
from fastapi import APIRouter, BackgroundTasks, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.trace import SpanKind, StatusCode

import meshkit.fastapi
from meshkit import (
    Backoff,
    CircuitBreaker,
    CircuitOpenError,
    DeadlineExceededError,
    Pipeline,
    Retry,
    current_attempt,
    current_scope,
)
from meshkit.core.events import Event, ServerRequestEnded, ServerRequestStarted
from meshkit.core.scope import Scope
from meshkit.testing.clock import ManualClock
from tests.fastapi.conftest import Serve, Spans


def scope() -> Scope:
    found = current_scope()
    assert found is not None
    return found


def ended(events: list[Event]) -> list[tuple[str, str, int]]:
    return [(event.method, event.route, event.status) for event in events if isinstance(event, ServerRequestEnded)]


def an_app(**install: Any) -> FastAPI:
    """An app with a route for each thing that can happen to a request."""
    app = FastAPI(telemetry={"tracing": False})

    @app.get("/users/{user_id}")
    async def user(user_id: int) -> int:
        return user_id

    @app.get("/left")
    async def left(request: Request) -> float | None:
        deadline = scope().deadline
        return None if deadline is None else deadline - install["clock"].now()

    @app.get("/open")
    async def refused() -> None:
        raise CircuitOpenError(policy="provider", retry_after=2.1)

    @app.get("/late")
    async def late() -> None:
        raise DeadlineExceededError("too late.")

    @app.get("/degraded")
    async def degraded(status: int = 200) -> Response:
        scope().mark_degraded("last-price")
        scope().mark_degraded("no-stock")
        return Response(status_code=status)

    @app.get("/exhausted")
    async def exhausted(status: int) -> Response:
        scope().mark_exhausted()
        return Response(status_code=status)

    @app.get("/broken")
    async def broken(exhausted: bool = False) -> None:
        if exhausted:
            scope().mark_exhausted()
        raise ZeroDivisionError("oops")

    meshkit.fastapi.install(app, service="shop", **install)
    return app


# -- spans ------------------------------------------------------------------------------------------------------------


async def test_a_request_has_one_server_span(serve: Serve, spans: Spans) -> None:
    """Named after its route, child of the caller's span, with the attributes of the conventions and no secrets."""
    client = await serve(an_app())
    caller = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    headers = {"traceparent": caller, "meshkit-attempt": "2", "user-agent": "probe/1"}
    await client.get("/users/7?token=secret&page=2", headers=headers)
    (span,) = spans.ended()
    assert ("GET /users/{user_id}", SpanKind.SERVER) == (span.name, span.kind)
    assert span.parent is not None
    assert "cd" * 8 == f"{span.parent.span_id:016x}"
    assert {
        "http.request.method": "GET",
        "http.route": "/users/{user_id}",
        "http.response.status_code": 200,
        "url.path": "/users/7",
        "url.query": "token=REDACTED&page=2",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "server.address": "127.0.0.1",
        "server.port": client.base_url.port,
        "client.address": "127.0.0.1",
        "user_agent.original": "probe/1",
        "meshkit.attempt": 2,
    } == dict(span.attributes or {})
    assert StatusCode.UNSET is span.status.status_code


async def test_a_server_error_is_an_error_and_a_client_error_is_none(serve: Serve, spans: Spans) -> None:
    """404 and 422 are the caller's; 503 and an exception are ours, and the span says which."""
    client = await serve(an_app())
    for path in ("/nowhere", "/users/x", "/open", "/broken"):
        await client.get(path)
    assert [
        ("GET", 404, StatusCode.UNSET, None),
        ("GET /users/{user_id}", 422, StatusCode.UNSET, None),
        ("GET /open", 503, StatusCode.ERROR, "meshkit.CircuitOpenError"),
        ("GET /broken", 500, StatusCode.ERROR, "ZeroDivisionError"),
    ] == [
        (
            span.name,
            (span.attributes or {})["http.response.status_code"],
            span.status.status_code,
            (span.attributes or {}).get("error.type"),
        )
        for span in spans.ended()
    ]


async def test_a_streamed_response_ends_its_span_with_its_last_byte(
    serve: Serve, spans: Spans, events: list[Event]
) -> None:
    """While the body is on its way the request goes on; background tasks after it do not count."""
    app = FastAPI(telemetry={"tracing": False})
    more, background = asyncio.Event(), asyncio.Event()

    @app.get("/stream")
    async def stream(tasks: BackgroundTasks) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            await more.wait()
            yield b"second"

        tasks.add_task(background.wait)
        return StreamingResponse(body(), background=tasks)

    meshkit.fastapi.install(app, service="shop")
    client = await serve(app)
    async with client.stream("GET", "/stream") as response:
        chunks = response.aiter_bytes()
        assert b"first" == await anext(chunks)
        assert ((), []) == (spans.ended(), ended(events))
        more.set()
        assert b"second" == await anext(chunks)
        assert [] == [chunk async for chunk in chunks]
        assert [("GET", "/stream", 200)] == ended(events)
        assert 1 == len(spans.ended())
    background.set()


async def test_a_cancelled_request_is_no_error(spans: Spans, events: list[Event]) -> None:
    """A server that stops waiting cancels the request: status 0 and a span that is not an error."""
    app = FastAPI(telemetry={"tracing": False})
    reached = asyncio.Event()

    @app.get("/slow")
    async def slow() -> None:
        reached.set()
        await asyncio.Event().wait()

    meshkit.fastapi.install(app, service="shop")

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    async def send(message: MutableMapping[str, Any]) -> None:
        raise AssertionError(message)

    asgi = {"type": "http", "method": "GET", "path": "/slow", "query_string": b"", "headers": []}
    task = asyncio.create_task(app(asgi, receive, send))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [("GET", "/slow", 0)] == ended(events)
    assert [StatusCode.UNSET] == [span.status.status_code for span in spans.ended()]


async def test_a_websocket_passes(spans: Spans, events: list[Event]) -> None:
    """A websocket reaches its handler, which has a scope; it is no request."""
    app = FastAPI(telemetry={"tracing": False})
    sent: list[Any] = []

    async def handler(asgi: Any, receive: Any, send: Any) -> None:
        scope().mark_degraded("x")
        await send({"type": "websocket.accept"})

    app.mount("/ws", handler)
    meshkit.fastapi.install(app, service="shop")

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message["type"])

    await app({"type": "websocket", "path": "/ws/", "query_string": b"", "headers": []}, receive, send)
    assert ["websocket.accept"] == sent
    assert [] == ended(events)


# -- never two --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("fastapi.telemetry") is None, reason="this FastAPI has no telemetry of its own"
)
async def test_fastapis_own_span_is_enriched(
    serve: Serve, spans: Spans, events: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    """Where FastAPI traces itself there is one server span, with what meshkit knows; once it is said what is cheaper."""
    app = FastAPI(telemetry={"tracer_provider": spans.provider, "operation_spans": False})

    @app.get("/x")
    async def x() -> None:
        scope().mark_degraded("last-price")

    meshkit.fastapi.install(app, service="shop")
    client = await serve(app)
    with caplog.at_level(logging.WARNING, "meshkit"):
        await client.get("/x", headers={"meshkit-attempt": "3"})
        await client.get("/x")
    first, second = spans.ended()
    assert ["GET /x"] * 2 == [first.name, second.name]
    assert ("fastapi", 3, "last-price") == (
        first.instrumentation_scope and first.instrumentation_scope.name,
        (first.attributes or {})["meshkit.attempt"],
        (first.attributes or {})["meshkit.degraded"],
    )
    assert 1 == sum('telemetry={"tracing": False}' in record.message for record in caplog.records)
    ends = [event for event in events if isinstance(event, ServerRequestEnded)]
    assert f"{first.context.span_id:016x}" == ends[0].traceparent.split("-")[2]


@pytest.mark.parametrize("before", [True, False])
async def test_opentelemetrys_span_is_enriched(
    serve: Serve, spans: Spans, caplog: pytest.LogCaptureFixture, before: bool
) -> None:
    """Where the instrumentation of OpenTelemetry is at work, before or after install, it makes the one server span."""
    app = FastAPI(telemetry={"tracing": False})

    @app.get("/x")
    async def x() -> None:
        scope().mark_degraded("last-price")

    def instrument() -> None:
        FastAPIInstrumentor.instrument_app(app, tracer_provider=spans.provider, exclude_spans=["send", "receive"])

    if before:
        instrument()
    meshkit.fastapi.install(app, service="shop")
    if not before:
        instrument()
    client = await serve(app)
    with caplog.at_level(logging.WARNING, "meshkit"):
        await client.get("/x")
        await client.get("/x")
    servers = [span for span in spans.ended() if span.kind is SpanKind.SERVER]
    assert 2 == len(servers) == len(spans.ended())
    assert ["last-price"] * 2 == [(span.attributes or {}).get("meshkit.degraded") for span in servers]
    assert 1 == sum("instrument_app" in record.message for record in caplog.records)


# -- routes -----------------------------------------------------------------------------------------------------------


async def test_the_route_is_the_whole_template(serve: Serve, events: list[Event]) -> None:
    """Prefixes of routers and mounts are in it, values never."""
    app = FastAPI(telemetry={"tracing": False})
    inner, outer, mounted = APIRouter(prefix="/inner"), APIRouter(prefix="/outer"), FastAPI()

    @inner.get("/{item}")
    @mounted.get("/deep/{item}")
    async def item(item: str) -> str:
        return item

    outer.include_router(inner)
    app.include_router(outer, prefix="/v1")
    app.mount("/tenants/{tenant}", mounted)
    meshkit.fastapi.install(app, service="shop")
    client = await serve(app)
    for path in ("/v1/outer/inner/7", "/tenants/acme/deep/7", "/tenants/acme/nothing", "/v1/none"):
        await client.get(path)
    await client.request("PROPFIND", "/v1/outer/inner/7")
    assert [
        ("GET", "/v1/outer/inner/{item}", 200),
        ("GET", "/tenants/{tenant}/deep/{item}", 200),
        ("GET", "/tenants/{tenant}/{path}", 404),
        ("GET", "", 404),
        ("_OTHER", "/v1/outer/inner/{item}", 405),
    ] == ended(events)
    assert 5 == sum(isinstance(event, ServerRequestStarted) for event in events)


# -- what meshkit answers itself --------------------------------------------------------------------------------------


async def test_metrics_and_health_pass_everything_and_leave_nothing(
    serve: Serve, spans: Spans, events: list[Event]
) -> None:
    """They are answered without redirect, past a middleware that asks for a login, and are no requests of the app."""
    app = FastAPI(telemetry={"tracing": False})

    @app.middleware("http")
    async def login(request: Request, call_next: Any) -> Response:
        return Response(status_code=401)

    meshkit.fastapi.install(app, service="shop")
    client = await serve(app)
    assert 401 == (await client.get("/x")).status_code
    plain = await client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert 'http_route="",' in plain.text or 'http_route=""' in plain.text
    modern = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert modern.text.endswith("# EOF\n")
    for probe in ("live", "ready", "started"):
        answer = await client.get(f"/health/{probe}")
        assert (200, "UP") == (answer.status_code, answer.json()["status"])
    assert (200, b"") == ((head := await client.head("/metrics")).status_code, head.content)
    assert (405, "GET, HEAD") == ((post := await client.post("/health/live")).status_code, post.headers["allow"])
    assert [("GET", "", 401)] == ended(events)
    assert 1 == len(spans.ended())


async def test_paths_may_be_others_or_none(serve: Serve) -> None:
    """`metrics=` and `health=` move them, None leaves them to the app."""
    client = await serve(an_app(metrics=None, health="/-"))
    assert 404 == (await client.get("/metrics")).status_code
    assert 404 == (await client.get("/health/live")).status_code
    assert 200 == (await client.get("/-/live")).status_code


# -- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "own", "left"),
    [
        ({}, None, None),
        ({}, 30.0, 30.0),
        ({"meshkit-timeout-ms": "1500"}, None, 1.425),
        ({"meshkit-timeout-ms": "1500"}, 1.0, 1.0),
        ({"meshkit-timeout-ms": "90000"}, 30.0, 30.0),
        ({"grpc-timeout": "250m"}, None, 0.2375),
        ({"grpc-timeout": "2M"}, None, 119.0),
        ({"x-envoy-expected-rq-timeout-ms": "700"}, None, 0.665),
        ({"x-envoy-expected-rq-timeout-ms": "700", "meshkit-timeout-ms": "300"}, None, 0.285),
        ({"meshkit-timeout-ms": "999999999999999999"}, None, 599.0),
        ({"meshkit-timeout-ms": "soon"}, None, None),
        ({"meshkit-timeout-ms": "-5"}, None, None),
        ({"grpc-timeout": "5"}, None, None),
        ({"grpc-timeout": "123456789S"}, None, None),
    ],
)
async def test_an_inbound_deadline_only_shortens(
    serve: Serve, headers: dict[str, str], own: float | None, left: float | None
) -> None:
    """The shortest of all that is said holds, less what the answer needs for its way; no number says nothing."""
    client = await serve(an_app(timeout=own, clock=ManualClock()))
    assert left == pytest.approx((await client.get("/left", headers=headers)).json())


async def test_what_is_late_already_is_not_begun(serve: Serve) -> None:
    """A request whose caller has given up gets 504 and never reaches the app."""
    client = await serve(an_app())
    answer = await client.get("/broken", headers={"meshkit-timeout-ms": "0"})
    assert (504, "exhausted") == (answer.status_code, answer.headers["meshkit-retry"])


# -- refusals and marks -----------------------------------------------------------------------------------------------


async def test_a_refusal_says_when_to_come_back(serve: Serve) -> None:
    """An error of a policy that never started the work is a 503 that the caller may repeat later, not at once."""
    client = await serve(an_app())
    answer = await client.get("/open")
    assert (503, "3", "rejected", "application/problem+json", "MK501") == (
        answer.status_code,
        answer.headers["retry-after"],
        answer.headers["meshkit-retry"],
        answer.headers["content-type"],
        answer.json()["code"],
    )


async def test_being_too_late_is_not_to_be_repeated(serve: Serve) -> None:
    """A passed deadline is a 504 without a time to come back."""
    client = await serve(an_app())
    answer = await client.get("/late")
    assert (504, "exhausted", None) == (
        answer.status_code,
        answer.headers["meshkit-retry"],
        answer.headers.get("retry-after"),
    )


async def test_the_apps_own_handler_answers_first(serve: Serve) -> None:
    """An exception handler of the app's stays in charge, added before or after install."""
    app = an_app()

    @app.exception_handler(CircuitOpenError)
    async def own(request: Request, error: CircuitOpenError) -> JSONResponse:
        return JSONResponse({"mine": error.policy}, status_code=418)

    client = await serve(app)
    assert (418, {"mine": "provider"}) == ((answer := await client.get("/open")).status_code, answer.json())


async def test_a_refusal_out_of_a_middleware_is_answered_too(serve: Serve) -> None:
    """Where no exception handler looks, the middleware of meshkit does."""
    app = FastAPI(telemetry={"tracing": False})

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        raise CircuitOpenError(policy="login", retry_after=None)

    meshkit.fastapi.install(app, service="shop")
    client = await serve(app)
    answer = await client.get("/")
    assert (503, "rejected", None) == (
        answer.status_code,
        answer.headers["meshkit-retry"],
        answer.headers.get("retry-after"),
    )


async def test_a_degraded_answer_says_so(serve: Serve) -> None:
    """The names of the fallbacks that answered are in a header."""
    client = await serve(an_app())
    assert "last-price, no-stock" == (await client.get("/degraded")).headers["meshkit-degraded"]
    assert "meshkit-degraded" not in (await client.get("/users/1")).headers


@pytest.mark.parametrize(("status", "mark"), [(200, None), (404, None), (500, "exhausted"), (502, "exhausted")])
async def test_used_up_retries_are_told_with_an_error(serve: Serve, status: int, mark: str | None) -> None:
    """Only an error response tells the caller not to try again."""
    client = await serve(an_app())
    assert mark == (await client.get(f"/exhausted?status={status}")).headers.get("meshkit-retry")


@pytest.mark.parametrize(
    ("attempts", "refused_at", "answered"),
    [
        # Nothing was sent: what the caller hears is the refusal itself.
        (3, 1, (503, "rejected", "3")),
        # Something failed, and a further attempt was refused, or would have been by the breaker that it opened.
        (3, 2, (500, "exhausted", None)),
        (3, None, (500, "exhausted", None)),
        # A single attempt has used nothing up.
        (1, None, (500, None, None)),
    ],
    ids=["at first", "later", "opened", "one attempt"],
)
async def test_a_retry_that_a_breaker_ends_tells_the_caller_not_to_try_again(
    serve: Serve, attempts: int, refused_at: int | None, answered: tuple[int, str | None, str | None]
) -> None:
    """Whether the refusal or the real error is what comes out, the caller learns that another attempt is of no use."""
    app = an_app()
    policies = [Retry(attempts=attempts, backoff=Backoff(first=0))]
    breaker = CircuitBreaker("provider", min_calls=1)

    async def ask() -> None:
        if refused_at == current_attempt():
            raise CircuitOpenError(policy="provider", retry_after=2.1)
        raise ConnectionError("provider is down")

    @app.get("/price")
    async def price() -> None:
        await Pipeline("provider", *policies, *([] if refused_at or attempts == 1 else [breaker])).call(ask)

    client = await serve(app)
    answer = await client.get("/price")
    headers = answer.headers
    assert answered == (answer.status_code, headers.get("meshkit-retry"), headers.get("retry-after"))


async def test_an_error_nobody_handles_tells_of_used_up_retries_too(serve: Serve) -> None:
    """The framework's bare 500 has the mark as well, by the app's own handler of last resort if it has one."""
    client = await serve(an_app())
    answer = await client.get("/broken?exhausted=true")
    assert (500, "Internal Server Error", "exhausted") == (
        answer.status_code,
        answer.text,
        answer.headers["meshkit-retry"],
    )
    assert "meshkit-retry" not in (await client.get("/broken")).headers

    app = an_app()

    @app.exception_handler(Exception)
    def last(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"sorry": type(error).__name__}, status_code=500)

    client = await serve(app)
    answer = await client.get("/broken?exhausted=true")
    assert ({"sorry": "ZeroDivisionError"}, "exhausted") == (answer.json(), answer.headers["meshkit-retry"])
