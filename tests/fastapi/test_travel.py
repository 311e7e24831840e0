"""What travels over several services: each an app of its own on a real socket, with a client of meshkit to the next."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException, Request, Response

import meshkit.fastapi
import meshkit.httpx
from meshkit import CircuitBreaker, Fallback, Retry, current_scope
from meshkit.core.clock import SYSTEM_CLOCK
from meshkit.core.events import CircuitChanged, Event, RetryEnded
from meshkit.policies.retry import Backoff
from tests.fastapi.conftest import Serve, Spans

AT_ONCE = Retry(backoff=Backoff(first=0.0))


class Leaf:
    """A service without meshkit: writes down the headers that it is asked with, and answers as it is told."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.answer: Callable[[], Awaitable[Response]] = self._fine
        self.over = asyncio.Event()
        self.app = FastAPI(telemetry={"tracing": False})

        @self.app.get("/")
        async def ask(request: Request) -> Response:
            self.asked.append({name.lower(): value for name, value in request.headers.items()})
            return await self.answer()

    async def _fine(self) -> Response:
        return Response("fine")

    async def down(self) -> Response:
        return Response(status_code=503)

    async def silent(self) -> Response:
        await self.over.wait()
        return Response()


class Hop:
    """A service that asks the next one, and answers with what that answered; `answers` may do it another way."""

    def __init__(self, serve: Serve, name: str, target: Any, **options: Any) -> None:
        self.ran = 0
        self.left: list[float | None] = []
        install = options.pop("install", {})
        self.answers = options.pop("answers", self._same)
        self.client = meshkit.httpx.client(name, base_url=target.base_url, **({"retry": AT_ONCE} | options))
        self.app = FastAPI(telemetry={"tracing": False})
        self._serve = serve

        @self.app.get("/")
        async def ask() -> Response:
            self.ran += 1
            scope = current_scope()
            assert scope is not None
            self.left.append(None if scope.deadline is None else scope.deadline - SYSTEM_CLOCK.now())
            answer: Response = await self.answers(self.client)
            return answer

        meshkit.fastapi.install(self.app, service=name, **install)

    async def _same(self, client: httpx.AsyncClient) -> Response:
        answer = await client.get("/")
        return Response(answer.content, status_code=answer.status_code)


@pytest.fixture
async def hop(serve: Serve) -> Any:
    """Puts a service before another: gives the service, and a plain client of it."""
    made: list[Hop] = []

    async def before(target: httpx.AsyncClient, name: str, **options: Any) -> tuple[Hop, httpx.AsyncClient]:
        made.append(Hop(serve, name, target, **options))
        return made[-1], await serve(made[-1].app)

    yield before
    for one in made:
        await one.client.aclose()


# -- time -------------------------------------------------------------------------------------------------------------


async def test_a_deadline_survives_two_services_and_only_shortens(serve: Serve, hop: Any) -> None:
    """What the first caller allows is what all further ones have at most: FastAPI → httpx → FastAPI → httpx, as Finagle's
    `DeadlineFilterTest.scala` has it for one."""
    leaf = Leaf()
    b, at_b = await hop(await serve(leaf.app), "b")
    a, at_a = await hop(at_b, "a", install={"timeout": 60.0})
    await at_a.get("/", headers={"meshkit-timeout-ms": "2000"})
    (left_a,), (left_b,) = a.left, b.left
    assert 1.0 < left_b < left_a <= 1.9
    assert 1000 < int(leaf.asked[0]["meshkit-timeout-ms"]) <= left_b * 1000 + 1


async def test_time_in_the_handler_is_time_that_is_gone(serve: Serve, hop: Any) -> None:
    """What a request has waited for here, the next service does not have."""
    leaf = Leaf()

    async def slowly(client: httpx.AsyncClient) -> Response:
        await asyncio.sleep(0.2)
        await client.get("/")
        return Response()

    _, at_a = await hop(await serve(leaf.app), "a", answers=slowly)
    await at_a.get("/", headers={"meshkit-timeout-ms": "1000"})
    assert int(leaf.asked[0]["meshkit-timeout-ms"]) <= 750


