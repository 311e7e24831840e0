"""The server as a test, a fixture or a demo holds it: its life, its clock, its faults, and looking inside."""

from __future__ import annotations

import asyncio
import logging
import socket

import aio_pika
import aiormq
import pytest
from aio_pika import Message

from meshkit.embedded import AmqpServer, run_in_thread, serve
from meshkit.testing.clock import ManualClock

RUNG = {"x-queue-type": "quorum", "x-message-ttl": 10_000, "x-dead-letter-exchange": ""}


@pytest.fixture
async def server():
    async with AmqpServer() as running:
        yield running


@pytest.fixture
async def connection(server: AmqpServer):
    async with await aio_pika.connect(server.url, client_properties={"connection_name": "the test"}) as opened:
        yield opened


# --- life -------------------------------------------------------------------------------------------------------------


async def test_says_where_it_is():
    """The URL is what a client connects to, with the login quoted."""
    async with AmqpServer(user="a/b", password="c:d") as server:
        assert f"amqp://a%2Fb:c%3Ad@127.0.0.1:{server.port}/" == server.url
        async with await aio_pika.connect(server.url):
            assert 1 == server.connections()


async def test_names_itself(connection: aio_pika.abc.AbstractConnection):
    """Nobody takes it for RabbitMQ."""
    properties = connection.transport.connection.server_properties

    assert "meshkit-embedded" == properties["product"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.org", ""])
def test_binds_loopback_only(host: str):
    """Any other host is refused, with the reason and what to use instead."""
    with pytest.raises(ValueError, match=r"binds loopback addresses only, not .* use host='127\.0\.0\.1', or a real"):
        AmqpServer(host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost"])
async def test_binds_any_loopback_address(host: str):
    """Each name of this machine to itself will do."""
    async with AmqpServer(host=host) as server, await aio_pika.connect(server.url):
        pass


async def test_a_taken_port_is_an_os_error(server: AmqpServer):
    """Whoever starts it on a port in use gets the system's error."""
    with pytest.raises(OSError, match="in use"):
        await AmqpServer(port=server.port).start()


async def test_has_no_port_before_it_starts():
    """Asking too early says so."""
    with pytest.raises(RuntimeError, match="no port before it is started"):
        _ = AmqpServer().url


async def test_forgets_everything_when_it_stops():
    """A server that is started again is empty, and on another port unless told."""
    server = AmqpServer()
    async with server, await aio_pika.connect(server.url) as connection:
        await (await connection.channel()).declare_queue("it", durable=True)
        assert ["it"] == server.queues()
    async with server:
        assert [] == server.queues()


async def test_says_goodbye(connection: aio_pika.abc.AbstractConnection, server: AmqpServer):
    """Clients of a server that stops are told, and its port is free."""
    closed: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    connection.close_callbacks.add(lambda _, error: closed.done() or closed.set_result(error))
    port = server.port

    await server.stop()

    assert "CONNECTION_FORCED" in str(await asyncio.wait_for(closed, 5))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    await server.stop()


async def test_serves_until_cancelled():
    """`serve` tells when it listens, and ends with its task."""
    ready: asyncio.Future[AmqpServer] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(port=0, ready=ready.set_result))
    server = await ready
    async with await aio_pika.connect(server.url):
        pass

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


# --- the clock --------------------------------------------------------------------------------------------------------


async def test_a_clock_moves_rungs():
    """A message that waits ten seconds comes when the test says that they have passed."""
    async with AmqpServer(clock=ManualClock()) as server, await aio_pika.connect(server.url) as connection:
        channel = await connection.channel()
        work = await channel.declare_queue("work", durable=True)
        rung = await channel.declare_queue("rung", durable=True, arguments=RUNG)
        await rung.bind(await channel.declare_exchange("rung", aio_pika.ExchangeType.FANOUT))
        await (await channel.get_exchange("rung")).publish(Message(b"1"), "work")

        await server.advance(9.9)
        assert await work.get(fail=False) is None
        await server.advance(0.2)

        message = await work.get()
        await message.ack()
        assert b"1" == message.body


async def test_a_clock_nobody_can_move_is_not_advanced(server: AmqpServer):
    """On real time `advance` says what it would need."""
    with pytest.raises(RuntimeError, match="moves an injected clock"):
        await server.advance(1)


async def test_a_clock_moves_whoever_moves_it():
    """A clock that others advance too, such as the process's own, drives the server all the same."""
    clock = ManualClock()
    async with AmqpServer(clock=clock) as server, await aio_pika.connect(server.url) as connection:
        channel = await connection.channel()
        await channel.declare_queue("it", arguments={"x-message-ttl": 1000})
        await channel.default_exchange.publish(Message(b"1"), "it")

        await clock.advance(2)

        assert [] == server.queue("it").messages


async def test_deliveries_of_one_step_do_not_wait_for_the_next():
    """What an expiry sets free reaches its consumer at its time, so that a handler's own timers come after it."""
    clock = ManualClock()
    async with AmqpServer(clock=clock) as server, await aio_pika.connect(server.url) as connection:
        channel = await connection.channel()
        work = await channel.declare_queue("work")
        await channel.declare_queue("rung", arguments={"x-message-ttl": 10_000, "x-dead-letter-exchange": "", "x-dead-letter-routing-key": "work"})  # fmt: skip
        got = asyncio.Event()

        async def handle(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            await message.ack()
            got.set()

        await work.consume(handle)
        await channel.default_exchange.publish(Message(b"1"), "rung")

        await server.advance(10)

        await asyncio.wait_for(got.wait(), 5)


async def test_a_delivery_that_is_never_acked_ends_its_channel():
    """After the consumer timeout the channel is closed in RabbitMQ's words and its deliveries come back; an ack in
    time starts the count anew for the next one."""
    async with AmqpServer(clock=ManualClock()) as server, await aio_pika.connect(server.url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue("it")
        closed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        channel.close_callbacks.add(lambda _, error: closed.set_result(error))
        for _ in range(2):
            await channel.default_exchange.publish(Message(b"1"), "it")
        first = await queue.get()
        await server.advance(1000)
        await queue.get()
        await first.ack()
        await channel.set_qos(0)
        await server.advance(1799)
        assert not closed.done()

        await server.advance(1)

        expected = "delivery acknowledgement on channel 1 timed out. Timeout value used: 1800000 ms"
        assert expected in str(await asyncio.wait_for(closed, 5))
        assert [True] == [message.redelivered for message in server.queue("it").messages]


# --- looking inside ---------------------------------------------------------------------------------------------------


async def test_shows_what_waits(server: AmqpServer, connection: aio_pika.abc.AbstractConnection):
    """A look at a queue tells bodies, properties, where they came from, and changes nothing."""
    channel = await connection.channel()
    queue = await channel.declare_queue("orders.dlq", durable=True, arguments={"x-queue-type": "quorum"})
    message = Message(b"1", message_id="7", headers={"meshkit-reason": "permanent"})
    await channel.default_exchange.publish(message, "orders.dlq")

    for _ in range(2):
        view = server.queue("orders.dlq")
        (seen,) = view.messages
        assert (b"1", "7", {"meshkit-reason": "permanent"}) == (seen.body, seen.properties.message_id, seen.headers)
        assert ("", "orders.dlq", False, 0) == (seen.exchange, seen.routing_key, seen.redelivered, seen.delivery_count)
        assert ({"x-queue-type": "quorum"}, 0, 0, 0) == (view.arguments, view.unacked, view.consumers, view.held)
    held = await queue.get()
    assert ([], 1) == (server.queue("orders.dlq").messages, server.queue("orders.dlq").unacked)
    await held.ack()


async def test_a_queue_that_is_not_there_is_a_key_error(server: AmqpServer):
    """Looking at what does not exist says its name."""
    with pytest.raises(KeyError, match="nowhere"):
        server.queue("nowhere")


# --- faults -----------------------------------------------------------------------------------------------------------


async def test_drops_confirms(server: AmqpServer, connection: aio_pika.abc.AbstractConnection):
    """A publish whose confirm is dropped is stored, and its publisher waits; the next one is confirmed."""
    channel = await connection.channel()
    await channel.declare_queue("it")
    server.faults.drop_confirms(1)

    with pytest.raises(asyncio.TimeoutError):
        await channel.default_exchange.publish(Message(b"1"), "it", timeout=0.2)
    await channel.default_exchange.publish(Message(b"2"), "it", timeout=5)

    assert [b"1", b"2"] == [message.body for message in server.queue("it").messages]


async def test_a_dropped_confirm_is_not_covered_by_a_later_one(
    server: AmqpServer, connection: aio_pika.abc.AbstractConnection
):
    """Confirms after a dropped one are single, so that none says more than it should."""
    channel = await connection.channel()
    await channel.declare_queue("it")
    server.faults.drop_confirms(1)

    results = await asyncio.gather(
        *(channel.default_exchange.publish(Message(b"1"), "it", timeout=0.5) for _ in range(20)), return_exceptions=True
    )

    assert 1 == sum(isinstance(result, asyncio.TimeoutError) for result in results)


async def test_drops_confirms_until_restored(server: AmqpServer, connection: aio_pika.abc.AbstractConnection):
    """Without a count all confirms are dropped until the test says otherwise."""
    channel = await connection.channel()
    await channel.declare_queue("it")
    server.faults.drop_confirms()
    for _ in range(2):
        with pytest.raises(asyncio.TimeoutError):
            await channel.default_exchange.publish(Message(b"1"), "it", timeout=0.1)

    server.faults.restore()

    await channel.default_exchange.publish(Message(b"1"), "it", timeout=5)


async def test_nacks_publishes(server: AmqpServer, connection: aio_pika.abc.AbstractConnection):
    """A nacked publish is not stored."""
    channel = await connection.channel()
    await channel.declare_queue("it")
    server.faults.nack_publishes(1)

    with pytest.raises(aiormq.exceptions.DeliveryError):
        await channel.default_exchange.publish(Message(b"1"), "it")
    await channel.default_exchange.publish(Message(b"2"), "it")

    assert [b"2"] == [message.body for message in server.queue("it").messages]


async def test_cuts_the_connections_that_match(server: AmqpServer, connection: aio_pika.abc.AbstractConnection):
    """Connections are cut by name, without a word, and what they held comes back."""
    other = await aio_pika.connect(server.url, client_properties={"connection_name": "publisher"})
    closed = asyncio.Event()
    connection.close_callbacks.add(lambda *_: closed.set())
    channel = await connection.channel()
    queue = await channel.declare_queue("it")
    await channel.default_exchange.publish(Message(b"1"), "it")
    await queue.get()

    assert 1 == server.faults.cut_connections("the test")

    await asyncio.wait_for(closed.wait(), 5)
    assert [True] == [message.redelivered for message in server.queue("it").messages]
    assert not other.is_closed
    await other.close()


async def test_refuses_logins_and_connections(server: AmqpServer):
    """A server told to refuse does, until it is restored."""
    server.faults.refuse_logins()
    with pytest.raises(aiormq.exceptions.ProbableAuthenticationError):
        await aio_pika.connect(server.url)
    server.faults.restore()
    server.faults.refuse_connections()
    with pytest.raises(aio_pika.exceptions.AMQPConnectionError):
        await aio_pika.connect(server.url)
    server.faults.restore()

    async with await aio_pika.connect(server.url):
        pass


async def test_keeps_queues_while_it_refuses_connections():
    """An outage costs connections and exclusive queues, nothing else; robust clients come back by themselves."""
    async with AmqpServer() as server:
        connection = await aio_pika.connect_robust(server.url, reconnect_interval=0.05)
        async with connection:
            channel = await connection.channel()
            await channel.declare_queue("it")
            await channel.default_exchange.publish(Message(b"1"), "it")
            server.faults.refuse_connections()
            await asyncio.sleep(0.1)
            server.faults.restore()

            await asyncio.wait_for(connection.ready(), 5)
            message = await (await (await connection.channel()).get_queue("it")).get(timeout=5)
            await message.ack()
            assert b"1" == message.body


async def test_blocks_publishers(server: AmqpServer, connection: aio_pika.abc.AbstractConnection):
    """Under an alarm a publish waits, a connection that only consumes does not, and after it all is confirmed."""
    channel = await connection.channel()
    await channel.declare_queue("it")
    server.faults.block_publishers()

    publishing = asyncio.ensure_future(channel.default_exchange.publish(Message(b"1"), "it"))
    await asyncio.sleep(0.1)
    assert not publishing.done()
    async with await aio_pika.connect(server.url) as other:
        assert await (await (await other.channel()).get_queue("it")).get(fail=False) is None
    server.faults.restore()

    await asyncio.wait_for(publishing, 5)
    assert 1 == len(server.queue("it").messages)


async def test_closes_channels(server: AmqpServer, connection: aio_pika.abc.AbstractConnection):
    """A test can have channels closed with the error it wants to see handled."""
    channel = await connection.channel()
    closed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    channel.close_callbacks.add(lambda _, error: closed.set_result(error))

    server.faults.close_channels(406, "delivery acknowledgement on channel 1 timed out")

    assert "PRECONDITION_FAILED - delivery acknowledgement" in str(await asyncio.wait_for(closed, 5))


# --- a thread ---------------------------------------------------------------------------------------------------------


def test_runs_in_a_thread_for_code_that_blocks():
    """In a thread it is reached by plain calls: looking, faults, and its clock."""
    with run_in_thread(clock=ManualClock()) as server:

        async def publish() -> None:
            async with await aio_pika.connect(server.url) as connection:
                channel = await connection.channel()
                await channel.declare_queue("it", durable=True, arguments={"x-message-ttl": 60_000})
                await channel.default_exchange.publish(Message(b"1"), "it")

        asyncio.run(publish())
        assert [b"1"] == [message.body for message in server.queue("it").messages]
        assert ["it"] == server.queues()
        assert 0 == server.faults.cut_connections()
        server.advance(61)
        assert [] == server.queue("it").messages


async def test_is_advanced_from_another_loop():
    """A test's own loop may advance a server that lives in a thread."""
    with run_in_thread(clock=ManualClock()) as server:
        async with await aio_pika.connect(server.url) as connection:
            channel = await connection.channel()
            await channel.declare_queue("it", arguments={"x-message-ttl": 60_000})
            await channel.default_exchange.publish(Message(b"1"), "it")

            await server.server.advance(61)

            assert [] == server.queue("it").messages


def test_a_thread_that_cannot_start_raises_here():
    """What stops the server from starting is raised where it was asked for."""
    with run_in_thread() as server, pytest.raises(OSError, match="in use"), run_in_thread(port=server.port):
        pass


async def test_logs_what_it_refuses(server: AmqpServer, caplog: pytest.LogCaptureFixture):
    """The log of the server says which connection was refused what."""
    caplog.set_level(logging.INFO, "meshkit.embedded")
    async with await aio_pika.connect(server.url, client_properties={"connection_name": "curious"}) as connection:
        with pytest.raises(aiormq.exceptions.ChannelNotFoundEntity):
            await (await connection.channel()).declare_queue("missing", passive=True)

    assert "channel 1 of 'curious' closed: NOT_FOUND - no queue 'missing' in vhost '/'" in caplog.messages
