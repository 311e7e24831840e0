"""A process of the proof, from both sides: how it serves, and how it is started, watched and taken away."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn

ROOT = Path(__file__).resolve().parents[2]


# -- inside ---------------------------------------------------------------------------------------------------------------


async def serve(app: Any, fd: int) -> None:
    """Serve `app` on a socket that was handed over, until SIGTERM or until the one who started this is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sock = socket.socket(fileno=fd)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
        # Clients keep a connection for 5 s (httpx's default). By default uvicorn does too, and then closes it in the
        # moment at which one is used again, which looks as if a service had failed.
        timeout_keep_alive=60,
    )
    await uvicorn.Server(config).serve(sockets=[sock])


def _end_with_parent() -> None:
    # Its end of the pipe closes however it ends, by SIGKILL too.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


# -- outside --------------------------------------------------------------------------------------------------------------


class Port:
    """A port of loopback that is ours from now on, and refuses connections until a process listens on it."""

    def __init__(self) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"


class Broken(Exception):
    """A process ended, or did not begin, so that nothing can be shown."""


class Processes:
    """Everything that one scenario runs. It ends with the block, each process by its own id."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, asyncio.subprocess.Process] = {}

    async def __aenter__(self) -> Processes:
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in self._running.values():
            try:
                async with asyncio.timeout(5):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def start(self, name: str, module: str, port: Port, *arguments: str) -> None:
        """Start a process that listens on `port`; from now on only that one can."""
        fd = port.socket.fileno()
        with (self._logs / f"{name}.log").open("ab") as log:
            self._running[name] = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", module, "--fd", str(fd), *arguments),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(fd,),
                cwd=ROOT,
                # A Ctrl-C at the terminal is for the one who started it, who then ends these in order.
                start_new_session=True,
            )
        port.socket.close()

    def check(self) -> None:
        """Raises:
        Broken: a process has ended.
        """
        for name, process in self._running.items():
            if process.returncode is not None:
                raise Broken(f"{name} ended with exit code {process.returncode}")
