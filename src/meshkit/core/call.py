"""A call on its way through policies: what it is, how it ends, and the pipeline that it runs through."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

from meshkit.core.scope import Scope, close_scope, current_scope, open_scope
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
        """The next attempt at the same call."""
        return Call(self.name, attempt=self.attempt + 1, judge=self.judge, discard=self.discard)


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


_attempt: ContextVar[int] = ContextVar("meshkit_attempt", default=1)


def current_attempt() -> int:
    """The number of the attempt that runs here, from 1."""
    return _attempt.get()


async def _numbered(attempt: int, fn: Callable[[], Awaitable[R]]) -> R:
    token = _attempt.set(attempt)
    try:
        return await fn()
    finally:
        _attempt.reset(token)


class Pipeline:
    """Policies in order, outermost first. Itself a policy, a decorator, and something to call.

    Args:
        name: what is called, for events, metrics and errors.
        policies: outermost first.

    Raises:
        ConfigurationError: something given is no policy.
    """

    __slots__ = ("__weakref__", "_first", "_rest", "name", "policies")

    def __init__(self, name: str, *policies: Policy) -> None:
        if not isinstance(cast("object", name), str):
            raise ConfigurationError(f"a pipeline begins with the name of what it calls, and {name!r} is none.")
        for policy in policies:
            # A class has the methods of its objects, so it would pass for one of them.
            if isinstance(policy, type) or not isinstance(policy, Policy):
                raise ConfigurationError(
                    f"a pipeline is made of policies, and {policy!r} is none.",
                    "A policy has `async run(call, call_next)` and `describe()`.",
                )
        self.name = name
        self.policies = policies
        # What a call is led through, looked up once: the outermost policy, and the others from the inside out.
        self._first = policies[0].run if policies else None
        self._rest = tuple(policy.run for policy in reversed(policies[1:]))

    def __repr__(self) -> str:
        return f"Pipeline({', '.join([repr(self.name), *map(repr, self.policies)])})"

    # -- as a policy --------------------------------------------------------------------------------------------------

    async def run(self, call: Call, call_next: Next[T]) -> T:
        return await self._led(call, call_next)

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        step = call_next
        for policy in reversed(self.policies):
            if not isinstance(policy, SyncPolicy):
                raise self._only_async(policy)
            step = functools.partial(policy.run_sync, call_next=step)
        return step(call)

    def describe(self) -> dict[str, object]:
        return {"kind": "pipeline", "name": self.name, "policies": [policy.describe() for policy in self.policies]}

    def _led(self, call: Call, call_next: Next[T]) -> Awaitable[T]:
        if self._first is None:
            return call_next(call)
        step = call_next
        for run in self._rest:
            step = functools.partial(run, call_next=step)
        return self._first(call, step)

    # -- as something to call -----------------------------------------------------------------------------------------

    async def call(self, fn: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a coroutine function through the policies.

        Raises:
            whatever `fn` raises at the last attempt, and the errors of the policies.
        """
        return await self._through(fn, args, kwargs)

    def call_sync(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a plain function through the policies, holding this thread during waits.

        Raises:
            ConfigurationError: `fn` has returned a coroutine.
            whatever `fn` raises at the last attempt, and the errors of the policies.
        """
        return self._through_sync(fn, args, kwargs)

    async def _through(self, fn: Callable[..., Awaitable[R]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        # No layer that is not needed: this is on the path of every call.
        def last(call: Call) -> Awaitable[R]:
            if call.attempt == _attempt.get():
                return fn(*args, **kwargs)
            return _numbered(call.attempt, functools.partial(fn, *args, **kwargs))

        call = Call(self.name)
        opened = None if current_scope() is not None else open_scope(Scope())
        try:
            result = await self._led(call, last)
        except BaseException as error:
            call.end(Outcome(error=error))
            raise
        else:
            if call.ends:
                call.end(Outcome(result))
            return result
        finally:
            if opened is not None:
                close_scope(opened)

    def _through_sync(self, fn: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        def last(call: Call) -> R:
            token = _attempt.set(call.attempt)
            try:
                result = fn(*args, **kwargs)
            finally:
                _attempt.reset(token)
            if inspect.iscoroutine(result):
                # It has not run at all: nobody is to count that as a success.
                result.close()
                raise ConfigurationError(
                    f"the plain function that pipeline {self.name!r} calls has returned a coroutine.",
                    "Make it `async def`, so that the pipeline awaits it.",
                )
            return result

        call = Call(self.name)
        opened = None if current_scope() is not None else open_scope(Scope())
        try:
            result = self.run_sync(call, last)
        except BaseException as error:
            call.end(Outcome(error=error))
            raise
        else:
            call.end(Outcome(result))
            return result
        finally:
            if opened is not None:
                close_scope(opened)

    # -- as a decorator -----------------------------------------------------------------------------------------------

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Guard `fn`: a coroutine function, or a plain one where all policies can.

        Raises:
            ConfigurationError: `fn` is a plain function and a policy is only for coroutines, or it is a generator.
        """
        # An object with an async `__call__` is a coroutine function in all but name.
        faces = (fn, getattr(fn, "__call__", None))  # noqa: B004 - not asked whether it can be called, but how
        if any(inspect.isasyncgenfunction(face) or inspect.isgeneratorfunction(face) for face in faces):
            raise ConfigurationError(
                f"{getattr(fn, '__qualname__', repr(fn))} is a generator, whose calls end long after they return.",
                "Guard the function that fetches one item.",
            )
        if any(inspect.iscoroutinefunction(face) for face in faces):
            through = self._through

            @functools.wraps(fn)
            async def guarded(*args: Any, **kwargs: Any) -> Any:
                return await through(cast("Callable[..., Awaitable[Any]]", fn), args, kwargs)

            return cast("Callable[P, R]", guarded)

        for policy in self.policies:
            if not isinstance(policy, SyncPolicy):
                raise self._only_async(policy)

        @functools.wraps(fn)
        def guarded_sync(*args: P.args, **kwargs: P.kwargs) -> R:
            return self._through_sync(fn, args, kwargs)

        return guarded_sync

    def _only_async(self, policy: Policy) -> ConfigurationError:
        return ConfigurationError(
            f"{type(policy).__name__} in pipeline {self.name!r} works with coroutine functions only.",
            "Make the function `async def`, or leave that policy out.",
        )
