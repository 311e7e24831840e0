"""Consuming: each delivery is handled in a task of its own and settled so that nothing can be lost.

The order is everything. A message that is tried again or given up is published first, as a copy with the same id; the
broker's confirm is waited for; only then the delivery is acknowledged, and only on the channel it came over. A crash in
between shows the message twice, never not at all.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

from aiormq.abc import AbstractChannel, DeliveredMessage

from meshkit.core.call import Call, Judgement, Outcome, Policy
from meshkit.core.clock import Clock
from meshkit.core.events import (
    ConsumerPaused,
    ConsumerProbed,
    ConsumerResumed,
    ConsumerStarted,
    DuplicateSkipped,
    MessageDeadLettered,
    MessageReceived,
    MessageRetried,
    MessageSettled,
    emit,
)
from meshkit.core.events import error_type as type_of
from meshkit.core.lifecycle import Check
from meshkit.core.pipeline import Pipeline
from meshkit.core.scope import Handling, Scope, scope_open
from meshkit.core.trace import Span, TraceContext, parse_traceparent, tracer
from meshkit.errors import EnvelopeError, MessagingError, PublishError, TopologyError, UnroutableError
from meshkit.messaging import dead_letters as dl
from meshkit.messaging import headers as h
from meshkit.messaging.consumer import (
    ACK,
    Decision,
    Key,
    Pause,
    Settled,
    SlowStart,
    decide,
    decide_unrun,
    delivery_key,
)
from meshkit.messaging.inbox import AlreadyHandled, Inbox
from meshkit.messaging.message import Delivery, Message, new_id, received, unread
from meshkit.messaging.schedule import Schedule, rung_at_least
from meshkit.rabbitmq.connection import LOST, RPC_TIMEOUT, Link, server_attributes, within
from meshkit.rabbitmq.publisher import UNWRITABLE, Publisher, writable
from meshkit.rabbitmq.topology import Topology, dead_letter_queue

_log = logging.getLogger("meshkit.rabbitmq")

_FIRST_WAIT: Final = 0.1
_LONGEST_WAIT: Final = 10.0
_COPY_FIRST_WAIT: Final = 0.2
_COPY_LONGEST_WAIT: Final = 30.0
_LOOK_FOR_DRAIN: Final = 0.25
# Before a message goes back over a failure of our own.
_BRAKE: Final = 1.0
# For tasks that were cancelled at the end of the grace to give their messages back.
_GIVE_BACK: Final = 2.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """What a consumer does with messages; everything but the broker.

    Attributes:
        queue: where they come from.
        name: the handler's, for metrics.
        decode: makes of a delivery what the handler is given. A MessagingError of it is a dead letter, `unparseable`.
        handle: runs the handler with what `decode` made, the delivery, and the inbox's session (`None` without one).
        schedule: when a failed message is tried again.
        permanent: errors that another try cannot mend.
        policies: around the handler, outermost first.
        inbox: for taking effect once.
        prefetch: how many messages are in hand at the most; 1 keeps the order.
        prepare: declares what the subscription needs, on each new connection.
    """

    queue: str
    name: str
    decode: Callable[[Delivery], Any]
    handle: Callable[[Any, Delivery, Any], Awaitable[object]]
    schedule: Schedule
    permanent: tuple[type[Exception], ...] = ()
    policies: tuple[Policy, ...] = ()
    inbox: Inbox | None = None
    prefetch: int = 32
    prepare: Callable[[], Awaitable[None]]


class _InHand:
    """A delivery that is not settled yet, and the channel it has to be settled on."""

    __slots__ = ("arrived", "channel", "delivery", "key", "message", "probe", "ran", "tag", "task", "told")

    def __init__(self, message: DeliveredMessage, *, arrived: float) -> None:
        self.message = message
        self.channel: AbstractChannel = message.channel
        self.tag = message.delivery_tag or 0
        self.arrived = arrived
        self.delivery: Delivery | None = None
        self.key: Key | None = None
        self.task: asyncio.Task[None] | None = None
        self.probe = False
        self.ran = False
        self.told = False

    @property
    def ours(self) -> bool:
        """Whether it can still be settled; if not, the broker hands it out again by itself."""
        return not self.channel.is_closed


class Consumer:
    """Consumes one queue for as long as it runs, over whatever connection there is.

    Made by `RabbitBus` and `meshkit.rabbitmq.consume`.
    """

    def __init__(
        self,
        subscription: Subscription,
        *,
        link: Link,
        publisher: Publisher,
        topology: Topology,
        origin: dl.Origin,
        clock: Clock,
    ) -> None:
        self.subscription = subscription
        self.queue = subscription.queue
        self.trouble = "not started"
        self._link = link
        self._publisher = publisher
        self._topology = topology
        self._origin = origin
        self._clock = clock
        self._pipeline: Pipeline | None = (
            Pipeline(subscription.queue, *subscription.policies) if subscription.policies else None
        )
        self._server = server_attributes(link.url)
        self._pause = Pause()
        self._slow = SlowStart(subscription.prefetch)
        self._settled = Settled(max(1000, 4 * subscription.prefetch))
        self._in_hand: set[_InHand] = set()
        self._running: dict[Key, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._rpc = asyncio.Lock()
        self._channel: AbstractChannel | None = None
        self._tag: str | None = None
        self._stuck = ""
        self._draining = False
        self._task: asyncio.Task[None] | None = None
        self._at_close: Callable[[], Awaitable[None]] | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """flowing, paused or probing."""
        return self._pause.state

    def start(self) -> None:
        """Begin to consume, once there is a connection."""
        if self._task is None:
            self._draining = False
            emit(ConsumerStarted(source=self.queue, handler=self.subscription.name))
            self._task = asyncio.create_task(
                self._run(), name=f"meshkit consumer {self.queue}", context=contextvars.Context()
            )

    def check(self) -> Check:
        """Whether it takes messages, or would if there were any. A pause is not a failure: it is for as long as what
        the handler calls is down."""
        detail = self.trouble or self._stuck
        if not detail and self._pause.state != "flowing":
            detail = self._pause.state
        return Check(name=f"consumer {self.queue}", ok=not self.trouble and not self._stuck, detail=detail)

    async def drain(self, grace: float) -> None:
        """Take nothing more, finish what is in hand within `grace` seconds, give the rest back to the queue."""
        self._draining = True
        self._changed.set()
        # Side by side: on a connection that does not answer, the one takes as long as it may, and what is in hand need
        # not wait for it.
        stopping = asyncio.ensure_future(self._stop_taking())
        try:
            async with within(self._clock, grace):
                await stopping
                # Also what arrived until the broker had said that it stops.
                while tasks := self._tasks():
                    await asyncio.wait(tasks)
        except (TimeoutError, *LOST):
            left = self._tasks()
            if left:
                _log.warning("%s: %d messages were not finished in time and go back", self.queue, len(left))
                for task in left:
                    task.cancel()
                await asyncio.wait(left, timeout=_GIVE_BACK)
        finally:
            stopping.cancel()
            await asyncio.gather(stopping, return_exceptions=True)

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [hand.task for hand in self._in_hand if hand.task is not None]

    async def close(self, grace: float = 20.0) -> None:
        """Drain, and let go of the channel."""
        if self._task is None:
            return
        if not self._draining:
            await self.drain(grace)
        task, self._task = self._task, None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        tasks = self._tasks()
        for left in tasks:
            left.cancel()
        if tasks:
            # Not for ever: a handler may ignore that it is cancelled. Its message goes back with the connection.
            await asyncio.wait(tasks, timeout=_GIVE_BACK)
        if self._at_close is not None:
            await self._at_close()

    def at_close(self, act: Callable[[], Awaitable[None]]) -> None:
        """Have `act` called once this has closed: for what was made for this consumer alone."""
        self._at_close = act

    # -- taking messages ----------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Declare what the subscription needs.

        Raises:
            TopologyError: the broker has it otherwise.
        """
        await self.subscription.prepare()

    async def _run(self) -> None:
        wait = _FIRST_WAIT
        while not self._draining:
            channel: AbstractChannel | None = None
            try:
                if not self._link.connected:
                    self.trouble = "no connection to the broker"
                await self._link.up()
                await self.prepare()
                channel = await self._link.channel()
                self._channel = channel
                # A broker that cancels us (the queue was deleted, its leader moved) says so only here.
                channel.on_consumer_cancel_callbacks.add(self._cancelled_by_broker)
                closing = channel.closing
                closing.add_done_callback(lambda _: self._changed.set())
                self._slow.restart()
                await self._serve(channel)
                wait = _FIRST_WAIT
                closing.cancel()
            except TopologyError as error:
                self._complain(str(error), logging.ERROR)
                wait = _LONGEST_WAIT
            except (*LOST, asyncio.InvalidStateError) as error:
                if self._link.connected:
                    self._complain(f"cannot consume: {error}", logging.WARNING)
            except Exception as error:
                # Whatever it is: a consumer that ended here would take nothing any more, and nobody would know.
                self._complain(f"cannot consume: {type(error).__name__}: {error}", logging.ERROR)
                wait = _LONGEST_WAIT
            finally:
                self._tag = None
                self._channel = None
                if channel is not None and not channel.is_closed:
                    # What is in hand at this point is given back by the broker.
                    await _quietly(channel.close(), self._clock)
            if not self._draining:
                await self._clock.sleep(wait * (0.5 + self._clock.random() / 2))
                wait = min(_LONGEST_WAIT, wait * 2)

    async def _serve(self, channel: AbstractChannel) -> None:
        """Keep one consumer going on a channel, with the prefetch that fits the moment, until the channel closes."""
        while not channel.is_closed:
            self._changed.clear()
            if self._pause.state == "paused":
                left = self._pause.left(self._clock.now())
                if left > 0:
                    timer = self._clock.call_at(self._clock.now() + left, self._changed.set)
                    try:
                        await self._changed.wait()
                    finally:
                        timer.cancel()
                    continue
                self._pause.probe()
                self._slow.restart()
            if not self._draining:
                await self._take(channel, self._slow.now)
            await self._changed.wait()
            if not self._draining:
                await self._stop_taking()

    async def _take(self, channel: AbstractChannel, prefetch: int) -> None:
        async with self._rpc, within(self._clock, RPC_TIMEOUT):
            if self._tag is not None or self._draining or self._pause.state == "paused":
                return
            # The prefetch of a quorum queue's consumer is the one that was set when it began.
            await channel.basic_qos(prefetch_count=prefetch)
            answer = await channel.basic_consume(self.queue, self._arrived)
            self._tag = answer.consumer_tag
            self.trouble = ""

    async def _stop_taking(self) -> None:
        """Have the broker send nothing more. What is in hand stays in hand."""
        async with self._rpc:
            tag, self._tag = self._tag, None
            channel = self._channel
            if tag is not None and channel is not None and not channel.is_closed:
                await _quietly(channel.basic_cancel(tag), self._clock)

    def _cancelled_by_broker(self, frame: Any) -> None:
        if frame.consumer_tag == self._tag:
            self._tag = None
            self.trouble = "the broker cancelled the consumer"
            _log.warning("%s: the broker cancelled the consumer; beginning again", self.queue)
            channel = self._channel
            if channel is not None:
                # A new channel, after a look at whether the queue is still there. What is in hand comes again.
                self._closing = asyncio.ensure_future(_quietly(channel.close(), self._clock))

    def _complain(self, trouble: str, level: int) -> None:
        if trouble != self.trouble:
            _log.log(level, "%s: %s", self.queue, trouble)
        self.trouble = trouble

    # -- one delivery -------------------------------------------------------------------------------------------------

    async def _arrived(self, message: DeliveredMessage) -> None:
        # In a task of our own, since aiormq cancels its tasks when the channel closes; and in an empty context, since
        # its own is that of whoever happened to connect.
        hand = _InHand(message, arrived=self._clock.now())
        self._in_hand.add(hand)
        hand.probe = self._pause.state == "probing"
        hand.task = asyncio.create_task(self._work(hand), context=contextvars.Context())

    async def _work(self, hand: _InHand) -> None:
        try:
            await self._deliver(hand)
        except asyncio.CancelledError:
            await self._requeue(hand)
        except Exception:
            # Ours, not the handler's. The message must not stay in hand for ever.
            _log.exception("%s: a delivery could not be settled and goes back", self.queue)
            try:
                # It comes again at once, and may fail again in the same way.
                await self._clock.sleep(_BRAKE)
            finally:
                await self._requeue(hand)
        finally:
            if hand.delivery is not None and not hand.told:
                # Not settled by us: it comes again by itself.
                self._tell_settled(hand, hand.delivery, "requeue", None, "")
            self._in_hand.discard(hand)
            if hand.key is not None and self._running.get(hand.key) is hand.task:
                del self._running[hand.key]

    async def _deliver(self, hand: _InHand) -> None:
        subscription = self.subscription
        message = _message(hand.message)
        exchange, routing_key = hand.message.exchange or "", hand.message.routing_key or ""
        redelivered = bool(hand.message.redelivered)
        emit(MessageReceived(source=self.queue, redelivered=redelivered))
        unreadable: MessagingError | None = None
        if not message.message_id:
            if subscription.inbox is not None:
                unreadable = EnvelopeError("the message has no message_id, by which an inbox would know it again.")
            # Its copies have to have one; it stays theirs from now on.
            message = dataclasses.replace(message, message_id=new_id(self._clock))
        try:
            delivery = received(
                message,
                queue=self.queue,
                exchange=exchange,
                routing_key=routing_key,
                redelivered=redelivered,
                max_attempts=subscription.schedule.max_attempts,
                raw=hand.message,
            )
        except EnvelopeError as error:
            unreadable = error
            delivery = unread(
                message, queue=self.queue, exchange=exchange, routing_key=routing_key, redelivered=redelivered
            )
        hand.delivery = delivery
        hand.key = key = delivery_key(delivery)
        if redelivered and await self._known(hand, key, delivery):
            return
        if key is not None and hand.task is not None:
            self._running[key] = hand.task
        if self._draining:
            await self._give_back(hand, delivery)
            return
        if self._pause.state == "paused":
            # It was under way when the pause began.
            if self._has_rungs():
                await self._step_aside(hand, delivery)
                return
            if not await self._hold(hand, delivery):
                return
        while True:
            decision, span = await self._try(hand, delivery, unreadable)
            try:
                with span.active():
                    await self._settle(hand, delivery, decision, span)
            finally:
                span.end()
            if isinstance(decision.error, SystemExit | KeyboardInterrupt):
                raise decision.error
            if decision.pause is not None and not self._has_rungs():
                if not await self._hold(hand, delivery):
                    return
                continue
            if not (decision.outcome == "retry" and decision.wait is not None and self._in_process(decision)):
                return
            await self._clock.sleep(decision.wait.seconds)
            if not hand.ours:
                return  # somebody else may have it already
            failed = span.context
            headers = {**delivery.headers, h.FAILED_TRACEPARENT: failed.traceparent} if failed else delivery.headers
            delivery = dataclasses.replace(
                delivery, attempt=decision.attempt, message=dataclasses.replace(delivery.message, headers=headers)
            )
            hand.delivery = delivery

    async def _known(self, hand: _InHand, key: Key | None, delivery: Delivery) -> bool:
        """Whether a redelivered message was done with here, and only its acknowledgement was lost; then it has been
        acknowledged now, or is not ours any more."""
        if key is None:
            return False
        while (running := self._running.get(key)) is not None and running is not hand.task and not running.done():
            # It still runs, from before the connection was lost: its end decides.
            await asyncio.wait([running])
        if not hand.ours:
            return True  # the connection was lost once more meanwhile, and it has come, or comes, again
        if key not in self._settled:
            return False
        emit(DuplicateSkipped(source=self.queue, message_id=delivery.message_id))
        await self._ack(hand)
        self._tell_settled(hand, delivery, "ack", None, "")
        return True

    async def _try(self, hand: _InHand, delivery: Delivery, unreadable: MessagingError | None) -> tuple[Decision, Span]:
        """Run the handler once; what is to be done now, and the span of the try, still open."""
        creation = tracer().extract(h.lower(delivery.headers), carrier="amqp")
        span = tracer().start(
            f"process {self.queue}",
            kind="consumer",
            parent=creation,
            links=_links(creation, delivery),
            attributes=self._attributes(hand, delivery),
        )
        if unreadable is not None:
            return Decision(outcome="dead_letter", reason="unparseable", error=unreadable), span
        unrun = decide_unrun(delivery, clock=self._clock)
        if unrun is not None:
            return unrun, span
        try:
            given = self.subscription.decode(delivery)
        except MessagingError as error:
            return Decision(outcome="dead_letter", reason="unparseable", error=error), span
        except Exception as error:
            # Code of the service's own runs in there, a model's validators: by the schedule, like the handler's errors.
            return self._decide(error, delivery, Scope()), span
        deadline = None
        if delivery.deadline is not None:
            deadline = self._clock.now() + delivery.deadline - self._clock.time()
        scope = Scope(deadline=deadline, handling=Handling(message_id=delivery.message_id, queue=self.queue))
        failed: BaseException | None = None
        hand.ran = True
        with span.active(), scope_open(scope):
            try:
                await self._handle(given, delivery, scope)
            except AlreadyHandled:
                hand.ran = False
                emit(DuplicateSkipped(source=self.queue, message_id=delivery.message_id))
                return ACK, span
            except BaseException as error:
                failed = error
                # Also where we are told to stop: the message still has to go back, which the settling does.
                if isinstance(error, asyncio.CancelledError) and not _let_go():
                    # Nobody cancelled the handler, but something that it waited for: given back, it would come again at
                    # once, and so on. aiormq ends in this way what waits on a channel that it closes.
                    failed = MessagingError("something that the handler waited for was cancelled.")
                    failed.__cause__ = error
        decision = self._decide(failed, delivery, scope)
        return decision, span

    async def _handle(self, given: Any, delivery: Delivery, scope: Scope) -> None:
        if self._pipeline is None:
            await self._in_inbox(given, delivery)
            return

        def judge(outcome: Outcome) -> Judgement:
            # A breaker around the handler counts what another try may mend, not a message that is itself at fault.
            if outcome.error is None:
                return Judgement()
            if isinstance(outcome.error, AlreadyHandled):
                return Judgement(breaker="neutral")  # nothing was called
            decision = self._decide(outcome.error, delivery, scope)
            counts = decision.outcome == "retry" or decision.reason == "retries_exhausted"
            return Judgement(breaker="failure" if counts else "neutral", error_type=type_of(outcome.error))

        async def run(_: Call) -> None:
            await self._in_inbox(given, delivery)

        call = Call(self.queue, attempt=delivery.attempt, judge=judge)
        try:
            await self._pipeline.run(call, run)
        except BaseException as error:
            call.end(Outcome(error=error))
            raise
        call.end(Outcome())

    async def _in_inbox(self, given: Any, delivery: Delivery) -> None:
        subscription = self.subscription
        if subscription.inbox is None:
            await subscription.handle(given, delivery, None)
            return
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(subscription.inbox.open(delivery))
            await subscription.handle(given, delivery, session)

    def _decide(self, failed: BaseException | None, delivery: Delivery, scope: Scope) -> Decision:
        return decide(
            failed,
            delivery=delivery,
            attempt=delivery.attempt,
            schedule=self.subscription.schedule,
            permanent=self.subscription.permanent,
            opened=scope.opened,
            clock=self._clock,
        )

    def _in_process(self, decision: Decision) -> bool:
        return decision.wait is not None and (decision.wait.in_process or not self._has_rungs())

    def _has_rungs(self) -> bool:
        declare = self._topology.declare
        return declare == "active" or (declare == "passive" and bool(self.subscription.schedule.rungs()))

    def _rung_at_least(self, delay: float) -> float:
        """A rung for a wait that is none of the schedule's steps."""
        if self._topology.declare == "active":
            return rung_at_least(delay)
        # Only those of the schedule are known to be there; the longest one, if none is long enough.
        known = self.subscription.schedule.rungs()
        return next((rung for rung in known if rung >= delay), known[-1])

    # -- settling -----------------------------------------------------------------------------------------------------

    async def _settle(self, hand: _InHand, delivery: Delivery, decision: Decision, span: Span) -> None:
        error_type = type_of(decision.error) if decision.error is not None else ""
        span.set({"meshkit.message.outcome": decision.outcome})
        if decision.error is not None:
            span.fail(error_type, dl.message_of(decision.error))
        if decision.pause is not None:
            await self._reject(hand, delivery, decision, span)
            return
        if decision.outcome != "requeue":
            # Before the settling: what that sets free may be handed out at once.
            self._passed(hand)
        traceparent = _traceparent(span)
        if decision.outcome == "retry":
            assert decision.wait is not None
            if not self._in_process(decision):
                if not await self._retry(hand, delivery, decision, span):
                    return
                await self._ack(hand)
            emit(
                MessageRetried(
                    source=self.queue, attempt=decision.attempt, delay=decision.wait.seconds, traceparent=traceparent
                )
            )
            self._log_retry(delivery, decision, error_type)
            if self._in_process(decision):
                return
        elif decision.outcome == "dead_letter":
            if not await self._dead_letter(hand, delivery, decision, span):
                return
            await self._ack(hand)
        elif decision.outcome == "requeue":
            await self._requeue(hand)
        else:
            if decision.outcome == "discard":
                _log.info("%s: message discarded: %s", self.queue, decision.note, extra=_fields(delivery))
            await self._ack(hand)
        self._tell_settled(hand, delivery, decision.outcome, decision, traceparent)

    async def _retry(self, hand: _InHand, delivery: Delivery, decision: Decision, span: Span) -> bool:
        assert decision.wait is not None
        headers = self._failure_headers(delivery, decision, span)
        headers[h.ATTEMPT] = str(decision.attempt)
        delay = decision.wait.seconds
        if delay not in self.subscription.schedule.rungs():
            delay = self._rung_at_least(delay)
        return await self._to_rung(hand, delivery, headers, delay, decision.attempt, span)

    async def _to_rung(
        self, hand: _InHand, delivery: Delivery, headers: dict[str, Any], delay: float, attempt: int, span: Span | None
    ) -> bool:
        async def publish() -> None:
            rung = await self._topology.rung(delay)
            await self._hop(
                delivery,
                headers,
                exchange=rung,
                routing_key=self.queue,
                span=span,
                attributes={"meshkit.retry.delay": delay, "meshkit.message.attempt": attempt},
            )

        return await self._until_confirmed(hand, publish)

    async def _dead_letter(self, hand: _InHand, delivery: Delivery, decision: Decision, span: Span) -> bool:
        assert decision.reason is not None
        reason = decision.reason
        headers = self._failure_headers(delivery, decision, span)
        headers[h.ATTEMPT] = str(delivery.attempt)
        dl.dead_letter_headers(headers, reason=reason, at=self._clock.time())

        async def publish() -> None:
            await self._hop(
                delivery,
                headers,
                exchange="",
                routing_key=dead_letter_queue(self.queue),
                span=span,
                attributes={
                    "meshkit.dead_letter.reason": reason,
                    "meshkit.dead_letter.source_queue": self.queue,
                    "meshkit.dead_letter.attempts": delivery.attempt,
                    "meshkit.sampling.keep": True,
                },
            )

        if not await self._until_confirmed(hand, publish):
            return False
        fields = dl.error_fields(headers)
        emit(
            MessageDeadLettered(
                source=self.queue,
                reason=reason,
                error_type=fields["error_type"],
                message_id=delivery.message_id,
                traceparent=_traceparent(span),
            )
        )
        _log.error(
            "%s: message %s is a dead letter (%s) after attempt %d: %s",
            *(self.queue, delivery.message_id, reason, delivery.attempt),
            fields["error_message"] or fields["error_type"],
            extra={**_fields(delivery), **fields, "reason": reason},
        )
        return True

    def _failure_headers(self, delivery: Delivery, decision: Decision, span: Span) -> dict[str, Any]:
        return dl.failure_headers(
            delivery,
            error=decision.error,
            note=decision.note,
            at=self._clock.time(),
            origin=self._origin,
            failed_in=_traceparent(span),
        )

    async def _hop(
        self,
        delivery: Delivery,
        headers: dict[str, Any],
        *,
        exchange: str,
        routing_key: str,
        span: Span | None,
        attributes: dict[str, Any],
    ) -> None:
        """Publish a copy, as a span of its own under that of the try. The message's trace headers stay as they are."""
        creation = parse_traceparent(headers.get(h.TRACEPARENT), headers.get(h.TRACESTATE, ""))
        hop = tracer().start(
            f"publish {exchange or routing_key}",
            kind="client",
            parent=span if span is not None else creation,
            links=[creation] if creation is not None else [],
            attributes={
                **self._server,
                "messaging.system": "rabbitmq",
                "messaging.operation.name": "publish",
                "messaging.operation.type": "send",
                "messaging.destination.name": exchange or routing_key,
                "messaging.rabbitmq.destination.routing_key": routing_key,
                "messaging.message.id": delivery.message_id,
                **attributes,
            },
        )
        # An expiration of the producer's was for its queue; in a rung it would cut the wait short, in the dead-letter
        # queue it would delete the message.
        copy = dataclasses.replace(delivery.message, headers=headers, expiration=None)
        try:
            try:
                await self._publisher.send(copy, exchange, routing_key, traceparent=_traceparent(hop))
            except PublishError as error:
                if not isinstance(error.__cause__, UNWRITABLE):
                    raise
                # Otherwise one odd header would keep its message in hand for ever, and the consumer unready.
                await self._publisher.send(writable(copy), exchange, routing_key, traceparent=_traceparent(hop))
        except Exception as error:
            hop.fail(type_of(error))
            raise
        finally:
            hop.end()

    async def _until_confirmed(self, hand: _InHand, publish: Callable[[], Awaitable[None]]) -> bool:
        """Publish a copy until the broker has confirmed it. `False` where the delivery is not ours any more: then it
        comes again by itself. Meanwhile it stays in hand: neither dropped nor acknowledged."""
        wait = _COPY_FIRST_WAIT
        said = ""
        while hand.ours:
            try:
                await publish()
            except (PublishError, TopologyError, *LOST) as error:
                if isinstance(error, UnroutableError):
                    # The rung or the dead-letter queue was deleted.
                    self._topology.forget()
                    try:
                        await self.prepare()
                    except (TopologyError, *LOST):
                        _log.debug("%s: the topology could not be mended", self.queue, exc_info=True)
                if not self._stuck:
                    _log.warning("%s: a copy could not be stored, so its message stays in hand: %s", self.queue, error)
                self._stuck = said = f"cannot publish to rungs or the dead-letter queue: {error}"
                await self._clock.sleep(wait)
                wait = min(_COPY_LONGEST_WAIT, wait * 2)
            else:
                self._stuck = ""
                return True
        if said and self._stuck == said:
            # It comes again, and may then be handled without any copy; whoever else is stuck says so again.
            self._stuck = ""
        return False

    async def _ack(self, hand: _InHand) -> None:
        # Remembered whether or not it arrives: nobody tells, and if it does not, the message comes again.
        self._settled.add(hand.key)
        if not hand.ours:
            return
        try:
            await hand.channel.basic_ack(hand.tag, wait=False)
        except LOST:
            _log.debug("%s: an acknowledgement was lost with its channel", self.queue)

    async def _requeue(self, hand: _InHand) -> None:
        if not hand.ours:
            return
        try:
            await hand.channel.basic_nack(hand.tag, requeue=True, wait=False)
        except LOST:
            _log.debug("%s: the message goes back with its channel", self.queue)

    async def _give_back(self, hand: _InHand, delivery: Delivery) -> None:
        await self._requeue(hand)
        self._tell_settled(hand, delivery, "requeue", None, "")

    # -- the pause ----------------------------------------------------------------------------------------------------

    async def _reject(self, hand: _InHand, delivery: Delivery, decision: Decision, span: Span) -> None:
        """What the handler calls is down: take nothing more for a while, and let the message wait without having been
        tried."""
        assert decision.pause is not None
        now = self._clock.now()
        probing = self._pause.state == "probing"
        begins = self._pause.rejected(decision.pause, now)
        left = self._pause.left(now)
        if begins:
            # First of all no more messages, then the settling, which would let the next one through.
            await self._stop_taking()
            self._changed.set()
            if probing:
                emit(ConsumerProbed(source=self.queue, passed=False))
            emit(ConsumerPaused(source=self.queue, retry_after=left, policy=decision.policy))
            _log.warning(
                "%s: paused for %.3g s: %s",
                *(self.queue, left, decision.error),
                extra={"queue": self.queue, "retry_after": left, "policy": decision.policy},
            )
        if self._has_rungs():
            await self._step_aside(hand, delivery, span, decision)

    async def _hold(self, hand: _InHand, delivery: Delivery) -> bool:
        """Where there are no rungs, let a message wait out the pause in hand: given back each time, it would be taken
        for one that kills its consumers. `False` where it is not to be tried now."""
        while hand.ours and not self._draining and (left := self._pause.left(self._clock.now())) > 0:
            await self._clock.sleep(min(left, _LOOK_FOR_DRAIN))
        if self._draining:
            await self._give_back(hand, delivery)
            return False
        hand.probe = True
        return hand.ours

    async def _step_aside(
        self, hand: _InHand, delivery: Delivery, span: Span | None = None, decision: Decision | None = None
    ) -> None:
        """Let a message wait out the pause in a rung: nothing is counted."""
        headers = dl.first_facts(delivery)
        headers[h.ATTEMPT] = str(delivery.attempt)
        delay = self._rung_at_least(self._pause.left(self._clock.now()))
        if not await self._to_rung(hand, delivery, headers, delay, delivery.attempt, span):
            return
        await self._ack(hand)
        # Not remembered as done: the copy is like the message in everything.
        self._settled.discard(hand.key)
        self._tell_settled(hand, delivery, "requeue", decision, _traceparent(span) if span is not None else "")

    def _passed(self, hand: _InHand) -> None:
        # A message that was put aside unread says nothing of what handlers call.
        if not (hand.probe and hand.ran):
            return
        paused = self._pause.passed(self._clock.now())
        if paused is not None:
            emit(ConsumerProbed(source=self.queue, passed=True))
            emit(ConsumerResumed(source=self.queue, paused=paused))
            _log.info("%s: resumed after %.3g s", self.queue, paused)

    # -- telling ------------------------------------------------------------------------------------------------------

    def _tell_settled(
        self, hand: _InHand, delivery: Delivery, outcome: Any, decision: Decision | None, traceparent: str
    ) -> None:
        error = decision.error if decision is not None else None
        hand.told = True
        emit(
            MessageSettled(
                source=self.queue,
                handler=self.subscription.name,
                outcome=outcome,
                seconds=self._clock.now() - hand.arrived,
                attempt=delivery.attempt,
                error_type=type_of(error) if error is not None else "",
                age=delivery.age(self._clock.time()),
                traceparent=traceparent,
            )
        )
        if outcome != "requeue" and self._pause.state == "flowing" and self._slow.settled(delivery.delivery_count):
            self._changed.set()

    def _log_retry(self, delivery: Delivery, decision: Decision, error_type: str) -> None:
        assert decision.wait is not None
        what = f"{error_type}: {dl.message_of(decision.error)}" if decision.error is not None else decision.note
        _log.warning(
            "%s: attempt %d of %d at message %s failed, the next one in %.3g s: %s",
            *(self.queue, delivery.attempt, delivery.max_attempts, delivery.message_id, decision.wait.seconds),
            h.cut(what, h.MOST_MESSAGE),
            extra={**_fields(delivery), "error_type": error_type, "delay": decision.wait.seconds},
        )

    def _attributes(self, hand: _InHand, delivery: Delivery) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            **self._server,
            "messaging.system": "rabbitmq",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": self.queue,
            "messaging.destination.template": self.queue,
            "messaging.rabbitmq.destination.routing_key": delivery.routing_key,
            "messaging.rabbitmq.message.delivery_tag": hand.tag,
            "messaging.message.id": delivery.message_id,
            "meshkit.message.attempt": delivery.attempt,
            "meshkit.message.max_attempts": delivery.max_attempts,
            "meshkit.message.redelivered": delivery.redelivered,
            "meshkit.message.delivery_count": delivery.delivery_count,
        }
        if delivery.message.correlation_id:
            attributes["messaging.message.conversation_id"] = delivery.message.correlation_id
        age = delivery.age(self._clock.time())
        if age is not None:
            attributes["meshkit.message.age"] = age
        return attributes