@pytest.mark.parametrize(
    "header",
    [
        {"meshkit-timeout-ms": "0"},
        {"meshkit-timeout-ms": "000"},
        {"grpc-timeout": "0S"},
        {"x-envoy-expected-rq-timeout-ms": "0"},
        {"meshkit-timeout-ms": "5000", "grpc-timeout": "0n"},
    ],
)
async def test_what_has_expired_on_arrival_is_not_run(serve: Serve, hop: Any, header: dict[str, str]) -> None:
    """The answer is a 504 that names no time to come back, as Finagle's `DeadlineFilterTest.scala` rejects expired requests."""
    a, at_a = await hop(await serve(Leaf().app), "a")
    answer = await at_a.get("/", headers=header)
    assert (504, 0, None) == (answer.status_code, a.ran, answer.headers.get("retry-after"))


@pytest.mark.parametrize(
    "value",
    [
        "-1",
        "-999999999999",
        "soon",
        "1e9",
        "1.5",
        "",
        " ",
        "0x10",
        "5000, 9",
        "١٢",
        "+5",
        "NaN",
        "inf",
        "\x01",
        "9" * 9000,
    ],
)
@pytest.mark.parametrize("name", ["meshkit-timeout-ms", "grpc-timeout", "x-envoy-expected-rq-timeout-ms"])
async def test_a_forged_time_is_no_error_and_no_more_time(name: str, value: str) -> None:
    """Negative, absurd, huge or garbage: the request runs, with at most the time that it has without the header."""
    seen: list[float] = []
    app = FastAPI(telemetry={"tracing": False})

    @app.get("/")
    async def left() -> None:
        scope = current_scope()
        assert scope is not None
        assert scope.deadline is not None
        seen.append(scope.deadline - SYSTEM_CLOCK.now())

    meshkit.fastapi.install(app, service="shop", timeout=30.0)
    headers = [(name.encode(), value.encode())]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        assert 200 == (await client.get("/", headers=headers)).status_code
    assert 29.0 < seen[0] <= 30.0


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("3", 3),
        ("0", 1),
        ("007", 7),
        ("999999999", 1000),
        ("9" * 5000, 1000),
        ("-1", None),
        ("x", None),
        ("", None),
        ("1,2", None),
    ],
)
async def test_a_forged_attempt_is_capped_or_dropped(spans: Spans, value: str, number: int | None) -> None:
    """The span of a request tells which try it is: at least 1, at most 1,000, and nothing where it is no number."""
    app = FastAPI(telemetry={"tracing": False})
    app.get("/")(lambda: None)
    meshkit.fastapi.install(app, service="shop")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        assert 200 == (await client.get("/", headers={"meshkit-attempt": value})).status_code
    (span,) = spans.ended()
    assert number == (span.attributes or {}).get("meshkit.attempt")


# -- exhaustion -------------------------------------------------------------------------------------------------------


async def _as_it_comes(client: httpx.AsyncClient) -> Response:
    answer = await client.get("/")
    return Response(status_code=answer.status_code)


async def _raises(client: httpx.AsyncClient) -> Response:
    (await client.get("/")).raise_for_status()
    return Response()


async def _by_hand(client: httpx.AsyncClient) -> Response:
    try:
        (await client.get("/")).raise_for_status()
    except httpx.HTTPError:
        raise HTTPException(502, "the next one is down") from None
    return Response()


@pytest.mark.parametrize("answers", [_as_it_comes, _raises, _by_hand])
async def test_only_the_service_next_to_what_is_down_tries_again(
    serve: Serve, hop: Any, events: list[Event], answers: Any
) -> None:
    """Three services of three attempts make three calls and not 27, in whatever way their handlers hand the failure up."""
    leaf = Leaf()
    leaf.answer = leaf.down
    _, at_b = await hop(await serve(leaf.app), "b", answers=answers)
    a, at_a = await hop(at_b, "a", answers=answers)
    edge, at_edge = await hop(at_a, "edge", answers=answers)
    answer = await at_edge.get("/")
    assert ("exhausted", 3) == (answer.headers["meshkit-retry"], len(leaf.asked))
    assert [("b", "attempts", 3), ("a", "server", 1), ("edge", "server", 1)] == [
        (event.source, event.reason, event.attempts) for event in events if isinstance(event, RetryEnded)
    ]
    assert (1, 1) == (a.ran, edge.ran)


