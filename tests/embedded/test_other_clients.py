"""pika and kombu, unchanged, against the embedded server."""

from __future__ import annotations

from collections.abc import Iterator

import kombu
import pika
import pika.exceptions
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from meshkit.embedded import ThreadedServer, run_in_thread


@pytest.fixture
def server() -> Iterator[ThreadedServer]:
    with run_in_thread() as running:
        yield running


@pytest.fixture
def channel(server: ThreadedServer) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(server.url))
    opened = connection.channel()
    opened.confirm_delivery()
    yield opened
    connection.close()


def test_pika_publishes_confirms_and_consumes(channel: BlockingChannel, server: ThreadedServer):
    """pika publishes with confirms, consumes with prefetch, acks, and gets its properties back."""
    channel.queue_declare("it", durable=True, arguments={"x-queue-type": "quorum"})
    for number in range(20):
        channel.basic_publish(
            "", "it", str(number).encode(), pika.BasicProperties(headers={"n": number}, message_id=str(number))
        )
    channel.basic_qos(prefetch_count=5)

    got = []
    for method, properties, body in channel.consume("it", inactivity_timeout=5):
        got.append((body, properties.headers["n"], properties.message_id))
        channel.basic_ack(method.delivery_tag)
        if len(got) == 20:
            break
    channel.cancel()

    assert [(str(number).encode(), number, str(number)) for number in range(20)] == got
    assert ([], 0) == (server.queue("it").messages, server.queue("it").unacked)


def test_pika_gets_its_returns(channel: BlockingChannel):
    """An unroutable mandatory publish raises, with what came back."""
    with pytest.raises(pika.exceptions.UnroutableError) as caught:
        channel.basic_publish("", "nowhere", b"1", mandatory=True)

    (returned,) = caught.value.messages
    assert (312, "NO_ROUTE", b"1") == (returned.method.reply_code, returned.method.reply_text, returned.body)


def test_pika_hears_a_nack(channel: BlockingChannel):
    """A full queue with reject-publish raises in pika."""
    channel.queue_declare("full", arguments={"x-max-length": 0, "x-overflow": "reject-publish"})

    with pytest.raises(pika.exceptions.NackError):
        channel.basic_publish("", "full", b"1")


def test_pika_reads_errors(channel: BlockingChannel):
    """A refused declaration raises with RabbitMQ's code and words."""
    channel.queue_declare("it", durable=True)

    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match=r"inequivalent arg 'durable'") as caught:
        channel.queue_declare("it", durable=False)
    assert 406 == caught.value.reply_code


def test_pika_is_refused_with_a_wrong_password(server: ThreadedServer):
    """pika knows a wrong password from a broker that is away."""
    with pytest.raises(pika.exceptions.ProbableAuthenticationError):
        pika.BlockingConnection(pika.URLParameters(server.url.replace("guest:guest", "guest:wrong")))


def test_pika_is_refused_transactions(server: ThreadedServer):
    """tx.select ends the connection with 540, and the words say by whom."""
    connection = pika.BlockingConnection(pika.URLParameters(server.url))

    with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="not implemented by meshkit-embedded") as caught:
        connection.channel().tx_select()
    assert 540 == caught.value.reply_code


def test_kombu_publishes_and_consumes(server: ThreadedServer):
    """kombu declares what it needs, publishes with confirms, consumes and acks."""
    exchange = kombu.Exchange("events", type="topic", durable=True)
    queue = kombu.Queue("it", exchange, routing_key="user.#", durable=True)
    got: list[object] = []

    def handle(body: object, message: kombu.Message) -> None:
        got.append(body)
        message.ack()

    with kombu.Connection(server.url, transport_options={"confirm_publish": True}) as connection:
        producer = connection.Producer()
        for number in range(3):
            producer.publish(
                {"n": number}, exchange=exchange, routing_key="user.created", declare=[queue], serializer="json"
            )
        with connection.Consumer([queue], callbacks=[handle]):
            while len(got) < 3:
                connection.drain_events(timeout=5)

    assert [{"n": 0}, {"n": 1}, {"n": 2}] == got
    assert 0 == server.queue("it").unacked


def test_kombu_gets_its_returns(server: ThreadedServer):
    """A mandatory publish that no queue takes comes back to kombu's callback."""
    returned: list[tuple[int, str]] = []

    def on_return(error: object, exchange: str, routing_key: str, message: object) -> None:
        returned.append((error.reply_code, routing_key))  # type: ignore[attr-defined]

    with kombu.Connection(server.url, transport_options={"confirm_publish": True}) as connection:
        producer = connection.Producer(on_return=on_return)
        producer.publish("1", routing_key="nowhere", mandatory=True)

    assert [(312, "nowhere")] == returned


def test_kombu_simple_queue(server: ThreadedServer):
    """kombu's queue-like interface works as it is."""
    with kombu.Connection(server.url) as connection, connection.SimpleQueue("simple") as queue:
        queue.put({"a": 1})
        message = queue.get(timeout=5)
        assert {"a": 1} == message.payload
        message.ack()
