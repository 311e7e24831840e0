"""The broker without sockets: queues, expiry, dead letters and routing, on a clock that the test moves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from pamqp import commands, header

from meshkit.embedded.broker import Binding, Broker, topic_matches
from meshkit.embedded.queues import Entry, Message, Queue, Refused
from meshkit.embedded.wire import Properties
from meshkit.testing.clock import ManualClock


class Model:
    """A broker on a manual clock, with short ways to declare, publish and look."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.broker = Broker(clock=self.clock)

    def queue(self, name: str, *, owner: object = None, auto_delete: bool = False, **arguments: Any) -> Queue:
        given = {f"x-{key.replace('_', '-')}": value for key, value in arguments.items()}
        return self.broker.declare_queue(
            name,
            durable=True,
            exclusive=owner is not None,
            auto_delete=auto_delete,
            arguments=given,
            passive=False,
            owner=owner,
        )

    def exchange(self, name: str, kind: str, **arguments: Any) -> None:
        self.broker.declare_exchange(
            name, kind, durable=True, auto_delete=False, internal=False, arguments=arguments, passive=False
        )

    def publish(self, key: str, body: bytes = b"1", *, exchange: str = "", **properties: Any) -> bool:
        head = header.ContentHeader(properties=commands.Basic.Properties(**properties)).marshal()
        return self.broker.publish(Message(body, Properties(head[12:]), exchange, key)).accepted

    def pass_time(self, seconds: float) -> None:
        """Move the clock, doing what falls due at its time."""
        target = self.clock.now() + seconds
        while (due := self.broker.next_due()) is not None and due <= target:
            self.clock.block(max(0.0, due - self.clock.now()))
            self.broker.run_due()
        self.clock.block(target - self.clock.now())


class Taker:
    """A consumer with room for so many messages."""

    exclusive = False

    def __init__(self, room: int = 1_000_000, *, priority: int = 0) -> None:
        self.room = room
        self.priority = priority
        self.taken: list[Entry] = []
        self.told_gone = False

    def can_take(self) -> bool:
        return len(self.taken) < self.room

    def take(self, entry: Entry) -> None:
        self.taken.append(entry)

    def queue_gone(self) -> None:
        self.told_gone = True

    @property
    def bodies(self) -> list[bytes]:
        return [entry.message.body for entry in self.taken]


def bodies(queue: Queue) -> list[bytes]:
    return [entry.message.body for entry in queue]


@pytest.fixture
def model() -> Model:
    return Model()


# --- expiry -----------------------------------------------------------------------------------------------------------


def test_a_rung_lets_go_at_its_time(model: Model):
    """Nothing leaves a delay rung a moment early, and what leaves goes to the queue of its routing key."""
    work = model.queue("work")
    model.queue("rung", message_ttl=10_000, dead_letter_exchange="")
    model.exchange("rung", "fanout")
    model.broker.bind("rung", Binding(True, "rung", ""), owner=None)
    model.publish("work", exchange="rung")

    model.pass_time(9.999)
    assert [] == bodies(work)
    model.pass_time(0.001)
    assert [b"1"] == bodies(work)


def test_expiries_happen_in_the_order_of_their_times(model: Model):
    """One long step of the clock does what many short ones would: each thing at its time, in order."""
    end = model.queue("end")
    for seconds in (3, 1, 2):
        model.queue(f"wait-{seconds}", message_ttl=seconds * 1000, dead_letter_exchange="", dead_letter_routing_key="end")  # fmt: skip
        model.publish(f"wait-{seconds}", str(seconds).encode())
    # Chained behind the first: expires at 1 + 1.5 seconds, between the others.
    model.queue("chain", message_ttl=1500, dead_letter_exchange="", dead_letter_routing_key="end")
    model.queue("first", message_ttl=1000, dead_letter_exchange="", dead_letter_routing_key="chain")
    model.publish("first", b"2.5")

    model.pass_time(60)

    assert [b"1", b"2", b"2.5", b"3"] == bodies(end)


def test_an_expired_message_is_not_delivered(model: Model):
    """A consumer that comes after the time is up gets nothing, also before the timer has run."""
    queue = model.queue("it", message_ttl=1000)
    model.publish("it")
    model.clock.block(2)
    taker = Taker()
    queue.add(taker)

    queue.deliver()

    assert [] == taker.taken


