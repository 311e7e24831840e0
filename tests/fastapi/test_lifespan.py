"""Start and stop of an app with its parts: order, readiness, SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

import meshkit.fastapi
from meshkit.core.lifecycle import Check, Lifecycle
from meshkit.errors import ConfigurationError
from tests.fastapi.conftest import Serve
from tests.fastapi.told import Told


def an_app(told: list[str]) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        told.append("app up")
        yield
        told.append("app down")

    return FastAPI(lifespan=lifespan, telemetry={"tracing": False})


class Server:
    """Speaks the lifespan protocol to an app, one message at a time."""

    def __init__(self, app: FastAPI) -> None:
        self._to: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        self.heard: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        self.task = asyncio.create_task(app({"type": "lifespan", "state": {}}, self._to.get, self.heard.put))

    async def say(self, what: str) -> str:
        await self._to.put({"type": f"lifespan.{what}"})
        answer = await self.heard.get()
        return str(answer["type"])


async def test_parts_are_up_before_the_app_and_close_after_it() -> None:
    """Connections first, then the app's startup, then the first work; at the end all of it backwards."""
    told: list[str] = []
    app = an_app(told)
    lifecycle = meshkit.fastapi.install(app, service="shop", parts=[Told("db", told), Told("bus", told)])
    lifecycle.at_last(lambda: told.append("flush"))
    server = Server(app)
    assert "lifespan.startup.complete" == await server.say("startup")
    assert ["db connect", "bus connect", "app up", "db start", "bus start"] == told
    assert "ready" == lifecycle.state
    told.clear()
    assert "lifespan.shutdown.complete" == await server.say("shutdown")
    await server.task
    assert ["db drain", "bus drain", "app down", "bus close", "db close", "flush"] == told
    assert "stopped" == lifecycle.state


@pytest.mark.parametrize(
    ("fails", "after"),
    [
        ("connect", ["db connect", "bus connect", "bus close", "db close"]),
        ("start", ["db connect", "bus connect", "app up", "db start", "bus start", "bus close", "db close"]),
    ],
)
async def test_a_part_that_cannot_start_keeps_the_app_from_serving(fails: str, after: list[str]) -> None:
    """The server is told that the start failed and why, and what had started is closed."""
    told: list[str] = []
    app = an_app(told)
    meshkit.fastapi.install(app, service="shop", parts=[Told("db", told), Told("bus", told, fails=fails)])
    server = Server(app)
    assert "lifespan.startup.failed" == await server.say("startup")
    with pytest.raises(OSError, match=f"bus cannot {fails}"):
        await server.task
    assert after == told


async def test_an_app_that_cannot_start_closes_the_parts() -> None:
    """An error in the app's own startup leaves nothing running."""
    told: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        raise ValueError("no")
        yield

    app = FastAPI(lifespan=lifespan)
    meshkit.fastapi.install(app, service="shop", parts=[Told("bus", told)])
    server = Server(app)
    assert "lifespan.startup.failed" == await server.say("startup")
    with pytest.raises(ValueError, match="no"):
        await server.task
    assert ["bus connect", "bus close"] == told


async def test_installing_twice_is_harmless() -> None:
    """The second time adds the parts that are new, and nothing else."""
    told: list[str] = []
    app = an_app(told)
    bus = Told("bus", told)
    first = meshkit.fastapi.install(app, service="shop", parts=[bus])
    assert first is meshkit.fastapi.install(app, service="shop", parts=[bus, Told("relay", told)])
    assert 1 == len(app.user_middleware)
    server = Server(app)
    await server.say("startup")
    assert ["bus connect", "relay connect", "app up", "bus start", "relay start"] == told
    await server.say("shutdown")
    await server.task


async def test_installing_after_the_start_is_an_error(serve: Serve) -> None:
    """Too late is said, not ignored."""
    app = FastAPI()
    await serve(app)
    with pytest.raises(ConfigurationError, match="too late"):
        meshkit.fastapi.install(app, service="shop")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"service": ""}, "name of this service"),
        ({"service": "shop", "drain_delay": -1}, "0 or above"),
        ({"service": "shop", "timeout": 0}, "above 0"),
        ({"service": "shop", "metrics": "metrics"}, "begins with /"),
    ],
)
def test_a_value_that_cannot_work_is_named(options: dict[str, Any], says: str) -> None:
    """Each mistake is one ConfigurationError."""
    with pytest.raises(ConfigurationError, match=says):
        meshkit.fastapi.install(FastAPI(), **options)


