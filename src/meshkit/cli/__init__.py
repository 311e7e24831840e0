"""The command line: `meshkit …`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys

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
    raise SystemExit(run())
