"""docs/policies.md, done as it says: its samples are run into what they are for, and its table of names is whole."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import io
import re
from typing import Any

import pybreaker
import pytest
import tenacity
from pages import ROOT

import meshkit
from meshkit.core.scope import Scope, scope_open

PAGE = ROOT / "docs/policies.md"


def sections(level: str) -> dict[str, str]:
    """The text under each heading of a level."""
    _, *parts = re.split(rf"^{level} (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def samples(heading: str) -> list[dict[str, Any]]:
    """The blocks of a section, each run: what they define."""
    defined = []
    for code in re.findall(r"^```python\n(.*?)^```$", sections("##")[heading], flags=re.MULTILINE | re.DOTALL):
        names: dict[str, Any] = {}
        exec(compile(code, str(PAGE), "exec"), names)
        defined.append(names)
    return defined


class Service:
    """Does what it is told, call by call, and 49.00 after that; counts how often it was asked."""

    def __init__(self, *outcomes: Exception) -> None:
        self.outcomes = list(outcomes)
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> str:
        self.asked += 1
        await self.gate.wait()
        if self.outcomes:
            raise self.outcomes.pop(0)
        return "49.00"


async def timeout() -> None:
    (sample,) = samples("Timeout")
    assert "49.00" == await sample["price"](Service())
    # The deadline of the request that is being served is nearer than both limits.
    late = Service()
    late.gate.clear()
    with scope_open(Scope(deadline=0.0)), pytest.raises(meshkit.DeadlineExceededError):
        await sample["price"](late)


async def retry() -> None:
    (sample,) = samples("Retry")
    service = Service(ConnectionError(), ConnectionError())
    assert ("49.00", 3) == (await sample["price"](service), service.asked)
    service = Service(*[ConnectionError()] * 3)
    with pytest.raises(ConnectionError) as caught:
        await sample["price"](service)
    assert ("budget", 2) == (meshkit.retry_end(caught.value), service.asked)


async def retry_budget() -> None:
    (sample,) = samples("Retry budget")
    service = Service(*[ConnectionError()] * 100)
    for pipeline in (sample["quote"], sample["history"]):
        with pytest.raises(ConnectionError):
            await pipeline.call(service)
    assert 2 + 3 == service.asked


async def circuit_breaker() -> None:
    alone, keyed = samples("Circuit breaker")
    service = Service(*[ConnectionError()] * 10)
    for _ in range(10):
        with pytest.raises(ConnectionError):
            await alone["price"](service)
    with pytest.raises(meshkit.CircuitOpenError):
        await alone["price"](service)
    assert None is await alone["price_or_none"](service)
    assert 10 == service.asked

    service = Service(*[ConnectionError()] * 10)
    for _ in range(10):
        with pytest.raises(ConnectionError):
            await keyed["load"]("a", service)
    with pytest.raises(meshkit.CircuitOpenError):
        await keyed["load"]("a", service)
    assert "49.00" == await keyed["load"]("b", service)


async def bulkhead() -> None:
    (sample,) = samples("Bulkhead")
    service = Service()
    service.gate.clear()
    callers = [asyncio.ensure_future(sample["price"](service)) for _ in range(4)]
    await asyncio.wait(callers, return_when=asyncio.FIRST_COMPLETED)
    assert 2 == service.asked
    service.gate.set()
    *answered, refused = await asyncio.gather(*callers, return_exceptions=True)
    assert ["49.00"] * 3 == answered
    assert isinstance(refused, meshkit.BulkheadFullError)


async def rate_limiter() -> None:
    (sample,) = samples("Rate limiter")
    service = Service()
    answers = await asyncio.gather(*(sample["price"](service) for _ in range(3)), return_exceptions=True)
    assert ["49.00", "49.00"] == answers[:2]
    refused = answers[2]
    assert isinstance(refused, meshkit.RateLimitedError)
    assert refused.retry_after is not None
    assert 0 < refused.retry_after <= 0.01


async def fallback() -> None:
    (sample,) = samples("Fallback")
    down = Service(ConnectionError(), ConnectionError())
    with scope_open(Scope()) as scope:
        assert "on request" == await sample["price"](down)
    assert ("last-price",) == scope.degraded
    assert "49.00" == await sample["price"](Service())
    assert "49.00" == await sample["price"](down)


async def hedge() -> None:
    sample, disposing = samples("Hedge")
    service = Service()
    first = asyncio.Event()

    async def ask() -> str:
        # The first attempt never answers, the one beside it does.
        if service.asked == 0:
            service.asked += 1
            await first.wait()
        return await service()

    assert ("49.00", 2) == (await sample["price"](ask), service.asked)

    opened: list[io.StringIO] = []

    async def connect() -> io.StringIO:
        opened.append(connection := io.StringIO())
        if len(opened) == 1:
            # It has its connection when it is cancelled.
            with contextlib.suppress(asyncio.CancelledError):
                await first.wait()
        return connection

    connection = await disposing["connected"](connect)
    assert opened[-1] is connection
    assert [True, False] == [connection.closed for connection in opened]


SAMPLES = {
    "Timeout": timeout,
    "Retry": retry,
    "Retry budget": retry_budget,
    "Circuit breaker": circuit_breaker,
    "Bulkhead": bulkhead,
    "Rate limiter": rate_limiter,
    "Fallback": fallback,
    "Hedge": hedge,
}


@pytest.mark.parametrize("heading", SAMPLES)
async def test_each_sample_does_what_it_is_for(heading: str) -> None:
    """The sample of the policy, as it stands on the page, is run into what the policy is for."""
    await SAMPLES[heading]()


def test_every_sample_is_run() -> None:
    """No section of the page has a sample that is not run here."""
    assert SAMPLES.keys() == {heading for heading, text in sections("##").items() if "```python" in text}


# --- names elsewhere -------------------------------------------------------------------------------------------------

CLASSES = {
    "Circuit breaker": meshkit.CircuitBreaker,
    "Retry": meshkit.Retry,
    "Bulkhead": meshkit.Bulkhead,
    "Rate limiter": meshkit.RateLimiter,
    "Time limiter": meshkit.Timeout,
    "Hedge": meshkit.Hedge,
    "Fallback": meshkit.Fallback,
}


def rows(heading: str) -> list[list[str]]:
    table = sections("###")[heading]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")
    ]


def words(heading: str, column: str) -> set[str]:
    """All names in a column of a table."""
    head, *body = rows(heading)
    return {word for row in body for word in re.findall(r"\w+", row[head.index(column)])}


@pytest.mark.parametrize("heading", CLASSES)
def test_every_option_has_its_row(heading: str) -> None:
    """Each option of a policy stands in the table of its names, and each that stands there is one."""
    named = {name for *_, ours in rows(heading)[1:] for name in re.findall(r"`(\w+)=`", ours)}
    # The clock and the name are told once, and mean the same everywhere.
    assert {*inspect.signature(CLASSES[heading]).parameters} - {"clock", "name"} == named - {"clock", "name"}


def test_every_name_of_pybreaker_and_tenacity_is_told() -> None:
    """The tables have each option and method of a pybreaker breaker and its listeners, and each argument of tenacity."""
    ours = {name for name in dir(pybreaker.CircuitBreakerListener) if not name.startswith("_")}
    methods = {name for name in dir(pybreaker.CircuitBreaker) if not name.startswith("_")}
    options = {*inspect.signature(pybreaker.CircuitBreaker).parameters}
    assert set() == (ours | methods | options) - words("Circuit breaker", "pybreaker")
    assert set() == {*inspect.signature(tenacity.AsyncRetrying).parameters} - words("Retry", "tenacity")


def test_what_can_be_replaced_is_what_only_holds_options() -> None:
    """The row that says of which classes `dataclasses.replace` makes another one is right of all that it names."""
    (row,) = (ours for *_, ours in rows("All of them") if "dataclasses.replace" in ours)
    replaced, anew = (re.search(r"\((.*?)\)", part) for part in row.split("; what holds state"))
    assert replaced is not None
    assert anew is not None
    for names, options in ((replaced[1], True), (anew[1], False)):
        for name in names.split(", "):
            assert options is dataclasses.is_dataclass(getattr(meshkit, name)), name


def test_what_the_page_imports_can_be_imported() -> None:
    """The import lines within its sentences work as they stand."""
    lines = re.findall(r"`(from meshkit\S* import \w+)`", PAGE.read_text(encoding="utf-8"))
    assert 2 == len(lines)
    for line in lines:
        exec(line, {})
