"""Consuming: prefetch, acks, the order in which messages come back, delivery counts, lost connections."""

from __future__ import annotations

import asyncio

import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage, AbstractQueue
from aiormq.exceptions import ChannelAccessRefused, ChannelPreconditionFailed
from contract_steps import Connect, Declare, ignore, put, ready, take, take_bodies, until_ready
from pamqp import commands
from wire_client import WireClient

BOTH = pytest.mark.parametrize("kind", ["classic", "quorum"])


async def start(queue: AbstractQueue, **options: object) -> asyncio.Queue[AbstractIncomingMessage]:
    """Consume into a queue that the test takes from."""
    arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()

    async def arrive(message: AbstractIncomingMessage) -> None:
        arrived.put_nowait(message)

    await queue.consume(arrive, **options)  # type: ignore[arg-type]
    return arrived


async def some(arrived: asyncio.Queue[AbstractIncomingMessage], count: int) -> list[AbstractIncomingMessage]:
    """The next messages that arrive."""
    return [await asyncio.wait_for(arrived.get(), 5) for _ in range(count)]


def bodies(messages: list[AbstractIncomingMessage]) -> list[bytes]:
    return [message.body for message in messages]


async def has_settled(channel: AbstractChannel) -> None:
    """Wait until the broker has read all that the channel sent before: methods are carried out in order."""
    await channel.set_qos(prefetch_count=0)


@BOTH
async def test_hands_out_no_more_than_prefetch(connect: Connect, declare: Declare, channel: AbstractChannel, kind: str):
    """Prefetch bounds what a consumer holds unacked; each ack lets one more come."""
    await declare("it", queue_type=kind)
    await put(channel, "it", b"1", b"2", b"3", b"4", b"5")
    consuming = await (await connect()).channel()
    await consuming.set_qos(prefetch_count=2)
    arrived = await start(await consuming.get_queue("it"))

    first, second = await some(arrived, 2)
    await until_ready(channel, "it", 3)
    assert arrived.empty()
    await second.ack()
    (third,) = await some(arrived, 1)

    assert [b"1", b"2", b"3"] == bodies([first, second, third])
    await until_ready(channel, "it", 2)


async def test_prefetch_is_each_consumers_own(connect: Connect, declare: Declare, channel: AbstractChannel):
    """Two consumers on a channel may each hold as many as prefetch says."""
    await declare("it")
    consuming = await (await connect()).channel()
    await consuming.set_qos(prefetch_count=2)
    queue = await consuming.get_queue("it")
    one, two = await start(queue), await start(queue)

    await put(channel, "it", *(b"x" for _ in range(6)))
    await some(one, 2)
    await some(two, 2)

    await until_ready(channel, "it", 2)


async def test_shares_a_global_prefetch(connect: Connect, declare: Declare, channel: AbstractChannel):
    """A global prefetch bounds all consumers of the channel together."""
    await declare("it")
    consuming = await (await connect()).channel()
    await consuming.set_qos(prefetch_count=3, global_=True)
    queue = await consuming.get_queue("it")
    await start(queue)
    await start(queue)

    await put(channel, "it", *(b"x" for _ in range(6)))

    await until_ready(channel, "it", 3)


@BOTH
async def test_acks_all_up_to_one(channel: AbstractChannel, declare: Declare, kind: str):
    """A multiple ack settles what came before, and nothing after."""
    queue = await declare("it", queue_type=kind)
    await put(channel, "it", b"1", b"2", b"3")
    messages = [await take(queue) for _ in range(3)]

    await messages[1].ack(multiple=True)
    await messages[2].nack()

    assert [b"3"] == await take_bodies(queue, 1)
    assert await queue.get(fail=False) is None


async def test_an_unknown_tag_ends_the_channel(channel: AbstractChannel, declare: Declare):
    """Settling a delivery twice ends the channel with 406."""
    queue = await declare("it")
    await put(channel, "it", b"1")
    message = await take(queue)
    plain = await channel.get_underlay_channel()
    await plain.basic_ack(message.delivery_tag)
    await plain.basic_ack(message.delivery_tag)

    with pytest.raises(ChannelPreconditionFailed, match=r"unknown delivery tag 1"):
        await plain.basic_qos(prefetch_count=1)


