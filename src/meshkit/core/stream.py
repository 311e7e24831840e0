"""A call whose result comes item by item: what a guarded async generator function returns."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from meshkit.core.call import ATTEMPT, Call, Next, Outcome
from meshkit.core.scope import Scope, close_scope, current_scope, open_scope
from meshkit.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class _Begun:
    """An attempt that has come to its first item, or to its end without one."""

    items: AsyncIterator[Any]
    attempt: int
    first: Any = None
    empty: bool = False


async def _begin(fn: Callable[..., AsyncGenerator[Any, Any]], /, *args: Any, **kwargs: Any) -> _Begun:
    return await _first_of(fn(*args, **kwargs))


async def _first_of(items: AsyncIterator[Any]) -> _Begun:
    try:
        return _Begun(items, ATTEMPT.get(), await anext(items))
    except StopAsyncIteration:
        return _Begun(items, ATTEMPT.get(), empty=True)


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
        self._over = False

    def __repr__(self) -> str:
        return f"<stream of {self._call.name!r}>"

    async def asend(self, value: Any) -> Any:
        if self._begun is None:
            if value is not None:
                raise TypeError("can't send non-None value to a just-started async generator")
            return await self._step(self._start)
        items = self._begun.items
        return await self._step(items.__anext__ if value is None else lambda: items.asend(value))  # type: ignore[attr-defined]

    async def athrow(self, typ: Any, val: Any = None, tb: Any = None) -> Any:
        if self._begun is None or self._over:
            self._over = True
            raise typ if val is None else val
        items = cast("AsyncGenerator[Any, Any]", self._begun.items)
        thrown = (typ,) if val is None and tb is None else (typ, val, tb)
        return await self._step(lambda: items.athrow(*thrown))

    async def aclose(self) -> None:
        begun = self._begun
        if begun is None or self._over:
            self._over = True
            return

        async def close() -> None:
            await _close(begun)
            # Whoever has enough of it says nothing against it.
            self._end(Outcome())

        await self._step(close)

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

    async def _step(self, advance: Callable[[], Awaitable[Any]]) -> Any:
        if self._over:
            raise StopAsyncIteration
        if self._reader is not None:
            raise RuntimeError("this stream is being read already")
        if self._scope is None:
            self._loop = asyncio.get_running_loop()
            self._scope = current_scope() or Scope()
        task = self._reader = asyncio.current_task()
        assert task is not None
        self._cancelling = task.cancelling()
        opened = open_scope(self._scope)
        # The first step numbers its attempts itself.
        attempt = None if self._begun is None else ATTEMPT.set(self._begun.attempt)
        try:
            if self._stopped is not None:
                # Its time was over while nobody read.
                error = self._stopped()
                try:
                    await _close(self._begun)
                finally:
                    self._end(Outcome(error=error))
                raise error
            item = await advance()
            if self._stopped is not None:
                # What is read has outlived the cancellation; the next read will be told.
                task.uncancel()
            return item
        except (StopAsyncIteration, GeneratorExit):
            self._end(Outcome())
            raise
        except asyncio.CancelledError as error:
            late = self._timed_out(task)
            self._end(Outcome(error=late or error))
            if late is not None:
                raise late from None
            raise
        except BaseException as error:
            self._end(Outcome(error=error))
            raise
        finally:
            self._reader = None
            if attempt is not None:
                ATTEMPT.reset(attempt)
            close_scope(opened)

    def _stop(self, make: Callable[[], Exception]) -> None:
        if not self._over and self._stopped is None:
            self._stopped = make
            if self._reader is not None:
                self._reader.cancel()

    def _timed_out(self, task: asyncio.Task[Any]) -> Exception | None:
        """The error of a time that is over, where that and nothing else has cancelled the reader."""
        if self._stopped is not None and task.uncancel() <= self._cancelling:
            return self._stopped()
        return None

    def _end(self, outcome: Outcome) -> None:
        if not self._over:
            self._over = True
            self._call.end(outcome)

    def __del__(self) -> None:
        # Collection may come in the middle of anything, under a policy's lock too: so not here and now.
        if self._begun is not None and not self._over and self._loop is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._call.end, Outcome())
