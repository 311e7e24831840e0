"""Consuming: attempts, verdicts, dead letters, drain, and what the broker may do to a consumer."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bus_steps import QUEUE, CourseGranted, MakeBus, Outside, UserCreated, until
from pydantic import BaseModel, field_validator

import meshkit
from meshkit.core.events import (
    ConsumerStarted,
    DuplicateSkipped,
    Event,
    MessageDeadLettered,
    MessageReceived,
    MessageRetried,
    MessageSettled,
)
from meshkit.errors import ConfigurationError, DeadLetter, Discard, RetryLater, TopologyError
from meshkit.messaging.events import event
from meshkit.messaging.inbox import AlreadyHandled
from meshkit.messaging.message import Delivery
from meshkit.policies.circuit_breaker import CircuitBreaker

DLQ = f"{QUEUE}.dlq"


def outcomes(told: list[Event]) -> list[str]:
    return [event.outcome for event in told if isinstance(event, MessageSettled)]


async def test_an_event_reaches_its_handler(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """The handler gets the model, and the message is off the queue when it returns."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def on_user_created(event: UserCreated) -> None:
        seen.append(event)

    await bus.start()
    await bus.publish(UserCreated(number=7))
    await until(lambda: outcomes(told))
    assert [UserCreated(number=7)] == seen
    assert 0 == await outside.depth(QUEUE)
    (settled,) = (event for event in told if isinstance(event, MessageSettled))
    assert (QUEUE, "on_user_created", "ack", 1) == (settled.source, settled.handler, settled.outcome, settled.attempt)
    assert settled.age is not None
    assert [(QUEUE, "on_user_created")] == [
        (event.source, event.handler) for event in told if isinstance(event, ConsumerStarted)
    ]


async def test_each_failure_leads_to_the_next_attempt(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """Attempts count from 1 over process and rungs, and each sees what the message first came with."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        seen.append(delivery)
        if delivery.attempt < 4:
            raise ValueError(f"attempt {delivery.attempt}")

    await bus.start()
    message_id = await bus.publish(UserCreated(number=1))
    await until(lambda: "ack" in outcomes(told))
    assert [1, 2, 3, 4] == [delivery.attempt for delivery in seen]
    assert {(message_id, "user-events", "user.created", 4)} == {
        (delivery.message_id, delivery.exchange, delivery.routing_key, delivery.max_attempts) for delivery in seen
    }
    assert 1 == len({delivery.first_published_at for delivery in seen})
    assert [2, 3, 4] == [event.attempt for event in told if isinstance(event, MessageRetried)]
    assert ["retry", "retry", "ack"] == outcomes(told)
    # A try that is repeated in the process is still the same delivery.
    assert 3 == sum(isinstance(event, MessageReceived) for event in told)


async def test_the_last_failure_is_a_dead_letter(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """It carries why, where and since when; body, id and the producer's envelope are untouched."""
    bus = make_bus(version="1.2")

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        raise ValueError("no user 17")

    await bus.start()
    message_id = await bus.publish(UserCreated(number=1))
    await outside.wait_for(DLQ, 1)
    (dead,) = await outside.take(DLQ)
    headers = dict(dead.headers)
    assert (message_id, b'{"number":1}', "user.created") == (dead.message_id, dead.body, dead.type)
    assert {
        "meshkit-reason": "retries_exhausted",
        "meshkit-attempt": "4",
        "meshkit-queue": QUEUE,
        "meshkit-exchange": "user-events",
        "meshkit-routing-key": "user.created",
        "meshkit-error-type": "ValueError",
        "meshkit-error-message": "no user 17",
        "meshkit-service": "course-service",
        "meshkit-version": "1.2",
        "ce-id": message_id,
    }.items() <= headers.items()
    assert headers["meshkit-error-stack"].endswith("ValueError: no user 17\n")
    assert headers["meshkit-first-failed-at"] < headers["meshkit-last-failed-at"] <= headers["meshkit-dead-lettered-at"]
    assert not [name for name in headers if name.startswith("x-death")]
    assert [("retries_exhausted", "ValueError", message_id)] == [
        (event.reason, event.error_type, event.message_id) for event in told if isinstance(event, MessageDeadLettered)
    ]


@pytest.mark.parametrize(
    ("raised", "reason", "attempts"),
    [
        (KeyError("x"), "permanent", 1),
        (DeadLetter("not ours"), "rejected_by_handler", 1),
        (BaseExceptionGroup("", [DeadLetter("not ours")]), "rejected_by_handler", 1),
        (OSError("x"), "retries_exhausted", 4),
    ],
)
async def test_why_a_message_is_given_up(
    make_bus: MakeBus, outside: Outside, raised: BaseException, reason: str, attempts: int
):
    """Each way has its reason, and only what may pass is tried again."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated, permanent=(KeyError,))
    async def handle(event: UserCreated) -> None:
        seen.append(event)
        raise raised

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await outside.wait_for(DLQ, 1)
    (dead,) = await outside.take(DLQ)
    assert (reason, attempts) == (dead.headers["meshkit-reason"], len(seen))


async def test_what_cannot_be_read_is_a_dead_letter_at_once(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """Broken JSON, another type, an impossible envelope: the handler is not run, others are not held up."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        seen.append(event.number)

    await bus.start()
    await outside.publish(b"{", queue=QUEUE, message_id="json")
    await outside.publish(b'{"number": "x"}', queue=QUEUE, message_id="model")
    await outside.publish(b'{"number": 1}', queue=QUEUE, message_id="type", type="user.deleted")
    await outside.publish(b'{"number": 1}', queue=QUEUE, message_id="attempt", headers={"meshkit-attempt": "zero"})
    await outside.publish(b'{"number": 5}', queue=QUEUE)
    await until(lambda: 5 == len(outcomes(told)))
    dead = await outside.take(DLQ)
    assert {"json", "model", "type", "attempt"} == {message.message_id for message in dead}
    assert {"unparseable"} == {message.headers["meshkit-reason"] for message in dead}
    assert [5] == seen


async def test_a_message_past_its_deadline_is_not_handled(make_bus: MakeBus, outside: Outside):
    """A command that nobody waits for any more is put aside."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        seen.append((event.number, meshkit.current_scope().deadline is not None))

    await bus.start()
    now = datetime.now(UTC)
    await bus.publish(UserCreated(number=1), deadline=now - timedelta(seconds=1))
    await bus.publish(UserCreated(number=2), deadline=now + timedelta(seconds=60))
    await outside.wait_for(DLQ, 1)
    await until(lambda: seen)
    (dead,) = await outside.take(DLQ)
    assert ("expired", [(2, True)]) == (dead.headers["meshkit-reason"], seen)


async def test_a_handler_may_ask_for_another_time_or_none(make_bus: MakeBus, told: list[Event]):
    """RetryLater comes back as the next attempt, Discard is the end."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        seen.append(delivery.attempt)
        if delivery.attempt == 1:
            raise RetryLater(after=0.1)
        raise Discard("seen enough")

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: 2 == len(outcomes(told)))
    assert ([1, 2], ["retry", "discard"]) == (seen, outcomes(told))


