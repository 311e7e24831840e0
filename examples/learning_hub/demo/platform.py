"""The hub as a set of processes: started on free ports, restarted when they die, and gone without a trace at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx

from learning_hub.settings import PORTS, variable
from meshkit.testing.servers import free_ports

# Each service with its module. The provider comes first: the others ask it.
MODULES = {name: f"learning_hub.{name.replace('-', '_')}" for name in PORTS if name != "payment-provider"}
MODULES = {"payment-provider": "learning_hub.provider", **MODULES}
SERVICES = tuple(name for name in MODULES if name != "payment-provider")

_EXAMPLES = Path(__file__).resolve().parents[2]

# A minute has to hold what production spreads over an hour.
PATIENCE = {"LEARNING_HUB_RETRY": "50ms, 1s*2, 2s*2", "LEARNING_HUB_BREAKER_OPEN_FOR": "2"}

# Reads the ids of the processes that live, line by line, until the pipe ends: an empty last line means all has been
# taken away. Should the demo itself be killed, its services and its folder still go.
_GUARD = """
trap '' INT TERM HUP
folder=$1; alive=
while read -r line; do alive=$line; done
[ -n "$alive" ] || exit 0
for id in $alive; do kill -s KILL -- "-$id"; done 2>/dev/null
[ -z "$folder" ] || rm -rf "$folder"
"""


async def until(true: Callable[[], bool | Awaitable[bool]], *, within: float, every: float = 0.05) -> bool:
    """Look again and again; whether it came true within so many seconds."""
    deadline = time.monotonic() + within
    while True:
        answer = true()
        if answer if isinstance(answer, bool) else await answer:
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(every)


class ServiceError(Exception):
    """A service does not come up; the text holds what it last complained about."""


@dataclass(slots=True)
class Process:
    """One service: what to run, and the process that runs it now."""

    name: str
    command: list[str]
    port: int
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    running: subprocess.Popen[bytes] | None = None
    expected_to_end: bool = False
    # How often it has ended by itself, one time right after the other: it will not come up.
    failures: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Platform:
    """All services of the hub, each in a process and session of its own.

    Args:
        folder: where databases and logs go.
        amqp_url: the broker.
        otlp_url: where traces go.
        temporary: whether the folder goes with the hub.
        say: told in plain words what happens to the processes.
        command: makes the command line that runs a module; a proof puts something else in its place.
        patience: the services' own settings for retries and breakers.
    """

    def __init__(
        self,
        folder: Path,
        *,
        amqp_url: str,
        otlp_url: str,
        temporary: bool = True,
        say: Callable[[str], object] = lambda line: None,
        command: Callable[[str], Sequence[str]] = lambda module: [sys.executable, "-m", module],
        patience: Mapping[str, str] = PATIENCE,
    ) -> None:
        self.folder = folder
        self._temporary = temporary
        self._say = say
        ports = dict(zip(MODULES, free_ports(len(MODULES)), strict=True))
        self.databases = {
            name: os.environ.get(variable(name, "DATABASE_URL"), f"sqlite+aiosqlite:///{folder / f'{name}.db'}")
            for name in SERVICES
        }
        common = {
            # What the user has set for his own services is not meant for these.
            **{name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "MESHKIT_"))},
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_EXAMPLES), os.environ.get("PYTHONPATH", "")))),
            **patience,
            "PYTHONUNBUFFERED": "1",
            "MESHKIT_AMQP_URL": amqp_url,
            "OTEL_EXPORTER_OTLP_ENDPOINT": otlp_url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "PAYMENT_PROVIDER_BOOKS": str(folder / "payment-provider.db"),
            **{variable(name, "URL"): f"http://127.0.0.1:{port}" for name, port in ports.items()},
            **{variable(name, "DATABASE_URL"): url for name, url in self.databases.items()},
        }
        self.processes = {
            name: Process(
                name=name,
                command=list(command(module)),
                port=ports[name],
                log=folder / f"{name}.log",
                environment=dict(common),
            )
            for name, module in MODULES.items()
        }
        self._tools: list[subprocess.Popen[bytes]] = []
        self._guard: subprocess.Popen[bytes] | None = None
        self._watching: asyncio.Task[None] | None = None
        self.http = httpx.AsyncClient(timeout=10.0, trust_env=False)

    # -- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Platform:
        self._start_guard()
        try:
            for process in self.processes.values():
                self._spawn(process)
            self._watching = asyncio.create_task(self._watch(), name="learning hub: watch processes")
            await self.until_ready()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        with contextlib.suppress(asyncio.CancelledError):
            await self.http.aclose()
        # What is still here ends at once: whoever wants an orderly end asks for it by `stop`.
        for process in self.processes.values():
            if process.running is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.running.pid, signal.SIGKILL)
                process.running.wait()
                process.running = None
        self._tell_guard()
        if self._guard is not None and self._guard.stdin is not None:
            self._guard.stdin.close()
            self._guard.wait()

    async def stop(self, grace: float = 20.0) -> None:
        """End all services in order, as a deployment would, so that nothing they hold or know is left behind."""
        for process in self.processes.values():
            self._ask_to_end(process)
        await asyncio.gather(*(self._ended(process, grace) for process in self.processes.values()))

    # -- one service --------------------------------------------------------------------------------------------------

    async def roll_out(self, name: str, **environment: str) -> None:
        """Replace a service's process by one with other settings, and wait until it is ready."""
        process = self.processes[name]
        self._ask_to_end(process)
        await self._ended(process, 20.0)
        process.environment.update(environment)
        self._spawn(process)
        await self.until_ready(name)

    def kill(self, name: str) -> bool:
        """SIGKILL: no goodbye, no flush. False where it is not running at the moment."""
        running = self.processes[name].running
        if running is None or running.poll() is not None:
            return False
        os.kill(running.pid, signal.SIGKILL)
        return True

    async def until_ready(self, *names: str, within: float = 60.0) -> None:
        """Wait until these services (all, where none is named) say that they can work."""
        deadline = time.monotonic() + within
        for name in names or tuple(self.processes):
            process = self.processes[name]
            while not await self.is_ready(name):
                if time.monotonic() > deadline or process.failures >= 2:
                    raise ServiceError(f"{name} does not become ready: {_complaint(process.log)}")
                await asyncio.sleep(0.05)
            process.failures = 0

    def url(self, name: str) -> str:
        return self.processes[name].url

    async def is_ready(self, name: str) -> bool:
        """Whether a service says that it can work."""
        try:
            return (await self.http.get(f"{self.url(name)}/health/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def run_tool(self, *words: str, within: float = 60.0) -> tuple[int, str, str]:
        """Run Python with `words` to its end; its exit code and what it printed."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            tool = self._start_tool(words, out, err)
            try:
                await until(lambda: tool.poll() is not None, within=within)
            finally:
                tool.kill()
                tool.wait()
                self._tools.remove(tool)
            out.seek(0)
            err.seek(0)
            return tool.returncode, out.read().decode(errors="replace"), err.read().decode(errors="replace")

    # -- processes ----------------------------------------------------------------------------------------------------

    def _spawn(self, process: Process) -> None:
        with process.log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is for the demo, which then ends the services.
            process.running = subprocess.Popen(
                process.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=process.environment,
                cwd=self.folder,
                start_new_session=True,
            )
        process.expected_to_end = False
        self._tell_guard()

    def _start_tool(self, words: Sequence[str], out: IO[bytes], err: IO[bytes]) -> subprocess.Popen[bytes]:
        tool = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=next(iter(self.processes.values())).environment,
            cwd=self.folder,
            start_new_session=True,
        )
        self._tools.append(tool)
        self._tell_guard()
        return tool

    def _ask_to_end(self, process: Process) -> None:
        process.expected_to_end = True
        if process.running is not None and process.running.poll() is None:
            process.running.terminate()

    async def _ended(self, process: Process, grace: float) -> None:
        running = process.running
        if running is not None and not await until(lambda: running.poll() is not None, within=grace):
            self._say(f"{process.name} did not end within {grace:.0f} s and is killed")
            running.kill()
            running.wait()

    async def _watch(self) -> None:
        """Start again what died without being asked to."""
        while True:
            await asyncio.sleep(0.1)
            for process in self.processes.values():
                if process.running is None or process.expected_to_end:
                    continue
                code = process.running.poll()
                if code is not None:
                    process.failures = process.failures + 1 if code > 0 else 0
                    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    self._say(f"{process.name} died ({how}) and is started again")
                    self._spawn(process)

    def _start_guard(self) -> None:
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "learning-hub-guard", str(self.folder) if self._temporary else ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def _tell_guard(self) -> None:
        if self._guard is None or self._guard.stdin is None or self._guard.stdin.closed:
            return
        running = [process.running for process in self.processes.values() if process.running is not None]
        alive = [str(process.pid) for process in (*running, *self._tools)]
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write((" ".join(alive) + "\n").encode())
            self._guard.stdin.flush()


def _complaint(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "it says nothing")


@contextlib.asynccontextmanager
async def working_folder(keep: Path | None) -> AsyncIterator[Path]:
    """The folder that is asked for, or one that is gone afterwards."""
    folder = keep if keep is not None else Path(tempfile.mkdtemp(prefix="learning-hub-"))
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
