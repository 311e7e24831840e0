"""Publishing, with a confirm for each message: it is stored and in a queue, or the caller hears that it may not be."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import struct
from typing import Any, Final, Literal

import aiormq.exceptions
from aiormq.abc import AbstractChannel
from pamqp import commands, encode

from meshkit.core.clock import Clock
from meshkit.core.events import MessagePublished, emit, heard
from meshkit.errors import (
    ConfigurationError,
    PublishError,
    PublishNackedError,
    PublishTimeoutError,
    UnroutableError,
)
from meshkit.messaging import headers as h
from meshkit.messaging.message import Message
from meshkit.rabbitmq.connection import LOST, RPC_TIMEOUT, Link, within

_log = logging.getLogger("meshkit.rabbitmq")

TIMEOUT: Final = 10.0
IN_FLIGHT: Final = 1000
PERSISTENT: Final = 2
# Room for the other properties in the frame that carries the headers.
_FRAME_ROOM: Final = 8 * 1024


# What pamqp raises over a value that it cannot encode.
UNWRITABLE: Final = (ValueError, TypeError, KeyError, OverflowError, struct.error)

PublishOutcome = Literal["confirmed", "returned", "nacked", "timeout", "error"]


def outcome_of(error: PublishError) -> PublishOutcome:
    """One word for how a publish ended that raised `error`."""
    if isinstance(error, UnroutableError):
        return "returned"
    if isinstance(error, PublishNackedError):
        return "nacked"
    return "timeout" if isinstance(error, PublishTimeoutError) else "error"


class _Gone(Exception):
    """The channel or connection went before the confirm came."""


class _Lane:
    """A channel in confirm mode for one exchange, and the publishes that are under way on it.

    One for each exchange, because a publish to an exchange that does not exist closes the channel with all that is in
    flight on it.
    """

    __slots__ = ("channel", "in_flight", "retired")

    def __init__(self, channel: AbstractChannel) -> None:
        self.channel = channel
        self.in_flight: dict[str, asyncio.Task[None]] = {}
        self.retired = False


class Publisher:
    """Sends messages over one connection and waits for the confirms.

    Args:
        timeout: seconds until a publish fails, waits for a connection, a place and a confirm included.
        in_flight: how many messages may wait for their confirm at a time; more wait for a place.
    """

    def __init__(self, link: Link, *, clock: Clock, timeout: float = TIMEOUT, in_flight: int = IN_FLIGHT) -> None:
        self._link = link
        self._clock = clock
        self._timeout = timeout
        self._places = asyncio.Semaphore(in_flight)
        self._lanes: dict[str, _Lane] = {}
        self._opening: dict[str, asyncio.Task[_Lane]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def send(
        self,
        message: Message,
        exchange: str,
        routing_key: str,
        *,
        traceparent: str = "",
    ) -> None:
        """Publish a message and return once the broker has confirmed that a queue has it.

        A connection that is lost meanwhile is waited for, and the message published again under the same id: it may
        then be there twice.

        Args:
            traceparent: of the span that this belongs to, for the metrics' exemplars.

        Raises:
            UnroutableError: no queue is bound for it, or there is no such exchange.
            PublishNackedError: the broker refused it.
            PublishTimeoutError: no confirm came in time.
            PublishError: it cannot be published as it is.
            ConfigurationError: the connection belongs to another event loop.
        """
        if self._link.elsewhere:
            # What this loop would leave behind in the other one keeps that from ever closing.
            raise ConfigurationError(
                "the bus runs in another event loop.", "Publish there: asyncio.run_coroutine_threadsafe(…, loop)."
            )
        started = self._clock.now()
        outcome: PublishOutcome = "error"
        try:
            async with within(self._clock, self._timeout):
                await self._send(message, exchange, routing_key)
            outcome = "confirmed"
        except PublishError as error:
            outcome = outcome_of(error)
            raise
        except TimeoutError as error:
            outcome = "timeout"
            why = f": {self._link.trouble}" if not self._link.connected and self._link.trouble else ""
            why = ": the broker blocks publishers" if self._link.blocked else why
            raise PublishTimeoutError(
                f"no confirm for message {message.message_id} to {_where(exchange, routing_key)} within "
                f"{self._timeout:g} s{why}.",
                "It may be stored or not; publishing it again under the same id is safe.",
            ) from error
        except LOST as error:
            raise PublishError(
                f"message {message.message_id} to {_where(exchange, routing_key)} was not confirmed: the bus is closed.",
                "Close the bus last; an outbox publishes what is left when the service runs again.",
            ) from error
        finally:
            if heard(MessagePublished):
                emit(
                    MessagePublished(
                        source=exchange or routing_key,
                        outcome=outcome,
                        seconds=self._clock.now() - started,
                        traceparent=traceparent,
                    )
                )

    async def close(self) -> None:
        """End what is under way. Connections are the link's."""
        tasks: list[asyncio.Task[Any]] = [*self._opening.values(), *self._closing]
        for lane in self._lanes.values():
            tasks.extend(lane.in_flight.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._lanes.clear()

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _send(self, message: Message, exchange: str, routing_key: str) -> None:
        refused = 0
        while True:
            try:
                lane = await self._lane(exchange)
                return await self._on(lane, message, exchange, routing_key)
            except aiormq.exceptions.PublishError as error:
                raise UnroutableError(
                    f"message {message.message_id} to {_where(exchange, routing_key)} reached no queue: {error}.",
                    "Bind a queue to the exchange for this routing key; nothing is stored.",
                ) from error
            except aiormq.exceptions.DeliveryError as error:
                raise PublishNackedError(
                    f"the broker refused message {message.message_id} to {_where(exchange, routing_key)}.",
                    "A queue is full (x-overflow: reject-publish), or the broker is in trouble; its log says which.",
                ) from error
            except aiormq.exceptions.ChannelNotFoundEntity as error:
                raise UnroutableError(
                    f"there is no exchange {exchange!r} for message {message.message_id}.",
                    "Declare it, or start the service that does.",
                ) from error
            except aiormq.exceptions.ChannelAccessRefused as error:
                raise PublishError(
                    f"this user may not publish to {_where(exchange, routing_key)}: {error}.",
                    "Grant the write permission.",
                ) from error
            except aiormq.exceptions.ChannelPreconditionFailed as error:
                # The broker closed the channel over one message; those that shared it are innocent, and try again.
                refused += 1
                if refused > 1:
                    raise PublishError(
                        f"the broker does not take message {message.message_id}: {error}.",
                        "Is it larger than the broker allows?",
                    ) from error
            except (*LOST, _Gone):
                # Not answered, so not known: once there is a connection again, the same id is published again.
                await self._link.up()
                await asyncio.sleep(0)
            except UNWRITABLE as error:
                raise PublishError(
                    f"message {message.message_id} cannot be written as AMQP: {error}.",
                    "Look at its headers and its routing key.",
                ) from error

    async def _lane(self, exchange: str) -> _Lane:
        lane = self._lanes.get(exchange)
        if lane is not None and not lane.retired and not lane.channel.is_closed:
            return lane
        opening = self._opening.get(exchange)
        if opening is None:
            # In a task of its own: many wait for it, and a call that is broken off would close the channel.
            opening = asyncio.create_task(self._open(exchange), name=f"meshkit publish channel {exchange}")
            self._opening[exchange] = opening
            opening.add_done_callback(lambda done: self._opened(exchange, done))
        return await asyncio.shield(opening)

    async def _open(self, exchange: str) -> _Lane:
        channel = await self._link.channel(confirms=True)
        if exchange:
            # Is it there? A publish to one that is not closes the channel; and what aiormq still writes to a channel that
            # the broker has closed makes the broker close the whole connection.
            async with within(self._clock, RPC_TIMEOUT):
                await channel.exchange_declare(exchange, passive=True)
        self._lanes[exchange] = lane = _Lane(channel)
        return lane

    def _opened(self, exchange: str, done: asyncio.Task[_Lane]) -> None:
        if self._opening.get(exchange) is done:
            del self._opening[exchange]
        if not done.cancelled():
            done.exception()  # seen: whoever waited has it, and perhaps nobody waits any more

    async def _on(self, lane: _Lane, message: Message, exchange: str, routing_key: str) -> None:
        key = message.message_id
        # aiormq matches what the broker returns by message id, so of one id there is one under way on a channel.
        while (other := lane.in_flight.get(key)) is not None:
            await asyncio.wait([other])
        await self._places.acquire()
        if key in lane.in_flight:
            self._places.release()
            return await self._on(lane, message, exchange, routing_key)
        task = asyncio.create_task(self._confirmed(lane.channel, message, exchange, routing_key))
        lane.in_flight[key] = task
        task.add_done_callback(lambda done: self._done(lane, key, done))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done():
                # Nobody waits any more, but the confirm or the return may still come, and must not be taken for that of
                # the next publish under this id: that one goes over a new channel.
                self._retire(exchange, lane)
            raise

    async def _confirmed(self, channel: AbstractChannel, message: Message, exchange: str, routing_key: str) -> None:
        try:
            await channel.basic_publish(
                message.body,
                exchange=exchange,
                routing_key=routing_key,
                properties=_properties(message, channel),
                mandatory=True,
            )
        except asyncio.CancelledError as error:
            # aiormq cancels what waits on a channel that it closes.
            raise _Gone from error

    def _done(self, lane: _Lane, key: str, task: asyncio.Task[None]) -> None:
        if lane.in_flight.get(key) is task:
            del lane.in_flight[key]
        self._places.release()
        if not task.cancelled():
            task.exception()

    def _retire(self, exchange: str, lane: _Lane) -> None:
        if lane.retired:
            return
        lane.retired = True
        if self._lanes.get(exchange) is lane:
            del self._lanes[exchange]
        closing = asyncio.create_task(self._close(lane), name="meshkit closes a publish channel")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _close(self, lane: _Lane) -> None:
        try:
            async with within(self._clock, self._timeout):
                while lane.in_flight:
                    await asyncio.wait([*lane.in_flight.values()])
        except TimeoutError:
            pass
        if not lane.channel.is_closed:
            try:
                async with within(self._clock, self._timeout):
                    await lane.channel.close()
            except LOST:
                pass
        for task in [*lane.in_flight.values()]:
            task.cancel()


def _where(exchange: str, routing_key: str) -> str:
    return f"exchange {exchange!r} with key {routing_key!r}" if exchange else f"queue {routing_key!r}"


def _properties(message: Message, channel: AbstractChannel) -> commands.Basic.Properties:
    headers = dict(message.headers)
    frame_max = channel.connection.connection_tune.frame_max or h.MOST_BYTES + _FRAME_ROOM
    most = min(h.MOST_BYTES, max(1024, frame_max - _FRAME_ROOM))
    headers = h.fitted(headers, most=most)
    return commands.Basic.Properties(
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers=headers,
        delivery_mode=PERSISTENT,
        priority=message.priority,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        expiration=message.expiration,
        message_id=message.message_id,
        timestamp=message.timestamp,
        message_type=message.type,
        app_id=message.app_id,
    )


def writable(message: Message) -> Message:
    """The same message with what cannot be encoded put into words, for one that somebody else's client made: there are
    values that pamqp reads and does not write."""
    texts = ("type", "content_type", "content_encoding", "correlation_id", "reply_to", "app_id")
    short: dict[str, Any] = {name: h.cut(value, 255) for name in texts if (value := getattr(message, name)) is not None}
    headers = {h.cut(name, 128): _writable(value) for name, value in message.headers.items()}
    return dataclasses.replace(message, headers=headers, **short)


def _writable(value: Any) -> Any:
    if isinstance(value, bytes):
        return bytearray(value)
    if isinstance(value, dict):
        return {h.cut(name, 128): _writable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_writable(inner) for inner in value]
    try:
        encode.encode_table_value(value)
    except UNWRITABLE:
        return h.cut(repr(value), h.MOST_MESSAGE)
    return value
