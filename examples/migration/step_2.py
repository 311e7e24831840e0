"""Step 2: the retry. tenacity's strategies stay, as arguments; policies stand in one place, in their order."""

from __future__ import annotations

import httpx
import tenacity

import meshkit
from meshkit.core.events import RetryScheduled
from migration.metrics import ANSWERS, RETRIES, SECONDS, BreakerMetrics


def _worth_it(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


def _failed(outcome: meshkit.Outcome) -> bool:
    error = outcome.error
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return error is not None


meshkit.listen(lambda _: RETRIES.inc(), kind=RetryScheduled)


class Prices:
    """The price service, as the rest of the code sees it."""

    def __init__(self, base_url: str, *, open_for: float = 30.0) -> None:
        self._http = httpx.AsyncClient(base_url=base_url, timeout=5)
        self._policies = meshkit.Pipeline(
            "prices",
            meshkit.Timeout(total=20),
            meshkit.Retry(
                retry=tenacity.retry_if_exception(_worth_it),
                wait=tenacity.wait_random_exponential(multiplier=0.02, max=2),
                attempts=3,
                budget=meshkit.RetryBudget("prices"),
            ),
            meshkit.CircuitBreaker(
                "prices",
                window=5,
                min_calls=5,
                failure_rate=1.0,
                open_for=open_for,
                failed=_failed,
                listeners=[BreakerMetrics()],
            ),
        )

    async def price(self, course: str) -> str:
        return (await self._policies.call(self._ask, "GET", f"/prices/{course}")).text

    async def order(self, course: str) -> str:
        return (await self._policies.call(self._ask, "POST", f"/orders/{course}")).text

    async def close(self) -> None:
        await self._http.aclose()

    async def _ask(self, method: str, path: str) -> httpx.Response:
        with SECONDS.time():
            response = await self._http.request(method, path)
        ANSWERS.labels(response.status_code).inc()
        return response.raise_for_status()
