"""A channel: what a client says on it, carried out on the broker, and what the broker hands to its consumers.

Every method is carried out whole before the next one is read; nothing here waits.
"""

from __future__ import annotations

import secrets
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pamqp import base, commands

from meshkit.embedded import wire
from meshkit.embedded.broker import Binding
from meshkit.embedded.queues import Entry, Message, Queue, Refused, sender_selected
from meshkit.embedded.wire import Properties

if TYPE_CHECKING:
    from meshkit.embedded.connection import Connection

PRODUCT = "meshkit-embedded"
MAX_BODY_BYTES = 134_217_728

_DIRECT_REPLY_TO = "amq.rabbitmq.reply-to"


def method_frame(channel: int, method: base.Frame) -> bytes:
    """A method as a frame."""
    return wire.frame(wire.FRAME_METHOD, channel, method.index.to_bytes(4, "big") + method.marshal())


class ChannelConsumer:
    """One `basic.consume`: takes messages from its queue as long as prefetch and socket allow."""

    __slots__ = ("_tag_bytes", "channel", "exclusive", "limit", "no_ack", "priority", "queue", "tag", "unacked")

    def __init__(
        self, channel: Channel, queue: Queue, tag: str, *, no_ack: bool, exclusive: bool, priority: int, limit: int
    ) -> None:
        self.channel = channel
        self.queue = queue
        self.tag = tag
        self.no_ack = no_ack
        self.exclusive = exclusive
        self.priority = priority
        self.limit = limit
        self.unacked = 0
        self._tag_bytes = wire.short_string(tag)

    def can_take(self) -> bool:
        channel = self.channel
        if channel.closed or not channel.connection.writable:
            return False
        if self.no_ack:
            return True
        if self.limit and self.unacked >= self.limit:
            return False
        return not channel.shared_limit or channel.outstanding < channel.shared_limit

    def take(self, entry: Entry) -> None:
        delivery_tag = self.channel.hand_out(self.queue, entry, self)
        message = entry.message
        self.channel.connection.write(
            wire.deliver_frame(
                self.channel.number, self._tag_bytes, delivery_tag, entry.redelivered, message.exchange, message.routing_key
            )
        )  # fmt: skip
        self.channel.write_content(message, _delivered_properties(self.queue, entry))

    def queue_gone(self) -> None:
        self.channel.consumer_gone(self)


def _delivered_properties(queue: Queue, entry: Entry, *, got: bool = False) -> Properties:
    """The publisher's properties, and the delivery count of a quorum queue: from 1 on to consumers, from 0 on to
    `basic.get`, as in RabbitMQ 3.10."""
    properties = entry.message.properties
    if not (queue.quorum and (entry.returns or got)):
        return properties
    return properties.replace(headers={**properties.headers, "x-delivery-count": wire.long_field(entry.returns)})


@dataclass(frozen=True, slots=True)
class _Delivery:
    """What a client has and has not acked: from which queue, through which consumer (None: a get), since when."""

    queue: Queue
    entry: Entry
    consumer: ChannelConsumer | None
    at: float


@dataclass(slots=True)
class _Incoming:
    """A publish whose content has not arrived whole."""

    exchange: str
    routing_key: str
    mandatory: bool
    properties: Properties | None = None
    size: int = 0
    received: int = 0
    pieces: list[bytes] = field(default_factory=list)


