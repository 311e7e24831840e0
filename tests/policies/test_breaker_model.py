"""The circuit breaker against a model of it, after any sequence of calls, waits and hands.

The model is written from the docstrings and the design, in the simplest way there is: everything in plain lists, looked
through anew each time. It knows nothing of how the breaker does it.
"""

import asyncio
import math

import pybreaker
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from meshkit import CircuitBreaker, CircuitOpenError, listen
from meshkit.core.call import Call, Outcome
from meshkit.core.events import CircuitChanged, CircuitRejected
from meshkit.testing.clock import ManualClock


class Busy(Exception):
    """The other side is there, and asks for time."""

    def __init__(self, retry_after):
        super().__init__(retry_after)
        self.retry_after = retry_after


class Forgiven(Exception):
    """The user's rule says that this is nothing."""


# How a call can end: what the function does, and what it means (failed, success, nothing) without and with the rule.
ENDS = {
    "ok": ("ok", False, False),
    "bad": ("bad", False, True),
    "error": (ConnectionError("no"), True, True),
    "busy": (Busy(17.0), True, True),
    "very busy": (Busy(1000.0), True, True),
    "forgiven": (Forgiven(), True, None),
    "ignored": (KeyError("unknown"), None, None),
    "cancelled": (asyncio.CancelledError(), None, None),
}


def user_rule(outcome):
    if isinstance(outcome.error, Forgiven):
        return None
    return outcome.error is not None or outcome.result == "bad"


class Model:
    """What the breaker promises."""

    def __init__(self, options):
        self.options = options
        self.now = 1000.0
        self.state = self.core = "closed"
        self.mode = None
        self.shadow = options["shadow"]
        self.calls = []  # judged while closed: (when, failed, slow)
        self.period = 0
        self.running = self.passed = 0  # probes
        self.last_probe = None
        self.until = None
        self.next_length = self.grown = options["open_for"]
        self.counts = dict.fromkeys(("success", "failure", "ignored", "rejected", "shadowed"), 0)
        self.changes = []
        self.rejections = []

    # -- what it says

    def window(self):
        if self.options.get("window_for") is None:
            kept = self.calls[-self.options["window"] :]
        else:
            tenth = self.options["window_for"] / 10
            now = math.floor(self.now / tenth)
            kept = [call for call in self.calls if math.floor(call[0] / tenth) > now - 10]
        return len(kept), sum(failed for _, failed, _ in kept), sum(slow for _, _, slow in kept)

    def seen(self):
        if self.mode:
            return self.mode
        return "half_open" if self.state == "open" and self.now >= self.until else self.state

    def retry_after(self):
        if self.mode:
            return {"isolated": None, "disabled": 0.0}[self.mode]
        if self.state == "open":
            return max(0.0, self.until - self.now)
        return 0.0 if self.state == "closed" or self.place() else None

    def place(self):
        return self.running < self.options["concurrent_probes"] and self.running + self.passed < self.options["probes"]

    # -- what happens

    def new_period(self):
        self.period += 1
        self.running = self.passed = 0

    def enter(self, state, since=None):
        old, self.state, self.core = self.state, state, state
        self.new_period()
        length = None
        if state == "open":
            self.until = (self.now if since is None else since) + self.next_length
            length = max(0.0, self.until - self.now)
        else:
            self.next_length = self.options["open_for"]
        if state == "closed":
            self.calls = []
            self.grown = self.options["open_for"]
        if self.mode is None:
            self.changes.append((old, state, length))

    def look(self):
        """See what was done to the core by hand, and that the time of probes is over."""
        if self.core != self.state:
            self.enter(self.core)
        if self.state == "half_open" and self.mode is None and not self.place():
            over = self.last_probe + self.options["probe_for"]
            if self.now >= over:
                self.open_again(None, since=over)

    def open(self, asked, since=None):
        self.next_length = self.grown
        if asked and self.options["heed_retry_after"]:
            self.next_length = max(self.grown, min(asked, self.options["open_at_most"]))
        self.enter("open", since)

    def open_again(self, asked, since=None):
        self.grown = min(self.grown * self.options["open_backoff"], self.options["open_at_most"])
        self.open(asked, since)

    def begin(self):
        """The call that is let through, with the period in which it counts; or why it is not."""
        self.look()
        if self.mode == "disabled":
            return {"period": None, "at": self.now}
        if self.mode is None:
            if self.state == "open" and self.now >= self.until:
                self.enter("half_open")
            if self.state == "closed" or (self.state == "half_open" and self.place()):
                if self.state == "half_open":
                    self.running += 1
                    self.last_probe = self.now
                return {"period": self.period, "at": self.now}
        self.rejections.append((self.retry_after(), self.shadow))
        if self.shadow:
            self.counts["shadowed"] += 1
            return {"period": None, "at": self.now}
        self.counts["rejected"] += 1
        return (self.mode or self.state, self.retry_after())

    def end(self, call, how):
        self.look()
        came, failed, failed_by_rule = ENDS[how]
        if self.options["failed"] is not None:
            failed = failed_by_rule
        self.counts["ignored" if failed is None else "failure" if failed else "success"] += 1
        if call["period"] != self.period:
            return
        asked = getattr(came, "retry_after", None)
        after = self.options["slow_after"]
        slow = failed is not None and after is not None and self.now - call["at"] >= after
        if self.state == "half_open":
            self.running -= 1
            if failed or slow:
                self.open_again(asked)
            elif failed is False:
                self.passed += 1
                if self.passed == self.options["probes"]:
                    self.enter("closed")
        elif self.state == "closed" and failed is not None:
            self.calls.append((self.now, failed, slow))
            calls, failures, slow_ones = self.window()
            if (failed or slow) and calls >= self.options["min_calls"]:
                too_slow = after is not None and slow_ones / calls >= self.options["slow_rate"]
                if failures / calls >= self.options["failure_rate"] or too_slow:
                    self.open(asked)

    def pass_time(self, seconds):
        target = self.now + seconds
        if self.options["half_open_by_timer"] and self.state == "open" and self.now < self.until <= target:
            self.now = self.until
            if self.mode is None:
                self.enter("half_open")
        self.now = target

    def leave_mode(self):
        self.look()
        if self.mode:
            self.changes.append((self.mode, self.state, None))
            self.mode = None

    def enter_mode(self, mode):
        self.look()
        if self.mode != mode:
            self.changes.append((self.mode or self.state, mode, None))
            self.mode = mode
            self.new_period()

    def force_open(self, seconds):
        self.leave_mode()
        self.next_length = seconds or self.options["open_for"]
        self.grown = self.options["open_for"]
        if self.state == "open":
            self.until = self.now + self.next_length
        else:
            self.enter("open")

    def reset(self):
        self.leave_mode()
        if self.state != "closed":
            self.enter("closed")
        else:
            self.new_period()
            self.calls = []


