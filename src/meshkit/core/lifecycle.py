"""One owner for start, readiness and stop of everything that runs in this process.

Apps, workers and buses hand their parts to a lifecycle, so that SIGTERM is answered once and in one order: readiness
goes red, parts take no new work and finish what is in hand, the app's own shutdown runs while connections are still up,
connections close, telemetry is flushed.

    starting ──start()──▶ ready ──drain()──▶ draining ──close()──▶ stopped ──start()──▶ …
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from meshkit.core.clock import SYSTEM_CLOCK, Clock

_log = logging.getLogger("meshkit")

State = Literal["starting", "ready", "draining", "stopped"]
Probe = Literal["live", "ready", "started"]

# A part is told its grace and keeps to it; one that does not is cancelled so much later.
_OVERTIME = 1.0
# Closing has no grace of its own: a connection that does not close within so many seconds is left to the end of the
# process.
_CLOSE_WITHIN = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of a health answer. Where `required`, a failed one makes the process not ready."""

    name: str
    ok: bool
    detail: str = ""
    required: bool = True


class Part(Protocol):
    """Something that runs for as long as the process serves: a bus, an outbox relay."""

    @property
    def name(self) -> str:
        """What health answers and logs call it."""
        ...

    async def start(self) -> None:
        """Begin to work. Returns once it does; a broker that is away at the start is waited for in the background,
        with a red check."""
        ...

    def checks(self) -> Sequence[Check]:
        """What is to be said about readiness, now, without waiting for anything."""
        ...

    async def drain(self, grace: float) -> None:
        """Take no new work from now on, finish what is in hand within `grace` seconds, give the rest back.

        What others need of this part goes on until `close`: requests that are still being answered may publish."""
        ...

    async def close(self) -> None:
        """Let go of connections. Called after `drain`, or alone where `start` failed."""
        ...


@runtime_checkable
class Connects(Protocol):
    """What a part may have besides: a first step of its start, after which others can use it, without its taking work.

    An app's own startup runs between `connect` and `start`: after the connections are up, so that it can publish, and
    before the first message, so that handlers find what it has made.
    """

    async def connect(self) -> None:
        """Be of use to others. `start` does this too, where it has not been done."""
        ...


