"""A process without a web app: its page, its start and its stop."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import meshkit.worker
from meshkit.core.lifecycle import Check
from meshkit.errors import ConfigurationError, MeshkitError
from meshkit.testing.clock import ManualClock


class Told:
    """A part that writes down what it is told, and waits at `hold` in the step of that name."""

    def __init__(self, told: list[str], *, hold: str = "", checks: Sequence[Check] = ()) -> None:
        self.name = "bus"
        self._told = told
        self._hold = hold
        self._checks = checks
        self.held = asyncio.Event()

    async def _note(self, what: str) -> None:
        self._told.append(what)
        if what == self._hold:
            self.held.set()
            await asyncio.Event().wait()

    async def start(self) -> None:
        await self._note("start")

    def checks(self) -> Sequence[Check]:
        return self._checks

    async def drain(self, grace: float) -> None:
        await self._note("drain")

    async def close(self) -> None:
        await self._note("close")


class Running:
    """A worker that runs beside the test."""

    def __init__(self, *parts: Told, clock: ManualClock | None = None, grace: float = 20.0) -> None:
        self.stop = asyncio.Event()
        self._at: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(
            meshkit.worker.serve(
                *parts,
                service="mailer",
                port=0,
                grace=grace,
                stop=self.stop,
                on_ready=lambda host, port: self._at.set_result(port),
                clock=clock or ManualClock(),
            )
        )

    async def ask(self, text: str) -> tuple[int, dict[str, str], str]:
        """Status, headers and body of the answer to a raw request."""
        reader, writer = await asyncio.open_connection("127.0.0.1", await self._at)
        writer.write(text.replace("\n", "\r\n").encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        first, *lines = head.split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return int(first.split()[1]), headers, body

    async def end(self) -> None:
        self.stop.set()
        await self._task

    async def port(self) -> int:
        return await self._at


async def test_parts_run_until_it_stops() -> None:
    """Started in order, drained and closed at the end."""
    told: list[str] = []
    worker = Running(Told(told))
    await worker.port()
    assert ["start"] == told
    await worker.end()
    assert ["start", "drain", "close"] == told


async def test_the_page_answers_metrics_and_health() -> None:
    """What a scraper and an orchestrator ask, in the form that they ask for."""
    worker = Running(Told([], checks=[Check(name="broker", ok=False, detail="away")]))
    status, headers, body = await worker.ask("GET /metrics HTTP/1.1\nAccept: application/openmetrics-text\n\n")
    assert (200, True) == (status, body.endswith("# EOF\n"))
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert str(len(body.encode())) == headers["content-length"]
    status, _, body = await worker.ask("GET /health/ready?verbose=1 HTTP/1.1\nHost: a\n\n")
    assert (503, "DOWN") == (status, json.loads(body)["status"])
    assert {"name": "broker", "status": "DOWN", "data": {"detail": "away"}} in json.loads(body)["checks"]
    assert 200 == (await worker.ask("GET /health/live HTTP/1.0\n\n"))[0]
    assert 200 == (await worker.ask("GET /health/started HTTP/1.1\n\n"))[0]
    assert (200, "") == ((head := await worker.ask("HEAD /metrics HTTP/1.1\n\n"))[0], head[2])
    await worker.end()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("GET /other HTTP/1.1\n\n", 404),
        ("POST /metrics HTTP/1.1\n\n", 405),
        ("nonsense\n\n", 400),
        ("GET /metrics SPDY/1\n\n", 400),
        ("GET /metrics HTTP/1.1\nX: " + "x" * 20_000 + "\n\n", 400),
    ],
)
async def test_what_is_no_such_request_is_refused(text: str, status: int) -> None:
    """Anything else gets a short answer, and the page goes on."""
    worker = Running()
    assert status == (await worker.ask(text))[0]
    assert 200 == (await worker.ask("GET /health/live HTTP/1.1\n\n"))[0]
    await worker.end()


async def test_a_silent_connection_is_dropped() -> None:
    """Who connects and says nothing holds a place for five seconds, not for good."""
    clock = ManualClock(hold=True)
    worker = Running(clock=clock)
    reader, writer = await asyncio.open_connection("127.0.0.1", await worker.port())
    writer.write(b"GET /met")
    # Answered only after ours was accepted.
    assert 200 == (await worker.ask("GET /health/live HTTP/1.1\n\n"))[0]
    await clock.advance(5.0)
    assert b"" == await reader.read()
    writer.close()
    await writer.wait_closed()
    await worker.end()


async def test_a_part_that_does_not_drain_is_not_waited_for_longer_than_grace() -> None:
    """The end comes all the same, and closing still happens."""
    clock = ManualClock(hold=True)
    told: list[str] = []
    part = Told(told, hold="drain")
    worker = Running(part, clock=clock, grace=3.0)
    await worker.port()
    ending = asyncio.create_task(worker.end())
    await part.held.wait()
    await clock.advance(4.0)
    await ending
    assert ["start", "drain", "close"] == told


async def test_it_can_be_stopped_while_it_starts() -> None:
    """A start that hangs does not keep the process from ending."""
    told: list[str] = []
    part = Told(told, hold="start")
    worker = Running(part)
    await part.held.wait()
    await worker.end()
    assert ["start", "close"] == told


async def test_a_port_that_is_taken_is_named() -> None:
    """One sentence, not a traceback of the event loop, and no part was started."""
    told: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MeshkitError, match=f"MK102  127.0.0.1:{port} cannot be listened on"):
            await meshkit.worker.serve(Told(told), service="mailer", port=port)
    assert [] == told


@pytest.mark.parametrize("options", [{"service": ""}, {"service": "a", "grace": -1}, {"service": "a", "port": 70000}])
async def test_a_value_that_cannot_work_is_named(options: dict[str, object]) -> None:
    """Each mistake is one ConfigurationError."""
    with pytest.raises(ConfigurationError):
        await meshkit.worker.serve(**options)  # type: ignore[arg-type]


PROGRAM = """
import asyncio, sys
import meshkit.worker

class Part:
    name = "bus"
    def checks(self): return []
    async def start(self): print("start", flush=True)
    async def drain(self, grace):
        print("drain", flush=True)
        if sys.argv[1] == "hang":
            await asyncio.Event().wait()
    async def close(self): print("close", flush=True)

meshkit.worker.run(Part(), service="mailer", port=int(sys.argv[2]))
print("over", flush=True)
"""


def program(mode: str, port: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode, str(port)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_in_order(number: signal.Signals) -> None:
    """What is in hand is finished, connections close, and the exit code is 0."""
    with program("quick") as process:
        assert process.stdout is not None
        assert "start\n" == process.stdout.readline()
        process.send_signal(number)
        assert "drain\nclose\nover\n" == process.stdout.read()
        assert 0 == process.wait(10)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(number: signal.Signals, code: int) -> None:
    """With the exit code that a shell gives to a program that a signal has ended."""
    with program("hang") as process:
        assert process.stdout is not None
        assert "start\n" == process.stdout.readline()
        process.send_signal(number)
        assert "drain\n" == process.stdout.readline()
        process.send_signal(number)
        assert code == process.wait(10)


def test_a_program_that_cannot_start_says_so_in_one_line() -> None:
    """Exit code 2 and no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken, program("quick", taken.getsockname()[1]) as process:
        out, err = process.communicate(timeout=30)
    assert (2, "") == (process.returncode, out)
    assert 1 == len(err.splitlines())
    assert err.startswith("mailer: MK102")
