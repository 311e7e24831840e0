"""Dead letters, to look at and to send back: the library behind `meshkit dlq`.

Looking is dangerous on RabbitMQ: AMQP has no browse, and on a quorum queue each message that is taken and given back
counts as a delivery, which can delete it. meshkit's own dead-letter queues are declared so that looking is harmless
(`x-delivery-limit` 2,000,000,000 keeps order and never drops); any other queue is left alone unless asked for.

A replay publishes the copy, waits for the broker's confirm, and only then takes the dead letter away: killed at any
point, it loses nothing. It goes to the one queue the message failed in, never to the exchange, which other subscribers
are bound to as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import json
import socket
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any, Final, Self

import aiormq.exceptions
from aiormq.abc import AbstractChannel, DeliveredMessage

from meshkit.core.clock import SYSTEM_CLOCK, Clock
from meshkit.core.events import DeadLetterReplayed, emit, error_type
from meshkit.core.trace import Span, parse_traceparent, tracer
from meshkit.errors import ConfigurationError, MeshkitError, MessagingError, PublishError, TopologyError
from meshkit.messaging import headers as h
from meshkit.messaging.message import Message
from meshkit.rabbitmq.connection import LOST, RPC_TIMEOUT, Link, checked_url, server_attributes, within
from meshkit.rabbitmq.publisher import Publisher
from meshkit.rabbitmq.topology import DEAD_LETTER_SUFFIX, dead_letter_arguments

MOST_REPLAYS: Final = 3

# So many messages are asked for at a time: a queue of a million fits through a small process.
_WINDOW: Final = 500
_BUSY_FOR: Final = 2.0
# RabbitMQ keeps what one nack gives back in an Erlang map, which has an order up to 32 entries and none above: 40
# messages nacked at once come back shuffled (measured on 3.10.8). More than 32 commands on their way are put together.
_NACKED: Final = 32
_NACKS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A dead-letter queue and how full it is.

    Attributes:
        depth: messages ready in it.
        consumers: who reads it; more than 0 is unusual.
    """

    queue: str
    depth: int
    consumers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterRecord:
    """One dead letter as a person wants to read it.

    Times are RFC 3339 text. What the message does not say is empty: one that the broker itself dead-lettered (its
    consumer died again and again) has neither error nor times.

    Attributes:
        queue: the queue it failed in, and goes back to; empty where nothing says which.
        replay_count: how often it was sent back already.
    """

    message_id: str
    type: str
    dead_letter_queue: str
    queue: str
    exchange: str
    routing_key: str
    reason: str
    error_type: str
    error_message: str
    stack: str
    fingerprint: str
    attempt: int
    first_published_at: str
    first_failed_at: str
    last_failed_at: str
    dead_lettered_at: str
    replay_count: int
    replayed_at: str
    replayed_by: str
    service: str
    version: str
    host: str
    trace_id: str
    content_type: str
    body: bytes
    headers: Mapping[str, object]

    def as_json(self, *, body: bool) -> dict[str, object]:
        """The record as plain values. A body that is no UTF-8 text is left out; `bytes` tells how long it is."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("body", "headers")}
        values["bytes"] = len(self.body)
        if body:
            values["body"] = self.text
        return values

    @property
    def text(self) -> str | None:
        """The body, `None` where it is no UTF-8 text."""
        try:
            return self.body.decode()
        except UnicodeDecodeError:
            return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Dead letters with one cause. `first` and `last` are when the oldest and the newest of them became one."""

    fingerprint: str
    count: int
    reason: str
    error_type: str
    error_message: str
    first: str
    last: str
    sample_ids: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Receipt:
    """What a replay did, or with `dry_run` would do.

    Attributes:
        depth: messages in the dead-letter queue at the start.
        planned: how many of them were selected.
        replayed: ids whose copy was confirmed and whose dead letter is gone.
        guarded: ids that were left because they had been replayed too often already.
        failed: ids that were left because their copy was not taken, with the reason.
        stopped: why it ended before it was through; empty where it was not stopped.
        left: how many of those that were there at the start still are.
        trace_id: the trace of the replay, empty where nothing is traced.
    """

    queue: str
    dry_run: bool
    depth: int = 0
    planned: int = 0
    replayed: list[str] = field(default_factory=list)
    guarded: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    stopped: str = ""
    left: int = 0
    trace_id: str = ""