@BOTH
async def test_comes_back_marked_as_redelivered(channel: AbstractChannel, declare: Declare, kind: str):
    """The first delivery is none again; one after a requeue says so."""
    queue = await declare("it", queue_type=kind)
    await put(channel, "it", b"1")

    first = await take(queue)
    await first.nack(requeue=True)
    second = await take(queue)
    await second.ack()

    assert (False, True) == (first.redelivered, second.redelivered)


@pytest.mark.parametrize(
    ("arguments", "back"),
    [
        ({"queue_type": "classic"}, [b"1", b"2", b"3", b"4"]),
        ({"queue_type": "quorum", "delivery_limit": 10}, [b"1", b"2", b"3", b"4"]),
        # Without a limit what is given back counts as new.
        ({"queue_type": "quorum"}, [b"3", b"4", b"1", b"2"]),
    ],
)
async def test_gives_back_in_order(
    channel: AbstractChannel, declare: Declare, arguments: dict[str, object], back: list[bytes]
):
    """Requeued messages go to the place that the kind of queue gives them, oldest first."""
    queue = await declare("it", **arguments)
    await put(channel, "it", b"1", b"2", b"3", b"4")
    await take(queue)
    second = await take(queue)

    await second.nack(requeue=True, multiple=True)
    await has_settled(channel)
    await until_ready(channel, "it", 4)

    assert back == await take_bodies(queue, 4)


@pytest.mark.parametrize(
    ("arguments", "back"),
    [
        ({"queue_type": "classic"}, [b"1", b"2", b"3"]),
        ({"queue_type": "quorum", "delivery_limit": 10}, [b"3", b"1", b"2"]),
    ],
)
async def test_gives_back_singly(
    channel: AbstractChannel, declare: Declare, arguments: dict[str, object], back: list[bytes]
):
    """A classic queue puts each message back in its old place; a quorum queue hands them out as they came back."""
    queue = await declare("it", **arguments)
    await put(channel, "it", b"1", b"2", b"3")
    held = [await take(queue) for _ in range(3)]

    for message in (held[2], held[0], held[1]):
        await message.nack(requeue=True)
    await until_ready(channel, "it", 3)

    assert back == await take_bodies(queue, 3)


@pytest.mark.parametrize(
    "arguments",
    [{"queue_type": "classic"}, {"queue_type": "quorum"}, {"queue_type": "quorum", "delivery_limit": 10}],
)
async def test_a_lost_connection_gives_back_what_it_held(
    broker: str, channel: AbstractChannel, declare: Declare, arguments: dict[str, object]
):
    """What a cut connection held comes back, in order, before what was not delivered yet, as redelivered."""
    queue = await declare("it", **arguments)
    await put(channel, "it", b"1", b"2", b"3", b"4")
    consumer = WireClient(broker)
    await consumer.open()
    consumer.send(1, commands.Basic.Qos(prefetch_count=3), commands.Basic.Consume(queue="it"))
    for _ in range(3):
        await consumer.expect(commands.Basic.Deliver)

    consumer.cut()
    await until_ready(channel, "it", 4)

    back = [await take(queue) for _ in range(4)]
    assert [b"1", b"2", b"3", b"4"] == bodies(back)
    assert [True, True, True, False] == [message.redelivered for message in back]
    await back[-1].ack(multiple=True)


async def test_counts_deliveries_on_quorum_queues(connect: Connect, channel: AbstractChannel, declare: Declare):
    """x-delivery-count is absent at first, and then the number of times a message came back, requeued or lost."""
    await declare("it", queue_type="quorum", delivery_limit=10)
    await put(channel, "it", b"1", headers={"mine": "kept"})
    seen = []

    requeuing = await start(await (await (await connect()).channel()).get_queue("it"))
    for _ in range(3):
        (message,) = await some(requeuing, 1)
        seen.append(message.headers.get("x-delivery-count"))
        if len(seen) < 3:
            await message.nack(requeue=True)
    await message.channel.close()
    (message,) = await some(await start(await channel.get_queue("it")), 1)
    seen.append(message.headers.get("x-delivery-count"))

    assert [None, 1, 2, 3] == seen
    assert "kept" == message.headers["mine"]


