"""A process that has parts and no web app: consumers with an outbox relay, say.

    bus = RabbitBus(…)
    …
    if __name__ == "__main__":
        meshkit.worker.run(bus, service="notification-worker", port=9100)

It answers `/metrics` and `/health/live|ready|started` over HTTP with nothing but the standard library, and stops in
order on SIGTERM and SIGINT: what is in hand is finished, the rest given back, connections closed, telemetry flushed. The
exit code is then 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Final

from meshkit.core.clock import SYSTEM_CLOCK, Clock
from meshkit.core.lifecycle import Lifecycle, Part, Probe
from meshkit.errors import ConfigurationError, MeshkitError
from meshkit.telemetry import recorder, tracing
from meshkit.telemetry.setup import flush

_log = logging.getLogger("meshkit")

_PROBES: Final[dict[str, Probe]] = {"/health/live": "live", "/health/ready": "ready", "/health/started": "started"}
_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    500: "Internal Server Error",
    503: "Service Unavailable",
}

# A scraper's request is a few hundred bytes and comes at once; who is slower or longer is none.
_LONGEST_REQUEST: Final = 16 * 1024
_PATIENCE: Final = 5.0
_MOST_CONNECTIONS: Final = 64


def run(
    *parts: Part,
    service: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    grace: float = 20.0,
) -> None:
    """Run `parts` until SIGTERM or SIGINT, then stop them in order and return: the blocking entry of a program.

    Args:
        parts: what is to run: a bus, an outbox relay. Started in order, stopped in reverse.
        service: name of this service.
        host: address that answers `/metrics` and `/health/…`. In a container that others scrape: `"0.0.0.0"`.
        port: its port, 0 for a free one (the log says which), `None` for none.
        grace: seconds that parts have for finishing what is in hand.

    Raises:
        SystemExit: 2 where a part cannot start or the port is taken, with one line that says so; 130 or 143 after a
            second SIGINT or SIGTERM.
    """
    try:
        asyncio.run(serve(*parts, service=service, host=host, port=port, grace=grace, signals=True))
    except MeshkitError as error:
        print(f"{service}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


async def serve(
    *parts: Part,
    service: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    grace: float = 20.0,
    signals: bool = False,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[str, int], object] | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> None:
    """Run `parts` until `stop` is set, a signal comes, or the task is cancelled; then stop them in order.

    Args:
        parts, service, host, port, grace: as `run` takes them.
        signals: whether SIGTERM and SIGINT are heard. Only in the main thread.
        stop: what ends it.
        on_ready: told the host and port that are listened on once all parts run (port 0 where there is none).
        clock: where the time comes from.
    """
    if not service:
        raise ConfigurationError('service is the name of this service: "notification-worker", say.')
    if grace < 0:
        raise ConfigurationError(f"grace is how many seconds parts have to finish, 0 or above, not {grace}.")
    if port is not None and not 0 <= port <= 65535:
        raise ConfigurationError(f"port is 0 to 65535, not {port}.")
    tracing.install()
    lifecycle = Lifecycle(clock=clock)
    lifecycle.add(*parts)
    lifecycle.at_last(flush)
    page = _Page(lifecycle, recorder.install(), clock)
    stop = asyncio.Event() if stop is None else stop
    with _Signals(stop) if signals else contextlib.nullcontext():
        try:
            # First the page, then the parts: while a broker is away, readiness is to say so.
            at = await page.open(host, port)
            if await _started(lifecycle, stop):
                _log.info("%s runs%s", service, f", http://{host}:{at}/health/ready says how it is" if at else "")
                if on_ready is not None:
                    on_ready(host, at)
                await stop.wait()
            _log.info("%s stops", service)
        finally:
            try:
                await lifecycle.stop(grace)
            finally:
                await page.close()
    _log.info("%s has stopped", service)


async def _started(lifecycle: Lifecycle, stop: asyncio.Event) -> bool:
    """Start the parts; `False` where it was to stop before they had started."""
    starting = asyncio.create_task(lifecycle.start(), name="meshkit start")
    stopping = asyncio.create_task(stop.wait(), name="meshkit stop")
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            return True
        return False
    finally:
        starting.cancel()
        stopping.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)


class _Signals:
    """SIGTERM and SIGINT while the block runs: the first one stops in order, the second one at once."""

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._heard = False

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigurationError("signals can be heard in the main thread only.", "Set stop= instead.")
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on, number)

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)

    def _on(self, number: int) -> None:
        if self._heard:
            # What is in hand is given back by the broker, since nothing was acknowledged before it was done.
            _log.warning("a second signal: ending at once")
            for handler in logging.getLogger().handlers:
                handler.flush()
            # As the shell expects it of a program that a signal has ended.
            os._exit(128 + number)
        self._heard = True
        self._stop.set()


class _Page:
    """`/metrics` and `/health/…` over HTTP/1.1, one request a connection."""

    def __init__(self, lifecycle: Lifecycle, metrics: recorder.Recorder, clock: Clock) -> None:
        self._lifecycle = lifecycle
        self._recorder = metrics
        self._clock = clock
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def open(self, host: str, port: int | None) -> int:
        """Listen, and return the port; 0 where there is to be none."""
        if port is None:
            return 0
        try:
            self._server = await asyncio.start_server(self._connected, host, port, limit=_LONGEST_REQUEST)
        except OSError as error:
            raise MeshkitError(
                f"{host}:{port} cannot be listened on: {error.strerror or error}.",
                "Give another port=, or 0 for a free one.",
                code="MK102",
            ) from error
        at: int = self._server.sockets[0].getsockname()[1]
        return at

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= _MOST_CONNECTIONS:
            writer.close()
            return
        task = asyncio.get_running_loop().create_task(self._answer(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        # One that sends nothing, or reads nothing, holds its place no longer than this.
        timer = self._clock.call_at(self._clock.now() + _PATIENCE, task.cancel)
        task.add_done_callback(lambda _: timer.cancel())

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.LimitOverrunError:
                head = b""
            writer.write(self._response(head.decode("latin-1")))
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        finally:
            writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def _response(self, head: str) -> bytes:
        lines = head.split("\r\n")
        words = lines[0].split(" ")
        status, content_type, body = 400, "text/plain; charset=utf-8", b"Bad Request\n"
        more = ""
        method = words[0]
        if len(words) == 3 and words[2].startswith("HTTP/1."):
            path = words[1].partition("?")[0]
            if path != "/metrics" and path not in _PROBES:
                status, body = 404, b"There are /metrics and /health/live, ready, started.\n"
            elif method not in ("GET", "HEAD"):
                status, body, more = 405, b"GET or HEAD\n", "allow: GET, HEAD\r\n"
            elif path == "/metrics":
                status = 200
                content_type, body = self._recorder.render(_accept(lines))
            else:
                status, answer = self._lifecycle.health(_PROBES[path])
                content_type, body = "application/json", json.dumps(answer).encode()
        text = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n"
            f"cache-control: no-store\r\nconnection: close\r\n{more}\r\n"
        )
        return text.encode("latin-1") + (b"" if method == "HEAD" else body)


def _accept(lines: list[str]) -> str:
    found = [value for name, _, value in (line.partition(":") for line in lines[1:]) if name.lower() == "accept"]
    return ",".join(value.strip() for value in found)
