"""Exchanges, bindings and routing, and the table of queues. No input or output here: `connection` and `channel` speak for it on sockets."""

from __future__ import annotations

import heapq
import itertools
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pamqp import decode

from meshkit.embedded.queues import (
    DeathReason,
    Entry,
    Message,
    Queue,
    QueueOptions,
    Refused,
    Time,
    amqp_type,
    dead_letter,
    deaths_of,
    is_cycle,
)
from meshkit.embedded.wire import Properties

EXCHANGE_TYPES = ("direct", "fanout", "topic", "headers")


@dataclass(frozen=True, slots=True)
class Binding:
    """A way from an exchange to a queue or to another exchange."""

    to_queue: bool
    target: str
    key: str
    arguments: tuple[tuple[str, Any], ...] = ()


@dataclass(slots=True, kw_only=True, eq=False)
class Exchange:
    """One exchange with the bindings that leave it."""

    name: str
    type: str
    durable: bool = True
    auto_delete: bool = False
    internal: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    # A dict as an ordered set: to find and drop one binding among thousands must not walk them.
    bindings: dict[Binding, None] = field(default_factory=dict)
    _by_key: dict[str, dict[Binding, None]] = field(default_factory=dict)
    _topic_cache: dict[str, list[Binding]] = field(default_factory=dict)

    def bind(self, binding: Binding) -> None:
        self.bindings[binding] = None
        self._by_key.setdefault(binding.key, {})[binding] = None
        self._topic_cache.clear()

    def unbind(self, binding: Binding) -> bool:
        if binding not in self.bindings:
            return False
        del self.bindings[binding]
        keyed = self._by_key[binding.key]
        del keyed[binding]
        if not keyed:
            del self._by_key[binding.key]
        self._topic_cache.clear()
        return True

    def matching(self, key: str, properties: Properties) -> Iterable[Binding]:
        """The bindings a message with this key and these headers takes."""
        if self.type == "fanout":
            return self.bindings
        if self.type == "direct":
            return self._by_key.get(key, ())
        if self.type == "topic":
            return self._matching_topics(key)
        headers = _decoded_headers(properties)
        return [binding for binding in self.bindings if _headers_match(dict(binding.arguments), headers)]

    def _matching_topics(self, key: str) -> list[Binding]:
        found = self._topic_cache.get(key)
        if found is None:
            words = key.split(".")
            found = [
                binding
                for pattern, keyed in self._by_key.items()
                if topic_matches(pattern.split("."), words)
                for binding in keyed
            ]
            if len(self._topic_cache) > 1000:
                self._topic_cache.clear()
            self._topic_cache[key] = found
        return found


def topic_matches(pattern: list[str], words: list[str]) -> bool:
    """Whether a topic pattern fits: `*` stands for one word, `#` for any number, none too."""
    # One row of a table over the words for each part of the pattern, so that "#.#.#.#" costs no more than "a.b.c.d".
    row = [True] + [False] * len(words)
    for part in pattern:
        if part == "#":
            row = list(itertools.accumulate(row, lambda reached, here: reached or here))
        else:
            row = [False] + [row[i] and part in ("*", word) for i, word in enumerate(words)]
    return row[-1]


def _decoded_headers(properties: Properties) -> dict[str, Any]:
    """The headers as Python values; one that pamqp cannot hold is there, and equal to nothing."""
    headers: dict[str, Any] = {}
    for name, raw in properties.headers.items():
        try:
            headers[name] = decode.embedded_value(raw)[1]
        except (ValueError, OverflowError, OSError):
            headers[name] = object()
    return headers


def _headers_match(wanted: dict[str, Any], headers: dict[str, Any]) -> bool:
    mode = wanted.get("x-match", "all")
    with_x = mode.endswith("-with-x")
    results = [
        name in headers and (value is None or (type(value) is type(headers[name]) and value == headers[name]))
        for name, value in wanted.items()
        if name != "x-match" and (with_x or not name.startswith("x-"))
    ]
    return all(results) if mode.startswith("all") else any(results)


@dataclass(frozen=True, slots=True)
class Published:
    """What became of a publish: whether any queue was found, and whether each took it."""

    routed: bool
    accepted: bool


