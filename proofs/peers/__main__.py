"""Runs the test suite of aio-pika against RabbitMQ and against the embedded server, and compares them test by test.

    ./run proof peers --aio-pika PATH      # PATH: a checkout of github.com/mosquito/aio-pika

Shows that each test that passes on RabbitMQ passes on `meshkit.embedded`, those of AMQP transactions (`tx.*`) excepted,
which the embedded server refuses. Exit code 0 only then; the last line on stdout is the summary as JSON. The suite is
copied, and in the copy one file is replaced: the one that would start RabbitMQ in Docker. Tests of TLS are left out.

A test that passes on RabbitMQ and fails here is run twice more on both brokers: what fails on RabbitMQ too in one of
these runs is counted as `unsteady`, for the suite has tests that depend on the garbage collector and on timing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from meshkit.embedded import run_in_thread
from meshkit.testing import servers

HERE = Path(__file__).resolve().parent
PACKAGES = ["aiomisc>=18", "aiomisc-pytest", "pytest", "shortuuid", "timeout-decorator"]
LEFT_OUT = ["test_amqps.py"]

Results = dict[str, str]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the suite's surroundings -----------------------------------------------------------------------------------------


def environment(folder: Path, client: str) -> Path:
    """The interpreter of an environment with the suite's needs and one aio-pika, made where it is not there yet."""
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        say(f"peers: making an environment in {folder}")
        venv.create(folder, with_pip=True)
    installed = folder / ".installed"
    wanted = json.dumps([client, *PACKAGES])
    if not installed.exists() or installed.read_text() != wanted:
        subprocess.run([python, "-m", "pip", "install", "-q", client, *PACKAGES], check=True, stdout=sys.stderr)
        installed.write_text(wanted)
    return python


def copy_suite(checkout: Path, folder: Path) -> None:
    """The tests alone, so that the client is the one that is installed and not the checkout's."""
    shutil.copytree(checkout / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "docker_client.py", folder / "tests" / "docker_client.py")
    for name in LEFT_OUT:
        (folder / "tests" / name).unlink(missing_ok=True)


def transactional(folder: Path) -> set[str]:
    """The names of the test functions that use `tx.*`, found by what they call; other files inherit them."""
    found = set()
    for path in sorted((folder / "tests").glob("test_*.py")):
        for block in re.split(r"\n(?=\s*(?:async )?def )", path.read_text()):
            name = re.match(r"\s*(?:async )?def (test_\w+)", block)
            if name and re.search(r"\.transaction\(|\btx_", block):
                found.add(name[1])
    return found


# --- runs -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def broker(name: str) -> Iterator[int]:
    """The port of a fresh broker."""
    if name == "embedded":
        with run_in_thread() as server:
            yield server.port
    else:
        with servers.rabbitmq() as server:
            yield server.port


def run(python: Path, folder: Path, name: str, tests: list[str], timeout: float) -> Results:
    """Run the suite, or some of its tests, on one broker: the outcome of each test by its id."""
    report = folder / f"{name}.xml"
    report.unlink(missing_ok=True)
    started = time.monotonic()
    with broker(name) as port:
        command: list[str | Path] = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", f"--junitxml={report}"]  # fmt: skip
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "PYTHON"))}
        subprocess.run(
            [*command, *(tests or ["tests"])],
            cwd=folder,
            env={**clean, "MESHKIT_PEERS_PORT": str(port)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )
    results: Results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        path = (case.get("classname") or "").split(".")
        file = "/".join(path[:2]) + ".py"
        test = "::".join([file, *path[2:], case.get("name") or ""])
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        # A test whose teardown fails too is reported twice; the worse outcome is the test's.
        if results.get(test, "passed") in ("passed", "skipped"):
            results[test] = {"failure": "failed"}.get(outcome, outcome)
    say(f"peers: {name}: {dict(Counter(results.values()))} in {time.monotonic() - started:.0f} s")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run proof peers", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--aio-pika", type=Path, required=True, metavar="PATH", help="a checkout of aio-pika")
    parser.add_argument("--env", type=Path, metavar="FOLDER", help="environment for the suite, kept for the next run")
    parser.add_argument("--client", help="what pip installs as client; default: the aio-pika that meshkit uses here")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for one run of the suite")
    parser.add_argument("tests", nargs="*", help="only these tests, as pytest names them (tests/test_amqp.py::…)")
    options = parser.parse_args()
    if not (options.aio_pika / "tests" / "conftest.py").exists():
        say(f"peers: {options.aio_pika} is no checkout of aio-pika: it has no tests/conftest.py")
        return 2
    if servers.available()["rabbitmq"] is None:
        say("peers: rabbitmq is not installed; ./run servers installs it")
        return 2
    with tempfile.TemporaryDirectory(prefix="meshkit-peers-") as scratch:
        folder = Path(scratch)
        client = options.client or f"aio-pika=={metadata.version('aio-pika')}"
        python = environment(options.env or folder / "env", client)
        copy_suite(options.aio_pika, folder)
        return compare(python, folder, client, options.tests, options.timeout)


def compare(python: Path, folder: Path, client: str, tests: list[str], timeout: float) -> int:
    real = run(python, folder, "rabbitmq", tests, timeout)
    ours = run(python, folder, "embedded", tests, timeout)
    passed = {test for test, outcome in real.items() if outcome == "passed"}
    worse = sorted(test for test in passed if ours.get(test) != "passed")
    about_tx = transactional(folder)

    def is_tx(test: str) -> bool:
        return test.split("::")[-1].split("[")[0] in about_tx

    transactions = [test for test in worse if is_tx(test)]
    suspects = [test for test in worse if not is_tx(test)]
    unsteady = []
    for _ in range(2):
        if suspects:
            again_real = run(python, folder, "rabbitmq", suspects, timeout)
            again_ours = run(python, folder, "embedded", suspects, timeout)
            steady = [t for t in suspects if again_ours.get(t) != "passed" and again_real.get(t) == "passed"]
            unsteady += [test for test in suspects if test not in steady]
            suspects = steady
    for title, names in (
        ("passed on RabbitMQ, failed on the embedded server", suspects),
        ("unsteady on one broker or both", unsteady),
        ("transactions, which the embedded server refuses", transactions),
        ("failed on RabbitMQ", sorted(test for test, outcome in real.items() if outcome in ("failed", "error"))),
    ):
        print(f"{title}: {len(names)}")
        for name in names:
            print(f"  {name}: rabbitmq {real.get(name)}, embedded {ours.get(name)}")
    summary = {
        "proof": "peers",
        "client": client,
        "rabbitmq": dict(Counter(real.values())),
        "embedded": dict(Counter(ours.values())),
        "worse": suspects,
        "unsteady": unsteady,
        "transactions": transactions,
        "passed": not suspects and bool(passed),
    }
    print(json.dumps(summary))
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
