"""An answer of our own where the real one cannot be had, and a mark that says so."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Final, Literal, TypeVar, cast

from meshkit.core.call import Call, Next, NextSync, Outcome, is_async
from meshkit.core.clock import SYSTEM_CLOCK, Clock, check_clock
from meshkit.core.events import FallbackUsed, emit, error_type
from meshkit.core.scope import current_scope
from meshkit.core.trace import tracer
from meshkit.errors import ConfigurationError, RejectedError
from meshkit.policies.retry import retry_end

T = TypeVar("T")
_Reason = Literal["breaker_open", "rejected", "timeout", "retries_exhausted", "error"]

# Ends of a retry after which it had done what it could.
_EXHAUSTED: Final = ("attempts", "deadline", "budget", "server")
_DENIED: Final = (401, 403)
_MOST_ERRORS: Final = 100


class _Nothing:
    def __repr__(self) -> str:
        return "<none>"


_NOTHING: Final = _Nothing()


# Before a call has come to anything.
_NOTHING_YET: Final = Outcome()


class _Itself:
    """A function as a key: equal to itself, whatever its own `__eq__` says, and kept alive by it."""

    __slots__ = ("fn",)

    def __init__(self, fn: object) -> None:
        self.fn = fn

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.fn is other.fn

    def __hash__(self) -> int:
        return id(self.fn)


class LastGood:
    """The last good answers of a function, so that a Fallback can give them while it fails.

    What was answered for one caller must not be given to another one, and only you know which arguments, or which of the
    things around the call, tell callers apart. So `key` has no default. An answer is given as it was, the same object: do
    not change what is kept.

    Functions are told apart by themselves, so that one pipeline may guard several. One that is made anew for each call (a
    lambda, a partial) is always another one, and has no last good answer. Threads may share one.

    Args:
        key: a function of the call's arguments, whose result says which calls have the same answer:
            `key=lambda user_id, **_: user_id`. `None` says that all calls do, whoever makes them.
        max_age: seconds after which an answer is too old to be given.
        most: so many answers are kept; the ones that were used least recently go first.
        denied: give the kept answer also where the call was refused for want of rights (a `PermissionError`, or an error
            with status 401 or 403). Otherwise that error is raised, and what was kept for this key is forgotten.
        clock: where the time comes from.

    Raises:
        ConfigurationError: a value that cannot work; at a call, a key that cannot be one, or a call that has no result
            of its own to keep (a stream, a response).
    """

    __slots__ = ("_answers", "_clock", "_lock", "denied", "key", "max_age", "most")

    def __init__(
        self,
        *,
        key: Callable[..., Hashable] | None,
        max_age: float = 300.0,
        most: int = 1000,
        denied: bool = False,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if key is not None and not callable(cast("object", key)):
            raise ConfigurationError(
                f"key is a function of the call's arguments, or None for one answer for all, not {key!r}."
            )
        if is_async(key):
            raise ConfigurationError(
                f"key is a plain function, and {key!r} is a coroutine function, which nobody would await."
            )
        if isinstance(max_age, bool) or not isinstance(cast("object", max_age), int | float) or not max_age > 0:
            raise ConfigurationError(f"max_age is how many seconds an answer may be old, so above 0, not {max_age!r}.")
        if not isinstance(cast("object", most), int) or isinstance(most, bool) or most < 1:
            raise ConfigurationError(f"most is how many answers are kept, so 1, 2, 3 …, not {most!r}.")
        if not isinstance(cast("object", denied), bool):
            raise ConfigurationError(
                f"denied is True or False: whether a refused caller gets the kept answer too, not {denied!r}."
            )
        check_clock(clock)
        self.key = key
        self.max_age = max_age
        self.most = most
        self.denied = denied
        self._clock = clock
        self._answers: OrderedDict[Hashable, tuple[Any, float]] = OrderedDict()
        # Re-entrant, because a key's own `__eq__` runs under it, and destructors may.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._answers)

    def __repr__(self) -> str:
        return f"LastGood(max_age={self.max_age}, most={self.most}, kept={len(self)})"

    def clear(self) -> None:
        """Forget all answers."""
        with self._lock:
            self._answers.clear()

    def key_of(self, call: Call) -> Hashable:
        """Which of the answers is that of `call`.

        Raises:
            ConfigurationError: `call` has no result to keep, or its key is none.
            whatever `key` raises.
        """
        if call.late:
            raise ConfigurationError(
                f"the result of {call.name!r} is a stream or a response, which can be read once, so it cannot be kept.",
                "Keep what is made of it: put the Fallback around the function that reads it.",
            )
        fn, args, kwargs = call.work
        # A bound method is made anew each time it is asked for, and equal to another one of the same object.
        function = fn if isinstance(fn, MethodType) else _Itself(fn)
        key = (function, None if self.key is None else self.key(*args, **kwargs))
        try:
            hash(key)
        except TypeError:
            raise ConfigurationError(
                f"the key of a call of {call.name!r} is {type(key[1]).__name__}, which cannot be looked up.",
                "Have key return text, a number, or a tuple of those.",
            ) from None
        return key

    def keep(self, key: Hashable, answer: object) -> None:
        """Remember a good answer."""
        now = self._clock.now()
        with self._lock:
            self._answers[key] = answer, now
            self._answers.move_to_end(key)
            dropped = self._answers.popitem(last=False) if len(self._answers) > self.most else None
        # Its destructor runs here, and not under the lock.
        del dropped

    def find(self, key: Hashable) -> tuple[Any, float] | None:
        """The answer that is kept, and its age in seconds; `None` where there is none, or it is too old."""
        now = self._clock.now()
        with self._lock:
            kept = self._answers.get(key)
            if kept is None:
                return None
            answer, at = kept
            if now - at > self.max_age:
                del self._answers[key]
                return None
            self._answers.move_to_end(key)
            return answer, now - at

    def forget(self, key: Hashable) -> None:
        """Remember nothing for this key any more."""
        with self._lock:
            dropped = self._answers.pop(key, None)
        del dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """Answer a failed call with something of our own.

    That it did is visible: on the span, in a counter, and in the Scope, from which edges tell the caller
    (`meshkit-degraded`). Cancellation is never answered, nor is a ConfigurationError, unless `on` lists it.

    Args:
        answer: a value, or a function (plain or async) of the `Outcome` that failed. Its own error is raised, with the
            first one as its cause.
        last_good: what the function answered when it last could, for functions with a result that can be kept. Where
            there is nothing good enough, `answer` is asked, and without one the call's error is raised.
        name: what the mark says, `"last-known-price"`.
        on: exception classes to answer. Where left out: any `Exception`, and results that the edge calls a failure.

    Raises:
        ConfigurationError: neither answer nor last_good, or a value that cannot work.
    """

    answer: Any = _NOTHING
    last_good: LastGood | None = None
    name: str = "fallback"
    on: type[Exception] | tuple[type[Exception], ...] | None = None

    def __post_init__(self) -> None:
        if self.answer is _NOTHING and self.last_good is None:
            raise ConfigurationError("a fallback has something to answer with.", "Give answer=, or last_good=.")
        if not isinstance(cast("object", self.last_good), LastGood | None):
            raise ConfigurationError(f"last_good is a LastGood(key=…), not {self.last_good!r}.")
        if callable(self.answer):
            _check_takes_outcome(self.answer)
        name = cast("object", self.name)
        if (
            not isinstance(name, str)
            or not name.isascii()
            or not name.isprintable()
            or not name
            or set(",;") & set(name)
        ):
            raise ConfigurationError(
                f"name goes into a header, so it is plain ASCII without , and ;, not {self.name!r}."
            )
        if self.on is not None and not self._classes:
            raise ConfigurationError(
                "on lists exception classes, and there is none in it, so nothing would be answered.",
                "Leave it out to answer any Exception.",
            )
        for wanted in self._classes:
            if not (isinstance(wanted, type) and issubclass(wanted, Exception)):
                raise ConfigurationError(
                    f"on lists exception classes, and {wanted!r} is none.",
                    "Cancellation and exits (BaseException) are never answered.",
                )

    def describe(self) -> dict[str, object]:
        return {
            "kind": "fallback",
            "name": self.name,
            "on": [wanted.__name__ for wanted in self._classes],
            # Seconds that an answer may be old; only what can be kept has one.
            "last_good": None if self.last_good is None else self.last_good.max_age,
        }

    @property
    def _classes(self) -> tuple[type[Exception], ...]:
        return self.on if isinstance(self.on, tuple) else () if self.on is None else (self.on,)

    async def run(self, call: Call, call_next: Next[T]) -> T:
        last_good = self.last_good
        key = None if last_good is None else last_good.key_of(call)
        mark, exhausted = call.mark(), _exhausted()
        outcome = _NOTHING_YET
        try:
            try:
                result = await call_next(call)
            except Exception as error:
                outcome = Outcome(error=error)
                if not self._answers(call, outcome):
                    raise
            else:
                outcome = Outcome(result)
                if not self._answers(call, outcome):
                    if last_good is not None:
                        last_good.keep(key, result)
                    return result
            reason = self._reason(outcome, exhausted)
            kept = self._kept(key, outcome)
            if kept is None and self.answer is _NOTHING:
                return cast("T", self._without(call, reason, outcome))
            # What is inside has failed and is over: a breaker there must not take our answer for its own.
            try:
                await call.dispose(outcome)
            finally:
                call.end(outcome, since=mark)
            if kept is not None:
                self._answered(call, reason, outcome, exhausted, kept[1])
                return cast("T", kept[0])
            try:
                answer = self.answer(outcome) if callable(self.answer) else self.answer
                if inspect.isawaitable(answer):
                    answer = await answer
            except Exception as error:
                self._failed(call, reason, outcome)
                if outcome.error is None or error is outcome.error or error.__cause__ is not None:
                    raise
                raise error from outcome.error
            self._answered(call, reason, outcome, exhausted)
            return cast("T", answer)
        finally:
            # An error holds its traceback, and that this frame, which holds the error.
            del outcome

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        last_good = self.last_good
        key = None if last_good is None else last_good.key_of(call)
        mark, exhausted = call.mark(), _exhausted()
        outcome = _NOTHING_YET
        try:
            try:
                result = call_next(call)
            except Exception as error:
                outcome = Outcome(error=error)
                if not self._answers(call, outcome):
                    raise
            else:
                outcome = Outcome(result)
                if not self._answers(call, outcome):
                    if last_good is not None:
                        last_good.keep(key, result)
                    return result
            reason = self._reason(outcome, exhausted)
            kept = self._kept(key, outcome)
            if kept is None and self.answer is _NOTHING:
                return cast("T", self._without(call, reason, outcome))
            try:
                call.dispose_sync(outcome)
            finally:
                call.end(outcome, since=mark)
            if kept is not None:
                self._answered(call, reason, outcome, exhausted, kept[1])
                return cast("T", kept[0])
            try:
                answer = self.answer(outcome) if callable(self.answer) else self.answer
            except Exception as error:
                self._failed(call, reason, outcome)
                if outcome.error is None or error is outcome.error or error.__cause__ is not None:
                    raise
                raise error from outcome.error
            if inspect.isawaitable(answer):
                cast("Callable[[], None]", getattr(answer, "close", lambda: None))()
                raise ConfigurationError(
                    f"fallback {self.name!r} is a coroutine function, and the call it answers is a plain one."
                )
            self._answered(call, reason, outcome, exhausted)
            return cast("T", answer)
        finally:
            # An error holds its traceback, and that this frame, which holds the error.
            del outcome

    def _answers(self, call: Call, outcome: Outcome) -> bool:
        if outcome.error is None:
            return self.on is None and call.judge is not None and call.judge(outcome).breaker == "failure"
        if self.on is None:
            return not isinstance(outcome.error, ConfigurationError)
        return isinstance(outcome.error, self.on)

    def _kept(self, key: Hashable, outcome: Outcome) -> tuple[Any, float] | None:
        """The last good answer and its age, if it may be given."""
        if self.last_good is None:
            return None
        error = outcome.error
        if error is not None and _denied(error) and not self.last_good.denied:
            said = isinstance(error, PermissionError) and any(
                issubclass(wanted, PermissionError) for wanted in self._classes
            )
            if not said:
                # Whoever may not see it now may not see what it was either.
                self.last_good.forget(key)
                return None
        return self.last_good.find(key)

    def _without(self, call: Call, reason: _Reason, outcome: Outcome) -> Any:
        """Nothing is kept: the call is what it was."""
        self._failed(call, reason, outcome)
        if outcome.error is None:
            return outcome.result
        try:
            raise outcome.error
        finally:
            # An error holds its traceback, and that this frame, which holds the error.
            del outcome

    def _reason(self, outcome: Outcome, exhausted: bool) -> _Reason:
        # By the code: CircuitOpenError lives beside pybreaker, which this file does without.
        error = outcome.error
        if isinstance(error, RejectedError):
            return "breaker_open" if error.code == "MK501" else "rejected"
        if isinstance(error, TimeoutError):
            return "timeout"
        # An error says what ended its retry; for a result there is only what the request has learnt during this call.
        end = None if error is None else retry_end(error)
        if end == "breaker" or end == "rejected":
            return "breaker_open" if end == "breaker" else "rejected"
        ended = end in _EXHAUSTED if error is not None else not exhausted and _exhausted()
        return "retries_exhausted" if ended else "error"

    def _answered(
        self, call: Call, reason: _Reason, outcome: Outcome, exhausted: bool, age: float | None = None
    ) -> None:
        scope = current_scope()
        if scope is not None:
            scope.mark_degraded(self.name, age=age)
            if not exhausted and scope.exhausted:
                # What this call has used up is answered for. If the request fails after all, that has another reason,
                # and whoever made it may try again.
                scope.clear_exhausted()
        emit(FallbackUsed(source=call.name, reason=reason, result="success", error_type=_type_of(outcome), age=age))
        span = tracer().current()
        if span.recording:
            attributes = {"meshkit.fallback.reason": reason, "meshkit.fallback": self.name}
            span.event("meshkit.fallback", attributes if age is None else {**attributes, "meshkit.fallback.age": age})

    def _failed(self, call: Call, reason: _Reason, outcome: Outcome) -> None:
        emit(FallbackUsed(source=call.name, reason=reason, result="failure", error_type=_type_of(outcome)))


def _check_takes_outcome(answer: Callable[..., object]) -> None:
    """Make sure, where a function can be asked, that it takes the outcome: otherwise the first outage would find out.

    Raises:
        ConfigurationError: it does not.
    """
    try:
        signature = inspect.signature(answer)
    except (TypeError, ValueError):
        # Some of C's do not say.
        return
    try:
        signature.bind(Outcome())
    except TypeError as error:
        raise ConfigurationError(
            f"answer is called with the Outcome that failed, and {answer!r} does not take that: {error}.",
            "Write answer=lambda outcome: …, or give a value that is no function.",
        ) from None


def _exhausted() -> bool:
    scope = current_scope()
    return scope is not None and scope.exhausted


def _denied(error: BaseException) -> bool:
    """Whether a call was refused for want of rights: by its error, by one that it groups, or by what led to it."""
    found: list[BaseException] = [error]
    # Those found on the way are looked at too; so many that no real error has more.
    for seen in found:
        if isinstance(seen, PermissionError):
            return True
        # How httpx, aiohttp, requests and urllib say it. What is asked for may be a property that fails.
        for said_by in (seen, _asked(seen, "response")):
            if any(_is_denial(_asked(said_by, name)) for name in ("status_code", "status", "code")):
                return True
        led = seen.__cause__ if seen.__suppress_context__ else seen.__cause__ or seen.__context__
        parts = seen.exceptions if isinstance(seen, BaseExceptionGroup) else ()
        if len(found) < _MOST_ERRORS:
            found += [each for each in (led, *parts) if each is not None and not any(each is one for one in found)]
    return False


def _is_denial(status: object) -> bool:
    # As text too: "403". An enum of a library's own (grpc's, say) is no number.
    try:
        return int(cast("int", status)) in _DENIED if isinstance(status, int | float | str) else False
    except (ValueError, OverflowError):
        return False


def _asked(thing: object, name: str) -> object:
    with contextlib.suppress(Exception):
        return getattr(thing, name, None)
    return None


def _type_of(outcome: Outcome) -> str:
    return "" if outcome.error is None else error_type(outcome.error)
