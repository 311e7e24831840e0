"""Whoever else has a hand on a circuit breaker: listeners, timers, and people who move the pybreaker object."""

import asyncio
import contextlib
import gc
import itertools
import logging
import threading
import weakref

import pybreaker
import pytest

from meshkit import CircuitBreaker, CircuitOpenError, listen
from meshkit.core.events import CircuitChanged, CircuitRejected
from meshkit.core.trace import tracer, use_tracer
from meshkit.policies.circuit_breaker import breakers
from meshkit.testing.clock import ManualClock


def make(clock, **options):
    return CircuitBreaker("payments", **{"min_calls": 4, "window": 10, "open_for": 10.0, "clock": clock, **options})


def succeed(breaker):
    with breaker.calling():
        pass


def fail(breaker, times=1):
    for _ in range(times):
        with pytest.raises(ConnectionError), breaker.calling():
            raise ConnectionError("no")


def refused(breaker):
    with pytest.raises(CircuitOpenError) as caught:
        breaker.calling().__enter__()
    return caught.value


@pytest.fixture
def changes():
    heard = []
    stop = listen(heard.append, kind=CircuitChanged)
    yield heard
    stop()


def path(changes):
    return [(change.old, change.new) for change in changes]


# -- the pybreaker object ---------------------------------------------------------------------------------------------


def test_opening_the_core_is_an_opening(clock, changes):
    """Opened by hand it lasts `open_for`, then probes as usual."""
    breaker = make(clock)
    fail(breaker, 2)
    breaker.core.open()
    assert 10.0 == refused(breaker).retry_after
    assert ("open", 10.0) == (breaker.state, breaker.snapshot().retry_after)
    clock.block(10)
    succeed(breaker)
    assert [("closed", "open"), ("open", "half_open"), ("half_open", "closed")] == path(changes)
    assert (10.0, 1.0) == (changes[0].retry_after, changes[0].failure_rate)


@pytest.mark.parametrize("look", ["state", "retry_after", "snapshot", "calling"])
def test_what_was_done_by_hand_is_seen_at_the_next_look(clock, changes, look):
    """Whoever looks first tells of it: a scrape as well as a call."""
    breaker = make(clock)
    breaker.core.open()
    if look == "calling":
        refused(breaker)
    elif look == "snapshot":
        assert ("open", 10.0) == (breaker.snapshot().state, breaker.snapshot().retry_after)
    else:
        assert {"state": "open", "retry_after": 10.0}[look] == getattr(breaker, look)
    assert [("closed", "open")] == path(changes)


def test_half_opening_the_core_lets_probes_decide(clock, changes):
    """From open, by hand, without waiting: the next caller is a probe. From closed too: the hand on the core is free to
    do what the breaker itself never does."""
    breaker = make(clock, probes=2)
    fail(breaker, 4)
    breaker.core.half_open()
    succeed(breaker)
    assert "half_open" == breaker.state
    succeed(breaker)
    assert "closed" == breaker.state
    breaker.core.half_open()
    fail(breaker)
    assert ("open", 10.0) == (breaker.state, breaker.retry_after)
    assert ["open", "half_open", "closed", "half_open", "open"] == [change.new for change in changes]


def test_closing_the_core_begins_a_new_window(clock):
    """Closed by hand while open: the failures of before are gone, and calls of before count no more."""
    breaker = make(clock)
    late = breaker.calling()
    late.__enter__()
    fail(breaker, 4)
    breaker.core.close()
    fail(breaker, 3)
    error = ConnectionError("late")
    late.__exit__(type(error), error, None)
    assert ("closed", 3) == (breaker.state, breaker.snapshot().calls)


@pytest.mark.parametrize("step", ["open", "half_open"])
def test_a_call_that_ends_after_a_hand_on_the_core_is_of_before(clock, changes, step):
    """Its end is the first to see what was done: it tells of it, and no longer counts itself."""
    breaker = make(clock)
    under_way = breaker.calling()
    under_way.__enter__()
    getattr(breaker.core, step)()
    error = ConnectionError("late")
    under_way.__exit__(type(error), error, None)
    assert [("closed", step)] == path(changes)
    assert (step, 0) == (breaker.state, breaker.snapshot().calls)