def groups_of(records: Sequence[DeadLetterRecord]) -> list[Group]:
    """Dead letters by cause, the largest group first."""
    causes: dict[tuple[str, str], list[DeadLetterRecord]] = {}
    for record in records:
        causes.setdefault((record.fingerprint, record.reason), []).append(record)
    groups = []
    for (fingerprint, reason), members in sorted(causes.items(), key=lambda cause: -len(cause[1])):
        times = [record.dead_lettered_at for record in members if record.dead_lettered_at]
        groups.append(
            Group(
                fingerprint=fingerprint,
                count=len(members),
                reason=reason,
                error_type=members[0].error_type,
                error_message=members[0].error_message,
                first=min(times, default=""),
                last=max(times, default=""),
                sample_ids=tuple(record.message_id for record in members[:3]),
            )
        )
    return groups


# -- at the broker ----------------------------------------------------------------------------------------------------


class DeadLetters:
    """A connection to a broker, to look at its dead letters and to send them back.

    Args:
        url: `amqp://user:password@host:port/vhost`, `amqps` for TLS.
        service: who connects, as the broker's own tools show it.
        clock: where the time comes from.

    Raises:
        ConfigurationError: the URL is none.
        MeshkitError: MK102, on entering, where the broker cannot be reached or refuses the login.
    """

    def __init__(self, url: str, *, service: str = "meshkit-dlq", clock: Clock = SYSTEM_CLOCK) -> None:
        self._url = checked_url(url)
        self._clock = clock
        self._service = service
        self._reading = Link(self._url, role="consume", service=service, clock=clock)

    async def __aenter__(self) -> Self:
        try:
            await self._open(self._reading)
        except BaseException:
            await self._reading.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._reading.close()

    async def depths(self, queues: Collection[str]) -> list[Found]:
        """How full these queues are, by passive declares; a queue that does not exist is left out."""
        found = [await self._passive(queue) for queue in queues]
        return [one for one in found if one is not None]

    async def read(self, queue: str, *, limit: int = 1000, foreign: bool = False) -> tuple[list[DeadLetterRecord], int]:
        """The oldest `limit` dead letters, which stay where they are and in order, and how many there are in all.

        Args:
            queue: name of the dead-letter queue.
            limit: how many to read at the most.
            foreign: read the queue although it was not declared by meshkit. On a quorum queue with a small delivery
                limit, looking often enough deletes messages.

        Raises:
            TopologyError: there is no such queue, it is not one of meshkit's and `foreign` was not said, or somebody
                else reads it at the moment.
            MessagingError: the connection was lost meanwhile; the messages are where they were.
        """
        records: list[DeadLetterRecord] = []
        async with self._taking(queue, foreign=foreign, window=min(limit, _WINDOW)) as taken:
            for _ in range(min(limit, taken.total)):
                message = await taken.next()
                if message is None:
                    break
                records.append(record_of(message, queue))
        return records, taken.total

    async def replay(
        self,
        queue: str,
        *,
        ids: Collection[str] | None = None,
        fingerprint: str | None = None,
        limit: int | None = None,
        newest: int | None = None,
        by: str | None = None,
        dry_run: bool = False,
        foreign: bool = False,
        most_replays: int = MOST_REPLAYS,
        progress: Callable[[Receipt], object] | None = None,
    ) -> Receipt:
        """Send dead letters back to the queue they failed in, oldest first.

        Only what lies there now is looked at: what fails again meanwhile stays. What is not sent back stays in its
        place. Nobody else can replay the same queue at the same time.

        Args:
            queue: name of the dead-letter queue.
            ids: message ids (or their beginnings) to replay; all where left out.
            fingerprint: only dead letters with this cause.
            limit: so many at the most.
            newest: how far to look, as the place of the newest one from the front: `depth` of an earlier dry run leaves
                alone what has come since.
            by: who replays, for the message's headers; user and host where left out.
            dry_run: say what would be done, and change nothing.
            foreign: see `read`.
            most_replays: a message that was replayed so often already is left.
            progress: called after each message that was sent back.

        Raises:
            ConfigurationError: a selection that can hold nothing, or everything by mistake.
            TopologyError: as `read`.
            MeshkitError: MK102, where the broker does not take a second connection.
        """
        choice = _Choice(ids=ids, fingerprint=fingerprint, limit=limit)
        receipt = Receipt(queue=queue, dry_run=dry_run)
        if dry_run:
            async with self._taking(queue, foreign=foreign) as taken:
                chosen = _Chosen(taken, choice, newest, most_replays, receipt)
                while await chosen.next() is not None:
                    pass
            return receipt
        writing = Link(self._url, role="publish", service=self._service, clock=self._clock)
        publisher = Publisher(writing, clock=self._clock)
        try:
            await self._open(writing)
            async with self._taking(queue, foreign=foreign) as taken:
                with _replay_span(receipt) as run:
                    replayer = _Replayer(publisher, run, by=by or _who(), clock=self._clock, server=self._server)
                    chosen = _Chosen(taken, choice, newest, most_replays, receipt)
                    try:
                        while not receipt.stopped and (one := await chosen.next()) is not None:
                            # To its end, also on Ctrl-C: between the confirm and the ack there are two of it.
                            await _to_the_end(replayer.send_back(taken, *one, receipt))
                            if progress is not None:
                                progress(receipt)
                    except MessagingError as error:
                        receipt.stopped = error.cause
        finally:
            await publisher.close()
            await writing.close()
        return receipt

    # -- inside -------------------------------------------------------------------------------------------------------

    @property
    def _server(self) -> dict[str, Any]:
        return server_attributes(self._url)

    async def _open(self, link: Link) -> None:
        link.start()
        if not await link.tried():
            trouble = link.trouble
            if "Connection.OpenOk" in trouble:
                # What aiormq says where the broker answers Connection.Open by closing.
                trouble = "there is no such virtual host, or this user may not use it"
            raise MeshkitError(
                f"the broker at {self._url.host}:{self._server['server.port']} cannot be used: {trouble}.",
                "Check that it runs, and address, user, password and vhost (--url or MESHKIT_AMQP_URL).",
                code="MK102",
            )

    async def _channel(self) -> AbstractChannel:
        try:
            async with within(self._clock, RPC_TIMEOUT):
                return await self._reading.channel()
        except LOST as error:
            raise _lost(self._reading) from error

    async def _passive(self, queue: str) -> Found | None:
        channel = await self._channel()
        try:
            async with within(self._clock, RPC_TIMEOUT):
                declared = await channel.queue_declare(queue, passive=True)
                await channel.close()
        except aiormq.exceptions.ChannelNotFoundEntity:
            return None
        except aiormq.exceptions.ChannelAccessRefused as error:
            raise TopologyError(f"{queue!r} may not be looked at by this user.") from error
        except LOST as error:
            raise _lost(self._reading) from error
        return Found(queue=queue, depth=declared.message_count or 0, consumers=declared.consumer_count or 0)

    async def _check_own(self, queue: str) -> None:
        """Make sure that looking at `queue` is harmless."""
        channel = await self._channel()
        try:
            # Declaring what exists changes nothing; it fails where the arguments are not meshkit's.
            async with within(self._clock, RPC_TIMEOUT):
                await channel.queue_declare(queue, durable=True, arguments=dead_letter_arguments())
                await channel.close()
        except aiormq.exceptions.ChannelPreconditionFailed as error:
            raise TopologyError(
                f"{queue!r} was not declared by meshkit, and on a quorum queue with a delivery limit, looking deletes "
                "messages in the end.",
                "Say --foreign if you know that it is harmless here.",
            ) from error
        except aiormq.exceptions.ChannelAccessRefused as error:
            raise TopologyError(
                f"this user may not declare {queue!r}, which is how one learns whether looking at it is harmless.",
                "Take a user who may, or say --foreign if you know that it is.",
            ) from error
        except LOST as error:
            raise _lost(self._reading) from error

    @asynccontextmanager
    async def _taking(self, queue: str, *, foreign: bool, window: int = _WINDOW) -> AsyncIterator[_Taken]:
        """The messages of a queue, with nobody else reading it. What is not acked goes back to its place."""
        found = await self._passive(queue)
        if found is None:
            raise TopologyError(f"there is no queue {queue!r} on this broker.")
        if not foreign:
            await self._check_own(queue)
        until = self._clock.now() + _BUSY_FOR
        while True:
            # What a reader holds is not counted as ready, so the count is right only where there is none.
            found = await self._passive(queue)
            taken = _Taken(await self._channel(), queue, window, self, found.depth if found is not None else 0)
            try:
                if found is not None and found.consumers == 0:
                    if taken.total:
                        await _to_the_end(taken.consume())
                    yield taken
                    return
            except aiormq.exceptions.ChannelAccessRefused:
                pass  # somebody came in between
            except LOST as error:
                raise _lost(self._reading) from error
            finally:
                await _to_the_end(taken.give_back())
            if self._clock.now() >= until:
                raise TopologyError(
                    f"somebody else reads {queue!r} at the moment, another replay perhaps.",
                    "Wait for its end, then try again.",
                )
            # Somebody who only looks is gone again in a moment.
            await self._clock.sleep(0.1)


