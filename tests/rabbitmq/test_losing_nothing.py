"""Nothing confirmed is lost: the connection is cut at each step, and each message is handled, waits, or is a dead letter."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from bus_steps import QUEUE, CourseGranted, MakeBus, Outside, UserCreated, embedded, until

from meshkit.core.events import (
    BrokerConnectionChanged,
    DuplicateSkipped,
    Event,
    MessagePublished,
    MessageSettled,
    listen,
)
from meshkit.embedded import AmqpServer
from meshkit.errors import PublishError
from meshkit.messaging.message import Delivery
from meshkit.rabbitmq import RabbitBus
from meshkit.testing import servers

DLQ = f"{QUEUE}.dlq"


def outcomes(told: list[Event]) -> list[str]:
    return [event.outcome for event in told if isinstance(event, MessageSettled)]


@embedded
async def test_a_delivery_is_acknowledged_only_after_its_copy_is_confirmed(
    server: AmqpServer, make_bus: MakeBus, told: list[Event]
):
    """The copy is stored, its confirm is held back: so long the delivery stays in hand."""
    bus = make_bus(retry="2s", publish_timeout=0.3)

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        if delivery.attempt == 1:
            raise OSError

    await bus.start()
    await bus.publish(UserCreated(number=1))
    server.faults.drop_confirms(1)
    await until(lambda: any(server.queue(name).messages for name in server.queues() if name.startswith("meshkit.")))
    await asyncio.sleep(0.1)
    assert 1 == server.queue(QUEUE).unacked
    assert [] == outcomes(told)
    # It was not confirmed in time, so it is published again, under the same id; then, and only then, the ack.
    await until(lambda: "retry" in outcomes(told))
    await until(lambda: 0 == server.queue(QUEUE).unacked)
    copies = [
        message for name in server.queues() if name.startswith("meshkit.") for message in server.queue(name).messages
    ]
    assert 2 == len(copies)
    assert 1 == len({copy.properties.message_id for copy in copies})


@embedded
@pytest.mark.parametrize("refusal", ["nack", "timeout"])
async def test_a_copy_that_is_refused_keeps_its_message_in_hand(
    server: AmqpServer, make_bus: MakeBus, told: list[Event], refusal: str
):
    """Neither dropped nor acknowledged: published again until the broker takes it, and readiness says so meanwhile."""
    bus, entered = make_bus(retry="", publish_timeout=0.2), asyncio.Event()

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        entered.set()
        raise OSError

    await bus.start()
    await bus.publish(UserCreated(number=1))
    if refusal == "nack":
        server.faults.nack_publishes(2)
    else:
        server.faults.drop_confirms(2)
    await entered.wait()
    await until(lambda: any("dead-letter" in check.detail for check in bus.checks() if not check.ok))
    assert 1 == server.queue(QUEUE).unacked
    await until(lambda: ["dead_letter"] == outcomes(told))
    await until(lambda: all(check.ok for check in bus.checks()))
    await until(lambda: 0 == server.queue(QUEUE).unacked)
    assert 1 == len({message.properties.message_id for message in server.queue(DLQ).messages})


async def stored(bus: RabbitBus, number: int) -> str:
    """Publish until it is confirmed, under one id: the confirm that is held back may be this one's."""
    message_id = str(uuid.uuid4())
    while True:
        try:
            return await bus.publish(UserCreated(number=number), message_id=message_id)
        except PublishError:
            continue