async def be_cancelled() -> None:
    """As if somebody cancelled the handler."""
    running = asyncio.current_task()
    assert running is not None
    running.cancel()
    await asyncio.sleep(10)


async def test_a_cancelled_handler_gives_its_message_back(make_bus: MakeBus, told: list[Event]):
    """It was not tried to its end: it comes again with the same attempt."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        seen.append((delivery.attempt, delivery.redelivered))
        if not delivery.redelivered:
            await be_cancelled()

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: 2 == len(outcomes(told)))
    assert [(1, False), (1, True)] == seen
    assert ["requeue", "ack"] == outcomes(told)


async def test_a_cancellation_that_nobody_asked_for_is_a_failure(make_bus: MakeBus, told: list[Event]):
    """Something that the handler waited for was cancelled, and not the handler: tried again by the schedule, since given
    back it would come again at once, for ever."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        seen.append((delivery.attempt, delivery.redelivered))
        if len(seen) < 3:
            waited = asyncio.get_running_loop().create_future()
            waited.cancel()
            await waited

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: "ack" in outcomes(told))
    assert [(1, False), (2, False), (3, False)] == seen


async def test_a_message_that_is_never_settled_ends_as_a_crash_loop(make_bus: MakeBus, outside: Outside):
    """Ten times it came back without a word; then the handler is not run any more."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        seen.append(event.number)
        await be_cancelled()

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await outside.wait_for(DLQ, 1)
    (dead,) = await outside.take(DLQ)
    assert ("crash_loop", 10) == (dead.headers["meshkit-reason"], len(seen))


async def test_a_redelivered_handler_publishes_the_same_ids(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """What follows from one message has the ids that follow from it, on each try."""
    await outside.bind("grants", "course-events", "course.granted")
    bus = make_bus()

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        await bus.publish(CourseGranted(number=1))
        await bus.publish(CourseGranted(number=2))
        if delivery.attempt < 3:
            raise OSError

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: "ack" in outcomes(told))
    published = Counter((message.message_id, message.body) for message in await outside.take("grants"))
    assert [3, 3] == [*published.values()]
    assert 2 == len({message_id for message_id, _ in published})


async def test_handlers_run_in_a_context_of_their_own(make_bus: MakeBus):
    """What is current where the bus is started or a message is published is not current in the handler."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        seen.append(variable.get())
        variable.set("handler")

    variable.set("request")
    await bus.start()
    for number in range(3):
        await bus.publish(UserCreated(number=number))
    await until(lambda: 3 == len(seen))
    assert ["none"] * 3 == seen