class _Taken:
    """Messages that a channel's consumer holds: each is handed out once, and is then acked or goes back in the end.

    What is kept counts against the prefetch, so a consumer whose window is full of kept messages is replaced by the next
    one; the messages stay the channel's.
    """

    def __init__(self, channel: AbstractChannel, queue: str, window: int, letters: DeadLetters, total: int) -> None:
        self.total = total
        self.left = total
        # Held by whoever talks to the channel in a way that must not be broken off.
        self.busy = asyncio.Lock()
        self._channel = channel
        self._queue = queue
        self._window = window
        self._letters = letters
        self._arrived: asyncio.Queue[DeliveredMessage | None] = asyncio.Queue()
        self._kept = 0
        self._held: dict[int, None] = {}
        self._consumers = 0
        self._gone = channel.closing
        self._gone.add_done_callback(lambda _: self._arrived.put_nowait(None))

    async def consume(self) -> None:
        async with self.busy:
            if self._consumers:
                await self._channel.basic_cancel(self._tag, timeout=RPC_TIMEOUT)
            self._kept = 0
            self._consumers += 1
            await self._channel.basic_qos(prefetch_count=self._window, timeout=RPC_TIMEOUT)
            await self._channel.basic_consume(
                self._queue, self._arrive, exclusive=True, consumer_tag=self._tag, timeout=RPC_TIMEOUT
            )

    @property
    def _tag(self) -> str:
        # One nack over two consumers gives back the one's and then the other's, in the order of these names.
        return f"meshkit-dlq-{self._consumers:08d}"

    async def _arrive(self, message: DeliveredMessage) -> None:
        assert message.delivery_tag is not None
        self._held[message.delivery_tag] = None
        self._arrived.put_nowait(message)

    async def next(self) -> DeliveredMessage | None:
        """The next message, `None` where there is none."""
        if self._kept >= self._window:
            await _to_the_end(self.consume())
        for _ in range(10):
            try:
                async with within(self._letters._clock, 1.0):
                    message = await self._arrived.get()
            except TimeoutError:
                # Fewer than there were: a time to live, a purge. Or the broker is slow.
                found = await self._letters._passive(self._queue)
                if found is None or not found.depth:
                    return None
            else:
                if message is None:
                    raise _lost(self._letters._reading)
                self._kept += 1
                return message
        return None

    async def ack(self, message: DeliveredMessage) -> None:
        assert message.delivery_tag is not None
        await self._channel.basic_ack(message.delivery_tag)
        del self._held[message.delivery_tag]
        self._kept -= 1
        self.left -= 1

    async def give_back(self) -> None:
        """Let go of all that is in hand by nack, and only then of the channel: closing it with messages in hand would
        count as a failed delivery of each."""
        async with self.busy:
            self._gone.cancel()
            # Where the channel has gone the broker has taken everything back by itself.
            with contextlib.suppress(*LOST, RuntimeError, MessagingError):
                if self._channel.is_closed:
                    return
                if not self._consumers:
                    await self._channel.close()
                    return
                await self._channel.basic_cancel(self._tag, timeout=RPC_TIMEOUT)
                held = list(self._held)
                for start in range(0, len(held), _NACKED):
                    await self._channel.basic_nack(held[start : start + _NACKED][-1], multiple=True, requeue=True)
                    if start % (_NACKED * _NACKS) == _NACKED * (_NACKS - 1):
                        await self._back(self.left - len(held) + start + _NACKED)
                await self._channel.close()
                # Who looks next should find them.
                await self._back(self.left)

    async def _back(self, count: int) -> None:
        """Wait until so many are ready again: a quorum queue takes them back a moment after the nack."""
        for _ in range(200):
            found = await self._letters._passive(self._queue)
            if found is None or found.depth >= count:
                return
            await self._letters._clock.sleep(0.005)


