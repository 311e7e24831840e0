"""The server: a port on the loopback interface, and the ways to run it in a task, a fixture or a thread."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable
from urllib.parse import quote

from pamqp import commands

from meshkit.embedded.broker import Broker
from meshkit.embedded.connection import Connection, Hub
from meshkit.embedded.faults import Faults
from meshkit.embedded.queues import Entry, Queue

T = TypeVar("T")


class _Timer(Protocol):
    def cancel(self) -> None: ...


class ServerClock(Protocol):
    """What drives TTLs and expiries: any meshkit clock is one."""

    def now(self) -> float: ...

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], object]) -> _Timer: ...


@runtime_checkable
class _MovableClock(ServerClock, Protocol):
    """A clock that stands still until a test moves it."""

    def advance(self, seconds: float) -> Awaitable[None]: ...


class _LoopClock:
    """Real time."""

    now = staticmethod(time.monotonic)
    time = staticmethod(time.time)

    def call_at(self, when: float, callback: Callable[[], object]) -> _Timer:
        return asyncio.get_running_loop().call_later(max(0.0, when - time.monotonic()), callback)


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageView:
    """A message that waits in a queue, for a test to look at. Looking changes nothing."""

    body: bytes
    properties: commands.Basic.Properties
    exchange: str
    routing_key: str
    redelivered: bool
    delivery_count: int

    @property
    def headers(self) -> dict[str, Any]:
        """The header table; empty where the message has none."""
        return dict(self.properties.headers or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """A queue as it is at this moment. `messages` are the ready ones in the order in which they would leave;
    `held` counts dead letters that wait for a queue to go to."""

    name: str
    arguments: dict[str, Any]
    messages: list[MessageView]
    unacked: int
    consumers: int
    held: int


def _view_message(entry: Entry) -> MessageView:
    return MessageView(
        body=entry.message.body,
        properties=entry.message.properties.decoded(),
        exchange=entry.message.exchange,
        routing_key=entry.message.routing_key,
        redelivered=entry.redelivered,
        delivery_count=entry.returns,
    )


def _view(queue: Queue) -> QueueView:
    return QueueView(
        name=queue.name,
        arguments=dict(queue.arguments),
        messages=[_view_message(entry) for entry in queue],
        unacked=queue.unacked,
        consumers=len(queue.consumers),
        held=len(queue.held),
    )


def _loopback(host: str) -> str:
    """The address to bind; `ValueError` where others than this machine could reach it."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return host
    if host == "localhost":
        return "127.0.0.1"
    raise ValueError(
        f"the embedded broker binds loopback addresses only, not {host!r}: it is for development and tests, has one "
        "user, no TLS, and keeps nothing after it ends; use host='127.0.0.1', or a real RabbitMQ for other machines"
    )


