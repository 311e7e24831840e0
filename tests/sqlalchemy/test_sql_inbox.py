"""The inbox: a handler takes effect once for each message."""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa
from sql_steps import RecordingBus, Sessions, count, delivery, effects, waiting
from sqlalchemy.ext.asyncio import AsyncEngine

from meshkit.errors import ConfigurationError, DeadLetter, EnvelopeError
from meshkit.messaging.inbox import AlreadyHandled
from meshkit.sqlalchemy import SqlInbox, SqlOutbox, inbox_table
from meshkit.testing.clock import ManualClock


async def handle(inbox: SqlInbox, message_id: str, *, queue: str = "a.b", pause: float = 0.0) -> str:
    """Handle one delivery, and say what became of it."""
    try:
        async with inbox.open(delivery(message_id, queue)) as session:
            await asyncio.sleep(pause)
            await session.execute(effects.insert().values(what=message_id))
    except AlreadyHandled:
        return "skipped"
    return "done"


async def test_a_second_delivery_is_skipped(engine: AsyncEngine, sessions: Sessions):
    """A message that comes twice takes effect once."""
    inbox = SqlInbox(sessions)

    assert ["done", "skipped"] == [await handle(inbox, "m1"), await handle(inbox, "m1")]
    assert 1 == await count(engine, effects)


async def test_duplicates_at_the_same_time_take_effect_once(engine: AsyncEngine, sessions: Sessions):
    """Of several deliveries of one message at the same time one takes effect; the others wait for it, and are skipped."""
    inbox = SqlInbox(sessions)

    outcomes = await asyncio.gather(*(handle(inbox, "m1", pause=0.05) for _ in range(4)))

    assert ["done", "skipped", "skipped", "skipped"] == sorted(outcomes)
    assert 1 == await count(engine, effects)


async def test_a_waiting_duplicate_takes_over_from_one_that_fails(engine: AsyncEngine, sessions: Sessions):
    """A duplicate that waits for a first delivery is handled where that one fails."""
    inbox = SqlInbox(sessions)
    begun = asyncio.Event()

    async def fail() -> None:
        async with inbox.open(delivery("m1", "a.b")):
            begun.set()
            await asyncio.sleep(0.1)
            raise ValueError

    failing = asyncio.create_task(fail())
    await begun.wait()

    assert "done" == await handle(inbox, "m1")
    with pytest.raises(ValueError):
        await failing
    assert 1 == await count(engine, effects)


@pytest.mark.parametrize(
    "error", [ValueError(), DeadLetter("no"), asyncio.CancelledError()], ids=lambda e: type(e).__name__
)
async def test_a_failure_leaves_nothing_behind(
    engine: AsyncEngine, sessions: Sessions, bus: RecordingBus, error: BaseException
):
    """What a handler did before it failed, was cancelled or gave a verdict is undone: effect, inbox row and events."""
    inbox, outbox = SqlInbox(sessions), SqlOutbox(sessions, bus)

    async def fail() -> None:
        async with inbox.open(delivery("m1")) as session:
            await session.execute(effects.insert().values(what="m1"))
            await outbox.publish(session, "hello")
            raise error

    with pytest.raises(type(error)):
        await fail()

    assert (0, 0, []) == (await count(engine, effects), await count(engine, inbox_table), await waiting(engine))


async def test_a_handler_does_not_commit_the_inbox_away(engine: AsyncEngine, sessions: Sessions):
    """A commit in the middle would have what fails after it taken for done: it is refused, and all is undone. Savepoints
    are free."""
    inbox = SqlInbox(sessions)

    async def commit_and_fail() -> None:
        async with inbox.open(delivery("m1")) as session:
            async with session.begin_nested():
                await session.execute(effects.insert().values(what="m1"))
            await session.commit()
            raise OSError

    with pytest.raises(ConfigurationError, match="committed the transaction of its inbox"):
        await commit_and_fail()

    assert (0, 0) == (await count(engine, effects), await count(engine, inbox_table))
    assert "done" == await handle(inbox, "m1")


async def test_effect_and_events_are_one_transaction(engine: AsyncEngine, sessions: Sessions, bus: RecordingBus):
    """Inbox row, the handler's work and its events are committed together, and a duplicate adds no event."""
    inbox, outbox = SqlInbox(sessions), SqlOutbox(sessions, bus)

    for _ in range(2):
        try:
            async with inbox.open(delivery("m1")) as session:
                await session.execute(effects.insert().values(what="m1"))
                await outbox.publish(session, "hello")
                assert [] == await waiting(engine)
        except AlreadyHandled:
            pass

    assert 1 == await count(engine, effects)
    assert [b"hello"] == [row.body for row in await waiting(engine)]


async def test_consumers_have_inboxes_of_their_own(engine: AsyncEngine, sessions: Sessions):
    """The same message takes effect once in each queue, and ids that differ in case only are two."""
    inbox = SqlInbox(sessions)

    outcomes = [await handle(inbox, *key) for key in (("m1",), ("M1",))]
    outcomes += [await handle(inbox, "m1", queue="c.d")]

    assert ["done", "done", "done"] == outcomes


async def test_refuses_a_message_without_an_id(sessions: Sessions):
    """A message that has no id cannot be known again: its envelope does not hold what it should."""
    with pytest.raises(EnvelopeError, match="has no message_id"):
        async with SqlInbox(sessions).open(delivery("")):
            pass


async def test_a_broken_rule_of_the_users_is_no_duplicate(engine: AsyncEngine, sessions: Sessions):
    """A constraint that the handler itself violates is its own error."""
    inbox = SqlInbox(sessions)

    async def break_it() -> None:
        async with inbox.open(delivery("m1")) as session:
            for _ in range(2):
                await session.execute(inbox_table.insert().values(consumer="x", message_id="y", handled_at=0.0))

    with pytest.raises(sa.exc.IntegrityError):
        await break_it()

    assert 0 == await count(engine, inbox_table)


async def test_forgets_what_is_old(engine: AsyncEngine, sessions: Sessions):
    """Rows older than asked for go, younger ones stay."""
    clock = ManualClock()
    inbox = SqlInbox(sessions, clock=clock)
    await handle(inbox, "old")
    await clock.advance(100.0)
    await handle(inbox, "young")

    assert 1 == await inbox.forget(older_than=50.0)
    assert ["done", "skipped"] == [await handle(inbox, "old"), await handle(inbox, "young")]
