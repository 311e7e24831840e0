"""Queues: what waits, who gets it, when it expires, where it goes when it dies. No input or output here.

The rules are those of RabbitMQ 3.10 for classic and quorum queues, as far as a client can see them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from meshkit.embedded.wire import (
    Properties,
    array_field,
    field_number,
    field_text,
    field_texts,
    long_field,
    split_array,
    split_table,
    table_field,
    text_field,
    timestamp_field,
)

DeathReason = Literal["rejected", "expired", "maxlen", "delivery_limit"]

# RabbitMQ sends dead letters again that no queue took after this time; see messaging.md on at-least-once.
HELD_RETRY_SECONDS = 180.0

_NAMES = {
    311: "CONTENT_TOO_LARGE",
    320: "CONNECTION_FORCED",
    403: "ACCESS_REFUSED",
    404: "NOT_FOUND",
    405: "RESOURCE_LOCKED",
    406: "PRECONDITION_FAILED",
    501: "FRAME_ERROR",
    502: "SYNTAX_ERROR",
    503: "COMMAND_INVALID",
    504: "CHANNEL_ERROR",
    505: "UNEXPECTED_FRAME",
    506: "RESOURCE_ERROR",
    530: "NOT_ALLOWED",
    540: "NOT_IMPLEMENTED",
    541: "INTERNAL_ERROR",
}


class Refused(Exception):
    """A request that AMQP answers by closing the channel, or (`hard`) the connection.

    `code` is a reply code of AMQP 0-9-1; `text` is what the client reads, begun with the code's name as RabbitMQ does.
    """

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        self.text = f"{_NAMES[code]} - {text}"
        self.hard = code >= 500 or code == 320
        super().__init__(self.text)


class Time(Protocol):
    """What the model asks of a clock."""

    def now(self) -> float:
        """Seconds on a clock that never goes back."""
        ...

    def time(self) -> float:
        """Seconds since the epoch."""
        ...


@dataclass(frozen=True, slots=True)
class Message:
    """What a publisher sent. Several queues may hold it; nobody changes it."""

    body: bytes
    properties: Properties
    exchange: str
    routing_key: str
    # The keys of CC and BCC, which route like the routing key.
    more_keys: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class Entry:
    """A message in one queue."""

    message: Message
    position: int
    expires_at: float | None
    lane: int = 0
    redelivered: bool = False
    returns: int = 0


class Consumer(Protocol):
    """Whoever takes messages from a queue."""

    @property
    def priority(self) -> int: ...

    @property
    def exclusive(self) -> bool: ...

    def can_take(self) -> bool:
        """Whether one more message may be handed over now."""
        ...

    def take(self, entry: Entry) -> None:
        """Receive one message."""

    def queue_gone(self) -> None:
        """The queue was deleted; no message comes any more."""


# --- arguments --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueOptions:
    """The `x-` arguments of a queue, checked. Lengths of time are seconds."""

    kind: Literal["classic", "quorum"] = "classic"
    message_ttl: float | None = None
    expires: float | None = None
    dead_letter_exchange: str | None = None
    dead_letter_routing_key: str | None = None
    at_least_once: bool = False
    max_length: int | None = None
    max_bytes: int | None = None
    overflow: Literal["drop-head", "reject-publish", "reject-publish-dlx"] = "drop-head"
    delivery_limit: int | None = None
    max_priority: int = 0
    single_active_consumer: bool = False

    @classmethod
    def read(cls, name: str, arguments: dict[str, Any]) -> QueueOptions:
        """Check the arguments of a declaration; `Refused` with 406 where RabbitMQ refuses, or where this server
        does not know what the argument asks for."""
        quorum = arguments.get("x-queue-type", "classic") == "quorum"
        known = _ARGUMENTS | (_QUORUM_ARGUMENTS if quorum else _CLASSIC_ARGUMENTS)
        values: dict[str, Any] = {"kind": "quorum" if quorum else "classic"}
        for key, value in arguments.items():
            if key not in known:
                if not key.startswith("x-"):
                    continue  # anybody's own note on a queue, which RabbitMQ keeps and ignores too
                kind = "quorum" if quorum else "classic"
                foreign = key in _QUORUM_ARGUMENTS | _CLASSIC_ARGUMENTS
                why = f" of queue type rabbit_{kind}_queue" if foreign else ": meshkit-embedded does not know it"
                raise Refused(406, f"invalid arg '{key}' for queue '{name}' in vhost '/'{why}")
            option, check = known[key]
            problem = check(value)
            if problem:
                raise Refused(406, f"invalid arg '{key}' for queue '{name}' in vhost '/': {problem}")
            if option:
                values[option] = value
        for seconds in ("message_ttl", "expires"):
            if seconds in values:
                values[seconds] /= 1000
        if "dead_letter_routing_key" in values and "dead_letter_exchange" not in values:
            raise Refused(
                406,
                f"invalid arg 'x-dead-letter-routing-key' for queue '{name}' in vhost '/': "
                "routing_key_but_no_dlx_defined",
            )
        values["at_least_once"] = (
            # As in RabbitMQ the strategy works only beside reject-publish; otherwise it is at-most-once.
            values.pop("strategy", "") == "at-least-once" and values.get("overflow") == "reject-publish"
        )
        return cls(**values)


_INTEGER_TYPES = (
    ("byte", -(1 << 7), 1 << 7),
    ("short", -(1 << 15), 1 << 15),
    ("unsignedshort", 0, 1 << 16),
    ("signedint", -(1 << 31), 1 << 31),
    ("unsignedint", 0, 1 << 32),
)


def amqp_type(value: Any) -> str:
    """RabbitMQ's word for the type of a table value; an integer is taken to have come in the fewest bytes."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return next((name for name, least, end in _INTEGER_TYPES if least <= value < end), "long")
    names = {str: "longstr", float: "float", dict: "table", list: "array", type(None): "void", bytearray: "binary"}
    return names.get(type(value), type(value).__name__)


