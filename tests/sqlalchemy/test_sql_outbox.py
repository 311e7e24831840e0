"""The outbox: what is committed is published, in order, and nothing else is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from sql_steps import RecordingBus, Sessions, effects, until, waiting
from sqlalchemy.ext.asyncio import AsyncEngine

from meshkit.core.events import OutboxMeasured, listen
from meshkit.errors import ConfigurationError, PublishError, PublishNackedError, PublishTimeoutError, UnroutableError
from meshkit.messaging.message import Message
from meshkit.sqlalchemy import OutboxRelay, SqlOutbox
from meshkit.testing.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(hold=True)


@pytest.fixture
def outbox(sessions: Sessions, bus: RecordingBus, clock: ManualClock) -> SqlOutbox:
    return SqlOutbox(sessions, bus, clock=clock)


@pytest.fixture
async def relay(outbox: SqlOutbox) -> AsyncIterator[OutboxRelay]:
    """A relay that runs; by the clock it looks by itself only when that is moved."""
    relay = outbox.relay(poll=5.0)
    await relay.start()
    yield relay
    await relay.close()


@pytest.fixture
def measured() -> Iterator[list[OutboxMeasured]]:
    heard: list[OutboxMeasured] = []
    stop = listen(heard.append, kind=OutboxMeasured)
    yield heard
    stop()


async def say(sessions: Sessions, outbox: SqlOutbox, *events: str, order: str = "") -> None:
    async with sessions() as session, session.begin():
        for event in events:
            await outbox.publish(session, event, order=order)


def refusing(**errors: Exception) -> object:
    """What a bus refuses: the text of an event, and the error."""
    return lambda message: errors.get(message.body.decode())


async def test_publishes_at_the_commit_and_not_before(
    engine: AsyncEngine, sessions: Sessions, outbox: SqlOutbox, bus: RecordingBus, relay: OutboxRelay
):
    """An event is published as soon as its transaction has been committed, without waiting for a poll, and then gone."""
    async with sessions() as session:
        await outbox.publish(session, "hello")
        await asyncio.sleep(0.05)
        assert 0 == bus.tried
        await session.commit()
    await until(lambda: bus.said == ["hello"])

    await relay.drain(5.0)
    assert [] == await waiting(engine)


async def test_wakes_for_each_commit_of_a_session(
    sessions: Sessions, outbox: SqlOutbox, bus: RecordingBus, relay: OutboxRelay
):
    """A session that commits again and again, with savepoints in between, has each commit published at once."""
    async with sessions() as session:
        for event in ("one", "two"):
            async with session.begin():
                async with session.begin_nested():
                    await outbox.publish(session, event)
                await asyncio.sleep(0.02)
            await until(lambda event=event: bus.said[-1:] == [event])


async def test_a_rollback_publishes_nothing(
    engine: AsyncEngine, sessions: Sessions, outbox: SqlOutbox, bus: RecordingBus, relay: OutboxRelay
):
    """An event of a transaction that was rolled back is never seen."""
    async with sessions() as session:
        await outbox.publish(session, "never")
        await session.rollback()
        await outbox.publish(session, "hello")
        await session.commit()
    await until(lambda: len(bus.said) > 0)
    await relay.drain(5.0)

    assert ["hello"] == bus.said
    assert [] == await waiting(engine)


async def test_the_message_arrives_as_it_was_written(
    sessions: Sessions, outbox: SqlOutbox, bus: RecordingBus, relay: OutboxRelay
):
    """What is published equals the envelope that was written: id, trace context, times and types of headers."""
    written: list[Message] = []
    made = bus.envelope
    bus.envelope = lambda event, *, key=None: written.append(made(event)[0]) or (written[-1], "sayings", "said")  # type: ignore[method-assign]

    async with sessions() as session, session.begin():
        given = await outbox.publish(session, "hello \0 é ✓")
    await until(lambda: len(bus.published) == 1)

    assert written == bus.published
    assert given == bus.published[0].message_id


async def test_keeps_the_order_of_each_text(engine: AsyncEngine, sessions: Sessions, bus: RecordingBus):
    """Events with one order text are published one after the other as they were written; others do not wait for them."""
    outbox = SqlOutbox(sessions, bus)
    for n in range(5):
        for order in ("a", "b"):
            await say(sessions, outbox, f"{order}{n}", order=order)
    bus.pause = 0.002

    assert 10 == await outbox.relay(batch=4).publish_pending()

    assert [f"a{n}" for n in range(5)] == [said for said in bus.said if said[0] == "a"]
    assert [f"b{n}" for n in range(5)] == [said for said in bus.said if said[0] == "b"]
    assert [] == await waiting(engine)


async def test_two_relays_publish_each_event_once_and_in_order(
    engine: AsyncEngine, sessions: Sessions, bus: RecordingBus
):
    """Relays that work on one table at the same time neither lose, repeat nor reorder."""
    outbox = SqlOutbox(sessions, bus)
    bus.pause = 0.001
    relays = [outbox.relay(name=name, poll=0.01, batch=7) for name in ("one", "other")]
    for relay in relays:
        await relay.start()
    for n in range(0, 60, 3):
        await say(sessions, outbox, *(f"{n + more:02d}" for more in range(3)))
    await until(lambda: len(bus.said) >= 60)
    for relay in relays:
        await relay.drain(5.0)
        await relay.close()

    assert [f"{n:02d}" for n in range(60)] == bus.said
    assert [] == await waiting(engine)


async def test_writers_do_not_wait_for_a_relay(sessions: Sessions, outbox: SqlOutbox, bus: RecordingBus):
    """While a relay waits for the broker, services go on committing events."""
    await say(sessions, outbox, *map(str, range(10)))
    bus.pause = 1.0
    publishing = asyncio.create_task(outbox.relay().publish_pending())
    await until(lambda: bus.tried == 1)

    async with asyncio.timeout(0.8):
        for n in range(10, 15):
            await say(sessions, outbox, str(n), order=str(n))

    publishing.cancel()
    await asyncio.gather(publishing, return_exceptions=True)


async def test_one_that_nobody_is_bound_for_holds_up_none(
    engine: AsyncEngine, sessions: Sessions, outbox: SqlOutbox, bus: RecordingBus, clock: ManualClock
):
    """Unroutable events stay, with the error, and are tried again later; however many there are, all others go."""
    bus.refuse = lambda message: UnroutableError("nobody is bound") if message.body.startswith(b"lost") else None
    await say(sessions, outbox, *(f"lost{n}" for n in range(5)), "hello")
    relay = outbox.relay(batch=2)

    assert 1 == await relay.publish_pending()
    assert ["hello"] == bus.said
    assert [(1, "UnroutableError: MK202  nobody is bound")] * 5 == [
        (row.attempts, row.last_error) for row in await waiting(engine)
    ]
    tried = bus.tried
    assert 0 == await relay.publish_pending()
    assert tried == bus.tried

    bus.refuse = lambda message: None
    await clock.advance(60.0)
    assert 5 == await relay.publish_pending()
    assert [] == await waiting(engine)


@pytest.mark.parametrize("error", [PublishNackedError("full"), PublishError("cannot be written")], ids=lambda e: e.code)
async def test_one_that_is_refused_holds_up_its_own_order_only(
    engine: AsyncEngine, sessions: Sessions, outbox: SqlOutbox, bus: RecordingBus, clock: ManualClock, error: Exception
):
    """Behind an event that the broker refuses those with the same order text wait, in order, and no others."""
    bus.refuse = refusing(a1=error)  # type: ignore[assignment]
    for n in range(3):
        await say(sessions, outbox, f"a{n}", order="a")
        await say(sessions, outbox, f"b{n}", order="b")
    relay = outbox.relay(batch=2)

    assert 4 == await relay.publish_pending()
    assert {"a0", "b0", "b1", "b2"} == set(bus.said)
    assert [("a1", 1), ("a2", 0)] == [(row.body.decode(), row.attempts) for row in await waiting(engine)]

    bus.refuse = lambda message: None
    assert 0 == await relay.publish_pending()
    await clock.advance(60.0)
    assert 2 == await relay.publish_pending()
    assert ["a1", "a2"] == bus.said[-2:]


async def test_a_broker_that_is_away_loses_nothing(
    engine: AsyncEngine,
    sessions: Sessions,
    outbox: SqlOutbox,
    bus: RecordingBus,
    relay: OutboxRelay,
    clock: ManualClock,
    caplog: pytest.LogCaptureFixture,
):
    """While the broker is away commits go on and the relay says so; when it is back all are published in order."""
    bus.refuse = lambda message: PublishTimeoutError("no confirm")
    await say(sessions, outbox, "0")
    await until(lambda: bool(relay.checks()[0].detail))
    for n in range(1, 5):
        await say(sessions, outbox, str(n))

    (check,) = relay.checks()
    assert (False, False) == (check.ok, check.required)
    assert "no confirm" in check.detail
    assert 1 == len([record for record in caplog.records if "the rows stay" in record.message])
    tried = bus.tried
    assert 3 > tried

    bus.refuse = lambda message: None
    for _ in range(12):
        await clock.advance(1.0)
        await asyncio.sleep(0.05)
    await until(lambda: len(bus.said) == 5)

    assert ["0", "1", "2", "3", "4"] == bus.said
    await until(lambda: relay.checks()[0].ok)


async def test_a_message_that_breaks_the_broker_does_not_hold_up_the_others(
    sessions: Sessions, outbox: SqlOutbox, bus: RecordingBus
):
    """A row that fails in a way that could be the broker's is not the first to be tried next time."""
    bus.refuse = refusing(poison=PublishTimeoutError("no confirm"))  # type: ignore[assignment]
    await say(sessions, outbox, "poison", order="p")
    await say(sessions, outbox, "hello", order="h")
    relay = outbox.relay(batch=1)

    with pytest.raises(PublishTimeoutError):
        await relay.publish_pending()
    assert 1 == await relay.publish_pending()

    assert ["hello"] == bus.said