def _message(delivered: DeliveredMessage) -> Message:
    """What arrived, in our own words."""
    properties = delivered.header.properties
    return Message(
        body=delivered.body,
        message_id=properties.message_id or "",
        type=properties.message_type or None,
        headers=properties.headers or {},
        content_type=properties.content_type or None,
        content_encoding=properties.content_encoding or None,
        correlation_id=properties.correlation_id or None,
        reply_to=properties.reply_to or None,
        timestamp=properties.timestamp,
        app_id=properties.app_id or None,
        priority=properties.priority,
        expiration=properties.expiration or None,
    )


def _links(creation: TraceContext | None, delivery: Delivery) -> Sequence[TraceContext]:
    headers = delivery.headers
    earlier = (
        creation,
        parse_traceparent(headers.get(h.FAILED_TRACEPARENT)),
        parse_traceparent(headers.get(h.ORIGINAL_TRACEPARENT)),
    )
    return [context for context in earlier if context is not None]


def _traceparent(span: Span) -> str:
    context = span.context
    return context.traceparent if context is not None else ""


def _fields(delivery: Delivery) -> dict[str, Any]:
    return {
        "queue": delivery.queue,
        "message_id": delivery.message_id,
        "message_type": delivery.message.type or "",
        "attempt": delivery.attempt,
    }


def _let_go() -> bool:
    """Take back the cancellation that has been answered, so that what follows is not mistaken for cancelled. `False`
    where there was none."""
    task = asyncio.current_task()
    asked = False
    while task is not None and task.cancelling():
        asked = True
        task.uncancel()
    return asked


async def _quietly(doing: Awaitable[object], clock: Clock) -> None:
    """Do something that is of no use any more where it fails, to the end: aiormq closes a channel with a reply still
    to come in trouble."""
    running = asyncio.ensure_future(doing)
    try:
        async with within(clock, RPC_TIMEOUT):
            await asyncio.shield(running)
    except (*LOST, RuntimeError):
        running.cancel()