_Check = Callable[[Any], str | None]


def _whole(least: int | None, most: int | None = None) -> _Check:
    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return f'"expected integer, got {amqp_type(value)}"'
        if least is not None and value < least:
            return f"{{value_negative,{value}}}" if value < 0 else "{value_zero,0}"
        if most is not None and value > most:
            return f"{{value_too_large,{value}}}" if most > 255 else f"{{max_value_exceeded,{value}}}"
        return None

    return check


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else f"{{unacceptable_type,{amqp_type(value)}}}"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"{{unacceptable_type,{amqp_type(value)}}}"


def _one_of(*choices: str) -> _Check:
    def check(value: Any) -> str | None:
        return None if value in choices else f"expected one of {', '.join(choices)}, not {value!r}"

    return check


_MAX_MILLISECONDS = 315_360_000_000  # ten years

# Each argument with the option it becomes; those with none are taken and change nothing a client could see.
_ARGUMENTS: dict[str, tuple[str, _Check]] = {
    "x-queue-type": ("", _one_of("classic", "quorum")),
    "x-message-ttl": ("message_ttl", _whole(0, _MAX_MILLISECONDS)),
    "x-expires": ("expires", _whole(1, _MAX_MILLISECONDS)),
    "x-dead-letter-exchange": ("dead_letter_exchange", _text),
    "x-dead-letter-routing-key": ("dead_letter_routing_key", _text),
    "x-max-length": ("max_length", _whole(0)),
    "x-max-length-bytes": ("max_bytes", _whole(0)),
    "x-single-active-consumer": ("single_active_consumer", _flag),
    "x-queue-leader-locator": ("", _text),
}
_QUORUM_ARGUMENTS: dict[str, tuple[str, _Check]] = {
    "x-overflow": ("overflow", _one_of("drop-head", "reject-publish")),
    "x-delivery-limit": ("delivery_limit", _whole(None)),
    "x-dead-letter-strategy": ("strategy", _one_of("at-most-once", "at-least-once")),
    "x-quorum-initial-group-size": ("", _whole(1)),
    "x-max-in-memory-length": ("", _whole(0)),
    "x-max-in-memory-bytes": ("", _whole(0)),
}
_CLASSIC_ARGUMENTS: dict[str, tuple[str, _Check]] = {
    "x-overflow": ("overflow", _one_of("drop-head", "reject-publish", "reject-publish-dlx")),
    "x-max-priority": ("max_priority", _whole(0, 255)),
    "x-queue-mode": ("", _one_of("default", "lazy")),
    "x-queue-version": ("", _whole(1, 2)),
    "x-queue-master-locator": ("", _text),
}


# --- the queue --------------------------------------------------------------------------------------------------------


