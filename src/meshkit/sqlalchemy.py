"""Inbox and outbox on the service's own database, in the service's own transaction.

Without an outbox, a service that commits and then publishes loses the event when it dies in between. Without an inbox,
a message that is delivered twice takes effect twice. Here the inbox row, the handler's work and the outbox rows are one
transaction; a relay publishes what was committed.

Works with SQLAlchemy's asyncio extension on PostgreSQL (asyncpg), MySQL 8 and MariaDB 10.6 (aiomysql) and SQLite
(aiosqlite). Make the tables with `create_tables(engine)`, or put `metadata` under your migrations.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, cast

from meshkit.core.clock import SYSTEM_CLOCK, Clock
from meshkit.core.events import OutboxMeasured, emit
from meshkit.core.lifecycle import Check
from meshkit.errors import (
    ConfigurationError,
    EnvelopeError,
    MeshkitError,
    PublishError,
    PublishTimeoutError,
    UnroutableError,
    missing_extra,
)
from meshkit.messaging.inbox import AlreadyHandled
from meshkit.messaging.message import Delivery, Message
from meshkit.messaging.outbox import Publisher

try:
    import sqlalchemy as sa
    from sqlalchemy.event import listen, remove
    from sqlalchemy.exc import IntegrityError, SQLAlchemyError
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session
except ModuleNotFoundError as error:
    raise missing_extra("sqlalchemy", "sqlalchemy") from error

_log = logging.getLogger("meshkit")

metadata = sa.MetaData()


class _Blob(sa.LargeBinary):
    """MySQL's bytes, handed to the driver as text: aiomysql 0.3.2 fails on bytes beside PyMySQL 1.2.3 or later
    (https://github.com/aio-libs/aiomysql/issues/1080)."""

    def bind_processor(self, dialect: sa.Dialect) -> Any:
        return bytes.hex

    def bind_expression(self, bindvalue: sa.BindParameter[Any]) -> sa.ColumnElement[Any]:
        return sa.func.unhex(bindvalue)


# BIGINT does not number rows by itself on SQLite, INTEGER does.
_RowNumber: Final = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
# MySQL's usual collations take "A" and "a" for one id; and whatever the database's own charset is, any name fits.
_Name: Final = sa.String(255).with_variant(sa.String(255, collation="utf8mb4_bin"), "mysql", "mariadb")
# Its BLOB and TEXT without a length end at 64 KiB.
_Body: Final = sa.LargeBinary().with_variant(_Blob(length=2**32 - 1), "mysql", "mariadb")
_Text: Final = sa.Text().with_variant(sa.Text(length=2**24 - 1), "mysql", "mariadb")

inbox_table: Final = sa.Table(
    "meshkit_inbox",
    metadata,
    sa.Column("consumer", _Name, primary_key=True),
    sa.Column("message_id", _Name, primary_key=True),
    sa.Column("handled_at", sa.Float(53), nullable=False, index=True),
)
"""Which messages a consumer has handled. `handled_at` is seconds since the epoch."""

outbox_table: Final = sa.Table(
    "meshkit_outbox",
    metadata,
    sa.Column("id", _RowNumber, primary_key=True, autoincrement=True),
    sa.Column("message_id", _Name, nullable=False),
    sa.Column("exchange", _Name, nullable=False),
    sa.Column("routing_key", _Name, nullable=False),
    sa.Column("order_key", _Name, nullable=False),
    sa.Column("properties", _Text, nullable=False),
    sa.Column("body", _Body, nullable=False),
    sa.Column("written_at", sa.Float(53), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("retry_at", sa.Float(53), nullable=False, index=True),
    sa.Column("holds_order", sa.Boolean, nullable=False),
    sa.Column("last_error", _Text, nullable=False),
    # A number that was taken once never comes again: what is written later stands behind.
    sqlite_autoincrement=True,
)
"""What has been committed and not yet been published, in the order it was written. A published row is deleted.

A row with `attempts` above 0 could not be published, and `last_error` says why; it is tried again from `retry_at` on
(seconds since the epoch). `holds_order`: those behind it with the same `order_key` wait for it."""


async def create_tables(engine: AsyncEngine) -> None:
    """Make the tables that are missing. For migrations of your own, take `metadata`."""
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


def tuned(engine: AsyncEngine, *, lock_wait: float = 30.0) -> AsyncEngine:
    """The same engine, set so that several tasks and processes can share a SQLite file; other databases need nothing.

    Readers no longer wait for the writer (write-ahead log), and who wants to write waits for his turn. A handler with
    an inbox holds SQLite's only write lock from beginning to end, so everybody else waits for the slowest one.

    Args:
        engine: a fresh engine, before its first connection.
        lock_wait: seconds to wait for the write lock, before "database is locked"; the default of the driver is 5.
    """
    if engine.dialect.name == "sqlite":

        def settle(connection: Any, _record: object) -> None:
            cursor = connection.cursor()
            cursor.execute(f"PRAGMA busy_timeout = {round(lock_wait * 1000)}")
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.close()

        listen(engine.sync_engine, "connect", settle)
    return engine


# -- inbox ------------------------------------------------------------------------------------------------------------


class SqlInbox:
    """Lets a handler take effect once for each message, however often it is delivered.

    Args:
        sessions: the service's sessionmaker.
        clock: where the time comes from.
    """

    def __init__(self, sessions: async_sessionmaker[AsyncSession], *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._sessions = sessions
        self._clock = clock

    def open(self, delivery: Delivery) -> AbstractAsyncContextManager[AsyncSession]:
        """A transaction that holds the inbox row: commits at the end, rolls back on an error. A handler that commits it
        itself gets a ConfigurationError; savepoints (`session.begin_nested()`) are its own.

        A second delivery of the same message at the same time waits at the unique key until the first one has ended.

        Raises:
            AlreadyHandled: the message has been handled, and nothing is to be done.
            EnvelopeError: the message has no id.
        """
        return self._opened(delivery)

    @asynccontextmanager
    async def _opened(self, delivery: Delivery) -> AsyncIterator[AsyncSession]:
        if not delivery.message_id:
            raise EnvelopeError(
                f"a message from {delivery.queue!r} has no message_id, by which an inbox knows it.",
                "Have its producer set one, or subscribe without an inbox.",
            )
        async with self._sessions() as session, session.begin():
            # The first statement of the transaction: whoever comes second waits here, before it has read anything.
            try:
                await session.execute(
                    inbox_table.insert().values(
                        consumer=delivery.queue, message_id=delivery.message_id, handled_at=self._clock.time()
                    )
                )
            except IntegrityError as error:
                raise AlreadyHandled(delivery.message_id) from error
            listen(session.sync_session, "before_commit", _refuse_commit)
            try:
                yield session
            finally:
                remove(session.sync_session, "before_commit", _refuse_commit)

    async def forget(self, *, older_than: float = 14 * 86_400.0) -> int:
        """Delete rows of messages that were handled more than `older_than` seconds ago, and say how many.

        Keep them for longer than a message can wait in rungs, dead-letter queue and replay.
        """
        async with self._sessions() as session, session.begin():
            done = await session.execute(
                inbox_table.delete().where(inbox_table.c.handled_at < self._clock.time() - older_than)
            )
            return int(cast("sa.CursorResult[Any]", done).rowcount)


def _refuse_commit(session: Session) -> None:
    if not session.in_nested_transaction():
        # What fails after it would be tried again, found in the inbox, and never be done.
        raise ConfigurationError(
            "a handler committed the transaction of its inbox, which is committed when the handler has ended.",
            "Leave the commit out; for work of its own, take another session.",
        )


# -- outbox -----------------------------------------------------------------------------------------------------------


class SqlOutbox:
    """Events that are written in the service's own transaction, and published by a relay.

    Args:
        sessions: the service's sessionmaker.
        bus: the bus whose envelopes are written and which publishes them.
        clock: where the time comes from.
    """

    def __init__(
        self, sessions: async_sessionmaker[AsyncSession], bus: Publisher, *, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._sessions = sessions
        self._bus = bus
        self._clock = clock
        self._wake: set[Callable[[], None]] = set()

    async def publish(self, session: AsyncSession, event: Any, *, key: str | None = None, order: str = "") -> str:
        """Write an event into the session's transaction. It is published once that is committed, and only then.

        Args:
            session: the session whose transaction the event belongs to.
            event: a typed event (`meshkit.event`).
            key: routing key; the event's type where left out.
            order: events with the same text are published one after the other, in the order they were written, and
                one that the broker refuses holds up the others; all without a text are one such line. Where two
                transactions may write the same text at the same time, first lock in both what the text stands for (the
                row of the enrollment, say): it is then the order of their commits.

        Returns:
            The message id.
        """
        message, exchange, routing_key = self._bus.envelope(event, key=key)
        properties, body = _stored(message)
        await session.execute(
            outbox_table.insert().values(
                message_id=message.message_id,
                exchange=exchange,
                routing_key=routing_key,
                order_key=order,
                properties=properties,
                body=body,
                written_at=self._clock.time(),
                attempts=0,
                retry_at=0.0,
                holds_order=False,
                last_error="",
            )
        )
        if session.info.get(self) is None:
            # By the session's own signal, so that a rolled-back transaction wakes nobody.
            listen(session.sync_session, "after_commit", self._wake_relays)
            session.info[self] = True
        return message.message_id

    def relay(self, *, name: str = "outbox", poll: float = 1.0, batch: int = 100) -> OutboxRelay:
        """The part that publishes what was committed. Run one in each process that writes.

        Args:
            name: for metrics and health.
            poll: seconds between looks for rows that another process left; own rows are published at once.
            batch: how many rows are taken at a time.
        """
        if poll <= 0:
            raise ConfigurationError(f"poll is how many seconds lie between two looks, so above 0, not {poll}.")
        if batch < 1:
            raise ConfigurationError(f"batch is how many rows to take at a time, so 1 or above, not {batch}.")
        return OutboxRelay(
            self._sessions, self._bus, name=name, poll=poll, batch=batch, clock=self._clock, wake=self._wake
        )

    def _wake_relays(self, _session: object) -> None:
        for wake in self._wake:
            wake()


@dataclass(slots=True)
class _Batch:
    """What became of the rows that were taken: `trouble` is an error that is not about one row."""

    sent: list[int] = field(default_factory=list)
    stuck: dict[int, tuple[int, Exception]] = field(default_factory=dict)
    trouble: Exception | None = None


class OutboxRelay:
    """Publishes outbox rows with confirms, in the order they were written, and deletes what is confirmed.

    A crash between confirm and delete publishes rows twice, under the same message ids. Several relays may run on one
    table; one works at a time. A row that the broker refuses (a full queue) holds up those behind it with the same order
    text; one that nobody is bound for holds up none. Both stay in the table with `attempts` and `last_error`, and are
    tried again. Made by `SqlOutbox.relay`.
    """

    _LONGEST_REST: Final = 5.0
    _LONGEST_REFUSED: Final = 60.0
    _LAST_LOOK: Final = 2.0
    _MEASURE_EVERY: Final = 5.0

    def __init__(
        self,
        sessions: async_sessionmaker[AsyncSession],
        bus: Publisher,
        *,
        name: str,
        poll: float,
        batch: int,
        clock: Clock,
        wake: set[Callable[[], None]],
    ) -> None:
        self.name = name
        self._sessions = sessions
        self._bus = bus
        self._poll = poll
        self._batch = batch
        self._clock = clock
        self._wakers = wake
        self._task: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        self._idle = asyncio.Event()
        self._stopping = asyncio.Event()
        self._trouble = ""
        self._measured_at = float("-inf")

    # -- a part of the process's lifecycle ----------------------------------------------------------------------------

    async def start(self) -> None:
        if self._task is not None and not self._task.done():
            return
        # Made here, because an event belongs to the event loop that it was first waited for in.
        self._woken, self._idle, self._stopping = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._wakers.add(self._wake)
        self._task = asyncio.create_task(self._run(), name=f"meshkit outbox relay {self.name}")

    def checks(self) -> Sequence[Check]:
        # Not required: a service whose broker is away goes on taking requests, and publishes what it committed later.
        running = self._task is not None and not self._task.done()
        return [Check(name=self.name, ok=running and not self._trouble, detail=self._trouble, required=False)]

    async def drain(self, grace: float) -> None:
        """Publish what is committed, for `grace` seconds at most; what is left stays in the table.

        It goes on publishing until `close`: handlers that finish meanwhile may still commit events.
        """
        if self._task is None:
            return
        self._wake()
        idle = asyncio.ensure_future(self._idle.wait())
        timer = self._clock.call_at(self._clock.now() + grace, self._idle.set)
        try:
            await asyncio.wait([idle, self._task], return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            idle.cancel()

    async def close(self) -> None:
        """Look once more, then end."""
        self._wakers.discard(self._wake)
        task, self._task = self._task, None
        if task is None:
            return
        self._stopping.set()
        self._woken.set()
        timer = self._clock.call_at(self._clock.now() + self._LAST_LOOK, task.cancel)
        await asyncio.wait([task])
        timer.cancel()

    def _wake(self) -> None:
        self._idle.clear()
        self._woken.set()

    # -- the work -----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        patience = self._poll
        while True:
            last = self._stopping.is_set()
            self._woken.clear()
            sent = 0
            try:
                sent = await self.publish_pending()
            except Exception as error:
                # The rows are where they were, so whatever it is, the next look may succeed. Longer and longer rests:
                # a server that is coming back is let alone.
                self._say_trouble(error)
                rest = min(patience, max(self._poll, self._LONGEST_REST))
                patience *= 2
            else:
                self._trouble = ""
                rest = patience = self._poll
            await self._measure(force=sent > 0)
            self._idle.set()
            if last:
                return
            # A commit ends the rest, but not where the last look met trouble: the next commit would not mend that.
            await self._rest(rest, self._stopping if self._trouble else self._woken)

    async def _rest(self, seconds: float, until: asyncio.Event) -> None:
        over = asyncio.Event()
        timer = self._clock.call_at(self._clock.now() + seconds, over.set)
        waits = [asyncio.ensure_future(event.wait()) for event in (over, until)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            for wait in waits:
                wait.cancel()

    def _say_trouble(self, error: Exception) -> None:
        known = isinstance(error, MeshkitError | SQLAlchemyError | OSError)
        text = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        if text != self._trouble:
            _log.warning(
                "outbox %s: %s; the rows stay and are tried again",
                self.name,
                text,
                exc_info=None if known else error,
            )
        self._trouble = text

    async def publish_pending(self) -> int:
        """Publish what may be published now, and say how many rows it was. What another relay works on is left to it.

        Raises:
            Exception: the broker or the database is in trouble; what was confirmed until then is done.
        """
        sent = 0
        while True:
            async with self._sessions() as session:
                if session.get_bind(clause=outbox_table).dialect.name == "sqlite":
                    batch = await self._from_sqlite(session)
                else:
                    batch = await self._from_locked_rows(session)
            sent += len(batch.sent)
            if batch.trouble is not None:
                raise batch.trouble
            if not batch.sent and not batch.stuck:
                return sent
            self._trouble = ""

    async def _from_locked_rows(self, session: AsyncSession) -> _Batch:
        """Publish a batch in one transaction, whose locks on the rows keep other relays away."""
        # Under MySQL's default isolation a lock on rows takes the gaps of what is missing along, and a row that another
        # relay has deleted since the first look is an error to later MariaDBs.
        await session.begin()
        await session.connection(
            bind_arguments={"clause": outbox_table}, execution_options={"isolation_level": "READ COMMITTED"}
        )
        ids = await self._candidates(session)
        one = sa.select(outbox_table.c.id).where(outbox_table.c.id.in_(ids[:1]))
        if not ids or (await session.execute(one.with_for_update(skip_locked=True))).first() is None:
            # Somebody works on the first of them, and looks again afterwards: what is committed now it will see.
            return _Batch()
        # The others are free too, but for those behind a row whose transaction took its number early and its time.
        rows = (await session.execute(_rows(ids).with_for_update())).all()
        batch = _Batch()
        try:
            await self._publish(rows, batch)
        finally:
            # On cancellation too: what was confirmed must not be published again.
            await self._settle(session, batch)
            await session.commit()
        return batch

    async def _from_sqlite(self, session: AsyncSession) -> _Batch:
        """Publish a batch without a transaction, which would keep everybody from writing, under a lock beside it."""
        await session.begin()
        file = (await session.scalars(sa.text("SELECT file FROM pragma_database_list WHERE name = 'main'"))).first()
        await session.rollback()
        with _alone_with(file) as alone:
            batch = _Batch()
            if not alone:
                return batch
            await session.begin()
            ids = await self._candidates(session)
            rows = (await session.execute(_rows(ids))).all() if ids else []
            await session.rollback()
            try:
                await self._publish(rows, batch)
            finally:
                if batch.sent or batch.stuck:
                    await session.begin()
                    await self._settle(session, batch)
                    await session.commit()
            return batch

    async def _candidates(self, session: AsyncSession) -> list[int]:
        """Ids of the first rows that are due and wait for no other."""
        table, other = outbox_table, outbox_table.alias()
        held = sa.select(other.c.order_key).where(other.c.retry_at > 0, other.c.holds_order)
        query = (
            sa.select(table.c.id)
            .where(
                table.c.retry_at <= self._clock.time(),
                sa.or_(table.c.holds_order, table.c.order_key.not_in(held)),
            )
            .order_by(table.c.id)
            # While there is trouble, one row is the probe.
            .limit(1 if self._trouble else self._batch)
        )
        return list((await session.scalars(query)).all())

    async def _publish(self, rows: Sequence[Any], batch: _Batch) -> None:
        """Publish rows, each order text in its own order and different ones at the same time."""
        now = self._clock.time()
        orders: dict[str, list[Any]] = {}
        for row in rows:
            orders.setdefault(row.order_key, []).append(row)

        async def in_order(members: list[Any]) -> None:
            for row in members:
                if row.retry_at > now:
                    # Since we looked, another relay has tried it in vain.
                    if row.holds_order:
                        return
                    continue
                if batch.trouble is not None:
                    return
                try:
                    await self._bus.publish_message(_restored(row.properties, row.body), row.exchange, row.routing_key)
                except UnroutableError as error:
                    # Nobody listens, and perhaps never will; those behind it must not wait for that.
                    batch.stuck[row.id] = (row.attempts, error)
                except Exception as error:
                    batch.stuck[row.id] = (row.attempts, error)
                    if not _is_about_the_message(error):
                        # The broker is away; or it is this one message that it cannot take, which looks the same. The
                        # row waits, and another one is the next probe.
                        batch.trouble = error
                    return
                else:
                    batch.sent.append(row.id)

        await asyncio.gather(*(in_order(members) for members in orders.values()))

    async def _settle(self, session: AsyncSession, batch: _Batch) -> None:
        if batch.sent:
            await session.execute(outbox_table.delete().where(outbox_table.c.id.in_(batch.sent)))
        for row_id, (attempts, error) in batch.stuck.items():
            refused = _is_about_the_message(error)
            if refused:
                _log.warning("outbox %s: row %s stays: %s", self.name, row_id, error)
            wait = min(2.0 ** min(attempts, 16), self._LONGEST_REFUSED if refused else self._LONGEST_REST)
            await session.execute(
                outbox_table.update()
                .where(outbox_table.c.id == row_id)
                .values(
                    attempts=outbox_table.c.attempts + 1,
                    retry_at=self._clock.time() + wait,
                    holds_order=not isinstance(error, UnroutableError),
                    last_error=f"{type(error).__name__}: {error}"[:2000],
                )
            )

    async def _measure(self, *, force: bool) -> None:
        """Tell how many rows wait, every few seconds: on a large table, counting is work."""
        now = self._clock.now()
        if not force and now - self._measured_at < self._MEASURE_EVERY:
            return
        self._measured_at = now
        try:
            async with self._sessions() as session, session.begin():
                pending = await session.scalar(sa.select(sa.func.count()).select_from(outbox_table))
                first = sa.select(outbox_table.c.written_at).order_by(outbox_table.c.id).limit(1)
                oldest = await session.scalar(first)
        except Exception as error:
            self._say_trouble(error)
        else:
            emit(OutboxMeasured(source=self.name, pending=pending or 0, oldest=oldest))


def _is_about_the_message(error: Exception) -> bool:
    return isinstance(error, PublishError) and not isinstance(error, PublishTimeoutError)


def _rows(ids: Sequence[int]) -> sa.Select[Any]:
    return sa.select(outbox_table).where(outbox_table.c.id.in_(ids)).order_by(outbox_table.c.id)


@contextmanager
def _alone_with(file: str | None) -> Iterator[bool]:
    """Whether nobody else relays from this SQLite file while the block runs.

    SQLite knows no lock on rows. An exclusive one on an empty database beside it ends with the process that holds it,
    however that ends, and keeps nobody from writing into the real one.
    """
    if not file:
        yield True  # in memory: there is no other process
        return
    beside = sqlite3.connect(f"{file}-relay", timeout=0, isolation_level=None)
    try:
        try:
            beside.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            yield False
        else:
            yield True
    finally:
        beside.close()


# -- a message as a row -----------------------------------------------------------------------------------------------


def _stored(message: Message) -> tuple[str, bytes]:
    """A message as JSON text of everything but the body, and the body."""
    properties = {name.name: getattr(message, name.name) for name in dataclasses.fields(message) if name.name != "body"}
    return json.dumps({**properties, "headers": dict(message.headers)}, default=_tagged), message.body


def _restored(properties: str, body: bytes) -> Message:
    return Message(body=bytes(body), **json.loads(properties, object_hook=_untagged))


def _tagged(value: object) -> object:
    if isinstance(value, bytes | bytearray):
        return {"__bytes__": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, datetime):
        return {"__time__": value.astimezone(UTC).isoformat()}
    raise ConfigurationError(f"{type(value).__name__} in a message's headers cannot be written into an outbox.")


def _untagged(value: dict[str, Any]) -> Any:
    if value.keys() == {"__bytes__"}:
        return bytearray(base64.b64decode(value["__bytes__"]))
    if value.keys() == {"__time__"}:
        return datetime.fromisoformat(value["__time__"])
    return value
