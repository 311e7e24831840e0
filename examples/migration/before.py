"""Before: tenacity around pybreaker around httpx."""

from __future__ import annotations

import httpx
import pybreaker
import tenacity

from migration.metrics import ANSWERS, RETRIES, SECONDS, BreakerMetrics


def _worth_it(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


def _our_fault(error: BaseException) -> bool:
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500


class Prices:
    """The price service, as the rest of the code sees it."""

    def __init__(self, base_url: str, *, open_for: float = 30.0) -> None:
        self._http = httpx.AsyncClient(base_url=base_url, timeout=5)
        self._breaker = pybreaker.CircuitBreaker(
            name="prices", fail_max=5, reset_timeout=open_for, exclude=[_our_fault], listeners=[BreakerMetrics()]
        )

    async def price(self, course: str) -> str:
        return (await self._ask("GET", f"/prices/{course}")).text

    async def order(self, course: str) -> str:
        return (await self._ask("POST", f"/orders/{course}")).text

    async def close(self) -> None:
        await self._http.aclose()

    @tenacity.retry(
        retry=tenacity.retry_if_exception(_worth_it),
        stop=tenacity.stop_after_attempt(3),
        wait=tenacity.wait_random_exponential(multiplier=0.02, max=2),
        before_sleep=lambda _: RETRIES.inc(),
        reraise=True,
    )
    async def _ask(self, method: str, path: str) -> httpx.Response:
        with self._breaker.calling(), SECONDS.time():
            response = await self._http.request(method, path)
            ANSWERS.labels(response.status_code).inc()
            return response.raise_for_status()