async def test_a_get_from_a_quorum_queue_counts_too(channel: AbstractChannel, declare: Declare):
    """What basic.get brings counts from 0 on, and looking is counted."""
    queue = await declare("it", queue_type="quorum", delivery_limit=10)
    await put(channel, "it", b"1")
    seen = []

    for _ in range(3):
        message = await take(queue)
        seen.append(message.headers.get("x-delivery-count"))
        await message.nack(requeue=True)

    # RabbitMQ 3.10 sends a count of 0 with a get, later versions may send none.
    assert [0, 1, 2] == [count or 0 for count in seen]


async def test_classic_queues_count_nothing(channel: AbstractChannel, declare: Declare):
    """A classic queue adds no header to what comes back."""
    queue = await declare("it", queue_type="classic")
    await put(channel, "it", b"1")

    await (await take(queue)).nack(requeue=True)
    again = await take(queue)
    await again.ack()

    assert {} == again.headers


async def test_the_delivery_limit_ends_in_the_dead_letter_queue(channel: AbstractChannel, declare: Declare):
    """A message that came back once more than the limit allows is a dead letter, with the reason."""
    dead = await declare("it.dlq")
    queue = await declare(
        "it", queue_type="quorum", delivery_limit=2, dead_letter_exchange="", dead_letter_routing_key="it.dlq"
    )
    await put(channel, "it", b"poison")

    for _ in range(3):
        await (await take(queue)).reject(requeue=True)
    letter = await take(dead)
    await letter.ack()

    assert ("delivery_limit", "it", 1) == tuple(letter.headers["x-death"][0][k] for k in ("reason", "queue", "count"))
    assert "x-delivery-count" not in letter.headers
    assert 0 == await ready(channel, "it")


@BOTH
async def test_rejected_messages_are_dead_letters(channel: AbstractChannel, declare: Declare, kind: str):
    """Reject without requeue dead-letters; without a dead-letter exchange the message is gone."""
    dead = await declare("it.dlq")
    queue = await declare("it", queue_type=kind, dead_letter_exchange="", dead_letter_routing_key="it.dlq")
    bare = await declare("bare", queue_type=kind)
    await put(channel, "it", b"1")
    await put(channel, "bare", b"1")

    await (await take(queue)).reject(requeue=False)
    await (await take(bare)).nack(requeue=False)

    assert [b"1"] == await take_bodies(dead, 1)
    assert 0 == await ready(channel, "bare")


async def test_an_exclusive_consumer_is_alone(connect: Connect, declare: Declare, channel: AbstractChannel):
    """Beside an exclusive consumer nobody else may consume, until it leaves."""
    await declare("it")
    connection = await connect()
    queue = await (await connection.channel()).get_queue("it")
    tag = await queue.consume(ignore, exclusive=True)

    with pytest.raises(ChannelAccessRefused, match=r"queue 'it' in vhost '[^']+' in exclusive use"):
        await (await (await connection.channel()).get_queue("it")).consume(ignore)
    await queue.cancel(tag)

    await (await (await connection.channel()).get_queue("it")).consume(ignore)


async def test_exclusive_needs_an_unused_queue(connect: Connect, declare: Declare, channel: AbstractChannel):
    """An exclusive consumer is refused where there is another."""
    queue = await declare("it")
    await queue.consume(ignore)

    with pytest.raises(ChannelAccessRefused, match=r"queue 'it' in vhost '[^']+' in exclusive use"):
        await (await (await (await connect()).channel()).get_queue("it")).consume(ignore, exclusive=True)