async def test_a_plain_function_runs_in_a_thread(make_bus: MakeBus):
    """It may block without holding up the others."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    def handle(event: UserCreated) -> None:
        seen.append(threading.current_thread() is threading.main_thread())

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: seen)
    assert [False] == seen


async def test_a_plain_function_may_raise_anything(make_bus: MakeBus, told: list[Event]):
    """Also a `StopIteration`, which a future does not take: it is a failure, and not a handler that never ends."""
    bus = make_bus()

    @bus.subscribe(UserCreated)
    def handle(event: UserCreated) -> None:
        next(iter([]))

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: "dead_letter" in outcomes(told))
    assert ["retry"] * (len(outcomes(told)) - 1) + ["dead_letter"] == outcomes(told)


async def test_an_error_of_the_model_goes_by_the_schedule(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """A validator with a defect is the service's own code: its message is tried again, as slowly as any other."""

    @event("user.renamed", exchange="user-events")
    class UserRenamed(BaseModel):
        number: int

        @field_validator("number")
        @classmethod
        def check(cls, number: int) -> int:
            return {2: 2}[number]

    bus, seen = make_bus(), []

    @bus.subscribe(UserRenamed, queue=QUEUE)
    async def handle(event: UserRenamed) -> None:
        seen.append(event.number)

    await bus.start()
    await outside.publish(b'{"number": 1}', queue=QUEUE)
    await outside.wait_for(DLQ, 1)
    assert ["retries_exhausted"] == [event.reason for event in told if isinstance(event, MessageDeadLettered)]
    assert 3 == sum(isinstance(event, MessageRetried) for event in told)
    await outside.publish(b'{"number": 2}', queue=QUEUE)
    await until(lambda: [2] == seen)


async def test_with_a_prefetch_of_one_messages_are_handled_in_order(make_bus: MakeBus):
    """One after another, also while the hand of others would grow."""
    bus, seen, running = make_bus(), [], []

    @bus.subscribe(UserCreated, prefetch=1)
    async def handle(event: UserCreated) -> None:
        running.append(event.number)
        assert 1 == len(running)
        await asyncio.sleep(0.001)
        running.remove(event.number)
        seen.append(event.number)

    await bus.start()
    for number in range(30):
        await bus.publish(UserCreated(number=number))
    await until(lambda: 30 == len(seen))
    assert [*range(30)] == seen


async def test_the_hand_grows_up_to_the_prefetch(make_bus: MakeBus):
    """One message at first, more as they go well, never more than the prefetch."""
    bus, running, most, done = make_bus(prefetch=4), 0, [], []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        nonlocal running
        running += 1
        most.append(running)
        await asyncio.sleep(0.01)
        running -= 1
        done.append(event.number)

    await bus.start()
    await asyncio.gather(*(bus.publish(UserCreated(number=number)) for number in range(40)))
    await until(lambda: 40 == len(done))
    assert 1 == most[0]
    assert 4 <= max(most) <= 7  # those of the smaller hand before are still in hand when it grows
    assert 40 == len(set(done))


async def test_an_error_out_of_a_timeout_goes_by_the_schedule(make_bus: MakeBus, told: list[Event]):
    """One try may take so long and no longer; the next one may be faster."""
    bus = make_bus()

    @bus.subscribe(UserCreated, timeout=0.05)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        if delivery.attempt == 1:
            await asyncio.sleep(10)

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: outcomes(told))
    assert ["ack"] == outcomes(told)
    assert [2] == [event.attempt for event in told if isinstance(event, MessageRetried)]


