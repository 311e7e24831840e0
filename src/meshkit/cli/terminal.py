"""What every command has: how it speaks (data on stdout, everything else on stderr), and how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """Ends a command with an exit code after it has said what there is to say."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def say(line: str) -> None:
    """To the person, not into the data."""
    print(line, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """What somebody else has written, so that it cannot steer the terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def show(line: str = "") -> None:
    """Into the data."""
    print(printable(line), flush=True)


def show_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False), flush=True)


def run_to_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run to the end; Ctrl-C and SIGTERM cancel it, so that what it holds is given back."""

    async def guarded() -> T:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            return await coroutine
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
