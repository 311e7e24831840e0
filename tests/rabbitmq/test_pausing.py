"""The pause: an outage of what a handler calls costs no attempts and no dead letters."""

from __future__ import annotations

import asyncio

import pytest
from bus_steps import QUEUE, MakeBus, Outside, UserCreated, embedded, until

from meshkit import Backoff, Pipeline, Retry
from meshkit.core.events import (
    ConsumerPaused,
    ConsumerProbed,
    ConsumerResumed,
    Event,
    MessageDeadLettered,
    MessageRetried,
    MessageSettled,
)
from meshkit.embedded import AmqpServer
from meshkit.errors import BulkheadFullError, RetryLater
from meshkit.messaging.message import Delivery
from meshkit.policies.circuit_breaker import CircuitBreaker

DLQ = f"{QUEUE}.dlq"


class Provider:
    """Something that is up or down, behind a circuit breaker."""

    def __init__(self, **breaker: object) -> None:
        self.up = True
        self.calls = 0
        self.breaker = CircuitBreaker(
            "provider",
            **{"min_calls": 3, "window": 4, "open_for": 0.3, **breaker},  # type: ignore[arg-type]
        )
        self.charge = self.breaker(self._charge)

    async def _charge(self) -> None:
        self.calls += 1
        await asyncio.sleep(0)
        if not self.up:
            raise ConnectionError("provider is down")


def told_of(told: list[Event], kind: type[Event]) -> list[Event]:
    return [event for event in told if isinstance(event, kind)]


async def test_an_outage_costs_no_dead_letters(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """While the breaker is open the consumer pauses and probes with one message; on repair all is handled, and nothing
    was counted once the breaker had opened."""
    bus, provider, done, attempts = make_bus(retry="20ms, 50ms*4", prefetch=8), Provider(), [], {}

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        await provider.charge()
        done.append(event.number)
        attempts[event.number] = delivery.attempt

    await bus.start()
    for number in range(10):
        await bus.publish(UserCreated(number=number))
    await until(lambda: 10 == len(done))
    provider.up = False
    calls = provider.calls
    for number in range(10, 40):
        await bus.publish(UserCreated(number=number))
    await until(lambda: told_of(told, ConsumerPaused))
    opened = len(told_of(told, MessageRetried))
    await until(lambda: 2 <= len(told_of(told, ConsumerProbed)))
    assert opened == len(told_of(told, MessageRetried))
    down = provider.calls - calls
    provider.up = True
    await until(lambda: 40 == len(done))
    assert 40 == len(set(done))
    assert [] == told_of(told, MessageDeadLettered)
    assert 0 == max(await outside.depth(DLQ), 0)
    # What failed before the breaker opened was tried; from then on one call a probe.
    assert down <= 8 + 3 + len(told_of(told, ConsumerProbed))
    assert 3 >= max(attempts.values())
    assert [*told_of(told, ConsumerProbed)][-1].passed  # type: ignore[attr-defined]
    (resumed,) = told_of(told, ConsumerResumed)
    assert resumed.paused >= 0.3  # type: ignore[attr-defined]


async def test_a_rejection_leaves_the_attempt_as_it_is(make_bus: MakeBus, told: list[Event]):
    """A call that was never started is no try at the message, however often that happens."""
    bus, seen = make_bus(retry="50ms"), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        seen.append((delivery.attempt, delivery.exchange, delivery.routing_key))
        if len(seen) < 5:
            raise BulkheadFullError("full", policy="provider", retry_after=0.05)

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: "ack" in [event.outcome for event in told_of(told, MessageSettled)])  # type: ignore[attr-defined]
    assert [(1, "user-events", "user.created")] * 5 == seen
    assert [] == told_of(told, MessageRetried)
    assert ["requeue"] * 4 + ["ack"] == [event.outcome for event in told_of(told, MessageSettled)]  # type: ignore[attr-defined]
    assert {"provider"} == {event.policy for event in told_of(told, ConsumerPaused)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", ["refused", "opened", "isolated"])
async def test_a_retry_that_a_breaker_ends_pauses_too(make_bus: MakeBus, told: list[Event], way: str):
    """What leaves the handler is the real error, and yet it is no try at the message: the breaker was told on the way."""
    breaker = CircuitBreaker("provider", min_calls=1, open_for=0.05, ignore=OSError if way != "opened" else ())
    bus, seen = make_bus(retry="50ms"), []

    @Pipeline("provider", Retry(attempts=9, backoff=Backoff(first=0)), breaker)
    async def charge() -> None:
        if len(seen) < 3:
            if way != "opened":
                breaker.isolate() if way == "isolated" else breaker.force_open(0.05)
            raise ConnectionError("provider is down")

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        seen.append(delivery.attempt)
        if way == "isolated":
            breaker.reset()
        await charge()

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: "ack" in [event.outcome for event in told_of(told, MessageSettled)])  # type: ignore[attr-defined]
    assert [1, 1, 1] == seen
    assert [] == told_of(told, MessageRetried)
    assert ["requeue", "requeue", "ack"] == [event.outcome for event in told_of(told, MessageSettled)]  # type: ignore[attr-defined]
    assert told_of(told, ConsumerPaused)


