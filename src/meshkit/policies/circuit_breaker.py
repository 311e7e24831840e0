"""Leave a dependency alone that keeps failing, and find out by a few probes when it works again.

A stock `pybreaker.CircuitBreaker` is the state of record and makes the transitions, through its public API only; its
call paths are never used, because they do not work with asyncio. The window, the probes, the clock and the fence that
drops results of an earlier period are ours.

       ┌────────── all probes passed ──────────┐
       ▼                                       │
    closed ── too many failed or slow ──▶ open ── its time is over ──▶ half-open
                                           ▲                               │
                                           └── a probe failed, was slow, ──┘
                                               or none decided in time
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import math
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, ParamSpec, Protocol, Self, TypeVar, cast

import pybreaker

from meshkit.core.call import Call, Judge, Next, NextSync, Outcome, is_async
from meshkit.core.clock import SYSTEM_CLOCK, Clock, Timer
from meshkit.core.events import CircuitChanged, CircuitRejected, CircuitState, emit
from meshkit.core.pipeline import Pipeline
from meshkit.core.retry_after import asked_by, seconds_asked
from meshkit.core.scope import Scope, current_scope
from meshkit.core.trace import TRACING, tracer
from meshkit.errors import ConfigurationError, DeadlineExceededError, RejectedError
from meshkit.policies.window import CountWindow, TimeWindow, Totals, Window

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
_log = logging.getLogger("meshkit")

_STATES: Final[dict[str, CircuitState]] = {
    pybreaker.STATE_CLOSED: "closed",
    pybreaker.STATE_OPEN: "open",
    pybreaker.STATE_HALF_OPEN: "half_open",
}
_OPEN_AT_MOST: Final = 300.0
# Ten slices of less are shorter than any clock can tell apart.
_SHORTEST_WINDOW: Final = 0.001
_NEVER: Final = -math.inf


class CircuitOpenError(RejectedError, pybreaker.CircuitBreakerError):
    """The circuit breaker is open (or all probes of a half-open one are under way): the call was not made.

    Args:
        policy: the breaker's name.
        retry_after: seconds until it lets a probe through, `None` while it waits for the probes under way.
        state: the breaker's state.
    """

    code = "MK501"
    cause = ""
    remedy = ""

    # While a breaker is open, these are made by the thousand and never printed: their facts stay in `args`, where
    # `BaseException.__new__` puts them, and the text is made in `__str__`. So two attributes of the base are properties
    # here, which a type checker takes for something else.

    def __init__(self, *, policy: str, retry_after: float | None, state: CircuitState = "open") -> None:
        self.args = (policy, retry_after, state)

    @property
    def policy(self) -> str:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        return cast("str", self.args[0])

    @property
    def retry_after(self) -> float | None:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        return cast("float | None", self.args[1])

    @property
    def state(self) -> CircuitState:
        return cast("CircuitState", self.args[2])

    def __str__(self) -> str:
        when = "" if self.retry_after is None else f"; it lets a probe through in {self.retry_after:.3g} s"
        return f"{self.code}  circuit {self.policy!r} is {self.state.replace('_', '-')}{when}."


_make_refusal: Final = cast("Callable[..., CircuitOpenError]", CircuitOpenError.__new__)


class _Tap(pybreaker.CircuitBreakerListener):
    """The one listener inside pybreaker: notes the state, takes no lock, never raises."""

    def __init__(self, owner: CircuitBreaker) -> None:
        self._owner = weakref.ref(owner)

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        owner = self._owner()
        if owner is not None:
            owner._core_state = new_state.name
            # In this order: see `_publish`.
            owner._gate.free = None
            owner._gate.until = _NEVER


class _Storage(pybreaker.CircuitMemoryStorage):
    """pybreaker's in-memory storage, whose `counter` people's dashboards read: the failures now in the window."""

    def __init__(self, owner: CircuitBreaker) -> None:
        super().__init__(pybreaker.STATE_CLOSED)
        self._owner = weakref.ref(owner)
        self._written = pybreaker.STATE_CLOSED

    # pybreaker writes the state only after its listeners have run. One of them may have moved it once more, and is not
    # to be overruled by what was before: what the tap has noted is the last word.

    @property
    def state(self) -> str:
        owner = self._owner()
        return self._written if owner is None else owner._core_state

    @state.setter
    def state(self, state: str) -> None:
        self._written = state

    @property
    def counter(self) -> int:
        owner = self._owner()
        if owner is None:
            return 0
        # Never waits for our lock: pybreaker may ask while it holds its own, which is then waited for under ours.
        if not owner._lock.acquire(blocking=False):
            return owner._window.totals(owner._clock.now()).failures
        try:
            return owner._totals().failures
        finally:
            owner._lock.release()


class _Tally:
    """A count to which any thread may add without a lock: `next` on an `itertools.count` is one step.

    Attributes:
        add: adds one. It is also the token of the calls that may do so.
    """

    __slots__ = ("_reads", "add")

    def __init__(self) -> None:
        self.add: Callable[[], int] = itertools.count().__next__
        self._reads = 0

    def total(self) -> int:
        """How often `add` was called. For one reader at a time: to read takes a number as well."""
        total = self.add() - self._reads
        self._reads += 1
        return total


_Token = Callable[[], int]


class _Gate:
    """What a call reads of its breaker without the lock.

    Attributes:
        free: the token of calls that go through unasked, else `None`.
        until: up to this time calls are rejected unasked.
    """

    __slots__ = ("free", "until")

    def __init__(self) -> None:
        self.free: _Token | None = None
        self.until = _NEVER


# The token of a call whose result says nothing: the breaker is disabled, or would have rejected it.
_UNJUDGED: Final[_Token] = itertools.count().__next__


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerSnapshot:
    """What a circuit breaker knows at one moment. Rates are 0 where the window is empty."""

    name: str
    state: CircuitState
    calls: int
    failures: int
    slow: int
    retry_after: float | None
    shadow: bool

    @property
    def failure_rate(self) -> float:
        return self.failures / self.calls if self.calls else 0.0

    @property
    def slow_rate(self) -> float:
        return self.slow / self.calls if self.calls else 0.0


class Watcher(Protocol):
    """Is told of each breaker, and of each set of per-key breakers, in the thread that makes it, before its first call."""

    def made(self, breaker: Any, /) -> None: ...


_breakers: weakref.WeakSet[CircuitBreaker] = weakref.WeakSet()
_watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()
_breakers_lock = threading.Lock()


def breakers() -> list[CircuitBreaker]:
    """All circuit breakers of this process that are alive: what a scrape reads."""
    with _breakers_lock:
        return list(_breakers)


def watch(watcher: Watcher) -> None:
    """Tell `watcher` of all that is made from now on, for as long as somebody else holds it."""
    with _breakers_lock:
        _watchers.add(watcher)


def announce(breaker: object) -> None:
    """Tell the watchers of what was just made."""
    with _breakers_lock:
        watching = list(_watchers)
    for watcher in watching:
        watcher.made(breaker)


class CircuitBreaker:
    """Reject calls to something that fails too often, for `open_for` seconds; then let `probes` calls decide.

    Threads and event loops may share one. A cancelled call counts as nothing, and a cancelled probe gives its place
    back. Results of calls that began in an earlier period are dropped. It guards coroutine functions, plain functions
    and async generators (judged at their end) as a decorator, and a block of code by `calling()`.

    A call made within another one of the same breaker is a call of its own. In half-open it needs a place of its own
    among the `concurrent_probes` too, so where calls are nested n deep, have at least n of them: with fewer, the outer
    probe gets the rejection of the inner one, which says nothing, and the circuit does not close.

    Args:
        name: what it guards, for events, metrics and errors.
        failure_rate: opens when this share of the calls in the window failed, above 0 up to 1. It is looked at when a
            call has failed or was slow: a success opens nothing, also where it is the call that makes up `min_calls`.
        min_calls: judges only once the window holds so many calls.
        window: how many calls the window holds; 20 where neither this nor `window_for` is given.
        window_for: seconds that the window reaches back, instead of a number of calls.
        slow_after: a call that takes so many seconds is slow, whatever it returns; `None` for no such rule.
        slow_rate: opens when this share of the calls in the window was slow, above 0 up to 1.
        open_for: seconds from opening until the first probe.
        open_backoff: each time that the probes fail, it stays open so many times as long as before. 1 for always the
            same.
        open_at_most: the longest that it stays open, by `open_backoff` or by `Retry-After`; 300 s, or `open_for` if
            that is more, where left out.
        heed_retry_after: whether it stays open for as long as the failure that opens it asks for (`Retry-After`, or the
            `retry_after` of an error), if that is more than `open_for`.
        probes: so many probes must succeed to close it.
        concurrent_probes: so many of them may run at once; all where left out.
        probe_for: seconds that probes may take. Where they have decided nothing by then (one hangs, or whoever made the
            call never ended it), the circuit has been open again since that moment. More than a good call takes.
        half_open_by_timer: become half-open when the time is over, not only when somebody calls. Needs an event loop
            that runs where the breaker opens; without one the next caller does it.
        failed: the rule for what is a failure: given the `Outcome`, `True`, `False`, or `None` for "counts as
            nothing". Where left out, the edge that made the call decides, and without one any `Exception` except
            refusals of policies further inside.
        ignore: exception classes that count as nothing, before any rule is asked.
        shadow: judge and report, but reject nothing: how a breaker is tried out. Can be changed at any time.
        listeners: pybreaker listeners, told of state changes after they have happened.
        clock: where the time comes from.

    Attributes:
        core: the `pybreaker.CircuitBreaker`. Opening or closing it by hand is honoured at the next call. A listener that
            is added to it directly runs under pybreaker's lock: one that asks this breaker may wait for ever where
            another thread moves it. Those given as `listeners` hold nobody up.

    Raises:
        ConfigurationError: a value that cannot work, or values that do not go together.
    """

    def __init__(
        self,
        name: str,
        *,
        failure_rate: float = 0.5,
        min_calls: int = 10,
        window: int | None = None,
        window_for: float | None = None,
        slow_after: float | None = None,
        slow_rate: float = 1.0,
        open_for: float = 15.0,
        open_backoff: float = 1.0,
        open_at_most: float | None = None,
        heed_retry_after: bool = True,
        probes: int = 1,
        concurrent_probes: int | None = None,
        probe_for: float = 60.0,
        half_open_by_timer: bool = False,
        failed: Callable[[Outcome], bool | None] | None = None,
        ignore: type[Exception] | tuple[type[Exception], ...] = (),
        shadow: bool = False,
        listeners: Iterable[pybreaker.CircuitBreakerListener] = (),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not isinstance(cast("object", name), str) or not name:
            raise ConfigurationError(
                f"a circuit breaker begins with the name of what it guards, and {name!r} is none.",
                'CircuitBreaker("prices") is one, and a decorator.',
            )
        _check_share("failure_rate", failure_rate)
        _check_share("slow_rate", slow_rate)
        if window is not None and window_for is not None:
            raise ConfigurationError(
                "window counts calls and window_for counts seconds: a breaker has one window.", "Give one of them."
            )
        if window_for is None:
            window = 20 if window is None else window
            _check_whole("window", "how many calls are judged", window)
            if not (isinstance(min_calls, int) and 1 <= min_calls <= window):
                raise ConfigurationError(
                    f"min_calls is how many calls of the window are needed, so 1 to {window}, not {min_calls!r}."
                )
        else:
            _check_seconds("window_for", "how far back calls are judged", window_for)
            if window_for < _SHORTEST_WINDOW:
                raise ConfigurationError(
                    f"window_for is how far back calls are judged, from {_SHORTEST_WINDOW} s on, not {window_for!r}."
                )
            _check_whole("min_calls", "how many calls of the window are needed", min_calls)
        if slow_after is not None:
            _check_seconds("slow_after", "what a slow call takes at least", slow_after)
        elif slow_rate != 1.0:
            raise ConfigurationError("slow_rate needs slow_after, which says what a slow call is.")
        _check_seconds("open_for", "how long the breaker stays open", open_for)
        if not (isinstance(open_backoff, int | float) and 1 <= open_backoff < math.inf):
            raise ConfigurationError(
                f"open_backoff is how many times as long each further opening lasts, so 1 or above, not {open_backoff!r}."
            )
        if open_at_most is None:
            open_at_most = max(_OPEN_AT_MOST, open_for)
        elif not (isinstance(open_at_most, int | float) and open_for <= open_at_most < math.inf):
            raise ConfigurationError(
                f"open_at_most bounds open_for ({open_for} s), so it is a length of time from that on, "
                f"not {open_at_most!r}."
            )
        _check_whole("probes", "how many calls decide in half-open", probes)
        if concurrent_probes is None:
            concurrent_probes = probes
        elif not (isinstance(concurrent_probes, int) and 1 <= concurrent_probes <= probes):
            raise ConfigurationError(
                f"concurrent_probes is how many of the probes run at once, so 1 to {probes}, not {concurrent_probes!r}."
            )
        if not (isinstance(probe_for, int | float) and probe_for > 0):
            raise ConfigurationError(f"probe_for is how long probes may take, so above 0, not {probe_for!r}.")
        ignored = ignore if isinstance(ignore, tuple) else (ignore,)
        for wanted in ignored:
            if not (isinstance(wanted, type) and issubclass(wanted, Exception)):
                raise ConfigurationError(
                    f"ignore lists exception classes, and {wanted!r} is none.",
                    "Cancellation and exits (BaseException) count as nothing anyway.",
                )
        if failed is not None and not callable(failed):
            raise ConfigurationError(f"failed is a function of the outcome, not {failed!r}.")
        if is_async(failed):
            raise ConfigurationError(
                f"failed is a plain function, and {failed!r} is a coroutine function, which nobody would await."
            )
        # "no" would be true.
        _check_bool("heed_retry_after", heed_retry_after)
        _check_bool("half_open_by_timer", half_open_by_timer)
        _check_bool("shadow", shadow)
        listeners = tuple(listeners) if isinstance(listeners, Iterable) else (listeners,)
        for listener in listeners:
            if not isinstance(listener, pybreaker.CircuitBreakerListener):
                raise ConfigurationError(
                    f"listeners are objects of classes made from pybreaker.CircuitBreakerListener, not {listener!r}.",
                    "meshkit.listen(function, kind=CircuitChanged) takes any function.",
                )
        if not callable(getattr(clock, "now", None)):
            raise ConfigurationError(f"clock is where the time comes from (see meshkit.Clock), not {clock!r}.")
        self.name = name
        self.failure_rate = failure_rate
        self.min_calls = min_calls
        self.slow_after = slow_after
        self.slow_rate = slow_rate
        self.open_for = open_for
        self.open_backoff = open_backoff
        self.open_at_most = open_at_most
        self.heed_retry_after = heed_retry_after
        self.probes = probes
        self.concurrent_probes = concurrent_probes
        self.probe_for = probe_for
        self.half_open_by_timer = half_open_by_timer
        self._window_size = window
        self._window_for = window_for
        self._failed = failed
        self._ignored = ignored
        self._shadow = shadow
        self._listeners = listeners
        self._clock = clock
        # Re-entrant, because what runs under it may come back: a listener that was added to `core` itself, a signal
        # handler, a destructor that the collector calls.
        self._lock = threading.RLock()
        self._window: Window = TimeWindow(window_for) if window_for is not None else CountWindow(cast("int", window))
        self._state: CircuitState = "closed"
        self._mode: Literal["isolated", "disabled"] | None = None
        self._core_state = pybreaker.STATE_CLOSED
        # Successes that need no look at the clock are tallied without the lock, and folded into the window before
        # anything else is added to it. Each period has a tally of its own, so a result of an earlier one goes nowhere.
        self._tallied = window_for is None and slow_after is None and failed is None
        self._period = _Tally()
        self._folded = 0
        self._refusals = _Tally()
        self._counts = {"success": 0, "failure": 0, "ignored": 0, "rejected": 0, "shadowed": 0}
        self._opens_at = 0.0
        self._length = open_for
        self._grown = open_for
        # From when an opening counts, where that is not the moment at which it is noticed.
        self._since: float | None = None
        self._probed_at = 0.0
        self._probing = 0
        self._passed = 0
        self._timer: Timer | None = None
        # Written under the lock, and taken away by the tap. An object of its own, because attributes of one that has
        # few are found fastest.
        self._gate = _Gate()
        self.core = pybreaker.CircuitBreaker(
            name=name,
            reset_timeout=open_for,
            success_threshold=probes,
            state_storage=_Storage(self),
            listeners=[_Tap(self)],
        )
        with _breakers_lock:
            _breakers.add(self)
        announce(self)

    def __repr__(self) -> str:
        return f"CircuitBreaker({self.name!r}, state={self.state!r})"

    # -- what is known ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> CircuitState:
        """closed, open, half_open, isolated or disabled. Open, with its time over, is half-open: the next call is a
        probe."""
        events: list[CircuitChanged] = []
        with self._lock:
            self._follow(events)
            state = self._seen()
        self._tell(events)
        return state

    @property
    def retry_after(self) -> float | None:
        """Seconds until a probe is let through; 0 where calls are let through; `None` where nobody can say (isolated,
        or probes under way)."""
        events: list[CircuitChanged] = []
        with self._lock:
            self._follow(events)
            wait = self._wait()
        self._tell(events)
        return wait

    @property
    def probing(self) -> int:
        """Probes that are under way, without those whose time is over."""
        with self._lock:
            under_way = self._state == "half_open" and self._clock.now() < self._probed_at + self.probe_for
            return self._probing if under_way else 0

    @property
    def counts(self) -> dict[str, int]:
        """Calls since the breaker was made, by result: success, failure, ignored, rejected; and shadowed: let through
        in shadow mode where they would have been rejected."""
        with self._lock:
            self._fold()
            return {**self._counts, "rejected": self._counts["rejected"] + self._refusals.total()}

    @property
    def shadow(self) -> bool:
        """Whether it judges and reports, but rejects nothing."""
        return self._shadow

    @shadow.setter
    def shadow(self, on: bool) -> None:
        _check_bool("shadow", on)
        with self._lock:
            self._shadow = on
            self._publish()

    def snapshot(self) -> BreakerSnapshot:
        """State and window at one moment."""
        events: list[CircuitChanged] = []
        with self._lock:
            self._follow(events)
            totals = self._totals()
            snapshot = BreakerSnapshot(
                name=self.name,
                state=self._seen(),
                calls=totals.calls,
                failures=totals.failures,
                slow=totals.slow,
                retry_after=self._wait(),
                shadow=self._shadow,
            )
        self._tell(events)
        return snapshot

    def describe(self) -> dict[str, object]:
        return {
            "kind": "circuit_breaker",
            "name": self.name,
            "failure_rate": self.failure_rate,
            "min_calls": self.min_calls,
            "window": self._window_size,
            "window_for": self._window_for,
            "slow_after": self.slow_after,
            "slow_rate": None if self.slow_after is None else self.slow_rate,
            "open_for": self.open_for,
            "open_backoff": self.open_backoff,
            "open_at_most": self.open_at_most,
            "probes": self.probes,
            "concurrent_probes": self.concurrent_probes,
            "probe_for": self.probe_for,
            "shadow": self._shadow,
        }

    # -- by hand ------------------------------------------------------------------------------------------------------

    def force_open(self, seconds: float | None = None) -> None:
        """Reject calls from now on for `seconds` (`open_for` where left out), then probe as usual.

        Raises:
            ConfigurationError: `seconds` is no length of time.
        """
        length = self.open_for if seconds is None else seconds
        _check_seconds("seconds", "how long calls are rejected", length)
        events: list[CircuitChanged] = []
        with self._lock:
            self._leave_mode(events)
            self._length = length
            self._grown = self.open_for
            if self._state == "open":
                self._opens_at = self._clock.now() + length
                self._publish()
                self._arm()
            else:
                self._go("open", events)
        self._tell(events)

    def isolate(self) -> None:
        """Reject every call until `reset`."""
        self._enter_mode("isolated")

    def disable(self) -> None:
        """Let every call through, and judge none, until `reset`."""
        self._enter_mode("disabled")

    def reset(self) -> None:
        """Close, with an empty window, whatever the state is."""
        events: list[CircuitChanged] = []
        with self._lock:
            self._leave_mode(events)
            if self._state != "closed":
                self._go("closed", events)
            else:
                # What is under way began before whatever the reset is for.
                self._renew()
                self._window.clear()
        self._tell(events)

    def _enter_mode(self, mode: Literal["isolated", "disabled"]) -> None:
        events: list[CircuitChanged] = []
        with self._lock:
            self._follow(events)
            if self._mode != mode:
                events.append(CircuitChanged(source=self.name, old=self._mode or self._state, new=mode))
                self._mode = mode
                self._publish()
        self._tell(events)

    def _leave_mode(self, events: list[CircuitChanged]) -> None:
        self._follow(events)
        if self._mode is not None:
            events.append(CircuitChanged(source=self.name, old=self._mode, new=self._state))
            self._mode = None

    # -- around a call ------------------------------------------------------------------------------------------------

    async def run(self, call: Call, call_next: Next[T]) -> T:
        token = self._gate.free
        if token is None:
            token = self._acquire()
        started = self._started()
        if call.late:
            self._record_at_end(token, call, started)
            return await call_next(call)
        try:
            result = await call_next(call)
        except Exception as error:
            self._record(token, Outcome(error=error), call.judge, started, call)
            raise
        except BaseException:
            # Cancelled: by the caller, or by a timeout further out, which the end of the call will tell.
            self._record_at_end(token, call, started)
            raise
        if self._gate.free is token and call.judge is None:
            token()
        else:
            self._record(token, Outcome(result), call.judge, started, call)
        return result

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        token = self._gate.free
        if token is None:
            token = self._acquire()
        started = self._started()
        if call.late:
            self._record_at_end(token, call, started)
            return call_next(call)
        try:
            result = call_next(call)
        except Exception as error:
            self._record(token, Outcome(error=error), call.judge, started, call)
            raise
        except BaseException:
            # Cancelled: by the caller, or by a timeout further out, which the end of the call will tell.
            self._record_at_end(token, call, started)
            raise
        if self._gate.free is token and call.judge is None:
            token()
        else:
            self._record(token, Outcome(result), call.judge, started, call)
        return result

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Guard a function, plain or async, or an async generator function."""
        return Pipeline(self.name, self)(fn)

    def calling(self) -> Calling:
        """Guard a block: `async with breaker.calling():`, or `with` in plain code.

        Raises:
            CircuitOpenError: on entering, where the call is not to be made.
        """
        return Calling(self)

    # Alone around a function it needs no Call. This is the path of every call of a service that is well, so nothing
    # stands here that only a failure would need.

    def around(self, name: str, fn: Callable[..., Awaitable[R]]) -> Callable[..., Coroutine[Any, Any, R]]:
        breaker, gate, now, refused = self, self._gate, self._clock.now, self._refusals.add

        async def guarded(*args: Any, **kwargs: Any) -> R:
            token = gate.free
            if token is None:
                left = gate.until - now()
                if left > 0 and not CircuitRejected.heard and not TRACING.on:
                    refused()
                    raise _make_refusal(CircuitOpenError, breaker.name, left, "open")
                token = breaker._acquire()
                started = breaker._started()
            else:
                started = 0.0
            try:
                result = await fn(*args, **kwargs)
            except BaseException as error:
                breaker._record(token, Outcome(error=error), None, started)
                raise
            if gate.free is token:
                token()
            else:
                breaker._record(token, Outcome(result), None, started)
            return result

        return guarded

    def around_sync(self, name: str, fn: Callable[..., R]) -> Callable[..., R]:
        breaker, gate, now, refused = self, self._gate, self._clock.now, self._refusals.add

        def guarded(*args: Any, **kwargs: Any) -> R:
            token = gate.free
            if token is None:
                left = gate.until - now()
                if left > 0 and not CircuitRejected.heard and not TRACING.on:
                    refused()
                    raise _make_refusal(CircuitOpenError, breaker.name, left, "open")
                token = breaker._acquire()
                started = breaker._started()
            else:
                started = 0.0
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                breaker._record(token, Outcome(error=error), None, started)
                raise
            if inspect.iscoroutine(result):
                # It has not run at all, and whether it will fail nobody knows yet.
                breaker._record(token, _NOTHING, None, started)
                result.close()
                raise ConfigurationError(
                    f"the plain function that circuit breaker {breaker.name!r} guards has returned a coroutine.",
                    "Make it `async def`, so that the breaker sees how it ends.",
                )
            if gate.free is token:
                token()
            else:
                breaker._record(token, Outcome(result), None, started)
            return result

        return guarded

    def _started(self) -> float:
        return 0.0 if self.slow_after is None else self._clock.now()

    def _record_at_end(self, token: _Token, call: Call, started: float) -> None:
        scope, judge = current_scope(), call.judge
        call.on_end(lambda outcome: self._record(token, outcome, judge, started, call, scope))

    def _record(
        self,
        token: _Token,
        outcome: Outcome,
        judge: Judge | None,
        started: float,
        call: Call | None = None,
        scope: Scope | None = None,
    ) -> None:
        """Count what a call came to, and open or close if that is what it says."""
        try:
            failed, after = self._judged(outcome, judge)
        except Exception:
            # A rule that fails says nothing of the call; a probe's place is free again all the same.
            failed, after = None, None
            _log.exception(
                "the rule of circuit %r for what is a failure has failed; the call counts as nothing", self.name
            )
        if failed is False and self._gate.free is token:
            token()
            return
        events: list[CircuitChanged] = []
        opened: float | None = None
        with self._lock:
            self._follow(events)
            self._counts["ignored" if failed is None else "failure" if failed else "success"] += 1
            if token is self._period.add and self._mode is None:
                now = self._clock.now()
                slow = failed is not None and self.slow_after is not None and now - started >= self.slow_after
                if self._state == "half_open":
                    self._probing -= 1
                    if failed or slow:
                        self._reopen(after, events)
                    elif failed is False:
                        self._passed += 1
                        if self._passed >= self.probes:
                            self._go("closed", events)
                elif self._state == "closed" and failed is not None:
                    self._fold()
                    self._window.add(now, failed=failed, slow=slow)
                    if (failed or slow) and self._too_many(self._window.totals(now)):
                        self._length = self._lasting(after)
                        self._go("open", events)
            if failed and self._state == "open" and self._mode is None and not self._shadow:
                opened = self._wait()
        if opened is not None:
            # Whoever tries again or handles this request is to know that what failed here has been shut off, be it by
            # this failure or by one of the same time.
            if call is not None:
                call.opened = opened
            scope = current_scope() if scope is None else scope
            if scope is not None:
                scope.note_opened(opened)
        if events:
            self._tell(events)

    def _judged(self, outcome: Outcome, judge: Judge | None) -> tuple[bool | None, float | None]:
        """Whether it failed, and how long whoever answered asks to be left alone."""
        error = outcome.error
        if error is not None and (not isinstance(error, Exception) or isinstance(error, self._ignored)):
            return None, None
        if outcome is _NOTHING:
            return None, None
        after = None
        if self._failed is not None:
            said = self._failed(outcome)
            failed = None if said is None else bool(said)
            if failed and judge is not None and asked_by(error, self._clock) is None:
                after = judge(outcome).retry_after
        elif isinstance(error, RejectedError | ConfigurationError):
            return None, None
        elif isinstance(error, DeadlineExceededError) and error.seconds == 0:
            # There was no time left to begin with.
            return None, None
        elif judge is not None:
            judgement = judge(outcome)
            failed = None if judgement.breaker == "neutral" else judgement.breaker == "failure"
            after = judgement.retry_after
        else:
            failed = error is not None
        if failed:
            after = asked_by(error, self._clock) if after is None else seconds_asked(after, self._clock)
        return failed, after

    def _acquire(self) -> _Token:
        """Let a call through and return the token that its result is recorded with, or raise."""
        events: list[CircuitChanged] = []
        with self._lock:
            self._follow(events)
            token, refused, retry_after = self._admitted(events)
            if refused is not None:
                self._counts["shadowed" if self._shadow else "rejected"] += 1
            elif self._gate.free is None:
                # The first call of a period, or somebody has opened and closed `core` by hand with nobody looking.
                self._publish()
        if events:
            self._tell(events)
        if refused is None:
            return token
        if CircuitRejected.heard:
            emit(CircuitRejected(source=self.name, retry_after=retry_after, shadow=self._shadow))
        if TRACING.on:
            span = tracer().current()
            if span.recording:
                span.event(
                    "meshkit.circuit_breaker.rejected",
                    {
                        "meshkit.circuit_breaker.name": self.name,
                        "meshkit.circuit_breaker.state": refused,
                        "meshkit.circuit_breaker.shadow": self._shadow,
                    },
                )
        if self._shadow:
            return _UNJUDGED
        raise CircuitOpenError(policy=self.name, retry_after=retry_after, state=refused)

    # -- the state machine: everything below runs under the lock, awaits nothing and calls nobody's code but pybreaker's
    #    public transitions; what happened is told after the lock is released -----------------------------------------

    def _admitted(self, events: list[CircuitChanged]) -> tuple[_Token, CircuitState | None, float | None]:
        """The token of a call; or the state that refuses it, and for how long."""
        if self._mode is not None:
            return _UNJUDGED, "isolated" if self._mode == "isolated" else None, None
        now = self._clock.now()
        if self._state == "open" and now >= self._opens_at:
            self._go("half_open", events)
        if self._state == "open" or (self._state == "half_open" and not self._has_place()):
            return _UNJUDGED, self._state, self._wait()
        if self._state == "half_open":
            self._probing += 1
            self._probed_at = now
        return self._period.add, None, None

    def _has_place(self) -> bool:
        return self._probing < self.concurrent_probes and self._probing + self._passed < self.probes

    def _seen(self) -> CircuitState:
        if self._mode is not None:
            return self._mode
        if self._state == "open" and self._clock.now() >= self._opens_at:
            return "half_open"
        return self._state

    def _wait(self) -> float | None:
        if self._mode is not None:
            return None if self._mode == "isolated" else 0.0
        if self._state == "closed":
            return 0.0
        if self._state == "half_open":
            return 0.0 if self._has_place() else None
        return max(0.0, self._opens_at - self._clock.now())

    def _too_many(self, totals: Totals) -> bool:
        return totals.calls >= self.min_calls and (
            totals.failures / totals.calls >= self.failure_rate or totals.slow / totals.calls >= self.slow_rate
        )

    def _totals(self) -> Totals:
        self._fold()
        return self._window.totals(self._clock.now())

    def _fold(self) -> None:
        """Add to the window what was tallied since the last time."""
        total = self._period.total()
        new, self._folded = total - self._folded, total
        if new:
            self._counts["success"] += new
            self._window.add_successes(self._clock.now(), new)

    def _renew(self) -> None:
        """Begin another period: what is under way now counts no more."""
        # First, so that nobody adds to a tally that has been read for the last time.
        self._gate.free = None
        self._fold()
        self._period = _Tally()
        self._folded = 0
        self._probing = self._passed = 0

    def _lasting(self, after: float | None) -> float:
        if after is None or not self.heed_retry_after:
            return self._grown
        return max(self._grown, min(after, self.open_at_most))

    def _reopen(self, after: float | None, events: list[CircuitChanged], *, since: float | None = None) -> None:
        # Step by step: a power of it may be more than a float holds.
        self._grown = min(self._grown * self.open_backoff, self.open_at_most)
        self._length = self._lasting(after)
        self._since = since
        self._go("open", events)

    def _follow(self, events: list[CircuitChanged]) -> None:
        """Take over what has happened while nobody looked: what somebody did to the pybreaker object by hand, and
        probes whose time is over."""
        state = _STATES[self._core_state]
        if state != self._state:
            self._entered(state, events)
        if self._state == "half_open" and self._mode is None and not self._has_place():
            over = self._probed_at + self.probe_for
            if self._clock.now() >= over:
                self._reopen(None, events, since=over)

    def _go(self, to: CircuitState, events: list[CircuitChanged]) -> None:
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

    def _entered(self, state: CircuitState, events: list[CircuitChanged]) -> None:
        old, self._state = self._state, state
        self._renew()
        totals = self._totals()
        length: float | None = None
        if state == "open":
            now = self._clock.now()
            self._opens_at = (now if self._since is None else self._since) + self._length
            length = max(0.0, self._opens_at - now)
            self._arm()
        elif state == "closed":
            self._window.clear()
            self._grown = self.open_for
        # For whoever opens `core` by hand the next time.
        self._length, self._since = self.open_for, None
        self._publish()
        if self._mode is not None:
            # Isolated or disabled it stays, whatever somebody does to `core`.
            return
        events.append(
            CircuitChanged(
                source=self.name,
                old=old,
                new=state,
                retry_after=length,
                failure_rate=totals.failures / totals.calls if old == "closed" and totals.calls else None,
            )
        )

    def _arm(self) -> None:
        """Have the loop that runs here, if one does, make it half-open in time."""
        if not self.half_open_by_timer:
            return
        if self._timer is not None:
            self._timer.cancel()
        myself = weakref.ref(self)

        def due() -> None:
            breaker = myself()
            if breaker is not None:
                breaker._half_open_if_due()

        # Where no loop runs in this thread, it is left to the next caller.
        with contextlib.suppress(RuntimeError):
            self._timer = self._clock.call_at(self._opens_at, due)

    def _half_open_if_due(self) -> None:
        events: list[CircuitChanged] = []
        with self._lock:
            self._follow(events)
            if self._mode is None and self._state == "open":
                if self._clock.now() >= self._opens_at:
                    self._go("half_open", events)
                else:
                    # Some event loops call a little early: uvloop counts in milliseconds.
                    self._arm()
        self._tell(events)

    def _publish(self) -> None:
        """Say what calls may do without asking."""
        unasked = self._mode is None and self._state == "closed" and self._tallied
        self._gate.free = self._period.add if unasked else None
        self._gate.until = (
            self._opens_at if self._mode is None and self._state == "open" and not self._shadow else _NEVER
        )
        # The tap runs outside of our lock where somebody moves `core` by hand. It notes the state first and then takes
        # both away: either we see the state here, or it takes away what we have just given.
        if _STATES[self._core_state] != self._state:
            self._gate.free = None
            self._gate.until = _NEVER

    def _tell(self, events: list[CircuitChanged]) -> None:
        for event in events:
            emit(event)
            if TRACING.on:
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
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException:
                    # A CancelledError too: nothing here awaits, so it is none of the call's own.
                    _log.warning("a pybreaker listener of %r failed; the call goes on", self.name, exc_info=True)


