"""Taking over a queue that exists: `consume(queue, handler, retry=…)` for the handler of an aio-pika consumer."""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Callable
from typing import Any, Final, cast

import aio_pika
from aio_pika.abc import AbstractQueue
from aio_pika.exceptions import MessageProcessError
from aio_pika.patterns import NackMessage, RejectMessage
from aiormq.abc import DeliveredMessage
from pamqp import commands

from meshkit.core.clock import SYSTEM_CLOCK, Clock
from meshkit.core.settings import setting
from meshkit.errors import ConfigurationError, DeadLetter, RetryLater
from meshkit.messaging.inbox import Inbox
from meshkit.messaging.message import Delivery
from meshkit.messaging.schedule import Schedule
from meshkit.policies.circuit_breaker import CircuitBreaker
from meshkit.rabbitmq.bus import RabbitBus, handler_call, handler_name
from meshkit.rabbitmq.consumer import Consumer
from meshkit.rabbitmq.topology import Declare

RETRY: Final = "1s, 10s*3, 5m*4"


class AdoptedMessage(aio_pika.IncomingMessage):
    """What the handler of an aio-pika consumer expects. `ack`, `nack`, `reject` and `process()` write down a verdict,
    which the consumer carries out once, when the handler has ended.

    Giving it back (`requeue=True`) means trying it again by the schedule: at once, as the broker would do it, is a loop
    as hot as the network allows. Refusing it (`requeue=False`) means the dead-letter queue.
    """

    def __init__(self, delivery: Delivery) -> None:
        raw = cast("DeliveredMessage", delivery.raw)
        first = commands.Basic.Deliver(
            consumer_tag=raw.consumer_tag,
            delivery_tag=raw.delivery_tag,
            redelivered=bool(raw.redelivered),
            exchange=delivery.exchange,
            routing_key=delivery.routing_key,
        )
        super().__init__(dataclasses.replace(raw, delivery=first))
        self.delivery = delivery
        self.verdict: DeadLetter | RetryLater | None = None
        self._processed = False

    @property
    def processed(self) -> bool:
        return self._processed

    def _judge(self, verdict: DeadLetter | RetryLater | None) -> None:
        if self._processed:
            raise MessageProcessError("Message already processed", self)
        self._processed = True
        self.verdict = verdict

    async def ack(self, multiple: bool = False) -> None:
        self._judge(None)

    async def nack(self, multiple: bool = False, requeue: bool = True) -> None:
        self._judge(_refused(requeue))

    async def reject(self, requeue: bool = False) -> None:
        self._judge(_refused(requeue))


def _refused(requeue: bool) -> DeadLetter | RetryLater:
    return RetryLater(reason="the handler gave it back") if requeue else DeadLetter("the handler rejected it")


async def consume(
    queue: str | AbstractQueue,
    handler: Callable[[Any], Any],
    *,
    retry: str | Schedule = RETRY,
    url: str | None = None,
    service: str | None = None,
    prefetch: int = 32,
    permanent: tuple[type[Exception], ...] = (),
    breaker: CircuitBreaker | None = None,
    inbox: Inbox | None = None,
    timeout: float | None = None,  # noqa: ASYNC109 - of a handler's try, not of this call
    declare: Declare = "active",
    version: str | None = None,
    ssl_context: ssl.SSLContext | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Consumer:
    """Consume a queue that exists with retries, dead letters and traces, on connections of meshkit's own.

    The queue stays as it was declared. What fails waits in delay rungs, what is given up goes to `<queue>.dlq`.

    Args:
        queue: its name, or the aio-pika queue, which also tells where the broker is.
        handler: gets an `aio_pika.IncomingMessage`; and by name, where it asks, `delivery` and `session`. A plain
            function runs in a thread.
        retry: when a failed message is tried again, `"1s, 10s*3, 5m*4"`.
        url: the broker; `MESHKIT_AMQP_URL` where left out.
        service: who consumes, for dead letters; `MESHKIT_SERVICE` or `OTEL_SERVICE_NAME` where left out.
        prefetch, permanent, breaker, inbox, timeout: as `RabbitBus.subscribe`.
        declare, version, ssl_context, clock: as `RabbitBus`.

    Returns:
        The running consumer; `await consumer.close()` drains and ends it.

    Raises:
        TopologyError: rungs or dead-letter queue exist otherwise, or the queue does not exist.
        ConfigurationError: a value that cannot work.
    """
    if isinstance(queue, str):
        name = queue
    else:
        if queue.exclusive:
            raise ConfigurationError(
                f"{queue.name!r} belongs to one connection, and meshkit consumes over another.",
                "Declare it without exclusive=True.",
            )
        name = queue.name
        if url is None:
            connection = (await queue.channel.get_underlay_channel()).connection
            url = str(connection.url)
            ssl_context = ssl_context or getattr(connection, "ssl_context", None)
    who = setting("service", service, parse=str, default=name, otel="OTEL_SERVICE_NAME")
    bus = RabbitBus(url, who, retry=retry, declare=declare, version=version, ssl_context=ssl_context, clock=clock)
    call = handler_call(handler, session=inbox is not None)

    async def handle(message: AdoptedMessage, delivery: Delivery, session: Any) -> None:
        try:
            await call(message, delivery, session)
        except (NackMessage, RejectMessage) as error:
            raise _refused(bool(error.requeue)) from error
        if message.verdict is not None:
            raise message.verdict

    consumer = bus.adopt(
        name,
        name=handler_name(handler),
        decode=AdoptedMessage,
        handle=handle,
        prefetch=prefetch,
        permanent=permanent,
        breaker=breaker,
        inbox=inbox,
        timeout=timeout,
    )
    try:
        await bus.start()
    except BaseException:
        await bus.close()
        raise
    return consumer