async def test_consumers_take_turns(connect: Connect, declare: Declare, channel: AbstractChannel):
    """Consumers with room for more get messages in turn."""
    await declare("it")
    consuming = await (await connect()).channel()
    queue = await consuming.get_queue("it")
    one, two = await start(queue), await start(queue)

    await put(channel, "it", b"1", b"2", b"3", b"4")

    assert {(b"1", b"3"), (b"2", b"4")} == {tuple(bodies(await some(each, 2))) for each in (one, two)}


async def test_a_single_active_consumer_gets_all(connect: Connect, declare: Declare, channel: AbstractChannel):
    """With x-single-active-consumer one consumer gets everything, and the next takes over when it goes."""
    await declare("it", single_active_consumer=True)
    first_connection = await connect()
    first = await start(await (await first_connection.channel()).get_queue("it"))
    second = await start(await (await (await connect()).channel()).get_queue("it"))

    await put(channel, "it", b"1", b"2")
    await some(first, 2)
    assert second.empty()
    await first_connection.close()

    assert [b"1", b"2"] == bodies(await some(second, 2))


async def test_a_higher_priority_consumer_comes_first(connect: Connect, declare: Declare, channel: AbstractChannel):
    """Consumers of lower priority get what those above have no room for."""
    await declare("it")
    consuming = await (await connect()).channel()
    await consuming.set_qos(prefetch_count=2)
    queue = await consuming.get_queue("it")
    low = await start(queue)
    high = await start(queue, arguments={"x-priority": 10})

    await put(channel, "it", b"1", b"2", b"3")

    assert ([b"1", b"2"], [b"3"]) == (bodies(await some(high, 2)), bodies(await some(low, 1)))


async def test_a_cancelled_consumer_keeps_what_it_holds(channel: AbstractChannel, declare: Declare):
    """After basic.cancel nothing more comes, and what came is still the consumer's to settle."""
    queue = await declare("it")
    arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()

    async def arrive(message: AbstractIncomingMessage) -> None:
        arrived.put_nowait(message)

    tag = await queue.consume(arrive)
    await put(channel, "it", b"1")
    (held,) = await some(arrived, 1)
    await queue.cancel(tag)
    await put(channel, "it", b"2")
    await held.nack(requeue=True)
    await until_ready(channel, "it", 2)

    assert [b"1", b"2"] == await take_bodies(queue, 2)


async def test_recover_gives_back_all_that_is_unacked(channel: AbstractChannel, declare: Declare):
    """basic.recover requeues what the channel holds."""
    queue = await declare("it")
    await put(channel, "it", b"1", b"2")
    await take(queue)
    await take(queue)

    await (await channel.get_underlay_channel()).basic_recover(requeue=True)

    assert [b"1", b"2"] == await take_bodies(queue, 2)


async def test_no_ack_is_settled_when_sent(connect: Connect, declare: Declare, channel: AbstractChannel):
    """With no_ack a message is gone when it is delivered, whatever prefetch says."""
    await declare("it")
    await put(channel, "it", b"1", b"2", b"3")
    connection = await connect()
    consuming = await connection.channel()
    await consuming.set_qos(prefetch_count=1)

    await some(await start(await consuming.get_queue("it"), no_ack=True), 3)
    await connection.close()

    assert 0 == await ready(channel, "it")


async def test_high_priority_messages_come_first(channel: AbstractChannel, declare: Declare):
    """x-max-priority orders by priority, then by age; what is above the maximum counts as it."""
    queue = await declare("it", max_priority=5)
    for body, priority in ((b"low", 1), (b"none", None), (b"high", 5), (b"over", 9), (b"low too", 1)):
        await put(channel, "it", body, priority=priority)

    assert [b"high", b"over", b"low", b"low too", b"none"] == await take_bodies(queue, 5)


async def test_closing_a_channel_gives_back_what_it_held(connect: Connect, channel: AbstractChannel, declare: Declare):
    """A closed channel's unacked messages are ready again, though its connection lives."""
    queue = await declare("it")
    await put(channel, "it", b"1")
    other = await (await connect()).channel()
    await take(await other.get_queue("it"))

    await other.close()

    assert (await take(queue)).redelivered
