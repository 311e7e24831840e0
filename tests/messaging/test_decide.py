"""What a handler's end means for its message."""

import asyncio

import pytest

from meshkit.core.scope import Handling
from meshkit.errors import BulkheadFullError, DeadLetter, DeadlineTooCloseError, Discard, RejectedError, RetryLater
from meshkit.messaging import headers as h
from meshkit.messaging.consumer import ACK, REQUEUE, Settled, SlowStart, decide, decide_unrun, delivery_key
from meshkit.messaging.message import Delivery, Message, derived_id, new_id
from meshkit.messaging.schedule import Schedule, Wait
from meshkit.testing.clock import ManualClock

SCHEDULE = Schedule.parse("50ms, 10s*2", jitter=0)


def delivery(**fields: object) -> Delivery:
    headers = fields.pop("headers", {})
    message = Message(body=fields.pop("body", b"{}"), message_id=fields.pop("message_id", "1"), headers=headers)  # type: ignore[arg-type]
    return Delivery(message=message, queue="q", exchange="e", routing_key="k", **fields)  # type: ignore[arg-type]


def decided(error, *, attempt=1, permanent=(), opened=None):
    return decide(
        error,
        delivery=delivery(),
        attempt=attempt,
        schedule=SCHEDULE,
        permanent=permanent,
        opened=opened,
        clock=ManualClock(),
    )


def test_returning_acknowledges():
    """A handler that returns is done with its message."""
    assert ACK == decided(None)


def test_an_error_goes_by_the_schedule_until_that_ends():
    """Each failure leads to the next attempt, the one after the last step to a dead letter."""
    error = ValueError("no")
    first, second, third, last = (decided(error, attempt=attempt) for attempt in (1, 2, 3, 4))
    assert ("retry", Wait(seconds=0.05, in_process=True), 2) == (first.outcome, first.wait, first.attempt)
    assert ("retry", Wait(seconds=10.0, in_process=False), 3) == (second.outcome, second.wait, second.attempt)
    assert 4 == third.attempt
    assert ("dead_letter", "retries_exhausted", error) == (last.outcome, last.reason, last.error)


def test_a_permanent_error_is_a_dead_letter_at_once():
    """What another try cannot mend is not tried again."""
    assert "permanent" == decided(ValueError("no"), permanent=(ValueError,)).reason
    assert "retry" == decided(KeyError("no"), permanent=(ValueError,)).outcome


def test_verdicts_are_carried_out():
    """The handler's own words win over the schedule."""
    rejected = decided(DeadLetter("not ours"))
    assert ("dead_letter", "rejected_by_handler", "not ours") == (rejected.outcome, rejected.reason, rejected.note)
    assert "discard" == decided(Discard("old")).outcome
    assert ("retry", 2) == (decided(RetryLater()).outcome, decided(RetryLater()).attempt)
    assert Wait(seconds=30.0, in_process=False) == decided(RetryLater(after=25)).wait
    assert "retries_exhausted" == decided(RetryLater(after=25), attempt=4).reason


def test_a_verdict_in_a_group_is_a_verdict():
    """A TaskGroup in a handler wraps what is raised in it, however deep."""
    group = BaseExceptionGroup("", [ValueError("x"), BaseExceptionGroup("", [DeadLetter("bad")])])
    assert "rejected_by_handler" == decided(group).reason


def test_a_group_of_one_is_that_one():
    """What a TaskGroup wraps alone is classed, and told of, as if it had not been wrapped."""
    error = ValueError("x")
    decision = decided(ExceptionGroup("", [ExceptionGroup("", [error])]), permanent=(ValueError,))
    assert ("permanent", error) == (decision.reason, decision.error)


def test_a_group_is_permanent_only_where_all_of_it_is():
    """Where one of several errors may pass, another try may help."""
    group = ExceptionGroup("", [ValueError(), OSError()])
    assert "retry" == decided(group, permanent=(ValueError,)).outcome
    assert "permanent" == decided(group, permanent=(ValueError, OSError)).reason


def test_a_rejection_is_no_attempt():
    """What was never started is not counted; the consumer is to pause for as long as was said."""
    decision = decided(BulkheadFullError("full", policy="provider", retry_after=7.0), attempt=3)
    assert ("requeue", 3, 7.0, "provider") == (decision.outcome, decision.attempt, decision.pause, decision.policy)
    group = ExceptionGroup("", [RejectedError(retry_after=1.0), RejectedError(retry_after=3.0)])
    assert 3.0 == decided(group).pause
    assert decided(RejectedError()).pause < 0


