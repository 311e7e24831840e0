"""The command line: `meshkit …`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import logging
import sys
from io import TextIOWrapper

from meshkit.errors import missing_extra


def main() -> None:
    """Entry point of the `meshkit` command."""
    try:
        from meshkit.cli.app import run
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.stderr.write(f"{missing_extra('demo', 'typer')}\n")
        raise SystemExit(2) from None
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a letter shows its number.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # What these log about a connection that failed is said by one line of our own.
    for name in ("meshkit.rabbitmq", "aiormq", "aio_pika"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    raise SystemExit(run())
