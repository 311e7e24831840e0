"""Publishing: a confirm for each message, or an error that says why not."""

from __future__ import annotations

import asyncio

import pytest
from bus_steps import CourseGranted, MakeBus, Outside, UserCreated, embedded, until

from meshkit.core.events import BrokerBlocked, BrokerConnectionChanged, Event, MessagePublished
from meshkit.embedded import AmqpServer
from meshkit.errors import ConfigurationError, PublishError, PublishNackedError, PublishTimeoutError, UnroutableError
from meshkit.messaging.headers import without_broker_headers
from meshkit.messaging.message import Message


async def test_a_published_event_is_in_the_queue(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """When publish returns, a queue has the message, persistent, with its id and envelope."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus()
    await bus.start()
    message_id = await bus.publish(UserCreated(number=7))
    (message,) = await outside.take("audit")
    assert (message_id, b'{"number":7}', 2) == (message.message_id, message.body, message.delivery_mode)
    assert ("user.created", "course-service") == (message.headers["ce-type"], message.headers["ce-source"])
    assert [("user-events", "confirmed")] == [
        (event.source, event.outcome) for event in told if isinstance(event, MessagePublished)
    ]


async def test_an_event_without_a_queue_raises(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """Nobody is bound: the broker returned it, and the caller hears of it."""
    await outside.bind("audit", "user-events", "user.deleted")
    bus = make_bus()
    await bus.start()
    with pytest.raises(UnroutableError, match=r"reached no queue"):
        await bus.publish(UserCreated(number=1))
    assert ["returned"] == [event.outcome for event in told if isinstance(event, MessagePublished)]


async def test_a_missing_exchange_raises_and_hits_nobody_else(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """Such a publish would close its channel, and with it perhaps the connection; it is not even sent."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus()
    await bus.start()
    results = await asyncio.gather(
        *(bus.publish(CourseGranted(number=number)) for number in range(5)),
        *(bus.publish(UserCreated(number=number)) for number in range(5)),
        return_exceptions=True,
    )
    assert [UnroutableError] * 5 == [type(result) for result in results[:5]]
    assert [str] * 5 == [type(result) for result in results[5:]]
    assert 5 == await outside.depth("audit")
    assert all(event.connected for event in told if isinstance(event, BrokerConnectionChanged))


async def test_twenty_publishes_with_one_id_each_get_their_own_answer(make_bus: MakeBus, outside: Outside):
    """Returns are matched by message id; half of these have no queue, and it is those that raise."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus()
    await bus.start()
    results = await asyncio.gather(
        *(
            bus.publish(UserCreated(number=number), key=None if number % 2 else "nobody", message_id="same")
            for number in range(20)
        ),
        return_exceptions=True,
    )
    assert [UnroutableError, str] * 10 == [type(result) for result in results]
    assert 10 == await outside.depth("audit")


async def test_a_message_that_is_no_amqp_raises(make_bus: MakeBus, outside: Outside):
    """It fails alone, and says why; the next one goes through."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus()
    await bus.start()
    with pytest.raises(PublishError, match="cannot be written as AMQP"):
        await bus.publish_message(Message(body=b"", message_id="1", headers={"odd": object()}), "user-events", "k")
    with pytest.raises(PublishError, match="cannot be written as AMQP"):
        await bus.publish(UserCreated(number=1), key="k" * 256)
    await bus.publish(UserCreated(number=1))


async def test_an_envelope_can_be_published_later(make_bus: MakeBus, outside: Outside):
    """What an outbox wrote down goes out as it is, under its own id."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus()
    await bus.start()
    message, exchange, key = bus.envelope(UserCreated(number=1))
    await bus.publish_message(message, exchange, key)
    (found,) = await outside.take("audit")
    assert (message.message_id, message.body) == (found.message_id, found.body)
    assert dict(message.headers) == without_broker_headers(found.headers)


async def test_headers_that_are_too_large_are_made_to_fit(make_bus: MakeBus, outside: Outside):
    """A header table over the size of a frame would close the connection with all that is in flight."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus()
    await bus.start()
    headers = {"meshkit-error-stack": "s" * 200_000, "theirs": "x" * 200_000, "small": "kept"}
    await bus.publish_message(Message(body=b"", message_id="1", headers=headers), "user-events", "user.created")
    (found,) = await outside.take("audit")
    assert "kept" == found.headers["small"]


async def test_a_closed_bus_says_so_at_once(make_bus: MakeBus, outside: Outside):
    """Nobody waits for a connection that will not come."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus()
    await bus.start()
    await bus.publish(UserCreated(number=1))
    await bus.close()
    async with asyncio.timeout(1):
        with pytest.raises(PublishError, match="closed"):
            await bus.publish(UserCreated(number=2))


# -- a broker that misbehaves -----------------------------------------------------------------------------------------


@embedded
async def test_a_refused_message_raises(server: AmqpServer, make_bus: MakeBus, outside: Outside, told: list[Event]):
    """A nack, from a full queue say, is an error and no retry."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus()
    await bus.start()
    server.faults.nack_publishes(1)
    with pytest.raises(PublishNackedError):
        await bus.publish(UserCreated(number=1))
    assert ["nacked"] == [event.outcome for event in told if isinstance(event, MessagePublished)]
    await bus.publish(UserCreated(number=1))


@embedded
async def test_a_confirm_that_does_not_come_raises(
    server: AmqpServer, make_bus: MakeBus, outside: Outside, told: list[Event]
):
    """Whether the message is stored is not known; the same id can be published again at once."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus(publish_timeout=0.2)
    await bus.start()
    server.faults.drop_confirms(1)
    with pytest.raises(PublishTimeoutError):
        await bus.publish(UserCreated(number=1), message_id="1")
    await bus.publish(UserCreated(number=1), message_id="1")
    assert ["timeout", "confirmed"] == [event.outcome for event in told if isinstance(event, MessagePublished)]
    assert ["1", "1"] == [message.message_id for message in await outside.take("audit")]


@embedded
async def test_no_broker_raises_in_time(server: AmqpServer, make_bus: MakeBus):
    """Without a connection a publish waits for one, and no longer than it may."""
    bus = make_bus(publish_timeout=0.2)
    server.faults.refuse_connections()
    await bus.start()
    with pytest.raises(PublishTimeoutError):
        await bus.publish(UserCreated(number=1))


@embedded
async def test_a_publish_goes_on_over_the_next_connection(server: AmqpServer, make_bus: MakeBus, outside: Outside):
    """The connection goes before the confirms come: the same ids are published again, and nobody hears of it."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus()
    await bus.start()
    await bus.publish(UserCreated(number=0))
    server.faults.drop_confirms()
    publishing = [asyncio.create_task(bus.publish(UserCreated(number=number))) for number in range(1, 6)]
    await until(lambda: 6 == len(server.queue("audit").messages))
    server.faults.restore()
    server.faults.cut_connections("publish")
    ids = set(await asyncio.gather(*publishing))
    found = [message.message_id for message in await outside.take("audit")]
    assert 11 == len(found)
    assert ids <= set(found)
    assert 6 == len(set(found))


@embedded
async def test_a_closed_channel_is_replaced(server: AmqpServer, make_bus: MakeBus, outside: Outside):
    """One bad publish of another closes the channel; those that were on it are published again."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus()
    await bus.start()
    await bus.publish(UserCreated(number=0))
    server.faults.drop_confirms(1)
    publishing = asyncio.create_task(bus.publish(UserCreated(number=1)))
    await until(lambda: 2 == len(server.queue("audit").messages))
    server.faults.close_channels(406, "closed by a test", "publish")
    await publishing
    assert 3 == len(server.queue("audit").messages)


@embedded
async def test_no_more_are_in_flight_than_may_be(server: AmqpServer, make_bus: MakeBus, outside: Outside):
    """The next one waits for a place, and gets it when a confirm comes."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus(in_flight=3, publish_timeout=1.0)
    await bus.start()
    await bus.publish(UserCreated(number=0))
    server.faults.drop_confirms()
    publishing = [asyncio.create_task(bus.publish(UserCreated(number=number))) for number in range(5)]
    await until(lambda: 4 == len(server.queue("audit").messages))
    await asyncio.sleep(0.05)
    assert 4 == len(server.queue("audit").messages)
    server.faults.restore()
    server.faults.cut_connections("publish")
    assert 5 == len(await asyncio.gather(*publishing))


@embedded
async def test_a_blocked_connection_is_told_and_recovers(
    server: AmqpServer, make_bus: MakeBus, outside: Outside, told: list[Event]
):
    """Under a memory alarm publishes time out, readiness says why, and all goes on when the alarm is over."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus(publish_timeout=2.0)
    await bus.start()
    await bus.publish(UserCreated(number=0))
    server.faults.block_publishers()
    with pytest.raises(PublishTimeoutError, match="blocks"):
        await bus.publish(UserCreated(number=1), message_id="1")
    assert ["rabbitmq publish"] == [check.name for check in bus.checks() if not check.ok]
    server.faults.restore()
    await bus.publish(UserCreated(number=1), message_id="1")
    assert [True, False] == [event.blocked for event in told if isinstance(event, BrokerBlocked)]


@embedded
async def test_cancelling_a_publish_harms_no_other(server: AmqpServer, make_bus: MakeBus, outside: Outside):
    """Those that share the channel get their confirms."""
    await outside.bind("audit", "user-events", "user.created")
    bus = make_bus()
    await bus.start()
    await bus.publish(UserCreated(number=0))
    server.faults.drop_confirms(1)
    gone = asyncio.create_task(bus.publish(UserCreated(number=1)))
    await until(lambda: 2 == len(server.queue("audit").messages))
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert gone.cancelled()
    await asyncio.gather(*(bus.publish(UserCreated(number=number)) for number in range(2, 6)))
    assert 6 == len(server.queue("audit").messages)


async def test_another_event_loop_is_refused(make_bus: MakeBus, outside: Outside):
    """A bus belongs to the loop it was started in: it says so, and goes on there."""
    bus = make_bus()
    await outside.bind("audit", "user-events", "user.created")
    await bus.start()

    def elsewhere() -> None:
        with pytest.raises(ConfigurationError, match="another event loop"):
            asyncio.run(bus.publish(UserCreated(number=1)))

    await asyncio.to_thread(elsewhere)
    await bus.publish(UserCreated(number=2))
    assert 1 == await outside.depth("audit")


async def test_a_bus_that_is_only_connected_publishes_and_takes_nothing(make_bus: MakeBus):
    """Between `connect` and `start` an app may publish, and no handler runs yet."""
    bus, handled = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        handled.append(event.number)

    await bus.connect()
    await bus.publish(UserCreated(number=1))
    assert [] == handled
    await bus.start()
    await until(lambda: [1] == handled)