class Broker:
    """One virtual host: its exchanges, its queues and its timers.

    `clock` gives the time; `on_timer` is told when an earlier time than before has become the next one that matters,
    and whoever is told calls `run_due` then. `owner` arguments are opaque: whoever an exclusive queue belongs to.
    """

    def __init__(self, *, clock: Time, on_timer: Callable[[], None] = lambda: None) -> None:
        self.clock = clock
        self.exchanges: dict[str, Exchange] = {}
        self.queues: dict[str, Queue] = {}
        # Where replies to "direct reply-to" go: no queue, but the consumer itself.
        self.reply_consumers: dict[str, Callable[[Message], None]] = {}
        self._on_timer = on_timer
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_order = itertools.count()
        self._dying: deque[tuple[Queue, Entry, DeathReason, frozenset[str]]] = deque()
        self._draining = False
        for name, kind in [("", "direct"), ("amq.match", "headers"), *((f"amq.{t}", t) for t in EXCHANGE_TYPES)]:
            self.exchanges[name] = Exchange(name=name, type=kind)

    # -- time --

    def next_due(self) -> float | None:
        """When the clock should be looked at next; None where nothing waits for it."""
        return self._timers[0][0] if self._timers else None

    def run_due(self) -> None:
        """Do all that the clock has made due, in the order in which it became due."""
        while self._timers and self._timers[0][0] <= self.clock.now():
            heapq.heappop(self._timers)[2]()

    def wake_at(self, when: float, wake: Callable[[], None]) -> None:
        """Have `wake` called once the clock has reached `when`; there is no taking back, so it must look again."""
        first = not self._timers or when < self._timers[0][0]
        heapq.heappush(self._timers, (when, next(self._timer_order), wake))
        if first:
            self._on_timer()

    # -- exchanges --

    def declare_exchange(
        self,
        name: str,
        kind: str,
        *,
        durable: bool,
        auto_delete: bool,
        internal: bool,
        arguments: dict[str, Any],
        passive: bool,
    ) -> None:
        """Make an exchange, or check that the one that is there is the same; `Refused` where it is not."""
        existing = self.exchanges.get(name)
        if passive:
            self._exchange(name)
            return
        if name == "":
            raise Refused(403, "operation not permitted on the default exchange")
        if kind not in EXCHANGE_TYPES:
            raise Refused(503, f"unknown exchange type '{kind}'")
        if existing is None:
            if name.startswith("amq."):
                raise Refused(403, f"exchange name '{name}' contains reserved prefix 'amq.*'")
            for key in arguments:
                if key.startswith("x-"):
                    raise Refused(406, f"invalid arg '{key}' for exchange '{name}' in vhost '/': meshkit-embedded does not know it")  # fmt: skip
            alternate = arguments.get("alternate-exchange", "")
            if not isinstance(alternate, str):
                raise Refused(
                    406,
                    f"invalid type '{amqp_type(alternate)}' for arg 'alternate-exchange' in exchange '{name}' in vhost '/'",
                )
            self.exchanges[name] = Exchange(
                name=name, type=kind, durable=durable, auto_delete=auto_delete, internal=internal, arguments=arguments
            )
            return
        for what, received, current in (
            ("type", kind, existing.type),
            ("durable", durable, existing.durable),
            ("auto_delete", auto_delete, existing.auto_delete),
            ("internal", internal, existing.internal),
        ):
            if received != current:
                raise _inequivalent(what, f"exchange '{name}'", f"'{_word(received)}'", f"'{_word(current)}'")
        _check_same("alternate-exchange", f"exchange '{name}'", arguments, existing.arguments)

    def delete_exchange(self, name: str, *, if_unused: bool) -> None:
        """Delete an exchange and the bindings that end or begin there; one that is not there is no error."""
        if name == "":
            raise Refused(403, "operation not permitted on the default exchange")
        if name.startswith("amq."):
            raise Refused(403, f"exchange name '{name}' contains reserved prefix 'amq.*'")
        exchange = self.exchanges.get(name)
        if exchange is None:
            return
        if if_unused and exchange.bindings:
            raise Refused(406, f"exchange '{name}' in vhost '/' in use")
        del self.exchanges[name]
        self._drop_bindings_to(name, to_queue=False)

    def bind(self, source: str, binding: Binding, *, owner: object) -> None:
        """Add a binding; the same one twice is one."""
        self._check_target(binding, owner)
        if source == "":
            raise Refused(403, "operation not permitted on the default exchange")
        exchange = self._exchange(source)
        if exchange.type == "headers":
            mode = dict(binding.arguments).get("x-match", "all")
            if mode not in ("all", "any", "all-with-x", "any-with-x"):
                raise Refused(406, f"Invalid x-match field value {mode!r}; expected all, any, all-with-x, or any-with-x")  # fmt: skip
        exchange.bind(binding)

    def unbind(self, source: str, binding: Binding, *, owner: object) -> None:
        """Take a binding away; one that is not there is no error, with whatever else of it is not there."""
        if binding.to_queue and binding.target in self.queues:
            self.queue(binding.target, owner=owner)
        if source == "":
            raise Refused(403, "operation not permitted on the default exchange")
        exchange = self.exchanges.get(source)
        if exchange is not None and exchange.unbind(binding):
            self._drop_if_unused(exchange)

    def _check_target(self, binding: Binding, owner: object) -> None:
        if binding.to_queue:
            self.queue(binding.target, owner=owner)
        elif binding.target == "":
            raise Refused(403, "operation not permitted on the default exchange")
        else:
            self._exchange(binding.target)

    def _drop_bindings_to(self, target: str, *, to_queue: bool) -> None:
        for exchange in list(self.exchanges.values()):
            gone = [b for b in exchange.bindings if b.target == target and b.to_queue == to_queue]
            for binding in gone:
                exchange.unbind(binding)
            if gone:
                self._drop_if_unused(exchange)

    def _drop_if_unused(self, exchange: Exchange) -> None:
        if exchange.auto_delete and not exchange.bindings and self.exchanges.get(exchange.name) is exchange:
            del self.exchanges[exchange.name]
            self._drop_bindings_to(exchange.name, to_queue=False)

    def _exchange(self, name: str) -> Exchange:
        try:
            return self.exchanges[name]
        except KeyError:
            raise Refused(404, f"no exchange '{name}' in vhost '/'") from None

    # -- queues --

    def queue(self, name: str, *, owner: object | None) -> Queue:
        """The queue of that name, for `owner` to use; `Refused` where there is none or another owns it."""
        queue = self.queues.get(name)
        if queue is None:
            raise Refused(404, f"no queue '{name}' in vhost '/'")
        if queue.owner is not None and queue.owner is not owner:
            raise _locked(name)
        return queue

    def declare_queue(
        self,
        name: str,
        *,
        durable: bool,
        exclusive: bool,
        auto_delete: bool,
        arguments: dict[str, Any],
        passive: bool,
        owner: object,
    ) -> Queue:
        """Make a queue, or check that the one that is there is the same; `Refused` where it is not.

        An empty name asks for one of the server's choice.
        """
        if name in self.queues or passive:
            queue = self.queue(name, owner=owner)
            queue.touch()
            if not passive:
                self._check_equivalent(queue, durable, exclusive, auto_delete, arguments, owner)
            return queue
        if name.startswith("amq."):
            raise Refused(403, f"queue name '{name}' contains reserved prefix 'amq.*'")
        name = name or f"amq.gen-{secrets.token_urlsafe(16)}"
        options = QueueOptions.read(name, arguments)
        if options.kind == "quorum":
            for wrong, what in (
                (not durable, "non-durable"),
                (exclusive, "exclusive-owner"),
                (auto_delete, "auto-delete"),
            ):
                if wrong:
                    raise Refused(406, f"invalid property '{what}' for queue '{name}' in vhost '/'")
        queue = self.queues[name] = Queue(
            name=name,
            durable=durable,
            owner=owner if exclusive else None,
            auto_delete=auto_delete,
            arguments=arguments,
            options=options,
            clock=self.clock,
            forward=self._forward,
            wake_at=self.wake_at,
            unused=self._delete,
        )
        return queue

    def _check_equivalent(
        self, queue: Queue, durable: bool, exclusive: bool, auto_delete: bool, arguments: dict[str, Any], owner: object
    ) -> None:
        subject = f"queue '{queue.name}'"
        for what, received, current in (
            ("durable", durable, queue.durable),
            ("auto_delete", auto_delete, queue.auto_delete),
        ):
            if received != current:
                raise _inequivalent(what, subject, f"'{_word(received)}'", f"'{_word(current)}'")
        if exclusive != (queue.owner is not None):
            raise _locked(queue.name)
        for key in sorted({*arguments, *queue.arguments}):
            if key.startswith("x-"):
                _check_same(key, subject, arguments, queue.arguments)

    def delete_queue(self, name: str, *, if_unused: bool, if_empty: bool, owner: object) -> int:
        """Delete a queue with what is in it; returns how many messages were ready. None there is no error."""
        if name not in self.queues:
            return 0
        queue = self.queue(name, owner=owner)
        if if_unused and queue.consumers:
            raise Refused(406, f"queue '{name}' in vhost '/' in use")
        if if_empty and len(queue):
            raise Refused(406, f"queue '{name}' in vhost '/' not empty")
        ready = len(queue)
        self._delete(queue)
        return ready

    def delete_queues_of(self, owner: object) -> None:
        """The owner is gone, so its exclusive queues go too."""
        for queue in [queue for queue in self.queues.values() if queue.owner is owner]:
            self._delete(queue)

    def _delete(self, queue: Queue) -> None:
        if queue.gone:
            return
        queue.gone = True
        self.queues.pop(queue.name, None)
        self._drop_bindings_to(queue.name, to_queue=True)
        consumers, queue.consumers = queue.consumers, []
        for consumer in consumers:
            consumer.queue_gone()
        queue.purge()
        queue.held.clear()

    # -- messages --

    def publish(self, message: Message) -> Published:
        """Route a message and put it into each queue once; `Refused` where its exchange does not exist."""
        if message.exchange == "" and message.routing_key in self.reply_consumers:
            self.reply_consumers[message.routing_key](message)
            # No queue took it, so RabbitMQ returns a mandatory reply, though it has delivered it.
            return Published(routed=False, accepted=True)
        self._exchange(message.exchange)
        queues = [self.queues[name] for name in self._route(message) if name in self.queues]
        accepted = True
        for queue in queues:
            accepted &= queue.put(message)
        return Published(routed=bool(queues), accepted=accepted)

    def _route(self, message: Message) -> dict[str, None]:
        """The names of the queues a message reaches, each once, over exchange bindings and alternate exchanges."""
        keys = (message.routing_key, *message.more_keys)
        if message.exchange == "":
            return dict.fromkeys(keys)
        found: dict[str, None] = {}
        todo, seen = deque([message.exchange]), {message.exchange}

        def go_on_to(name: Any) -> None:
            if name not in seen and name in self.exchanges:
                seen.add(name)
                todo.append(name)

        while todo:
            exchange = self.exchanges[todo.popleft()]
            if exchange.name == "":
                found.update((key, None) for key in keys if key in self.queues)
                continue
            took_any = False
            for key in keys:
                for binding in exchange.matching(key, message.properties):
                    took_any = True
                    if binding.to_queue:
                        found[binding.target] = None
                    else:
                        go_on_to(binding.target)
            if not took_any:
                go_on_to(exchange.arguments.get("alternate-exchange"))
        return found

    def _forward(self, queue: Queue, entry: Entry, reason: DeathReason, taken_by: frozenset[str]) -> None:
        # Dead letters may make dead letters (a full dead-letter queue that drops its head into the next one), so they
        # stand in line: a chain of a thousand queues must not be a thousand calls deep.
        self._dying.append((queue, entry, reason, taken_by))
        if self._draining:
            return
        self._draining = True
        try:
            while self._dying:
                self._bury(*self._dying.popleft())
        finally:
            self._draining = False

    def _bury(self, queue: Queue, entry: Entry, reason: DeathReason, taken_by: frozenset[str]) -> None:
        letter = dead_letter(queue, entry, reason, self.clock.time())
        targets: Iterator[str] = iter(self._route(letter) if letter.exchange in self.exchanges else ())
        if reason != "rejected":
            deaths = deaths_of(letter.properties) or []
            targets = (name for name in targets if not is_cycle(name, deaths))
        names = [name for name in targets if name in self.queues]
        taken_by |= {name for name in names if name not in taken_by and self.queues[name].put(letter)}
        if queue.options.at_least_once and not queue.gone and not (names and taken_by.issuperset(names)):
            queue.hold(entry, reason, taken_by)


def _locked(name: str) -> Refused:
    return Refused(
        405,
        f"cannot obtain exclusive access to locked queue '{name}' in vhost '/'. It could be originally declared on "
        "another connection or the exclusive property value does not match that of the original declaration.",
    )


def _inequivalent(what: str, subject: str, received: str, current: str) -> Refused:
    return Refused(406, f"inequivalent arg '{what}' for {subject} in vhost '/': received {received} but current is {current}")  # fmt: skip


def _check_same(key: str, subject: str, received: dict[str, Any], current: dict[str, Any]) -> None:
    if key == "x-queue-type" and received.get(key, "classic") == current.get(key, "classic"):
        return
    if key in received and key in current and received[key] != current[key]:
        raise _inequivalent(key, subject, f"'{_word(received[key])}'", f"'{_word(current[key])}'")
    if received.get(key) != current.get(key):
        raise _inequivalent(key, subject, _described(received.get(key)), _described(current.get(key)))


def _described(value: Any) -> str:
    if value is None:
        return "none"
    return f"the value '{_word(value)}' of type '{amqp_type(value)}'"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
