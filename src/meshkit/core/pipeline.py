"""Policies in order around a call: as something to call, as a decorator, and as one policy more."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, ParamSpec, TypeVar, cast

from meshkit.core.call import (
    ATTEMPT,
    Call,
    Next,
    NextSync,
    Outcome,
    Policy,
    Shortcut,
    SyncPolicy,
    numbered,
)
from meshkit.core.explain import Explanation, Rule, checked_allow, explain, warn
from meshkit.core.scope import Scope, close_scope, current_scope, open_scope
from meshkit.core.stream import Stream
from meshkit.errors import ConfigurationError

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
# Kinds of which one object can be in a pipeline once.
_ONCE: Final = frozenset({"circuit_breaker", "bulkhead"})


def _last(call: Call) -> Awaitable[Any]:
    """The innermost step: what the policies are around."""
    fn, args, kwargs = call.work
    if call.attempt == ATTEMPT.get():
        return cast("Awaitable[Any]", fn(*args, **kwargs))
    return numbered(call.attempt, fn, *args, **kwargs)


def _last_sync(call: Call) -> Any:
    fn, args, kwargs = call.work
    token = ATTEMPT.set(call.attempt)
    try:
        result = fn(*args, **kwargs)
    finally:
        ATTEMPT.reset(token)
    if inspect.iscoroutine(result):
        # It has not run at all: nobody is to count that as a success.
        result.close()
        raise ConfigurationError(
            f"the plain function that pipeline {call.name!r} calls has returned a coroutine.",
            "Make it `async def`, so that the pipeline awaits it.",
        )
    return result


def check_name(name: object, what: str) -> None:
    """Make sure that whatever calls something says what: no metric or log line is of use without.

    Raises:
        ConfigurationError: `name` is no text, or an empty one.
    """
    if not isinstance(name, str) or not name:
        raise ConfigurationError(
            f"{what} begins with the name of what it calls, and {name!r} is none.", 'Name the service: "user-service".'
        )


def _check_function(fn: object) -> None:
    """Make sure that `fn` is a function.

    Raises:
        ConfigurationError: it is something else.
    """
    if isinstance(fn, staticmethod | classmethod):
        kind = type(cast("object", fn)).__name__
        raise ConfigurationError(
            f"{fn!r} is what @{kind} makes of a function, and a pipeline guards the function itself.",
            f"Put @{kind} outermost, above the pipeline.",
        )
    if callable(fn):
        return
    if inspect.isawaitable(fn):
        raise ConfigurationError(
            f"a pipeline guards a function, and {fn!r} is a call of one that was made already.",
            "Give the function itself: pipeline(fn), or await pipeline.call(fn, argument, …).",
        )
    raise ConfigurationError(f"a pipeline guards a function, and {fn!r} is none.")


class Pipeline:
    """Policies in order, outermost first. Itself a policy, a decorator, and something to call.

    Args:
        name: what is called, for events, metrics and errors.
        policies: outermost first.
        allow: findings of `explain()` that are wanted here, each with the reason why. All others are logged as a
            warning when the pipeline is made.

    Raises:
        ConfigurationError: something given is no policy, one that holds state is in it twice, or `allow` names no
            finding.
    """

    __slots__ = ("__weakref__", "_lead", "allow", "name", "policies")

    def __init__(self, name: str, *policies: Policy, allow: Mapping[str, str] = _NOTHING) -> None:
        check_name(name, "a pipeline")
        for policy in policies:
            # A class has the methods of its objects, so it would pass for one of them.
            if isinstance(policy, type) or not isinstance(policy, Policy):
                raise ConfigurationError(
                    f"a pipeline is made of policies, and {policy!r} is none.",
                    "A policy has `async run(call, call_next)` and `describe()`.",
                )
        self.name = name
        self.policies = policies
        self.allow = checked_allow(allow)
        flat = list(self._flat())
        for index, policy in enumerate(flat):
            # A call would be let through by the breaker's only probe and then refused for it; it would wait in the
            # bulkhead for the place that it holds.
            if any(policy is other for other in flat[:index]) and policy.describe().get("kind") in _ONCE:
                raise ConfigurationError(
                    f"{policy!r} is in pipeline {name!r} twice, and would wait for itself.", "Leave one of them out."
                )
        warn(self.explain())
        # What a function is led through is put together once, from the inside out.
        self._lead: Next[Any] = self._linked(_last)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join([repr(self.name), *map(repr, self.policies)])})"

    # -- as a policy --------------------------------------------------------------------------------------------------

    async def run(self, call: Call, call_next: Next[T]) -> T:
        return await self._linked(call_next)(call)

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        step = call_next
        for policy in reversed(self.policies):
            if not isinstance(policy, SyncPolicy):
                raise self._only_async(policy)
            step = functools.partial(policy.run_sync, call_next=step)
        return step(call)

    def describe(self) -> dict[str, object]:
        return {
            "kind": "pipeline",
            "name": self.name,
            "policies": [policy.describe() for policy in self.policies],
            **({"allow": self.allow} if self.allow else {}),
        }

    def explain(self, *rules: Rule) -> Explanation:
        """Order, settings, the most attempts and the longest time of one call, and what works against itself.

        `print` what it returns, or take its `as_dict()`.

        Args:
            rules: further rules, of an edge that knows its protocol (core/explain.py).
        """
        return explain(self.describe(), *rules)

    def _flat(self) -> Iterator[Policy]:
        for policy in self.policies:
            if isinstance(policy, Pipeline):
                yield from policy._flat()
            else:
                yield policy

    def _linked(self, call_next: Next[T]) -> Next[T]:
        step = call_next
        for policy in reversed(self.policies):
            step = functools.partial(policy.run, call_next=step)
        return step

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
        call = Call(self.name, 1, None, None, False, None, (fn, args, kwargs))
        opened = None if current_scope() is not None else open_scope(Scope())
        try:
            result: R = await self._lead(call)
        except BaseException as error:
            if call.ends:
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
        call = Call(self.name, 1, None, None, False, None, (fn, args, kwargs))
        opened = None if current_scope() is not None else open_scope(Scope())
        try:
            result: R = self.run_sync(call, _last_sync)
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
        """Guard `fn`: a coroutine function, an async generator function, or a plain one where all policies can.

        A call of an async generator function ends with its last item, its failure, or when it is closed. Policies that
        repeat or replace a call act only until its first item is handed out.

        Raises:
            ConfigurationError: `fn` is a plain function and a policy is only for coroutines, it is a generator, or it is
                no function.
        """
        _check_function(fn)
        # An object with an async `__call__` is a coroutine function in all but name.
        faces = (fn, getattr(fn, "__call__", None))  # noqa: B004 - not asked whether it can be called, but how
        if any(inspect.isgeneratorfunction(face) for face in faces):
            raise ConfigurationError(
                f"{getattr(fn, '__qualname__', repr(fn))} is a generator, whose calls end long after they return.",
                "Guard the function that fetches one item, or make it an async generator.",
            )
        alone = self.policies[0] if len(self.policies) == 1 else None
        if any(inspect.isasyncgenfunction(face) for face in faces):

            @functools.wraps(fn)
            def guarded_stream(*args: Any, **kwargs: Any) -> Any:
                return Stream(self.name, self._lead, cast("Callable[..., Any]", fn), args, kwargs)

            return cast("Callable[P, R]", guarded_stream)

        if any(inspect.iscoroutinefunction(face) for face in faces):
            through, work = self._through, cast("Callable[..., Awaitable[Any]]", fn)
            if isinstance(alone, Shortcut):
                return cast("Callable[P, R]", functools.wraps(fn)(alone.around(self.name, work)))

            @functools.wraps(fn)
            async def guarded(*args: Any, **kwargs: Any) -> Any:
                return await through(work, args, kwargs)

            return cast("Callable[P, R]", guarded)

        for policy in self.policies:
            if not isinstance(policy, SyncPolicy):
                raise self._only_async(policy)
        if isinstance(alone, Shortcut):
            return functools.wraps(fn)(alone.around_sync(self.name, fn))

        @functools.wraps(fn)
        def guarded_sync(*args: P.args, **kwargs: P.kwargs) -> R:
            return self._through_sync(fn, args, kwargs)

        return guarded_sync

    def _only_async(self, policy: Policy) -> ConfigurationError:
        return ConfigurationError(
            f"{type(policy).__name__} in pipeline {self.name!r} works with coroutine functions only.",
            "Make the function `async def`, or leave that policy out.",
        )
