"""One run of the demo, as these tests look at it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshkit.embedded.otlp import SpanRecord, read_recorded

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """What one run of the demo printed, how it ended, and the raw traces it kept."""

    code: int
    stdout: str
    tale: str
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.stdout)
        return found

    @property
    def spans(self) -> list[SpanRecord]:
        return read_recorded(self.folder / "traces")

    def trace(self, key: str) -> list[SpanRecord]:
        """The spans of the trace that the summary names under `key`, oldest first."""
        spans = [span for span in self.spans if span.trace_id == self.summary[key]]
        return sorted(spans, key=lambda span: span.start)


def demo(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the demo as `./run demo` does."""
    return subprocess.run(
        [sys.executable, "-m", "learning_hub.demo", *options],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "examples"), **environment},
        timeout=170,
    )


def keep(folder: Path, *options: str) -> Run:
    """Run it to its end, with what it leaves behind in `folder`."""
    done = demo("--once", "--json", "--keep", str(folder), *options)
    return Run(code=done.returncode, stdout=done.stdout, tale=done.stderr, folder=folder)