def test_a_rejection_beside_a_failure_is_a_failure():
    """Something was started and failed, so the message was tried."""
    assert "retry" == decided(ExceptionGroup("", [RejectedError(), ValueError()])).outcome


def test_too_little_time_for_a_call_does_not_pause_the_consumer():
    """It is the message's own deadline that is near, which says nothing of the others."""
    assert "retry" == decided(DeadlineTooCloseError("late")).outcome


def test_a_failure_during_which_a_breaker_opened_is_a_rejection():
    """The one whose failure opened the breaker is not worse off than those that come after it."""
    decision = decided(OSError("down"), attempt=2, opened=15.0)
    assert ("requeue", 2, 15.0) == (decision.outcome, decision.attempt, decision.pause)
    assert ACK == decided(None, opened=15.0)
    assert "rejected_by_handler" == decided(DeadLetter("x"), opened=15.0).reason


def test_cancelled_is_not_failed():
    """A cancelled handler was not tried to its end: the message goes back as it is."""
    assert REQUEUE == decided(asyncio.CancelledError())
    assert "requeue" == decided(SystemExit(1)).outcome
    assert REQUEUE == decided(BaseExceptionGroup("", [asyncio.CancelledError(), ValueError()]))


def test_a_message_that_keeps_coming_back_unsettled_is_taken_for_a_crasher():
    """From the tenth delivery count on the handler is not run any more."""
    clock = ManualClock()
    assert decide_unrun(delivery(delivery_count=9), clock=clock) is None
    assert "crash_loop" == decide_unrun(delivery(delivery_count=10), clock=clock).reason


def test_a_message_past_its_deadline_is_not_handled():
    """Nobody wants it any more."""
    clock = ManualClock(epoch=1000.0)
    assert decide_unrun(delivery(deadline=1000.1), clock=clock) is None
    assert "expired" == decide_unrun(delivery(deadline=1000.0), clock=clock).reason


# -- slow start -------------------------------------------------------------------------------------------------------


def test_the_hand_grows_as_messages_go_well():
    """One at first, doubled after as many went well, never over the most."""
    slow = SlowStart(5)
    seen = []
    for _ in range(10):
        slow.settled(0)
        seen.append(slow.now)
    assert [2, 2, 4, 4, 4, 4, 5, 5, 5, 5] == seen


def test_the_hand_stays_small_while_crashes_are_seen():
    """What has come back twice looks like a crash, and must not take a full hand with it."""
    slow = SlowStart(8)
    assert not slow.settled(2)
    assert slow.settled(1)
    assert 2 == slow.now
    slow.restart()
    assert 1 == slow.now


# -- lost acknowledgements --------------------------------------------------------------------------------------------


def test_copies_of_one_message_are_told_apart():
    """The next attempt, a replay and another body under the same id are not what was settled."""
    first = delivery()
    settled = Settled()
    settled.add(delivery_key(first))
    assert delivery_key(first) in settled
    others = [
        delivery(headers={h.ATTEMPT: "2"}),
        delivery(headers={h.REPLAY_COUNT: "1"}),
        delivery(headers={h.DEAD_LETTERED_AT: "2026-11-21T13:00:00.000Z"}),
        delivery(body=b"[]"),
        delivery(message_id="2"),
    ]
    assert not any(delivery_key(other) in settled for other in others)
    assert delivery_key(delivery(message_id="")) is None


def test_only_so_many_are_remembered():
    """The oldest is forgotten first."""
    settled = Settled(2)
    keys = [delivery_key(delivery(message_id=str(number))) for number in range(3)]
    for key in keys:
        settled.add(key)
    assert [False, True, True] == [key in settled for key in keys]


# -- ids --------------------------------------------------------------------------------------------------------------


def test_new_ids_are_version_7_and_in_order_of_time():
    """Later ids sort later, by the clock."""
    clock = ManualClock()
    first = new_id(clock)
    clock.block(1.0)
    second = new_id(clock)
    assert "7" == first[14]
    assert first < second


def test_derived_ids_are_the_same_again_for_a_redelivery():
    """They follow from message, queue, event type and order, and from nothing else."""

    def published(message_id="1", queue="q"):
        handling = Handling(message_id=message_id, queue=queue)
        return [derived_id(handling, kind) for kind in ("a", "a", "b")]

    assert published() == published()
    assert 3 == len({*published()})
    assert not {*published()} & {*published(message_id="2")}
    assert not {*published()} & {*published(queue="p")}


@pytest.mark.parametrize("count", [None, "3", -1])
def test_an_odd_delivery_count_is_none(count):
    """Only what a broker writes counts."""
    from meshkit.messaging.message import delivery_count

    assert 0 == delivery_count({} if count is None else {h.DELIVERY_COUNT: count})
