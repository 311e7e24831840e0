"""How many retries a host bears: a budget for each, without anybody having to think of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import meshkit.httpx
from meshkit import ConfigurationError, Pipeline, Retry, RetryBudget
from meshkit.core.events import Event, RetryBudgetExhausted, RetryEnded
from meshkit.core.scope import Scope, scope_open
from meshkit.testing.clock import ManualClock
from tests.http.fault_host import FaultHost, answer

Make = Callable[..., Any]


async def test_a_host_that_is_down_gets_a_fifth_more_calls(client: Make, host: FaultHost) -> None:
    """Of a hundred calls that all fail, 20 are tried again; the 300 attempts that the retries would make are not."""
    host.script = [answer(503)]
    prices = client(breaker=None)
    for _ in range(100):
        await prices.get("/")
    assert 120 == len(host.asked)


async def test_a_quiet_host_has_three_retries(client: Make, host: FaultHost, clock: ManualClock) -> None:
    """Where calls are few, the budget leaves room for one more retry than the standard one makes, every 10 s."""
    host.script = [answer(503)]
    prices = client(breaker=None)
    await prices.get("/")
    await prices.get("/")
    assert 3 + 2 == len(host.asked)
    await clock.advance(10.0)
    await prices.get("/")
    assert 5 + 3 == len(host.asked)


async def test_an_empty_budget_ends_the_retry_and_travels(
    client: Make, host: FaultHost, clock: ManualClock, events: list[Event]
) -> None:
    """The answer is the last real one, the reason is told, and the caller's caller is not to try again either."""
    host.script = [answer(503)]
    prices = client(breaker=None, budget=RetryBudget("prices", ratio=0.0, at_least=0, clock=clock))
    with scope_open(Scope()) as scope:
        assert 503 == (await prices.get("/")).status_code
    assert scope.exhausted
    assert ["budget"] == [event.reason for event in events if isinstance(event, RetryEnded)]
    assert ["prices"] == [event.source for event in events if isinstance(event, RetryBudgetExhausted)]


@pytest.mark.parametrize("breaker", ["per-host", None])
async def test_each_host_has_its_own(client: Make, host: FaultHost, nobody: str, breaker: Any) -> None:
    """What one host has used up is not missing for another, with breakers and without."""
    host.script = [answer(503), answer(503), answer()]
    prices = client(breaker=breaker)
    for _ in range(3):
        with pytest.raises(Exception, match=r".+"):
            await prices.get(nobody)
    assert 200 == (await prices.get("/")).status_code
    assert 3 == len(host.asked)


async def test_one_of_the_users_own_is_shared(client: Make, host: FaultHost, clock: ManualClock) -> None:
    """Two clients of one destination draw on the budget that they are given."""
    host.script = [answer(503)]
    shared = RetryBudget("prices", at_least=2, clock=clock)
    for name in ("reader", "writer"):
        await client(name, breaker=None, budget=shared).get("/")
    assert 2 + 2 == len(host.asked)


async def test_a_retry_that_has_one_keeps_it(client: Make, host: FaultHost, clock: ManualClock) -> None:
    """Who has put a budget into the Retry gets no other."""
    host.script = [answer(503)]
    mine = RetryBudget("prices", at_least=1, clock=clock)
    await client(breaker=None, retry=Retry(attempts=5, budget=mine, clock=clock)).get("/")
    assert (2, 0) == (len(host.asked), mine.balance)


async def test_none_is_no_bound(client: Make, host: FaultHost) -> None:
    """With budget=None each call makes all its attempts."""
    host.script = [answer(503)]
    prices = client(breaker=None, budget=None)
    for _ in range(10):
        await prices.get("/")
    assert 30 == len(host.asked)


async def test_a_pipeline_of_the_users_own_gets_none(client: Make, host: FaultHost, clock: ManualClock) -> None:
    """What somebody put together is run as it is."""
    host.script = [answer(503)]
    prices = client(pipeline=Pipeline("mine", Retry(clock=clock)))
    for _ in range(10):
        await prices.get("/")
    assert 30 == len(host.asked)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": 0.2}, "RetryBudget"),
        ({"budget": "host"}, "per-host"),
        ({"budget": RetryBudget("a"), "retry": Retry(budget=RetryBudget("b"))}, "one of them"),
        ({"budget": None, "retry": Retry(budget=RetryBudget("b"))}, "one of them"),
        ({"budget": RetryBudget("a"), "retry": None}, "retry=None"),
        ({"budget": None, "pipeline": Pipeline("mine")}, "takes the place of"),
    ],
)
def test_what_does_not_go_together_is_said(options: dict[str, Any], says: str) -> None:
    """Each mistake is a ConfigurationError that says what would be right."""
    with pytest.raises(ConfigurationError, match=says):
        meshkit.httpx.transport("prices", **options)
