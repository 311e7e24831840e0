"""Ctrl-C at five moments of the demo, and once while RabbitMQ starts: no process, no port and no file is left behind.

    ./run proof ctrl_c

Each run gets a temporary folder and an environment variable of its own, by which everything that it starts can be found, whoever its
parent is by then. Ctrl-C is what a terminal sends: SIGINT to the whole foreground group, and here a second one right after it. `--leave`
keeps the demo from cleaning up (SIGKILL to the launcher instead), which this has to see.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from meshkit.testing import servers

ROOT = Path(__file__).resolve().parents[1]
MARK = "LEARNING_HUB_PROOF"


@dataclass(slots=True)
class Left:
    """What is still there after the demo has ended."""

    processes: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def marked(mark: str) -> dict[int, str]:
    """The processes that carry the mark in their environment, by id, with their command line."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(folder.name)] = words[:120]
    return found


def listening() -> dict[str, int]:
    """Every port that is listened on, by the inode of its socket."""
    ports = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == "0A":
                    ports[words[9]] = int(words[1].rpartition(":")[2], 16)
    return ports


def ports_of(ids: list[int]) -> set[int]:
    """The ports that these processes listen on."""
    by_inode, found = listening(), set()
    for id_ in ids:
        with contextlib.suppress(OSError):
            for handle in Path(f"/proc/{id_}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(handle)
                    if target.startswith("socket:[") and target[8:-1] in by_inode:
                        found.add(by_inode[target[8:-1]])
    return found


def interrupted(moment: str, options: list[str], line: str, wait: float, *, leave: bool) -> dict[str, object]:
    """Run the demo, interrupt it `wait` seconds after it has told `line`, and look at what is left."""
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="ctrl-c-") as scratch:
        temporary, elsewhere = Path(scratch, "tmp"), Path(scratch, "cwd")
        for folder in (temporary, elsewhere):
            folder.mkdir()
            folder.chmod(0o777)
        Path(scratch).chmod(0o755)
        environment = {**os.environ, MARK: mark, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT / "examples")}
        errors = Path(scratch, "errors")
        with errors.open("wb") as stderr:
            demo = subprocess.Popen(
                [sys.executable, "-m", "learning_hub.demo", "--once", *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=elsewhere,
                env=environment,
                start_new_session=True,
            )
        assert demo.stdout is not None
        try:
            while line and line not in (told := demo.stdout.readline()):
                if not told:
                    raise SystemExit(f"the demo never came to {line!r}: {errors.read_text()}")
            time.sleep(wait)
            ports = ports_of(list(marked(mark)))
            began = time.monotonic()
            if leave:
                os.kill(demo.pid, signal.SIGKILL)
                # What a guard takes away after a SIGKILL is not what is to be shown here.
                ids = marked(mark)
                demo.wait()
                left = Left(processes=list(ids.values()), ports=sorted(ports), files=os.listdir(temporary))
                seconds = time.monotonic() - began
                until = time.monotonic() + 15
                while (marked(mark) or os.listdir(temporary)) and time.monotonic() < until:
                    time.sleep(0.1)
                return {
                    "moment": moment,
                    "exit": demo.returncode,
                    "seconds": round(seconds, 1),
                    "gone_after_a_while": not marked(mark) and not os.listdir(temporary),
                    **_as_dict(left),
                }
            os.killpg(demo.pid, signal.SIGINT)
            time.sleep(0.15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(demo.pid, signal.SIGINT)
            demo.stdout.read()
            demo.wait(timeout=40)
            seconds = time.monotonic() - began
            # A guard that has been told that all is well needs a moment to end.
            until = time.monotonic() + 2
            while marked(mark) and time.monotonic() < until:
                time.sleep(0.05)
            left = Left(
                processes=list(marked(mark).values()),
                ports=sorted(ports & set(listening().values())),
                files=[*os.listdir(temporary), *os.listdir(elsewhere)],
            )
            return {
                "moment": moment,
                "exit": demo.returncode,
                "seconds": round(seconds, 1),
                "had_ports": len(ports),
                "traceback": "Traceback" in errors.read_text(),
                **_as_dict(left),
            }
        finally:
            for id_ in marked(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(id_, signal.SIGKILL)
            demo.wait()
            demo.stdout.close()


def _as_dict(left: Left) -> dict[str, object]:
    return {"processes": left.processes, "ports": left.ports, "files": left.files}


MOMENTS: list[tuple[str, list[str], str, float]] = [
    ("while Python starts", [], "", 0.1),
    ("while the services start", [], "learning hub:", 0.5),
    ("in normal traffic", [], "Act 1", 0.5),
    ("in the outage", [], "pauses", 0.3),
    ("while dead letters are replayed", [], "$ meshkit dlq replay", 0.3),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--leave", action="store_true", help="kill the demo instead, to show that what is left is seen")
    options = parser.parse_args()
    moments = list(MOMENTS)
    if servers.available()["rabbitmq"] is not None:
        moments.append(("while RabbitMQ starts", ["--broker", "local"], "", 3.0))
    runs = []
    for moment, words, line, wait in moments:
        seen = interrupted(moment, words, line, wait, leave=options.leave)
        print(json.dumps(seen), flush=True)
        runs.append(seen)
    clean = [
        run["exit"] == 130 and not (run["processes"] or run["ports"] or run["files"] or run.get("traceback"))
        for run in runs
    ]
    print(json.dumps({"proof": "ctrl_c", "moments": len(runs), "clean": sum(clean)}))
    return 0 if all(clean) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