def test_opening_and_closing_the_core_unseen_is_no_event(clock, changes):
    """Where nobody looked in between nothing happened, and calls go on as before, also through a guarded function."""
    breaker = make(clock)
    calls = itertools.count()
    guarded = breaker(lambda: next(calls))
    fail(breaker, 3)
    breaker.core.open()
    breaker.core.close()
    assert [0, 1] == [guarded(), guarded()]
    assert [] == changes
    assert 5 == breaker.snapshot().calls


def test_the_core_says_what_the_breaker_says(clock):
    """`core.current_state` and `core.state.name` go along through the whole circle, and through force_open and reset."""
    breaker = make(clock)
    said = []

    def look():
        said.append((breaker.core.current_state, breaker.core.state.name))

    look()
    fail(breaker, 4)
    look()
    clock.block(10)
    with breaker.calling():
        look()
    look()
    breaker.force_open()
    look()
    breaker.reset()
    look()
    assert [
        ("closed", "closed"),
        ("open", "open"),
        ("half-open", "half-open"),
        ("closed", "closed"),
        ("open", "open"),
        ("closed", "closed"),
    ] == said
    assert "closed" == breaker.state


def test_the_core_shows_its_options(clock):
    """What tools read from a pybreaker object is there: name, wait, and how many successes close it."""
    core = make(clock, probes=3).core
    assert ("payments", 10.0, 3) == (core.name, core.reset_timeout, core.success_threshold)
    assert ("closed", 0, 0) == (core.current_state, core.fail_counter, core.success_counter)


@pytest.mark.parametrize("mode", ["isolated", "disabled"])
def test_moving_the_core_does_not_end_a_mode(clock, changes, mode):
    """Isolated or disabled it stays whatever is done to the core, without an event; `reset` then closes it."""
    breaker = make(clock)
    breaker.isolate() if mode == "isolated" else breaker.disable()
    breaker.core.open()
    assert mode == breaker.state
    assert [("closed", mode)] == path(changes)
    if mode == "isolated":
        assert "isolated" == refused(breaker).state
    else:
        succeed(breaker)
    breaker.reset()
    assert [("closed", mode), (mode, "open"), ("open", "closed")] == path(changes)
    assert ("closed", "closed") == (breaker.state, breaker.core.current_state)


def test_the_core_outlives_its_breaker(clock):
    """Somebody who kept only the pybreaker object can still read and move it."""
    core = make(clock).core
    gc.collect()
    assert ("closed", 0) == (core.current_state, core.fail_counter)
    core.open()
    assert ("open", 0) == (core.current_state, core.fail_counter)


def test_the_failure_counter_never_waits(clock):
    """`core.fail_counter` answers also while another thread is inside of the breaker."""
    breaker = make(clock)
    fail(breaker, 2)
    answers = []
    with breaker._lock:
        reader = threading.Thread(target=lambda: answers.append(breaker.core.fail_counter))
        reader.start()
        reader.join(10)
    assert [2] == answers


class Interrupting(ManualClock):
    """Does something at the next look at the time, in the middle of whatever looks."""

    then = None

    def now(self):
        if self.then is not None:
            then, self.then = self.then, None
            then()
        return super().now()


def test_a_hand_on_the_core_in_the_middle_of_a_call(changes):
    """Opened by hand while a call is being let through, it refuses the next one."""
    clock = Interrupting()
    breaker = make(clock)
    guarded = breaker(lambda: "ok")
    clock.then = breaker.core.open
    succeed(breaker)
    assert clock.then is None
    with pytest.raises(CircuitOpenError):
        guarded()
    assert [("closed", "open")] == path(changes)


def test_a_hand_on_the_core_in_the_middle_of_an_opening(changes):
    """Closed by hand while it opens, it lets the next call through."""
    clock = Interrupting()
    breaker = make(clock)
    guarded = breaker(lambda: "ok")
    clock.then = breaker.core.close
    breaker.force_open()
    assert clock.then is None
    assert "ok" == guarded()
    assert [("closed", "open"), ("open", "closed")] == path(changes)


