"""Handshake, heartbeats, and what a broker answers to those who break the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aio_pika
import aiormq
import pytest
from contract_steps import Connect
from pamqp import commands, header
from pamqp.body import ContentBody
from wire_client import Closed, WireClient


@pytest.fixture
async def wire(broker: str):
    """A frame-by-frame client, not connected yet; its socket is closed at the end."""
    client = WireClient(broker)
    yield client
    if hasattr(client, "writer"):
        client.cut()


async def still_works(broker: str) -> bool:
    """Whether the broker takes a new client and a message after what was done to it."""
    connection = await aio_pika.connect(broker)
    async with connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("", exclusive=True)
        await channel.default_exchange.publish(aio_pika.Message(b"1"), queue.name)
        return (await queue.get(timeout=5)).body == b"1"


async def test_offers_what_meshkit_needs(wire: WireClient):
    """The broker introduces itself with the capabilities that meshkit builds on, and PLAIN."""
    await wire.log_in()

    capabilities = wire.start.server_properties["capabilities"]
    for name in ("publisher_confirms", "basic.nack", "consumer_cancel_notify", "connection.blocked", "per_consumer_qos", "authentication_failure_close"):  # fmt: skip
        assert (name, True) == (name, capabilities.get(name))
    assert "PLAIN" in wire.start.mechanisms.split()


async def test_refuses_a_wrong_password(wire: WireClient):
    """A wrong password is a 403 for who understands it, in words that do not tell which part was wrong."""
    await wire.log_in(password="wrong")

    fate = await wire.fate()

    assert 403 == fate.code
    assert fate.text.startswith("ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN")


async def test_hangs_up_on_a_wrong_password(wire: WireClient):
    """Who does not know authentication_failure_close is hung up on."""
    wire.capabilities = {}
    await wire.log_in(password="wrong")

    assert 0 == (await wire.fate()).code


async def test_a_wrong_password_raises_in_the_client(broker: str):
    """aio-pika tells a wrong password from a broker that is away."""
    with pytest.raises(aiormq.exceptions.ProbableAuthenticationError):
        await aio_pika.connect(broker.replace("guest:guest", "guest:wrong"))


async def test_refuses_another_virtual_host(wire: WireClient):
    """A virtual host that does not exist is a 530."""
    wire.vhost = "elsewhere"
    with pytest.raises(Closed) as closed:
        await wire.open()

    assert (530, True) == (closed.value.code, closed.value.text.startswith("NOT_ALLOWED - vhost elsewhere not found"))


async def test_answers_another_protocol_with_its_own(wire: WireClient, broker: str):
    """Who begins with other bytes is told the version that is spoken here, and hung up on."""
    await wire.dial()
    wire.writer.write(b"GET / HTTP/1.1\r\n\r\n")

    assert b"AMQP\x00\x00\x09\x01" == await asyncio.wait_for(wire.reader.read(8), 5)
    assert await still_works(broker)


@pytest.mark.parametrize(("frame_max", "channel_max"), [(100, 100), (0, 100), (1 << 20, 100), (131_072, 0)])
async def test_refuses_limits_out_of_range(wire: WireClient, frame_max: int, channel_max: int):
    """A client may lower frame_max and channel_max, not raise them, and not lower frames under 4,096 bytes; RabbitMQ
    only hangs up."""
    await wire.log_in()
    await wire.tune(frame_max=frame_max, channel_max=channel_max)
    wire.send(0, commands.Connection.Open(wire.vhost))

    assert (await wire.fate()).code in (530, 0)


async def test_keeps_to_the_frames_that_were_agreed(wire: WireClient):
    """A body for a client of small frames comes in small frames."""
    wire.frame_max = 4096
    await wire.open()
    wire.send(1, commands.Queue.Declare(queue="it", exclusive=True))
    wire.send(
        1,
        commands.Basic.Publish(routing_key="it"),
        header.ContentHeader(body_size=10_000),
        *(ContentBody(b"x" * size) for size in (4088, 4088, 1824)),
    )
    wire.send(1, commands.Basic.Get(queue="it", no_ack=True))

    await wire.expect(commands.Basic.GetOk)
    await wire.read()
    assert [4088, 4088, 1824] == [len((await wire.read())[1].value) for _ in range(3)]


async def test_beats_in_both_directions(wire: WireClient):
    """The broker sends heartbeats while there is nothing else to send, and keeps who sends them."""
    await wire.open(heartbeat=1)

    async def beat() -> None:
        for _ in range(6):
            await asyncio.sleep(0.5)
            wire.send_raw(8, 0, b"")

    beating = asyncio.create_task(beat())
    assert 2 <= await wire.beats(within=3.0) <= 7
    await beating
    wire.send(1, commands.Basic.Qos(prefetch_count=1))
    await wire.expect(commands.Basic.QosOk)


async def test_cuts_who_is_silent(wire: WireClient):
    """A client that sends nothing for two or three intervals is cut."""
    await wire.open(heartbeat=1)

    async with asyncio.timeout(6):
        await wire.fate()


Breach = Callable[[WireClient], Awaitable[None] | None]


@pytest.mark.parametrize(
    ("breach", "codes"),
    [
        pytest.param(lambda wire: wire.send_raw(1, 1, b"\x00\x3c\x00\x0a" + bytes(7), end=b"\x00"), {501}, id="frame end"),
        pytest.param(lambda wire: wire.writer.write(b"\x01\x00\x01\x7f\xff\xff\xff" + bytes(1000)), {501}, id="frame size"),
        pytest.param(lambda wire: wire.send_raw(7, 1, b"x"), {501}, id="frame type"),
        pytest.param(lambda wire: wire.send(2, commands.Basic.Qos()), {504}, id="channel not open"),
        pytest.param(lambda wire: wire.send(1, commands.Channel.Open()), {504}, id="channel opened twice"),
        pytest.param(lambda wire: wire.send(0, commands.Basic.Qos()), {504}, id="method on channel 0"),
        pytest.param(lambda wire: wire.send(1, header.ContentHeader()), {505}, id="header without method"),
        pytest.param(lambda wire: wire.send(1, ContentBody(b"x")), {505}, id="body without header"),
        pytest.param(lambda wire: wire.send(1, commands.Basic.Publish(), commands.Basic.Qos()), {505}, id="method instead of header"),
        pytest.param(lambda wire: wire.send(1, commands.Basic.Publish(), ContentBody(b"x")), {505}, id="body instead of header"),
        pytest.param(lambda wire: wire.send_raw(1, 1, b"\x00\x3c\x00\xff"), {540, 0}, id="unknown method"),
        pytest.param(lambda wire: wire.send(1, commands.Basic.Publish(immediate=True), header.ContentHeader()), {540}, id="immediate"),
        pytest.param(lambda wire: wire.send(1, commands.Channel.Flow(active=False)), {540}, id="flow off"),
        pytest.param(lambda wire: wire.send(1, commands.Basic.Qos(prefetch_size=1)), {540}, id="prefetch size"),
        pytest.param(lambda wire: wire.send(1, commands.Basic.Recover(requeue=False)), {540}, id="recover without requeue"),
        pytest.param(lambda wire: wire.send(1, commands.Exchange.Declare(exchange="it", exchange_type="odd")), {503}, id="exchange type"),
    ],
)  # fmt: skip
async def test_names_a_breach_of_the_protocol(wire: WireClient, broker: str, breach: Breach, codes: set[int]):
    """A client that breaks the protocol is told how, its connection is closed, and the broker goes on."""
    await wire.open()

    breach(wire)

    assert (await wire.fate()).code in codes
    assert await still_works(broker)


async def test_reuses_no_consumer_tag(wire: WireClient):
    """A consumer tag in use on the channel is a 530."""
    await wire.open()
    wire.send(1, commands.Queue.Declare(queue="it", exclusive=True))
    for _ in range(2):
        wire.send(1, commands.Basic.Consume(queue="it", consumer_tag="mine"))

    fate = await wire.fate()

    assert (530, "NOT_ALLOWED - attempt to reuse consumer tag 'mine'") == (fate.code, fate.text)


async def test_a_closed_channel_hears_nothing_more(wire: WireClient):
    """Between the broker's channel.close and the client's close-ok all is dropped; then the number is free again."""
    await wire.open()
    wire.send(1, commands.Queue.Declare(queue="missing", passive=True), commands.Queue.Declare(queue="ghost"))
    _, close = await wire.read()
    assert 404 == close.reply_code
    wire.send(1, commands.Channel.CloseOk(), commands.Channel.Open())
    await wire.expect(commands.Channel.OpenOk)

    wire.send(1, commands.Queue.Declare(queue="ghost", passive=True))
    _, close = await wire.read()
    assert (404, 50, 10) == (close.reply_code, close.class_id, close.method_id)


async def test_shortens_what_it_has_to_say(wire: WireClient):
    """An error longer than AMQP lets it be is cut, not dropped, wherever its letters end."""
    await wire.open()
    name = "ü".encode() * 127
    wire.send_raw(1, 1, b"\x00\x32\x00\x0a\x00\x00" + bytes((len(name),)) + name + b"\x01" + bytes(4))

    _, close = await wire.read()
    assert (404, True) == (close.reply_code, close.reply_text.startswith("NOT_FOUND - no queue 'üüü"))


async def test_forgets_half_a_publish(wire: WireClient, connect: Connect):
    """A client that dies in the middle of a message has sent none."""
    await wire.open()
    channel = await (await connect()).channel()
    queue = await channel.declare_queue("it", auto_delete=False)
    wire.publish("it", b"whole")
    wire.send(1, commands.Basic.Publish(routing_key="it"), header.ContentHeader(body_size=10), ContentBody(b"half"))
    await wire.writer.drain()
    await asyncio.sleep(0.1)
    wire.cut()

    assert b"whole" == (await queue.get(timeout=5)).body
    assert await queue.get(fail=False) is None


async def test_passes_on_headers_that_python_cannot_hold(wire: WireClient):
    """A timestamp of the year 300 million and text in Latin-1 leave as they came: they are not the broker's to judge."""
    await wire.open()
    raw = (
        b"\x08odd-timeT"
        + b"\x7f"
        + b"\xff" * 7
        + b"\x08odd-textS"
        + b"\x00\x00\x00\x02\xfc\xe9"
        + b"\x05shorts\x00\x01"
    )
    properties = b"\x20\x80" + len(raw).to_bytes(4, "big") + raw + b"\x02\xfc\xe9"
    wire.send(1, commands.Queue.Declare(queue="it", exclusive=True), commands.Basic.Publish(routing_key="it"))
    wire.send_raw(2, 1, b"\x00\x3c\x00\x00" + (1).to_bytes(8, "big") + properties)
    wire.send(1, ContentBody(b"x"), commands.Basic.Get(queue="it", no_ack=True))

    await wire.expect(commands.Basic.GetOk)
    head = await wire.reader.readexactly(7)
    content = await wire.reader.readexactly(int.from_bytes(head[3:], "big") + 1)

    assert properties == content[12:-1]