async def test_what_was_confirmed_before_a_cancellation_is_not_published_again(
    engine: AsyncEngine, sessions: Sessions, outbox: SqlOutbox, bus: RecordingBus
):
    """A relay that is cancelled takes along what the broker has confirmed."""
    await say(sessions, outbox, *map(str, range(10)))
    bus.pause = 0.01
    publishing = asyncio.create_task(outbox.relay().publish_pending())
    await until(lambda: len(bus.said) >= 3)
    publishing.cancel()
    await asyncio.gather(publishing, return_exceptions=True)
    bus.pause = 0.0

    await outbox.relay().publish_pending()

    assert [str(n) for n in range(10)] == bus.said


async def test_drains_at_the_end(engine: AsyncEngine, sessions: Sessions, bus: RecordingBus):
    """Draining publishes what is committed, also by handlers that end meanwhile; then the relay ends."""
    outbox = SqlOutbox(sessions, bus)
    relay = outbox.relay(poll=60.0)
    await say(sessions, outbox, "before")
    await relay.start()
    await relay.drain(5.0)
    await say(sessions, outbox, "meanwhile")
    await relay.close()

    assert ["before", "meanwhile"] == bus.said
    assert [] == await waiting(engine)
    assert not relay.checks()[0].ok


async def test_does_not_wait_for_a_broker_that_is_away_at_the_end(
    engine: AsyncEngine, sessions: Sessions, bus: RecordingBus
):
    """Where the broker is away the relay ends in time, and the rows stay."""
    bus.pause = 30.0
    outbox = SqlOutbox(sessions, bus)
    relay = outbox.relay()
    await say(sessions, outbox, "hello")
    await relay.start()

    async with asyncio.timeout(5.0):
        await relay.drain(0.1)
        await relay.close()

    assert [b"hello"] == [row.body for row in await waiting(engine)]


