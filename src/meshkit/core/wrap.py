"""A client whose methods go through a pipeline, and which is otherwise the client.

    prices = meshkit.wrap(PriceClient(url), meshkit.standard("prices"), methods=("quote", "history"))

What stands in front of the client is an object of its own. The client is not changed by it: whoever holds the client
itself calls it without the pipeline, and so does the client when one of its methods calls another.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar, Final, TypeVar, cast

from meshkit.core.explain import nearest
from meshkit.core.pipeline import Pipeline
from meshkit.errors import ConfigurationError

C = TypeVar("C")

# What ends a client is never to be refused or tried again: a connection that a breaker keeps open is a leak.
ENDS: Final = frozenset({"aclose", "close", "disconnect", "shutdown", "stop", "wait_closed"})

# Special methods that make, find and take apart the object itself. All others are the client's.
_OWN: Final = frozenset(
    {
        *("__class__", "__class_getitem__", "__del__", "__delattr__", "__dict__", "__dir__", "__doc__"),
        *("__getattr__", "__getattribute__", "__getnewargs__", "__getnewargs_ex__", "__getstate__", "__init__"),
        *("__init_subclass__", "__module__", "__new__", "__reduce__", "__reduce_ex__", "__repr__", "__set_name__"),
        *("__setattr__", "__setstate__", "__sizeof__", "__slots__", "__subclasshook__", "__weakref__", "__copy__"),
        *(
            "__deepcopy__",
            "__eq__",
            "__ne__",
            "__hash__",
            "__annotate__",
            "__annotate_func__",
            "__annotations__",
            "__instancecheck__",
        ),
        *("__subclasscheck__", "__prepare__", "__mro_entries__", "__get__", "__set__", "__delete__"),
    }
)


def wrap(client: C, pipeline: Pipeline, *, methods: Iterable[str] | None = None, awaitable: Collection[str] = ()) -> C:
    """Guard methods of a client.

    What it returns passes for the client: `isinstance`, attributes, `async with`, iteration, operators; attributes that
    are set on it are set on the client. `async with` and whatever else of the client's special methods answers the
    client itself answer the guarded one. Nothing of the client is patched.

    All methods share the pipeline, and with it the breaker, the budget and the places: it is one thing that they call.
    The name of a call is the pipeline's for the same reason, whatever the method, so that a client is one row of each
    metric.

    Args:
        client: any object.
        pipeline: what its methods go through.
        methods: names of those to guard: coroutine functions, async generator functions, and plain functions where all
            policies can guard one. `None` for all public coroutine methods but those that end the client (`close`,
            `aclose`, `disconnect`, `shutdown`, `stop`, `wait_closed`).
        awaitable: names of plain functions that return something to await, as many clients have them (redis-py's
            commands, gRPC's stubs). They are guarded as coroutine functions, besides `methods`.

    Raises:
        ConfigurationError: a name that the client does not have, one that is no method, one that the pipeline cannot
            guard, or nothing to guard.
    """
    if isinstance(client, type):
        raise ConfigurationError(f"{client.__name__} is a class, and a client is one of its objects.")
    if not isinstance(cast("object", pipeline), Pipeline):
        raise ConfigurationError(
            f"a client is guarded by a pipeline, and {pipeline!r} is none.", 'Write Pipeline("name", policy, …).'
        )
    awaited = _names(awaitable, "awaitable")
    named = _coroutine_methods(client) if methods is None else _names(methods, "methods")
    chosen = tuple(dict.fromkeys((*named, *awaited)))
    if not chosen:
        raise ConfigurationError(
            f"{type(_innermost(client)).__name__} has no public coroutine method to guard.",
            "Name the methods: methods=, or awaitable= for plain functions that return something to await.",
        )
    state = _State(client, pipeline, chosen, frozenset(awaited))
    for name in chosen:
        state.check(name)
    proxy = object.__new__(_proxy_class(type(client)))
    object.__setattr__(proxy, "_meshkit", state)
    return cast("C", proxy)


def _names(given: Iterable[str], what: str) -> tuple[str, ...]:
    names = () if isinstance(given, str) else tuple(given)
    if isinstance(given, str) or not all(isinstance(cast("object", name), str) for name in names):
        raise ConfigurationError(f"{what} is a list of names, not {given!r}.")
    return names


def _coroutine_methods(client: object) -> list[str]:
    found: list[str] = []
    # A proxy has nothing of its own to be found.
    innermost = _innermost(client)
    for name in dir(client):
        if name.startswith("_") or name in ENDS:
            continue
        # Without asking a property, which may do anything.
        static = inspect.getattr_static(innermost, name, None)
        if callable(static) or isinstance(static, staticmethod | classmethod | functools.partialmethod):
            method = getattr(client, name, None)
            if _is(inspect.iscoroutinefunction, method) and not isinstance(method, type):
                found.append(name)
    return found


def _is(question: Callable[[object], bool], method: object) -> bool:
    """Whether a function is such a one, or an object whose call is."""
    return question(method) or question(getattr(method, "__call__", None))  # noqa: B004 - asked how, not whether


class _State:
    """What is behind a proxy: the client, and its guarded methods, made when first asked for."""

    __slots__ = ("_made", "awaited", "client", "methods", "names", "pipeline")

    def __init__(self, client: Any, pipeline: Pipeline, methods: tuple[str, ...], awaited: frozenset[str]) -> None:
        self.client = client
        self.pipeline = pipeline
        self.methods = methods
        self.names = frozenset(methods)
        self.awaited = awaited
        self._made: dict[str, tuple[object, Callable[..., Any]]] = {}

    def check(self, name: str) -> None:
        """Make sure that `name` can be guarded.

        Raises:
            ConfigurationError: it cannot.
        """
        innermost = _innermost(self.client)
        kind = type(innermost).__name__
        try:
            method = getattr(self.client, name)
        except AttributeError as error:
            if inspect.getattr_static(innermost, name, None) is not None:
                # A property that has nothing yet (a client that is not connected): it is asked again at each call.
                return
            known = [known for known in dir(self.client) if not known.startswith("_")]
            raise ConfigurationError(f"{kind} has no method {name!r}.", nearest(name, known)) from error
        if not callable(method):
            raise ConfigurationError(f"{name!r} of {kind} is no method, but {method!r}.")
        self.guarded(name)

    def guarded(self, name: str) -> Callable[..., Any]:
        """The method behind the pipeline, as it is now: a client's attributes may change.

        Raises:
            AttributeError: the client does not have it.
            ConfigurationError: the pipeline cannot guard it.
        """
        method = getattr(self.client, name)
        made = self._made.get(name)
        if made is not None and _same(made[0], method):
            return made[1]
        guarded = self._guard(name, method)
        self._made[name] = (method, guarded)
        return guarded

    def _guard(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        if name in self.awaited:
            pipeline = self.pipeline

            @functools.wraps(method)
            async def guarded(*args: Any, **kwargs: Any) -> Any:
                return await pipeline.call(method, *args, **kwargs)

            made: Callable[..., Any] = guarded
        else:
            if not (_is(inspect.iscoroutinefunction, method) or _is(inspect.isasyncgenfunction, method)):
                self._check_plain(name, method)
            made = self.pipeline(method)
        if not hasattr(method, "__name__"):
            # An object that is called, or a partial.
            made.__name__ = name
        return made

    def _check_plain(self, name: str, method: Callable[..., Any]) -> None:
        inner = inspect.unwrap(method)
        if inspect.isasyncgenfunction(inner) or inspect.isgeneratorfunction(inner):
            raise ConfigurationError(
                f"{name!r} of {type(_innermost(self.client)).__name__} returns a context manager: its call has hardly begun when"
                " it returns.",
                "Guard what is called inside the block.",
            )
        try:
            self.pipeline(method)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{name!r} of {type(_innermost(self.client)).__name__} is a plain function: {error.cause}",
                "Where it returns something to await, name it in awaitable=.",
            ) from error

    def met(self, proxy: object, result: object) -> object:
        """What a special method has answered; the client itself is not handed out past the pipeline."""
        return proxy if result is self.client else result


def _same(one: object, other: object) -> bool:
    # Each access makes a new bound method of the same function.
    return one is other or (type(one) is types.MethodType and type(other) is types.MethodType and one == other)


def _state(proxy: object) -> _State:
    return cast("_State", object.__getattribute__(proxy, "_meshkit"))


class _Proxy:
    """What stands in front of a client. All that it has itself is one slot.

    Python looks for special methods at the class of an object, so there is a class for each class of client, with those
    that it has (`_proxy_class`).
    """

    __slots__ = ("__weakref__", "_meshkit")

    # What is looked up here and not at the client.
    own: ClassVar[frozenset[str]] = frozenset({"__class__", "__reduce_ex__"})

    def __getattribute__(self, name: str) -> Any:
        state = _state(self)
        if name in state.names:
            return state.guarded(name)
        if name in type(self).own:
            return object.__getattribute__(self, name)
        return getattr(state.client, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_state(self).client, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(_state(self).client, name)

    def __dir__(self) -> list[str]:
        return dir(_state(self).client)

    def __repr__(self) -> str:
        state = _state(self)
        return f"<{state.client!r} through pipeline {state.pipeline.name!r}>"

    def __eq__(self, other: object) -> Any:
        return _state(self).client == _unwrapped(other)

    def __ne__(self, other: object) -> Any:
        return _state(self).client != _unwrapped(other)

    def __hash__(self) -> int:
        return hash(_state(self).client)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = _state(self)
        named = tuple(name for name in state.methods if name not in state.awaited)
        return _again, (state.client, state.pipeline, named, tuple(state.awaited))


_classes: weakref.WeakKeyDictionary[type, type[_Proxy]] = weakref.WeakKeyDictionary()


def _proxy_class(kind: type) -> type[_Proxy]:
    known = _classes.get(kind)
    if known is None:
        special = [
            name
            for name in dir(kind)
            if name.startswith("__") and name.endswith("__") and name not in _OWN
            # What it has from `object` does for the proxy too.
            if callable(method := getattr(kind, name, None)) and method is not getattr(object, name, None)
        ]
        space = {
            "__slots__": (),
            "__class__": property(lambda self: _state(self).client.__class__),
            "own": _Proxy.own | frozenset(special),
            **{name: _forward(name) for name in special},
        }
        known = _classes[kind] = type(f"{kind.__name__}ThroughPipeline", (_Proxy,), space)
    return known


def _forward(name: str) -> Callable[..., Any]:
    """A special method that the client answers. Where the answer is the client itself, it is the proxy instead: nobody
    is to come past the pipeline by `async with`."""
    if name == "__aenter__":

        async def entered(self: _Proxy) -> Any:
            return _state(self).met(self, await _special(self, name)())

        return entered
    if name == "__await__":

        def awaited(self: _Proxy) -> Any:
            result = yield from _special(self, name)()
            return _state(self).met(self, result)

        return awaited

    def special(self: _Proxy, *args: Any, **kwargs: Any) -> Any:
        return _state(self).met(self, _special(self, name)(*args, **kwargs))

    return special


def _special(proxy: _Proxy, name: str) -> Callable[..., Any]:
    state = _state(proxy)
    return state.guarded(name) if name in state.names else cast("Callable[..., Any]", getattr(state.client, name))


def _again(client: Any, pipeline: Pipeline, methods: tuple[str, ...], awaitable: tuple[str, ...]) -> Any:
    """What a copy of a proxy is made by: a copy that is guarded too."""
    return wrap(client, pipeline, methods=methods, awaitable=awaitable)


def _unwrapped(value: object) -> object:
    return _state(value).client if issubclass(type(value), _Proxy) else value


def _innermost(client: object) -> object:
    """The client itself, however many pipelines it is behind."""
    while issubclass(type(client), _Proxy):
        client = _unwrapped(client)
    return client