async def test_a_breaker_around_the_handler_pauses_too(make_bus: MakeBus, told: list[Event]):
    """`breaker=` counts what another try may mend, and not a message that is itself at fault."""
    breaker = CircuitBreaker("handler", min_calls=2, window=2, open_for=0.2)
    bus, down, done = make_bus(retry="20ms, 50ms*4"), True, []

    @bus.subscribe(UserCreated, breaker=breaker, permanent=(KeyError,))
    async def handle(event: UserCreated) -> None:
        if event.number < 0:
            raise KeyError
        if down:
            raise OSError
        done.append(event.number)

    await bus.start()
    for number in (-1, -2, -3, -4):
        await bus.publish(UserCreated(number=number))
    await until(lambda: 4 == len(told_of(told, MessageDeadLettered)))
    assert "closed" == breaker.state
    for number in range(10):
        await bus.publish(UserCreated(number=number))
    await until(lambda: told_of(told, ConsumerPaused))
    down = False
    await until(lambda: 10 == len(done))
    assert 4 == len(told_of(told, MessageDeadLettered))


async def test_one_bad_message_still_runs_out_of_attempts(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """It cannot open a breaker that judges by rate, so it is given up and the others are handled."""
    bus, provider, done = make_bus(), Provider(min_calls=4, window=4, failure_rate=0.9), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        await provider.charge()
        if event.number == 3:
            raise ValueError
        done.append(event.number)

    await bus.start()
    for number in range(20):
        await bus.publish(UserCreated(number=number))
    await outside.wait_for(DLQ, 1)
    await until(lambda: 19 == len(done))
    assert [] == told_of(told, ConsumerPaused)


@embedded
async def test_a_paused_consumer_takes_nothing(server: AmqpServer, make_bus: MakeBus, told: list[Event]):
    """During the pause the queue has no consumer; the probe is one message, and no other is in hand meanwhile."""
    bus, probing, may_end, seen = make_bus(prefetch=8), asyncio.Event(), asyncio.Event(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        seen.append(event.number)
        if len(seen) == 1:
            raise BulkheadFullError("full", retry_after=0.3)
        probing.set()
        await may_end.wait()

    await bus.start()
    for number in range(6):
        await bus.publish(UserCreated(number=number))
    await until(lambda: told_of(told, ConsumerPaused))
    await until(lambda: 0 == server.queue(QUEUE).unacked)
    assert 0 == server.queue(QUEUE).consumers
    assert all(check.ok for check in bus.checks())
    assert ["paused"] == [check.detail for check in bus.checks() if check.detail]
    await probing.wait()
    assert (1, 2) == (server.queue(QUEUE).unacked, len(seen))
    may_end.set()
    await until(lambda: told_of(told, ConsumerResumed))
    await until(lambda: 7 == len(seen))


async def test_a_passive_consumer_pauses_in_the_rungs_it_has(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """It makes none, so what waits for another time than the schedule's waits in the nearest of the schedule's."""
    maker, user = make_bus(retry="20ms, 100ms, 300ms"), make_bus(retry="20ms, 100ms, 300ms", declare="passive")
    maker.subscribe(UserCreated)(lambda event: None)
    seen = []

    @user.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        seen.append(delivery.attempt)
        if len(seen) == 1:
            raise BulkheadFullError("full", retry_after=0.15)
        if len(seen) == 2:
            raise RetryLater(after=60)

    await maker.start()
    await maker.drain(1.0)
    await user.start()
    await user.publish(UserCreated(number=1))
    await until(lambda: 3 == len(seen))
    assert [1, 1, 2] == seen
    assert -1 == await outside.depth("meshkit.delay.200ms")
    assert -1 == await outside.depth("meshkit.delay.1m")


@embedded
async def test_without_rungs_a_message_waits_out_the_pause_in_hand(
    server: AmqpServer, make_bus: MakeBus, outside: Outside, told: list[Event]
):
    """Where meshkit declares nothing, an outage of many probes costs no dead letter either; and a drain gives back."""
    await outside.declare(QUEUE, queue_type="quorum", delivery_limit=20)
    await outside.declare(DLQ, queue_type="quorum")
    bus, seen, most = make_bus(declare="off"), [], 15

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        seen.append((delivery.attempt, delivery.delivery_count))
        if len(seen) <= most:
            raise BulkheadFullError("full", retry_after=0.05)

    await bus.start()
    await outside.publish(b'{"number": 1}', queue=QUEUE)
    await until(lambda: "ack" in [event.outcome for event in told_of(told, MessageSettled)])  # type: ignore[attr-defined]
    assert [(1, 0)] * 16 == seen
    assert [] == told_of(told, MessageDeadLettered)

    most = 1000
    await outside.publish(b'{"number": 2}', queue=QUEUE)
    await until(lambda: 18 <= len(seen))
    async with asyncio.timeout(5.0):
        await bus.drain(20.0)
    await outside.wait_for(QUEUE, 1)
