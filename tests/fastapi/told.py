"""A part of a lifecycle for tests to look at."""

from __future__ import annotations

from collections.abc import Sequence

from meshkit.core.lifecycle import Check


class Told:
    """A part that writes down what it is told."""

    def __init__(self, name: str, told: list[str], *, fails: str = "", checks: Sequence[Check] = ()) -> None:
        self.name = name
        self._told = told
        self._fails = fails
        self._checks = checks

    def _note(self, what: str) -> None:
        self._told.append(f"{self.name} {what}")
        if what == self._fails:
            raise OSError(f"{self.name} cannot {what}")

    async def connect(self) -> None:
        self._note("connect")

    async def start(self) -> None:
        self._note("start")

    def checks(self) -> Sequence[Check]:
        return self._checks

    async def drain(self, grace: float) -> None:
        self._note("drain")

    async def close(self) -> None:
        self._note("close")
