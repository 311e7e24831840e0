"""Clients that are broken or mean no good: the server goes on, and so do the others."""

from __future__ import annotations

import asyncio
import random
import resource
import struct
from collections.abc import AsyncIterator, Callable

import aio_pika
import pytest
from aio_pika import Message
from pamqp import commands, header
from pamqp.body import ContentBody
from wire_client import Closed, WireClient

from meshkit.embedded import AmqpServer
from meshkit.embedded import connection as connection_module


@pytest.fixture
async def server() -> AsyncIterator[AmqpServer]:
    """A server; at the end nobody is left on it, and it serves an honest client."""
    async with AmqpServer() as running:
        yield running
        await until(lambda: not running.connections())
        async with await aio_pika.connect(running.url) as connection:
            channel = await connection.channel()
            queue = await channel.declare_queue("honest", auto_delete=True)
            await channel.default_exchange.publish(Message(b"still here"), "honest")
            message = await queue.get(timeout=5)
            await message.ack()
            assert b"still here" == message.body
            await queue.delete()


async def until(condition: Callable[[], object]) -> None:
    """Wait until it holds; fails where it does not in five seconds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    pytest.fail("it did not come about")


async def raw(server: AmqpServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", server.port)


@pytest.mark.parametrize("seed", range(20))
async def test_survives_garbage(server: AmqpServer, seed: int):
    """Random bytes, from the first one on, after the greeting, or after a whole handshake, end that connection only."""
    dice = random.Random(seed)
    garbage = dice.randbytes(dice.randrange(1, 5000))
    if seed % 3 == 2:
        client = WireClient(server.url)
        await client.open()
        writer = client.writer
    else:
        _, writer = await raw(server)
        if seed % 3 == 1:
            writer.write(b"AMQP\x00\x00\x09\x01")
    writer.write(garbage)
    await asyncio.sleep(0.02)
    writer.transport.abort()


@pytest.mark.parametrize("seed", range(30))
async def test_survives_methods_of_random_bytes(server: AmqpServer, seed: int):
    """Frames that are whole, with methods and content that are not, are answered with an error or not at all."""
    dice = random.Random(seed)
    client = WireClient(server.url)
    await client.open()
    known = sorted(commands.INDEX_MAPPING)
    for _ in range(20):
        kind = dice.choice([1, 1, 1, 2, 3])
        payload = dice.randbytes(dice.randrange(0, 60))
        if kind == 1:
            payload = struct.pack(">I", dice.choice(known)) + payload
        client.send_raw(kind, dice.choice([0, 1, 1, 1, 2]), payload)
    try:
        async with asyncio.timeout(0.1):
            while True:
                await client.read()
    except (Closed, TimeoutError):
        pass
    client.cut()


async def test_survives_bytes_that_come_one_by_one(server: AmqpServer):
    """A client that sends a byte at a time is served like any other."""
    client = WireClient(server.url)
    await client.open()
    sent: list[bytes] = []
    writer, client.writer = client.writer, _Recorder(sent)  # type: ignore[assignment]
    client.send(1, commands.Queue.Declare(queue="it", exclusive=True))
    client.publish("it", b"slowly")
    client.send(1, commands.Basic.Get(queue="it", no_ack=True))
    client.writer = writer
    for byte in b"".join(sent):
        writer.write(bytes((byte,)))
        await asyncio.sleep(0)

    await client.expect(commands.Basic.GetOk)
    client.cut()


class _Recorder:
    """Keeps what is written."""

    def __init__(self, sent: list[bytes]) -> None:
        self.write = sent.append


async def test_hangs_up_on_who_never_logs_in(server: AmqpServer, monkeypatch: pytest.MonkeyPatch):
    """A handshake that does not end is ended."""
    monkeypatch.setattr(connection_module, "HANDSHAKE_SECONDS", 0.1)
    reader, writer = await raw(server)
    writer.write(b"AMQP\x00\x00\x09\x01")

    async with asyncio.timeout(5):
        while await reader.read(1000):
            pass
    writer.close()


async def test_does_not_wait_for_half_a_frame(server: AmqpServer):
    """Half a frame, and then nothing: the others are served meanwhile."""
    client = WireClient(server.url)
    await client.open()
    client.writer.write(struct.pack(">BHI", 1, 1, 100_000) + b"x" * 50_000)

    async with await aio_pika.connect(server.url) as other:
        await (await other.channel()).declare_queue("other", exclusive=True)
    client.cut()


@pytest.mark.parametrize("size", [1 << 40, (1 << 64) - 1])
async def test_refuses_a_message_that_is_too_large(server: AmqpServer, size: int):
    """A body larger than 128 MiB is refused when it is announced, with 406, and the connection lives."""
    client = WireClient(server.url)
    await client.open()
    client.send(1, commands.Basic.Publish(routing_key="it"))
    client.send_raw(2, 1, struct.pack(">HHQH", 60, 0, size, 0))

    _, close = await client.read()
    assert (406, True) == (close.reply_code, close.reply_text.startswith("PRECONDITION_FAILED - message size"))
    client.cut()


async def test_refuses_more_body_than_was_announced(server: AmqpServer):
    """A body that goes on after its end is a frame error."""
    client = WireClient(server.url)
    await client.open()
    client.send(1, commands.Basic.Publish(routing_key="it"), header.ContentHeader(body_size=3), ContentBody(b"four"))

    assert 501 == (await client.fate()).code


async def test_a_client_that_does_not_read_costs_little(server: AmqpServer):
    """A consumer that never reads gets what the socket holds and about a megabyte more; the rest waits in its queue."""
    client = WireClient(server.url)
    await client.open()
    client.send(1, commands.Queue.Declare(queue="it"), commands.Basic.Consume(queue="it", no_ack=True))
    await client.expect(commands.Basic.ConsumeOk)
    client.writer.transport.pause_reading()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    async with await aio_pika.connect(server.url) as other:
        channel = await other.channel()
        body = bytes(100_000)
        for _ in range(20):
            await asyncio.gather(*(channel.default_exchange.publish(Message(body), "it") for _ in range(10)))
        await asyncio.sleep(0.1)
        waiting = len(server.queue("it").messages)
        assert waiting > 50
        # What was not sent is there for who reads.
        queue = await channel.get_queue("it")
        assert body == (await queue.get(no_ack=True)).body
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # KiB; the messages themselves are 20,000
    client.cut()


async def test_a_client_that_does_not_read_its_own_answers_is_not_read(server: AmqpServer):
    """Answers to somebody who only asks do not pile up: the server stops reading him."""
    client = WireClient(server.url)
    await client.open()
    client.send(1, commands.Queue.Declare(queue="it", exclusive=True))
    client.publish("it", bytes(100_000))
    client.writer.transport.pause_reading()
    for _ in range(2000):
        client.send(1, commands.Basic.Get(queue="it"), commands.Basic.Nack(0, multiple=True, requeue=True))
    await asyncio.sleep(0.3)

    (connection,) = server._hub.connections
    assert connection._transport.get_write_buffer_size() < 4 << 20
    assert {"it does not read"} == connection._stopped_reading
    client.cut()


async def test_reads_on_when_the_client_does(server: AmqpServer):
    """A client that pauses and goes on gets every message, in order."""
    client = WireClient(server.url)
    await client.open()
    client.send(1, commands.Queue.Declare(queue="it"), commands.Basic.Consume(queue="it", no_ack=True))
    await client.expect(commands.Basic.ConsumeOk)
    client.writer.transport.pause_reading()
    async with await aio_pika.connect(server.url) as other:
        channel = await other.channel()
        for number in range(200):
            await channel.default_exchange.publish(Message(struct.pack(">I", number) + bytes(50_000)), "it")
    client.writer.transport.resume_reading()

    numbers = []
    while len(numbers) < 200:
        _, frame = await client.read()
        if isinstance(frame, ContentBody):
            numbers.append(struct.unpack(">I", frame.value[:4])[0])
    assert list(range(200)) == numbers
    client.send(1, commands.Queue.Delete(queue="it"))
    await client.expect(commands.Queue.DeleteOk)
    client.cut()


async def test_a_thousand_channels(server: AmqpServer):
    """A connection may use a thousand channels at once, and closing it closes all."""
    client = WireClient(server.url)
    await client.open()
    for number in range(2, 1001):
        client.send(number, commands.Channel.Open(), commands.Queue.Declare(queue="it"), commands.Basic.Consume(queue="it"))  # fmt: skip
    opened = 0
    while opened < 999:
        _, frame = await client.read()
        opened += isinstance(frame, commands.Basic.ConsumeOk)
    assert 999 == server.queue("it").consumers

    client.cut()

    await until(lambda: not server.queue("it").consumers)


async def test_refuses_channels_above_the_maximum(server: AmqpServer):
    """A channel number that was not agreed is a 530."""
    client = WireClient(server.url)
    await client.open()
    client.send(2048, commands.Channel.Open())

    assert 530 == (await client.fate()).code


@pytest.mark.parametrize("seed", range(5))
async def test_publishers_killed_in_the_middle(server: AmqpServer, seed: int):
    """Connections cut at any byte of a burst leave whole messages only, all that were confirmed among them."""
    dice = random.Random(seed)
    confirmed: set[bytes] = set()

    async def burst(name: int) -> None:
        client = WireClient(server.url)
        await client.open()
        client.send(1, commands.Confirm.Select())
        await client.expect(commands.Confirm.SelectOk)
        pieces: list[bytes] = []
        writer, client.writer = client.writer, _Recorder(pieces)  # type: ignore[assignment]
        bodies = [b"%d-%d-" % (name, number) + bytes(dice.randrange(3000)) for number in range(200)]
        for body in bodies:
            client.publish("it", body)
        client.writer = writer
        stream = b"".join(pieces)
        writer.write(stream[: dice.randrange(len(stream))])
        last = 0
        try:
            while True:
                _, frame = await client.read(within=0.1)
                if isinstance(frame, commands.Basic.Ack):
                    last = frame.delivery_tag
        except TimeoutError:
            pass
        confirmed.update(bodies[:last])
        client.cut()

    async with await aio_pika.connect(server.url) as connection:
        channel = await connection.channel()
        await channel.declare_queue("it")
        await asyncio.gather(*(burst(name) for name in range(5)))
        stored = [message.body for message in server.queue("it").messages]

        assert confirmed <= set(stored)
        for name in range(5):
            numbers = [int(body.split(b"-")[1]) for body in stored if body.startswith(b"%d-" % name)]
            assert list(range(len(numbers))) == numbers
        await channel.queue_delete("it")


async def test_consumers_killed_in_the_middle(server: AmqpServer):
    """Whatever is cut while messages are handed out, each of them is acked once or ready again, in order."""
    async with await aio_pika.connect(server.url) as connection:
        channel = await connection.channel()
        await channel.declare_queue("it")
        for number in range(300):
            await channel.default_exchange.publish(Message(str(number).encode()), "it")
        acked = 0
        for _ in range(10):
            client = WireClient(server.url)
            await client.open()
            client.send(1, commands.Basic.Qos(prefetch_count=50), commands.Basic.Consume(queue="it"))
            for _ in range(20):
                await client.expect(commands.Basic.Deliver)
            client.send(1, commands.Basic.Ack(5, multiple=True))
            client.send(1, commands.Basic.Qos(prefetch_count=50))
            await client.expect(commands.Basic.QosOk)
            acked += 5
            client.cut()
            await until(lambda: not server.queue("it").unacked)
        left = [int(message.body) for message in server.queue("it").messages]

        assert list(range(acked, 300)) == left
        await channel.queue_delete("it")


async def test_a_defect_of_the_server_is_said_and_survived(
    server: AmqpServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """An error nobody thought of ends one connection with 541, and the log has its traceback."""

    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    client = WireClient(server.url)
    await client.open()
    with monkeypatch.context() as patch:
        patch.setattr(server._hub.broker, "declare_queue", broken)
        client.send(1, commands.Queue.Declare(queue="it"))
        fate = await client.fate()

    assert 541 == fate.code
    assert "ZeroDivisionError" in caplog.text