class Lifecycle:
    """The parts of a process, started in order and stopped in reverse.

    Args:
        clock: where the time comes from.

    Attributes:
        state: starting, ready, draining or stopped.
        started: whether it has been ready since it was last started.
    """

    def __init__(self, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.state: State = "starting"
        self.started = False
        self._clock = clock
        self._parts: list[Part] = []
        self._running: list[Part] = []
        self._begun: list[Part] = []
        self._last: list[Callable[[], object]] = []
        self._draining: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        # Held while parts start or begin: who is told to stop meanwhile waits for the part whose turn it is.
        self._turn = asyncio.Lock()

    def add(self, *parts: Part) -> None:
        """Hand over parts, each once; those added later stop first. On a process that runs, `start` has them run too."""
        for part in parts:
            if not _in(part, self._parts):
                self._parts.append(part)

    def at_last(self, flush: Callable[[], object]) -> None:
        """Have a plain function called in a thread when all parts have closed."""
        if flush not in self._last:
            self._last.append(flush)

    # -- what is known ------------------------------------------------------------------------------------------------

    def checks(self) -> list[Check]:
        """The checks of all parts, and the state of the process itself."""
        own = Check(name="process", ok=self.state == "ready", detail=self.state)
        return [own, *(check for part in self._parts for check in part.checks())]

    @property
    def ready(self) -> bool:
        """Whether the process should be sent work."""
        return all(check.ok for check in self.checks() if check.required)

    def health(self, probe: Probe) -> tuple[int, dict[str, object]]:
        """Status code and body of a health answer (the form is that of MicroProfile Health).

        `live` says that the event loop turns, and asks nobody outside: a process is not to be killed because its broker
        is away. `started` stays as it is once the start is over. `ready` is all checks; a check that itself fails is a
        defect, so 500.
        """
        if probe == "live":
            return 200, {"status": "UP", "checks": []}
        if probe == "started":
            return (200, {"status": "UP", "checks": []}) if self.started else (503, {"status": "DOWN", "checks": []})
        try:
            checks = self.checks()
        except Exception:
            _log.exception("a readiness check failed")
            return 500, {"status": "DOWN", "checks": []}
        up = all(check.ok for check in checks if check.required)
        lines: list[dict[str, object]] = []
        for check in checks:
            line: dict[str, object] = {"name": check.name, "status": "UP" if check.ok else "DOWN"}
            data: dict[str, object] = {}
            if check.detail:
                data["detail"] = check.detail
            if not check.required:
                data["required"] = False
            if data:
                line["data"] = data
            lines.append(line)
        return (200 if up else 503), {"status": "UP" if up else "DOWN", "checks": lines}

    # -- start --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the parts in order and have them take work: `open` and `begin` in one."""
        await self.open()
        await self.begin()

    async def open(self) -> None:
        """Start the parts in order, those that can only as far as `connect`; if one fails, those that run are closed and
        its error is raised.

        On a process that is ready, it starts the parts that were added since.
        """
        if self._closing is not None:
            await asyncio.shield(self._closing)
        if self.state != "ready":
            self.state = "starting"
            self.started = False
            self._draining = self._closing = None
            # A lock belongs to the event loop it was first waited for in, and a lifecycle may be started in another.
            self._turn = asyncio.Lock()
        try:
            async with self._turn:
                for part in [part for part in self._parts if not _in(part, self._running)]:
                    if self._stopping:
                        break
                    self._running.append(part)
                    await (part.connect() if isinstance(part, Connects) else part.start())
        except BaseException:
            await self.close()
            raise

    async def begin(self) -> None:
        """Start those parts that have only been connected; then this process is ready.

        Where it was told to stop meanwhile, no further part starts.
        """
        try:
            async with self._turn:
                for part in [part for part in self._running if not _in(part, self._begun)]:
                    if self._stopping:
                        break
                    self._begun.append(part)
                    if isinstance(part, Connects):
                        await part.start()
        except BaseException:
            await self.close()
            raise
        self.started = True
        if self.state == "starting":
            self.state = "ready"

    @property
    def _stopping(self) -> bool:
        return self.state in ("draining", "stopped")

    # -- stop ---------------------------------------------------------------------------------------------------------

    async def stop(self, grace: float = 20.0) -> None:
        """Drain all parts within `grace` seconds, close them in reverse, then flush: `drain` and `close` in one."""
        try:
            await self.drain(grace)
        finally:
            await self.close()

    async def drain(self, grace: float = 20.0) -> None:
        """Be not ready from now on, and drain all parts at the same time within `grace` seconds.

        Calling it while it runs waits for the same end; calling it again does nothing more.
        """
        if self.state == "stopped":
            return
        if self._draining is None:
            self.state = "draining"
            self._draining = asyncio.create_task(self._drain(grace), name="meshkit drain")
        await asyncio.shield(self._draining)

    async def _drain(self, grace: float) -> None:
        async with self._turn:
            parts = list(self._running)
        await self._finished([(part, part.drain(grace)) for part in parts], grace + _OVERTIME, "drain")

    async def close(self) -> None:
        """Close the parts that run in reverse order, then flush. An error of one keeps no other from closing.

        It ends a `drain` that is under way. Calling it while it runs waits for the same end.
        """
        if self.state == "stopped":
            return
        if self._closing is None:
            self.state = "draining"
            self._closing = asyncio.create_task(self._close(), name="meshkit close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._draining is not None and not self._draining.done():
            self._draining.cancel()
            await asyncio.gather(self._draining, return_exceptions=True)
        async with self._turn:
            while self._running:
                part = self._running.pop()
                await self._finished([(part, part.close())], _CLOSE_WITHIN, "close")
            self._begun.clear()
        for flush in self._last:
            try:
                await asyncio.to_thread(flush)
            except Exception:
                _log.exception("a last flush failed")
        self.state = "stopped"

    async def _finished(self, work: list[tuple[Part, Coroutine[Any, Any, None]]], seconds: float, what: str) -> None:
        """Wait for `work`. What takes longer than `seconds` is cancelled, and given up on where it does not heed that."""
        tasks = {asyncio.create_task(doing, name=f"{what} {part.name}"): part for part, doing in work}
        done: asyncio.Future[Any] = asyncio.gather(*tasks, return_exceptions=True)
        given_up: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        now = self._clock.now()
        timers = (
            self._clock.call_at(now + seconds, lambda: [task.cancel() for task in tasks]),
            self._clock.call_at(now + seconds + _OVERTIME, given_up.cancel),
        )
        try:
            await asyncio.wait([done, given_up], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            done.cancel()
            await asyncio.gather(done, return_exceptions=True)
            raise
        finally:
            for timer in timers:
                timer.cancel()
            given_up.cancel()
        for task, part in tasks.items():
            if not task.done() or task.cancelled():
                _log.error("%s took longer than %g s to %s", part.name, seconds, what)
            elif (error := task.exception()) is not None:
                _log.error("%s failed to %s", part.name, what, exc_info=error)


def _in(part: Part, parts: list[Part]) -> bool:
    return any(part is known for known in parts)
