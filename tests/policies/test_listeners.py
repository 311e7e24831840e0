"""Listeners watch: whatever one does, it changes nothing for the call, and what it is told has happened."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path

import pybreaker
import pytest

from meshkit import (
    AttemptTimeoutError,
    Backoff,
    Bulkhead,
    BulkheadFullError,
    CircuitBreaker,
    CircuitOpenError,
    Fallback,
    Hedge,
    Pipeline,
    RateLimitedError,
    RateLimiter,
    Retry,
    RetryBudget,
    Timeout,
    listen,
)
from meshkit.core import events
from meshkit.core.events import CircuitChanged, CircuitRejected, Event, RetryScheduled
from meshkit.testing.clock import ManualClock


@pytest.fixture
def clock():
    return ManualClock(hold=True)


@pytest.fixture
def hear():
    """`listen`, until the test is over."""
    with contextlib.ExitStack() as stack:
        yield lambda listener, kind=Event: stack.callback(listen(listener, kind=kind))


async def fail():
    raise OSError("no")


async def fine():
    return "ok"


async def story(clock):
    """A call of everything, in which every event of the policies happens; returns what callers saw, in order."""
    saw = []
    budget = RetryBudget("b", ratio=0, at_least=2, clock=clock)
    breaker = CircuitBreaker("b", min_calls=2, window=2, open_for=60, clock=clock)
    bulkhead = Bulkhead("b", limit=1)
    limiter = RateLimiter("l", permits=1, per=60, clock=clock)
    retry = Retry(on=OSError, attempts=9, backoff=Backoff(first=1.0, jitter="none"), budget=budget, clock=clock)

    async def attempt(*policies, fn):
        call = asyncio.create_task(Pipeline("prices", *policies).call(fn))
        await asyncio.sleep(0)
        await clock.advance(10.0)
        try:
            saw.append(await call)
        except Exception as error:
            saw.append(type(error))

    async def slow():
        await clock.sleep(3.0)
        return "late"

    async def nested():
        return await Pipeline("inner", bulkhead).call(fine)

    await attempt(retry, breaker, fn=fail)
    await attempt(breaker, fn=fine)
    await attempt(Fallback(answer="kept"), breaker, fn=fine)
    await attempt(bulkhead, fn=nested)
    await attempt(limiter, fn=fine)
    await attempt(limiter, fn=fine)
    await attempt(Timeout(2.0, clock=clock), fn=slow)
    await attempt(Hedge(1.0, clock=clock), fn=slow)
    await attempt(Hedge(1.0, budget=RetryBudget("b", ratio=0, at_least=0, clock=clock), clock=clock), fn=slow)
    await clock.advance(60.0)
    await attempt(breaker, fn=fine)
    return saw, breaker.counts, breaker.state, budget.balance, bulkhead.in_use


POLICIES = {
    "BulkheadRejected",
    "CircuitChanged",
    "CircuitRejected",
    "FallbackUsed",
    "HedgeEnded",
    "HedgeStarted",
    "RateLimited",
    "RetryBudgetExhausted",
    "RetryEnded",
    "RetryScheduled",
    "TimedOut",
}


def test_these_are_all_events_of_the_policies():
    """The story is of each class that stands under "policies" in `core/events.py`."""
    section = Path(events.__file__).read_text().split("# -- policies ")[1].split("# -- ")[0]
    assert POLICIES == {line.split()[1].split("(")[0] for line in section.splitlines() if line.startswith("class ")}


async def test_the_story_has_every_event_of_the_policies(clock, hear):
    """What the tests below are about happens: each event once at least."""
    heard = Counter()
    hear(lambda event: heard.update([type(event).__name__]))
    saw, counts, state, _, _ = await story(clock)
    assert POLICIES == set(heard)
    assert "closed" == state
    assert 2 == counts["failure"]
    assert [
        OSError,
        CircuitOpenError,
        "kept",
        BulkheadFullError,
        "ok",
        RateLimitedError,
        AttemptTimeoutError,
        "late",
        "late",
        "ok",
    ] == saw


def raises(event):
    raise LookupError("a listener")


def is_cancelled(event):
    raise asyncio.CancelledError


def stops_iteration(event):
    raise StopAsyncIteration


def ends_a_generator(event):
    raise GeneratorExit


@pytest.mark.parametrize("listener", [raises, is_cancelled, stops_iteration, ends_a_generator])
async def test_a_listener_that_fails_changes_nothing_for_any_call(clock, hear, caplog, listener):
    """Whatever it raises, each call comes to what it came to without it, and the log says so."""
    expected = await story(ManualClock(hold=True))
    hear(listener)
    heard = []
    hear(heard.append)
    assert expected == await story(clock)
    assert POLICIES == {type(event).__name__ for event in heard}
    said = [record for record in caplog.records if "a listener of" in record.getMessage()]
    assert len(heard) == len(said)


async def test_a_listener_that_takes_its_time_changes_only_the_time(clock, hear):
    """A slow listener holds the call up, as anything in it would, and its outcome is the same: time that a listener
    takes is no part of a wait."""
    hear(lambda event: clock.block(0.001))
    saw, counts, state, _, in_use = await story(clock)
    expected, expected_counts, expected_state, _, _ = await story(ManualClock(hold=True))
    assert (expected, expected_counts, expected_state, 0) == (saw, counts, state, in_use)


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit])
def test_a_listener_may_end_the_program(hear, leaving):
    """KeyboardInterrupt and SystemExit are nobody's error: they come out."""

    def leave(event):
        raise leaving

    hear(leave)
    breaker = CircuitBreaker("b")
    with pytest.raises(leaving):
        breaker.force_open()
    assert "open" == breaker.state