class _Lane:
    """The ready messages of one priority, in the order in which they are to leave."""

    __slots__ = ("_fresh", "_returned")

    def __init__(self) -> None:
        self._fresh: deque[Entry] = deque()
        # Returned messages, by the place they take. A heap, so that giving back a thousand is not a thousand shifts.
        self._returned: list[tuple[int, Entry]] = []

    def __len__(self) -> int:
        return len(self._fresh) + len(self._returned)

    def __iter__(self) -> Iterator[Entry]:
        # The positions of a quorum queue's returned messages lie before those of all others.
        returned = sorted(self._returned, key=lambda pair: pair[0])
        fresh = ((entry.position, entry) for entry in self._fresh)
        return (entry for _, entry in heapq.merge(returned, fresh, key=lambda pair: pair[0]))

    def append(self, entry: Entry) -> None:
        self._fresh.append(entry)

    def give_back(self, entry: Entry, place: int) -> None:
        heapq.heappush(self._returned, (place, entry))

    def head(self) -> Entry | None:
        if self._returned and not (self._fresh and self._fresh[0].position < self._returned[0][0]):
            return self._returned[0][1]
        return self._fresh[0] if self._fresh else None

    def pop(self) -> Entry:
        if self._returned and not (self._fresh and self._fresh[0].position < self._returned[0][0]):
            return heapq.heappop(self._returned)[1]
        return self._fresh.popleft()


@dataclass(slots=True)
class _Held:
    """A dead letter that must not be lost and has no queue to go to yet."""

    entry: Entry
    reason: DeathReason
    taken_by: frozenset[str]


