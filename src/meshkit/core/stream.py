"""A call whose result comes item by item: what a guarded async generator function returns."""

from __future__ import annotations

import asyncio
import functools
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from meshkit.core.call import ATTEMPT, Call, Next, Outcome, leave_attempt
from meshkit.core.scope import Scope, close_scope, current_scope, open_scope
from meshkit.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class _Begun:
    """An attempt that has come to its first item, or to its end without one."""

    items: AsyncIterator[Any]
    attempt: int
    # As the policies around it have left it for what runs inside: with an earlier deadline, it may be.
    scope: Scope | None
    first: Any = None
    empty: bool = False


async def _begin(fn: Callable[..., AsyncGenerator[Any, Any]], /, *args: Any, **kwargs: Any) -> _Begun:
    return await _first_of(fn(*args, **kwargs))


async def _first_of(items: AsyncIterator[Any]) -> _Begun:
    try:
        return _Begun(items, ATTEMPT.get(), current_scope(), await anext(items))
    except StopAsyncIteration:
        return _Begun(items, ATTEMPT.get(), current_scope(), empty=True)


async def _close(begun: object) -> None:
    close = getattr(begun.items, "aclose", None) if isinstance(begun, _Begun) else None
    if close is not None:
        await close()


class Stream(AsyncGenerator[Any, Any]):
    """Items that come through policies: an async generator whose call ends with its last item, its failure, its close,
    or its collection.

    Policies run until the first item is there; retries and fallbacks therefore act before anything is handed out.
    What holds a place (a breaker's probe, a bulkhead) holds it until the end, and a timeout reaches up to it.
    """

    def __init__(
        self, name: str, lead: Next[Any], fn: Callable[..., AsyncGenerator[Any, Any]], args: Any, kwargs: Any
    ) -> None:
        # Whatever is on the loop for this call (a timer, say) must not keep the stream itself alive.
        myself = weakref.ref(self)

        def stop(make: Callable[[], Exception]) -> None:
            stream = myself()
            if stream is not None:
                stream._stop(make)

        self._call = Call(name, discard=_close, stop=stop, work=(functools.partial(_begin, fn), args, kwargs))
        self._lead = lead
        self._begun: _Begun | None = None
        self._scope: Scope | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reader: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._stopped: Callable[[], Exception] | None = None
        # Whether we have cancelled the reader.
        self._stopping = False
        self._over = False

    def __repr__(self) -> str:
        return f"<stream of {self._call.name!r}>"

    async def asend(self, value: Any) -> Any:
        if self._begun is None:
            if value is not None:
                raise TypeError("can't send non-None value to a just-started async generator")
            return await self._step(self._start)
        if value is None:
            return await self._step(self._begun.items.__anext__)
        send = cast("AsyncGenerator[Any, Any]", self._begun.items).asend
        return await self._step(lambda: send(value))

    async def athrow(self, typ: Any, val: Any = None, tb: Any = None) -> Any:
        self._check_free()
        if self._begun is None or self._over:
            self._over = True
            raise typ if val is None else val
        throw = cast("Callable[..., Awaitable[Any]]", cast("AsyncGenerator[Any, Any]", self._begun.items).athrow)
        thrown = (typ,) if val is None and tb is None else (typ, val, tb)
        return await self._step(lambda: throw(*thrown))

    async def aclose(self) -> None:
        self._check_free()
        begun = self._begun
        if begun is None or self._over:
            self._over = True
            return

        async def close() -> None:
            await _close(begun)
            self._end(_left(self._stopped))

        await self._step(close, closing=True)

    async def _start(self) -> Any:
        begun = await self._lead(self._call)
        if not isinstance(begun, _Begun):
            # A fallback has answered.
            if not hasattr(begun, "__aiter__"):
                raise ConfigurationError(
                    f"what stands in for the items of {self._call.name!r} is {begun!r}.",
                    "Answer a call of an async generator with an async iterable.",
                )
            begun = await _first_of(aiter(begun))
        self._begun = begun
        if begun.empty:
            raise StopAsyncIteration
        return begun.first

    def _check_free(self) -> None:
        if self._reader is not None:
            raise RuntimeError("this stream is being read already")

    async def _step(self, advance: Callable[[], Awaitable[Any]], *, closing: bool = False) -> Any:
        self._check_free()
        if self._over:
            raise StopAsyncIteration
        if self._scope is None:
            self._scope = current_scope() or Scope()
        self._loop = asyncio.get_running_loop()
        # Not as a local variable: the task may end with our error, which holds its traceback, and that this frame.
        self._reader = asyncio.current_task(self._loop)
        assert self._reader is not None
        self._cancelling = self._reader.cancelling()
        begun = self._begun
        # The first step numbers its attempts itself, and narrows its scope.
        opened = open_scope(self._scope if begun is None else begun.scope or self._scope)
        attempt = None if begun is None else ATTEMPT.set(begun.attempt)
        try:
            try:
                if self._stopped is not None and not closing:
                    await self._end_late(self._stopped)
                return await advance()
            except asyncio.CancelledError:
                if self._let_go() and self._stopped is not None:
                    raise self._stopped() from None
                raise
            finally:
                # What is read may have outlived our cancellation: then the next read is told.
                self._let_go()
        except StopAsyncIteration:
            self._end(Outcome())
            raise
        except BaseException as error:
            # GeneratorExit too: whoever lets go of a step in the middle says nothing of what is called.
            self._end(Outcome(error=error))
            raise
        finally:
            self._reader = None
            if attempt is not None:
                leave_attempt(attempt)
            close_scope(opened)

    async def _end_late(self, make: Callable[[], Exception]) -> None:
        """Close what was stopped while nobody read, and raise."""
        error = make()
        # It will hold its traceback, and that this stream.
        self._stopped = None
        try:
            try:
                await _close(self._begun)
            finally:
                self._end(Outcome(error=error))
            raise error
        finally:
            # It holds its traceback, and that this frame.
            del error, make

    def _stop(self, make: Callable[[], Exception]) -> None:
        if self._over or self._stopped is not None:
            return
        if self._reader is not None:
            self._stopped = make
            self._stopping = True
            self._reader.cancel()
            return
        # Nobody reads, and perhaps nobody will: the call is over now, and what it holds is there for others. Whoever
        # reads on is told, and the generator closed.
        error = make()
        self._stopped = lambda: error
        self._call.end(Outcome(error=error))

    def _let_go(self) -> bool:
        """Take back our cancellation of the reader. Whether there was one, and nobody else has cancelled it besides."""
        if not self._stopping or self._reader is None:
            return False
        self._stopping = False
        return self._reader.uncancel() <= self._cancelling

    def _end(self, outcome: Outcome) -> None:
        if not self._over:
            self._over = True
            self._call.end(outcome)

    def __del__(self) -> None:
        if self._begun is None or self._over or self._loop is None:
            return
        try:
            # Collection may come in the middle of anything: so not here and now, but in a turn of its own.
            self._loop.call_soon_threadsafe(_drop, self._call, self._stopped)
        except RuntimeError:
            # The loop was closed, and a place that is held there may be one that others wait for. Policies bear it: what
            # they do at the end of a call may come in between their own steps.
            _drop(self._call, self._stopped)


def _left(stopped: Callable[[], Exception] | None) -> Outcome:
    """What becomes of a stream that nobody reads on. Whoever has enough of it says nothing against it."""
    return Outcome() if stopped is None else Outcome(error=stopped())


def _drop(call: Call, stopped: Callable[[], Exception] | None) -> None:
    call.end(_left(stopped))
