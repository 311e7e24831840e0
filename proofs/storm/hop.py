"""One service of the chain: a FastAPI app whose only route asks the next one.

    python -m proofs.storm.hop --fd N --name edge --target URL --kind meshkit|plain [--breaker SECONDS]

`meshkit` and `plain` have the same handler. The one installs meshkit and asks through its client; the other asks through httpx and
tenacity, as services do that were made one at a time: three attempts, waits of random, growing length, on any error.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

import httpx
import tenacity
from fastapi import FastAPI, HTTPException

import meshkit.fastapi
import meshkit.httpx
from meshkit import CircuitBreaker
from meshkit.core.events import CircuitChanged, listen
from meshkit.policies.circuit_breaker import breakers
from proofs.storm.process import serve

ATTEMPTS = 3
# A service that is called a hundred times a second has a connection for each call that is under way.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=200)


class Counting(httpx.AsyncHTTPTransport):
    """The real transport, which counts what is sent: a port that refuses connections cannot count for itself."""

    sent = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.sent += 1
        return await super().handle_async_request(request)


class Plain:
    """What is retried by hand."""

    def __init__(self, target: str, inner: Counting) -> None:
        # No limit of time: what is to be seen is what retries do, not what a slow machine does to them.
        self._client = httpx.AsyncClient(base_url=target, transport=inner, timeout=None)

    async def get(self, path: str) -> httpx.Response:
        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=10),
            retry=tenacity.retry_if_exception_type(httpx.HTTPError),
            reraise=True,
        ):
            with attempt:
                answer = await self._client.get(path)
                answer.raise_for_status()
        return answer


def made(name: str, target: str, kind: str, breaker: float | None) -> FastAPI:
    """The service."""
    app = FastAPI(telemetry={"tracing": False})
    inner = Counting(limits=LIMITS)
    client: Any
    if kind == "plain":
        client = Plain(target, inner)
    else:
        own = None if breaker is None else CircuitBreaker(f"{name}'s next", open_for=breaker)
        client = meshkit.httpx.client(f"{name}'s next", base_url=target, breaker=own, inner=inner)
    served = 0
    changes: list[dict[str, object]] = []
    listen(lambda event: changes.append({"to": event.new, "at": round(time.time(), 3)}), kind=CircuitChanged)

    @app.get("/")
    async def ask() -> str:
        nonlocal served
        served += 1
        try:
            answer = await client.get("/")
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise HTTPException(503, "the next service does not answer") from error
        return str(answer.text)

    @app.get("/seen")
    async def seen() -> dict[str, object]:
        (breaker,) = breakers() or (None,)
        return {
            "served": served,
            "sent": inner.sent,
            "state": None if breaker is None else breaker.state,
            "retry_after": None if breaker is None else breaker.retry_after,
            "changes": changes,
        }

    if kind == "meshkit":
        meshkit.fastapi.install(app, service=name)
    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--kind", choices=("meshkit", "plain"), required=True)
    parser.add_argument("--breaker", type=float)
    options = parser.parse_args()
    asyncio.run(serve(made(options.name, options.target, options.kind, options.breaker), options.fd))


if __name__ == "__main__":
    main()
