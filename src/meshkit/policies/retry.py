"""Trying again: bounded in attempts and time, and only where another attempt can help."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextvars import Token
from dataclasses import dataclass
from types import CoroutineType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast

from meshkit.core.call import (
    ATTEMPT,
    NO_WORK,
    Call,
    Judgement,
    Next,
    NextSync,
    Outcome,
    driven,
    is_async,
    leave_attempt,
    numbered,
)
from meshkit.core.clock import SYSTEM_CLOCK, Clock, check_clock
from meshkit.core.events import RetryBudgetExhausted, RetryEnd, RetryEnded, RetryScheduled, emit, error_type
from meshkit.core.retry_after import asked_by, seconds_asked
from meshkit.core.scope import Scope, close_scope, current_scope, open_scope
from meshkit.core.trace import TRACING, tracer
from meshkit.errors import ConfigurationError, DeadlineExceededError, DeadlineTooCloseError, RejectedError
from meshkit.policies.retry_budget import RetryBudget

if TYPE_CHECKING:
    from tenacity import RetryCallState

T = TypeVar("T")
R = TypeVar("R")

Jitter = Literal["full", "equal", "decorrelated", "none"]

_log = logging.getLogger("meshkit")

# What the other side asks for is stretched by up to this much, so that those it told the same do not come together.
_AFTER_SPREAD: Final = 0.1

# Without a wait between them, attempts would keep everybody else off the event loop: every so many give way.
_GIVE_WAY: Final = 64

_CIRCUIT_OPEN: Final = "MK501"
_UNKNOWN: Final = Judgement()

# Where an error carries what ended its retry: see `retry_end`.
_END: Final = "meshkit_retry_end"


def retry_end(error: BaseException) -> RetryEnd | None:
    """What ended the retry that `error` came out of: one of the reasons of `RetryEnded`.

    `"attempts"` were used up, the `"deadline"` (or `within`) would have passed, the `"budget"` was empty, a `"breaker"`
    was open, or another policy refused (`"rejected"`), the `"server"` said that it has retried enough itself, or the
    error was `"not_retryable"`. Of retries in each other it is the outermost one's.

    Returns:
        `None` for an error that never came out of a retry, or that cannot be written to. It is written on the object: one
        that a library keeps and raises over and over tells of the last retry that it came out of, also where it comes
        from elsewhere this time.
    """
    return cast("RetryEnd | None", getattr(error, _END, None))


def _is_number(value: object, least: float) -> bool:
    """Whether it is a finite number that is not below `least`; bool is one only by descent."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value < math.inf


def _check_asked(what: str, function: Callable[..., Any], given: str) -> None:
    """Refuse a function that cannot be called with the one argument that it will get, where Python can tell."""
    try:
        signature = inspect.signature(function)
    except Exception:
        # It is written in C, or has annotations that cannot be read here.
        return
    try:
        signature.bind(None)
    except TypeError:
        raise ConfigurationError(f"{what} is called with {given} and nothing else, unlike {function!r}.") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits that grow: `first`, then `factor` times as long each, never over `most`, each cut short by chance.

    Full jitter by default: a wait anywhere between 0 and the length above spreads callers that failed together best
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Args:
        first: longest wait before the second attempt, seconds.
        factor: how much longer each further one may be.
        most: no wait is longer, seconds.
        jitter: `"full"`: between 0 and the longest length; `"equal"`: between half of it and all of it;
            `"decorrelated"`: between `first` and three times the wait before, which is AWS's own number, so without
            `factor`; `"none"`: the longest length itself. Or a function that makes the wait from its longest length.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    first: float = 0.1
    factor: float = 2.0
    most: float = 10.0
    jitter: Jitter | Callable[[float], float] = "full"

    def __post_init__(self) -> None:
        if not (_is_number(self.first, 0) and _is_number(self.most, 0)):
            raise ConfigurationError(f"first and most are seconds to wait, not {self.first!r} and {self.most!r}.")
        if not _is_number(self.factor, 1):
            raise ConfigurationError(f"factor makes each wait longer, so it is 1 or above, not {self.factor!r}.")
        if callable(self.jitter):
            _check_asked("jitter", self.jitter, "the longest wait")
        elif self.jitter not in ("full", "equal", "decorrelated", "none"):
            raise ConfigurationError(
                f"jitter is full, equal, decorrelated, none, or a function of the longest wait, not {self.jitter!r}."
            )
        if self.jitter == "decorrelated" and self.factor != 2.0:
            raise ConfigurationError("decorrelated waits grow from the one before.", "Leave factor out.")

    def longest(self, attempt: int) -> float:
        """The longest that the wait after attempt number `attempt` can be."""
        factor = 3.0 if self.jitter == "decorrelated" else float(self.factor)
        try:
            # As floats: whole numbers would grow without end. A decorrelated wait has one before it from the start.
            grown = self.first * factor ** (attempt if self.jitter == "decorrelated" else attempt - 1)
        except OverflowError:
            return self.most if self.first else 0.0
        return min(self.most, grown)

    def total(self, waits: int) -> float:
        """The longest that the first so many waits can take together."""
        if callable(self.jitter):
            # It is the user's own, and held to `most` alone.
            return self.most * waits
        total = 0.0
        for attempt in range(1, waits + 1):
            longest = self.longest(attempt)
            if longest >= self.most or self.factor == 1.0 or not longest:
                return total + longest * (waits - attempt + 1)
            total += longest
        return total

    def wait(self, attempt: int, clock: Clock, previous: float | None = None) -> float:
        """Seconds to wait after attempt number `attempt` has failed.

        Args:
            attempt: 1 for the first.
            clock: where chance comes from.
            previous: what this gave for the attempt before, for decorrelated jitter.
        """
        jitter = self.jitter
        if jitter == "full":
            return self.longest(attempt) * clock.random()
        if jitter == "none":
            return self.longest(attempt)
        if jitter == "equal":
            return self.longest(attempt) * (1 + clock.random()) / 2
        if jitter == "decorrelated":
            up_to = 3 * (self.first if previous is None else previous)
            return min(self.most, self.first + (up_to - self.first) * clock.random())
        delay = jitter(self.longest(attempt))
        # It may come to less than nothing, or to no number.
        return min(self.most, delay) if delay >= 0 else 0.0


