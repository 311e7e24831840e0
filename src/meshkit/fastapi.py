"""meshkit around a FastAPI app: one server span a request, request metrics, health, deadlines, refusals that a caller
understands, and an orderly stop.

    app = FastAPI()
    …
    meshkit.fastapi.install(app, service="course-service", parts=[bus])

One pure ASGI middleware does all of it. It goes around the middlewares that the app has when `install` is called, so
`install` is best called last: what it answers itself (`/metrics`, `/health/…`) then passes no authentication.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import signal
import threading
import urllib.parse
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any, Final, cast

try:
    import starlette.requests
    import starlette.responses
    from fastapi import FastAPI
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    from meshkit.errors import missing_extra

    raise missing_extra("fastapi", "fastapi") from error

from meshkit.core.clock import SYSTEM_CLOCK, Clock, Timer
from meshkit.core.events import ServerRequestEnded, ServerRequestStarted, emit, heard
from meshkit.core.events import error_type as _type_of
from meshkit.core.lifecycle import Lifecycle, Part, Probe
from meshkit.core.scope import Scope as MeshScope
from meshkit.core.scope import scope_open
from meshkit.core.trace import AttributeValue, Span, tracer
from meshkit.errors import ConfigurationError, DeadlineExceededError, RejectedError, TimeoutExceededError
from meshkit.telemetry import recorder, tracing
from meshkit.telemetry.setup import flush

_log = logging.getLogger("meshkit")

# No caller waits longer than this, whatever a header says.
MOST_TIMEOUT: Final = 600.0
# What is kept, of the time that a caller waits, for the way back of the answer: this share, and at most so many seconds.
# Who gives up in the very moment in which the caller does cannot tell it why: the caller would take a dependency that
# hangs two services further down for a fault of this one.
_RESERVE: Final = 1.0
_RESERVE_SHARE: Final = 0.05
_MOST_ATTEMPT: Final = 1000
SENSITIVE_PARAMETERS: Final = frozenset(
    {"token", "access_token", "refresh_token", "api_key", "apikey", "key", "password", "secret", "client_secret"}
    | {"sig", "signature", "awsaccesskeyid", "x-goog-signature", "x-goog-credential"}
)

_METHODS: Final = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})
_PROBES: Final[tuple[Probe, ...]] = ("live", "ready", "started")
_GRPC_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def install(
    app: FastAPI,
    *,
    service: str,
    parts: Iterable[Part] = (),
    drain_delay: float = 0.0,
    grace: float = 20.0,
    timeout: float | None = None,
    metrics: str | None = "/metrics",
    health: str | None = "/health",
    lifecycle: Lifecycle | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Lifecycle:
    """Put meshkit around `app`, once, before it starts. Calling it again adds only parts that are new.

    Args:
        app: the app, which has not started yet.
        service: its name, for metrics and errors: `"course-service"`.
        parts: what runs as long as the app does (a bus, an outbox relay). They start before the app's own lifespan, take
            work after its startup, are drained before its shutdown, and close after it.
        drain_delay: seconds between SIGTERM and the server's own handling of it. Readiness is red and parts take no new
            work from the first moment, requests are still answered: the time that a load balancer needs to notice.
        grace: seconds that parts have for finishing what is in hand.
        timeout: seconds that a request has, for the calls it makes; `None` for no limit of our own. A deadline that
            comes with a request (`meshkit-timeout-ms`, `grpc-timeout`, `x-envoy-expected-rq-timeout-ms`) only
            shortens it. Of that one a twentieth, 1 s at the most, is kept for the way of the answer.
        metrics: path of the metrics, `None` for none.
        health: path under which `live`, `ready` and `started` are, `None` for none.
        lifecycle: one to share with other apps of the process; a new one where left out.
        clock: where the time comes from.

    Returns:
        The lifecycle of the app's parts.

    Raises:
        ConfigurationError: the app has started already, or a value cannot work.
    """
    if not service:
        raise ConfigurationError('service is the name of this service: "course-service", say.')
    if drain_delay < 0 or grace < 0:
        raise ConfigurationError(f"drain_delay and grace are seconds, 0 or above, not {drain_delay} and {grace}.")
    if timeout is not None and not timeout > 0:
        raise ConfigurationError(f"timeout is how many seconds a request has, so above 0, not {timeout}.")
    for path in (metrics, health):
        if path is not None and not path.startswith("/"):
            raise ConfigurationError(f"a path begins with /, and {path!r} does not.")
    for present in app.user_middleware:
        if cast("object", present.cls) is _Edge:
            known = present.kwargs["settings"]
            assert isinstance(known, _Settings)
            known.lifecycle.add(*parts)
            return known.lifecycle
    if app.middleware_stack is not None:
        raise ConfigurationError(
            "install() comes too late: the app has started, and its middlewares are fixed.",
            "Call it where the app is made, not in its lifespan.",
        )
    tracing.install()
    settings = _Settings(
        app,
        service=service,
        drain_delay=drain_delay,
        grace=grace,
        timeout=timeout,
        metrics=metrics,
        health=health,
        lifecycle=Lifecycle(clock=clock) if lifecycle is None else lifecycle,
        clock=clock,
    )
    settings.lifecycle.add(*parts)
    settings.lifecycle.at_last(flush)
    # Where a handler for one of them is there already, or comes later, the app's own one answers.
    for kind in (RejectedError, TimeoutExceededError):
        app.exception_handlers.setdefault(kind, _answer)
    app.user_middleware.insert(0, Middleware(_Edge, settings=settings))
    return settings.lifecycle


class _Settings:
    """What one app's middleware needs to know; the middleware itself is made anew by the framework."""

    def __init__(
        self,
        app: FastAPI,
        *,
        service: str,
        drain_delay: float,
        grace: float,
        timeout: float | None,
        metrics: str | None,
        health: str | None,
        lifecycle: Lifecycle,
        clock: Clock,
    ) -> None:
        self.app = app
        self.service = service
        self.drain_delay = drain_delay
        self.grace = grace
        self.timeout = timeout
        self.lifecycle = lifecycle
        self.clock = clock
        self.recorder = recorder.install()
        self.metrics = metrics
        self.probes: dict[str, Probe] = {} if health is None else {f"{health.rstrip('/')}/{p}": p for p in _PROBES}
        self.instrumented: bool | None = None
        self.told = False