def test_a_returned_message_keeps_its_time(model: Model):
    """A delivery does not give a message more time to live."""
    queue = model.queue("it", message_ttl=1000)
    model.publish("it")
    entry = queue.get()
    assert entry is not None
    model.pass_time(2)

    queue.requeue([entry], lost=False)

    assert [] == bodies(queue)


def test_a_queue_expires_when_nobody_used_it(model: Model):
    """x-expires counts from the last use: a declare, a get, or the last consumer's leaving."""
    queue = model.queue("it", expires=10_000)
    model.pass_time(9)
    queue.get()
    model.pass_time(9)
    taker = Taker()
    queue.add(taker)
    model.pass_time(100)
    assert "it" in model.broker.queues
    queue.remove(taker)
    model.pass_time(9.9)
    assert "it" in model.broker.queues

    model.pass_time(0.1)

    assert "it" not in model.broker.queues


def test_timers_do_not_pile_up(model: Model):
    """A hundred thousand messages with a time to live need a handful of timers."""
    model.queue("it", message_ttl=1000)
    for _ in range(1000):
        model.publish("it")

    assert len(model.broker._timers) <= 2


# --- dead letters -----------------------------------------------------------------------------------------------------


def test_at_least_once_keeps_a_letter_that_no_queue_takes(model: Model):
    """A quorum queue with at-least-once holds a dead letter until its target exists, and looks every three minutes."""
    rung = model.queue("rung", queue_type="quorum", message_ttl=1000, dead_letter_exchange="", dead_letter_strategy="at-least-once", overflow="reject-publish")  # fmt: skip
    model.exchange("rung", "fanout")
    model.broker.bind("rung", Binding(True, "rung", ""), owner=None)
    model.publish("work", exchange="rung")
    model.pass_time(600)
    assert (0, 1) == (len(rung), len(rung.held))

    work = model.queue("work")
    model.pass_time(180)

    assert ([b"1"], 0) == (bodies(work), len(rung.held))


def test_at_least_once_keeps_a_letter_that_a_full_queue_rejects(model: Model):
    """A dead letter that its target nacks waits too."""
    model.queue("dlq", max_length=1, overflow="reject-publish")
    model.publish("dlq", b"full")
    work = model.queue("work", queue_type="quorum", dead_letter_exchange="", dead_letter_routing_key="dlq", dead_letter_strategy="at-least-once", overflow="reject-publish")  # fmt: skip
    model.publish("work")
    entry = work.get()
    assert entry is not None

    work.reject([entry])

    assert 1 == len(work.held)
    model.broker.queues["dlq"].purge()
    model.pass_time(180)
    assert ([b"1"], 0) == (bodies(model.broker.queues["dlq"]), len(work.held))


def test_at_least_once_sends_again_only_where_it_was_not_taken(model: Model):
    """Of two targets the one that took the dead letter does not get it twice."""
    model.exchange("dead", "fanout")
    full = model.queue("full", max_length=1, overflow="reject-publish")
    room = model.queue("room")
    for name in ("full", "room"):
        model.broker.bind("dead", Binding(True, name, ""), owner=None)
    model.publish("full", b"there before")
    work = model.queue("work", queue_type="quorum", message_ttl=1000, dead_letter_exchange="dead", dead_letter_strategy="at-least-once", overflow="reject-publish")  # fmt: skip
    model.publish("work")
    model.pass_time(1000)
    assert ([b"1"], 1) == (bodies(room), len(work.held))

    full.purge()
    model.pass_time(180)

    assert ([b"1"], [b"1"], 0) == (bodies(full), bodies(room), len(work.held))


def test_at_least_once_needs_reject_publish(model: Model):
    """As in RabbitMQ the strategy is at-most-once where the queue may drop its head."""
    rung = model.queue("rung", queue_type="quorum", message_ttl=1000, dead_letter_exchange="missing", dead_letter_strategy="at-least-once")  # fmt: skip
    model.publish("rung")

    model.pass_time(2)

    assert (0, 0) == (len(rung), len(rung.held))