class _Unsaid(int):
    """A number that stands for one that nobody has given."""

    __slots__ = ()


_BACKOFF: Final = Backoff()

# What is not worth another attempt without a rule of the user's: what is wrong by construction, what was refused, what ran
# out of the time that a further attempt would need too. A union in its place would be made anew for each failure.
_NOT_RETRYABLE: Final = (ConfigurationError, RejectedError, DeadlineExceededError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Call again after a failure, until it works or something says that it will not.

    What ends it: the attempts, the time (`within`, or the deadline of the request), the budget, an open breaker or
    another refusal (unless `patient`), the other side saying that it has retried enough itself, or an error that is not
    worth another attempt. The last real error is raised as it is, with a note; `meshkit.retry_end(error)` says which of
    these it was. A result that is still not satisfying after the last attempt is returned.

    A breaker inside that opens by an attempt ends it at once, without a wait. Where a later attempt is refused, the
    error or result of the one before is what the call comes to. The refusal itself is raised where nothing came before
    it, and where that was a result which has been disposed of: one with a `discard`, or one that an edge leads.

    Cancellation is never retried, whatever a predicate says: none is asked. Nor is anything else that is no `Exception`.

    The wait is the longer one of `backoff` and what the other side asks for (`Retry-After`, or `retry_after` of the
    error: seconds, a date in HTTP's form, a `datetime` or a `timedelta`) plus up to 10 %. A wait that would pass the
    deadline is not begun: the retry ends at once.

    Args:
        attempts: how often to call at the most, the first one counted.
        on: exception classes that are worth another attempt. Where neither this nor `retry` is given, the edge that
            made the call decides (HTTP has a table), and without one any `Exception` but meshkit's own refusals.
        on_result: a plain function of a result that says whether it is worth another attempt.
        backoff: how long to wait between attempts.
        within: seconds that all attempts and waits may take together: no wait begins that would end later. It holds
            also beside `stop`. The default is a minute, because whoever asked has gone by then (nginx and AWS's load
            balancer wait 60 s for an answer), and with room for one `open_for` of a breaker, which `patient` waits for;
            `None` for no limit. It bounds waits: what bounds an attempt is a Timeout inside.
        retry: a tenacity `retry_*` strategy, sync or async, instead of `on` and `on_result`.
        wait: a tenacity `wait_*` strategy instead of `backoff`.
        stop: a tenacity `stop_*` strategy instead of `attempts`.
        budget: retries that the destination bears; share it between all that call there.
        patient: wait for an open breaker (or another refusal) instead of giving up.
        discard: disposes of a result that `on_result` or `retry` has turned down, or failed to judge: a plain or an async
            function of it.
            What an edge leads, the edge disposes of.
        clock: where time and chance come from.

    Raises:
        ConfigurationError: two ways of saying the same thing, or a value that cannot work.
    """

    attempts: int = _Unsaid(3)
    on: type[Exception] | tuple[type[Exception], ...] | None = None
    on_result: Callable[[Any], bool] | None = None
    backoff: Backoff = _BACKOFF
    within: float | None = 60.0
    retry: Callable[[RetryCallState], Any] | None = None
    wait: Callable[[RetryCallState], Any] | None = None
    stop: Callable[[RetryCallState], Any] | None = None
    budget: RetryBudget | None = None
    patient: bool = False
    discard: Callable[[Any], Any] | None = None
    clock: Clock = SYSTEM_CLOCK

    def __post_init__(self) -> None:
        # A number of attempts that is no number would let the loop run on; bool is one only by descent.
        if not isinstance(cast("object", self.attempts), int) or self.attempts is True or not self.attempts >= 1:
            raise ConfigurationError(
                f"attempts is how often to call, the first one counted, so 1 or above, not {self.attempts!r}."
            )
        if self.within is not None and not (_is_number(self.within, 0) and self.within):
            raise ConfigurationError(
                f"within is how many seconds all attempts may take, so above 0, not {self.within!r}.",
                "None is no limit.",
            )
        if not isinstance(cast("object", self.backoff), Backoff):
            raise ConfigurationError(f"backoff is a Backoff(first=…, most=…), not {self.backoff!r}.")
        if not isinstance(cast("object", self.budget), RetryBudget | None):
            raise ConfigurationError(f'budget is a RetryBudget("prices", …), not {self.budget!r}.')
        if not isinstance(cast("object", self.patient), bool):
            raise ConfigurationError(f"patient is True or False, not {self.patient!r}.")
        check_clock(self.clock)
        self._check_functions()
        self._check_classes()
        if self.retry is not None and (self.on is not None or self.on_result is not None):
            raise ConfigurationError(
                f"{'on' if self.on is not None else 'on_result'} and retry both say which failures to retry.",
                "Give one of them.",
            )
        if self.wait is not None and self.backoff is not _BACKOFF:
            raise ConfigurationError("backoff and wait both say how long to wait.", "Give one of them.")
        if self.stop is not None and not isinstance(self.attempts, _Unsaid):
            raise ConfigurationError(
                "attempts and stop both say how often to call.", "Give one of them: stop_after_attempt(n) | … is both."
            )

    def _check_functions(self) -> None:
        for strategy, what, remedy in (
            (self.retry, "retry", "Write on=OSError, or retry=retry_if_exception_type(OSError)."),
            (self.wait, "wait", "Write backoff=Backoff(first=1.0), or wait=wait_fixed(1.0)."),
            (self.stop, "stop", "Write attempts=3, or stop=stop_after_attempt(3)."),
        ):
            if strategy is None:
                continue
            # A class can be called too, and what it makes is true: stop=stop_after_attempt would stop always.
            if isinstance(strategy, type) or not callable(strategy):
                raise ConfigurationError(
                    f"{what} is an object of tenacity's that is asked after each attempt, not {strategy!r}.", remedy
                )
            _check_asked(what, strategy, "the state of the retry")
        for function, what in ((self.on_result, "on_result"), (self.discard, "discard")):
            if function is None:
                continue
            if not callable(function):
                raise ConfigurationError(f"{what} is a function of the result, not {function!r}.")
            _check_asked(what, function, "the result")
        if is_async(self.on_result):
            raise ConfigurationError(
                "on_result is a plain function: nobody awaits it.", "tenacity.asyncio.retry_if_result awaits its own."
            )

    def _check_classes(self) -> None:
        if self.on == ():
            raise ConfigurationError("on lists exception classes, and () has none.", "attempts=1 retries nothing.")
        for wanted in self._classes:
            if not (isinstance(wanted, type) and issubclass(wanted, Exception)):
                raise ConfigurationError(
                    f"on lists exception classes, and {wanted!r} is none.",
                    "Cancellation and exits (BaseException) are never retried.",
                )
            if issubclass(wanted, RejectedError) and not self.patient:
                raise ConfigurationError(
                    f"on lists {wanted.__name__}, with which a policy refuses to start a call.",
                    "Say patient=True to wait for that.",
                )

    @property
    def _classes(self) -> tuple[type[Exception], ...]:
        return self.on if isinstance(self.on, tuple) else () if self.on is None else (self.on,)

    def describe(self) -> dict[str, object]:
        backoff = self.backoff
        foreign, attempts = self.wait is not None, self._bound
        return {
            "kind": "retry",
            "attempts": attempts,
            "seconds": self.within,
            # What the other side asks for with `Retry-After` comes on top.
            "waits": None if foreign or attempts is None or attempts == math.inf else backoff.total(int(attempts) - 1),
            "jitter": None if foreign else backoff.jitter != "none",
            "budget": self.budget is not None,
            "patient": self.patient,
            "on": None if self.on is None else [wanted.__name__ for wanted in self._classes],
            # Which setting says what is tried again; without one, the edge that leads the call does.
            "rule": next((rule for rule in ("retry", "on_result", "on") if getattr(self, rule) is not None), None),
        }

    @property
    def _bound(self) -> float | None:
        """How many attempts there are at the most; `None` where only a strategy of the user's knows."""
        if self.stop is None:
            return int(self.attempts)
        if type(self.stop).__name__ == "_stop_never":
            return math.inf
        # What tenacity.stop_after_attempt keeps; others have no such thing.
        most = getattr(self.stop, "max_attempt_number", None)
        return max(1, most) if isinstance(most, int) else None

    # -- around a call ------------------------------------------------------------------------------------------------
    #
    # The first attempt runs bare: nothing is made for it that only a failure would need.

    async def run(self, call: Call, call_next: Next[T]) -> T:
        started = self.clock.now()
        if self.budget is not None:
            self.budget.deposit()
        mark = call.mark()
        try:
            result = await call_next(call)
        except Exception as error:
            outcome = Outcome(error=error)
        else:
            try:
                if self._satisfied(call, result):
                    return result
            except Exception:
                # Nobody gets a result that could not be judged.
                await self._dispose(call, Outcome(result))
                raise
            outcome = Outcome(result)
        try:
            return await self._go_on(call, call_next, outcome, started, mark)
        finally:
            # An error holds its traceback, and that this frame, which holds the error.
            del outcome

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        started = self.clock.now()
        if self.budget is not None:
            self.budget.deposit()
        mark = call.mark()
        try:
            result = call_next(call)
        except Exception as error:
            outcome = Outcome(error=error)
        else:
            try:
                if self._satisfied(call, result):
                    return result
            except Exception:
                self._dispose_sync(call, Outcome(result))
                raise
            outcome = Outcome(result)
        try:
            return self._go_on_sync(call, call_next, outcome, started, mark)
        finally:
            del outcome

    # -- alone around a function --------------------------------------------------------------------------------------
    #
    # No Call and no Scope before something has failed; from then on there are both, as a Pipeline would have made them.

    def around(self, name: str, fn: Callable[..., Awaitable[R]]) -> Callable[..., Coroutine[Any, Any, R]]:
        """A coroutine function that calls `fn` as a Pipeline of this policy alone would."""
        clock, budget, attempt = self.clock, self.budget, ATTEMPT.get
        judged = self.retry is not None or self.on_result is not None

        async def retried(*args: Any, **kwargs: Any) -> R:
            started = clock.now()
            if budget is not None:
                budget.deposit()
            try:
                # Inside a later attempt of somebody else's, this one is still our first.
                result = await (fn(*args, **kwargs) if attempt() == 1 else numbered(1, fn, *args, **kwargs))
            except Exception as error:
                outcome = Outcome(error=error)
            else:
                try:
                    if not judged or self._satisfied(None, result):
                        return result
                except Exception:
                    await self._dispose(Call(name), Outcome(result))
                    raise
                outcome = Outcome(result)
            call = Call(name, 1, None, None, False, None, (fn, args, kwargs))
            opened = None if current_scope() is not None else open_scope(Scope())
            try:
                return await self._go_on(call, _work, outcome, started, 0)
            finally:
                del outcome
                if opened is not None:
                    close_scope(opened)

        return retried

    def around_sync(self, name: str, fn: Callable[..., R]) -> Callable[..., R]:
        """As `around`, for a plain function."""
        clock, budget, attempt = self.clock, self.budget, ATTEMPT.get
        judged = self.retry is not None or self.on_result is not None

        def retried(*args: Any, **kwargs: Any) -> R:
            started = clock.now()
            if budget is not None:
                budget.deposit()
            try:
                result = fn(*args, **kwargs) if attempt() == 1 else _numbered_sync(1, fn, args, kwargs)
            except Exception as error:
                outcome = Outcome(error=error)
            else:
                if type(result) is CoroutineType:
                    raise _unawaited(name, cast("CoroutineType[Any, Any, Any]", result))
                try:
                    if not judged or self._satisfied(None, result):
                        return result
                except Exception:
                    self._dispose_sync(Call(name), Outcome(result))
                    raise
                outcome = Outcome(result)
            call = Call(name, 1, None, None, False, None, (fn, args, kwargs))
            opened = None if current_scope() is not None else open_scope(Scope())
            try:
                return cast("R", self._go_on_sync(call, _work_sync, outcome, started, 0))
            finally:
                del outcome
                if opened is not None:
                    close_scope(opened)

        return retried

    # -- around a block -----------------------------------------------------------------------------------------------

    def context(self, name: str) -> RetryContext:
        """Attempts at a block of code, for what is no function of its own.

        ```python
        async for attempt in retry.context("prices"):
            with attempt:
                price = await fetch()
        ```

        Also with a plain `for`, which holds the thread during waits. What is to be retried stands inside the `with`.
        What the block comes to cannot be seen from outside: `attempt.set_result(price)` shows it to `on_result` and to
        tenacity's predicates. The loop may be left early. The object may be kept: each loop over it is a call of its
        own.

        Args:
            name: what is called, for events, metrics and errors.
        """
        return RetryContext(self, name)

    # -- after the first attempt --------------------------------------------------------------------------------------

    def _satisfied(self, call: Call | None, result: object) -> bool:
        """Whether a result is beyond doubt; if not, `_Run` decides."""
        if self.retry is not None:
            return False
        if self.on_result is not None:
            return not self.on_result(result)
        return self.on is not None or call is None or call.judge is None or not call.judge(Outcome(result)).retry

    async def _dispose(self, attempt: Call, outcome: Outcome) -> None:
        """Dispose of a result that nobody will get."""
        if attempt.discard is not None or self.discard is None:
            await attempt.dispose(outcome)
            return
        try:
            done = self.discard(outcome.result)
            if inspect.isawaitable(done):
                await done
        except Exception:
            _log.warning("a discarded result of call %r could not be disposed of", attempt.name, exc_info=True)

    def _dispose_sync(self, attempt: Call, outcome: Outcome) -> None:
        """As `_dispose`, for a plain function."""
        driven(self._dispose(attempt, outcome), "a result that has to be waited for when it is disposed of")

    async def _go_on(self, call: Call, call_next: Next[T], outcome: Outcome, started: float, mark: int) -> T:
        keeps = self.discard is None and call.discard is None
        run = _Run(self, call, started, turned_down=outcome.error is None, keeps=keeps)
        current = call
        try:
            while True:
                if outcome.error is not None and current.ends:
                    # It is over. A breaker that judges at the end opens now, so that nobody waits for it.
                    current.end(outcome, since=mark if current is call else 0)
                try:
                    delay = run.decide(current, outcome) if run.own else await run.ask(current, outcome)
                except (Exception, asyncio.CancelledError) as error:
                    # A strategy has failed, or was cancelled while it thought: nobody gets what it was to judge.
                    if isinstance(error, Exception):
                        run.failed_to_decide(error, outcome)
                    if outcome.error is None:
                        await self._dispose(current, outcome)
                    raise
                if delay is None:
                    outcome = run.last(outcome)
                    if outcome.error is None:
                        return cast("T", outcome.result)
                    run.note(outcome.error)
                    raise outcome.error
                try:
                    if outcome.error is None:
                        try:
                            await self._dispose(current, outcome)
                        finally:
                            current.end(outcome, since=mark if current is call else 0)
                    # Where a breaker has opened by a result, only at its end, the next attempt is refused at once.
                    if delay > 0 and (current.opened is None or self.patient):
                        await self.clock.sleep(delay)
                    elif run.attempts % _GIVE_WAY == 0:
                        await self.clock.sleep(0)
                except BaseException:
                    run.not_made()
                    raise
                current = current.again()
                call.opened = None
                try:
                    outcome = Outcome(await call_next(current))
                except Exception as error:
                    outcome = Outcome(error=error)
        finally:
            # However this is left (the last attempt, a cancellation, a strategy that raises), what the attempt holds is
            # let go of at the end of the call, and by then it is known what that came to.
            if current is not call and (current.late or current.ends):
                call.on_end(current.end)
            del outcome, run

    def _go_on_sync(self, call: Call, call_next: NextSync[T], outcome: Outcome, started: float, mark: int) -> T:
        keeps = self.discard is None and call.discard is None
        run = _Run(self, call, started, turned_down=outcome.error is None, keeps=keeps)
        current = call
        try:
            while True:
                if outcome.error is not None and current.ends:
                    current.end(outcome, since=mark if current is call else 0)
                try:
                    delay = (
                        run.decide(current, outcome)
                        if run.own
                        else driven(run.ask(current, outcome), "an async tenacity strategy")
                    )
                except Exception as error:
                    run.failed_to_decide(error, outcome)
                    if outcome.error is None:
                        self._dispose_sync(current, outcome)
                    raise
                if delay is None:
                    outcome = run.last(outcome)
                    if outcome.error is None:
                        return cast("T", outcome.result)
                    run.note(outcome.error)
                    raise outcome.error
                try:
                    if outcome.error is None:
                        try:
                            self._dispose_sync(current, outcome)
                        finally:
                            current.end(outcome, since=mark if current is call else 0)
                    if delay > 0 and (current.opened is None or self.patient):
                        self.clock.block(delay)
                except BaseException:
                    run.not_made()
                    raise
                current = current.again()
                call.opened = None
                try:
                    outcome = Outcome(call_next(current))
                except Exception as error:
                    outcome = Outcome(error=error)
        finally:
            if current is not call and (current.late or current.ends):
                call.on_end(current.end)
            del outcome, run


class _Run:
    """What is remembered between the attempts of one call: made only once something has failed.

    Args:
        turned_down: whether `on_result` has said no to the first attempt's result: a predicate is asked once.
        keeps: whether a result that was turned down can still be returned: nobody disposes of it.

    Attributes:
        attempts: how many there were, refused ones too.
        own: whether all decisions are our own; else tenacity's strategies are to be asked.
    """

    __slots__ = (
        "_call",
        "_keeps",
        "_kept",
        "_previous",
        "_reason",
        "_refused",
        "_refused_by",
        "_retry",
        "_started",
        "_state",
        "_turned_down",
        "_withdrawn",
        "attempts",
        "own",
    )

    def __init__(
        self, retry: Retry, call: Call, started: float, *, turned_down: bool = False, keeps: bool = False
    ) -> None:
        self._retry = retry
        self._call = call
        self._started = started
        self._previous: float | None = None
        # Known at the end.
        self._reason: RetryEnd
        self._state: RetryCallState | None = None
        self._turned_down = turned_down
        # Whether the attempt that is waited for was taken out of the budget.
        self._withdrawn: bool
        self._keeps = keeps
        # What the last attempt that was not refused came to, while another one is made.
        self._kept: tuple[Outcome, Judgement] | None = None
        self._refused = 0
        self._refused_by: str | None = None
        self.attempts = 0
        self.own = retry.retry is None and retry.wait is None and retry.stop is None

    # Seconds to wait before the next attempt, `None` where there is to be none: by our own rules, or with tenacity's in
    # their place. tenacity's order: the wait is known before the stop is asked, so that a stop can look at it.

    def decide(self, attempt: Call, outcome: Outcome) -> float | None:
        self.attempts += 1
        judgement = _UNKNOWN if attempt.judge is None else attempt.judge(outcome)
        reason = self._against(outcome, judgement)
        if reason is None and self.attempts >= self._retry.attempts:
            reason = "attempts"
        if reason is not None:
            return self._over(reason, attempt, outcome, judgement)
        delay, from_server = self._at_least(self._backoff(), attempt, outcome, judgement)
        return self._scheduled(delay, from_server, attempt, outcome, judgement)

    async def ask(self, attempt: Call, outcome: Outcome) -> float | None:
        retry = self._retry
        self.attempts += 1
        judgement = _UNKNOWN if attempt.judge is None else attempt.judge(outcome)
        state = self._told(outcome)
        wanted = False if retry.retry is None or isinstance(outcome.error, RejectedError) else retry.retry(state)
        reason = self._against(outcome, judgement, asked=bool(await wanted if inspect.isawaitable(wanted) else wanted))
        if reason is not None:
            return self._over(reason, attempt, outcome, judgement)
        if retry.wait is None:
            delay = self._backoff()
        else:
            wait = retry.wait(state)
            delay = float(await wait if inspect.isawaitable(wait) else wait)
        delay, from_server = self._at_least(delay, attempt, outcome, judgement)
        state.upcoming_sleep = delay
        if retry.stop is None:
            stopped = self.attempts >= retry.attempts
        else:
            stop = retry.stop(state)
            stopped = bool(await stop if inspect.isawaitable(stop) else stop)
        if stopped:
            return self._over("attempts", attempt, outcome, judgement)
        # How long it has waited, as tenacity counts it: with the wait that is to come.
        state.idle_for += delay
        return self._scheduled(delay, from_server, attempt, outcome, judgement)

    def failed_to_decide(self, error: Exception, outcome: Outcome) -> None:
        """A strategy of the user's has failed: what the call itself came to is not to be lost for that."""
        if error is not outcome.error and error.__context__ is None:
            error.__context__ = outcome.error

    def last(self, outcome: Outcome) -> Outcome:
        """What the call comes to: where the last attempt was refused, what the one before it came to, if it is still
        to be had. It is asked once, after the end was decided."""
        kept, self._kept = self._kept, None
        return outcome if kept is None or not isinstance(outcome.error, RejectedError) else kept[0]

    def note(self, error: BaseException) -> None:
        """Write on the error that comes out what ended it."""
        # Some errors cannot be written to.
        with contextlib.suppress(Exception):
            setattr(error, _END, self._reason)
        if self.attempts > 1 or (self._reason == "breaker" and not isinstance(error, RejectedError)):
            made = self._made
            note = (
                f"meshkit: gave up on {self._call.name!r} after {made} attempt{'' if made == 1 else 's'}, "
                f"ended by {self._reason}"
            )
            if self._refused_by is not None:
                note += f": {self._refused_by} refused the next one"
            # Some libraries raise one and the same object over and over.
            if note not in getattr(error, "__notes__", ()):
                with contextlib.suppress(Exception):
                    error.add_note(note)

    @property
    def _made(self) -> int:
        """Attempts that were not refused; all of them, if all were."""
        return self.attempts - self._refused or self.attempts

    def not_made(self) -> None:
        """The attempt that was decided on will not be made: it costs the budget nothing."""
        if self._withdrawn and self._retry.budget is not None:
            self._retry.budget.give_back()

    def _against(self, outcome: Outcome, judgement: Judgement, *, asked: bool = False) -> RetryEnd | None:
        """What speaks against another attempt, `None` if nothing does. `asked` is what tenacity's predicate said."""
        retry, error = self._retry, outcome.error
        if isinstance(error, RejectedError):
            self._refused += 1
            if isinstance(error, DeadlineTooCloseError):
                return "deadline"
            return None if retry.patient else "breaker" if error.code == _CIRCUIT_OPEN else "rejected"
        if retry.retry is not None:
            wanted = asked
        elif error is None and retry.on_result is not None:
            wanted = (self._turned_down and self.attempts == 1) or bool(retry.on_result(outcome.result))
        elif retry.on is not None:
            wanted = error is not None and isinstance(error, retry.on)
        elif self._call.judge is not None:
            wanted = judgement.retry
        else:
            wanted = error is not None and not isinstance(error, _NOT_RETRYABLE)
        if not wanted:
            return "not_retryable"
        return "server" if judgement.exhausted else None

    def _backoff(self) -> float:
        self._previous = self._retry.backoff.wait(self.attempts, self._retry.clock, self._previous)
        return self._previous

    def _at_least(self, delay: float, attempt: Call, outcome: Outcome, judgement: Judgement) -> tuple[float, bool]:
        """The wait, with what the other side or an open breaker asks for; and whether it was the other side."""
        if not delay >= 0:
            # A strategy of the user's may come to less than nothing, or to no number.
            delay = 0.0
        error, clock = outcome.error, self._retry.clock
        after = judgement.retry_after
        asked = (asked_by(error, clock) if after is None else seconds_asked(after, clock)) or 0.0
        if not asked and not attempt.opened:
            return delay, False
        seconds = max(asked, attempt.opened or 0.0)
        by_server = asked > 0 and not isinstance(error, RejectedError)
        return max(delay, seconds * (1 + _AFTER_SPREAD * clock.random())), by_server

    def _scheduled(
        self, delay: float, from_server: bool, attempt: Call, outcome: Outcome, judgement: Judgement
    ) -> float | None:
        """The wait, if breaker, time and budget allow it; then it is told."""
        retry = self._retry
        if attempt.opened is not None and not retry.patient:
            return self._over("breaker", attempt, outcome, judgement)
        scope = current_scope()
        ends = retry.clock.now() + delay
        if (
            ends == math.inf
            or (retry.within is not None and ends >= self._started + retry.within)
            or (scope is not None and scope.deadline is not None and ends >= scope.deadline)
        ):
            return self._over("deadline", attempt, outcome, judgement)
        # After a refusal nothing was sent, so another attempt puts nothing on top.
        self._withdrawn = False
        if retry.budget is not None and not isinstance(outcome.error, RejectedError):
            self._withdrawn = retry.budget.withdraw()
            if not self._withdrawn:
                emit(RetryBudgetExhausted(source=retry.budget.name or self._call.name, kind="retry"))
                return self._over("budget", attempt, outcome, judgement)
        if not isinstance(outcome.error, RejectedError):
            self._kept = (outcome, judgement) if self._keeps or outcome.error is not None else None
        if RetryScheduled.heard:
            emit(
                RetryScheduled(
                    source=self._call.name,
                    attempt=self.attempts,
                    delay=delay,
                    error_type=_type_of(outcome, judgement),
                    from_server=from_server,
                )
            )
        if TRACING.on:
            span = tracer().current()
            if span.recording:
                span.event(
                    "meshkit.retry",
                    {
                        "meshkit.retry.delay": delay,
                        "meshkit.retry.reason": _type_of(outcome, judgement),
                        "meshkit.attempt": self.attempts,
                        "meshkit.retry.after_header": from_server,
                    },
                )
        return delay

    def _over(self, reason: RetryEnd, attempt: Call, outcome: Outcome, judgement: Judgement) -> float | None:
        """Remember what ended it; there is no delay any more."""
        self._reason = reason
        scope, opened, refusal = current_scope(), attempt.opened, outcome.error
        if isinstance(refusal, RejectedError) and self._kept is not None:
            # What comes out says nothing of the refusal, so whoever handles the request or message learns of it here.
            outcome, judgement = self._kept
            self._refused_by = repr(refusal.policy) if refusal.policy else "a policy"
            after = refusal.retry_after
            if refusal.code == _CIRCUIT_OPEN:
                # Isolated, or with its probes under way, it cannot say when.
                opened = after = 0.0 if after is None else after
            if scope is not None and after is not None:
                scope.note_opened(after)
        if opened is not None:
            # For a Retry around this one.
            self._call.opened = opened
        if scope is not None and self._exhausts(reason, outcome):
            scope.mark_exhausted()
        # A result that satisfies is the end of a call, and of nothing else.
        if RetryEnded.heard and (outcome.error is not None or judgement.error_type or reason != "not_retryable"):
            emit(
                RetryEnded(
                    source=self._call.name,
                    attempts=self._made,
                    reason=reason,
                    error_type=_type_of(outcome, judgement),
                )
            )
        return None

    def _exhausts(self, reason: RetryEnd, outcome: Outcome) -> bool:
        """Whether trying again further up would only multiply the attempts."""
        if reason == "attempts":
            # A single one, as was asked for, has used nothing up.
            return self.attempts > 1
        if reason in ("breaker", "rejected"):
            # A refusal says so itself.
            return not isinstance(outcome.error, RejectedError)
        return reason != "not_retryable"

    def _told(self, outcome: Outcome) -> RetryCallState:
        """The state that tenacity's strategies are asked with."""
        import tenacity

        if self._state is None:
            work = self._call.work
            fn, args, kwargs = (None, (), {}) if work is NO_WORK else work
            self._state = tenacity.RetryCallState(tenacity.Retrying(), fn, args, kwargs)
            self._state.start_time = self._started
        state = self._state
        state.attempt_number = self.attempts
        if outcome.error is None:
            state.set_result(outcome.result)
        else:
            state.set_exception((type(outcome.error), outcome.error, outcome.error.__traceback__))
        # Its own clock is time.monotonic, ours may be a test's.
        state.outcome_timestamp = self._retry.clock.now()
        return state


# -- around a block ---------------------------------------------------------------------------------------------------


class Attempt:
    """One attempt at a block of code: `with attempt:` around it.

    Attributes:
        number: 1 for the first.
    """

    __slots__ = ("_entered", "_opened", "_outcome", "_token", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self._entered = False
        self._outcome: Outcome | None = None
        self._opened: Token[Scope | None] | None = None
        self._token: Token[int] | None = None

    def __repr__(self) -> str:
        return f"<attempt {self.number}>"

    def set_result(self, result: object) -> None:
        """Say what the block came to, for `on_result` and tenacity's predicates to judge."""
        self._outcome = Outcome(result)

    def __enter__(self) -> Attempt:
        self._entered = True
        self._opened = None if current_scope() is not None else open_scope(Scope())
        self._token = ATTEMPT.set(self.number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if self._token is not None:
            leave_attempt(self._token)
        if self._opened is not None:
            close_scope(self._opened)
        if error is None:
            return False
        # What ends a loop would end ours too, if it came from there: it goes out from here. So do cancellation and exits.
        if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
            self._outcome = Outcome(error=error)
            return True
        self._outcome = None
        return False

    def _taken(self) -> Outcome | None:
        """What this attempt came to, once; `None` where there is nothing to judge."""
        if not self._entered:
            raise ConfigurationError(
                "an attempt has not been made: what its loop holds would not be tried again.",
                "Write `with attempt:` in the loop, around what is to be retried.",
            )
        outcome, self._outcome = self._outcome, None
        return outcome


class RetryContext:
    """What `Retry.context` returns: each loop over it is a call."""

    __slots__ = ("_name", "_retry")

    def __init__(self, retry: Retry, name: str) -> None:
        self._retry = retry
        self._name = name

    def __repr__(self) -> str:
        return f"<retry of {self._name!r}>"

    def __aiter__(self) -> AsyncIterator[Attempt]:
        return _Attempts(self._retry, self._name)

    def __iter__(self) -> Iterator[Attempt]:
        return _Attempts(self._retry, self._name)


class _Attempts:
    """One loop. It holds nothing that would have to be given back where the loop is left early."""

    __slots__ = ("_attempt", "_call", "_retry", "_run", "_started")

    def __init__(self, retry: Retry, name: str) -> None:
        self._retry = retry
        self._call = Call(name, late=False)
        self._attempt: Attempt | None = None
        self._run: _Run | None = None
        self._started = 0.0

    def __aiter__(self) -> _Attempts:
        return self

    def __iter__(self) -> _Attempts:
        return self

    async def __anext__(self) -> Attempt:
        if self._attempt is None:
            return self._first()
        outcome, clock = self._attempt._taken(), self._retry.clock
        if outcome is None:
            raise StopAsyncIteration
        run = self._run = self._run or _Run(self._retry, self._call, self._started)
        try:
            try:
                delay = run.decide(self._call, outcome) if run.own else await run.ask(self._call, outcome)
            except Exception as error:
                run.failed_to_decide(error, outcome)
                raise
            if delay is None:
                outcome = run.last(outcome)
                if outcome.error is None:
                    raise StopAsyncIteration
                run.note(outcome.error)
                raise outcome.error
            try:
                if delay > 0:
                    await clock.sleep(delay)
                elif run.attempts % _GIVE_WAY == 0:
                    await clock.sleep(0)
            except BaseException:
                run.not_made()
                raise
        finally:
            del outcome
        return self._next()

    def __next__(self) -> Attempt:
        if self._attempt is None:
            return self._first()
        outcome = self._attempt._taken()
        if outcome is None:
            raise StopIteration
        run = self._run = self._run or _Run(self._retry, self._call, self._started)
        try:
            try:
                delay = (
                    run.decide(self._call, outcome)
                    if run.own
                    else driven(run.ask(self._call, outcome), "an async tenacity strategy")
                )
            except Exception as error:
                run.failed_to_decide(error, outcome)
                raise
            if delay is None:
                outcome = run.last(outcome)
                if outcome.error is None:
                    raise StopIteration
                run.note(outcome.error)
                raise outcome.error
            try:
                if delay > 0:
                    self._retry.clock.block(delay)
            except BaseException:
                run.not_made()
                raise
        finally:
            del outcome
        return self._next()

    def _first(self) -> Attempt:
        self._started = self._retry.clock.now()
        if self._retry.budget is not None:
            self._retry.budget.deposit()
        self._attempt = Attempt(1)
        return self._attempt

    def _next(self) -> Attempt:
        assert self._attempt is not None
        self._attempt = Attempt(self._attempt.number + 1)
        return self._attempt


# -- the innermost step of a retry that is alone around a function ----------------------------------------------------


def _work(call: Call) -> Awaitable[Any]:
    fn, args, kwargs = call.work
    return numbered(call.attempt, fn, *args, **kwargs)


def _work_sync(call: Call) -> Any:
    fn, args, kwargs = call.work
    result = _numbered_sync(call.attempt, fn, args, kwargs)
    if type(result) is CoroutineType:
        raise _unawaited(call.name, result)
    return result


def _numbered_sync(attempt: int, fn: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
    token = ATTEMPT.set(attempt)
    try:
        return fn(*args, **kwargs)
    finally:
        ATTEMPT.reset(token)


def _unawaited(name: str, result: CoroutineType[Any, Any, Any]) -> ConfigurationError:
    # It has not run at all: nobody is to count that as a success.
    result.close()
    return ConfigurationError(
        f"the plain function that pipeline {name!r} calls has returned a coroutine.",
        "Make it `async def`, so that the pipeline awaits it.",
    )


# -- reading what an attempt came to ----------------------------------------------------------------------------------


def _type_of(outcome: Outcome, judgement: Judgement) -> str:
    """One word for why there is another attempt, or none: the edge's, the error's, or that it was the result."""
    return judgement.error_type or ("result" if outcome.error is None else error_type(outcome.error))