@dataclass(slots=True, kw_only=True, eq=False)
class Queue:
    """One queue. The broker makes it, fills it and deletes it; channels consume from it.

    `forward` takes a dead letter on its way, with the names of the queues that have it already; `wake_at` asks for a
    call at a time of the clock; `unused` is told when the queue is to be deleted.
    """

    name: str
    durable: bool
    owner: object | None
    auto_delete: bool
    arguments: dict[str, Any]
    options: QueueOptions
    clock: Time
    forward: Callable[[Queue, Entry, DeathReason, frozenset[str]], None]
    wake_at: Callable[[float, Callable[[], None]], None]
    unused: Callable[[Queue], None]
    gone: bool = False
    unacked: int = 0
    held: list[_Held] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    _lanes: list[_Lane] = field(init=False)
    _count: int = 0
    _bytes: int = 0
    _next_position: int = 0
    _next_return: int = -(1 << 62)
    _turn: int = 0
    _armed_for: float | None = None
    _used_at: float = 0.0
    _may_expire: bool = False

    def __post_init__(self) -> None:
        self._lanes = [_Lane() for _ in range(self.options.max_priority + 1)]
        self.touch()

    def __len__(self) -> int:
        """How many messages are ready."""
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        """The ready messages in the order in which they would leave."""
        return (entry for lane in reversed(self._lanes) for entry in lane)

    @property
    def quorum(self) -> bool:
        return self.options.kind == "quorum"

    # -- in --

    def put(self, message: Message) -> bool:
        """Take a message; False where the queue is full and rejects. Delivers at once what can be delivered."""
        if self._full() and self.options.overflow != "drop-head":
            if self.options.overflow == "reject-publish-dlx":
                self.forward(self, self._entry(message), "maxlen", frozenset())
            return False
        entry = self._entry(message)
        # Straight to a free consumer: a TTL of 0 means "now or never", and now must come first.
        if not self._count:
            consumer = self._free_consumer()
            if consumer is not None:
                self._hand_over(consumer, entry)
                return True
        self._lanes[entry.lane].append(entry)
        self._count += 1
        self._bytes += len(message.body)
        self._trim()
        if entry.expires_at is not None:
            self._may_expire = True
            if self._armed_for is None or entry.expires_at < self._armed_for:
                self._expire()
        if self.consumers:
            self.deliver()
        return True

    def _entry(self, message: Message) -> Entry:
        self._next_position += 1
        ttl = self.options.message_ttl
        own = message.properties.text("expiration")
        if own is not None:
            ttl = int(own) / 1000 if ttl is None else min(ttl, int(own) / 1000)
        lane = min(message.properties.priority, self.options.max_priority) if self.options.max_priority else 0
        return Entry(message, self._next_position, None if ttl is None else self.clock.now() + ttl, lane)

    def _full(self) -> bool:
        options = self.options
        return (options.max_length is not None and self._count >= options.max_length) or (
            options.max_bytes is not None and self._bytes >= options.max_bytes
        )

    def _trim(self) -> None:
        """Make room at the head. A queue that rejects publishes keeps what comes back, however full it is."""
        options = self.options
        if options.overflow != "drop-head":
            return
        while self._count and (
            (options.max_length is not None and self._count > options.max_length)
            or (options.max_bytes is not None and self._bytes > options.max_bytes)
        ):
            self._die(self._pop(next(lane for lane in self._lanes if len(lane))), "maxlen")

    # -- out --

    def get(self) -> Entry | None:
        """Hand out the head, for `basic.get`; None where nothing is ready."""
        self.touch()
        self._expire()
        if not self._count:
            return None
        self.unacked += 1
        return self._pop_head()

    def deliver(self) -> None:
        """Hand out what is ready while a consumer can take it."""
        while self._count:
            self._expire()
            if not self._count:
                return
            consumer = self._free_consumer()
            if consumer is None:
                return
            self._hand_over(consumer, self._pop_head())

    def _hand_over(self, consumer: Consumer, entry: Entry) -> None:
        self.unacked += 1
        consumer.take(entry)

    def _free_consumer(self) -> Consumer | None:
        """Who is next: the highest priority that can take, in turn among equals."""
        consumers = self.consumers
        if not consumers:
            return None
        if self.options.single_active_consumer:
            return consumers[0] if consumers[0].can_take() else None
        best = None
        for step in range(len(consumers)):
            at = (self._turn + step) % len(consumers)
            consumer = consumers[at]
            if (best is None or consumer.priority > consumers[best].priority) and consumer.can_take():
                best = at
        if best is None:
            return None
        self._turn = (best + 1) % len(consumers)
        return consumers[best]

    def _pop_head(self) -> Entry:
        return self._pop(next(lane for lane in reversed(self._lanes) if len(lane)))

    def _pop(self, lane: _Lane) -> Entry:
        entry = lane.pop()
        self._count -= 1
        self._bytes -= len(entry.message.body)
        return entry

    # -- back --

    def ack(self, entries: Sequence[Entry]) -> None:
        """Delivered messages are done with."""
        self.unacked -= len(entries)

    def reject(self, entries: Sequence[Entry]) -> None:
        """Delivered messages are refused for good: dead letters, or gone."""
        self.unacked -= len(entries)
        for entry in entries:
            self._die(entry, "rejected")

    def requeue(self, entries: Iterable[Entry], *, lost: bool) -> None:
        """Delivered messages come back, oldest first: given back by their consumer, or `lost` with it.

        A classic queue puts them back in their places. A quorum queue counts the return; it puts them before all
        others, but without a delivery limit it treats what was given back (not lost) as if it were new.
        Ends with `deliver`.
        """
        limit = self.options.delivery_limit
        for entry in entries:
            self.unacked -= 1
            entry.redelivered = True
            if self.gone:
                continue
            lane, place = self._lanes[entry.lane], entry.position
            if self.quorum:
                entry.returns += 1
                if limit is not None and entry.returns > limit:
                    self._die(entry, "delivery_limit")
                    continue
                if limit is None and not lost:
                    self._next_position += 1
                    place = entry.position = self._next_position
                else:
                    self._next_return += 1
                    place = self._next_return
            lane.give_back(entry, place)
            self._count += 1
            self._bytes += len(entry.message.body)
            self._trim()
        self._expire()
        self.deliver()

    def purge(self) -> int:
        """Drop all that is ready, without dead letters; returns how many."""
        dropped = self._count
        self._lanes = [_Lane() for _ in self._lanes]
        self._count = self._bytes = 0
        return dropped

    # -- consumers --

    def add(self, consumer: Consumer) -> None:
        """Let somebody consume. Call `deliver` when they are ready to receive."""
        self.consumers.append(consumer)
        self.touch()

    def remove(self, consumer: Consumer) -> None:
        """A consumer leaves; an auto-delete queue goes with its last one."""
        if consumer not in self.consumers:
            return
        self.consumers.remove(consumer)
        self._turn = 0
        self.touch()
        if self.auto_delete and not self.consumers:
            self.unused(self)
        elif not self.gone:
            self.deliver()  # the next in line of a single active consumer

    @property
    def exclusively_consumed(self) -> bool:
        return any(consumer.exclusive for consumer in self.consumers)

    # -- time --

    def touch(self) -> None:
        """The queue was used, so `x-expires` counts from now."""
        self._used_at = self.clock.now()
        self._arm()

    def wake(self) -> None:
        """Something may be due: expiry of the head or of the queue, dead letters that were held."""
        if self.gone:
            return
        now = self.clock.now()
        self._armed_for = None
        expires = self.options.expires
        if expires is not None and not self.consumers and now >= self._used_at + expires:
            self.unused(self)
            return
        self._expire()
        self._arm()

    def retry_held(self) -> None:
        """Send again the dead letters that no queue had taken."""
        held, self.held = self.held, []
        for letter in held:
            self.forward(self, letter.entry, letter.reason, letter.taken_by)

    def hold(self, entry: Entry, reason: DeathReason, taken_by: frozenset[str]) -> None:
        """Keep a dead letter that found no queue, or not in each, and try again later."""
        if not self.held:
            self.wake_at(self.clock.now() + HELD_RETRY_SECONDS, self.retry_held)
        self.held.append(_Held(entry, reason, taken_by))

    def _expire(self) -> None:
        """Only a head expires, as in RabbitMQ: what waits behind a longer-lived message waits with it."""
        if not self._may_expire:
            return
        now = self.clock.now()
        for lane in self._lanes:
            while (head := lane.head()) is not None and head.expires_at is not None and head.expires_at <= now:
                self._die(self._pop(lane), "expired")
        self._arm()

    def _arm(self) -> None:
        times = [head.expires_at for lane in self._lanes if (head := lane.head()) and head.expires_at is not None]
        if self.options.expires is not None and not self.consumers:
            times.append(self._used_at + self.options.expires)
        if not times or self.gone:
            return
        when = min(times)
        # A timer that fires too early looks again; only one that is missing or late would be wrong.
        if self._armed_for is None or when < self._armed_for:
            self._armed_for = when
            self.wake_at(when, self.wake)

    def _die(self, entry: Entry, reason: DeathReason) -> None:
        if self.options.dead_letter_exchange is not None and not self.gone:
            self.forward(self, entry, reason, frozenset())