def test_hands_on_the_core_from_threads(clock):
    """Threads open, half-open and close the core while others call and fail: nobody is stuck, every call is counted
    once, and at the end both say the same."""
    breaker = make(clock, probes=2, probe_for=1e9)
    guarded = breaker(lambda error: (_ for _ in ()).throw(error) if error else None)
    ending = threading.Event()
    calls = [0] * 4

    def call(number):
        while not ending.is_set():
            calls[number] += 1
            with contextlib.suppress(CircuitOpenError, ConnectionError):
                guarded(ConnectionError("no") if calls[number] % 3 == 0 else None)

    def move(step):
        for _ in range(200):
            getattr(breaker.core, step)()

    callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    hands = [threading.Thread(target=move, args=(step,)) for step in ("open", "half_open", "close")]
    for thread in (*callers, *hands):
        thread.start()
    for thread in hands:
        thread.join(30)
    ending.set()
    for thread in callers:
        thread.join(30)
    assert not any(thread.is_alive() for thread in (*callers, *hands))
    counts = breaker.counts
    assert sum(calls) == counts["success"] + counts["failure"] + counts["rejected"]
    assert breaker.state.replace("_", "-") == breaker.core.current_state
    breaker.reset()
    assert guarded(None) is None
    assert ("closed", "closed") == (breaker.state, breaker.core.current_state)


# -- listeners --------------------------------------------------------------------------------------------------------


class Recorder(pybreaker.CircuitBreakerListener):
    """Notes what it is told, then does something."""

    def __init__(self, then=lambda: None):
        self.told = []
        self._then = then

    def state_change(self, cb, old_state, new_state):
        self.told.append((old_state.name, new_state.name, cb.current_state))
        self._then()


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError, GeneratorExit])
def test_a_listener_that_raises_changes_nothing(clock, caplog, error):
    """The caller gets its own error, the circuit opens, the next listener is told, and the log says what failed: the
    other way round in pybreaker itself, where neither opens (findings J and AA)."""

    def broken():
        raise error("listener")

    first, second = Recorder(broken), Recorder()
    breaker = make(clock, listeners=[first, second])
    fail(breaker, 4)
    assert "open" == breaker.state
    assert [("closed", "open", "open")] == first.told == second.told
    assert [("meshkit", logging.WARNING, "a pybreaker listener of 'payments' failed; the call goes on")] == (
        caplog.record_tuples
    )
    assert caplog.records[0].exc_info


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_listener_does_not_keep_the_program_from_ending(clock, error):
    """Ctrl-C in a listener comes out, with the circuit open all the same."""

    def broken():
        raise error

    breaker = make(clock, listeners=[Recorder(broken)])
    fail(breaker, 3)
    with pytest.raises(error), breaker.calling():
        raise ConnectionError
    assert "open" == breaker.state


def test_a_slow_listener_holds_nobody_up(clock):
    """While a listener takes its time in the thread whose call opened the circuit, other threads are refused at once."""
    entered, leave = threading.Event(), threading.Event()

    def slow():
        entered.set()
        assert leave.wait(30)

    breaker = make(clock, listeners=[Recorder(slow)])
    tripping = threading.Thread(target=fail, args=(breaker, 4))
    tripping.start()
    assert entered.wait(30)
    assert 10.0 == refused(breaker).retry_after
    assert "open" == breaker.state
    assert breaker.counts["rejected"] == 1
    leave.set()
    tripping.join(30)


def test_a_listener_may_reset_inside_of_a_state_change(clock, changes):
    """A pybreaker listener that resets the breaker when it opens leaves it closed, and sees both changes in order."""
    listener = Recorder(lambda: breaker.reset() if breaker.state == "open" else None)
    breaker = make(clock, listeners=[listener])
    fail(breaker, 4)
    assert ("closed", "closed") == (breaker.state, breaker.core.current_state)
    assert [("closed", "open", "open"), ("open", "closed", "closed")] == listener.told
    assert [("closed", "open"), ("open", "closed")] == path(changes)
    fail(breaker, 3)
    assert "closed" == breaker.state