def test_a_long_chain_of_full_queues(model: Model):
    """Dead letters that push out dead letters through two hundred and fifty queues need no deep stack."""
    for number in range(250):
        model.queue(f"q{number}", max_length=0, dead_letter_exchange="", dead_letter_routing_key=f"q{number + 1}")
    end = model.queue("q250")

    model.publish("q0")

    assert [b"1"] == bodies(end)


def test_a_queue_that_dead_letters_to_itself_ends(model: Model):
    """A full queue whose head dies into itself drops the message instead of turning for ever."""
    queue = model.queue("it", max_length=1, dead_letter_exchange="", dead_letter_routing_key="it")
    model.publish("it", b"1")

    model.publish("it", b"2")

    assert [b"2"] == bodies(queue)


def test_death_headers_of_a_client_are_no_reason_to_fail(model: Model):
    """An x-death that is no list of tables is replaced, not stumbled over."""
    dlq = model.queue("dlq")
    model.queue("it", message_ttl=0, dead_letter_exchange="", dead_letter_routing_key="dlq")

    model.publish("it", headers={"x-death": "never"})

    (entry,) = dlq
    assert "it" == entry.message.properties.decoded().headers["x-death"][0]["queue"]


# --- returning --------------------------------------------------------------------------------------------------------


def _hold(queue: Queue, count: int) -> list[Entry]:
    entries = [queue.get() for _ in range(count)]
    return [entry for entry in entries if entry is not None]


def test_a_classic_queue_sorts_returns_into_their_places(model: Model):
    """Whatever the order of return, a classic queue is in the order of arrival again."""
    queue = model.queue("it")
    for number in range(6):
        model.publish("it", str(number).encode())
    held = _hold(queue, 5)

    for at in (3, 0, 4, 2, 1):
        queue.requeue([held[at]], lost=False)

    assert [b"0", b"1", b"2", b"3", b"4", b"5"] == bodies(queue)
    assert [b"0", b"1", b"2", b"3", b"4", b"5"] == [entry.message.body for entry in _hold(queue, 6)]


def test_a_negative_delivery_limit_is_used_up_at_once(model: Model):
    """-1 is no "unlimited" before RabbitMQ 4: the first return is one too many."""
    dlq = model.queue("dlq")
    queue = model.queue("it", queue_type="quorum", delivery_limit=-1, dead_letter_exchange="", dead_letter_routing_key="dlq")  # fmt: skip
    model.publish("it")

    queue.requeue(_hold(queue, 1), lost=False)

    assert ([], [b"1"]) == (bodies(queue), bodies(dlq))


def test_what_comes_back_to_a_deleted_queue_is_gone(model: Model):
    """A delivery outlives its queue, and settles into nothing."""
    queue = model.queue("it", dead_letter_exchange="", dead_letter_routing_key="dlq")
    dlq = model.queue("dlq")
    model.publish("it")
    model.publish("it")
    first, second = _hold(queue, 2)
    model.broker.delete_queue("it", if_unused=False, if_empty=False, owner=None)

    queue.requeue([first], lost=True)
    queue.reject([second])

    assert (0, []) == (len(queue), bodies(dlq))


def test_counts_what_is_ready_and_what_is_not(model: Model):
    """Ready and unacked add up, whatever happens to the messages."""
    queue = model.queue("it")
    for _ in range(5):
        model.publish("it")
    a, b, c = _hold(queue, 3)
    queue.ack([a])
    queue.requeue([b], lost=False)

    assert (3, 1) == (len(queue), queue.unacked)
    queue.reject([c])
    assert (3, 0) == (len(queue), queue.unacked)


# --- consumers --------------------------------------------------------------------------------------------------------


def test_a_deleted_queue_tells_its_consumers(model: Model):
    """Each consumer hears that its queue is gone."""
    queue = model.queue("it")
    taker = Taker()
    queue.add(taker)

    model.broker.delete_queue("it", if_unused=False, if_empty=False, owner=None)

    assert taker.told_gone


def test_a_slow_consumer_does_not_hold_up_the_others(model: Model):
    """Who has no room is passed over, and gets the rest when it has."""
    queue = model.queue("it")
    slow, fast = Taker(room=1), Taker()
    queue.add(slow)
    queue.add(fast)

    for number in range(5):
        model.publish("it", str(number).encode())

    assert ([b"0"], [b"1", b"2", b"3", b"4"]) == (slow.bodies, fast.bodies)