# -- what it sees -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", ["force_open", "isolate", "disable", "reset"])
def test_a_listener_sees_the_new_state(hear, move):
    """When a change is told, it has happened: `breaker.state` is the new state, and the pybreaker object agrees."""
    breaker = CircuitBreaker("b")
    if move == "reset":
        breaker.force_open()
    seen = []
    hear(lambda event: seen.append((event.new, breaker.state, breaker.core.current_state)), CircuitChanged)
    getattr(breaker, move)()
    state = {"force_open": "open", "isolate": "isolated", "disable": "disabled", "reset": "closed"}[move]
    assert [(state, state, "open" if state == "open" else "closed")] == seen


async def test_a_listener_sees_the_state_that_a_call_has_made(clock, hear):
    """A failure that opens the breaker, the probe, and the success that closes it: each is told once, when it is so."""
    breaker, seen = CircuitBreaker("b", min_calls=1, window=1, clock=clock), []
    hear(lambda event: seen.append((event.old, event.new, breaker.state)), CircuitChanged)
    with pytest.raises(OSError, match="no"):
        await breaker(fail)()
    await clock.advance(breaker.open_for)
    assert "ok" == await breaker(fine)()
    assert [
        ("closed", "open", "open"),
        ("open", "half_open", "half_open"),
        ("half_open", "closed", "closed"),
    ] == seen


async def test_a_listener_hears_of_a_retry_before_it_waits(clock, hear):
    """`RetryScheduled` is told before the wait, with the attempt that failed."""
    seen = []
    hear(lambda event: seen.append((event.attempt, event.delay, list(clock.sleeps))), RetryScheduled)
    retry = Retry(on=OSError, attempts=2, backoff=Backoff(first=1.0, jitter="none"), clock=clock)
    call = asyncio.create_task(Pipeline("prices", retry).call(fail))
    await asyncio.sleep(0)
    await clock.advance(1.0)
    with pytest.raises(OSError, match="no"):
        await call
    assert [(1, 1.0, [])] == seen


# -- one that acts ----------------------------------------------------------------------------------------------------


