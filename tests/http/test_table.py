"""What is tried again and what a breaker counts: the table of meshkit.httpx, row by row, over real sockets."""

from __future__ import annotations

import asyncio
import email.utils
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

import meshkit.httpx
from meshkit import AttemptTimeoutError, CircuitBreaker, Retry, Scope
from meshkit.core.events import ClientAttemptEnded, Event, RetryEnded, RetryScheduled
from meshkit.core.scope import scope_open
from meshkit.testing.clock import ManualClock
from tests.http.fault_host import FaultHost, Gate, answer, half, hang_up, reset, silent

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("method", "status", "sends", "counted"),
    [
        ("GET", 200, 1, "success"),
        ("GET", 404, 1, "success"),
        ("GET", 408, 3, "failure"),
        ("GET", 429, 3, "ignored"),
        ("POST", 429, 3, "ignored"),
        ("GET", 500, 1, "failure"),
        ("GET", 501, 1, "failure"),
        ("GET", 502, 3, "failure"),
        ("PUT", 503, 3, "failure"),
        ("DELETE", 504, 3, "failure"),
        ("POST", 502, 1, "failure"),
        ("POST", 503, 1, "failure"),
        ("PATCH", 504, 1, "failure"),
    ],
)
async def test_an_answer_is_judged_by_method_and_status(
    client: Make, host: FaultHost, clock: ManualClock, method: str, status: int, sends: int, counted: str
) -> None:
    """Each status is retried for the methods of the table only, and counts for the breaker as the table says."""
    host.script = [answer(status)]
    breaker = CircuitBreaker("prices", clock=clock)
    response = await client(breaker=breaker).request(method, "/")
    assert status == response.status_code
    assert sends == len(host.asked)
    assert {"success": 0, "failure": 0, "ignored": 0, "rejected": 0, "shadowed": 0} | {counted: sends} == breaker.counts


async def test_an_idempotency_key_makes_any_method_idempotent(client: Make, host: FaultHost) -> None:
    """A POST with an Idempotency-Key is tried again, with the same key and the same body."""
    host.script = [answer(503), answer()]
    response = await client().post("/", content=b"pay", headers={"Idempotency-Key": "k1"})
    assert 200 == response.status_code
    assert [("k1", b"pay")] * 2 == [(asked.headers["idempotency-key"], asked.body) for asked in host.asked]


async def test_503_with_retry_after_is_retried_for_any_method(
    client: Make, host: FaultHost, clock: ManualClock
) -> None:
    """A 503 that names a time was refused before it did anything, so a POST comes back after that time."""
    clock.chance = 0.0
    host.script = [answer(503, retry_after="7"), answer()]
    assert 200 == (await client().post("/")).status_code
    assert [7.0] == clock.sleeps


@pytest.mark.parametrize("after", ["Mon, 20 Nov 99999999999999999999 10:00:00 GMT", "soon", "-3", "1e3", ""])
async def test_a_retry_after_that_says_nothing_is_none(
    client: Make, host: FaultHost, clock: ManualClock, after: str
) -> None:
    """A Retry-After that holds neither seconds nor a date leaves the standard wait."""
    host.script = [answer(429, retry_after=after), answer()]
    assert 200 == (await client().get("/")).status_code
    assert [0.05] == clock.sleeps


@pytest.mark.parametrize(("ahead", "waited"), [(12, 12.0), (-60, 0.05)])
async def test_retry_after_may_be_a_date(
    client: Make, host: FaultHost, clock: ManualClock, ahead: int, waited: float
) -> None:
    """An HTTP date is waited for; one in the past leaves the standard wait."""
    when = email.utils.format_datetime(datetime.fromtimestamp(clock.time() + ahead, UTC), usegmt=True)
    clock.chance = 0.5
    host.script = [answer(429, retry_after=when), answer()]
    assert 200 == (await client().get("/")).status_code
    assert [pytest.approx(waited * 1.05 if ahead > 0 else waited)] == clock.sleeps


async def test_a_retry_after_beyond_the_deadline_is_not_waited_for(
    client: Make, host: FaultHost, clock: ManualClock, events: list[Event]
) -> None:
    """Where the time the server asks for is longer than what is left, its answer is handed out at once."""
    host.script = [answer(503, retry_after="60")]
    assert 503 == (await client().get("/")).status_code
    assert [] == clock.sleeps
    assert ["deadline"] == [event.reason for event in events if isinstance(event, RetryEnded)]