def test_exclusive_queues_go_with_their_owner(model: Model):
    """All of an owner's queues are deleted with it, and nobody else's."""
    mine, other = object(), object()
    model.queue("mine", owner=mine)
    model.queue("other", owner=other)

    model.broker.delete_queues_of(mine)

    assert ["other"] == list(model.broker.queues)


# --- routing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "key", "fits"),
    [
        ("#", "", True),
        ("#", "a.b.c", True),
        ("*", "a", True),
        ("*", "", True),  # one word, and it is empty
        ("*", "a.b", False),
        ("a.#", "a", True),
        ("a.#", "a.b.c", True),
        ("a.#", "ab", False),
        ("#.c", "a.b.c", True),
        ("#.c", "c", True),
        ("a.*.c", "a.b.c", True),
        ("a.*.c", "a.c", False),
        ("#.b.#", "a.b.c", True),
        ("#.b.#", "a.c", False),
        ("*.#.*", "a", False),
        ("*.#.*", "a.b", True),
        ("a.b", "a.b", True),
        ("a.b", "a.b.", False),
    ],
)
def test_topic_patterns(pattern: str, key: str, fits: bool):
    """`*` is exactly one word, `#` any number."""
    assert fits == topic_matches(pattern.split("."), key.split("."))


def test_a_pattern_of_many_hashes_is_matched_at_once():
    """A pattern made to be slow is not."""
    started = time.perf_counter()

    assert not topic_matches(["#", "*"] * 60 + ["end"], ["a"] * 250)

    assert time.perf_counter() - started < 0.5


def test_a_topic_exchange_forgets_old_routes(model: Model):
    """A binding made or taken away counts from the next message on, whatever was looked up before."""
    model.exchange("topics", "topic")
    queue = model.queue("it")
    model.publish("a.b", exchange="topics")

    model.broker.bind("topics", Binding(True, "it", "a.*"), owner=None)
    model.publish("a.b", b"bound", exchange="topics")
    model.broker.unbind("topics", Binding(True, "it", "a.*"), owner=None)
    model.publish("a.b", b"unbound", exchange="topics")

    assert [b"bound"] == bodies(queue)


def test_headers_that_python_cannot_hold_match_by_presence(model: Model):
    """A headers exchange looks past a value it cannot decode."""
    model.exchange("by-headers", "headers")
    queue = model.queue("it")
    model.broker.bind("by-headers", Binding(True, "it", "", (("kind", "a"), ("x-match", "all"))), owner=None)
    raw = b"\x03oddT" + b"\x7f" * 8 + b"\x04kindS\x00\x00\x00\x01a"
    properties = Properties(b"\x20\x00" + len(raw).to_bytes(4, "big") + raw)

    model.broker.publish(Message(b"1", properties, "by-headers", ""))

    assert [b"1"] == bodies(queue)


# --- cost -------------------------------------------------------------------------------------------------------------


def _seconds(act: Callable[[], object]) -> float:
    started = time.process_time()
    act()
    return time.process_time() - started


@pytest.mark.parametrize("arguments", [{}, {"queue_type": "quorum"}, {"message_ttl": 60_000}, {"max_priority": 9}])
def test_cost_grows_with_the_number_of_messages_and_no_faster(arguments: dict[str, Any]):
    """Filling, handing out, giving back and acking ten times as many messages takes about ten times as long."""

    def round_trip(count: int) -> None:
        model = Model()
        queue = model.queue("it", **arguments)
        for _ in range(count):
            model.publish("it")
        held = _hold(queue, count)
        for entry in reversed(held):
            queue.requeue([entry], lost=False)
        queue.ack(_hold(queue, count))

    small = min(_seconds(lambda: round_trip(1_000)) for _ in range(3))
    large = _seconds(lambda: round_trip(10_000))

    assert large < 40 * small


def test_refusals_carry_code_and_severity():
    """A refusal says which code it is and whether it ends the connection."""
    soft, hard = Refused(406, "no"), Refused(540, "no")

    assert ("PRECONDITION_FAILED - no", False) == (soft.text, soft.hard)
    assert ("NOT_IMPLEMENTED - no", True) == (hard.text, hard.hard)