# --- dead letters -----------------------------------------------------------------------------------------------------


def dead_letter(queue: Queue, entry: Entry, reason: DeathReason, at: float) -> Message:
    """The message as it leaves `queue` for its dead-letter exchange, with RabbitMQ's death headers.

    `at` is seconds since the epoch. The expiration goes, or the message would expire again at once.
    """
    options, message = queue.options, entry.message
    headers = message.properties.headers
    expiration = message.properties.text("expiration")
    deaths = deaths_of(message.properties) or []
    same = next((d for d in deaths if field_text(d.get("queue")) == queue.name and field_text(d.get("reason")) == reason), None)  # fmt: skip
    if same is not None:
        deaths.remove(same)
        latest = {**same, "count": long_field((field_number(same.get("count")) or 0) + 1)}
    else:
        latest = {
            "count": long_field(1),
            "reason": text_field(reason),
            "queue": text_field(queue.name),
            "time": timestamp_field(at),
            "exchange": text_field(message.exchange),
            "routing-keys": array_field(text_field(key) for key in (message.routing_key, *message.more_keys)),
        }
        if expiration is not None:
            latest["original-expiration"] = text_field(expiration)
    headers["x-death"] = array_field(table_field(death) for death in [latest, *deaths])
    if "x-first-death-reason" not in headers:
        headers["x-first-death-reason"] = text_field(reason)
        headers["x-first-death-queue"] = text_field(queue.name)
        headers["x-first-death-exchange"] = text_field(message.exchange)
    more_keys = message.more_keys
    if options.dead_letter_routing_key is not None:
        headers.pop("CC", None)
        more_keys = ()
    return Message(
        body=message.body,
        properties=message.properties.replace(headers=headers, expiration=None),
        exchange=options.dead_letter_exchange or "",
        routing_key=message.routing_key if options.dead_letter_routing_key is None else options.dead_letter_routing_key,
        more_keys=more_keys,
    )


def deaths_of(properties: Properties) -> list[dict[str, bytes]] | None:
    """The entries of `x-death`, latest first; None where there is none, or what is there is no list of tables."""
    raw = properties.headers.get("x-death") if properties.may_have_header("x-death") else None
    if raw is None or raw[:1] != b"A":
        return None
    items = split_array(raw[1:])
    return [split_table(item[1:]) for item in items] if all(item[:1] == b"F" for item in items) else None


def is_cycle(target: str, deaths: list[dict[str, bytes]]) -> bool:
    """Whether a dead letter on its way to `target` has been there, with nobody rejecting it since.

    RabbitMQ's rule (`rabbit_dead_letter`): such a message is dropped, or it would go round for ever.
    """
    for death in deaths:
        if field_text(death.get("reason")) == "rejected":
            return False
        if field_text(death.get("queue")) == target:
            return True
    return False


def sender_selected(properties: Properties) -> tuple[tuple[str, ...], Properties]:
    """The keys of the headers CC and BCC, and the properties without BCC. `Refused` where one is no list of strings."""
    if not (properties.may_have_header("CC") or properties.may_have_header("BCC")):
        return (), properties
    headers = properties.headers
    keys: list[str] = []
    for name in ("CC", "BCC"):
        if name in headers:
            texts = field_texts(headers[name])
            if texts is None:
                raise Refused(406, f"{name} must be a list of routing keys")
            keys += texts
    if headers.pop("BCC", None) is not None:
        properties = properties.replace(headers=headers)
    return tuple(keys), properties