@dataclass(slots=True, kw_only=True)
class _Choice:
    """Which dead letters a replay takes; it counts as it goes, so it is asked once for each, oldest first."""

    ids: Collection[str] | None
    fingerprint: str | None
    limit: int | None
    _taken: int = 0

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigurationError(f"limit is how many dead letters to replay, so 1 or above, not {self.limit}.")
        if self.ids is not None and not all(self.ids):
            raise ConfigurationError("an empty message id would be the beginning of all.", "Give at least its start.")

    @property
    def full(self) -> bool:
        return self.limit is not None and self._taken >= self.limit

    def takes(self, record: DeadLetterRecord) -> bool:
        if self.ids is not None and not record.message_id.startswith(tuple(self.ids)):
            return False
        if self.fingerprint is not None and record.fingerprint != self.fingerprint:
            return False
        self._taken += 1
        return True


class _Chosen:
    """Those of the first messages of a queue that are to go back, one after the other."""

    def __init__(self, taken: _Taken, choice: _Choice, newest: int | None, most_replays: int, receipt: Receipt) -> None:
        receipt.depth = receipt.left = taken.total
        self._taken = taken
        self._choice = choice
        self._left = taken.total if newest is None else min(taken.total, newest)
        self._most_replays = most_replays
        self._receipt = receipt

    async def next(self) -> tuple[DeadLetterRecord, DeliveredMessage] | None:
        """The next one, `None` after the last."""
        receipt = self._receipt
        while self._left > 0 and not self._choice.full:
            self._left -= 1
            message = await self._taken.next()
            if message is None:
                break
            record = record_of(message, receipt.queue)
            if not self._choice.takes(record):
                continue
            receipt.planned += 1
            if record.replay_count < self._most_replays:
                return record, message
            receipt.guarded.append(record.message_id)
            if not receipt.dry_run:
                emit(DeadLetterReplayed(source=record.queue or receipt.queue, result="skipped"))
        return None