class Diary:
    """An inbox that remembers, and hands out a session that can be looked at."""

    def __init__(self) -> None:
        self.handled: set[str] = set()

    @asynccontextmanager
    async def open(self, delivery: Delivery) -> AsyncIterator[Any]:
        if delivery.message_id in self.handled:
            raise AlreadyHandled
        yield "session"
        self.handled.add(delivery.message_id)


async def test_with_an_inbox_a_message_takes_effect_once(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """A duplicate is acknowledged without running the handler, a failure is not written down."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated, inbox=Diary())
    async def handle(event: UserCreated, delivery: Delivery, session: str) -> None:
        seen.append((event.number, session))
        if delivery.attempt == 1:
            raise OSError

    await bus.start()
    for _ in range(3):
        await bus.publish(UserCreated(number=1), message_id="1")
    await until(lambda: 3 <= outcomes(told).count("ack"))
    assert 2 <= sum(isinstance(event, DuplicateSkipped) for event in told)
    assert 0 == await outside.depth(DLQ)


async def test_duplicates_say_nothing_to_a_breaker(make_bus: MakeBus, told: list[Event]):
    """A message that has been handled before is no failure of what the handler calls."""
    breaker = CircuitBreaker("handler", min_calls=2, window=2)
    bus, diary = make_bus(), Diary()
    diary.handled.update(str(number) for number in range(5))

    @bus.subscribe(UserCreated, inbox=diary, breaker=breaker)
    async def handle(event: UserCreated) -> None: ...

    await bus.start()
    for number in range(5):
        await bus.publish(UserCreated(number=number), message_id=str(number))
    await until(lambda: 5 == len(outcomes(told)))
    assert (["ack"] * 5, "closed") == (outcomes(told), breaker.state)


async def test_an_inbox_needs_ids(make_bus: MakeBus, outside: Outside):
    """What has none could not be known again."""
    bus = make_bus()

    @bus.subscribe(UserCreated, inbox=Diary())
    async def handle(event: UserCreated) -> None: ...

    await bus.start()
    await outside.publish_without_id(b'{"number": 1}', queue=QUEUE)
    await outside.wait_for(DLQ, 1)
    (dead,) = await outside.take(DLQ)
    assert "unparseable" == dead.headers["meshkit-reason"]
    assert "message_id" in dead.headers["meshkit-error-message"]


# -- the end ----------------------------------------------------------------------------------------------------------


async def test_draining_finishes_what_is_in_hand_and_takes_no_more(make_bus: MakeBus, outside: Outside):
    """Handlers that end in time are settled; what waits in the queue stays there."""
    bus, entered, may_end, done = make_bus(prefetch=1), asyncio.Event(), asyncio.Event(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        entered.set()
        await may_end.wait()
        done.append(event.number)

    await bus.start()
    for number in range(3):
        await bus.publish(UserCreated(number=number))
    await entered.wait()
    draining = asyncio.create_task(bus.drain(10.0))
    await asyncio.sleep(0.05)
    await bus.publish(UserCreated(number=3))  # publishing goes on meanwhile
    may_end.set()
    await draining
    await bus.close()
    assert [0] == done
    await outside.wait_for(QUEUE, 3)


async def test_draining_gives_back_what_does_not_end_in_time(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """A handler that takes longer than the grace is cancelled, and its message is there for the next consumer."""
    bus, entered = make_bus(), asyncio.Event()

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        entered.set()
        await asyncio.Event().wait()

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await entered.wait()
    await bus.drain(0.05)
    await bus.close()
    assert ["requeue"] == outcomes(told)
    await outside.wait_for(QUEUE, 1)


async def test_closing_without_draining_loses_nothing(make_bus: MakeBus, outside: Outside):
    """What is in hand goes back to the queue."""
    bus, entered = make_bus(), asyncio.Event()

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        entered.set()
        await asyncio.Event().wait()

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await entered.wait()
    await bus.close()
    await outside.wait_for(QUEUE, 1)


# -- the broker -------------------------------------------------------------------------------------------------------


async def test_a_deleted_queue_is_made_again(make_bus: MakeBus, outside: Outside):
    """The broker cancels the consumer; it declares the queue and consumes on."""
    bus, seen = make_bus(), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        seen.append(event.number)

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: [1] == seen)
    await outside.delete(QUEUE)
    await outside.wait_for(QUEUE, 0)
    await until(lambda: all(check.ok for check in bus.checks()))
    await bus.publish(UserCreated(number=2))
    await until(lambda: [1, 2] == seen)


async def test_a_deleted_rung_and_dead_letter_queue_are_made_again(make_bus: MakeBus, outside: Outside):
    """The copy finds no queue, so its message stays in hand until there is one."""
    bus = make_bus(retry="20ms, 100ms")

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None:
        raise OSError

    await bus.start()
    await outside.delete("meshkit.delay.100ms")
    await outside.delete(DLQ)
    await bus.publish(UserCreated(number=1))
    await outside.wait_for(DLQ, 1)


async def test_a_queue_that_exists_otherwise_stops_the_start(make_bus: MakeBus, outside: Outside):
    """The error says which argument differs; nothing is deleted or changed."""
    await outside.declare("meshkit.delay.50ms", queue_type="quorum", message_ttl=70)
    bus = make_bus()

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None: ...

    with pytest.raises(TopologyError, match=r"meshkit\.delay\.50ms") as caught:
        await bus.start()
    assert "x-" in str(caught.value)
    with pytest.raises(ConfigurationError, match="closed"):
        await bus.start()


async def test_passive_only_looks(make_bus: MakeBus, outside: Outside):
    """What is missing is named and not made."""
    bus = make_bus(declare="passive")

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated) -> None: ...

    with pytest.raises(TopologyError, match="user-events"):
        await bus.start()
    assert -1 == await outside.depth(QUEUE)


async def test_passive_works_with_what_is_there(make_bus: MakeBus, told: list[Event]):
    """A topology that was made by another is used as it is."""
    maker, user = make_bus(), make_bus(declare="passive")
    for bus in (maker, user):

        @bus.subscribe(UserCreated)
        async def handle(event: UserCreated, delivery: Delivery) -> None:
            if delivery.attempt < 3:
                raise OSError

    await maker.start()
    await maker.drain(1.0)
    await user.start()
    await user.publish(UserCreated(number=1))
    await until(lambda: "ack" in outcomes(told))


async def test_off_retries_in_the_process(make_bus: MakeBus, outside: Outside, told: list[Event]):
    """Without rungs the waits are spent here."""
    maker = make_bus()
    maker.subscribe(UserCreated)(lambda event: None)
    await maker.start()
    await maker.drain(1.0)
    for rung in ("meshkit.delay.50ms",):
        await outside.delete(rung)
    bus, seen = make_bus(declare="off"), []

    @bus.subscribe(UserCreated)
    async def handle(event: UserCreated, delivery: Delivery) -> None:
        seen.append(delivery.attempt)
        if delivery.attempt < 4:
            raise OSError

    await bus.start()
    await bus.publish(UserCreated(number=1))
    await until(lambda: "ack" in outcomes(told))
    assert ([1, 2, 3, 4], -1) == (seen, await outside.depth("meshkit.delay.50ms"))


# -- what cannot work -------------------------------------------------------------------------------------------------


def test_a_handler_has_to_fit(make_bus: MakeBus):
    """A parameter that nobody fills is told when the handler subscribes, not when the first message comes."""
    bus = make_bus()

    async def none() -> None: ...
    async def odd(event: UserCreated, database: object) -> None: ...
    async def session(event: UserCreated, session: object) -> None: ...

    for handler, said in ((none, "no parameter"), (odd, "database"), (session, "inbox")):
        with pytest.raises(ConfigurationError, match=said):
            bus.subscribe(UserCreated)(handler)


def test_two_handlers_on_one_queue_are_refused(make_bus: MakeBus):
    """Each message would reach one of them, by chance."""
    bus = make_bus()
    bus.subscribe(UserCreated)(lambda event: None)
    with pytest.raises(ConfigurationError, match=QUEUE):
        bus.subscribe(UserCreated)(lambda event: None)
    bus.subscribe(UserCreated, queue="course-service.audit")(lambda event: None)


async def test_subscribing_to_a_running_bus_is_refused(make_bus: MakeBus):
    """The handler would never be called."""
    bus = make_bus()
    await bus.start()
    with pytest.raises(ConfigurationError, match="runs already"):
        bus.subscribe(UserCreated)(lambda event: None)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "http://127.0.0.1"},
        {"url": "nothing"},
        {"prefetch": 0},
        {"publish_timeout": 0},
        {"in_flight": 0},
        {"retry": "often"},
        {"declare": "maybe"},
        {"service": ""},
    ],
)
def test_settings_that_cannot_work_are_refused(make_bus: MakeBus, options: dict[str, Any]):
    """They are told when the bus is made."""
    with pytest.raises(ConfigurationError):
        make_bus(**options)