class Channel:
    """One channel: consumers, unacked deliveries, confirms, and the methods of AMQP that act on the broker."""

    def __init__(self, connection: Connection, number: int) -> None:
        self.connection = connection
        self.number = number
        self.broker = connection.hub.broker
        self.closed = False
        # A global prefetch, shared by all consumers, and how many deliveries count towards it.
        self.shared_limit = 0
        self.outstanding = 0
        self._prefetch = 0
        self._consumers: dict[str, ChannelConsumer] = {}
        # Ordered, because a multiple ack takes from the old end, and a dict is slow there.
        self._unacked: OrderedDict[int, _Delivery] = OrderedDict()
        self._timeout_armed = False
        self._delivery_tag = 0
        self._confirming = False
        self._published = 0
        self._settled_up_to = 0
        self._to_confirm: list[int] = []
        self._incoming: _Incoming | None = None
        self._last_queue = ""
        self._reply_token: str | None = None
        self._reply_tag = ""

    # -- to the client --

    def send(self, method: base.Frame) -> None:
        self.connection.write(method_frame(self.number, method))

    def write_content(self, message: Message, properties: Properties) -> None:
        self.connection.write(wire.content_frames(self.number, properties.raw, message.body, self.connection.frame_max))

    def hand_out(self, queue: Queue, entry: Entry, consumer: ChannelConsumer | None, *, no_ack: bool = False) -> int:
        """Give a delivery its tag and note it as unacked, where it is to be acked."""
        self._delivery_tag += 1
        if no_ack or (consumer is not None and consumer.no_ack):
            queue.ack([entry])
        else:
            self._unacked[self._delivery_tag] = _Delivery(queue, entry, consumer, self.broker.clock.now())
            if not self._timeout_armed:
                self._arm_timeout()
            if consumer is not None:
                consumer.unacked += 1
                self.outstanding += 1
        return self._delivery_tag

    def _arm_timeout(self) -> None:
        timeout = self.connection.hub.consumer_timeout
        if timeout is None:
            return
        self._timeout_armed = True
        # The timer outlives many channels, and must not keep them.
        check = weakref.WeakMethod(self._check_timeout)
        oldest = next(iter(self._unacked.values()))
        self.broker.wake_at(oldest.at + timeout, lambda: call() if (call := check()) else None)

    def _check_timeout(self) -> None:
        self._timeout_armed = False
        timeout = self.connection.hub.consumer_timeout
        if self.closed or not self._unacked or timeout is None:
            return
        oldest = next(iter(self._unacked.values()))
        if self.broker.clock.now() < oldest.at + timeout:
            self._arm_timeout()
            return
        self.connection.close_channel(
            self.number,
            Refused(
                406,
                f"delivery acknowledgement on channel {self.number} timed out. Timeout value used: "
                f"{timeout * 1000:.0f} ms. This timeout value can be configured, see consumers doc guide to learn more",
            ),
            caused_by=(0, 0),
        )

    def consumer_gone(self, consumer: ChannelConsumer) -> None:
        """Its queue was deleted: tell a client that understands it."""
        if (
            self._consumers.pop(consumer.tag, None)
            and not self.closed
            and self.connection.can("consumer_cancel_notify")
        ):
            self.send(commands.Basic.Cancel(consumer.tag, nowait=True))

    def deliver(self) -> None:
        """The client may be able to take more than before."""
        for consumer in list(self._consumers.values()):
            if not consumer.queue.gone:
                consumer.queue.deliver()

    # -- end --

    def close(self) -> None:
        """Give back what the client had: unacked messages first, in order, then the places of its consumers."""
        if self.closed:
            return
        self.closed = True
        by_queue: dict[Queue, list[Entry]] = {}
        for delivery in self._unacked.values():
            by_queue.setdefault(delivery.queue, []).append(delivery.entry)
        self._unacked.clear()
        for queue, entries in by_queue.items():
            queue.requeue(entries, lost=True)
        for consumer in list(self._consumers.values()):
            consumer.queue.remove(consumer)
        self._consumers.clear()
        if self._reply_token is not None:
            self.broker.reply_consumers.pop(self._reply_token, None)

    # -- content --

    def on_method(self, payload: bytes) -> None:
        if self._incoming is not None:
            raise Refused(505, "expected content header for class 60, got non content header frame instead")
        if payload[:4] == b"\x00\x3c\x00\x28":
            exchange, routing_key, mandatory, immediate = wire.read_publish(payload)
            if immediate:
                raise Refused(540, "immediate=true")
            self._incoming = _Incoming(exchange, routing_key, mandatory)
            return
        method = read_method(payload)
        handler = _CHANNEL_METHODS.get(type(method))
        if handler is None:
            raise Refused(540, f"{method.name} is not implemented by {PRODUCT}")
        handler(self, method)

    def on_header(self, payload: bytes) -> None:
        incoming = self._incoming
        if incoming is None or incoming.properties is not None:
            raise Refused(505, "expected method frame, got non method frame instead")
        class_id, incoming.size, raw = wire.read_content_header(payload)
        if class_id != commands.Basic.frame_id:
            raise Refused(505, f"expected content header for class 60, got one for class {class_id} instead")
        incoming.properties = Properties(raw)
        if incoming.size > MAX_BODY_BYTES:
            self._incoming = None
            raise Refused(406, f"message size {incoming.size} is larger than configured max size {MAX_BODY_BYTES}")
        if not incoming.size:
            self._publish(incoming, incoming.properties)

    def on_body(self, payload: bytes) -> None:
        incoming = self._incoming
        if incoming is None or incoming.properties is None:
            raise Refused(505, "expected method frame, got non method frame instead")
        incoming.received += len(payload)
        if incoming.received > incoming.size:
            raise Refused(501, f"{incoming.received} bytes of content where the header announced {incoming.size}")
        incoming.pieces.append(payload)
        if incoming.received == incoming.size:
            self._publish(incoming, incoming.properties)

    def _publish(self, incoming: _Incoming, properties: Properties) -> None:
        self._incoming = None
        if self._confirming:
            self._published += 1
            if self.connection.hub.faults.next_publish() == "nack":
                self._confirm(self._published, accepted=False)
                return
        exchange = self.broker.exchanges.get(incoming.exchange)
        if exchange is not None and exchange.internal:
            raise Refused(403, f"cannot publish to internal exchange '{incoming.exchange}' in vhost '/'")
        keys, properties = sender_selected(self._checked(properties))
        message = Message(b"".join(incoming.pieces), properties, incoming.exchange, incoming.routing_key, keys)
        outcome = self.broker.publish(message)
        if incoming.mandatory and not outcome.routed:
            self.connection.write(
                wire.return_frame(self.number, 312, "NO_ROUTE", message.exchange, message.routing_key)
            )
            self.write_content(message, properties)
        if self._confirming:
            self._confirm(self._published, accepted=outcome.accepted)

    def _checked(self, properties: Properties) -> Properties:
        user = properties.text("user_id")
        if user is not None and user != self.connection.hub.user:
            raise Refused(
                406, f"user_id property set to '{user}' but authenticated user was '{self.connection.hub.user}'"
            )
        expiration = properties.text("expiration")
        if expiration is not None and not (expiration.isascii() and expiration.isdigit() and len(expiration) <= 12):
            raise Refused(406, f"invalid expiration '{expiration}': milliseconds in digits are expected")
        if properties.text("reply_to") == _DIRECT_REPLY_TO:
            if self._reply_token is None:
                raise Refused(406, "fast reply consumer does not exist")
            return properties.replace(reply_to=self._reply_token)
        _ = properties.headers  # malformed headers are the publisher's to hear of, not the consumer's
        return properties

    # -- confirms --

    def _confirm(self, tag: int, *, accepted: bool) -> None:
        if self.connection.hub.faults.next_confirm() == "drop":
            return
        if accepted:
            self._to_confirm.append(tag)
            self.connection.confirm_soon(self)
        else:
            self.flush_confirms()
            self.send(commands.Basic.Nack(tag, requeue=False))
            if self._settled_up_to == tag - 1:
                self._settled_up_to = tag

    def flush_confirms(self) -> None:
        """Send the confirms of this turn: one for all, where no gap would be covered by it."""
        tags, self._to_confirm = self._to_confirm, []
        if not tags or self.closed:
            return
        if self._settled_up_to + len(tags) == tags[-1]:
            self._settled_up_to = tags[-1]
            self.send(commands.Basic.Ack(tags[-1], len(tags) > 1))
            return
        for tag in tags:
            self.send(commands.Basic.Ack(tag))

    # -- methods: the channel --

    def _flow(self, method: commands.Channel.Flow) -> None:
        if not method.active:
            raise Refused(540, "active=false")
        self.send(commands.Channel.FlowOk(True))

    def _confirm_select(self, method: commands.Confirm.Select) -> None:
        self._confirming = True
        if not method.nowait:
            self.send(commands.Confirm.SelectOk())

    # -- methods: exchanges --

    def _exchange_declare(self, method: commands.Exchange.Declare) -> None:
        self.broker.declare_exchange(
            method.exchange,
            method.exchange_type,
            durable=method.durable,
            auto_delete=method.auto_delete,
            internal=method.internal,
            arguments=method.arguments or {},
            passive=method.passive,
        )
        if not method.nowait:
            self.send(commands.Exchange.DeclareOk())

    def _exchange_delete(self, method: commands.Exchange.Delete) -> None:
        self.broker.delete_exchange(method.exchange, if_unused=method.if_unused)
        if not method.nowait:
            self.send(commands.Exchange.DeleteOk())

    def _exchange_bind(self, method: commands.Exchange.Bind) -> None:
        binding = _binding(False, method.destination, method.routing_key, method.arguments)
        self.broker.bind(method.source, binding, owner=self.connection)
        if not method.nowait:
            self.send(commands.Exchange.BindOk())

    def _exchange_unbind(self, method: commands.Exchange.Unbind) -> None:
        binding = _binding(False, method.destination, method.routing_key, method.arguments)
        self.broker.unbind(method.source, binding, owner=self.connection)
        if not method.nowait:
            self.send(commands.Exchange.UnbindOk())

    # -- methods: queues --

    def _named(self, name: str) -> str:
        """An empty name means the queue that this channel declared last."""
        if name:
            return name
        if not self._last_queue:
            raise Refused(404, "no previously declared queue")
        return self._last_queue

    def _queue_declare(self, method: commands.Queue.Declare) -> None:
        if method.queue.startswith(_DIRECT_REPLY_TO):
            known = method.queue == _DIRECT_REPLY_TO or method.queue in self.broker.reply_consumers
            if not known:
                raise Refused(404, f"no queue '{method.queue}' in vhost '/'")
            self.send(commands.Queue.DeclareOk(method.queue, 0, 1 if method.queue != _DIRECT_REPLY_TO else 0))
            return
        queue = self.broker.declare_queue(
            self._named("") if method.passive and not method.queue else method.queue,
            durable=method.durable,
            exclusive=method.exclusive,
            auto_delete=method.auto_delete,
            arguments=method.arguments or {},
            passive=method.passive,
            owner=self.connection,
        )
        self._last_queue = queue.name
        if not method.nowait:
            self.send(commands.Queue.DeclareOk(queue.name, len(queue), len(queue.consumers)))

    def _queue_bind(self, method: commands.Queue.Bind) -> None:
        name = self._named(method.queue)
        key = method.routing_key or ("" if method.queue else name)
        self.broker.bind(method.exchange, _binding(True, name, key, method.arguments), owner=self.connection)
        if not method.nowait:
            self.send(commands.Queue.BindOk())

    def _queue_unbind(self, method: commands.Queue.Unbind) -> None:
        name = self._named(method.queue)
        key = method.routing_key or ("" if method.queue else name)
        self.broker.unbind(method.exchange, _binding(True, name, key, method.arguments), owner=self.connection)
        self.send(commands.Queue.UnbindOk())

    def _queue_purge(self, method: commands.Queue.Purge) -> None:
        dropped = self.broker.queue(self._named(method.queue), owner=self.connection).purge()
        if not method.nowait:
            self.send(commands.Queue.PurgeOk(dropped))

    def _queue_delete(self, method: commands.Queue.Delete) -> None:
        dropped = self.broker.delete_queue(
            self._named(method.queue), if_unused=method.if_unused, if_empty=method.if_empty, owner=self.connection
        )
        if not method.nowait:
            self.send(commands.Queue.DeleteOk(dropped))

    # -- methods: consuming --

    def _qos(self, method: commands.Basic.Qos) -> None:
        if method.prefetch_size:
            raise Refused(540, f"prefetch_size!=0 ({method.prefetch_size})")
        if method.global_:
            self.shared_limit = method.prefetch_count
        else:
            self._prefetch = method.prefetch_count
        self.send(commands.Basic.QosOk())
        self.deliver()

    def _consume(self, method: commands.Basic.Consume) -> None:
        tag = method.consumer_tag or f"amq.ctag-{secrets.token_urlsafe(16)}"
        if tag in self._consumers:
            raise Refused(530, f"attempt to reuse consumer tag '{tag}'")
        if method.queue == _DIRECT_REPLY_TO:
            self._consume_replies(tag, method)
            return
        queue = self.broker.queue(self._named(method.queue), owner=self.connection)
        if queue.exclusively_consumed or (method.exclusive and queue.consumers):
            raise Refused(403, f"queue '{queue.name}' in vhost '/' in exclusive use")
        priority = (method.arguments or {}).get("x-priority", 0)
        if not isinstance(priority, int):
            raise Refused(406, f"invalid arg 'x-priority' for consumer '{tag}': {priority!r} is no integer")
        if "x-stream-offset" in (method.arguments or {}):
            raise Refused(406, f"invalid arg 'x-stream-offset' for consumer '{tag}': {PRODUCT} has no streams")
        consumer = ChannelConsumer(
            self,
            queue,
            tag,
            no_ack=method.no_ack,
            exclusive=method.exclusive,
            priority=priority,
            limit=self._prefetch,
        )
        self._consumers[tag] = consumer
        queue.add(consumer)
        if not method.nowait:
            self.send(commands.Basic.ConsumeOk(tag))
        queue.deliver()

    def _consume_replies(self, tag: str, method: commands.Basic.Consume) -> None:
        if not method.no_ack:
            raise Refused(406, "reply consumer cannot acknowledge")
        if self._reply_token is not None:
            raise Refused(406, "reply consumer already set")
        token = self._reply_token = f"{_DIRECT_REPLY_TO}.{secrets.token_urlsafe(16)}"
        tag_bytes = wire.short_string(tag)

        def reply(message: Message) -> None:
            # Nobody stores a reply; a requester that does not read has to lose it rather than fill the memory.
            if self.closed or not self.connection.writable:
                return
            self._delivery_tag += 1
            self.connection.write(
                wire.deliver_frame(
                    self.number, tag_bytes, self._delivery_tag, False, message.exchange, message.routing_key
                )
            )
            self.write_content(message, message.properties)

        self.broker.reply_consumers[token] = reply
        self._reply_tag = tag
        if not method.nowait:
            self.send(commands.Basic.ConsumeOk(tag))

    def _cancel(self, method: commands.Basic.Cancel) -> None:
        tag = method.consumer_tag or ""
        consumer = self._consumers.pop(tag, None)
        if consumer is None and self._reply_token is not None and tag == self._reply_tag:
            self.broker.reply_consumers.pop(self._reply_token)
            self._reply_token = None
        # The answer goes before the queue does, where this was the last consumer of an auto-delete queue.
        if not method.nowait:
            self.send(commands.Basic.CancelOk(tag))
        if consumer is not None:
            consumer.queue.remove(consumer)

    def _get(self, method: commands.Basic.Get) -> None:
        queue = self.broker.queue(self._named(method.queue), owner=self.connection)
        entry = queue.get()
        if entry is None:
            self.send(commands.Basic.GetEmpty())
            return
        tag = self.hand_out(queue, entry, None, no_ack=method.no_ack)
        message = entry.message
        self.connection.write(
            wire.get_ok_frame(self.number, tag, entry.redelivered, message.exchange, message.routing_key, len(queue))
        )
        self.write_content(message, _delivered_properties(queue, entry, got=True))

    # -- methods: settling --

    def _ack(self, method: commands.Basic.Ack) -> None:
        self._settle(method.delivery_tag, method.multiple, Queue.ack)

    def _nack(self, method: commands.Basic.Nack) -> None:
        self._refuse(method.delivery_tag, method.multiple, method.requeue)

    def _reject(self, method: commands.Basic.Reject) -> None:
        self._refuse(method.delivery_tag or 0, False, method.requeue)

    def _refuse(self, tag: int, multiple: bool, requeue: bool) -> None:
        if requeue:
            self._settle(tag, multiple, lambda queue, entries: queue.requeue(entries, lost=False))
        else:
            self._settle(tag, multiple, Queue.reject)

    def _recover(self, method: commands.Basic.Recover | commands.Basic.RecoverAsync) -> None:
        if not method.requeue:
            raise Refused(540, "requeue=false")
        self._settle(0, True, lambda queue, entries: queue.requeue(entries, lost=False))
        if isinstance(method, commands.Basic.Recover):
            self.send(commands.Basic.RecoverOk())

    def _settle(self, tag: int, multiple: bool, act: Callable[[Queue, list[Entry]], object]) -> None:
        by_queue: dict[Queue, list[Entry]] = {}
        for delivery in self._take_unacked(tag, multiple):
            if delivery.consumer is not None:
                delivery.consumer.unacked -= 1
                self.outstanding -= 1
            by_queue.setdefault(delivery.queue, []).append(delivery.entry)
        for queue, entries in by_queue.items():
            act(queue, entries)
            if not queue.gone:
                queue.deliver()
        if self.shared_limit:
            self.deliver()

    def _take_unacked(self, tag: int, multiple: bool) -> Iterable[_Delivery]:
        if tag == 0 and multiple:
            taken = list(self._unacked.values())
            self._unacked.clear()
            return taken
        if tag not in self._unacked:
            raise Refused(406, f"unknown delivery tag {tag}")
        if not multiple:
            return [self._unacked.pop(tag)]
        taken = []
        last = None
        while last != tag:
            last, delivery = self._unacked.popitem(last=False)
            taken.append(delivery)
        return taken