# -- sending back -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _replay_span(receipt: Receipt) -> Iterator[Span]:
    """A trace of its own: the one that the message failed in is hours or days old."""
    run = tracer().start(
        f"meshkit.replay {receipt.queue}",
        parent=None,
        attributes={"meshkit.replay.batch_id": uuid.uuid4().hex, "meshkit.sampling.keep": True},
    )
    receipt.trace_id = run.context.trace_id if run.context is not None else ""
    try:
        with run.active():
            yield run
        if receipt.stopped:
            run.fail("stopped", receipt.stopped)
    except Exception as error:
        run.fail(error_type(error), str(error))
        raise
    finally:
        run.set({"meshkit.replay.count": len(receipt.replayed)})
        run.end()


class _Replayer:
    """Moves one message after another."""

    def __init__(self, publisher: Publisher, run: Span, *, by: str, clock: Clock, server: dict[str, Any]) -> None:
        self._publisher = publisher
        self._run = run
        self._by = by
        self._clock = clock
        self._server = server

    async def send_back(
        self, taken: _Taken, record: DeadLetterRecord, message: DeliveredMessage, receipt: Receipt
    ) -> None:
        """Publish the copy, wait for the confirm, then ack. What the copy's publish came to goes into the receipt."""
        async with taken.busy:
            if record.queue in ("", record.dead_letter_queue):
                receipt.failed.append((record.message_id, "it does not say which queue it failed in"))
                emit(DeadLetterReplayed(source=record.dead_letter_queue, result="failed"))
                return
            try:
                await self._publish(message, record)
                # Confirmed, so the dead letter may go: a crash before this line shows the message twice, never not at
                # all.
                await taken.ack(message)
            except PublishError as error:
                receipt.failed.append((record.message_id, error.cause))
                emit(DeadLetterReplayed(source=record.queue, result="failed"))
                if error.code == "MK203":
                    # The broker takes nothing at the moment; the others need not wait ten seconds each to learn that.
                    receipt.stopped = error.cause
            except LOST as error:
                receipt.failed.append((record.message_id, "sent back, and the dead letter is still there as well"))
                receipt.stopped = f"the connection to the broker was lost: {error}"
            else:
                receipt.replayed.append(record.message_id)
                receipt.left = taken.left
                emit(DeadLetterReplayed(source=record.queue, result="republished"))

    async def _publish(self, delivered: DeliveredMessage, record: DeadLetterRecord) -> None:
        properties = delivered.header.properties
        came_with: Mapping[str, Any] = properties.headers or {}
        lower = h.lower(came_with)
        original = parse_traceparent(lower.get(h.TRACEPARENT), lower.get(h.TRACESTATE, ""))
        failed = parse_traceparent(came_with.get(h.FAILED_TRACEPARENT))
        common = {
            **self._server,
            "messaging.system": "rabbitmq",
            "messaging.message.id": record.message_id,
            "meshkit.sampling.keep": True,
        }
        tracer().start(
            f"receive {record.dead_letter_queue}",
            kind="client",
            parent=self._run,
            links=[context for context in (original, failed) if context is not None],
            attributes={
                **common,
                "messaging.operation.name": "receive",
                "messaging.operation.type": "receive",
                "messaging.destination.name": record.dead_letter_queue,
                "meshkit.replay.reason": record.reason,
            },
        ).end()
        # A new creation context: the replay may come days later, when the old trace is long gone. The link leads back.
        span = tracer().start(
            f"publish {record.queue}",
            kind="producer",
            parent=self._run,
            links=[original] if original is not None else [],
            attributes={
                **common,
                "messaging.operation.name": "publish",
                "messaging.operation.type": "send",
                "messaging.destination.name": record.queue,
                "messaging.rabbitmq.destination.routing_key": record.queue,
                "meshkit.replay.count": record.replay_count + 1,
            },
        )
        headers = {
            name: value
            for name, value in h.without_broker_headers(came_with).items()
            if name not in h.DROPPED_ON_REPLAY
        }
        headers[h.REPLAY_COUNT] = str(record.replay_count + 1)
        headers[h.REPLAYED_AT] = h.rfc3339(self._clock.time())
        headers[h.REPLAYED_BY] = self._by
        # One that the broker itself dead-lettered does not say where it came from; from here on it does.
        headers.setdefault(h.QUEUE, record.queue)
        headers.setdefault(h.EXCHANGE, record.exchange)
        headers.setdefault(h.ROUTING_KEY, record.routing_key)
        carrier: dict[str, str] = {}
        tracer().inject(carrier, span=span)
        if h.TRACEPARENT in carrier:
            headers = {
                name: value for name, value in headers.items() if name.lower() not in (h.TRACEPARENT, h.TRACESTATE)
            }
            if original is not None:
                # Of several replays each continues the story that began with the first publish.
                headers.setdefault(h.ORIGINAL_TRACEPARENT, original.traceparent)
            headers.update(carrier)
        copy = Message(
            body=delivered.body,
            message_id=record.message_id,
            type=properties.message_type or None,
            headers=headers,
            content_type=properties.content_type or None,
            content_encoding=properties.content_encoding or None,
            correlation_id=properties.correlation_id or None,
            reply_to=properties.reply_to or None,
            timestamp=properties.timestamp,
            app_id=properties.app_id or None,
            priority=properties.priority,
        )
        try:
            with span.active():
                await self._publisher.send(copy, "", record.queue, traceparent=carrier.get(h.TRACEPARENT, ""))
        except Exception as error:
            span.fail(error_type(error), str(error))
            raise
        finally:
            span.end()


