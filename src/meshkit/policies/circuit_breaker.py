"""Leave a dependency alone that keeps failing, and find out by a few probes when it works again.

A stock `pybreaker.CircuitBreaker` is the state of record and makes the transitions, through its public API only; its
call paths are never used, because they do not work with asyncio. The window, the probes, the clock and the fence that
drops results of an earlier period are ours.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar, cast

import pybreaker

from meshkit.core.call import Call, Next, NextSync, Outcome
from meshkit.core.clock import SYSTEM_CLOCK, Clock
from meshkit.core.events import CircuitChanged, CircuitRejected, CircuitState, Event, emit, heard
from meshkit.core.pipeline import Pipeline
from meshkit.core.scope import Scope, current_scope
from meshkit.core.trace import tracer
from meshkit.errors import ConfigurationError, RejectedError

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
_log = logging.getLogger("meshkit")

_STATES: dict[str, CircuitState] = {
    pybreaker.STATE_CLOSED: "closed",
    pybreaker.STATE_OPEN: "open",
    pybreaker.STATE_HALF_OPEN: "half_open",
}


class CircuitOpenError(RejectedError, pybreaker.CircuitBreakerError):
    """The circuit breaker is open (or all probes of a half-open one are under way): the call was not made.

    Args:
        policy: the breaker's name.
        retry_after: seconds until it lets a probe through, `None` while it waits for the probes under way.
        state: the breaker's state.
    """

    code = "MK501"

    def __init__(self, *, policy: str, retry_after: float | None, state: CircuitState = "open") -> None:
        # The text is made in __str__: while a breaker is open, most of these are never printed.
        super().__init__(policy=policy, retry_after=retry_after)
        self.state = state

    def __str__(self) -> str:
        when = "" if self.retry_after is None else f"; it lets a probe through in {self.retry_after:.3g} s"
        return f"{self.code}  circuit {self.policy!r} is {self.state.replace('_', '-')}{when}."


class _Tap(pybreaker.CircuitBreakerListener):
    """The one listener inside pybreaker: notes the state, takes no lock, never raises."""

    def __init__(self, owner: CircuitBreaker) -> None:
        self._owner = weakref.ref(owner)

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        owner = self._owner()
        if owner is not None:
            owner._core_state = new_state.name
            # In this order: see `_entered`.
            owner._free = None


class _Storage(pybreaker.CircuitMemoryStorage):
    """pybreaker's in-memory storage, whose `counter` people's dashboards read: the failures now in the window."""

    def __init__(self, owner: CircuitBreaker) -> None:
        super().__init__(pybreaker.STATE_CLOSED)
        self._owner = weakref.ref(owner)

    @property
    def counter(self) -> int:
        owner = self._owner()
        return 0 if owner is None else owner._failures


_breakers: weakref.WeakSet[CircuitBreaker] = weakref.WeakSet()
_breakers_lock = threading.Lock()


def breakers() -> list[CircuitBreaker]:
    """All circuit breakers of this process that are alive: what a scrape reads."""
    with _breakers_lock:
        return list(_breakers)


class CircuitBreaker:
    """Reject calls to something that fails too often, for `open_for` seconds; then let `probes` calls decide.

    Threads and event loops may share one. A cancelled call counts as nothing, and a cancelled probe gives its place
    back. Results of calls that began in an earlier period are dropped.

    Args:
        name: what it guards, for events, metrics and errors.
        failure_rate: opens when this share of the calls in the window failed, above 0 up to 1.
        min_calls: judges only once the window holds so many calls.
        window: how many calls the window holds.
        open_for: seconds from opening until the first probe.
        probes: so many probes run at once in half-open, and so many must succeed to close.
        probe_for: seconds that probes may take. Where they have decided nothing by then (one hangs, or whoever made the
            call never ended it), the next caller finds the circuit open again. More than a good call takes.
        failed: the rule for what is a failure: given the `Outcome`, `True`, `False`, or `None` for "counts as
            nothing". Where left out, the edge that made the call decides, and without one any `Exception` except
            refusals of policies further inside.
        listeners: pybreaker listeners, told of state changes after they have happened.
        clock: where the time comes from.

    Attributes:
        core: the `pybreaker.CircuitBreaker`. Opening or closing it by hand is honoured at the next call.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    def __init__(
        self,
        name: str,
        *,
        failure_rate: float = 0.5,
        min_calls: int = 10,
        window: int = 20,
        open_for: float = 15.0,
        probes: int = 1,
        probe_for: float = 60.0,
        failed: Callable[[Outcome], bool | None] | None = None,
        listeners: Iterable[pybreaker.CircuitBreakerListener] = (),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not 0 < failure_rate <= 1:
            raise ConfigurationError(f"failure_rate is a share of calls, above 0 up to 1, not {failure_rate}.")
        if window < 1:
            raise ConfigurationError(f"window is how many calls are judged, so 1 or above, not {window}.")
        if not 1 <= min_calls <= window:
            raise ConfigurationError(
                f"min_calls is how many calls of the window are needed, so 1 to {window}, not {min_calls}."
            )
        if not 0 < open_for < math.inf:
            raise ConfigurationError(f"open_for is how long the breaker stays open, so above 0, not {open_for}.")
        if not probe_for > 0:
            raise ConfigurationError(f"probe_for is how long probes may take, so above 0, not {probe_for}.")
        if not probes >= 1:
            raise ConfigurationError(f"probes is how many calls decide in half-open, so 1 or above, not {probes}.")
        self.name = name
        self.failure_rate = failure_rate
        self.min_calls = min_calls
        self.open_for = open_for
        self.probes = probes
        self.probe_for = probe_for
        self._failed = failed
        self._listeners = tuple(listeners)
        self._clock = clock
        # Re-entrant, because what runs under it may come back: a listener that was added to `core` itself, a signal
        # handler, a destructor that the collector calls.
        self._lock = threading.RLock()
        self._window: deque[bool] = deque(maxlen=window)
        self._failures = 0
        self._state: CircuitState = "closed"
        self._core_state = pybreaker.STATE_CLOSED
        self._period = 0
        # The period while calls go through unasked (closed, not isolated), else `None`: the one thing that is read
        # without the lock. It is written under the lock, and set to `None` by the tap as well.
        self._free: int | None = 0
        self._opened_at = 0.0
        self._probed_at = 0.0
        self._forced = False
        self._probing = 0
        self._passed = 0
        self._counts = {"success": 0, "failure": 0, "ignored": 0, "rejected": 0}
        self.core = pybreaker.CircuitBreaker(
            name=name,
            reset_timeout=open_for,
            success_threshold=probes,
            state_storage=_Storage(self),
            listeners=[_Tap(self)],
        )
        with _breakers_lock:
            _breakers.add(self)

    def __repr__(self) -> str:
        return f"CircuitBreaker({self.name!r}, state={self.state!r})"

    # -- what is known ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> CircuitState:
        """closed, open, half_open or isolated."""
        events: list[Event] = []
        with self._lock:
            self._follow(events)
            state: CircuitState = "isolated" if self._forced else self._state
        self._tell(events)
        return state

    @property
    def retry_after(self) -> float | None:
        """Seconds until a probe is let through; 0 where calls are let through; `None` where nobody can say (isolated,
        or probes under way)."""
        with self._lock:
            return self._wait()

    @property
    def counts(self) -> dict[str, int]:
        """Calls since the breaker was made, by result: success, failure, ignored, rejected."""
        with self._lock:
            return dict(self._counts)

    def describe(self) -> dict[str, object]:
        return {"kind": "circuit_breaker", "name": self.name, "open_for": self.open_for}

    # -- by hand ------------------------------------------------------------------------------------------------------

    def force_open(self) -> None:
        """Isolate: reject every call until `reset`."""
        events: list[Event] = []
        with self._lock:
            self._follow(events)
            if not self._forced:
                self._forced = True
                self._free = None
                self._period += 1
                events.append(CircuitChanged(source=self.name, old=self._state, new="isolated"))
        self._tell(events)

    def reset(self) -> None:
        """Close, with an empty window, whatever the state is."""
        events: list[Event] = []
        with self._lock:
            self._follow(events)
            if self._forced:
                self._forced = False
                events.append(CircuitChanged(source=self.name, old="isolated", new=self._state))
            if self._state != "closed":
                self._go("closed", events)
            else:
                # What is under way began before whatever the reset is for.
                self._period += 1
                self._window.clear()
                self._failures = 0
                self._set_free()
        self._tell(events)

    # -- as a policy --------------------------------------------------------------------------------------------------

    async def run(self, call: Call, call_next: Next[T]) -> T:
        period = self._free
        if period is None:
            period = self._acquire()
        scope = current_scope()
        call.on_end(lambda outcome: self._record(period, call, scope, outcome))
        return await call_next(call)

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        period = self._free
        if period is None:
            period = self._acquire()
        scope = current_scope()
        call.on_end(lambda outcome: self._record(period, call, scope, outcome))
        return call_next(call)

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Guard a function, plain or async."""
        return Pipeline(self.name, self)(fn)

    # -- the state machine: everything below runs under the lock, awaits nothing and calls nobody's code but pybreaker's
    #    public transitions; what happened is told after the lock is released -----------------------------------------

    def _acquire(self) -> int:
        """Let a call through and return the period it belongs to, or raise."""
        events: list[Event] = []
        refused: CircuitState | None = None
        retry_after: float | None = None
        with self._lock:
            self._follow(events)
            now = self._clock.now()
            if not self._forced and self._state == "open" and now - self._opened_at >= self.open_for:
                self._go("half_open", events)
            elif (
                self._state == "half_open"
                and self._probing + self._passed >= self.probes
                and now - self._probed_at >= self.probe_for
            ):
                self._go("open", events)
            if self._forced:
                refused = "isolated"
            elif self._state == "open" or (self._state == "half_open" and self._probing + self._passed >= self.probes):
                refused, retry_after = self._state, self._wait()
            elif self._state == "half_open":
                self._probing += 1
                self._probed_at = now
            if refused is not None:
                self._counts["rejected"] += 1
            elif self._free is None:
                # Somebody may have opened and closed `core` by hand since, with nobody looking.
                self._set_free()
            period = self._period
        if events:
            self._tell(events)
        if refused is None:
            return period
        if heard(CircuitRejected):
            emit(CircuitRejected(source=self.name, retry_after=retry_after))
        span = tracer().current()
        if span.recording:
            span.event(
                "meshkit.circuit_breaker.rejected",
                {"meshkit.circuit_breaker.name": self.name, "meshkit.circuit_breaker.state": refused},
            )
        raise CircuitOpenError(policy=self.name, retry_after=retry_after, state=refused)

    def _record(self, period: int, call: Call, scope: Scope | None, outcome: Outcome) -> None:
        try:
            failed = self._judged(call, outcome)
        except Exception:
            # A rule that fails says nothing of the call; a probe's place is free again all the same.
            failed = None
            _log.exception(
                "the rule of circuit %r for what is a failure has failed; the call counts as nothing", self.name
            )
        if failed is False:
            with self._lock:
                if self._free == period:
                    # What nearly every call comes to: a success in the period that goes on.
                    self._counts["success"] += 1
                    self._add(False)
                    return
        events: list[Event] = []
        opened: float | None = None
        with self._lock:
            self._counts["ignored" if failed is None else "failure" if failed else "success"] += 1
            if _STATES[self._core_state] != self._state:
                self._follow(events)
            if period == self._period:
                if self._state == "half_open":
                    self._probing -= 1
                    if failed is True:
                        self._go("open", events)
                    elif failed is False:
                        self._passed += 1
                        if self._passed >= self.probes:
                            self._go("closed", events)
                elif self._state == "closed" and failed is not None:
                    self._add(failed)
                    seen = len(self._window)
                    if failed and seen >= self.min_calls and self._failures / seen >= self.failure_rate:
                        self._go("open", events)
            if failed and self._state == "open":
                opened = self._wait()
        if opened is not None and scope is not None:
            # Whoever handles this request is to know that what failed here has been shut off, be it by this failure or
            # by one of the same time.
            scope.note_opened(opened)
        if events:
            self._tell(events)

    def _judged(self, call: Call, outcome: Outcome) -> bool | None:
        error = outcome.error
        if error is None and self._failed is None and call.judge is None:
            return False
        if error is not None and not isinstance(error, Exception):
            return None
        if self._failed is not None:
            said = self._failed(outcome)
            return None if said is None else bool(said)
        if isinstance(error, RejectedError | ConfigurationError):
            return None
        if call.judge is not None:
            judged = call.judge(outcome).breaker
            return None if judged == "neutral" else judged == "failure"
        return error is not None

    def _add(self, failed: bool) -> None:
        window = self._window
        if len(window) == window.maxlen:
            self._failures -= window[0]
        window.append(failed)
        self._failures += failed

    def _wait(self) -> float | None:
        if self._forced:
            return None
        if self._state == "closed":
            return 0.0
        if self._state == "half_open":
            return None if self._probing + self._passed >= self.probes else 0.0
        return max(0.0, self._opened_at + self.open_for - self._clock.now())

    def _follow(self, events: list[Event]) -> None:
        """Take over what somebody did to the pybreaker object by hand."""
        state = _STATES[self._core_state]
        if state != self._state:
            self._entered(state, events)

    def _go(self, to: CircuitState, events: list[Event]) -> None:
        try:
            if to == "open":
                self.core.open()
            elif to == "half_open":
                self.core.half_open()
            else:
                self.core.close()
        except Exception:
            # Only a listener that somebody has added to `core` itself can fail there.
            _log.warning("a listener of the pybreaker object of %r failed; the call goes on", self.name, exc_info=True)
        # By what the tap has noted: such a listener may have come back here, and been told of the new state already.
        self._follow(events)

    def _entered(self, state: CircuitState, events: list[Event]) -> None:
        old, self._state = self._state, state
        self._period += 1
        self._probing = self._passed = 0
        rate = self._failures / len(self._window) if self._window else None
        if state == "open":
            self._opened_at = self._clock.now()
        elif state == "closed":
            self._window.clear()
            self._failures = 0
        self._set_free()
        events.append(
            CircuitChanged(
                source=self.name,
                old=old,
                new=state,
                retry_after=self.open_for if state == "open" else None,
                failure_rate=rate if old == "closed" else None,
            )
        )

    def _set_free(self) -> None:
        self._free = self._period if self._state == "closed" and not self._forced else None
        # The tap runs outside of our lock where somebody moves `core` by hand. It notes the state first and then takes
        # the permission away: either we see the state here, or it takes away what we have just given.
        if self._core_state != pybreaker.STATE_CLOSED:
            self._free = None

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            emit(event)
            if not isinstance(event, CircuitChanged):
                continue
            span = tracer().current()
            if span.recording:
                span.event(
                    "meshkit.circuit_breaker.state_change",
                    {
                        "meshkit.circuit_breaker.name": self.name,
                        "meshkit.circuit_breaker.from": event.old,
                        "meshkit.circuit_breaker.to": event.new,
                    },
                )
            for listener in self._listeners:
                try:
                    # pybreaker hands over state objects, whose `name` listeners read.
                    listener.state_change(self.core, cast("Any", _Named(event.old)), cast("Any", _Named(event.new)))
                except Exception:
                    _log.warning("a pybreaker listener of %r failed; the call goes on", self.name, exc_info=True)


class _Named:
    """A state as pybreaker's listeners expect it: an object with a name."""

    __slots__ = ("name",)

    def __init__(self, state: CircuitState) -> None:
        self.name = state.replace("_", "-")
