"""`RabbitBus`: typed events over RabbitMQ, published with confirms and consumed without loss."""

from __future__ import annotations

import asyncio
import inspect
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from yarl import URL

from meshkit.core.clock import SYSTEM_CLOCK, Clock
from meshkit.core.events import error_type
from meshkit.core.lifecycle import Check
from meshkit.core.scope import current_scope
from meshkit.core.settings import setting
from meshkit.core.trace import AMBIENT, Ambient, Span, SpanKind, TraceContext, parse_traceparent, tracer
from meshkit.errors import ConfigurationError, PublishError, TopologyError
from meshkit.messaging import events as ev
from meshkit.messaging import headers as h
from meshkit.messaging.dead_letters import Origin
from meshkit.messaging.inbox import Inbox
from meshkit.messaging.message import Delivery, Message
from meshkit.messaging.schedule import DEFAULT, Schedule, schedule
from meshkit.policies.circuit_breaker import CircuitBreaker
from meshkit.policies.timeout import Timeout
from meshkit.rabbitmq.connection import LOST, Link, checked_url, server_attributes
from meshkit.rabbitmq.consumer import Consumer, Subscription
from meshkit.rabbitmq.publisher import Publisher, outcome_of
from meshkit.rabbitmq.topology import Declare, Topology
from meshkit.telemetry import recorder, tracing

F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger("meshkit.rabbitmq")

_DEFAULT_URL: Final = "amqp://guest:guest@127.0.0.1:5672/"


