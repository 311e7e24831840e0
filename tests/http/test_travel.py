"""What travels with a call: time, attempt and exhaustion down and up, and the marks of fallbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from meshkit import CircuitBreaker, CircuitOpenError, DeadlineExceededError, Pipeline, Retry, Timeout
from meshkit.core.clock import SYSTEM_CLOCK
from meshkit.core.events import Event, RetryEnded
from meshkit.core.scope import Scope, scope_open
from meshkit.testing.clock import ManualClock
from tests.http.conftest import Spans
from tests.http.fault_host import FaultHost, Gate, answer, dripping

Make = Callable[..., Any]


# -- down: time and attempt -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_has", "total", "attempt", "sent"),
    [
        (None, None, None, None),
        (None, 30.0, None, "30000"),
        (None, 30.0, 5.0, "5000"),
        (2.0, 30.0, 5.0, "2000"),
        (60.0, 30.0, 5.0, "5000"),
        (60.0, 3.0, 5.0, "3000"),
        (2.0, None, None, "2000"),
    ],
)
async def test_the_shortest_of_all_limits_goes_along(
    client: Make,
    host: FaultHost,
    clock: ManualClock,
    request_has: float | None,
    total: float | None,
    attempt: float | None,
    sent: str | None,
) -> None:
    """What is sent is the shortest of request, call and attempt, as Finagle's `DeadlineTest.scala` combines deadlines."""
    deadline = None if request_has is None else clock.now() + request_has
    with scope_open(Scope(deadline=deadline)):
        await client(timeout=total, attempt_timeout=attempt).get("/")
    assert sent == host.asked[0].headers.get("meshkit-timeout-ms")


async def test_nested_deadlines_only_shorten(client: Make, host: FaultHost, clock: ManualClock) -> None:
    """A longer limit inside a shorter one adds no time, a shorter one takes some away, and outside it is as before."""
    prices = client(timeout=None, attempt_timeout=None)

    async def ask() -> str:
        await prices.get("/")
        return host.asked[-1].headers["meshkit-timeout-ms"]

    with scope_open(Scope(deadline=clock.now() + 4.0)):
        assert "4000" == await Pipeline("longer", Timeout(total=9.0, clock=clock)).call(ask)
        assert "1000" == await Pipeline("shorter", Timeout(total=1.0, clock=clock)).call(ask)
        assert "4000" == await ask()


async def test_waits_between_attempts_are_time_that_is_gone(client: Make, host: FaultHost, clock: ManualClock) -> None:
    """Each attempt tells what is left then, and the number it has."""
    host.script = [answer(503, retry_after="1"), answer(503, retry_after="1"), answer()]
    clock.chance = 0.0
    with scope_open(Scope(deadline=clock.now() + 4.0)):
        await client().get("/")
    assert [("1", "4000"), ("2", "3000"), ("3", "2000")] == [
        (asked.headers["meshkit-attempt"], asked.headers["meshkit-timeout-ms"]) for asked in host.asked
    ]


async def test_what_came_with_the_request_is_not_sent_on_as_it_is(client: Make, host: FaultHost) -> None:
    """A handler that copies all headers of its own request into the next does not pass on its caller's time and attempt."""
    copied = {"meshkit-timeout-ms": "999999", "meshkit-attempt": "7"}
    await client().get("/", headers=copied)
    sent = host.asked[0].headers
    assert ("5000", "1") == (sent["meshkit-timeout-ms"], sent["meshkit-attempt"])


async def test_nothing_is_sent_when_no_time_is_left(client: Make, host: FaultHost, clock: ManualClock) -> None:
    """A call of a request whose deadline has passed never leaves, as Finagle's `DeadlineFilterTest.scala` rejects what has expired."""
    with scope_open(Scope(deadline=clock.now())) as scope, pytest.raises(DeadlineExceededError):
        await client().get("/")
    assert [] == host.asked
    assert scope.exhausted


