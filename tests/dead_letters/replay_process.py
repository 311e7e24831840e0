"""A replay in a process of its own, for the test that kills it: python replay_process.py URL QUEUE"""

from __future__ import annotations

import asyncio
import sys

from meshkit.rabbitmq.dead_letters import DeadLetters


async def main(url: str, queue: str) -> None:
    async with DeadLetters(url) as letters:
        await letters.replay(queue, progress=lambda receipt: print(len(receipt.replayed), flush=True))


asyncio.run(main(sys.argv[1], sys.argv[2]))