async def test_tells_how_much_waits(
    sessions: Sessions,
    outbox: SqlOutbox,
    bus: RecordingBus,
    clock: ManualClock,
    measured: list[OutboxMeasured],
):
    """How many rows wait, and since when the oldest does, is told while the broker is away and once all is published."""
    bus.refuse = lambda message: PublishTimeoutError("no confirm")
    since = clock.time()
    await say(sessions, outbox, "one", "two")
    relay = outbox.relay(name="mine")
    await relay.start()
    await until(lambda: len(measured) > 0)
    assert [("mine", 2, since)] == [(event.source, event.pending, event.oldest) for event in measured]

    bus.refuse = lambda message: None
    await clock.advance(10.0)
    await until(lambda: measured[-1].pending == 0)
    assert measured[-1].oldest is None
    await relay.close()


async def test_a_table_that_is_missing_is_said_and_waited_for(
    engine: AsyncEngine, sessions: Sessions, bus: RecordingBus, caplog: pytest.LogCaptureFixture
):
    """A database in trouble does not end the relay: it says so, and goes on when the trouble is over."""
    outbox = SqlOutbox(sessions, bus)
    from meshkit.sqlalchemy import create_tables, metadata

    async with engine.begin() as connection:
        await connection.run_sync(metadata.drop_all)
    relay = outbox.relay(poll=0.05)
    await relay.start()
    await until(lambda: bool(relay.checks()[0].detail))
    await create_tables(engine)
    await say(sessions, outbox, "hello")
    await until(lambda: bus.said == ["hello"])
    await relay.close()

    assert "meshkit_outbox" in caplog.text


@pytest.mark.parametrize("wrong", [{"poll": 0.0}, {"batch": 0}])
async def test_refuses_what_cannot_work(outbox: SqlOutbox, wrong: dict[str, float]):
    """Settings that cannot work are refused, with what would be right."""
    with pytest.raises(ConfigurationError, match="above"):
        outbox.relay(**wrong)  # type: ignore[arg-type]


def test_effects_are_the_users_own():
    """The tables of meshkit are in a metadata of their own, beside the user's."""
    from meshkit.sqlalchemy import metadata

    assert {"meshkit_inbox", "meshkit_outbox"} == set(metadata.tables)
    assert "effects" not in metadata.tables
    assert effects.metadata is not metadata


async def test_starting_twice_makes_one_relay(relay: OutboxRelay):
    """A second start changes nothing, and leaves nobody behind who would go on after the close."""
    await relay.start()
    await relay.close()
    assert [] == [task for task in asyncio.all_tasks() if "relay" in task.get_name()]
