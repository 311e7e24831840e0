"""What a call is: its spans, headers, time and end, over redirects, authentication, streams and refusals."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.trace import SpanKind, StatusCode

import meshkit.httpx
from meshkit import (
    AttemptTimeoutError,
    CircuitBreaker,
    CircuitOpenError,
    DeadlineExceededError,
    Fallback,
    Scope,
    retry_end,
)
from meshkit.core.events import ClientCallEnded, Event, TimedOut
from meshkit.core.scope import scope_open
from meshkit.testing.clock import ManualClock
from tests.http.conftest import Spans
from tests.http.fault_host import FaultHost, Gate, answer, dripping, half, silent

Make = Callable[..., Any]


def ended(events: list[Event]) -> list[tuple[str, int]]:
    """Outcome and attempts of the calls that are over."""
    return [(event.outcome, event.attempts) for event in events if isinstance(event, ClientCallEnded)]


# -- spans and headers ------------------------------------------------------------------------------------------------


async def test_one_span_a_call_and_one_an_attempt(client: Make, host: FaultHost, spans: Spans) -> None:
    """The logical span is INTERNAL and stays unset when a retry helps; attempts are its CLIENT children, in order."""
    host.script = [answer(503), answer()]
    await client().get("/users/7?token=secret&page=2", extensions={"meshkit.operation": "get-user"})
    (call,) = spans.named("meshkit.call prices get-user")
    attempts = spans.named("GET")
    assert SpanKind.INTERNAL is call.kind
    assert StatusCode.UNSET is call.status.status_code
    assert {
        "meshkit.client.name": "prices",
        "meshkit.operation": "get-user",
        "meshkit.attempts": 2,
        "meshkit.outcome": "success",
    } == dict(call.attributes or {})
    assert ["meshkit.retry"] == [event.name for event in call.events]
    assert [SpanKind.CLIENT] * 2 == [span.kind for span in attempts]
    assert [call.context.span_id] * 2 == [span.parent and span.parent.span_id for span in attempts]
    first, second = (dict(span.attributes or {}) for span in attempts)
    assert {
        "http.request.method": "GET",
        "server.address": "127.0.0.1",
        "server.port": host.port,
        "url.full": f"{host.url}/users/7?token=REDACTED&page=2",
        "http.response.status_code": 503,
        "network.protocol.version": "1.1",
        "error.type": "503",
        "meshkit.client.name": "prices",
        "meshkit.attempt": 1,
    } == first
    assert (1, 2) == (second["http.request.resend_count"], second["meshkit.attempt"])
    assert [StatusCode.ERROR, StatusCode.UNSET] == [span.status.status_code for span in attempts]
    sent = [asked.headers["traceparent"].split("-")[2] for asked in host.asked]
    assert [f"{span.context.span_id:016x}" for span in attempts] == sent


async def test_attempt_and_remaining_time_go_along(client: Make, host: FaultHost) -> None:
    """The host learns which try this is and how long it is waited for: one attempt, or what is left of all."""
    host.script = [answer(503), answer(503), answer()]
    await client(timeout=30.0, attempt_timeout=5.0).get("/")
    assert ["1", "2", "3"] == [asked.headers["meshkit-attempt"] for asked in host.asked]
    assert ["5000"] * 3 == [asked.headers["meshkit-timeout-ms"] for asked in host.asked]


async def test_the_deadline_of_the_request_being_served_goes_along(
    client: Make, host: FaultHost, clock: ManualClock
) -> None:
    """Inside a request that has 2 s left, no more than those are given on."""
    with scope_open(Scope(deadline=clock.now() + 2.0)):
        await client().get("/")
    assert "2000" == host.asked[0].headers["meshkit-timeout-ms"]


async def test_a_call_that_opens_the_breaker_ends_with_what_it_came_to(
    client: Make, library: Any, nobody: str, events: list[Event], clock: ManualClock
) -> None:
    """The error is that of the library, at once and not after a wait, and the request knows that retries are used up."""
    breaker = CircuitBreaker("prices", min_calls=2, clock=clock)
    with scope_open(Scope()) as scope, pytest.raises(library.ConnectError) as caught:
        await client(base_url=nobody, breaker=breaker).get("/")
    assert ["meshkit: gave up on 'prices' after 2 attempts, ended by breaker"] == caught.value.__notes__
    assert ("breaker", 1) == (retry_end(caught.value), len(clock.sleeps))
    assert (2, 0) == (breaker.counts["failure"], breaker.counts["rejected"])
    assert (True, 15.0) == (scope.exhausted, scope.opened)
    assert [("error", 2)] == ended(events)


async def test_a_refused_call_leaves_its_trace(
    client: Make, host: FaultHost, spans: Spans, events: list[Event], clock: ManualClock
) -> None:
    """With the breaker open nothing is sent and no attempt is traced; the call's own span says why."""
    breaker = CircuitBreaker("prices", clock=clock)
    breaker.core.open()
    assert "open" == breaker.state
    with pytest.raises(CircuitOpenError):
        await client(breaker=breaker).get("/")
    (call,) = spans.named("meshkit.call prices")
    assert [] == host.asked == spans.named("GET")
    assert ("rejected", "meshkit.CircuitOpenError", 0) == tuple(
        (call.attributes or {})[key] for key in ("meshkit.outcome", "error.type", "meshkit.attempts")
    )
    assert ["meshkit.circuit_breaker.rejected"] == [event.name for event in call.events]
    assert StatusCode.ERROR is call.status.status_code
    assert [("rejected", 0)] == ended(events)


