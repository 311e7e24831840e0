"""`consume()`: the handler of an aio-pika consumer on the queue that exists, with retries and dead letters."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage
from aio_pika.patterns import NackMessage, RejectMessage
from bus_steps import Broker, Outside, until

from meshkit.core.events import Event, MessageSettled
from meshkit.errors import ConfigurationError, TopologyError
from meshkit.rabbitmq import consume

ORDERS, DLQ = "orders", "orders.dlq"


def outcomes(told: list[Event]) -> list[str]:
    return [event.outcome for event in told if isinstance(event, MessageSettled)]


@pytest.fixture
async def orders(outside: Outside) -> None:
    """A queue of somebody else's, of the classic kind."""
    await outside.declare(ORDERS)


@pytest.mark.usefixtures("orders")
async def test_a_handler_is_taken_over_as_it_is(broker: Broker, outside: Outside, told: list[Event]):
    """It gets what aio-pika would give it, on each attempt, and process() does what it says."""
    seen: list[tuple[Any, ...]] = []

    async def on_message(message: AbstractIncomingMessage) -> None:
        async with message.process():
            facts = (message.exchange, message.routing_key, message.reply_to, message.correlation_id, message.priority)
            seen.append((message.body, message.headers["tenant"], *facts))
            if len(seen) < 3:
                raise ValueError

    consumer = await consume(ORDERS, on_message, retry="20ms, 50ms*2", url=broker.url)
    await outside.publish(
        b"1", queue=ORDERS, headers={"tenant": 7}, reply_to="answers", correlation_id="c", priority=3, message_id="1"
    )
    await until(lambda: "ack" in outcomes(told))
    await consumer.close()
    assert [(b"1", 7, "", ORDERS, "answers", "c", 3)] * 3 == seen
    assert (0, 0) == (await outside.depth(ORDERS), await outside.depth(DLQ))


@pytest.mark.usefixtures("orders")
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("ack", ["ack"]),
        ("nothing", ["ack"]),
        ("reject", ["dead_letter"]),
        ("nack, requeue", ["retry", "dead_letter"]),
        ("reject, requeue", ["retry", "dead_letter"]),
        ("RejectMessage", ["dead_letter"]),
        ("NackMessage, requeue", ["retry", "dead_letter"]),
        ("error after ack", ["retry", "dead_letter"]),
    ],
)
async def test_its_own_words_are_carried_out(
    broker: Broker, outside: Outside, told: list[Event], how: str, expected: list[str]
):
    """Refused is a dead letter; given back is tried again by the schedule, not at once and for ever."""

    async def on_message(message: AbstractIncomingMessage) -> None:
        match how:
            case "ack":
                await message.ack()
            case "reject":
                await message.reject()
            case "nack, requeue":
                await message.nack()
            case "reject, requeue":
                await message.reject(requeue=True)
            case "RejectMessage":
                raise RejectMessage
            case "NackMessage, requeue":
                raise NackMessage(requeue=True)
            case "error after ack":
                await message.ack()
                raise OSError

    # A wait in the process is no settlement, one in a rung is.
    consumer = await consume(ORDERS, on_message, retry="20ms, 50ms" if "error" in how else "1100ms", url=broker.url)
    await outside.publish(b"1", queue=ORDERS)
    await until(lambda: len(expected) <= len(outcomes(told)))
    await consumer.close()
    assert expected == outcomes(told)
    assert expected.count("dead_letter") == await outside.depth(DLQ)


@pytest.mark.usefixtures("orders")
async def test_a_plain_function_runs_in_a_thread(broker: Broker, outside: Outside, told: list[Event]):
    """It may block."""
    seen: list[bool] = []

    def on_message(message: AbstractIncomingMessage) -> None:
        seen.append(threading.current_thread() is threading.main_thread())

    consumer = await consume(ORDERS, on_message, url=broker.url)
    await outside.publish(b"1", queue=ORDERS)
    await until(lambda: outcomes(told))
    await consumer.close()
    assert [False] == seen


@pytest.mark.usefixtures("orders")
async def test_an_aio_pika_queue_tells_where_its_broker_is(broker: Broker, outside: Outside, told: list[Event]):
    """No URL is needed; a queue that belongs to one connection is refused."""
    connection = await aio_pika.connect(broker.url)
    channel = await connection.channel()
    queue = await channel.declare_queue(ORDERS, durable=True)
    handled = asyncio.Event()

    async def on_message(message: AbstractIncomingMessage) -> None:
        handled.set()

    consumer = await consume(queue, on_message)
    await outside.publish(b"1", queue=ORDERS)
    await handled.wait()
    await consumer.close()
    with pytest.raises(ConfigurationError, match="one connection"):
        await consume(await channel.declare_queue(exclusive=True), on_message)
    await connection.close()


async def test_a_queue_that_does_not_exist_is_told(broker: Broker):
    """It is not made: nobody has said how."""
    with pytest.raises(TopologyError, match="no queue 'orders'"):
        await consume(ORDERS, lambda message: None, url=broker.url)
