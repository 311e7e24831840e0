"""The README's first page, done as it says: its service is run, broken and asked for what the page promises."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import aio_pika
import pytest
from named import parsed
from pages import ROOT, blocks, spans

import meshkit
from meshkit.embedded import ThreadedServer, run_in_thread
from meshkit.embedded.otlp import OtlpReceiver
from meshkit.testing.servers import free_ports

README = ROOT / "README.md"
# What the README says that its service consumes.
QUEUE = "course-service.user-created"
TRACE = "0af7651916cd43dd8448eb211c80319c"


# --- what the service of the README meets ----------------------------------------------------------------------------


class UserService:
    """The service below: it is overloaded for one request, and answers all further ones."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, self.headers["traceparent"].split("-")[1]))
                self.send_response(503 if len(asked) == 1 else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Keep the test's output to what fails."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def users() -> Iterator[UserService]:
    service = UserService()
    yield service
    service.close()


@pytest.fixture
def broker() -> Iterator[ThreadedServer]:
    with run_in_thread() as server:
        yield server


@pytest.fixture
async def traces() -> AsyncIterator[OtlpReceiver]:
    async with OtlpReceiver() as receiver:
        yield receiver


@dataclass
class Service:
    """The README's service, running under uvicorn."""

    process: asyncio.subprocess.Process
    url: str
    log: Path

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body of an answer; 0 where there is none."""
        return await asyncio.to_thread(self._get, path)

    def _get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until something has happened, as long as the service lives."""
        async with asyncio.timeout(30):
            while not true():
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.05)

    async def ready(self) -> None:
        async with asyncio.timeout(30):
            while (await self.get("/health/ready"))[0] != 200:
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.1)

    async def says(self, path: str, text: str) -> None:
        """Ask until a page holds the text."""
        async with asyncio.timeout(30):
            while text not in (await self.get(path))[1]:
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.1)


@asynccontextmanager
async def running(code: str, folder: Path, broker: ThreadedServer, traces: OtlpReceiver) -> AsyncIterator[Service]:
    (folder / "service.py").write_text(code)
    (port,) = free_ports(1)
    log = folder / "output.log"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("MESHKIT_", "OTEL_"))},
        "MESHKIT_AMQP_URL": broker.url,
        "OTEL_EXPORTER_OTLP_ENDPOINT": traces.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "uvicorn", "service:app", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=folder, env=environment, stdout=output, stderr=output
        )
    try:
        yield Service(process, f"http://127.0.0.1:{port}", log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def publish(broker: ThreadedServer, body: bytes) -> None:
    """Publish as a service without meshkit does, inside a trace of its own."""
    async with await aio_pika.connect(broker.url) as connection:
        channel = await connection.channel()
        exchange = await channel.get_exchange("user-events")
        headers: dict[str, aio_pika.abc.FieldValue] = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        await exchange.publish(aio_pika.Message(body, headers=headers), routing_key="user.created")


# --- what it shows ---------------------------------------------------------------------------------------------------


async def test_the_block_is_a_service(
    tmp_path: Path, broker: ThreadedServer, users: UserService, traces: OtlpReceiver
) -> None:
    """*Add it to your service*, as it stands and with one address changed, does what its comments say: the queue with
    its rungs and dead-letter queue, the call traced and retried, spans, metrics and health, a drain on SIGTERM.
    """
    (block,) = blocks(README, "python")
    assert "http://localhost:8001" in block.text
    code = block.text.replace("http://localhost:8001", users.url)
    async with running(code, tmp_path, broker, traces) as service:
        await service.ready()
        there = set(broker.queues())
        assert {QUEUE, f"{QUEUE}.dlq"} <= there
        assert {"meshkit.delay.10s", "meshkit.delay.1m"} <= there

        await publish(broker, json.dumps({"user_id": "u-1", "email": "u-1@example.org"}).encode())
        await service.until(lambda: len(users.asked) == 2)
        assert [("/users/u-1", TRACE)] * 2 == users.asked

        await publish(broker, b"no JSON")
        await service.until(lambda: len(broker.queue(f"{QUEUE}.dlq").messages) == 1)
        _, metrics = await service.get("/metrics")
        assert f'meshkit_dead_letters_total{{queue="{QUEUE}",reason="unparseable"}} 1.0' in metrics
        assert 'meshkit_retries_total{client="user-service"' in metrics
        assert (await service.get("/health/live"))[0] == 200

        # The other terminal of the table: what went wrong can be read.
        exit_code, told = await meshkit_command("dlq", "list", QUEUE, "--url", broker.url)
        assert 3 == exit_code, told
        assert "ContractError" in told
        exit_code, told = await meshkit_command("dlq", "show", QUEUE, "--url", broker.url)
        assert 0 == exit_code, told
        assert f"trace     {TRACE}" in told

        service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            await service.process.wait()
        # uvicorn ends by the signal itself once it has shut down in order.
        assert service.process.returncode in (0, -signal.SIGTERM), service.log.read_text()

    story = traces.trace(TRACE)
    assert {"course-service"} == {span.service for span in story}
    assert {"consumer", "client"} <= {span.kind for span in story}
    assert [0, 1] == [len(broker.queue(name).messages) for name in (QUEUE, f"{QUEUE}.dlq")]


async def meshkit_command(*words: str) -> tuple[int, str]:
    """Run `meshkit …`; its exit code and all that it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from meshkit.cli import main; main()",
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_the_pipeline_of_the_table_guards_a_function() -> None:
    """*Guard any function*, as the table writes it: an answer where all is well, the fallback where nothing is."""
    (line,) = (span for span in spans(README) if span.startswith("@Pipeline("))
    expression = parsed(line)
    assert expression is not None
    names = {name: getattr(meshkit, name) for name in ("Pipeline", "Fallback", "Retry", "CircuitBreaker", "Timeout")}
    guarded = eval(line.removeprefix("@").replace("…", "'none'"), names)
    asked = []

    @guarded
    async def price(course: str) -> str:
        asked.append(course)
        if course == "away":
            raise ConnectionError
        return "49.00"

    assert "49.00" == await price("sailing")
    assert "none" == await price("away")
    assert ["sailing", "away", "away", "away"] == asked
