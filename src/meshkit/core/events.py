"""What happened, as frozen facts, and how to hear of it.

Policies and edges act and `emit`; listeners watch. A listener's error never changes a call, and nothing that must not
be lost is done in a listener. All event classes stand here, so that whoever records them (`meshkit.telemetry`) needs
no import of whoever emits them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from meshkit.core.call import is_async
from meshkit.errors import ConfigurationError

_log = logging.getLogger("meshkit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A fact. `source` names what it is about: a client, a breaker, a queue, a connection.

    Attributes:
        heard: of a class, whether anyone listens to it: lets the hottest paths leave the event unmade.
    """

    heard: ClassVar[bool] = False

    source: str


# -- policies ---------------------------------------------------------------------------------------------------------

RetryEnd = Literal["attempts", "deadline", "budget", "breaker", "rejected", "server", "not_retryable"]
CircuitState = Literal["closed", "open", "half_open", "isolated", "disabled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryScheduled(Event):
    """An attempt failed and another one will be made after `delay` seconds."""

    attempt: int
    delay: float
    error_type: str
    from_server: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryEnded(Event):
    """A call failed for good after `attempts` attempts; `reason` is what ended it."""

    attempts: int
    reason: RetryEnd
    error_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitChanged(Event):
    """A circuit breaker went from one state to another. `retry_after`: seconds until it probes, if it opened."""

    old: CircuitState
    new: CircuitState
    retry_after: float | None = None
    failure_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitRejected(Event):
    """A circuit breaker refused a call; one in shadow mode would have, and let it through."""

    retry_after: float | None
    shadow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkheadRejected(Event):
    """A bulkhead refused a call: its queue was full, or the wait in it was over."""

    reason: Literal["full", "timeout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimited(Event):
    """A rate limiter refused a call: no permit within the time that the caller would wait."""

    retry_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HedgeStarted(Event):
    """An attempt had not answered after `delay` seconds, so that attempt number `attempt` was started beside it."""

    attempt: int
    delay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HedgeEnded(Event):
    """A call with more than one attempt at once is over; `winner` is the number of the attempt that answered, `None`
    where none did."""

    attempts: int
    winner: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryBudgetExhausted(Event):
    """A retry or a hedge was not made because the budget of `source` was used up."""

    kind: Literal["retry", "hedge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackUsed(Event):
    """A fallback answered, or tried to, in place of a failed call. `age`: seconds since the answer was good, where it is
    one that was kept."""

    reason: Literal["breaker_open", "rejected", "timeout", "retries_exhausted", "error"]
    result: Literal["success", "failure"]
    error_type: str
    age: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOut(Event):
    """A call or an attempt was stopped because its time was over."""

    seconds: float
    kind: Literal["attempt", "total"]


# -- HTTP -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientAttemptEnded(Event):
    """One HTTP request of a client (`source`) is over. `status` is 0 where no answer came."""

    status: int
    error_type: str
    seconds: float
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCallEnded(Event):
    """One logical call of a client (`source`) is over, attempts and waits included."""

    operation: str
    outcome: Literal["success", "error", "fallback", "rejected", "cancelled"]
    attempts: int
    seconds: float
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRequestStarted(Event):
    """A request came in. `source` is the service."""

    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRequestEnded(Event):
    """A request was answered. `route` is the template (`/users/{id}`), or empty where none matched."""

    method: str
    route: str
    status: int
    seconds: float
    traceparent: str = ""


# -- messaging --------------------------------------------------------------------------------------------------------

DeadLetterReason = Literal[
    "retries_exhausted", "permanent", "unparseable", "crash_loop", "expired", "rejected_by_handler"
]
Settlement = Literal["ack", "retry", "dead_letter", "requeue", "discard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagePublished(Event):
    """A publish has ended. `source` is the destination: exchange or, for the default exchange, the queue."""

    outcome: Literal["confirmed", "returned", "nacked", "timeout", "error"]
    seconds: float
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerStarted(Event):
    """A consumer of queue `source` is set up: from here on its counters exist, at 0, so that its first dead letter is
    seen as an increase."""

    handler: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageReceived(Event):
    """A delivery arrived from queue `source` and is handed to its handler. One `MessageSettled` follows, also where the
    connection was lost meanwhile (`requeue`)."""

    redelivered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageSettled(Event):
    """A delivery from queue `source` is done with. `age`: seconds from its first publish to the start of its handler,
    `None` if unknown."""

    handler: str
    outcome: Settlement
    seconds: float
    attempt: int
    error_type: str = ""
    age: float | None = None
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageRetried(Event):
    """A message of queue `source` will come back as `attempt` after `delay` seconds."""

    attempt: int
    delay: float
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageDeadLettered(Event):
    """A message of queue `source` was confirmed in its dead-letter queue."""

    reason: DeadLetterReason
    error_type: str
    message_id: str
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterReplayed(Event):
    """A dead letter went back to queue `source`, or could not."""

    result: Literal["republished", "failed", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerPaused(Event):
    """The consumer of queue `source` stopped taking messages, for `retry_after` seconds at least."""

    retry_after: float
    policy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerProbed(Event):
    """The paused consumer of queue `source` fetched one message to see whether it may resume."""

    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerResumed(Event):
    """The consumer of queue `source` takes messages again after `paused` seconds."""

    paused: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConnectionChanged(Event):
    """A broker connection (`source`: "publish" or "consume") came up or was lost. The first `up` is no reconnect."""

    connected: bool
    reconnect: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerBlocked(Event):
    """The broker blocked a connection (memory or disk alarm), or released it."""

    blocked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateSkipped(Event):
    """The inbox of queue `source` knew the message already: it was acknowledged without running the handler."""

    message_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxMeasured(Event):
    """How many rows of outbox `source` wait for the relay, and when (epoch seconds) the oldest was written."""

    pending: int
    oldest: float | None


# -- tracing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class InvalidContext(Event):
    """A trace header that came in was dropped. `source` is the carrier: "http" or "amqp"."""

    reason: Literal["malformed", "oversize", "type"]


# -- how an error is named ------------------------------------------------------------------------------------------


def error_type(error: BaseException) -> str:
    """How events, metrics, spans, log lines and message headers name an error: `error.type` of the semantic conventions
    (https://opentelemetry.io/docs/specs/semconv/registry/attributes/error/).

    The fully qualified class name: built-in errors without a module, meshkit's own by their public name
    (`meshkit.CircuitOpenError`).
    """
    kind = type(error)
    module = kind.__module__
    if module == "builtins":
        return kind.__qualname__
    return f"{'meshkit' if module.startswith('meshkit.') else module}.{kind.__qualname__}"


# -- hearing of it ----------------------------------------------------------------------------------------------------

E = TypeVar("E", bound=Event)
Listener = Callable[[Any], object]

# Re-entrant: the collector may call a destructor anywhere, and that may stop listening.
_lock = threading.RLock()
_listeners: tuple[tuple[type[Event], Listener], ...] = ()
_by_kind: dict[type[Event], tuple[Listener, ...]] = {}


def listen(listener: Callable[[E], object], *, kind: type[E]) -> Callable[[], None]:
    """Have `listener` called with each event of `kind` (subclasses too), from now on, in the thread that emits it.

    Args:
        listener: a plain function; what it raises is logged and goes no further.
        kind: the event class; `Event` for all.

    Returns:
        The function that stops it. Calling that twice is allowed.

    Raises:
        ConfigurationError: `listener` is a coroutine function, which nobody would await.
    """
    if is_async(listener):
        raise ConfigurationError(
            f"a listener is a plain function, and {listener!r} is a coroutine function.",
            "Have it put the event into an asyncio.Queue, say, and await there.",
        )
    global _listeners, _by_kind
    entry = (kind, listener)
    with _lock:
        _listeners = (*_listeners, entry)
        _by_kind = {}
        _tell_classes(Event)

    def stop() -> None:
        global _listeners, _by_kind
        with _lock:
            # By identity: the same function may have been given twice, and each stop ends its own.
            _listeners = tuple(known for known in _listeners if known is not entry)
            _by_kind = {}
            _tell_classes(Event)

    return stop


def _tell_classes(kind: type[Event]) -> None:
    kind.heard = any(issubclass(kind, wanted) for wanted, _ in _listeners)
    for subclass in kind.__subclasses__():
        _tell_classes(subclass)


def heard(kind: type[Event]) -> bool:
    """Whether anyone listens to `kind`: lets a hot path leave the event unmade."""
    return bool(_find(kind))


def emit(event: Event) -> None:
    """Tell the listeners of `type(event)`. Never raises because of a listener."""
    for listener in _find(type(event)):
        try:
            listener(event)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:
            # A CancelledError too: nothing here awaits, so it is none of the call's own.
            _log.warning("a listener of %s failed; the call goes on", type(event).__name__, exc_info=True)


def _find(kind: type[Event]) -> tuple[Listener, ...]:
    found = _by_kind.get(kind)
    if found is None:
        table = _by_kind
        found = tuple(listener for wanted, listener in _listeners if issubclass(kind, wanted))
        # Into the table that was current when we looked: a `listen` in between has put a new one in place.
        table[kind] = found
    return found
