"""One process of a fleet: it calls through a breaker all the time, follows the store, and answers what it is asked.

Arguments: the URL of Redis, the prefix, and "pybreaker" or "meshkit" for the kind of storage. Each line on stdin is a
word; each is answered by one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import pybreaker
import redis

from meshkit import CircuitBreaker, CircuitOpenError, Pipeline, SharedState
from meshkit.redis import BreakerStore


def storage_of(kind: str, url: str, prefix: str) -> Any:
    if kind == "meshkit":
        return BreakerStore(url, prefix=prefix, timeout=0.5)
    # As many have it: without a timeout, so a Redis that hangs is waited for as long as it hangs.
    client = redis.Redis.from_url(url, socket_timeout=None)
    return lambda name: pybreaker.CircuitRedisStorage("closed", client, namespace=f"{prefix}:{name}")


async def main(url: str, prefix: str, kind: str) -> None:
    breaker = CircuitBreaker("payments", min_calls=5, window=10, open_for=600)
    done = {"ok": 0, "rejected": 0, "failed": 0}
    slowest, fails = 0.0, False

    async def work() -> None:
        if fails:
            raise ConnectionError

    guarded = Pipeline("payments", breaker)(work)

    async def call_all_the_time() -> None:
        nonlocal slowest
        while True:
            began = time.monotonic()
            try:
                await guarded()
                done["ok"] += 1
            except CircuitOpenError:
                done["rejected"] += 1
            except ConnectionError:
                done["failed"] += 1
            slowest = max(slowest, time.monotonic() - began)
            await asyncio.sleep(0.005)

    async with SharedState(storage_of(kind, url, prefix), every=0.1) as shared:
        calling = asyncio.create_task(call_all_the_time())
        while word := (await asyncio.to_thread(sys.stdin.readline)).strip():
            fails = {"fail": True, "work": False}.get(word, fails)
            check = shared.checks()[0]
            said = {"state": breaker.state, "slowest": slowest, "store": check.ok, "calls": sum(done.values())}
            print(json.dumps({**said, **done}), flush=True)
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
