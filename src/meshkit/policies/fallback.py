"""An answer of our own where the real one cannot be had, and a mark that says so."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from meshkit.core.call import Call, Next, NextSync, Outcome
from meshkit.core.events import FallbackUsed, emit, error_type
from meshkit.core.scope import current_scope
from meshkit.core.trace import tracer
from meshkit.errors import ConfigurationError, RejectedError

T = TypeVar("T")
_Reason = Literal["breaker_open", "rejected", "timeout", "retries_exhausted", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """Answer a failed call with something of our own.

    That it did is visible: on the span, in a counter, and in the Scope, from which edges tell the caller
    (`meshkit-degraded`). Cancellation is never answered.

    Args:
        answer: a value, or a function (plain or async) of the `Outcome` that failed. Its own error is raised, with the
            first one as its cause.
        name: what the mark says, `"last-known-price"`.
        on: exception classes to answer. Where left out: any `Exception`, and results that the edge calls a failure.
    """

    answer: Any
    name: str = "fallback"
    on: type[Exception] | tuple[type[Exception], ...] | None = None

    def __post_init__(self) -> None:
        printable = self.name.isascii() and self.name.isprintable()
        if not self.name or not printable or "," in self.name or ";" in self.name:
            raise ConfigurationError(
                f"name goes into a header, so it is plain ASCII without , and ;, not {self.name!r}."
            )
        classes = self.on if isinstance(self.on, tuple) else () if self.on is None else (self.on,)
        for wanted in classes:
            if not (isinstance(wanted, type) and issubclass(wanted, Exception)):
                raise ConfigurationError(
                    f"on lists exception classes, and {wanted!r} is none.",
                    "Cancellation and exits (BaseException) are never answered.",
                )

    def describe(self) -> dict[str, object]:
        return {"kind": "fallback", "name": self.name}

    async def run(self, call: Call, call_next: Next[T]) -> T:
        mark = call.mark()
        try:
            result = await call_next(call)
        except Exception as error:
            outcome = Outcome(error=error)
            if not self._answers(call, outcome):
                raise
        else:
            outcome = Outcome(result)
            if not self._answers(call, outcome):
                return result
        # What is inside has failed and is over: a breaker there must not take our answer for its own.
        try:
            await call.dispose(outcome)
        finally:
            call.end(outcome, since=mark)
        reason = self._reason(outcome)
        try:
            answer = self.answer(outcome) if callable(self.answer) else self.answer
            if inspect.isawaitable(answer):
                answer = await answer
        except Exception as error:
            self._failed(call, reason, outcome)
            if outcome.error is None or error is outcome.error or error.__cause__ is not None:
                raise
            raise error from outcome.error
        self._answered(call, reason, outcome)
        return cast("T", answer)

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        mark = call.mark()
        try:
            result = call_next(call)
        except Exception as error:
            outcome = Outcome(error=error)
            if not self._answers(call, outcome):
                raise
        else:
            outcome = Outcome(result)
            if not self._answers(call, outcome):
                return result
        try:
            call.dispose_sync(outcome)
        finally:
            call.end(outcome, since=mark)
        reason = self._reason(outcome)
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
        self._answered(call, reason, outcome)
        return cast("T", answer)

    def _answers(self, call: Call, outcome: Outcome) -> bool:
        if outcome.error is None:
            return self.on is None and call.judge is not None and call.judge(outcome).breaker == "failure"
        if self.on is None:
            return not isinstance(outcome.error, ConfigurationError)
        return isinstance(outcome.error, self.on)

    def _reason(self, outcome: Outcome) -> _Reason:
        # By the name of the class: CircuitOpenError lives beside pybreaker, which this file does without.
        error = outcome.error
        if isinstance(error, RejectedError):
            return "breaker_open" if error.code == "MK501" else "rejected"
        if isinstance(error, TimeoutError):
            return "timeout"
        scope = current_scope()
        return "retries_exhausted" if scope is not None and scope.exhausted else "error"

    def _answered(self, call: Call, reason: _Reason, outcome: Outcome) -> None:
        scope = current_scope()
        if scope is not None:
            scope.mark_degraded(self.name)
        emit(FallbackUsed(source=call.name, reason=reason, result="success", error_type=_type_of(outcome)))
        tracer().current().event("meshkit.fallback", {"meshkit.fallback.reason": reason, "meshkit.fallback": self.name})

    def _failed(self, call: Call, reason: _Reason, outcome: Outcome) -> None:
        emit(FallbackUsed(source=call.name, reason=reason, result="failure", error_type=_type_of(outcome)))


def _type_of(outcome: Outcome) -> str:
    return "" if outcome.error is None else error_type(outcome.error)
