"""One owner for start, readiness and stop of everything that runs in this process.

Apps, workers and buses hand their parts to the process's lifecycle, so that SIGTERM is answered once and in one order:
readiness goes red, consumers stop taking messages, what is in hand is finished, connections close, telemetry is flushed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

_log = logging.getLogger("meshkit")

State = Literal["starting", "ready", "draining", "stopped"]


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
        """Take no new work from now on, finish what is in hand within `grace` seconds, give the rest back."""
        ...

    async def close(self) -> None:
        """Let go of connections. Called after `drain`, or alone where `start` failed."""
        ...


class Lifecycle:
    """The parts of a process, started in order and stopped in reverse."""

    def __init__(self) -> None:
        self.state: State = "starting"
        self._parts: list[Part] = []
        self._running: list[Part] = []
        self._last: list[Callable[[], object]] = []

    def add(self, *parts: Part) -> None:
        """Hand over parts, each once; those added later stop first."""
        self._parts.extend(part for part in parts if part not in self._parts)

    def at_last(self, flush: Callable[[], object]) -> None:
        """Have a plain function called in a thread when all parts have closed: flushing telemetry, say."""
        if flush not in self._last:
            self._last.append(flush)

    def checks(self) -> list[Check]:
        """The checks of all parts, and the state of the process itself."""
        own = Check(name="process", ok=self.state == "ready", detail=self.state)
        return [own, *(check for part in self._parts for check in part.checks())]

    @property
    def ready(self) -> bool:
        """Whether the process should be sent work."""
        return all(check.ok for check in self.checks() if check.required)

    async def start(self) -> None:
        """Start the parts in order; if one fails, those that run are closed and its error is raised."""
        self.state = "starting"
        try:
            for part in self._parts:
                if part not in self._running:
                    self._running.append(part)
                    await part.start()
        except BaseException:
            await self._close()
            raise
        self.state = "ready"

    async def stop(self, grace: float = 20.0) -> None:
        """Drain all parts at the same time within `grace` seconds, close them in reverse, then flush.

        Calling it while it runs, or again, does nothing more.
        """
        if self.state in ("draining", "stopped"):
            return
        self.state = "draining"
        results = await asyncio.gather(*(part.drain(grace) for part in self._running), return_exceptions=True)
        for part, result in zip(self._running, results, strict=True):
            if isinstance(result, BaseException):
                _log.error("%s could not be drained", part.name, exc_info=result)
        await self._close()

    async def _close(self) -> None:
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