def record_of(message: DeliveredMessage, dead_letter_queue: str) -> DeadLetterRecord:
    """What a dead letter says of itself. Whatever its headers hold, this does not fail."""
    properties = message.header.properties
    headers: Mapping[str, Any] = properties.headers or {}

    def text(name: str) -> str:
        return h.text(headers, name)

    def number(name: str, least: int) -> int:
        try:
            return h.number(headers, name, least, least=least)
        except MessagingError:
            return least

    queue, exchange, routing_key, reason = (text(name) for name in (h.QUEUE, h.EXCHANGE, h.ROUTING_KEY, h.REASON))
    if not reason:
        # Dead-lettered by the broker itself: only its own notes tell.
        noted = _last_death(headers)
        reason = "crash_loop" if noted["reason"] == "delivery_limit" else noted["reason"]
        if not queue:
            queue, exchange, routing_key = noted["queue"], noted["exchange"], noted["routing-key"]
    if not queue and dead_letter_queue.endswith(DEAD_LETTER_SUFFIX):
        queue = dead_letter_queue.removesuffix(DEAD_LETTER_SUFFIX)
    context = parse_traceparent(h.lower(headers).get(h.TRACEPARENT))
    return DeadLetterRecord(
        message_id=properties.message_id or "",
        type=properties.message_type or text(h.CE_TYPE),
        dead_letter_queue=dead_letter_queue,
        queue=queue,
        exchange=exchange,
        routing_key=routing_key,
        reason=reason,
        error_type=text(h.ERROR_TYPE),
        error_message=text(h.ERROR_MESSAGE),
        stack=text(h.ERROR_STACK),
        fingerprint=text(h.ERROR_FINGERPRINT),
        attempt=number(h.ATTEMPT, 1),
        first_published_at=text(h.FIRST_PUBLISHED_AT),
        first_failed_at=text(h.FIRST_FAILED_AT),
        last_failed_at=text(h.LAST_FAILED_AT),
        dead_lettered_at=text(h.DEAD_LETTERED_AT),
        replay_count=number(h.REPLAY_COUNT, 0),
        replayed_at=text(h.REPLAYED_AT),
        replayed_by=text(h.REPLAYED_BY),
        service=text(h.SERVICE),
        version=text(h.VERSION),
        host=text(h.HOST),
        trace_id=context.trace_id if context is not None else "",
        content_type=properties.content_type or "",
        body=message.body,
        headers=dict(headers),
    )


