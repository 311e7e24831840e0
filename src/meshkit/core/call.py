"""A call on its way through policies: what it is, and how it ends."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeVar, cast, runtime_checkable

from meshkit.errors import ConfigurationError

T = TypeVar("T")
R = TypeVar("R")

_log = logging.getLogger("meshkit")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call or an attempt ended: with a result, or with an error (cancellation included)."""

    result: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What an edge that knows its protocol says of an outcome; policies ask it where the user gave no rule.

    Attributes:
        retry: whether another attempt may be made.
        breaker: what a circuit breaker counts.
        retry_after: seconds the other side asks to be left alone; `None` where it did not say.
        error_type: one word for metrics and spans, empty for a success.
        exhausted: the other side says that retries below it are used up.
    """

    retry: bool = False
    breaker: Literal["success", "failure", "neutral"] = "success"
    retry_after: float | None = None
    error_type: str = ""
    exhausted: bool = False


Judge = Callable[[Outcome], Judgement]
Ender = Callable[[Outcome], object]
Stop = Callable[[Callable[[], Exception]], object]
Work = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def _nothing() -> None:
    raise AssertionError("this call has no work of its own: an edge leads it")


NO_WORK: Final[Work] = (_nothing, (), {})


class Call:
    """One call, or one attempt at it. What it is never changes; a new one is made only from the second attempt on.

    A call has one end, and it may come after `run` has returned: at once for a plain result, at the end, failure or
    close of the body for a stream. Whoever makes a Call ends it.

    Attributes:
        name: what is called, for events and errors.
        attempt: 1 for the first.
        judge: what the edge says of an outcome, `None` without an edge.
        discard: disposes of a result that nobody will get (a response that is retried), `None` if there is nothing
            to dispose of.
        late: whether the end may come after `run` has returned. Where it cannot, a policy may do at the return of
            `call_next` what it would otherwise ask `on_end` for, which is cheaper.
        stop: ends what still goes on after `run` has returned, with the error that its argument makes: how a Timeout
            reaches a stream. `None` where an edge sees to its own time, or nothing goes on.
        work: function, positional and keyword arguments of the call, for the innermost step of a pipeline.
        opened: seconds until a breaker inside probes, written by it where this very attempt failed and left it open;
            `None` where none did. It is how a Retry around it knows that a wait is of no use.
    """

    __slots__ = ("_enders", "attempt", "discard", "judge", "late", "name", "opened", "stop", "work")

    def __init__(
        self,
        name: str,
        attempt: int = 1,
        judge: Judge | None = None,
        discard: Callable[[Any], Awaitable[object]] | None = None,
        late: bool = True,
        stop: Stop | None = None,
        work: Work = NO_WORK,
    ) -> None:
        self.name = name
        self.attempt = attempt
        self.judge = judge
        self.discard = discard
        self.late = late
        self.stop = stop
        self.work = work
        self.opened: float | None = None
        self._enders: list[Ender] | None = None

    def on_end(self, ender: Ender) -> None:
        """Have `ender` called once with the outcome, when the call is really over. The last one given runs first."""
        if self._enders is None:
            self._enders = [ender]
        else:
            self._enders.append(ender)

    @property
    def ends(self) -> bool:
        """Whether anybody waits for the end."""
        return bool(self._enders)

    def mark(self) -> int:
        """A place in the list of enders: those given later belong to what begins now."""
        return 0 if self._enders is None else len(self._enders)

    def end(self, outcome: Outcome, *, since: int = 0) -> None:
        """Tell everyone who asked by `on_end` after the mark `since`; each hears it once."""
        enders = self._enders
        while enders is not None and len(enders) > since:
            ender = enders.pop()
            try:
                ender(outcome)
            except (KeyboardInterrupt, SystemExit):
                # The program ends; what the others hold is still to be let go of.
                self.end(outcome, since=since)
                raise
            except BaseException:
                # An ender is a policy's own; one that fails must not keep the others from releasing what they hold, and
                # what it raises is nobody's cancellation.
                _log.exception("a policy failed at the end of call %r", self.name)

    async def dispose(self, outcome: Outcome) -> None:
        """Dispose of a result that nobody will get. One that cannot be disposed of keeps no call from going on."""
        if outcome.error is None and self.discard is not None:
            try:
                await self.discard(outcome.result)
            except Exception:
                _log.warning("a discarded result of call %r could not be disposed of", self.name, exc_info=True)

    def dispose_sync(self, outcome: Outcome) -> None:
        """As `dispose`, for a plain function: whatever has to wait for something cannot be disposed of there.

        Raises:
            ConfigurationError: `discard` had to wait.
        """
        driven(self.dispose(outcome), "a result that has to be waited for when it is disposed of")

    def again(self) -> Call:
        """The next attempt at the same call. What the one before has left behind is none of its business."""
        return Call(self.name, self.attempt + 1, self.judge, self.discard, self.late, self.stop, self.work)


def is_async(fn: object) -> bool:
    """Whether calling `fn` gives a coroutine: it is a coroutine function, or an object with an async `__call__`."""
    called = getattr(fn, "__call__", None)  # noqa: B004 - not asked whether it can be called, but how
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(called)


def driven(coroutine: Coroutine[Any, Any, T], what: str) -> T:
    """The result of a coroutine that has nothing to wait for: what a plain function can do with one.

    Args:
        coroutine: is run up to its end, or closed where it waits.
        what: names it in the error.

    Raises:
        ConfigurationError: it waits for something.
    """
    try:
        coroutine.send(None)
    except StopIteration as done:
        return cast("T", done.value)
    coroutine.close()
    raise ConfigurationError(
        f"{what} cannot be had in a plain function.", "Make the function `async def`, or use a plain one there too."
    )


Next = Callable[[Call], Awaitable[T]]
NextSync = Callable[[Call], T]


@runtime_checkable
class Policy(Protocol):
    """One rule around a call: what to do before, one await of `call_next`, what to do after."""

    async def run(self, call: Call, call_next: Next[T]) -> T:
        """Run the call, by awaiting `call_next(call)` not at all, once, or more often."""
        ...

    def describe(self) -> dict[str, object]:
        """Kind, attempts and seconds, for `Pipeline.explain()` and the linter."""
        ...


@runtime_checkable
class SyncPolicy(Policy, Protocol):
    """A policy that can also guard a plain function."""

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        """As `run`, for a function that is no coroutine."""
        ...


@runtime_checkable
class Shortcut(Protocol):
    """A policy that, alone around a function, gets by without a Call: `Pipeline` then decorates with this."""

    def around(self, name: str, fn: Callable[..., Awaitable[R]]) -> Callable[..., Coroutine[Any, Any, R]]:
        """A coroutine function that calls `fn` as `run` would."""
        ...

    def around_sync(self, name: str, fn: Callable[..., R]) -> Callable[..., R]:
        """As `around`, for a plain function."""
        ...


ATTEMPT: Final[ContextVar[int]] = ContextVar("meshkit_attempt", default=1)


def current_attempt() -> int:
    """The number of the attempt that runs here, from 1."""
    return ATTEMPT.get()


def leave_attempt(token: Token[int]) -> None:
    """Undo `ATTEMPT.set`."""
    try:
        ATTEMPT.reset(token)
    except ValueError:
        # A coroutine that was dropped in the middle is closed by the collector, in a context that is not its own. There
        # is nothing to undo, and a policy further out would take the error for the call's.
        return


async def numbered(attempt: int, fn: Callable[..., Awaitable[R]], *args: Any, **kwargs: Any) -> R:
    """Call `fn` as attempt number `attempt`."""
    token = ATTEMPT.set(attempt)
    try:
        return await fn(*args, **kwargs)
    finally:
        leave_attempt(token)
