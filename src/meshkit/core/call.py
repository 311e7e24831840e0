"""A call on its way through policies: what it is, how it ends, and the pipeline that it runs through."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

from meshkit.core.scope import Scope, current_scope, scope_open
from meshkit.errors import ConfigurationError

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

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


class Call:
    """One call, or one attempt at it. It never changes; a new one is made only from the second attempt on.

    A call has one end, and it may come after `run` has returned: at once for a plain result, at the end, failure or
    close of the body for a stream. Whoever makes a Call ends it.

    Attributes:
        name: what is called, for events and errors.
        attempt: 1 for the first.
        judge: what the edge says of an outcome, `None` without an edge.
        discard: disposes of a result that nobody will get (a response that is retried), `None` if there is nothing
            to dispose of.
    """

    __slots__ = ("_enders", "attempt", "discard", "judge", "name")

    def __init__(
        self,
        name: str,
        *,
        attempt: int = 1,
        judge: Judge | None = None,
        discard: Callable[[Any], Awaitable[object]] | None = None,
    ) -> None:
        self.name = name
        self.attempt = attempt
        self.judge = judge
        self.discard = discard
        self._enders: list[Ender] | None = None

    def on_end(self, ender: Ender) -> None:
        """Have `ender` called once with the outcome, when the call is really over. The last one given runs first."""
        if self._enders is None:
            self._enders = [ender]
        else:
            self._enders.append(ender)

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
            except Exception:
                # An ender is a policy's own; one that fails must not keep the others from releasing what they hold.
                _log.exception("a policy failed at the end of call %r", self.name)

    def again(self) -> Call:
        """The next attempt at the same call."""
        return Call(self.name, attempt=self.attempt + 1, judge=self.judge, discard=self.discard)


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


_attempt: ContextVar[int] = ContextVar("meshkit_attempt", default=1)


def current_attempt() -> int:
    """The number of the attempt that runs here, from 1."""
    return _attempt.get()


class Pipeline(Generic[T]):
    """Policies in order, outermost first. Itself a policy, a decorator, and something to call.

    Args:
        name: what is called, for events, metrics and errors.
        policies: outermost first.

    Raises:
        ConfigurationError: something given is no policy.
    """

    __slots__ = ("_chain", "name", "policies")

    def __init__(self, name: str, *policies: Policy) -> None:
        for policy in policies:
            if not isinstance(policy, Policy):
                raise ConfigurationError(
                    f"a pipeline is made of policies, and {policy!r} is none.",
                    "A policy has `async run(call, call_next)` and `describe()`.",
                )
        self.name = name
        self.policies = policies

    def __repr__(self) -> str:
        return f"Pipeline({', '.join([repr(self.name), *map(repr, self.policies)])})"

    # -- as a policy --------------------------------------------------------------------------------------------------

    async def run(self, call: Call, call_next: Next[Any]) -> Any:
        step = call_next
        for policy in reversed(self.policies):
            step = functools.partial(policy.run, call_next=step)
        return await step(call)

    def run_sync(self, call: Call, call_next: NextSync[Any]) -> Any:
        step = call_next
        for policy in reversed(self.policies):
            if not isinstance(policy, SyncPolicy):
                raise self._only_async(policy)
            step = functools.partial(policy.run_sync, call_next=step)
        return step(call)

    def describe(self) -> dict[str, object]:
        return {"kind": "pipeline", "name": self.name, "policies": [policy.describe() for policy in self.policies]}

    # -- as something to call -----------------------------------------------------------------------------------------

    async def call(self, fn: Callable[P, Awaitable[Any]], *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call a coroutine function through the policies.

        Raises:
            whatever `fn` raises at the last attempt, and the errors of the policies.
        """

        async def last(call: Call) -> Any:
            token = _attempt.set(call.attempt)
            try:
                return await fn(*args, **kwargs)
            finally:
                _attempt.reset(token)

        call = Call(self.name)
        if current_scope() is not None:
            return await self._ended(call, self.run(call, last))
        with scope_open(Scope()):
            return await self._ended(call, self.run(call, last))

    def call_sync(self, fn: Callable[P, Any], *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call a plain function through the policies, holding this thread during waits."""
        call = Call(self.name)
        try:
            result = self.run_sync(call, lambda _: fn(*args, **kwargs))
        except BaseException as error:
            call.end(Outcome(error=error))
            raise
        call.end(Outcome(result))
        return result

    async def _ended(self, call: Call, running: Awaitable[Any]) -> Any:
        try:
            result = await running
        except BaseException as error:
            call.end(Outcome(error=error))
            raise
        call.end(Outcome(result))
        return result

    # -- as a decorator -----------------------------------------------------------------------------------------------

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Guard `fn`: a coroutine function, or a plain one where all policies can.

        Raises:
            ConfigurationError: `fn` is a plain function and a policy is only for coroutines, or it is a generator.
        """
        if inspect.isasyncgenfunction(fn) or inspect.isgeneratorfunction(fn):
            raise ConfigurationError(
                f"{fn.__qualname__} is a generator, whose calls end long after they return.",
                "Guard the function that fetches one item.",
            )
        if inspect.iscoroutinefunction(fn):

            @functools.wraps(fn)
            async def guarded(*args: Any, **kwargs: Any) -> Any:
                return await self.call(fn, *args, **kwargs)

            return cast("Callable[P, R]", guarded)

        for policy in self.policies:
            if not isinstance(policy, SyncPolicy):
                raise self._only_async(policy)

        @functools.wraps(fn)
        def guarded_sync(*args: P.args, **kwargs: P.kwargs) -> R:
            return cast("R", self.call_sync(fn, *args, **kwargs))

        return guarded_sync

    def _only_async(self, policy: Policy) -> ConfigurationError:
        return ConfigurationError(
            f"{type(policy).__name__} in pipeline {self.name!r} works with coroutine functions only.",
            "Make the function `async def`, or leave that policy out.",
        )
