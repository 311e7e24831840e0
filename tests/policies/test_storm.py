"""No retry storm, on a clock that nobody waits for: three services of three attempts each before a dependency that is down.

The services are FastAPI apps with meshkit installed and clients of meshkit to the next, as in `./run proof storm`; between them is no
socket, but each request runs in a context of its own, so that nothing reaches the next service except by headers.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextvars import Context
from typing import Any

import httpx
import pytest
import tenacity
from fastapi import FastAPI, Response

import meshkit.fastapi
import meshkit.httpx
from meshkit import CircuitBreaker
from meshkit.core.events import CircuitChanged, Event, listen
from meshkit.testing.clock import ManualClock

REQUESTS = 1000
RATE = 100.0
HOPS = ("edge", "a", "b")


class Wire(httpx.AsyncBaseTransport):
    """What is between two services: the request alone."""

    def __init__(self, app: FastAPI) -> None:
        self._asgi = httpx.ASGITransport(app, raise_app_exceptions=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        loop = asyncio.get_running_loop()
        return await loop.create_task(self._asgi.handle_async_request(request), context=Context())


class Leaf(httpx.AsyncBaseTransport):
    """The dependency: refuses, answers 503, hangs, fails by chance, or works."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.seen = 0
        self._chance = random.Random(1)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.seen += 1
        if self.mode == "refuse":
            raise httpx.ConnectError("nobody listens", request=request)
        if self.mode == "hang":
            await asyncio.Event().wait()
        failing = self.mode == "down" or (self.mode == "flaky" and self._chance.random() < 0.1)
        return httpx.Response(503 if failing else 200)


class Plain:
    """Retries as they are made by hand: tenacity around httpx."""

    def __init__(self, inner: httpx.AsyncBaseTransport, clock: ManualClock) -> None:
        self._client = httpx.AsyncClient(base_url="http://next", transport=inner, timeout=None)
        self._clock = clock

    async def get(self, path: str) -> httpx.Response:
        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(3),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=10),
            retry=tenacity.retry_if_exception_type(httpx.HTTPError),
            sleep=self._clock.sleep,
            reraise=True,
        ):
            with attempt:
                answer = await self._client.get(path)
                answer.raise_for_status()
        return answer


class Chain:
    """Edge, a, b and the leaf, and those who ask."""

    def __init__(self, mode: str, *, plain: bool = False, breakers: bool = False) -> None:
        self.clock = ManualClock(hold=True)
        self.clock.random = random.Random(2).random  # type: ignore[method-assign]
        self.leaf = Leaf(mode)
        self.statuses: Counter[int] = Counter()
        self.breakers = (
            {name: CircuitBreaker(name, open_for=2.0, clock=self.clock) for name in HOPS} if breakers else {}
        )
        self.last_success: float | None = None
        inner: httpx.AsyncBaseTransport = self.leaf
        for name in reversed(HOPS):
            inner = Wire(self._service(name, Plain(inner, self.clock) if plain else self._client(name, inner), plain))
        self._people = httpx.AsyncClient(base_url="http://edge", transport=inner, timeout=None)

    def _client(self, name: str, inner: httpx.AsyncBaseTransport) -> httpx.AsyncClient:
        return meshkit.httpx.client(
            name, base_url="http://next", inner=inner, breaker=self.breakers.get(name), clock=self.clock
        )

    def _service(self, name: str, client: Any, plain: bool) -> FastAPI:
        app = FastAPI(telemetry={"tracing": False})

        @app.get("/")
        async def ask() -> Response:
            try:
                (await client.get("/")).raise_for_status()
            except httpx.HTTPError:
                return Response(status_code=503)
            return Response()

        if not plain:
            meshkit.fastapi.install(app, service=name, clock=self.clock)
        return app

    async def asked(self) -> None:
        status = (await self._people.get("/")).status_code
        self.statuses[status] += 1
        if status == 200:
            self.last_success = self.clock.now()

    async def pass_time(self, seconds: float) -> None:
        await self.clock.advance(seconds)
        # A request takes many turns of the loop, and no time.
        for _ in range(60):
            await asyncio.sleep(0)

    async def load(self, requests: int, *, until: Callable[[], bool] = lambda: False) -> None:
        """So many requests, one after the other whatever the ones before do, until all are answered."""
        async with asyncio.TaskGroup() as people:
            asked = []
            for _ in range(requests):
                asked.append(people.create_task(self.asked()))
                await self.pass_time(1 / RATE)
                if until():
                    break
            while not all(task.done() for task in asked):
                await self.pass_time(0.1)


@pytest.fixture
def opened() -> Any:
    """The names of breakers, in the order in which they opened."""
    names: list[str] = []

    def hear(event: Event) -> None:
        if isinstance(event, CircuitChanged) and event.new == "open":
            names.append(event.source)

    stop = listen(hear, kind=CircuitChanged)
    yield names
    stop()


@pytest.mark.parametrize("mode", ["refuse", "down", "hang"])
async def test_a_dead_dependency_gets_at_most_1_3_calls_a_request(mode: str) -> None:
    """With breakers off, whether it refuses, answers 503 or hangs: 1,000 requests at 100/s are at most 1,300 calls."""
    chain = Chain(mode)
    await chain.load(REQUESTS)
    assert {503: REQUESTS} == chain.statuses
    assert REQUESTS <= chain.leaf.seen <= 1.3 * REQUESTS


async def test_plain_retries_send_it_27() -> None:
    """The same handlers with retries made by hand multiply: what the test above sees could be otherwise."""
    chain = Chain("down", plain=True)
    await chain.load(50)
    assert 27 * 50 == chain.leaf.seen


async def test_random_errors_are_still_retried() -> None:
    """Where a tenth of the calls fail by chance, the budget is never noticed: as many succeed as with plain retries, but
    for a hundredth."""
    ours, plain = Chain("flaky"), Chain("flaky", plain=True)
    await ours.load(REQUESTS // 2)
    await plain.load(REQUESTS // 2)
    assert plain.statuses[200] - ours.statuses[200] <= 0.01 * REQUESTS // 2


@pytest.mark.parametrize("mode", ["refuse", "down", "hang"])
async def test_only_the_breaker_next_to_it_opens_and_it_finds_out_in_time(mode: str, opened: list[str]) -> None:
    """Those above stay closed; once the dependency is back, the first request succeeds within the open period that is
    going on, and all after it."""
    chain = Chain(mode, breakers=True)
    await chain.load(REQUESTS // 2)
    breaker = chain.breakers["b"]
    await chain.load(1000, until=lambda: breaker.state == "open" and (breaker.retry_after or 0.0) > 0.5)
    assert {"b"} == set(opened)
    assert 0 == chain.statuses[200]

    chain.leaf.mode = "ok"
    left = breaker.retry_after
    assert left is not None
    back = chain.clock.now()
    await chain.load(6000, until=lambda: chain.last_success is not None)
    assert chain.last_success is not None
    assert chain.last_success - back <= left + 2 / RATE
    before = chain.statuses[200]
    await chain.load(20)
    assert 20 == chain.statuses[200] - before
    assert {"b"} == set(opened)
