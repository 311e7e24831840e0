"""Trying again: bounded in attempts and time, and only where another attempt can help."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from meshkit.core.call import Call, Judgement, Next, NextSync, Outcome, driven
from meshkit.core.clock import SYSTEM_CLOCK, Clock
from meshkit.core.events import RetryEnd, RetryEnded, RetryScheduled, emit, error_type
from meshkit.core.scope import current_scope
from meshkit.core.trace import tracer
from meshkit.errors import ConfigurationError, DeadlineExceededError, RejectedError

if TYPE_CHECKING:
    from tenacity import RetryCallState

T = TypeVar("T")

# What the other side asks for is stretched by up to this much, so that those it told the same do not come together.
_AFTER_SPREAD = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits that grow: `first`, then `factor` times as long each, never over `most`, each cut short by chance.

    Full jitter by default: a wait anywhere between 0 and the length above spreads callers that failed together best
    (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/).

    Args:
        first: longest wait before the second attempt, seconds.
        factor: how much longer each further one may be.
        most: no wait is longer, seconds.
        jitter: makes the wait from its longest length; `None` for full jitter.
    """

    first: float = 0.1
    factor: float = 2.0
    most: float = 10.0
    jitter: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.first < math.inf and 0 <= self.most < math.inf):
            raise ConfigurationError(f"first and most are seconds to wait, not {self.first} and {self.most}.")
        if not 1 <= self.factor < math.inf:
            raise ConfigurationError(f"factor makes each wait longer, so it is 1 or above, not {self.factor}.")

    def wait(self, attempt: int, clock: Clock) -> float:
        """Seconds to wait after attempt number `attempt` has failed."""
        try:
            # As floats: whole numbers would grow without end.
            longest = min(self.most, self.first * float(self.factor) ** (attempt - 1))
        except OverflowError:
            longest = self.most if self.first else 0.0
        return self.jitter(longest) if self.jitter is not None else longest * clock.random()