class RabbitBus:
    """Publishes typed events and runs the handlers that subscribed to them. A part of the process's lifecycle.

        bus = RabbitBus(service="course-service")

        @bus.subscribe(UserCreated)
        async def on_user_created(event: UserCreated) -> None: ...

        await bus.publish(UserCreated(...))

    Args:
        url: the broker, `amqp://user:password@host:5672/vhost`; `MESHKIT_AMQP_URL` where left out.
        service: the service's name: queues begin with it, failures name it; `MESHKIT_SERVICE` or `OTEL_SERVICE_NAME`
            where left out.
        retry: when a failed message is tried again, `"50ms, 10s*3, 1m*3, 10m*2"`; `""` for never.
        prefetch: how many messages of one queue are in hand at the most.
        declare: `"active"` makes queues and exchanges that are missing, `"passive"` only looks for them, `"off"` does
            neither, retries in process, and waits for nothing longer than the process lives.
        version: the service's version, for dead letters; `MESHKIT_SERVICE_VERSION` where left out.
        publish_timeout: seconds until a publish that is not confirmed fails.
        in_flight: how many messages may wait for their confirm at a time.
        ssl_context: for `amqps://`, where the parameters of the URL (`cafile`, `certfile`, `keyfile`) do not suffice.
        clock: where the time comes from.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    def __init__(
        self,
        url: str | None = None,
        service: str | None = None,
        *,
        retry: str | Schedule = DEFAULT,
        prefetch: int = 32,
        declare: Declare = "active",
        version: str | None = None,
        publish_timeout: float = 10.0,
        in_flight: int = 1000,
        ssl_context: ssl.SSLContext | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        service = setting("service", service, parse=str, default="", otel="OTEL_SERVICE_NAME")
        if not service:
            raise ConfigurationError(
                "a bus needs to know whose it is: queues are named after the service.",
                'Give service="course-service".',
            )
        if publish_timeout <= 0:
            raise ConfigurationError(
                f"publish_timeout is how long a publish may take, so above 0, not {publish_timeout}."
            )
        if in_flight < 1:
            raise ConfigurationError(f"in_flight is how many confirms may be open, so 1 or above, not {in_flight}.")
        tracing.install()
        recorder.install()
        self.service = service
        self.url: URL = checked_url(setting("amqp_url", url, parse=str, default=_DEFAULT_URL))
        self._schedule = schedule(retry)
        self._prefetch = _checked_prefetch(prefetch)
        self._clock = clock
        self._origin = Origin(service=service, version=setting("service_version", version, parse=str, default=""))
        # Two connections: a broker under a memory alarm stops reading from those that publish, and with them their acks.
        self._publish_link = Link(self.url, role="publish", service=service, ssl_context=ssl_context, clock=clock)
        self._consume_link = Link(self.url, role="consume", service=service, ssl_context=ssl_context, clock=clock)
        self._publisher = Publisher(self._publish_link, clock=clock, timeout=publish_timeout, in_flight=in_flight)
        self._topology = Topology(self._consume_link, declare=declare, clock=clock)
        self._consumers: list[Consumer] = []
        self._exchanges: set[str] = set()
        self._server = server_attributes(self.url)
        self._started = False
        self._closed = False

    def __repr__(self) -> str:
        return f"RabbitBus({self.service!r}, {self.url.host}:{self.url.port})"

    # -- subscribing --------------------------------------------------------------------------------------------------

    def subscribe(
        self,
        model: type,
        *,
        queue: str | None = None,
        retry: str | Schedule | None = None,
        breaker: CircuitBreaker | None = None,
        inbox: Inbox | None = None,
        prefetch: int | None = None,
        timeout: float | None = None,
        permanent: tuple[type[Exception], ...] = (),
    ) -> Callable[[F], F]:
        """Have a function called with each event of a type.

        Its first parameter is the event. It may ask for more by name: `delivery`, and with an inbox `session`.
        It returns, and the message is done with; or it raises, and the message is tried again by the schedule.
        `RetryLater`, `DeadLetter` and `Discard` are its own verdicts.

        Args:
            model: a class declared with `@event`.
            queue: `"<service>.<event>"` where left out, the dots of the event's type as hyphens.
            retry: a schedule of its own.
            breaker: guards the handler as a whole; the consumer pauses while it is open.
            inbox: lets the handler take effect once for each message.
            prefetch: as the bus's; 1 handles one message after another, in order.
            timeout: seconds that one try may take.
            permanent: errors that another try cannot mend: a dead letter at once.

        Raises:
            ConfigurationError: the bus runs already, the class is no event, or the function's parameters do not fit.
        """
        kind = ev.event_type(model)
        name = queue or f"{self.service}.{kind.name.replace('.', '-')}"
        own_schedule = self._schedule if retry is None else schedule(retry)
        policies = _policies(breaker, timeout, self._clock)
        most = self._prefetch if prefetch is None else _checked_prefetch(prefetch)

        def register(handler: F) -> F:
            if self._started:
                raise ConfigurationError(
                    f"{handler_name(handler)} subscribes to {kind.name!r} on a bus that runs already.",
                    "Subscribe before the bus is started.",
                )
            if any(consumer.queue == name for consumer in self._consumers):
                raise ConfigurationError(
                    f"two handlers take their messages from {name!r}: each message would reach one of them.",
                    "Give one of them a queue= of its own.",
                )

            async def prepare() -> None:
                await self._topology.exchange(kind.exchange)
                await self._topology.dead_letters(name)
                await self._topology.queue(name, exchange=kind.exchange, routing_key=kind.name)
                for rung in own_schedule.rungs():
                    await self._topology.rung(rung)

            self._add(
                Subscription(
                    queue=name,
                    name=handler_name(handler),
                    decode=lambda delivery: ev.decode(delivery.message, kind),
                    handle=handler_call(handler, session=inbox is not None),
                    schedule=own_schedule,
                    permanent=permanent,
                    policies=policies,
                    inbox=inbox,
                    prefetch=most,
                    prepare=prepare,
                )
            )
            return handler

        return register

    def adopt(
        self,
        queue: str,
        *,
        name: str,
        decode: Callable[[Delivery], Any],
        handle: Callable[[Any, Delivery, Any], Awaitable[object]],
        prefetch: int,
        permanent: tuple[type[Exception], ...],
        breaker: CircuitBreaker | None,
        inbox: Inbox | None,
        timeout: float | None,
    ) -> Consumer:
        """Consume a queue that somebody else declares; what `meshkit.rabbitmq.consume` does. Closing the consumer closes
        the bus."""

        async def prepare() -> None:
            await self._topology.existing(queue)
            await self._topology.dead_letters(queue)
            for rung in self._schedule.rungs():
                await self._topology.rung(rung)

        consumer = self._add(
            Subscription(
                queue=queue,
                name=name,
                decode=decode,
                handle=handle,
                schedule=self._schedule,
                permanent=permanent,
                policies=_policies(breaker, timeout, self._clock),
                inbox=inbox,
                prefetch=_checked_prefetch(prefetch),
                prepare=prepare,
            )
        )
        consumer.at_close(self.close)
        return consumer

    def _add(self, subscription: Subscription) -> Consumer:
        consumer = Consumer(
            subscription,
            link=self._consume_link,
            publisher=self._publisher,
            topology=self._topology,
            origin=self._origin,
            clock=self._clock,
        )
        self._consumers.append(consumer)
        return consumer

    # -- publishing ---------------------------------------------------------------------------------------------------

    async def publish(
        self, event: Any, *, key: str | None = None, deadline: datetime | None = None, message_id: str | None = None
    ) -> str:
        """Publish an event, and return its message id once the broker has confirmed that a queue has it.

        Inside a handler the id is derived from the message that is handled, so that a redelivery publishes the same. It
        goes by the order of the events of one type: where that may differ from try to try (a TaskGroup, a set), give
        each its `message_id`.

        Args:
            event: an instance of a class declared with `@event`.
            key: routing key; the event's type where left out.
            deadline: after this point nobody wants it handled; with a time zone. For commands, not for events.
            message_id: the id to use instead of a new one.

        Raises:
            UnroutableError: no queue is bound for it.
            PublishTimeoutError: not confirmed in time.
            PublishNackedError: the broker refused it.
            PublishError: one of the above, or it cannot be published as it is.
        """
        message, kind = self._made(event, message_id, deadline)
        routing_key = key or kind.name
        span = self._span("publish", "producer", kind.exchange, routing_key, message)
        carrier: dict[str, str] = {}
        tracer().inject(carrier, span=span)
        if carrier:
            message = _with_headers(message, carrier)
        await self._confirmed(message, kind.exchange, routing_key, span)
        return message.message_id

    def envelope(
        self, event: Any, *, key: str | None = None, deadline: datetime | None = None, message_id: str | None = None
    ) -> tuple[Message, str, str]:
        """The finished message of an event, its exchange and its routing key: for an outbox to write down.

        The span that is made here, and ended, is the message's creation context; `publish_message` goes under it.

        Raises:
            ConfigurationError: the class is no event.
        """
        message, kind = self._made(event, message_id, deadline)
        routing_key = key or kind.name
        span = self._span("create", "producer", kind.exchange, routing_key, message)
        carrier: dict[str, str] = {}
        tracer().inject(carrier, span=span)
        span.end()
        return (_with_headers(message, carrier) if carrier else message), kind.exchange, routing_key

    async def publish_message(self, message: Message, exchange: str, routing_key: str) -> None:
        """Publish a finished message as it is, and return once the broker has confirmed it.

        Raises:
            PublishError: as `publish`.
        """
        creation = parse_traceparent(message.headers.get(h.TRACEPARENT), message.headers.get(h.TRACESTATE, ""))
        span = self._span("publish", "client", exchange, routing_key, message, parent=creation or AMBIENT)
        await self._confirmed(message, exchange, routing_key, span)

    def _made(self, event: Any, message_id: str | None, deadline: datetime | None) -> tuple[Message, ev.EventType]:
        return ev.envelope(
            event,
            source=self.service,
            clock=self._clock,
            scope=current_scope(),
            message_id=message_id,
            deadline=deadline,
        )

    def _span(
        self,
        operation: str,
        kind: SpanKind,
        exchange: str,
        routing_key: str,
        message: Message,
        *,
        parent: TraceContext | Ambient = AMBIENT,
    ) -> Span:
        attributes = {
            **self._server,
            "messaging.system": "rabbitmq",
            "messaging.operation.name": operation,
            "messaging.operation.type": "send" if operation == "publish" else "create",
            "messaging.destination.name": exchange or routing_key,
            "messaging.rabbitmq.destination.routing_key": routing_key,
            "messaging.message.id": message.message_id,
        }
        if message.correlation_id:
            attributes["messaging.message.conversation_id"] = message.correlation_id
        return tracer().start(f"{operation} {exchange or routing_key}", kind=kind, parent=parent, attributes=attributes)

    async def _confirmed(self, message: Message, exchange: str, routing_key: str, span: Span) -> None:
        context = span.context
        try:
            await self._publisher.send(
                message, exchange, routing_key, traceparent=context.traceparent if context is not None else ""
            )
        except PublishError as error:
            outcome = outcome_of(error)
            span.set({"meshkit.publish.outcome": outcome})
            span.fail(outcome if outcome in ("returned", "nacked") else error_type(error), error.cause)
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                span.fail(error_type(error), str(error))
            raise
        else:
            span.set({"meshkit.publish.outcome": "confirmed"})
        finally:
            span.end()

    # -- a part of the process's lifecycle ----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return "rabbitmq"

    async def connect(self) -> None:
        """Connect and declare, so that others can publish. A broker that is away is waited for in the background.

        Raises:
            TopologyError: the broker is there, and has a queue or an exchange otherwise than asked for.
        """
        if self._closed:
            raise ConfigurationError("this bus has been closed.", "Make a new one.")
        if self._started:
            return
        self._started = True
        self._publish_link.start()
        self._consume_link.start()
        if await self._consume_link.tried():
            for consumer in self._consumers:
                try:
                    await consumer.prepare()
                except TopologyError:
                    self._closed = True
                    await self._let_go()
                    raise
                except LOST:
                    break  # gone again already; the consumers wait for it
        if self._topology.declare == "off" and self._consumers:
            _log.warning("declare is off: failed messages are tried again inside this process only")

    async def start(self) -> None:
        """Connect, where that has not been done, and begin to consume.

        Raises:
            TopologyError: as `connect`.
        """
        await self.connect()
        for consumer in self._consumers:
            consumer.start()

    def checks(self) -> Sequence[Check]:
        links = [
            Check(name=f"rabbitmq {link.role}", ok=link.connected and not link.blocked, detail=_link_detail(link))
            for link in (self._publish_link, self._consume_link)
        ]
        return [*links, *(consumer.check() for consumer in self._consumers)]

    async def drain(self, grace: float) -> None:
        """Take no more messages, finish those in hand within `grace` seconds, give the rest back. Publishing goes on."""
        await asyncio.gather(*(consumer.drain(grace) for consumer in self._consumers))

    async def close(self) -> None:
        """Let go of both connections. What is in hand goes back to its queue."""
        self._closed = True
        await asyncio.gather(*(consumer.close(0.0) for consumer in self._consumers))
        await self._let_go()

    async def _let_go(self) -> None:
        await self._publisher.close()
        await asyncio.gather(self._publish_link.close(), self._consume_link.close())

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self.drain(20.0)
        finally:
            await self.close()


def _link_detail(link: Link) -> str:
    return "the broker blocks this connection (memory or disk alarm)" if link.blocked else link.trouble


def _with_headers(message: Message, more: dict[str, str]) -> Message:
    # `message` was made here and nobody else has it yet, so its headers may still be written.
    message.headers.update(more)  # type: ignore[attr-defined]
    return message


def _checked_prefetch(prefetch: int) -> int:
    if not 1 <= prefetch <= 65_535:
        raise ConfigurationError(f"prefetch is how many messages are in hand at once, 1 to 65535, not {prefetch}.")
    return prefetch


def _policies(
    breaker: CircuitBreaker | None, timeout: float | None, clock: Clock
) -> tuple[CircuitBreaker | Timeout, ...]:
    policies: list[CircuitBreaker | Timeout] = []
    if breaker is not None:
        policies.append(breaker)
    if timeout is not None:
        policies.append(Timeout(seconds=timeout, clock=clock))
    return tuple(policies)


def handler_name(handler: Callable[..., Any]) -> str:
    """What metrics call a handler."""
    return getattr(handler, "__name__", None) or type(handler).__name__


def _in_thread(handler: Callable[..., Any], event: Any, more: dict[str, Any]) -> Any:
    try:
        return handler(event, **more)
    except StopIteration as error:
        # A future does not take this one (before Python 3.12): the handler would seem to run for ever.
        raise RuntimeError(f"{handler_name(handler)} raised StopIteration") from error


def handler_call(handler: Callable[..., Any], *, session: bool) -> Callable[[Any, Delivery, Any], Awaitable[object]]:
    """How a handler is called: its first parameter is the event, `delivery` and `session` are given where it asks.

    A plain function runs in a thread.

    Raises:
        ConfigurationError: it has no parameter for the event, one that nobody fills, or asks for a session without an
            inbox.
    """
    parameters = list(inspect.signature(handler).parameters.values())
    positional = [
        one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD, one.VAR_POSITIONAL)
    ]
    if not positional:
        raise ConfigurationError(f"{handler_name(handler)} has no parameter for the event.")
    first = positional[0]
    wanted: set[str] = set()
    for one in parameters:
        if one is first or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            continue
        if one.name == "delivery" or (one.name == "session" and session):
            wanted.add(one.name)
        elif one.name == "session" and one.default is one.empty:
            raise ConfigurationError(
                f"{handler_name(handler)} asks for a session, which an inbox hands out.", "Subscribe with inbox=…."
            )
        elif one.default is one.empty:
            raise ConfigurationError(
                f"{handler_name(handler)} has a parameter {one.name!r} that nobody fills.",
                "Beside the event a handler may ask for `delivery` and `session`.",
            )
    threaded = not (inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__))

    async def call(event: Any, delivery: Delivery, opened: Any) -> object:
        more = {}
        if "delivery" in wanted:
            more["delivery"] = delivery
        if "session" in wanted:
            more["session"] = opened
        if threaded:
            result = await asyncio.to_thread(_in_thread, handler, event, more)
            # A plain function may still hand back something to await: a partial of a coroutine function, say.
            return await result if inspect.isawaitable(result) else result
        return await handler(event, **more)

    return call