def _last_death(headers: Mapping[str, Any]) -> dict[str, str]:
    """The broker's note of why and where it last dead-lettered the message; empty texts where there is none.

    https://www.rabbitmq.com/docs/dlx#effects: `x-death` is a list of tables, the latest death first.
    """
    deaths = headers.get("x-death")
    death = deaths[0] if isinstance(deaths, list) and deaths and isinstance(deaths[0], Mapping) else {}
    keys = death.get("routing-keys")
    return {
        **{name: h.text(death, name) for name in ("queue", "exchange", "reason")},
        "routing-key": h.text({"key": keys[0]}, "key") if isinstance(keys, list) and keys else "",
    }


async def _to_the_end(doing: Coroutine[Any, Any, None]) -> None:
    """Wait for something that must not be broken off: whoever is cancelled meanwhile goes, and it ends by itself."""
    await asyncio.shield(asyncio.create_task(doing))


def _lost(link: Link) -> MessagingError:
    return MessagingError(
        f"the connection to the broker was lost: {link.trouble or 'the channel was closed'}.",
        "What was in hand is back in its queue; try again.",
        code="MK600",
    )


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


# -- the management API -----------------------------------------------------------------------------------------------


def names_from_management(url: str, *, suffix: str = DEAD_LETTER_SUFFIX, timeout: float = 10.0) -> list[str]:
    """The names of a vhost's dead-letter queues, from RabbitMQ's management API: AMQP itself cannot list queues.

    Only names, because its counts are some seconds old.

    Args:
        url: `http://user:password@host:15672`, with the vhost as path where it is not `/`.
        suffix: what the names of dead-letter queues end in.

    Raises:
        ConfigurationError: the URL is none of HTTP.
        MeshkitError: MK102, where the API cannot be reached or refuses.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urllib.parse.urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(
            "the address of the management API is not one of HTTP.", "It looks like http://user:password@host:15672."
        )
    vhost = urllib.parse.quote(urllib.parse.unquote(parts.path.strip("/")) or "/", safe="")
    where = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    base = f"{parts.scheme}://{where}{f':{port}' if port else ''}"
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    login = [urllib.parse.unquote(text or "guest") for text in (parts.username, parts.password)]
    passwords.add_password(None, base, login[0], login[1])
    # No proxy: operators reach their broker's API directly, and credentials must not go anywhere else.
    opener = urllib.request.build_opener(
        urllib.request.HTTPBasicAuthHandler(passwords), urllib.request.ProxyHandler({})
    )
    try:
        with opener.open(f"{base}/api/queues/{vhost}", timeout=timeout) as answer:
            names = [str(queue["name"]) for queue in json.load(answer)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        said = error.reason if isinstance(error, urllib.error.URLError) else error
        raise MeshkitError(
            f"the management API at {base} cannot be asked: {said}.",
            "Check address, login and vhost, or name the queues: meshkit dlq list QUEUE …",
            code="MK102",
        ) from error
    return sorted(name for name in names if name.endswith(suffix))
