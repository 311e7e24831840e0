"""`./run proof NAME [arguments]`; without NAME, the list.

A proof runs as a process of its own, and what it prints is passed on as it comes. This looks at one thing only: that a proof which says
it has shown its claim (exit code 0) has ended with a summary.
"""

from __future__ import annotations

import ast
import json
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import proofs


def names() -> list[str]:
    """Every proof: each file or package of this folder whose name does not begin with an underscore."""
    return sorted(module.name for module in pkgutil.iter_modules(proofs.__path__) if not module.name.startswith("_"))


def source(name: str) -> ast.Module:
    """A proof's code, read without running it."""
    file = Path(proofs.__path__[0]) / f"{name}.py"
    return ast.parse((file if file.exists() else file.with_suffix("") / "__main__.py").read_text())


def claim(name: str) -> str:
    """The first line of a proof's docstring."""
    return (ast.get_docstring(source(name)) or "").partition("\n")[0]


def _is_summary(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def main(arguments: list[str]) -> int:
    if not arguments:
        for name in names():
            print(f"{name:16} {claim(name)}")
        return 0
    name, *rest = arguments
    # A file's name cannot hold the hyphen that a command line likes.
    module = name.replace("-", "_")
    if module not in names():
        known = ", ".join(names()) or "none yet"
        print(f"proof: there is no proof {name!r}; there are: {known}", file=sys.stderr)
        return 2
    process = subprocess.Popen([sys.executable, "-m", f"proofs.{module}", *rest], stdout=subprocess.PIPE, text=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    last = ""
    try:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    except KeyboardInterrupt:
        # The terminal has told the proof too; it takes away what it started.
        process.wait()
        return 130
    code = process.wait()
    # Who asks for help is told nothing that could be shown.
    if code == 0 and not _is_summary(last) and not {"-h", "--help"}.intersection(rest):
        print(
            "proof: it ended with exit code 0 and without its summary as JSON in the last line, so it counts as not shown",
            file=sys.stderr,
        )
        return 1
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