@st.composite
def all_options(draw):
    probes = draw(st.integers(1, 3))
    open_for = draw(st.sampled_from([5.0, 10.0]))
    options = {
        "failure_rate": draw(st.sampled_from([0.25, 0.5, 1.0])),
        "open_for": open_for,
        "open_backoff": draw(st.sampled_from([1, 2.0, 4.0])),
        "open_at_most": draw(st.sampled_from([open_for, 16.0, 45.0])),
        "heed_retry_after": draw(st.booleans()),
        "probes": probes,
        "concurrent_probes": draw(st.integers(1, probes)),
        "probe_for": draw(st.sampled_from([3.0, 8.0, math.inf])),
        "half_open_by_timer": draw(st.booleans()),
        "failed": draw(st.sampled_from([None, user_rule])),
        "shadow": draw(st.sampled_from([False, False, True])),
        "slow_after": draw(st.sampled_from([None, None, 2.0])),
        "slow_rate": 1.0,
    }
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 6))
        options["min_calls"] = draw(st.integers(1, options["window"]))
    else:
        options["window_for"] = draw(st.sampled_from([10.0, 20.0]))
        options["min_calls"] = draw(st.integers(1, 4))
    if options["slow_after"] is not None:
        options["slow_rate"] = draw(st.sampled_from([0.5, 1.0]))
    return options


class Block:
    """A call under way as `with breaker.calling()`."""

    def __init__(self, breaker):
        self._calling = breaker.calling()
        self._calling.__enter__()

    def end(self, came):
        error = came if isinstance(came, BaseException) else None
        self._calling.__exit__(None if error is None else type(error), error, None)


class Answer:
    """A call under way whose answer has begun: an edge ends it."""

    def __init__(self, breaker):
        self._call = Call("payments")
        breaker.run_sync(self._call, lambda call: None)

    def end(self, came):
        self._call.end(Outcome(error=came) if isinstance(came, BaseException) else Outcome(came))