class Calling:
    """A block that counts as one call of a circuit breaker: what `CircuitBreaker.calling` gives, for one `with` each."""

    __slots__ = ("_breaker", "_entered", "_started", "_token")

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker
        self._token: _Token | None = None
        self._entered = False

    def __enter__(self) -> Self:
        if self._entered:
            raise RuntimeError("calling() is for one block; ask the breaker for another one")
        breaker = self._breaker
        self._token = breaker._gate.free or breaker._acquire()
        self._entered = True
        self._started = breaker._started()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        token, self._token = self._token, None
        if token is None:
            raise RuntimeError("this block of calling() is not entered, or left already")
        self._breaker._record(token, Outcome(error=error), None, self._started)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)


class _Named:
    """A state as pybreaker's listeners expect it: an object with a name."""

    __slots__ = ("name",)

    def __init__(self, state: CircuitState) -> None:
        self.name = state.replace("_", "-")


# What nobody can say anything of.
_NOTHING: Final = Outcome()


def _check_share(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1):
        raise ConfigurationError(f"{name} is a share of calls, above 0 up to 1, not {value!r}.")


def _check_seconds(name: str, what: str, value: float) -> None:
    if not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf):
        raise ConfigurationError(f"{name} is {what}, in seconds above 0, not {value!r}.")


def _check_whole(name: str, what: str, value: int) -> None:
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise ConfigurationError(f"{name} is {what}, so a whole number from 1 on, not {value!r}.")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} is True or False, not {value!r}.")