@pytest.mark.parametrize("word", ["exhausted", "rejected"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_meshkit_retry_ends_the_retry_and_is_neutral(
    client: Make, host: FaultHost, clock: ManualClock, word: str, method: str
) -> None:
    """A host that says its own retries are used up is asked once, is no fault of its own, and the request learns it."""
    host.script = [answer(503, retry_after="1", meshkit_retry=word)]
    breaker = CircuitBreaker("prices", clock=clock)
    with scope_open(Scope()) as scope:
        assert 503 == (await client(breaker=breaker).request(method, "/")).status_code
        assert scope.exhausted
    assert 1 == len(host.asked)
    assert 1 == breaker.counts["ignored"]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_connection_that_cannot_be_made_is_tried_again(
    client: Make, library: Any, nobody: str, clock: ManualClock, method: str
) -> None:
    """Nothing was sent, so any method is tried again; it counts as a failure."""
    breaker = CircuitBreaker("prices", clock=clock)
    with pytest.raises(library.ConnectError) as caught:
        await client(base_url=nobody, breaker=breaker).request(method, "/")
    assert ["meshkit: gave up on 'prices' after 3 attempts, ended by attempts"] == caught.value.__notes__
    assert 3 == breaker.counts["failure"]


@pytest.mark.parametrize(("method", "sends"), [("GET", 3), ("POST", 1)])
@pytest.mark.parametrize("fault", [reset, hang_up])
async def test_a_connection_that_breaks_is_tried_again_where_idempotent(
    client: Make, library: Any, host: FaultHost, clock: ManualClock, method: str, sends: int, fault: Any
) -> None:
    """On a new connection a break is a failure, and only what is idempotent goes out once more."""
    host.script = [fault]
    breaker = CircuitBreaker("prices", clock=clock)
    with pytest.raises(library.TransportError):
        await client(breaker=breaker).request(method, "/")
    assert sends == len(host.asked) == breaker.counts["failure"]


async def test_a_kept_connection_closed_before_a_byte_is_no_fault(
    client: Make, host: FaultHost, clock: ManualClock, events: list[Event]
) -> None:
    """A server that closes an idle connection just as a request comes: sent again at once, and nothing is counted."""
    host.script = [answer(), hang_up, answer()]
    breaker = CircuitBreaker("prices", clock=clock)
    prices = client(breaker=breaker)
    await prices.get("/1")
    assert 200 == (await prices.get("/2")).status_code
    assert [1, 1, 2] == [asked.connection for asked in host.asked]
    assert ["1", "1", "2"] == [asked.headers["meshkit-attempt"] for asked in host.asked]
    assert [] == clock.sleeps
    assert {"success": 2, "failure": 0, "ignored": 0, "rejected": 0, "shadowed": 0} == breaker.counts
    assert [0.0] == [event.delay for event in events if isinstance(event, RetryScheduled)]
    assert 3 == sum(isinstance(event, ClientAttemptEnded) for event in events)


async def test_it_is_sent_again_at_once_only_once(client: Make, host: FaultHost, clock: ManualClock) -> None:
    """A second closed connection goes by the standard wait, so that a host that does nothing else is not hammered."""
    prices = client()
    host.script = [answer(), hang_up, hang_up, answer()]
    await prices.get("/1")
    assert 200 == (await prices.get("/2")).status_code
    assert [0.05] == clock.sleeps


async def test_a_post_on_a_closed_connection_is_not_sent_again(
    client: Make, library: Any, host: FaultHost, clock: ManualClock
) -> None:
    """Whether a POST was handled before the connection closed is not known, so it is not repeated; nobody's fault."""
    host.script = [answer(), hang_up]
    breaker = CircuitBreaker("prices", clock=clock)
    prices = client(breaker=breaker)
    await prices.get("/1")
    with pytest.raises(library.RemoteProtocolError):
        await prices.post("/2")
    assert 2 == len(host.asked)
    assert {"success": 1, "failure": 0, "ignored": 1, "rejected": 0, "shadowed": 0} == breaker.counts


@pytest.mark.parametrize("retry", [None, Retry(attempts=1)])
async def test_who_wants_no_retries_gets_none(client: Make, library: Any, host: FaultHost, retry: Retry | None) -> None:
    """Without retries, not even a kept connection that was closed is tried again."""
    host.script = [answer(), hang_up]
    prices = client(retry=retry)
    await prices.get("/1")
    with pytest.raises(library.RemoteProtocolError):
        await prices.get("/2")


async def test_a_shortage_of_connections_is_our_own(
    client: Make, library: Any, host: FaultHost, clock: ManualClock
) -> None:
    """Waiting in vain for a place in the pool is retried for any method and is neutral for the breaker."""
    gate = Gate()
    host.script = [silent(gate)]
    breaker = CircuitBreaker("prices", clock=clock)
    transport = meshkit.httpx.transport(
        "prices", library=library.__name__, clock=clock, breaker=breaker, limits=library.Limits(max_connections=1)
    )
    async with library.AsyncClient(transport=transport, timeout=library.Timeout(5.0, pool=0.01)) as prices:
        task = asyncio.create_task(prices.get(host.url))
        await gate.reached.wait()
        with pytest.raises(library.PoolTimeout) as caught:
            await prices.post(host.url)
        assert "after 3 attempts" in caught.value.__notes__[0]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert {"success": 0, "failure": 0, "ignored": 4, "rejected": 0, "shadowed": 0} == breaker.counts


async def test_an_attempt_that_never_got_a_connection_is_our_own_shortage(
    client: Make, library: Any, host: FaultHost
) -> None:
    """An attempt timeout that passed in the pool's queue says nothing of the server."""
    clock = ManualClock(hold=True)
    gate = Gate()
    host.script = [silent(gate)]
    breaker = CircuitBreaker("prices", clock=clock)
    inner = library.AsyncHTTPTransport(limits=library.Limits(max_connections=1))
    prices = client(inner=inner, breaker=breaker, clock=clock, retry=None)
    async with library.AsyncClient(transport=inner) as greedy:
        first = asyncio.create_task(greedy.get(host.url))
        await gate.reached.wait()
        second = asyncio.create_task(prices.get("/"))
        await asyncio.sleep(0)
        await clock.advance(5.0)
        with pytest.raises(AttemptTimeoutError):
            await second
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
    assert 1 == len(host.asked)
    assert {"success": 0, "failure": 0, "ignored": 1, "rejected": 0, "shadowed": 0} == breaker.counts


async def test_an_attempt_that_gets_no_answer_in_time_is_tried_again(client: Make, host: FaultHost) -> None:
    """No headers within the attempt timeout is a failure, and idempotent requests go out again."""
    clock = ManualClock(hold=True)
    gates = [Gate(), Gate()]
    host.script = [silent(gates[0]), silent(gates[1]), answer()]
    breaker = CircuitBreaker("prices", clock=clock)
    task = asyncio.create_task(client(breaker=breaker, clock=clock).get("/"))
    for gate in gates:
        await gate.reached.wait()
        await clock.advance(5.0)
        await clock.advance(1.0)
    assert 200 == (await task).status_code
    assert {"success": 1, "failure": 2, "ignored": 0, "rejected": 0, "shadowed": 0} == breaker.counts


async def test_a_body_that_breaks_off_is_a_failure(
    client: Make, library: Any, host: FaultHost, clock: ManualClock, events: list[Event]
) -> None:
    """What was handed out cannot be taken back: the caller gets the error, the breaker counts the failure."""
    host.script = [half()]
    breaker = CircuitBreaker("prices", clock=clock)
    with pytest.raises(library.RemoteProtocolError):
        await client(breaker=breaker).get("/")
    assert 1 == len(host.asked)
    assert 1 == breaker.counts["failure"]
    (ended,) = [event for event in events if isinstance(event, ClientAttemptEnded)]
    assert (200, f"{library.__name__}.RemoteProtocolError") == (ended.status, ended.error_type)


async def test_a_body_that_can_be_read_once_is_not_sent_twice(client: Make, host: FaultHost) -> None:
    """A streamed request body is gone after the first attempt, so there is no second one."""

    async def once() -> Any:
        yield b"part"

    host.script = [answer(503)]
    assert 503 == (await client().put("/", content=once())).status_code
    assert [b"part"] == [asked.body for asked in host.asked]


async def test_a_body_that_nobody_has_begun_to_read_may_still_be_sent(
    client: Make, library: Any, host: FaultHost, nobody: str, events: list[Event]
) -> None:
    """Where no connection was made, a streamed body is whole, and the next attempt has it."""

    async def once() -> Any:
        yield b"part"

    with pytest.raises(library.ConnectError):
        await client(base_url=nobody).put("/", content=once())
    assert 3 == sum(isinstance(event, ClientAttemptEnded) for event in events)


async def test_an_address_that_cannot_be_used_is_not_tried_again(
    client: Make, library: Any, clock: ManualClock, events: list[Event]
) -> None:
    """A mistake of our own is neither retried nor counted against anybody."""
    breaker = CircuitBreaker("prices", clock=clock)
    with pytest.raises(library.UnsupportedProtocol):
        await client(breaker=breaker).get("ftp://127.0.0.1/")
    assert 1 == breaker.counts["ignored"]
    assert [] == [event for event in events if isinstance(event, RetryScheduled)]


async def test_discarded_responses_give_their_connection_back(client: Make, library: Any, host: FaultHost) -> None:
    """With room for one connection, a retry goes through, so the response before it was closed."""
    host.script = [answer(503, b"x" * 100_000), answer(503, b"x" * 100_000), answer()]
    prices = client(limits=library.Limits(max_connections=1), attempt_timeout=5.0)
    assert 200 == (await prices.get("/")).status_code