class BreakerAgainstModel(RuleBasedStateMachine):
    under_way = Bundle("under_way")

    @initialize(options=all_options(), listening=st.booleans())
    def make(self, options, listening):
        self.clock = ManualClock(start=1000.0)
        self.model = Model(options)
        self.changes, self.rejections = [], []
        self.stops = [listen(self.changes.append, kind=CircuitChanged)]
        if listening:
            self.stops.append(listen(self.rejections.append, kind=CircuitRejected))
        self.breaker = CircuitBreaker("payments", clock=self.clock, ignore=KeyError, **options)

        @self.breaker
        def plain(came):
            if isinstance(came, BaseException):
                raise came
            return came

        self.plain = plain

    def teardown(self):
        for stop in getattr(self, "stops", ()):
            stop()

    # -- calls

    @rule(target=under_way, form=st.sampled_from([Block, Answer]))
    def begin(self, form):
        expected = self.model.begin()
        try:
            call, refusal = form(self.breaker), None
        except CircuitOpenError as error:
            call, refusal = None, (error.state, error.retry_after)
        if not isinstance(expected, dict):
            assert expected == refusal
            return None
        assert refusal is None
        return expected, call

    @rule(call=consumes(under_way), how=st.sampled_from(sorted(ENDS)))
    def end(self, call, how):
        if call is None:
            return
        expected, running = call
        if how == "bad" and isinstance(running, Block):
            how = "ok"  # a block has no result
        self.model.end(expected, how)
        running.end(ENDS[how][0])

    @rule(how=st.sampled_from(sorted(ENDS)), times=st.integers(1, 4))
    def call(self, how, times):
        for _ in range(times):
            expected = self.model.begin()
            if isinstance(expected, dict):
                self.model.end(expected, how)
            came = ENDS[how][0]
            refusal = None
            try:
                result = self.plain(came)
            except CircuitOpenError as error:
                refusal = (error.state, error.retry_after)
            except BaseException as error:
                result = error
            if not isinstance(expected, dict):
                assert expected == refusal
            else:
                assert refusal is None
                assert came is result

    # -- time

    @rule(seconds=st.sampled_from([1.0, 2.0, 5.0, 10.0, 20.0]))
    def wait(self, seconds):
        self.model.pass_time(seconds)
        self.clock.block(seconds)

    @rule()
    def wait_until_it_probes(self):
        self.model.look()
        left = self.model.retry_after()
        assert left == self.breaker.retry_after
        if left:
            self.wait(left)

    # -- hands

    @rule(seconds=st.sampled_from([None, 3.0, 30.0]))
    def force_open(self, seconds):
        self.model.force_open(seconds)
        self.breaker.force_open(seconds)

    @rule()
    def isolate(self):
        self.model.enter_mode("isolated")
        self.breaker.isolate()

    @rule()
    def disable(self):
        self.model.enter_mode("disabled")
        self.breaker.disable()

    @rule()
    def reset(self):
        self.model.reset()
        self.breaker.reset()

    @rule(on=st.booleans())
    def set_shadow(self, on):
        self.model.shadow = on
        self.breaker.shadow = on

    @rule(moves=st.lists(st.sampled_from(["open", "half_open", "closed"]), min_size=1, max_size=3))
    def move_the_core(self, moves):
        """Somebody moves the pybreaker object, and nobody looks in between."""
        for to in moves:
            self.model.core = to
            {
                "open": self.breaker.core.open,
                "half_open": self.breaker.core.half_open,
                "closed": self.breaker.core.close,
            }[to]()
        if self.model.options["half_open_by_timer"]:
            # A timer may look before anybody else does.
            self.model.look()
            assert self.model.seen() == self.breaker.state

    # -- what must hold

    @rule()
    def look(self):
        """Not an invariant: what was done by hand may go unseen for some steps."""
        self.model.look()
        assert self.model.seen() == self.breaker.state
        snapshot = self.breaker.snapshot()
        assert (self.model.seen(), *self.model.window(), self.model.retry_after(), self.model.shadow) == (
            snapshot.state,
            snapshot.calls,
            snapshot.failures,
            snapshot.slow,
            snapshot.retry_after,
            snapshot.shadow,
        )
        assert self.model.window()[1] == self.breaker.core.fail_counter
        assert self.model.retry_after() == self.breaker.retry_after

    @invariant()
    def counts_agree(self):
        if hasattr(self, "model"):
            assert self.model.counts == self.breaker.counts

    @invariant()
    def events_agree_and_follow_each_other(self):
        if not hasattr(self, "model"):
            return
        told = [(change.old, change.new, change.retry_after) for change in self.changes]
        assert self.model.changes == told
        state = "closed"
        for old, new, _ in told:
            assert state == old
            state = new
        if len(self.stops) == 2:
            assert self.model.rejections == [(each.retry_after, each.shadow) for each in self.rejections]

    @invariant()
    def pybreaker_agrees(self):
        if hasattr(self, "model"):
            core = self.breaker.core
            assert self.model.core.replace("_", "-") == core.current_state
            assert core.current_state in (pybreaker.STATE_CLOSED, pybreaker.STATE_OPEN, pybreaker.STATE_HALF_OPEN)


TestBreakerAgainstModel = BreakerAgainstModel.TestCase
TestBreakerAgainstModel.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