async def test_a_listener_may_reset_the_breaker_that_it_hears_of(clock, hear):
    """`breaker.reset()` inside the change to open closes it again: the call that opened it keeps its own error, both
    changes are told in order, and the next call is made."""
    breaker, seen = CircuitBreaker("b", min_calls=1, window=1, clock=clock), []

    def close(event):
        seen.append((event.old, event.new))
        if event.new == "open":
            breaker.reset()

    hear(close, CircuitChanged)
    for guarded in (breaker(fail), lambda: Pipeline("p", breaker).call(fail)):
        with pytest.raises(OSError, match="no"):
            await guarded()
        assert "closed" == breaker.state
    assert [("closed", "open"), ("open", "closed")] * 2 == seen
    assert "ok" == await breaker(fine)()


async def test_a_listener_may_call_through_the_breaker_that_it_hears_of(clock, hear):
    """Told that it is half-open, a listener that makes a call is one caller more: there is still one probe."""
    breaker, came = CircuitBreaker("b", clock=clock), []

    def call(event):
        if event.new == "half_open":
            try:
                came.append(breaker(lambda: "probed")())
            except CircuitOpenError as error:
                came.append(error.state)

    hear(call, CircuitChanged)
    breaker.force_open()
    await clock.advance(breaker.open_for)
    assert "ok" == await breaker(fine)()
    assert ["half_open"] == came
    assert "closed" == breaker.state


async def test_a_listener_may_cancel_the_call_that_it_hears_of(clock, hear):
    """It is a cancellation like any other: CancelledError out, nothing counted, nothing held."""
    breaker, bulkhead = CircuitBreaker("b", clock=clock), Bulkhead("b", limit=1)
    budget = RetryBudget("b", ratio=0, at_least=5, clock=clock)
    retry = Retry(on=OSError, budget=budget, clock=clock)
    call = asyncio.create_task(Pipeline("prices", retry, breaker, bulkhead).call(fail))
    hear(lambda event: call.cancel(), RetryScheduled)
    with pytest.raises(asyncio.CancelledError):
        await call
    assert call.cancelled()
    assert (1, 5, 0) == (breaker.counts["failure"], budget.balance, bulkhead.in_use)


async def test_a_listener_may_listen_and_stop_while_it_hears(hear):
    """Whoever begins to listen inside an event hears from the next one on; whoever stops hears no more."""
    breaker, late = CircuitBreaker("b"), []

    def once(event):
        stop()
        hear(late.append, CircuitChanged)

    stop = listen(once, kind=CircuitChanged)
    breaker.force_open()
    breaker.reset()
    assert [("open", "closed")] == [(event.old, event.new) for event in late]


async def test_a_listener_of_pybreaker_changes_nothing_either(clock, caplog):
    """One that is given as `listeners=` and raises is told after the change, and the call keeps its own error."""
    seen = []

    class Listener(pybreaker.CircuitBreakerListener):
        def state_change(self, cb, old_state, new_state):
            seen.append((old_state.name, new_state.name, cb.current_state))
            raise LookupError("a listener")

    breaker = CircuitBreaker("b", min_calls=1, window=1, listeners=[Listener()], clock=clock)
    with pytest.raises(OSError, match="no"):
        await breaker(fail)()
    assert [("closed", "open", "open")] == seen
    assert "open" == breaker.state
    assert "a pybreaker listener of 'b' failed" in caplog.text


# -- where nobody listens ---------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch):
    """No listener at all, whoever else may listen in this process."""
    monkeypatch.setattr(events, "_listeners", ())
    monkeypatch.setattr(events, "_by_kind", {})
    events._tell_classes(Event)
    yield
    monkeypatch.undo()
    events._tell_classes(Event)


@pytest.mark.usefixtures("nobody")
async def test_what_nobody_hears_is_the_same_call(clock):
    """With no listener at all, calls come to the same, and `heard` says so for each class."""
    assert not any(events.heard(getattr(events, name)) for name in POLICIES)
    assert not CircuitRejected.heard
    expected = await story(ManualClock(hold=True))
    stop = listen(lambda event: None, kind=Event)
    try:
        assert CircuitRejected.heard
        assert expected == await story(clock)
    finally:
        stop()
    assert not CircuitRejected.heard