# -- redirects and authentication -------------------------------------------------------------------------------------


@pytest.mark.parametrize("close", [False, True])
async def test_a_followed_redirect_is_the_same_call(
    client: Make, host: FaultHost, spans: Spans, events: list[Event], close: bool
) -> None:
    """Two requests, one call: one logical span with both attempts, also where the first connection closes."""
    host.script = [answer(302, location="/new", close=close), answer()]
    assert 200 == (await client(follow_redirects=True).get("/old")).status_code
    assert [("success", 2)] == ended(events)
    assert 1 == len(spans.named("meshkit.call prices"))
    assert ["/old", "/new"] == [asked.path for asked in host.asked]
    assert ["1", "2"] == [asked.headers["meshkit-attempt"] for asked in host.asked]


async def test_a_redirect_that_is_not_followed_ends_the_call(
    client: Make, host: FaultHost, events: list[Event]
) -> None:
    """A client that keeps the 302 for itself has had its answer."""
    host.script = [answer(302, location="/new")]
    assert 302 == (await client().get("/old")).status_code
    await asyncio.sleep(0)
    assert [("success", 1)] == ended(events)


async def test_an_answered_challenge_is_the_same_call(
    client: Make, library: Any, host: FaultHost, events: list[Event]
) -> None:
    """The 401 of digest authentication and the request that answers it are one call."""
    host.script = [answer(401, www_authenticate='Digest realm="r", nonce="n", qop="auth"'), answer()]
    prices = client(auth=library.DigestAuth("me", "pw"))
    assert 200 == (await prices.get("/")).status_code
    assert [("success", 2)] == ended(events)


async def test_redirects_share_the_time_of_the_call(client: Make, host: FaultHost, clock: ManualClock) -> None:
    """What the first request and its waits took is missing from the second one's time."""
    clock.chance = 0.0
    host.script = [answer(503, retry_after="20"), answer(302, location="/new"), answer()]
    await client(timeout=30.0, attempt_timeout=None, follow_redirects=True).get("/old")
    assert ["30000", "10000", "10000"] == [asked.headers["meshkit-timeout-ms"] for asked in host.asked]


async def test_a_slow_hook_between_two_requests_takes_from_the_same_time(
    client: Make, library: Any, host: FaultHost, clock: ManualClock, events: list[Event]
) -> None:
    """Where the client does something else before it follows, deadline and attempts go on, in a second span."""
    host.script = [answer(302, location="/new"), answer()]

    async def hook(request: Any) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        await clock.sleep(10.0)

    prices = client(follow_redirects=True, event_hooks={"request": [hook]}, attempt_timeout=None)
    await prices.get("/old")
    assert ["30000", "20000"] == [asked.headers["meshkit-timeout-ms"] for asked in host.asked]
    assert [("success", 1), ("success", 2)] == ended(events)