def test_a_listener_of_the_core_may_reset_inside_of_a_state_change(clock):
    """The same one, added to the pybreaker object itself: what it did last is what stays, here and there (finding BB:
    pybreaker itself says open afterwards)."""
    breaker = make(clock)
    breaker.core.add_listener(Recorder(lambda: breaker.reset() if breaker.state == "open" else None))
    fail(breaker, 4)
    assert ("closed", "closed", "closed") == (breaker.state, breaker.core.current_state, breaker.core.state.name)
    succeed(breaker)
    assert "closed" == breaker.state


def test_a_listener_of_the_core_that_raises_is_named_in_the_log(clock, caplog):
    """It keeps no transition from happening."""

    def broken():
        raise RuntimeError("listener")

    breaker = make(clock)
    breaker.core.add_listener(Recorder(broken))
    fail(breaker, 4)
    assert "open" == breaker.state
    assert "a listener of the pybreaker object of 'payments' failed" in caplog.text


def test_listeners_are_told_of_every_state_by_pybreakers_names(clock):
    """half-open has its hyphen there; isolated and disabled, which pybreaker does not know, are told all the same."""
    listener = Recorder()
    breaker = make(clock, listeners=(each for each in [listener]))
    fail(breaker, 4)
    clock.block(10)
    succeed(breaker)
    breaker.isolate()
    breaker.disable()
    assert [
        ("closed", "open"),
        ("open", "half-open"),
        ("half-open", "closed"),
        ("closed", "isolated"),
        ("isolated", "disabled"),
    ] == [(old, new) for old, new, _ in listener.told]


# -- half-open by timer -----------------------------------------------------------------------------------------------


async def test_the_timer_half_opens_it_without_traffic(clock, changes):
    """At the end of the wait it becomes half-open by itself, with the event, as Resilience4j's
    `CircuitBreakerAutoTransitionStateMachineTest`."""
    breaker = make(clock, half_open_by_timer=True)
    fail(breaker, 4)
    await clock.advance(9.99)
    assert [("closed", "open")] == path(changes)
    await clock.advance(0.01)
    assert [("closed", "open"), ("open", "half_open")] == path(changes)
    assert "half-open" == breaker.core.current_state
    await clock.advance(1000)
    succeed(breaker)
    assert "closed" == breaker.state


async def test_the_timer_does_nothing_where_it_was_closed_by_hand(clock, changes):
    """Closed before the wait is over it stays closed, as Resilience4j's `CircuitBreakerAutoTransitionStateMachineTest`."""
    for close in (CircuitBreaker.reset, lambda breaker: breaker.core.close()):
        breaker = make(clock, half_open_by_timer=True)
        fail(breaker, 4)
        await clock.advance(5)
        close(breaker)
        await clock.advance(100)
        assert "closed" == breaker.state
    assert [("closed", "open"), ("open", "closed")] * 2 == path(changes)


async def test_the_timer_of_an_earlier_opening_does_not_end_a_later_one(clock, changes):
    """Closed and opened again, it stays open for the whole of its new wait."""
    breaker = make(clock, half_open_by_timer=True)
    fail(breaker, 4)
    await clock.advance(6)
    breaker.reset()
    fail(breaker, 4)
    await clock.advance(6)
    assert 4.0 == breaker.retry_after
    assert "half_open" not in {change.new for change in changes}
    await clock.advance(4)
    assert "half_open" == changes[-1].new


async def test_the_timer_follows_force_open(clock, changes):
    """A wait that force_open makes longer or shorter ends when it says."""
    for first, second in ((10, 30), (30, 10)):
        breaker = make(clock, half_open_by_timer=True)
        breaker.force_open(first)
        breaker.force_open(second)
        seen = len(changes)
        await clock.advance(second - 0.01)
        assert seen == len(changes)
        await clock.advance(0.01)
        assert ("open", "half_open") == path(changes)[-1]