@embedded
@pytest.mark.parametrize("role", ["publish", "consume", ""])
@pytest.mark.parametrize(
    "step",
    ["in the handler", "handler done", "copy sent, not confirmed", "copy confirmed, not acknowledged", "settled"],
)
async def test_cut_at_each_step(
    server: AmqpServer, make_bus: MakeBus, outside: Outside, told: list[Event], step: str, role: str
):
    """Whatever connection goes at whatever step, all messages end handled or as dead letters, under their own ids."""
    bus, handled, cuts = make_bus(retry="20ms, 50ms", prefetch=4, publish_timeout=0.3), set(), 0

    def cut() -> None:
        nonlocal cuts
        if cuts < 6:
            cuts += 1
            server.faults.cut_connections(role)

    def watch(event: Event) -> None:
        hop = isinstance(event, MessagePublished) and event.source in (DLQ, "meshkit.delay.50ms")
        if (step == "copy confirmed, not acknowledged" and hop) or (
            step == "settled" and isinstance(event, MessageSettled) and event.outcome != "requeue"
        ):
            cut()

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        if step == "in the handler":
            cut()
            await asyncio.sleep(0.01)
        failing = event.number % 2 or (event.number % 4 and delivery.attempt < 2)
        if not failing:
            handled.add(delivery.message_id)
        if step == "handler done":
            cut()
        elif step == "copy sent, not confirmed" and failing:
            server.faults.drop_confirms(1)
            asyncio.get_running_loop().call_later(0.03, cut)
        if failing:
            raise OSError

    await bus.start()
    stop = listen(watch, kind=Event)
    try:
        ids = [await stored(bus, number) for number in range(12)]
        await until(
            lambda: (
                6 == len(handled)
                and not server.queue(QUEUE).messages
                and not server.queue(QUEUE).unacked
                and not server.queue("meshkit.delay.50ms").messages
            )
        )
    finally:
        stop()
    dead = {message.properties.message_id for message in server.queue(DLQ).messages}
    assert set(ids) == handled | dead
    assert {ids[number] for number in range(0, 12, 2)} == handled
    assert cuts