async def test_a_request_may_be_sent_twice(client: Make, host: FaultHost, clock: ManualClock) -> None:
    """A request object that is sent again later is a new call with all its time, and has kept its own extensions."""
    prices = client(timeout=8.0, attempt_timeout=None)
    request = prices.build_request("GET", "/", timeout=6.0)
    for _ in range(2):
        await prices.send(request)
        assert {"connect": 6.0, "read": 6.0, "write": 6.0, "pool": 6.0} == request.extensions["timeout"]
        assert "trace" not in request.extensions
        await clock.sleep(20.0)
    assert ["8000", "8000"] == [asked.headers["meshkit-timeout-ms"] for asked in host.asked]


async def test_a_trace_extension_of_the_callers_is_still_called(client: Make, host: FaultHost) -> None:
    """Whoever watches the connection himself goes on seeing it."""
    seen: list[str] = []

    async def watch(name: str, info: dict[str, Any]) -> None:
        seen.append(name)

    await client().get("/", extensions={"trace": watch})
    assert "connection.connect_tcp.started" in seen


# -- the end of a call ------------------------------------------------------------------------------------------------


async def test_a_streamed_call_ends_with_its_body(client: Make, host: FaultHost, events: list[Event]) -> None:
    """With the headers nothing is over yet; with the last byte it is."""
    async with client().stream("GET", "/") as response:
        assert [] == ended(events)
        assert b"ok" == await response.aread()
        assert [("success", 1)] == ended(events)
    assert [("success", 1)] == ended(events)


async def test_closing_early_ends_a_call_well(client: Make, host: FaultHost, events: list[Event]) -> None:
    """A reader that has seen enough closes the response: that is no failure of anybody."""
    gate = Gate()
    host.script = [dripping(gate, b"first", b"second")]
    breaker = CircuitBreaker("prices")
    async with client(breaker=breaker).stream("GET", "/") as response:
        assert b"first" == await anext(response.aiter_raw())
    assert [("success", 1)] == ended(events)
    assert 1 == breaker.counts["success"]


async def test_a_forgotten_response_ends_its_call(client: Make, host: FaultHost, events: list[Event]) -> None:
    """A response that is dropped without being read or closed ends its call when it is collected."""
    prices = client()
    response = await prices.send(prices.build_request("GET", "/"), stream=True)
    del response
    gc.collect()
    await asyncio.sleep(0)
    assert [("success", 1)] == ended(events)


async def test_a_cancelled_call_is_no_failure(
    client: Make, host: FaultHost, spans: Spans, events: list[Event], clock: ManualClock
) -> None:
    """Who cancels gets the cancellation; the breaker counts nothing, and no span is an error."""
    gate = Gate()
    host.script = [silent(gate)]
    breaker = CircuitBreaker("prices", clock=clock)
    task = asyncio.create_task(client(breaker=breaker).get("/"))
    await gate.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [("cancelled", 1)] == ended(events)
    assert 1 == breaker.counts["ignored"]
    assert [StatusCode.UNSET] * 2 == [
        span.status.status_code for span in (*spans.named("GET"), *spans.named("meshkit.call prices"))
    ]


async def test_a_failed_body_fails_the_call(
    client: Make, library: Any, host: FaultHost, spans: Spans, events: list[Event]
) -> None:
    """The caller gets an exception out of the body, so the call's span is an error."""
    host.script = [half()]
    with pytest.raises(library.RemoteProtocolError):
        await client().get("/")
    assert [("error", 1)] == ended(events)
    (call,) = spans.named("meshkit.call prices")
    assert StatusCode.ERROR is call.status.status_code


# -- time -------------------------------------------------------------------------------------------------------------


async def test_the_total_timeout_covers_a_silent_body(client: Make, host: FaultHost, events: list[Event]) -> None:
    """Headers came in time, the rest does not: the read ends with the call's time."""
    clock, gate = ManualClock(hold=True), Gate()
    host.script = [dripping(gate, b"first", b"second")]
    async with client(clock=clock, timeout=4.0).stream("GET", "/") as response:
        chunks = response.aiter_raw()
        assert b"first" == await anext(chunks)
        reading = asyncio.create_task(anext(chunks))
        await asyncio.sleep(0)
        await clock.advance(4.0)
        with pytest.raises(DeadlineExceededError):
            await reading
    assert [("error", 1)] == ended(events)


