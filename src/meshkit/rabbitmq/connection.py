"""A broker connection that is made again whenever it is lost.

This stands on aiormq, which aio-pika stands on too, and not on aio-pika's robust connection: that one restores channels
and consumers in place, so that a delivery cannot be told from one of the connection before; it forgets return callbacks,
and a consumer it could not restore is silent. Here each connection, and each channel on it, is an object of its own:
what came over one is settled over that one or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import ssl
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Final, Literal, TypeVar

import aiormq
import aiormq.exceptions
from aiormq.abc import AbstractChannel, AbstractConnection
from yarl import URL

from meshkit._version import __version__
from meshkit.core.clock import Clock
from meshkit.core.events import BrokerBlocked, BrokerConnectionChanged, emit
from meshkit.errors import ConfigurationError
from meshkit.rabbitmq.decoding import tolerate

T = TypeVar("T")

_log = logging.getLogger("meshkit.rabbitmq")

CONNECT_TIMEOUT: Final = 10.0
RPC_TIMEOUT: Final = 10.0
HEARTBEAT: Final = 20
_FIRST_WAIT: Final = 0.1
_LONGEST_WAIT: Final = 5.0
_LOOK_FOR_BLOCKED: Final = 1.0

# What aiormq raises where a connection or a channel is gone: not all of it is an AMQPError.
LOST: Final = (aiormq.exceptions.AMQPError, aiormq.exceptions.ChannelInvalidStateError, OSError, TimeoutError)


class within:
    """Raise `TimeoutError` where the block takes longer. Somebody else's cancellation stays one; but aiormq ends what
    waits on a channel that it closes as if it had been cancelled, and that is an `AMQPConnectionError` here."""

    __slots__ = ("_cancelling", "_clock", "_fired", "_seconds", "_task", "_timer")

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._fired = False

    def _fire(self) -> None:
        self._fired = True
        self._task.cancel()

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._timer = self._clock.call_at(self._clock.now() + self._seconds, self._fire)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._fired:
            # Taken back in any case: the block may have ended by itself in the very turn in which its time was over.
            left = self._task.uncancel()
            if kind is not None and issubclass(kind, asyncio.CancelledError) and left <= self._cancelling:
                raise TimeoutError(f"no answer within {self._seconds:g} s") from None
        elif (
            kind is not None
            and issubclass(kind, asyncio.CancelledError)
            and self._task.cancelling() <= self._cancelling
        ):
            raise aiormq.exceptions.AMQPConnectionError("the channel or the connection was closed") from None


async def finished(doing: Awaitable[T]) -> T:
    """Wait for something that must not be broken off: it goes on to its end where the caller is cancelled."""
    return await asyncio.shield(asyncio.ensure_future(doing))


def checked_url(url: str) -> URL:
    """The address of a broker.

    Raises:
        ConfigurationError: it is none.
    """
    parsed = URL()
    try:
        parsed = URL(url)
        usable = parsed.scheme in ("amqp", "amqps") and bool(parsed.host)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigurationError(
            "the address of the broker is not one of AMQP.",
            "It looks like amqp://user:password@host:5672/vhost, or amqps:// for TLS.",
        )
    return parsed if "heartbeat" in parsed.query else parsed.update_query(heartbeat=str(HEARTBEAT))


class Link:
    """One connection to the broker, for as long as it is open: lost ones are replaced, with growing waits in between.

    Args:
        url: where to.
        role: what it is for; the name by which metrics know it.
        service: whose it is, as the broker's own tools show it.
    """

    def __init__(
        self,
        url: URL,
        *,
        role: Literal["publish", "consume"],
        service: str,
        ssl_context: ssl.SSLContext | None = None,
        clock: Clock,
    ) -> None:
        tolerate()
        self.url = url
        self.role = role
        self.blocked = False
        self.trouble = "not started"
        self._clock = clock
        self._ssl_context = ssl_context
        self._properties = {
            "connection_name": f"{service} {role}",
            "product": "meshkit",
            "version": __version__,
        }
        self._connection: AbstractConnection | None = None
        self._tried = asyncio.Event()
        self._up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether this runs in another event loop than the caller."""
        return self._loop is not None and self._loop is not asyncio.get_running_loop()

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.is_closed

    def start(self) -> None:
        """Begin to connect. aiormq's tasks inherit the context they are made in, so it is an empty one: what is current
        here must not become current in every delivery."""
        if self._task is None:
            self._loop = asyncio.get_running_loop()
            self._task = asyncio.create_task(
                self._run(), name=f"meshkit {self.role} connection", context=contextvars.Context()
            )

    async def tried(self) -> bool:
        """Whether the first attempt to connect has succeeded; waits for its end."""
        await self._tried.wait()
        return self.connected

    async def up(self) -> AbstractConnection:
        """The connection, once there is one.

        Raises:
            AMQPConnectionError: there will be none, because this has been closed.
        """
        while True:
            if self._closed:
                raise aiormq.exceptions.AMQPConnectionError("closed")
            connection = self._connection
            if connection is not None and not connection.is_closed:
                return connection
            self._up.clear()
            await self._up.wait()

    async def channel(self, *, confirms: bool = False) -> AbstractChannel:
        """A new channel on the connection that is up now, or comes up.

        Raises:
            one of LOST: the connection went in between, or did not answer.
        """
        connection = await self.up()
        try:
            async with within(self._clock, RPC_TIMEOUT):
                return await connection.channel(publisher_confirms=confirms, on_return_raises=True)
        except (RuntimeError, asyncio.InvalidStateError) as error:
            # "closed" is a plain RuntimeError here.
            raise aiormq.exceptions.AMQPConnectionError(str(error)) from error

    async def close(self) -> None:
        """Close the connection for good."""
        self._closed = True
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.trouble = "closed"
        self._up.set()

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        wait = _FIRST_WAIT
        known = ""
        times = 0
        while True:
            try:
                async with within(self._clock, CONNECT_TIMEOUT):
                    connection = await self._connect()
            except (*LOST, RuntimeError, ValueError) as error:
                self.trouble = _said(error)
                self._tried.set()
                if self.trouble != known:
                    # Once for each new cause, not once a try: an outage of an hour is one line.
                    known = self.trouble
                    _log.warning(
                        "broker at %s:%s cannot be reached (%s connection): %s; trying on",
                        *(self.url.host, self.url.port, self.role, self.trouble),
                    )
                await self._clock.sleep(wait * (0.5 + self._clock.random() / 2))
                wait = min(_LONGEST_WAIT, wait * 2)
                continue
            wait, known = _FIRST_WAIT, ""
            try:
                await self._live(connection, reconnect=times > 0)
            finally:
                times += 1
                self._connection = None
                await self._end(connection)

    async def _connect(self) -> AbstractConnection:
        return await aiormq.connect(self.url, context=self._ssl_context, client_properties=dict(self._properties))

    async def _live(self, connection: AbstractConnection, *, reconnect: bool) -> None:
        closing = connection.closing
        self._connection = connection
        self.trouble = ""
        self._tried.set()
        self._up.set()
        emit(BrokerConnectionChanged(source=self.role, connected=True, reconnect=reconnect))
        watch = asyncio.create_task(self._watch(connection), name=f"meshkit {self.role} blocked?")
        try:
            await asyncio.wait([closing])
            reason = None if closing.cancelled() else closing.exception()
            self.trouble = _said(reason) if reason is not None else "closed by the broker"
            _log.warning("connection to the broker lost (%s): %s; connecting again", self.role, self.trouble)
        finally:
            closing.cancel()
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            if self.blocked:
                self.blocked = False
                emit(BrokerBlocked(source=self.role, blocked=False))
            emit(BrokerConnectionChanged(source=self.role, connected=False))

    async def _watch(self, connection: AbstractConnection) -> None:
        """Notice that the broker blocks this connection: aiormq knows, and tells only who asks."""
        while True:
            ready = asyncio.ensure_future(connection.ready())
            try:
                await asyncio.sleep(0)
                if not ready.done():
                    self.blocked = True
                    emit(BrokerBlocked(source=self.role, blocked=True))
                    await ready
                    self.blocked = False
                    emit(BrokerBlocked(source=self.role, blocked=False))
            finally:
                ready.cancel()
            await self._clock.sleep(_LOOK_FOR_BLOCKED)

    async def _end(self, connection: AbstractConnection) -> None:
        if not connection.is_closed:
            with contextlib.suppress(Exception):
                async with within(self._clock, CONNECT_TIMEOUT):
                    await connection.close()


def _said(error: BaseException) -> str:
    if isinstance(error, aiormq.exceptions.ProbableAuthenticationError | aiormq.exceptions.AuthenticationError):
        return "the broker refused the login"
    return str(error) or type(error).__name__


def server_attributes(url: URL) -> dict[str, Any]:
    """Where the broker is, as spans say it."""
    return {"server.address": url.host or "", "server.port": url.port or (5671 if url.scheme == "amqps" else 5672)}