@embedded
async def test_a_lost_acknowledgement_is_made_up_for(server: AmqpServer, make_bus: MakeBus, told: list[Event]):
    """The handler was done, the connection went before the ack: the redelivery is acknowledged without running it."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        seen.append(event.number)
        if event.number == 1:
            server.faults.cut_connections("consume")

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: any(isinstance(event, DuplicateSkipped) for event in told))
    await bus.publish(UserCreated(number=2))
    await until(lambda: [1, 2] == seen)
    await until(lambda: 0 == server.queue(QUEUE).unacked)


@embedded
async def test_a_redelivery_waits_for_the_handler_that_still_runs(server: AmqpServer, make_bus: MakeBus):
    """The connection goes while a handler runs: it is not run a second time beside itself."""
    bus, running, most, seen, may_end = make_bus(), 0, 0, [], asyncio.Event()

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        seen.append(event.number)
        await may_end.wait()
        running -= 1

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: seen)
    server.faults.cut_connections("consume")
    await until(lambda: 1 == server.queue(QUEUE).unacked and 1 == server.queue(QUEUE).consumers)
    await asyncio.sleep(0.05)
    may_end.set()
    await until(lambda: 0 == server.queue(QUEUE).unacked)
    assert (1, [1]) == (most, seen)


@embedded
async def test_of_two_redeliveries_one_is_handled(server: AmqpServer, make_bus: MakeBus):
    """The connection goes twice while a handler runs that then fails: only what came last is tried again, and alone."""
    bus, running, most, runs, may_end = make_bus(), 0, 0, 0, asyncio.Event()

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        nonlocal running, most, runs
        running, runs = running + 1, runs + 1
        most = max(most, running)
        try:
            if runs == 1:
                await may_end.wait()
                raise OSError
            await asyncio.sleep(0.1)
        finally:
            running -= 1

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: runs)
    for count in (1, 2):
        server.faults.cut_connections("consume")
        await until(lambda count=count: 1 + count == len(bus._consumers[0]._in_hand))
    may_end.set()
    await until(lambda: 2 <= runs and not bus._consumers[0]._in_hand and not server.queue(QUEUE).unacked)
    assert (2, 1) == (runs, most)


@embedded
async def test_a_trouble_that_is_over_is_not_told_for_ever(server: AmqpServer, make_bus: MakeBus):
    """A copy that could not be stored makes the consumer unready until the message has gone back to the broker."""
    bus, seen = make_bus(retry="50ms*3", prefetch=1), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        seen.append(delivery.attempt)
        if not delivery.redelivered:
            raise OSError

    await bus.start()
    await bus.publish(UserCreated(number=1))
    server.faults.nack_publishes()
    await until(lambda: any("cannot publish" in check.detail for check in bus.checks()))
    server.faults.restore()
    server.faults.cut_connections("consume")
    await until(lambda: all(check.ok for check in bus.checks()))
    await until(lambda: [1, 2, 1] == seen)


@embedded
async def test_reconnects_are_told_and_readiness_follows(server: AmqpServer, make_bus: MakeBus, told: list[Event]):
    """The first connection is no reconnect; while there is none the checks are red and say why."""
    bus = make_bus()
    bus.subscribe(UserCreated)(lambda event: None)
    await bus.start()
    await until(lambda: all(check.ok for check in bus.checks()))
    server.faults.refuse_connections()
    await until(lambda: not any(check.ok for check in bus.checks()))
    assert all(check.detail for check in bus.checks())
    server.faults.restore()
    await until(lambda: all(check.ok for check in bus.checks()))
    changes = [event for event in told if isinstance(event, BrokerConnectionChanged) and event.source == "consume"]
    assert [(True, False), (False, False), (True, True)] == [(one.connected, one.reconnect) for one in changes]


@embedded
async def test_a_broker_that_is_away_at_the_start_is_waited_for(server: AmqpServer, make_bus: MakeBus):
    """Starting returns, with red checks; everything works once the broker is there."""
    server.faults.refuse_connections()
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        seen.append(event.number)

    await bus.start()
    assert not any(check.ok for check in bus.checks())
    server.faults.restore()
    await until(lambda: all(check.ok for check in bus.checks()))
    await bus.publish(UserCreated(number=1))
    await until(lambda: [1] == seen)


@embedded
async def test_a_refused_login_is_said_in_the_checks(server: AmqpServer, make_bus: MakeBus):
    """The password is wrong: readiness says that, and the service may be mended while it runs."""
    server.faults.refuse_logins()
    bus = make_bus()
    await bus.start()
    assert {"the broker refused the login"} == {check.detail for check in bus.checks()}
    server.faults.restore()
    await until(lambda: all(check.ok for check in bus.checks()))


def started() -> servers.RabbitMQ:
    server = servers.RabbitMQ()
    try:
        server.start()
    except BaseException:
        server.close()
        raise
    return server


@pytest.mark.real("rabbitmq")
async def test_a_broker_that_is_killed_and_started_again(told: list[Event]):
    """SIGKILL in the middle, then the same data folder: what was confirmed is handled or a dead letter, and the bus
    goes on by itself."""
    server = await asyncio.to_thread(started)
    url = f"amqp://guest:guest@127.0.0.1:{server.port}/"
    bus = RabbitBus(url, "course-service", retry="20ms, 100ms*2", publish_timeout=30.0)
    handled: set[str] = set()

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        await bus.publish(CourseGranted(number=event.number))
        await asyncio.sleep(0.002)
        if event.number % 5 == 0:
            raise OSError
        if event.number % 3 == 0 and delivery.attempt < 3:
            raise OSError
        handled.add(delivery.message_id)

    granted: set[int] = set()

    @bus.subscribe(CourseGranted)
    async def on_granted(event: CourseGranted) -> None:
        granted.add(event.number)

    outside = Outside(url)
    try:
        await bus.start()
        ids: dict[int, str] = {}

        async def publish(numbers: range) -> None:
            for number in numbers:
                ids[number] = await bus.publish(UserCreated(number=number))

        await publish(range(40))
        # RabbitMQ 3.10 may never elect a leader for a quorum queue that was declared just before the kill.
        await asyncio.sleep(3)
        publishing = [asyncio.create_task(publish(range(start, 400, 4))) for start in range(40, 44)]
        await until(lambda: 140 <= len(ids))
        server.kill()
        await asyncio.sleep(0.2)
        await asyncio.to_thread(server.start)
        await asyncio.gather(*publishing)
        wanted = {ids[number] for number in range(400) if number % 5}
        await until(lambda: wanted <= handled, within=60)
        await until(lambda: granted == set(range(400)), within=60)
        dead: set[str] = set()
        async with asyncio.timeout(60):
            while len(dead) < 80:
                dead |= {str(message.message_id) for message in await outside.take(DLQ)}
                await asyncio.sleep(0.1)
        assert {ids[number] for number in range(0, 400, 5)} == dead
    finally:
        await outside.close()
        await bus.drain(5.0)
        await bus.close()
        await asyncio.to_thread(server.close)