async def test_the_total_timeout_covers_a_dripping_body(client: Make, host: FaultHost, events: list[Event]) -> None:
    """A byte now and then keeps every read short; the sum is still bounded."""
    clock, gate = ManualClock(), Gate()
    gate.opened.set()
    host.script = [dripping(gate, b"x" * 70_000, b"y" * 200_000)]
    async with client(clock=clock, timeout=30.0).stream("GET", "/") as response:
        chunks = response.aiter_raw()
        await anext(chunks)
        await clock.sleep(31.0)
        with pytest.raises(DeadlineExceededError):
            await anext(chunks)
    assert ["total"] == [event.kind for event in events if isinstance(event, TimedOut)]
    assert [("error", 1)] == ended(events)


async def test_no_time_left_sends_nothing_and_counts_nothing(client: Make, host: FaultHost, clock: ManualClock) -> None:
    """A request whose own deadline has passed is no news of the server."""
    breaker = CircuitBreaker("prices", clock=clock)
    with scope_open(Scope(deadline=clock.now())), pytest.raises(DeadlineExceededError):
        await client(breaker=breaker).get("/")
    assert [] == host.asked
    assert 1 == breaker.counts["ignored"]


# -- fallback ---------------------------------------------------------------------------------------------------------


async def test_a_fallback_answers_and_says_so(
    client: Make, library: Any, nobody: str, spans: Spans, events: list[Event], clock: ManualClock
) -> None:
    """Its response is handed out, the call is neither error nor success, and the request knows that it is degraded;
    the breaker has counted what really happened."""
    breaker = CircuitBreaker("prices", clock=clock)
    prices = client(
        base_url=nobody,
        breaker=breaker,
        fallback=Fallback(answer=lambda outcome: library.Response(200, json=[]), name="no-prices"),
    )
    with scope_open(Scope()) as scope:
        assert [] == (await prices.get("/")).json()
        assert ("no-prices",) == scope.degraded
    assert [("fallback", 3)] == ended(events)
    assert {"success": 0, "failure": 3, "ignored": 0, "rejected": 0, "shadowed": 0} == breaker.counts
    (call,) = spans.named("meshkit.call prices")
    assert StatusCode.UNSET is call.status.status_code
    assert ["meshkit.retry", "meshkit.retry", "meshkit.fallback"] == [event.name for event in call.events]


async def test_a_fallback_is_a_function_too(client: Make, library: Any, host: FaultHost) -> None:
    """A plain coroutine function does; it sees what failed."""

    async def cached(outcome: Any) -> Any:
        return library.Response(203, text=str(outcome.result.status_code))

    host.script = [answer(500)]
    response = await client(fallback=cached).get("/")
    assert (203, "500") == (response.status_code, response.text)


async def test_a_fallback_returns_a_response(client: Make, host: FaultHost) -> None:
    """Anything else is named as the mistake it is."""
    host.script = [answer(500)]
    with pytest.raises(meshkit.ConfigurationError, match="returned dict"):
        await client(fallback=lambda outcome: {}).get("/")


# -- errors -----------------------------------------------------------------------------------------------------------


async def test_errors_of_policies_are_errors_of_the_library(client: Make, library: Any, host: FaultHost) -> None:
    """Code that catches the library's errors catches a refusal and a timeout too; they are still what they were."""
    clock, gate = ManualClock(hold=True), Gate()
    breaker = CircuitBreaker("prices", clock=clock)
    prices = client(breaker=breaker, clock=clock, retry=None)
    host.script = [silent(gate)]
    task = asyncio.create_task(prices.get("/"))
    await gate.reached.wait()
    await clock.advance(5.0)
    with pytest.raises(library.TimeoutException) as late:
        await task
    assert isinstance(late.value, AttemptTimeoutError)
    assert "/" == late.value.request.url.path
    breaker.isolate()
    with pytest.raises(library.HTTPError) as refused:
        await prices.get("/")
    assert isinstance(refused.value, CircuitOpenError)
    assert "MK501  circuit 'prices' is isolated." == str(refused.value)