async def test_readiness_is_all_required_checks(serve: Serve) -> None:
    """A failed check that is required makes 503, one that is not is only shown; liveness asks nobody."""
    app = FastAPI(telemetry={"tracing": False})
    checks = [Check(name="cache", ok=False, detail="away", required=False)]
    meshkit.fastapi.install(app, service="shop", parts=[Told("bus", [], checks=checks)])
    client = await serve(app)
    ready = await client.get("/health/ready")
    assert 200 == ready.status_code
    assert {
        "status": "UP",
        "checks": [
            {"name": "process", "status": "UP", "data": {"detail": "ready"}},
            {"name": "cache", "status": "DOWN", "data": {"detail": "away", "required": False}},
        ],
    } == ready.json()
    checks.append(Check(name="broker", ok=False))
    down = await client.get("/health/ready")
    assert (503, "DOWN") == (down.status_code, down.json()["status"])
    assert 200 == (await client.get("/health/live")).status_code


def test_a_check_that_fails_itself_is_a_defect() -> None:
    """500, so that it is told from a broker that is away."""

    class Broken(Told):
        def checks(self) -> list[Check]:
            raise KeyError("x")

    lifecycle = Lifecycle()
    lifecycle.add(Broken("bus", []))
    assert 500 == lifecycle.health("ready")[0]
    assert (503, 200) == (lifecycle.health("started")[0], lifecycle.health("live")[0])


PROGRAM = """
import sys, uvicorn, meshkit.fastapi
from contextlib import asynccontextmanager
from fastapi import FastAPI
from tests.fastapi.told import Told

class Say(list):
    def append(self, what): print(what, flush=True)

@asynccontextmanager
async def lifespan(app):
    yield
    print("app down", flush=True)

app = FastAPI(lifespan=lifespan, telemetry={"tracing": False})
lifecycle = meshkit.fastapi.install(app, service="shop", parts=[Told("bus", Say())], drain_delay=float(sys.argv[2]))
lifecycle.at_last(lambda: print("flush", flush=True))
uvicorn.run(app, port=int(sys.argv[1]), log_level="critical")
"""


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def until_ready(url: str) -> None:
    while True:
        try:
            assert 200 == status(f"{url}/health/ready")
        except urllib.error.URLError:
            continue
        return


def line_by_line(process: subprocess.Popen[str]) -> Callable[[], str]:
    assert process.stdout is not None
    read = process.stdout.readline
    return lambda: read().strip()


def started(delay: float) -> tuple[subprocess.Popen[str], str]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(port), str(delay)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, f"http://127.0.0.1:{port}"


def test_sigterm_makes_ready_red_first_and_the_server_stop_later() -> None:
    """On SIGTERM parts stop taking work and readiness goes red at once, requests are still answered; then the server
    stops, the app goes down, connections close, telemetry is flushed last, and the process ends by the signal."""
    process, url = started(delay=1.5)
    with process:
        line = line_by_line(process)
        assert ["bus connect", "bus start"] == [line(), line()]
        until_ready(url)
        process.send_signal(signal.SIGTERM)
        assert "bus drain" == line()
        assert (503, 200, 404) == (status(f"{url}/health/ready"), status(f"{url}/health/live"), status(f"{url}/x"))
        assert ["app down", "bus close", "flush"] == [line(), line(), line()]
        assert -signal.SIGTERM == process.wait(10)


def test_a_second_sigterm_does_not_wait() -> None:
    """Who asks again gets the server's own stop at once, however long the delay is."""
    process, url = started(delay=60.0)
    with process:
        line = line_by_line(process)
        assert ["bus connect", "bus start"] == [line(), line()]
        until_ready(url)
        process.send_signal(signal.SIGTERM)
        assert "bus drain" == line()
        process.send_signal(signal.SIGTERM)
        assert ["app down", "bus close", "flush"] == [line(), line(), line()]
        assert -signal.SIGTERM == process.wait(10)