def _retryable(error: BaseException) -> bool:
    """Whether an error without a rule of the user's is worth another attempt: not what is wrong by construction,
    not what was refused, not what ran out of the time that a further attempt would need too."""
    return isinstance(error, Exception) and not isinstance(
        error, ConfigurationError | RejectedError | DeadlineExceededError
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Call again after a failure, until it works or something says that it will not.

    What ends it: the attempts, the deadline of the request, an open breaker (unless `patient`), the other side saying
    that it has retried enough itself, or an error that is not worth another attempt. Cancellation is never retried.
    The last real error is raised as it is, with a note.

    Args:
        attempts: how often to call at the most, the first one counted.
        on: exception classes that are worth another attempt. Where neither this nor `retry` is given, the edge that
            made the call decides (HTTP has a table), and without one any `Exception` but meshkit's own refusals.
        backoff: how long to wait between attempts.
        within: seconds that all attempts and waits may take together: no wait begins that would end later.
        retry: a tenacity `retry_*` strategy, sync or async, instead of `on`.
        wait: a tenacity `wait_*` strategy instead of `backoff`.
        stop: a tenacity `stop_*` strategy instead of `attempts`.
        patient: wait for an open breaker instead of giving up.
        clock: where time and chance come from.

    Raises:
        ConfigurationError: two ways of saying the same thing, or a value that cannot work.
    """

    attempts: int = 3
    on: type[Exception] | tuple[type[Exception], ...] | None = None
    backoff: Backoff = Backoff()
    within: float | None = None
    retry: Callable[[RetryCallState], Any] | None = None
    wait: Callable[[RetryCallState], Any] | None = None
    stop: Callable[[RetryCallState], Any] | None = None
    patient: bool = False
    clock: Clock = SYSTEM_CLOCK

    def __post_init__(self) -> None:
        if not self.attempts >= 1:
            raise ConfigurationError(
                f"attempts is how often to call, the first one counted, so 1 or above, not {self.attempts}."
            )
        if self.within is not None and not self.within > 0:
            raise ConfigurationError(f"within is how long all attempts may take, so above 0, not {self.within}.")
        if self.on is not None and self.retry is not None:
            raise ConfigurationError("on and retry both say which failures to retry.", "Give one of them.")
        classes = self.on if isinstance(self.on, tuple) else () if self.on is None else (self.on,)
        for wanted in classes:
            if not (isinstance(wanted, type) and issubclass(wanted, Exception)):
                raise ConfigurationError(
                    f"on lists exception classes, and {wanted!r} is none.",
                    "Cancellation and exits (BaseException) are never retried.",
                )

    def describe(self) -> dict[str, object]:
        return {"kind": "retry", "attempts": None if self.stop else self.attempts, "seconds": self.within}

    # The first attempt runs bare: nothing is made for it that only a failure would need.

    async def run(self, call: Call, call_next: Next[T]) -> T:
        started = self.clock.now()
        mark = call.mark()
        try:
            result = await call_next(call)
        except Exception as error:
            outcome = Outcome(error=error)
        else:
            if not self._unsatisfied(call, result):
                return result
            outcome = Outcome(result)
        run = _Run(self, call, started)
        current = call
        try:
            while True:
                delay = await run.delay_after(current, outcome)
                if delay is None:
                    if outcome.error is None:
                        return cast("T", outcome.result)
                    run.note(outcome.error)
                    raise outcome.error
                try:
                    await current.dispose(outcome)
                finally:
                    current.end(outcome, since=mark if current is call else 0)
                if delay > 0:
                    await self.clock.sleep(delay)
                current = current.again()
                try:
                    outcome = Outcome(await call_next(current))
                except Exception as error:
                    outcome = Outcome(error=error)
        finally:
            # However this is left (the last attempt, a cancellation, a strategy that raises), what the attempt holds is
            # let go of at the end of the call, and by then it is known what that came to.
            if current is not call:
                call.on_end(current.end)
            # An error holds its traceback, and that this frame, which holds the error.
            del outcome, run

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        started = self.clock.now()
        mark = call.mark()
        try:
            result = call_next(call)
        except Exception as error:
            outcome = Outcome(error=error)
        else:
            if not self._unsatisfied(call, result):
                return result
            outcome = Outcome(result)
        run = _Run(self, call, started)
        current = call
        try:
            while True:
                delay = driven(run.delay_after(current, outcome), "an async tenacity strategy")
                if delay is None:
                    if outcome.error is None:
                        return cast("T", outcome.result)
                    run.note(outcome.error)
                    raise outcome.error
                try:
                    current.dispose_sync(outcome)
                finally:
                    current.end(outcome, since=mark if current is call else 0)
                if delay > 0:
                    self.clock.block(delay)
                current = current.again()
                try:
                    outcome = Outcome(call_next(current))
                except Exception as error:
                    outcome = Outcome(error=error)
        finally:
            if current is not call:
                call.on_end(current.end)
            del outcome, run

    def _unsatisfied(self, call: Call, result: object) -> bool:
        """Whether a *result* could be worth another attempt; `_Run` then decides."""
        if self.retry is not None:
            return True
        return self.on is None and call.judge is not None and call.judge(Outcome(result)).retry


class _Run:
    """What is remembered between the attempts of one call: made only once something has failed."""

    __slots__ = ("_attempts", "_call", "_idle", "_reason", "_retry", "_started", "_state")

    def __init__(self, retry: Retry, call: Call, started: float) -> None:
        self._retry = retry
        self._call = call
        self._started = started
        self._idle = 0.0
        self._attempts = 0
        self._reason: RetryEnd = "not_retryable"
        self._state: RetryCallState | None = None

    async def delay_after(self, attempt: Call, outcome: Outcome) -> float | None:
        """Seconds to wait before the next attempt, `None` where there is to be none."""
        try:
            return await self._delay_after(attempt, outcome)
        except Exception as error:
            # A strategy of the user's has failed: what the call itself came to is not to be lost for that.
            if error is not outcome.error and error.__context__ is None:
                error.__context__ = outcome.error
            raise

    async def _delay_after(self, attempt: Call, outcome: Outcome) -> float | None:
        retry, clock = self._retry, self._retry.clock
        self._attempts += 1
        judgement = Judgement() if attempt.judge is None else attempt.judge(outcome)
        state = self._asked(attempt, outcome)

        error = outcome.error
        rejected = isinstance(error, RejectedError)
        if rejected and not retry.patient:
            return self._over("breaker", outcome, judgement)
        if not rejected and not await self._wanted(outcome, judgement, state):
            return self._over("not_retryable", outcome, judgement)
        if judgement.exhausted:
            return self._over("server", outcome, judgement)

        # tenacity's order: the wait is known before the stop is asked, so that a stop can look at it.
        wait = retry.wait(state) if retry.wait is not None and state is not None else None
        delay = float(await wait if inspect.isawaitable(wait) else wait) if wait is not None else None
        if delay is None:
            delay = retry.backoff.wait(self._attempts, clock)
        if not delay >= 0:
            # A jitter or strategy of the user's may come to less than nothing, or to no number.
            delay = 0.0
        after = judgement.retry_after
        if after is None:
            after = getattr(error, "retry_after", None)
        from_server = isinstance(after, int | float) and after > 0
        if from_server:
            delay = max(delay, float(cast("float", after)) * (1 + _AFTER_SPREAD * clock.random()))

        if state is not None:
            state.upcoming_sleep = delay
        if retry.stop is not None and state is not None:
            stopped = retry.stop(state)
            if await stopped if inspect.isawaitable(stopped) else stopped:
                return self._over("attempts", outcome, judgement)
        elif self._attempts >= retry.attempts:
            return self._over("attempts", outcome, judgement)
        if clock.now() + delay >= self._deadline():
            return self._over("deadline", outcome, judgement)

        self._idle += delay
        if state is not None:
            state.idle_for = self._idle
        reason = judgement.error_type or _type_of(outcome)
        emit(
            RetryScheduled(
                source=self._call.name,
                attempt=self._attempts,
                delay=delay,
                error_type=reason,
                from_server=from_server,
            )
        )
        span = tracer().current()
        if span.recording:
            span.event(
                "meshkit.retry",
                {
                    "meshkit.retry.delay": delay,
                    "meshkit.retry.reason": reason,
                    "meshkit.attempt": self._attempts,
                    "meshkit.retry.after_header": from_server,
                },
            )
        return delay

    def note(self, error: BaseException) -> None:
        """Write on the last attempt's error what ended it."""
        if self._attempts > 1:
            note = f"meshkit: gave up on {self._call.name!r} after {self._attempts} attempts, ended by {self._reason}"
            # Some libraries raise one and the same object over and over, and some errors cannot be written to.
            if note not in getattr(error, "__notes__", ()):
                with contextlib.suppress(Exception):
                    error.add_note(note)

    def _over(self, reason: RetryEnd, outcome: Outcome, judgement: Judgement) -> float | None:
        """Remember what ended it; there is no delay any more."""
        self._reason = reason
        scope = current_scope()
        if scope is not None and reason in ("attempts", "deadline", "budget", "server"):
            scope.mark_exhausted()
        failure = judgement.error_type or _type_of(outcome)
        if failure:
            emit(RetryEnded(source=self._call.name, attempts=self._attempts, reason=reason, error_type=failure))
        return None

    def _deadline(self) -> float:
        scope = current_scope()
        limits = [
            self._started + self._retry.within if self._retry.within is not None else math.inf,
            scope.deadline if scope is not None and scope.deadline is not None else math.inf,
        ]
        return min(limits)

    async def _wanted(self, outcome: Outcome, judgement: Judgement, state: RetryCallState | None) -> bool:
        retry, error = self._retry, outcome.error
        if retry.retry is not None and state is not None:
            wanted = retry.retry(state)
            return bool(await wanted if inspect.isawaitable(wanted) else wanted)
        if retry.on is not None:
            return error is not None and isinstance(error, retry.on)
        if self._call.judge is not None:
            return judgement.retry
        return error is not None and _retryable(error)

    def _asked(self, attempt: Call, outcome: Outcome) -> RetryCallState | None:
        """The state that tenacity's strategies are asked with; `None` where none was given."""
        retry = self._retry
        if retry.retry is None and retry.wait is None and retry.stop is None:
            return None
        import tenacity

        if self._state is None:
            self._state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
            self._state.start_time = self._started
        state = self._state
        state.attempt_number = self._attempts
        if outcome.error is None:
            state.set_result(outcome.result)
        else:
            state.set_exception((type(outcome.error), outcome.error, outcome.error.__traceback__))
        # Its own clock is time.monotonic, ours may be a test's.
        state.outcome_timestamp = retry.clock.now()
        return state


def _type_of(outcome: Outcome) -> str:
    return "" if outcome.error is None else error_type(outcome.error)
