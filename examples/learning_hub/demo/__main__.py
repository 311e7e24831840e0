"""The command line of the demo, and what Ctrl-C means at each moment of it.

Everything that takes long to import is imported once the signals are in hand.
"""

from __future__ import annotations

# ruff: noqa: E402
import os
import signal

for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    # Nothing has been started or written yet, so there is nothing to take away.
    signal.signal(_number, lambda number, frame: os._exit(128 + number))

import argparse
import asyncio
import contextlib
import logging
import sys
from collections.abc import Coroutine
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn


class Arguments(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"demo: {message}; --help lists the options\n")


class Interrupts:
    """One owner for SIGINT, SIGTERM and SIGHUP: the first one ends the demo in order, further ones change nothing."""

    def __init__(self) -> None:
        self.code = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self.code = not self.code, self.code or 128 + number
        if first and self._loop is not None and self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)

    def run(self, main: Coroutine[Any, Any, int]) -> int:
        """Run `main` to its end and return its exit code, or that of the signal which cut it short."""

        async def guarded() -> int:
            self._task = asyncio.current_task()
            self._loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, self._on_signal)
            try:
                return await main
            finally:
                self._task = None

        try:
            return asyncio.run(guarded())
        except asyncio.CancelledError:
            return self.code
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(
        prog="./run demo",
        description="A learning platform of five services: an outage, a defect, dead letters and their replay, in a minute.",
        epilog="Ends with exit code 0 where nothing was lost and nothing took effect twice, 1 where something did.",
        allow_abbrev=False,
    )
    parser.add_argument("--once", action="store_true", help="run to the end without waiting for a key")
    parser.add_argument(
        "--json", action="store_true", help="print only the summary on stdout, as JSON; the tale goes to stderr"
    )
    parser.add_argument(
        "--broker",
        default="embedded",
        metavar="URL|local",
        help="a real RabbitMQ: amqp://…, or `local` for an instance of the installed rabbitmq-server",
    )
    parser.add_argument(
        "--otlp", metavar="URL", help="also send the traces to this OTLP/HTTP endpoint: http://localhost:4318"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep databases, logs and raw traces in this empty folder"
    )
    return parser.parse_args(words)


def _hold_closed_streams() -> None:
    """Put /dev/null where stdin, stdout or stderr came closed, so that no file or socket of ours gets their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _give_up_stdout() -> None:
    """What could not be written is not to be complained about by Python once more on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def main() -> int:
    _hold_closed_streams()
    interrupts = Interrupts()
    options = arguments()
    if sys.stdout is None:
        print("demo: cannot write to stdout: it is closed", file=sys.stderr)
        return 1
    # What libraries log about a connection that failed is said again by our own one line.
    for library in ("aio_pika", "aiormq", "meshkit"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        from learning_hub.demo.show import CannotStart, CannotTell, show
    except ModuleNotFoundError as error:
        print(f'demo: {error.name} is not installed; pip install "meshkit-py[demo]" brings it', file=sys.stderr)
        return 2
    try:
        return interrupts.run(show(options))
    except CannotStart as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except CannotTell as error:
        with contextlib.suppress(OSError):
            print(f"demo: {error}", file=sys.stderr)
        _give_up_stdout()
        return 1
    except BrokenPipeError:
        # Whoever read the lines has gone (`| head`).
        _give_up_stdout()
        return 1


if __name__ == "__main__":
    sys.exit(main())
