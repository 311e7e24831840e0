"""What becomes of a delivery, decided without a broker: the verdict, the pause, slow start, and lost acknowledgements.

Nothing here awaits, so nothing can come in between looking and changing.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from meshkit.core.clock import Clock
from meshkit.core.events import DeadLetterReason, Settlement
from meshkit.errors import DeadLetter, DeadlineTooCloseError, Discard, HandlerVerdict, RejectedError, RetryLater
from meshkit.messaging import headers as h
from meshkit.messaging.message import Delivery
from meshkit.messaging.schedule import Schedule, Wait, rung_at_least

# From this delivery count on, a message is taken for one that kills its consumers.
CRASHES: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How a delivery is to be settled.

    Attributes:
        outcome: what is told of it. A message that waits out a pause is "requeue": it was not tried.
        wait: for a retry and a pause, how long and where.
        attempt: for a retry and a pause, the number that the next try has.
        reason: for a dead letter.
        error: what the handler raised, where that was an error.
        note: one line in place of an error's message.
        pause: seconds for which the consumer is to take nothing, `None` where it goes on.
        policy: name of the policy that rejected.
    """

    outcome: Settlement
    wait: Wait | None = None
    attempt: int = 1
    reason: DeadLetterReason | None = None
    error: BaseException | None = None
    note: str = ""
    pause: float | None = None
    policy: str = ""


ACK: Final = Decision(outcome="ack")
REQUEUE: Final = Decision(outcome="requeue")


def decide(
    error: BaseException | None,
    *,
    delivery: Delivery,
    attempt: int,
    schedule: Schedule,
    permanent: tuple[type[Exception], ...],
    opened: float | None,
    clock: Clock,
) -> Decision:
    """What a handler's end means for the message.

    Args:
        error: what left the handler; `None` where it returned.
        attempt: the number of the try that has ended.
        permanent: errors that another try cannot mend.
        opened: seconds until a breaker that opened during this delivery probes again, `None` if none opened.
    """
    if error is None:
        return ACK
    error = _single(error)
    if isinstance(error, HandlerVerdict):
        return _by_verdict(error, attempt=attempt, schedule=schedule, clock=clock)
    if not isinstance(error, Exception):
        # Cancelled, or the process is being ended: not tried to the end, so not failed either.
        return REQUEUE if isinstance(error, asyncio.CancelledError) else Decision(outcome="requeue", error=error)
    leaves = tuple(_leaves(error))
    # A call that was not started because the message's own time is nearly over says nothing about what it calls.
    rejections = [
        leaf for leaf in leaves if isinstance(leaf, RejectedError) and not isinstance(leaf, DeadlineTooCloseError)
    ]
    if rejections and len(rejections) == len(leaves):
        known = [one.retry_after for one in rejections if one.retry_after is not None]
        return _rejected(error, attempt, pause=max(known, default=-1.0), policy=rejections[0].policy)
    if opened is not None:
        return _rejected(error, attempt, pause=opened, policy="")
    if all(isinstance(leaf, permanent) for leaf in leaves):
        return Decision(outcome="dead_letter", reason="permanent", error=error)
    return _next_try(error, attempt=attempt, schedule=schedule, clock=clock)


def _by_verdict(verdict: HandlerVerdict, *, attempt: int, schedule: Schedule, clock: Clock) -> Decision:
    if isinstance(verdict, Discard):
        return Decision(outcome="discard", note=verdict.reason)
    if isinstance(verdict, DeadLetter):
        return Decision(outcome="dead_letter", reason="rejected_by_handler", note=verdict.reason)
    after = verdict.after if isinstance(verdict, RetryLater) else None
    reason = verdict.reason if isinstance(verdict, RetryLater) else ""
    decision = _next_try(
        None, attempt=attempt, schedule=schedule, clock=clock, note=reason or "the handler asked for it"
    )
    if after is None or decision.wait is None:
        return decision
    return Decision(
        outcome="retry",
        attempt=decision.attempt,
        note=decision.note,
        wait=Wait(seconds=rung_at_least(after), in_process=False),
    )


def _next_try(error: Exception | None, *, attempt: int, schedule: Schedule, clock: Clock, note: str = "") -> Decision:
    wait = schedule.wait(attempt, clock)
    if wait is None:
        return Decision(outcome="dead_letter", reason="retries_exhausted", error=error, note=note)
    return Decision(outcome="retry", wait=wait, attempt=attempt + 1, error=error, note=note)


def _rejected(error: Exception, attempt: int, *, pause: float, policy: str) -> Decision:
    return Decision(outcome="requeue", attempt=attempt, error=error, pause=pause, policy=policy)


