"""Trying again: bounded in attempts and time, and only where another attempt can help."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from meshkit.core.call import Call, Judgement, Next, NextSync, Outcome
from meshkit.core.clock import SYSTEM_CLOCK, Clock
from meshkit.core.events import RetryEnd, RetryEnded, RetryScheduled, emit
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
            longest = min(self.most, self.first * self.factor ** (attempt - 1))
        except OverflowError:
            longest = self.most
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
        if self.attempts < 1:
            raise ConfigurationError(
                f"attempts is how often to call, the first one counted, so 1 or above, not {self.attempts}."
            )
        if self.within is not None and self.within <= 0:
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
            outcome = Outcome(result)
            if not self._unsatisfied(call, outcome):
                return result
        run = _Run(self, call, started)
        current = call
        while True:
            delay = await run.delay_after(current, outcome)
            if delay is None:
                if current is not call:
                    call.on_end(_ends(current))
                return cast("T", run.last(outcome))
            if outcome.error is None and current.discard is not None:
                await current.discard(outcome.result)
            current.end(outcome, since=mark if current is call else 0)
            if delay > 0:
                await self.clock.sleep(delay)
            current = current.again()
            try:
                outcome = Outcome(await call_next(current))
            except Exception as error:
                outcome = Outcome(error=error)
            except BaseException as error:
                current.end(Outcome(error=error))
                raise

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        started = self.clock.now()
        mark = call.mark()
        try:
            result = call_next(call)
        except Exception as error:
            outcome = Outcome(error=error)
        else:
            outcome = Outcome(result)
            if not self._unsatisfied(call, outcome):
                return result
        run = _Run(self, call, started)
        current = call
        while True:
            delay = _driven(run.delay_after(current, outcome))
            if delay is None:
                if current is not call:
                    call.on_end(_ends(current))
                return cast("T", run.last(outcome))
            current.end(outcome, since=mark if current is call else 0)
            if delay > 0:
                self.clock.block(delay)
            current = current.again()
            try:
                outcome = Outcome(call_next(current))
            except Exception as error:
                outcome = Outcome(error=error)
            except BaseException as error:
                current.end(Outcome(error=error))
                raise

    def _unsatisfied(self, call: Call, outcome: Outcome) -> bool:
        """Whether a *result* could be worth another attempt; `_Run` then decides."""
        if self.retry is not None:
            return True
        return self.on is None and call.judge is not None and call.judge(outcome).retry


def _ends(call: Call) -> Callable[[Outcome], None]:
    return lambda outcome: call.end(outcome)


def _driven(coroutine: Coroutine[Any, Any, float | None]) -> float | None:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return cast("float | None", done.value)
    coroutine.close()
    raise ConfigurationError(
        "an async tenacity strategy cannot be asked from a plain function.",
        "Make the function `async def`, or use a plain strategy.",
    )


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
        error_type = judgement.error_type or _error_type(outcome)
        emit(
            RetryScheduled(
                source=self._call.name,
                attempt=self._attempts,
                delay=delay,
                error_type=error_type,
                from_server=from_server,
            )
        )
        tracer().current().event(
            "meshkit.retry",
            {
                "meshkit.retry.delay": delay,
                "meshkit.retry.reason": error_type,
                "meshkit.attempt": self._attempts,
                "meshkit.retry.after_header": from_server,
            },
        )
        return delay

    def last(self, outcome: Outcome) -> Any:
        """Hand out what the last attempt came to: its result, or its error with a note."""
        if outcome.error is None:
            return outcome.result
        if self._attempts > 1:
            outcome.error.add_note(
                f"meshkit: gave up on {self._call.name!r} after {self._attempts} attempts, ended by {self._reason}"
            )
        raise outcome.error

    def _over(self, reason: RetryEnd, outcome: Outcome, judgement: Judgement) -> float | None:
        """Remember what ended it; there is no delay any more."""
        self._reason = reason
        scope = current_scope()
        if scope is not None and reason in ("attempts", "deadline", "budget", "server"):
            scope.mark_exhausted()
        error_type = judgement.error_type or _error_type(outcome)
        if error_type:
            emit(RetryEnded(source=self._call.name, attempts=self._attempts, reason=reason, error_type=error_type))
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


def _error_type(outcome: Outcome) -> str:
    return "" if outcome.error is None else type(outcome.error).__qualname__