# -- refusals ---------------------------------------------------------------------------------------------------------


def _problem(error: RejectedError | TimeoutExceededError) -> starlette.responses.Response:
    """What a caller gets for an error of a policy: https://www.rfc-editor.org/rfc/rfc9457."""
    headers: dict[str, str] = {}
    if isinstance(error, RejectedError):
        status, title = 503, "Service Unavailable"
        headers["meshkit-retry"] = "rejected"
        if error.retry_after is not None:
            # Whole seconds, and never 0, at which everybody would come back at once.
            headers["retry-after"] = str(max(1, -int(-error.retry_after // 1)))
        detail = "A dependency is not available at the moment."
    else:
        status, title = 504, "Gateway Timeout"
        if isinstance(error, DeadlineExceededError):
            headers["meshkit-retry"] = "exhausted"
        detail = "The request could not be answered in time."
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail, "code": error.code}
    return starlette.responses.Response(
        json.dumps(body), status_code=status, headers=headers, media_type="application/problem+json"
    )


async def _answer(request: starlette.requests.Request, error: Exception) -> starlette.responses.Response:
    """The app's exception handler for errors of policies."""
    assert isinstance(error, (RejectedError, TimeoutExceededError))
    ours = request.scope.get("meshkit")
    return ours.refuse(error) if isinstance(ours, _Request) else _problem(error)


# -- the middleware ---------------------------------------------------------------------------------------------------


class _Edge:
    """The middleware: everything between the server and the app."""

    def __init__(self, app: ASGIApp, settings: _Settings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            path = _path(scope)
            if path == self.settings.metrics or path in self.settings.probes:
                await self._own(scope, send, path)
            else:
                await _Request(self, scope, send).run(receive)
        elif kind == "lifespan":
            await _Lifespan(self, receive, send).run(scope)
        else:
            with scope_open(MeshScope()):
                await self.app(scope, receive, send)

    # -- what we answer ourselves -------------------------------------------------------------------------------------

    async def _own(self, scope: Scope, send: Send, path: str) -> None:
        headers = [(b"cache-control", b"no-store")]
        body = b""
        if scope["method"] not in ("GET", "HEAD"):
            status, content_type = 405, "text/plain"
            headers.append((b"allow", b"GET, HEAD"))
        elif path == self.settings.metrics:
            status = 200
            content_type, body = self.settings.recorder.render(_header(scope, b"accept"))
        else:
            status, answer = self.settings.lifecycle.health(self.settings.probes[path])
            content_type, body = "application/json", json.dumps(answer).encode()
        headers += [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    def foreign(self, scope: Scope) -> bool:
        """Whether somebody else makes the span of this request: FastAPI itself, or an instrumentation around us."""
        # FastAPI says so in the scope, for each request; the others stand around us for as long as the app runs.
        native = scope.get("fastapi.telemetry")
        if native is not None and getattr(native, "span", None) is not None:
            self._say_once(
                "FastAPI's own telemetry makes the server spans, and meshkit adds to them what it knows. "
                'FastAPI(telemetry={"tracing": False}) leaves them to meshkit, at less cost.'
            )
            return True
        if self.settings.instrumented is None:
            self.settings.instrumented = _instrumented(self.settings.app)
            if self.settings.instrumented:
                self._say_once(
                    "an OpenTelemetry middleware makes the server spans, and meshkit adds to them what it knows. "
                    "Without FastAPIInstrumentor.instrument_app(app) meshkit makes them, at less cost."
                )
        return self.settings.instrumented

    def _say_once(self, text: str) -> None:
        if not self.settings.told:
            self.settings.told = True
            _log.warning("%s: %s", self.settings.service, text)


class _Request:
    """One request, from its arrival to the end of its response."""

    __slots__ = (
        "_answered",
        "_edge",
        "_ended",
        "_foreign",
        "_headers",
        "_mesh",
        "_method",
        "_root",
        "_scope",
        "_send_on",
        "_span",
        "_started",
        "_status",
        "_trailers",
        "error_type",
    )

    def __init__(self, edge: _Edge, scope: Scope, send: Send) -> None:
        settings = edge.settings
        self._edge = edge
        self._scope = scope
        self._send_on = send
        self._started = settings.clock.now()
        self._root: str = scope.get("root_path", "")
        self._method: str = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        self._headers = _wanted(scope)
        self._mesh = MeshScope(deadline=self._deadline(settings))
        self._foreign = edge.foreign(scope)
        self._span: Span = tracer().current() if self._foreign else self._begun()
        self._answered = self._ended = self._trailers = False
        self._status = 0
        self.error_type = ""
        scope["meshkit"] = self

    def _deadline(self, settings: _Settings) -> float | None:
        inbound = _inbound_timeout(self._headers)
        if inbound is not None:
            inbound -= min(_RESERVE, _RESERVE_SHARE * inbound)
        limits = [limit for limit in (inbound, settings.timeout) if limit is not None]
        return self._started + min(limits) if limits else None

    def _begun(self) -> Span:
        scope, headers = self._scope, self._headers
        span = tracer().start(
            self._method if self._method != "_OTHER" else "HTTP",
            kind="server",
            parent=tracer().extract(headers, carrier="http"),
            attributes={
                "http.request.method": self._method,
                "url.path": scope["path"],
                "url.scheme": scope.get("scheme", "http"),
            },
        )
        if span.recording:
            span.set(self._attributes())
        return span

    def _attributes(self) -> dict[str, AttributeValue]:
        scope, headers = self._scope, self._headers
        attributes: dict[str, AttributeValue] = {"network.protocol.version": scope.get("http_version", "1.1")}
        if self._method == "_OTHER":
            attributes["http.request.method_original"] = scope["method"]
        if query := scope.get("query_string"):
            attributes["url.query"] = _redacted(query.decode("latin-1"))
        if agent := headers.get("user-agent"):
            attributes["user_agent.original"] = agent
        if client := scope.get("client"):
            attributes["client.address"] = client[0]
        attributes.update(_server(scope, headers.get("host")))
        attributes.update(self._inbound())
        return attributes

    def _inbound(self) -> dict[str, AttributeValue]:
        """What came with the request of meshkit's own."""
        attempt = self._headers.get("meshkit-attempt", "")
        if attempt.isascii() and attempt.isdigit():
            digits = attempt.lstrip("0")
            return {
                "meshkit.attempt": _MOST_ATTEMPT if len(digits) > 6 else min(max(1, int(digits or "0")), _MOST_ATTEMPT)
            }
        return {}

    async def run(self, receive: Receive) -> None:
        settings, mesh = self._edge.settings, self._mesh
        emit(ServerRequestStarted(source=settings.service, method=self._method))
        try:
            with scope_open(mesh):
                if self._foreign:
                    self._span.set(self._inbound())
                    await self._run(receive)
                else:
                    with self._span.active():
                        await self._run(receive)
        except asyncio.CancelledError:
            # Nobody waits for the answer any more: not a fault.
            self.end("")
            raise
        except BaseException as error:
            # The server's or the framework's own answer follows, outside of this middleware.
            if not self._answered:
                self._status = 500
            self.end(_type_of(error))
            raise
        self.end(self.error_type)

    async def _run(self, receive: Receive) -> None:
        settings, mesh = self._edge.settings, self._mesh
        if mesh.deadline is not None and mesh.deadline <= self._started:
            late = DeadlineExceededError("the deadline of the caller had passed when its request came in.")
            await self.refuse(late)(self._scope, receive, self._send)
            return
        try:
            await self._edge.app(self._scope, receive, self._send)
        except (RejectedError, TimeoutExceededError) as error:
            # Out of a middleware, where no exception handler of the app's looks.
            if self._answered:
                raise
            await self.refuse(error)(self._scope, receive, self._send)
        except Exception as error:
            if mesh.exhausted and not self._answered and not settings.app.debug:
                # The framework answers outside of us, where we cannot tell the caller that retries are used up.
                response = await _server_error(settings.app, starlette.requests.Request(self._scope), error)
                await response(self._scope, receive, self._send)
            raise

    def refuse(self, error: RejectedError | TimeoutExceededError) -> starlette.responses.Response:
        """The answer to a request that ended in an error of a policy."""
        self.error_type = _type_of(error)
        _log.warning("%s %s is refused: %s", self._method, self._scope["path"], error)
        return _problem(error)

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        last = False
        if kind == "http.response.start":
            self._answered = True
            self._status = message["status"]
            self._trailers = message.get("trailers", False)
            marks = self._marks(message)
            if marks:
                message = {**message, "headers": [*message.get("headers", ()), *marks]}
        elif kind == "http.response.body":
            last = not message.get("more_body", False) and not self._trailers
        elif kind == "http.response.trailers":
            last = not message.get("more_trailers", False)
        elif kind == "http.response.pathsend":
            last = True
        await self._send_on(message)
        if last:
            # Background tasks may follow, but the response is over.
            self.end(self.error_type)

    def _marks(self, message: Message) -> list[tuple[bytes, bytes]]:
        """The headers by which the caller learns of what happened below."""
        marks = []
        if degraded := self._mesh.degraded:
            text = ", ".join(degraded)
            marks.append((b"meshkit-degraded", text.encode("ascii", "replace")))
            self._span.set({"meshkit.degraded": text})
        if (
            self._mesh.exhausted
            and message["status"] >= 500
            and not any(name.lower() == b"meshkit-retry" for name, _ in message.get("headers", ()))
        ):
            marks.append((b"meshkit-retry", b"exhausted"))
        return marks

    def end(self, error_type: str) -> None:
        if self._ended:
            return
        self._ended = True
        settings, span, status = self._edge.settings, self._span, self._status
        route = _route(self._scope, self._root)
        if not self._foreign and span.recording:
            if route:
                span.rename(f"{self._method if self._method != '_OTHER' else 'HTTP'} {route}")
                span.set({"http.route": route})
            if status:
                span.set({"http.response.status_code": status})
            if status >= 500 or (error_type and self._answered and status < 400):
                span.fail(error_type or str(status))
        if heard(ServerRequestEnded):
            context = span.context
            emit(
                ServerRequestEnded(
                    source=settings.service,
                    method=self._method,
                    route=route,
                    status=status,
                    seconds=settings.clock.now() - self._started,
                    traceparent="" if context is None else context.traceparent,
                )
            )
        if not self._foreign:
            span.end()


async def _server_error(
    app: FastAPI, request: starlette.requests.Request, error: Exception
) -> starlette.responses.Response:
    """The answer that the framework would give to an error that nobody handles: the app's own, if it has one."""
    handler: Any = app.exception_handlers.get(500) or app.exception_handlers.get(Exception)
    if handler is None:
        return starlette.responses.PlainTextResponse("Internal Server Error", status_code=500)
    if inspect.iscoroutinefunction(handler):
        return cast("starlette.responses.Response", await handler(request, error))
    return cast("starlette.responses.Response", await run_in_threadpool(handler, request, error))


# -- start and stop ---------------------------------------------------------------------------------------------------


class _Lifespan:
    """The app's lifespan, with the parts around it.

    Parts are up before the app's own startup, so that it can publish; they take work after it, so that a handler finds
    what it has made. At the end the other way round: they are drained while what handlers use is still there, and
    close when the app can no longer need them.
    """

    def __init__(self, edge: _Edge, receive: Receive, send: Send) -> None:
        self._edge = edge
        self._receive_on = receive
        self._send_on = send
        self._signals: _Sigterm | None = None

    async def run(self, scope: Scope) -> None:
        lifecycle = self._edge.settings.lifecycle
        try:
            await self._edge.app(scope, self._receive, self._send)
        finally:
            if self._signals is not None:
                self._signals.restore()
            await lifecycle.close()

    async def _receive(self) -> Message:
        settings = self._edge.settings
        message = await self._receive_on()
        if message["type"] == "lifespan.startup":
            try:
                await settings.lifecycle.open()
            except Exception as error:
                # The framework waits for this message outside of its own error handling, and a server that hears
                # nothing takes the app for one without a lifespan and serves it.
                await self._send_on({"type": "lifespan.startup.failed", "message": f"{_type_of(error)}: {error}"})
                raise
        elif message["type"] == "lifespan.shutdown":
            await settings.lifecycle.drain(settings.grace)
        return message

    async def _send(self, message: Message) -> None:
        settings = self._edge.settings
        if message["type"] == "lifespan.startup.complete":
            await settings.lifecycle.begin()
            self._signals = _Sigterm(settings)
            self._signals.take()
        elif message["type"] != "lifespan.startup.failed":
            await settings.lifecycle.close()
        await self._send_on(message)


class _Sigterm:
    """SIGTERM, heard before the server hears it: parts stop taking work at once, the server stops `drain_delay` later.

    A second signal goes to the server at once.
    """

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._previous: Any = None
        self._taken = False
        self._timer: Timer | None = None
        self._drain: asyncio.Task[None] | None = None

    def take(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            # Python has signals in the main thread only: the server has another way of being told to stop.
            return
        previous = signal.getsignal(signal.SIGTERM)
        if getattr(previous, "__name__", "") == "_sighandler_noop":
            # The server has asked its event loop for the signal, which cannot be handed on.
            if self._settings.drain_delay:
                _log.warning("drain_delay has no effect: this server hears SIGTERM in a way that leaves no room")
            return
        self._previous = previous
        self._taken = True
        signal.signal(signal.SIGTERM, self._heard)

    def restore(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._taken and signal.getsignal(signal.SIGTERM) == self._heard:
            signal.signal(signal.SIGTERM, self._previous)
        self._taken = False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        # In a signal handler, anywhere in the program: the loop does the rest.
        self._loop.call_soon_threadsafe(self._begin, number, frame)

    def _begin(self, number: int, frame: FrameType | None) -> None:
        settings = self._settings
        if self._drain is not None:
            self._hand_over(number, frame)
            return
        _log.info("%s: SIGTERM; taking no new work", settings.service)
        self._drain = self._loop.create_task(settings.lifecycle.drain(settings.grace), name="meshkit drain on SIGTERM")
        clock = settings.clock
        self._timer = clock.call_at(clock.now() + settings.drain_delay, lambda: self._hand_over(number, frame))

    def _hand_over(self, number: int, frame: FrameType | None) -> None:
        if not self._taken:
            return
        self.restore()
        if callable(self._previous):
            self._previous(number, frame)
        else:
            signal.raise_signal(number)


# -- reading a request ------------------------------------------------------------------------------------------------

_WANTED: Final = {
    name.encode(): name
    for name in (
        "traceparent",
        "tracestate",
        "baggage",
        "host",
        "user-agent",
        "meshkit-attempt",
        "meshkit-timeout-ms",
        "grpc-timeout",
        "x-envoy-expected-rq-timeout-ms",
    )
}


def _wanted(scope: Scope) -> dict[str, str]:
    """The headers that we read, by lower-case name; several of one name joined, as RFC 9110 has it."""
    found: dict[str, str] = {}
    for raw, value in scope["headers"]:
        name = _WANTED.get(raw)
        if name is not None:
            text = value.decode("latin-1")
            found[name] = f"{found[name]},{text}" if name in found else text
    return found


def _header(scope: Scope, wanted: bytes) -> str:
    return ",".join(value.decode("latin-1") for name, value in scope["headers"] if name == wanted)


def _inbound_timeout(headers: Mapping[str, str]) -> float | None:
    """Seconds that the caller will wait, by the shortest of the headers that say so; capped, malformed ones ignored."""
    limits = []
    for name in ("meshkit-timeout-ms", "x-envoy-expected-rq-timeout-ms"):
        text = headers.get(name, "")
        if text.isascii() and text.isdigit():
            # Digits without end are a length as well, and longer than any that is kept to.
            digits = text.lstrip("0")
            limits.append(MOST_TIMEOUT if len(digits) > 12 else int(digits or "0") / 1000)
    # https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md: at most 8 digits and a unit.
    text = headers.get("grpc-timeout", "")
    if 2 <= len(text) <= 9 and text.isascii() and text[:-1].isdigit() and text[-1] in _GRPC_UNITS:
        limits.append(int(text[:-1]) * _GRPC_UNITS[text[-1]])
    return min(*limits, MOST_TIMEOUT) if limits else None


def _path(scope: Scope) -> str:
    """The path as the app's own routes see it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _route(scope: Scope, root: str) -> str:
    """The template of the route that answered, with the prefixes it is included or mounted under; empty without one."""
    route = scope.get("route")
    # FastAPI keeps the route as it was declared in `route`, and the one with the prefixes of its routers here.
    effective = (scope.get("fastapi") or {}).get("effective_route_context") or route
    template = getattr(effective, "path_format", None) or getattr(route, "path_format", None)
    mount: str = scope.get("root_path", "")[len(root) :]
    if mount:
        # What a mount has matched is in the scope as plain text: its own parameters are put back.
        known = {str(value): name for name, value in scope.get("path_params", {}).items()}
        mount = "/".join(f"{{{known[part]}}}" if part in known else part for part in mount.split("/"))
        return mount + (template if isinstance(template, str) else "/{path}")
    return template if isinstance(template, str) else ""


def _server(scope: Scope, host: str | None) -> dict[str, AttributeValue]:
    """`server.address` and `server.port`, from the Host header, otherwise from the socket."""
    address: Any
    port: Any
    address, port = scope.get("server") or (None, None)
    if host:
        try:
            parts = urllib.parse.urlsplit(f"//{host}")
            address, port = parts.hostname, parts.port or (443 if scope.get("scheme") == "https" else 80)
        except ValueError:
            return {}
    if not isinstance(address, str):
        return {}
    return {"server.address": address} if port is None else {"server.address": address, "server.port": port}


def _instrumented(app: FastAPI) -> bool:
    """Whether OpenTelemetry's middleware or Starlette's stands in the app's stack: each makes a span for a request."""
    layer: Any = app.middleware_stack
    while layer is not None:
        kind = type(layer)
        if kind.__name__ == "OpenTelemetryMiddleware":
            return True
        layer = getattr(layer, "app", None)
    return False


def _redacted(query: str) -> str:
    pairs = []
    for pair in query.split("&"):
        name, equals, _ = pair.partition("=")
        plain = urllib.parse.unquote_plus(name).lower()
        secret = plain in SENSITIVE_PARAMETERS or plain.startswith("x-amz-")
        pairs.append(f"{name}=REDACTED" if equals and secret else pair)
    return "&".join(pairs)