def _single(error: BaseException) -> BaseException:
    """The verdict in a group, wherever it is, and what a group of one holds: a TaskGroup in a handler wraps both."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = list(_leaves(error))
    for leaf in leaves:
        if isinstance(leaf, HandlerVerdict):
            return leaf
    if any(not isinstance(leaf, Exception) for leaf in leaves):
        return asyncio.CancelledError()
    return leaves[0] if len(leaves) == 1 else error


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


# -- before the handler runs ------------------------------------------------------------------------------------------


def decide_unrun(delivery: Delivery, *, clock: Clock) -> Decision | None:
    """Whether a delivery is settled without running the handler; `None` where it is to be handled."""
    if delivery.delivery_count >= CRASHES:
        return Decision(
            outcome="dead_letter",
            reason="crash_loop",
            note=f"came back {delivery.delivery_count} times without having been settled: its handling ends the process, "
            "or loses the connection",
        )
    if delivery.deadline is not None and clock.time() >= delivery.deadline:
        return Decision(
            outcome="dead_letter", reason="expired", note=f"its deadline was {h.rfc3339(delivery.deadline)}"
        )
    return None


# -- the pause --------------------------------------------------------------------------------------------------------


class Pause:
    """Whether a consumer takes messages: *flowing*, *paused* for some time, *probing* with one message.

    flowing ──rejected──► paused ──due──► probing ──passed──► flowing
                             ▲───────rejected─────┘
    """

    # How long to wait where a rejection does not say: longer each time, since nothing is known.
    _FIRST: Final = 1.0
    _MOST: Final = 30.0
    _LEAST: Final = 0.05
    # Whatever somebody answers to "when": a probe a day costs nothing.
    _LONGEST: Final = 86_400.0

    def __init__(self) -> None:
        self.state: Literal["flowing", "paused", "probing"] = "flowing"
        self._until = 0.0
        self._since = 0.0
        self._unknown = 0

    def rejected(self, retry_after: float, now: float) -> bool:
        """A message was rejected. Says whether a pause has begun by it, which is so too for a failed probe.

        Args:
            retry_after: seconds until another try makes sense; below 0 where nobody knows.
        """
        begins = self.state != "paused"
        if retry_after < 0:
            if begins:
                self._unknown += 1
            retry_after = min(self._MOST, self._FIRST * 2.0 ** (max(1, self._unknown) - 1))
        until = now + min(self._LONGEST, max(self._LEAST, retry_after))
        self._until = until if begins else max(self._until, until)
        if self.state == "flowing":
            self._since = now
        self.state = "paused"
        return begins

    def left(self, now: float) -> float:
        """Seconds until the probe is due."""
        return max(0.0, self._until - now) if self.state == "paused" else 0.0

    def probe(self) -> None:
        """The pause is over: one message decides."""
        self.state = "probing"

    def passed(self, now: float) -> float | None:
        """A message was handled without being rejected. If that was the probe, the consumer flows again, and the
        answer is how many seconds it did not."""
        if self.state != "probing":
            return None
        self.state = "flowing"
        self._unknown = 0
        return now - self._since


class SlowStart:
    """How many messages a consumer has in hand: 1 at first, twice as many after as many went well, up to `most`.

    A message that kills the process takes all that is in hand with it; what has come back from such a death must not
    take a full hand again.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.now = 1
        self._well = 0

    def restart(self) -> None:
        self.now = 1
        self._well = 0

    def settled(self, delivery_count: int) -> bool:
        """A message was handled. Says whether more may be taken from now on."""
        if self.now >= self.most:
            return False
        if delivery_count > 1:
            # Once is a lost connection or a deployment; twice begins to look like a crash.
            self._well = 0
            return False
        self._well += 1
        if self._well < self.now:
            return False
        self._well = 0
        self.now = min(self.most, self.now * 2)
        return True


# -- lost acknowledgements --------------------------------------------------------------------------------------------

Key = tuple[str, str, str, str, int]


def delivery_key(delivery: Delivery) -> Key | None:
    """What tells one copy of a message from all others that carry its id; `None` where there is no id.

    Attempt, replay count and time of death differ between the copies that are alive one after another, and the body
    between messages of a producer that uses an id twice.
    """
    if not delivery.message_id:
        return None
    headers = delivery.headers
    return (
        delivery.message_id,
        h.text(headers, h.ATTEMPT),
        h.text(headers, h.REPLAY_COUNT),
        h.text(headers, h.DEAD_LETTERED_AT),
        hash(delivery.body),
    )


class Settled:
    """The last copies that were done with here. One of them that comes again lost only its acknowledgement."""

    def __init__(self, most: int = 1000) -> None:
        self._most = most
        self._keys: OrderedDict[Key, None] = OrderedDict()

    def add(self, key: Key | None) -> None:
        if key is None:
            return
        self._keys[key] = None
        if len(self._keys) > self._most:
            self._keys.popitem(last=False)

    def discard(self, key: Key | None) -> None:
        if key is not None:
            self._keys.pop(key, None)

    def __contains__(self, key: Key | None) -> bool:
        return key in self._keys