# -- up: exhaustion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "header", "learned"),
    [
        (503, {"meshkit_retry": "exhausted"}, True),
        (503, {"meshkit_retry": "rejected"}, True),
        (500, {"meshkit_retry": "exhausted"}, True),
        (429, {"meshkit_retry": "rejected"}, True),
        (503, {}, False),
        (503, {"meshkit_retry": "yes"}, False),
        (503, {"meshkit_retry": ""}, False),
        (200, {"meshkit_retry": "exhausted"}, False),
        (404, {"meshkit_retry": "exhausted"}, False),
    ],
)
@pytest.mark.parametrize("retry", [None, Retry(on=OSError)])
async def test_the_request_learns_of_exhaustion_whatever_policies_there_are(
    client: Make, host: FaultHost, status: int, header: dict[str, str], learned: bool, retry: Retry | None
) -> None:
    """An error with one of the two words is learned also where this client would not have tried again; a success is a success."""
    host.script = [answer(status, **header)]
    with scope_open(Scope()) as scope:
        assert status == (await client(retry=retry, breaker=None).get("/")).status_code
    assert (learned, 1) == (scope.exhausted, len(host.asked))


@pytest.mark.parametrize("word", ["yes", "exhausted, rejected", "EXHAUSTED\tno"])
async def test_a_word_that_nobody_knows_ends_nothing(client: Make, host: FaultHost, word: str) -> None:
    """What stands in the header and is no word of ours is as if it were not there."""
    host.script = [answer(503, meshkit_retry=word), answer()]
    assert 200 == (await client().get("/")).status_code


async def test_the_server_ends_the_retry(client: Make, host: FaultHost, events: list[Event]) -> None:
    """The reason of the end is the server, after one attempt, and the breaker counts nothing."""
    host.script = [answer(502, meshkit_retry="exhausted")]
    breaker = CircuitBreaker("prices")
    await client(breaker=breaker).get("/")
    assert [(1, "server")] == [(event.attempts, event.reason) for event in events if isinstance(event, RetryEnded)]
    assert {"ignored": 1} == {word: count for word, count in breaker.counts.items() if count}


async def test_an_open_breaker_is_learned_too(client: Make, library: Any) -> None:
    """A handler that makes a 502 of its own out of a refused call still tells its caller that trying again is pointless."""
    breaker = CircuitBreaker("prices")
    breaker.isolate()
    with scope_open(Scope()) as scope, pytest.raises(library.HTTPError) as refused:
        await client(breaker=breaker).get("/")
    assert isinstance(refused.value, CircuitOpenError)
    assert scope.exhausted


async def test_a_body_that_comes_too_late_is_learned_too(client: Make, host: FaultHost, library: Any) -> None:
    """The deadline that passes while the body is read leaves the caller no time either."""
    gate = Gate()
    host.script = [dripping(gate, b"a", b"b")]
    prices = client(timeout=0.05, attempt_timeout=5.0, clock=SYSTEM_CLOCK)
    with scope_open(Scope()) as scope, pytest.raises(library.TimeoutException):
        await prices.get("/")
    gate.opened.set()
    assert scope.exhausted


# -- up: fallbacks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "marks"),
    [
        ("last-price", ("last-price",)),
        ("last-price, no-stock", ("last-price", "no-stock")),
        (" , ,a,", ("a",)),
        ("x" * 65, ()),
        ("ok, a\tb", ("ok",)),
        (",".join(f"n{i}" for i in range(100)), tuple(f"n{i}" for i in range(8))),
        ("y" * 100_00, ()),
    ],
)
async def test_a_degraded_answer_makes_the_request_degraded(
    client: Make, host: FaultHost, spans: Spans, header: str, marks: tuple[str, ...]
) -> None:
    """The names of fallbacks below are on the attempt's span and in the Scope; what cannot be a name is left out, and there are few."""
    host.script = [answer(200, meshkit_degraded=header)]
    with scope_open(Scope()) as scope:
        await client().get("/")
    assert marks == scope.degraded
    (span,) = spans.named("GET")
    assert (", ".join(marks) or None) == (span.attributes or {}).get("meshkit.degraded")


async def test_an_answer_that_is_thrown_away_degrades_nothing(client: Make, host: FaultHost) -> None:
    """Only the answer that the caller gets counts, not one that was tried again."""
    host.script = [answer(503, meshkit_degraded="old"), answer()]
    with scope_open(Scope()) as scope:
        await client().get("/")
    assert () == scope.degraded
