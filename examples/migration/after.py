"""After step 3: the policies stand where HTTP is known, in the transport, and bring their own metrics and spans."""

from __future__ import annotations

import httpx

import meshkit


class Prices:
    """The price service, as the rest of the code sees it."""

    def __init__(self, base_url: str, *, open_for: float = 30.0) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url,
            transport=meshkit.httpx.transport(
                "prices",
                timeout=20,
                attempt_timeout=5,
                retry=meshkit.Retry(attempts=3, backoff=meshkit.Backoff(first=0.02)),
                breaker=meshkit.CircuitBreaker("prices", open_for=open_for),
            ),
        )

    async def price(self, course: str) -> str:
        return (await self._http.get(f"/prices/{course}")).raise_for_status().text

    async def order(self, course: str) -> str:
        return (await self._http.post(f"/orders/{course}")).raise_for_status().text

    async def close(self) -> None:
        await self._http.aclose()
