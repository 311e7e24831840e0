"""The client of examples/migration before a server that fails by script: what each step does, and that the page says so."""

from __future__ import annotations

import asyncio
import importlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pybreaker
import pytest
from prometheus_client import CollectorRegistry

from meshkit.telemetry import recorder
from tests.http.fault_host import Asked, FaultHost, Gate, Step, answer

STEPS = ("before", "step_1", "step_2", "after")
PAGE = Path(__file__).parents[2] / "docs/migration.md"

# pybreaker has no clock that a test could move, so this much time really passes.
OPEN_FOR = 0.05

Client = Any


@pytest.fixture(params=STEPS)
def step(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def host() -> AsyncIterator[FaultHost]:
    host = FaultHost()
    await host.start()
    yield host
    await host.close()


@pytest.fixture
async def client(step: str, host: FaultHost) -> AsyncIterator[Client]:
    made = importlib.import_module(f"migration.{step}").Prices(host.url, open_for=OPEN_FOR)
    yield made
    await made.close()


def after(gate: Gate) -> Step:
    """An answer that comes when the gate is open."""
    well = answer(200, b"49.00")

    async def step(asked: Asked, writer: asyncio.StreamWriter) -> bool:
        await gate.wait()
        return await well(asked, writer)

    return step


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - what is waited for happens in a server
            await asyncio.sleep(0.001)


async def opened(client: Client, host: FaultHost) -> None:
    """Fail until the breaker is open."""
    host.script = [answer(503)]
    async with asyncio.timeout(10):
        while True:
            try:
                await client.price("sailing")
            except pybreaker.CircuitBreakerError:
                return
            except httpx.HTTPStatusError:
                continue


# --- what the page's table tells -------------------------------------------------------------------------------------


async def recovers(client: Client, host: FaultHost) -> int:
    """A GET meets one 503 and then an answer: the attempts that it makes."""
    host.script = [answer(503), answer(200, b"49.00")]
    assert "49.00" == await client.price("sailing")
    return len(host.asked)


async def probes(client: Client, host: FaultHost) -> int:
    """Twenty callers come when the time of an open breaker is over: how many of them reach the service."""
    await opened(client, host)
    await asyncio.sleep(OPEN_FOR * 1.5)
    before, gate = len(host.asked), Gate()
    host.script = [after(gate)]
    callers = [asyncio.ensure_future(client.price("sailing")) for _ in range(20)]
    await until(lambda: len(host.asked) - before + sum(caller.done() for caller in callers) == 20)
    reached = len(host.asked) - before
    gate.opened.set()
    await asyncio.gather(*callers, return_exceptions=True)
    return reached


async def cancelled(client: Client, host: FaultHost) -> str:
    """Five callers give up waiting, of a service that is well: what the last of them sees, and whether the next gets an answer."""
    gate = Gate()
    host.script = [after(gate)]
    for number in range(1, 6):
        task = asyncio.ensure_future(client.price("sailing"))
        await until(lambda number=number: len(host.asked) == number)
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
    gate.opened.set()
    try:
        await client.price("sailing")
        following = "is answered"
    except pybreaker.CircuitBreakerError:
        following = "is rejected"
    return f"{type(outcome).__name__}, the next {following}"


async def orders(client: Client, host: FaultHost) -> int:
    """A POST is answered with 503, after which nobody knows whether it took effect: how often it is sent."""
    host.script = [answer(503)]
    with pytest.raises(httpx.HTTPStatusError):
        await client.order("sailing")
    return len(host.asked)


async def asked_to_wait(client: Client, host: FaultHost) -> int:
    """The service asks to be left alone for an hour: how often it is asked all the same."""
    host.script = [answer(503, retry_after="3600")]
    with pytest.raises(httpx.HTTPStatusError):
        await client.price("sailing")
    return len(host.asked)


SCENES: dict[str, Callable[[Client, FaultHost], Awaitable[object]]] = {
    "GET, one 503, then an answer: attempts": recovers,
    "20 callers when the breaker's time is over: reach the service": probes,
    "5 callers give up on a healthy service: the last sees": cancelled,
    "POST, 503: sent": orders,
    "GET, 503 with `Retry-After: 3600`: sent": asked_to_wait,
}


def told() -> dict[str, dict[str, str]]:
    """The table of the page: what is done, step, what comes of it."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    return {what: dict(zip(STEPS, cells, strict=True)) for what, *cells in rows[1:]}


def test_the_page_tells_every_scene() -> None:
    """The table of the page has a row for each scene, and no other."""
    assert [*SCENES] == [*told()]


@pytest.mark.parametrize("what", SCENES)
async def test_each_step_does_what_the_page_says(step: str, client: Client, host: FaultHost, what: str) -> None:
    """Each step of the migration, run into the fault, does what the table of docs/migration.md says of it."""
    assert told()[what][step] == str(await SCENES[what](client, host))


# --- what stays ------------------------------------------------------------------------------------------------------


async def test_dashboards_keep_their_metrics_up_to_the_last_step(step: str, client: Client, host: FaultHost) -> None:
    """The hand-made gauge follows the breaker while it is there: pybreaker's listener is called as before."""
    from migration.metrics import OPEN, RETRIES

    (before,) = (
        sample.value for metric in RETRIES.collect() for sample in metric.samples if sample.name.endswith("_total")
    )
    OPEN.set(0)
    await opened(client, host)
    (now,) = (
        sample.value for metric in RETRIES.collect() for sample in metric.samples if sample.name.endswith("_total")
    )
    (gauge,) = (sample.value for metric in OPEN.collect() for sample in metric.samples)
    if step == "after":
        assert 0 == gauge
    else:
        assert (1, True) == (gauge, now > before)


@pytest.mark.parametrize("step", ["after"])
async def test_the_last_step_brings_its_own_metrics(step: str, client: Client, host: FaultHost) -> None:
    """Without a line for it in the client, retries and the breaker's state stand in the metrics."""
    registry = CollectorRegistry()
    metrics = recorder.install(registry)
    try:
        await opened(client, host)
        _, page = metrics.render()
    finally:
        recorder.uninstall(registry)
    text = page.decode()
    assert 'meshkit_circuitbreaker_state{breaker="prices",state="open"} 1.0' in text
    assert 'meshkit_retries_total{client="prices"' in text