async def test_there_is_one_timer_at_most(clock):
    """Opened again and again, it leaves no timers behind on the loop."""
    breaker = make(clock, half_open_by_timer=True)
    for _ in range(100):
        breaker.force_open()
        breaker.force_open(20)
        breaker.reset()
    assert 1 >= sum(not timer.cancelled for *_, timer in clock._timers)


@pytest.mark.parametrize("mode", ["isolate", "disable"])
async def test_the_timer_does_not_end_a_mode(clock, changes, mode):
    """Isolated or disabled while open, it stays so when the wait is over."""
    breaker = make(clock, half_open_by_timer=True)
    fail(breaker, 4)
    getattr(breaker, mode)()
    seen = len(changes)
    await clock.advance(1000)
    assert seen == len(changes)


async def test_the_timer_is_set_again_where_the_loop_is_early(changes):
    """An event loop that calls a little too soon (uvloop counts in milliseconds) does not keep it open."""

    class Early(ManualClock):
        def call_at(self, when, callback):
            return super().call_at(when - 0.25 if when - self.now() > 0.25 else when, callback)

    clock = Early()
    breaker = make(clock, half_open_by_timer=True)
    fail(breaker, 4)
    await clock.advance(9.75)
    assert [("closed", "open")] == path(changes)
    await clock.advance(0.25)
    assert [("closed", "open"), ("open", "half_open")] == path(changes)


def test_without_a_loop_the_next_caller_half_opens_it(changes):
    """Opened where no event loop runs, the timer is left out and nothing else changes."""

    class NoLoop(ManualClock):
        def call_at(self, when, callback):
            raise RuntimeError("no running event loop")

    clock = NoLoop()
    breaker = make(clock, half_open_by_timer=True)
    fail(breaker, 4)
    clock.block(10)
    assert [("closed", "open")] == path(changes)
    succeed(breaker)
    assert "closed" == breaker.state


def test_a_loop_that_is_gone_takes_only_its_timer_along(changes):
    """The loop in which it opened has ended: the next caller, in another one, is the probe. A timer of the real clock."""
    breaker = CircuitBreaker("payments", min_calls=1, open_for=1e-6, half_open_by_timer=True)

    async def opening():
        fail(breaker, 1)

    async def probing():
        async with breaker.calling():
            pass

    asyncio.run(opening())
    asyncio.run(probing())
    assert ["open", "half_open", "closed"] == [change.new for change in changes]


async def test_the_timer_runs_on_a_real_loop(changes):
    """With the machine's own clock it half-opens as well."""
    breaker = CircuitBreaker("payments", min_calls=1, open_for=0.001, half_open_by_timer=True)
    half_open = asyncio.Event()
    stop = listen(lambda change: change.new == "half_open" and half_open.set(), kind=CircuitChanged)
    fail(breaker, 1)
    await asyncio.wait_for(half_open.wait(), 10)
    stop()


async def test_the_timer_keeps_no_breaker_alive(clock):
    """A breaker that nobody has any more is gone before its timer fires, which then does nothing."""
    breaker = make(clock, half_open_by_timer=True)
    fail(breaker, 4)
    left = weakref.ref(breaker)
    del breaker
    gc.collect()
    assert left() is None
    await clock.advance(10)


async def test_without_the_option_there_is_no_timer(clock, changes):
    """By default only calls move it."""
    breaker = make(clock)
    fail(breaker, 4)
    await clock.advance(1000)
    assert [("closed", "open")] == path(changes)
    assert [] == clock._timers


# -- what is known ----------------------------------------------------------------------------------------------------


def test_a_breaker_that_is_gone_is_not_known(clock):
    """`breakers` lists those that are alive."""
    breaker = make(clock)
    assert any(each is breaker for each in breakers())
    left = weakref.ref(breaker)
    del breaker
    gc.collect()
    assert left() is None


def test_it_says_who_it_is(clock):
    """Its repr names it and its state, its name is what was given."""
    breaker = make(clock)
    breaker.isolate()
    assert ("CircuitBreaker('payments', state='isolated')", "payments") == (repr(breaker), breaker.name)


