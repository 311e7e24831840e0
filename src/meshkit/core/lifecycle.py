"""One owner for start, readiness and stop of everything that runs in this process.

Apps, workers and buses hand their parts to a lifecycle, so that SIGTERM is answered once and in one order: readiness
goes red, parts take no new work and finish what is in hand, the app's own shutdown runs while connections are still up,
connections close, telemetry is flushed.

    starting ──start()──▶ ready ──drain()──▶ draining ──close()──▶ stopped ──start()──▶ …
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from meshkit.core.clock import SYSTEM_CLOCK, Clock

_log = logging.getLogger("meshkit")

State = Literal["starting", "ready", "draining", "stopped"]
Probe = Literal["live", "ready", "started"]

# A part is told its grace and keeps to it; one that does not is cancelled so much later.
_OVERTIME = 1.0


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
        self._last: list[Callable[[], object]] = []
        self._draining: asyncio.Task[None] | None = None

    def add(self, *parts: Part) -> None:
        """Hand over parts, each once; those added later stop first."""
        self._parts.extend(part for part in parts if not any(part is known for known in self._parts))

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
        its error is raised."""
        self.state = "starting"
        self.started = False
        self._draining = None
        try:
            for part in self._parts:
                if not any(part is running for running in self._running):
                    self._running.append(part)
                    await (part.connect() if isinstance(part, Connects) else part.start())
        except BaseException:
            await self.close()
            raise

    async def begin(self) -> None:
        """Start those parts that have only been connected; then this process is ready."""
        try:
            for part in self._running:
                if isinstance(part, Connects):
                    await part.start()
        except BaseException:
            await self.close()
            raise
        self.started = True
        # A signal may have come meanwhile.
        if self.state == "starting":
            self.state = "ready"

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
        tasks = {asyncio.create_task(part.drain(grace), name=f"drain {part.name}"): part for part in self._running}
        late = self._clock.call_at(self._clock.now() + grace + _OVERTIME, lambda: [task.cancel() for task in tasks])
        try:
            results = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            late.cancel()
        for part, result in zip(tasks.values(), results, strict=True):
            if isinstance(result, asyncio.CancelledError):
                _log.error("%s did not drain within %g s", part.name, grace)
            elif isinstance(result, BaseException):
                _log.error("%s could not be drained", part.name, exc_info=result)

    async def close(self) -> None:
        """Close the parts that run in reverse order, then flush. An error of one keeps no other from closing."""
        if self.state == "stopped":
            return
        self.state = "draining"
        while self._running:
            part = self._running.pop()
            try:
                await part.close()
            except Exception:
                _log.exception("%s could not be closed", part.name)
        for flush in self._last:
            try:
                await asyncio.to_thread(flush)
            except Exception:
                _log.exception("a last flush failed")
        self.state = "stopped"