@pytest.mark.parametrize("answers", [_as_it_comes, _raises, _by_hand])
async def test_a_service_without_retries_hands_exhaustion_on(serve: Serve, hop: Any, answers: Any) -> None:
    """One in the middle that retries nothing itself does not hide from its caller that others have."""
    leaf = Leaf()
    leaf.answer = leaf.down
    _, at_b = await hop(await serve(leaf.app), "b", answers=answers)
    _, at_a = await hop(at_b, "a", answers=answers, retry=None, breaker=None)
    _, at_edge = await hop(at_a, "edge", answers=answers)
    await at_edge.get("/")
    assert 3 == len(leaf.asked)


@pytest.mark.parametrize("answers", [_as_it_comes, _raises, _by_hand])
async def test_only_the_breaker_next_to_what_is_down_opens(
    serve: Serve, hop: Any, events: list[Event], answers: Any
) -> None:
    """For those above, a failure that travels and a refusal that travels are no faults of the service they call."""
    leaf = Leaf()
    leaf.answer = leaf.down
    opens = {name: CircuitBreaker(name, min_calls=2, open_for=60.0) for name in ("b", "a", "edge")}
    _, at_b = await hop(await serve(leaf.app), "b", answers=answers, breaker=opens["b"])
    _, at_a = await hop(at_b, "a", answers=answers, breaker=opens["a"])
    _, at_edge = await hop(at_a, "edge", answers=answers, breaker=opens["edge"])
    for _ in range(8):
        assert (await at_edge.get("/")).status_code >= 500
    assert ["b"] == [event.source for event in events if isinstance(event, CircuitChanged)]
    assert [0, 0] == [opens[name].counts["failure"] for name in ("a", "edge")]


async def test_what_hangs_is_a_fault_of_the_service_next_to_it_only(
    serve: Serve, hop: Any, events: list[Event]
) -> None:
    """Each service gives up a moment before its caller does and says why, so that the caller blames nobody else."""
    leaf = Leaf()
    leaf.answer = leaf.silent
    breakers = {name: CircuitBreaker(name) for name in ("b", "a", "edge")}
    _, at_b = await hop(await serve(leaf.app), "b", attempt_timeout=1.0, breaker=breakers["b"])
    _, at_a = await hop(at_b, "a", attempt_timeout=1.0, breaker=breakers["a"])
    _, at_edge = await hop(at_a, "edge", attempt_timeout=1.0, breaker=breakers["edge"])
    answer = await at_edge.get("/", timeout=10.0)
    leaf.over.set()
    assert (504, "exhausted", 1) == (answer.status_code, answer.headers["meshkit-retry"], len(leaf.asked))
    assert {"b": 1, "a": 0, "edge": 0} == {name: breaker.counts["failure"] for name, breaker in breakers.items()}


# -- degraded ---------------------------------------------------------------------------------------------------------


async def test_a_fallback_two_services_below_is_visible_at_the_top(serve: Serve, hop: Any) -> None:
    """An answer that rests on one that a fallback gave says so, whoever is asked, and each name once."""
    leaf = Leaf()
    leaf.answer = leaf.down
    last = Fallback(answer=lambda _: httpx.Response(200, text="old"), name="last-price")
    _, at_b = await hop(await serve(leaf.app), "b", fallback=last)
    _, at_a = await hop(at_b, "a")
    answer = await at_a.get("/")
    assert (200, "old", "last-price") == (answer.status_code, answer.text, answer.headers["meshkit-degraded"])
    assert "meshkit-retry" not in answer.headers


async def test_requests_at_once_keep_their_own(serve: Serve, hop: Any) -> None:
    """Time, exhaustion and marks belong to one request: of a hundred at once, each has its own."""
    leaf = Leaf()
    count = Counter[str]()

    async def mixed(client: httpx.AsyncClient) -> Response:
        scope = current_scope()
        assert scope is not None
        count["all"] += 1
        mine = f"n{count['all']}"
        scope.mark_degraded(mine)
        await client.get("/")
        return Response(mine)

    _, at_a = await hop(await serve(leaf.app), "a", answers=mixed)
    answers = await asyncio.gather(*(at_a.get("/") for _ in range(100)))
    assert [answer.text for answer in answers] == [answer.headers["meshkit-degraded"] for answer in answers]