def _binding(to_queue: bool, target: str, key: str, arguments: dict[str, Any] | None) -> Binding:
    return Binding(to_queue, target, key, tuple(sorted((k, _frozen(v)) for k, v in (arguments or {}).items())))


def _frozen(value: Any) -> Any:
    """A table value that can be compared and hashed, as bindings are."""
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in value.items()))
    if isinstance(value, (list, bytearray)):
        return tuple(_frozen(item) for item in value)
    return value


_CHANNEL_METHODS: dict[type[base.Frame], Callable[[Channel, Any], None]] = {
    commands.Channel.Flow: Channel._flow,
    commands.Confirm.Select: Channel._confirm_select,
    commands.Exchange.Declare: Channel._exchange_declare,
    commands.Exchange.Delete: Channel._exchange_delete,
    commands.Exchange.Bind: Channel._exchange_bind,
    commands.Exchange.Unbind: Channel._exchange_unbind,
    commands.Queue.Declare: Channel._queue_declare,
    commands.Queue.Bind: Channel._queue_bind,
    commands.Queue.Unbind: Channel._queue_unbind,
    commands.Queue.Purge: Channel._queue_purge,
    commands.Queue.Delete: Channel._queue_delete,
    commands.Basic.Qos: Channel._qos,
    commands.Basic.Consume: Channel._consume,
    commands.Basic.Cancel: Channel._cancel,
    commands.Basic.Get: Channel._get,
    commands.Basic.Ack: Channel._ack,
    commands.Basic.Nack: Channel._nack,
    commands.Basic.Reject: Channel._reject,
    commands.Basic.Recover: Channel._recover,
    commands.Basic.RecoverAsync: Channel._recover,
}


def read_method(payload: bytes) -> base.Frame:
    """The method in a frame; `Refused` where AMQP 0-9-1 has none such, or its arguments cannot be read."""
    index = int.from_bytes(payload[:4], "big")
    kind = commands.INDEX_MAPPING.get(index)
    if kind is None or len(payload) < 4:
        raise Refused(540, f"no method {index >> 16}.{index & 0xFFFF} in AMQP 0-9-1")
    method: base.Frame = kind()
    try:
        method.unmarshal(payload[4:])
    except Exception as error:  # pamqp lets through what struct, datetime and str raise for bytes that are none
        raise Refused(502, f"{method.name} cannot be read: {error}") from error
    return method