class AmqpServer:
    """An AMQP 0-9-1 server in this process, for development, demos and tests.

    Use it with `async with`, or `start()` and `stop()`. What it holds is gone when it stops.

    Args:
        host: a loopback address; `ValueError` for any other.
        port: 0 lets the system choose; `port` and `url` tell.
        user, password: the one login it takes.
        clock: what drives TTLs, rungs, expiries and the consumer timeout (never heartbeats); real time where none is
            given.
        consumer_timeout: seconds a delivery may stay unacked before its channel is closed with 406, as in RabbitMQ;
            None for no limit.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        user: str = "guest",
        password: str = "guest",
        clock: ServerClock | None = None,
        consumer_timeout: float | None = 1800.0,
    ) -> None:
        self._host = _loopback(host)
        self._asked_port = port
        self._user = user
        self._password = password
        self._clock: ServerClock = clock if clock is not None else _LoopClock()
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: _Timer | None = None
        self._port = 0
        self._hub = Hub(
            broker=Broker(clock=self._clock, on_timer=self._arm),
            faults=Faults(lambda: list(self._hub.connections), self._in_loop),
            user=user,
            password=password,
            consumer_timeout=consumer_timeout,
            connection_gone=self._on_connection_gone,
        )
        self._all_gone = asyncio.Event()

    # -- life --

    async def start(self) -> None:
        """Listen. `OSError` where the port is taken."""
        if self._server is not None:
            raise RuntimeError("the server has been started; one AmqpServer runs once at a time")
        self._loop = asyncio.get_running_loop()
        self._hub.broker = Broker(clock=self._clock, on_timer=self._arm)
        self._server = await self._loop.create_server(
            lambda: Connection(self._hub), self._host, self._asked_port, backlog=1024
        )
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Tell all clients, close, forget everything. Stopping twice does nothing."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        self._all_gone.clear()
        for connection in list(self._hub.connections):
            connection.shut_down()
        if self._hub.connections:
            await self._all_gone.wait()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def __aenter__(self) -> AmqpServer:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def _on_connection_gone(self) -> None:
        if not self._hub.connections:
            self._all_gone.set()

    @property
    def port(self) -> int:
        """The port it listens on; `RuntimeError` before `start()`."""
        if not self._port:
            raise RuntimeError("the server has no port before it is started")
        return self._port

    @property
    def url(self) -> str:
        """What a client connects to, login included."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"amqp://{quote(self._user, safe='')}:{quote(self._password, safe='')}@{host}:{self.port}/"

    # -- for tests: each may be called from any thread --

    @property
    def faults(self) -> Faults:
        """What can be made to go wrong."""
        return self._hub.faults

    def queue(self, name: str) -> QueueView:
        """A look at a queue; `KeyError` where there is none."""
        return self._in_loop(lambda: _view(self._hub.broker.queues[name]))

    def queues(self) -> list[str]:
        """The names of all queues, in order of their making."""
        return self._in_loop(lambda: list(self._hub.broker.queues))

    def connections(self) -> int:
        """How many clients are connected."""
        return self._in_loop(lambda: len(self._hub.connections))

    async def advance(self, seconds: float) -> None:
        """Move the injected clock on, in steps: each TTL, rung and expiry happens at its time, in order.

        `RuntimeError` where the clock is one that nobody can move.
        """
        clock = self._clock
        if not isinstance(clock, _MovableClock):
            raise RuntimeError(
                "advance() moves an injected clock: give the server one, such as ManualClock of meshkit.testing"
            )
        loop = self._loop
        if loop is None or loop is asyncio.get_running_loop():
            await clock.advance(seconds)
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_advance(clock, seconds), loop))

    # -- timers --

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._hub.broker.next_due()
        if due is not None:
            self._timer = self._clock.call_at(due, self._tick)

    def _tick(self) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed() and _running_loop() is not loop:
            # A clock that another thread moves.
            loop.call_soon_threadsafe(self._tick)
            return
        self._timer = None
        self._hub.broker.run_due()
        self._arm()

    def _in_loop(self, act: Callable[[], T]) -> T:
        """Run `act` where the server runs, and wait for it."""
        loop = self._loop
        if loop is None or loop.is_closed() or _running_loop() is loop:
            return act()

        async def run() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(run(), loop).result()


async def _advance(clock: _MovableClock, seconds: float) -> None:
    await clock.advance(seconds)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


@dataclass(frozen=True, slots=True)
class ThreadedServer:
    """A server that runs in a thread of its own, for code that blocks. Made by `run_in_thread`."""

    server: AmqpServer
    _loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def faults(self) -> Faults:
        return self.server.faults

    def queue(self, name: str) -> QueueView:
        """A look at a queue; `KeyError` where there is none."""
        return self.server.queue(name)

    def queues(self) -> list[str]:
        """The names of all queues."""
        return self.server.queues()

    def advance(self, seconds: float) -> None:
        """Move the server's injected clock, and return when all that fell due has happened."""
        asyncio.run_coroutine_threadsafe(self.server.advance(seconds), self._loop).result()


@contextlib.contextmanager
def run_in_thread(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    user: str = "guest",
    password: str = "guest",
    clock: ServerClock | None = None,
    consumer_timeout: float | None = 1800.0,
) -> Iterator[ThreadedServer]:
    """A server in a thread with an event loop of its own; the arguments are those of `AmqpServer`.

    For fixtures, whose event loop comes and goes with each test, and for clients that block.
    """
    server = AmqpServer(
        host=host, port=port, user=user, password=password, clock=clock, consumer_timeout=consumer_timeout
    )
    started: list[BaseException | asyncio.AbstractEventLoop] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def live() -> None:
        try:
            await server.start()
        except BaseException as error:
            started.append(error)
            return
        finally:
            if not started:
                started.append(asyncio.get_running_loop())
            ready.set()
        await stop.wait()
        await server.stop()

    thread = threading.Thread(target=asyncio.run, args=(live(),), name="meshkit-embedded-amqp", daemon=True)
    thread.start()
    ready.wait()
    outcome = started[0]
    if isinstance(outcome, BaseException):
        thread.join()
        raise outcome
    try:
        yield ThreadedServer(server, outcome)
    finally:
        outcome.call_soon_threadsafe(stop.set)
        thread.join()


async def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 5672,
    user: str = "guest",
    password: str = "guest",
    ready: Callable[[AmqpServer], object] = lambda server: None,
) -> None:
    """Run a server until cancelled. `ready` is called once it listens, to print where.

    `ValueError` for a host that is not loopback, `OSError` where the port is taken.
    """
    async with AmqpServer(host=host, port=port, user=user, password=password) as server:
        ready(server)
        await asyncio.Event().wait()