def test_it_describes_itself(clock):
    """All that decides when it opens and closes is in `describe`, and `slow_rate` only where it says something."""
    assert {
        "kind": "circuit_breaker",
        "name": "payments",
        "failure_rate": 0.5,
        "min_calls": 10,
        "window": 20,
        "window_for": None,
        "slow_after": None,
        "slow_rate": None,
        "open_for": 15.0,
        "open_backoff": 1.0,
        "open_at_most": 300.0,
        "probes": 1,
        "concurrent_probes": 1,
        "probe_for": 60.0,
        "shadow": False,
    } == CircuitBreaker("payments").describe()
    told = make(clock, window=None, window_for=30.0, slow_after=2.0, slow_rate=0.8, shadow=True, probes=3).describe()
    assert (None, 30.0, 2.0, 0.8, True, 3, 3) == tuple(
        told[key]
        for key in ("window", "window_for", "slow_after", "slow_rate", "shadow", "probes", "concurrent_probes")
    )


def test_a_snapshot_says_shadow(clock):
    """And its rates are 0 where the window is empty."""
    breaker = make(clock, shadow=True)
    snapshot = breaker.snapshot()
    assert ("payments", "closed", 0.0, 0.0, 0.0, True) == (
        snapshot.name,
        snapshot.state,
        snapshot.failure_rate,
        snapshot.slow_rate,
        snapshot.retry_after,
        snapshot.shadow,
    )
    breaker.shadow = False
    assert (False, False) == (breaker.shadow, breaker.snapshot().shadow)


class Span:
    def __init__(self, recording):
        self.recording = recording
        self.events = []

    def event(self, name, attributes):
        self.events.append((name, attributes))


class Tracer:
    """One span, current everywhere."""

    def __init__(self, span):
        self._span = span

    def current(self):
        return self._span


@pytest.fixture
def span():
    before = tracer()
    made = Span(recording=True)
    use_tracer(Tracer(made))
    yield made
    use_tracer(before)


REJECTED, CHANGED = "meshkit.circuit_breaker.rejected", "meshkit.circuit_breaker.state_change"


@pytest.mark.parametrize("shadow", [False, True])
def test_transitions_and_rejections_stand_on_the_span(clock, span, shadow):
    """With tracing on, the span of a call says that the circuit opened, and that a later call was refused."""
    breaker = make(clock, shadow=shadow)
    guarded = breaker(lambda: "ok")
    fail(breaker, 4)
    with contextlib.suppress(CircuitOpenError):
        guarded()
    name = {"meshkit.circuit_breaker.name": "payments"}
    assert [
        (CHANGED, {**name, "meshkit.circuit_breaker.from": "closed", "meshkit.circuit_breaker.to": "open"}),
        (REJECTED, {**name, "meshkit.circuit_breaker.state": "open", "meshkit.circuit_breaker.shadow": shadow}),
    ] == span.events


def test_a_span_that_goes_nowhere_is_told_nothing(clock, span):
    """Where the trace is not sampled, nothing is made for it."""
    span.recording = False
    breaker = make(clock)
    fail(breaker, 4)
    refused(breaker)
    assert [] == span.events


@pytest.mark.parametrize("tracing", [False, True])
@pytest.mark.parametrize("listening", [False, True])
def test_rejections_count_the_same_whoever_watches(clock, request, tracing, listening):
    """A refused call is one count and, where somebody listens, one event with what is left, on every path."""
    if tracing:
        request.getfixturevalue("span")
    heard = []
    breaker = make(clock)
    guarded = breaker(lambda: "ok")
    fail(breaker, 4)
    clock.block(4)
    stop = listen(heard.append, kind=CircuitRejected) if listening else lambda: None
    with pytest.raises(CircuitOpenError) as caught:
        guarded()
    stop()
    assert ("payments", 6.0, "open") == (caught.value.policy, caught.value.retry_after, caught.value.state)
    assert 1 == breaker.counts["rejected"]
    assert [CircuitRejected(source="payments", retry_after=6.0)] * listening == heard
