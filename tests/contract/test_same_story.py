"""The same steps, drawn by lot, on both brokers: whatever a client can see must be the same."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aio_pika
import pytest
from aio_pika import Message
from aio_pika.abc import AbstractIncomingMessage
from contract_steps import ready

from meshkit.embedded import AmqpServer

QUEUES: list[dict[str, Any]] = [
    {},
    {"x-max-length": 4},
    {"x-max-length": 4, "x-overflow": "reject-publish"},
    {"x-max-priority": 3},
    {"x-queue-type": "quorum"},
    {"x-queue-type": "quorum", "x-delivery-limit": 3},
    {"x-queue-type": "quorum", "x-delivery-limit": 1, "x-max-length": 6},
]
STEPS = ("publish",) * 5 + ("get",) * 4 + ("ack", "ack up to", "nack", "nack up to", "reject", "lose")
# RabbitMQ carries out what is not answered, such as an ack, a moment later.
A_MOMENT = 0.02


class Story:
    """One client's view of a queue and its dead letters, step by step."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.seen: list[object] = []
        self.held: list[AbstractIncomingMessage] = []
        self.published = 0

    async def tell(self, url: str, arguments: dict[str, Any]) -> list[object]:
        async with await aio_pika.connect(url) as self.connection:
            channel = await self.connection.channel()
            await channel.declare_queue("dlq", durable=True)
            ends = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dlq"}
            self.queue = await channel.declare_queue("it", durable=True, arguments={**arguments, **ends})
            self.channel = channel
            for _ in range(60):
                await self.step(self.dice.choice(STEPS))
            await self.drain("it")
            await self.drain("dlq")
        return self.seen

    async def step(self, what: str) -> None:
        if what == "publish":
            self.published += 1
            message = Message(str(self.published).encode(), priority=self.dice.randrange(5))
            try:
                await self.channel.default_exchange.publish(message, "it")
            except aio_pika.exceptions.DeliveryError:
                self.seen.append(("nacked", self.published))
        elif what == "get":
            got = await self.queue.get(fail=False)
            self.seen.append((what, got and (got.body, got.redelivered, got.headers.get("x-delivery-count"))))
            if got is not None:
                self.held.append(got)
        elif what == "lose":
            # One message at a time: what several gets of a lost channel held comes back in any order.
            losing = await self.connection.channel()
            got = await (await losing.get_queue("it")).get(fail=False)
            self.seen.append((what, got and got.body))
            await losing.close()
            await asyncio.sleep(A_MOMENT)
        elif self.held:
            await self.settle(what)
            await asyncio.sleep(A_MOMENT)

    async def settle(self, what: str) -> None:
        at = self.dice.randrange(len(self.held))
        message = self.held[at]
        if what.endswith("up to"):
            del self.held[: at + 1]
        else:
            del self.held[at]
        if what.startswith("ack"):
            await message.ack(multiple=what == "ack up to")
        elif what.startswith("nack"):
            await message.nack(requeue=True, multiple=what == "nack up to")
        else:
            await message.reject(requeue=False)

    async def drain(self, name: str) -> None:
        await asyncio.sleep(0.1)
        queue = await self.channel.get_queue(name)
        self.seen.append((name, await ready(self.channel, name)))
        while (message := await queue.get(fail=False, no_ack=True)) is not None:
            deaths = [(death["reason"], death["queue"], death["count"]) for death in message.headers.get("x-death", [])]
            self.seen.append((name, message.body, message.redelivered, deaths))


@pytest.mark.parametrize("arguments", QUEUES, ids=lambda arguments: " ".join(map(str, arguments.values())) or "classic")
@pytest.mark.parametrize("seed", [1, 2])
async def test_both_brokers_tell_the_same_story(rabbitmq_url: str, arguments: dict[str, Any], seed: int):
    """Bodies, order, redelivered flags, counts, nacks and dead letters are the same on both, step by step."""
    async with AmqpServer() as server:
        ours = await Story(seed).tell(server.url, arguments)
    theirs = await Story(seed).tell(rabbitmq_url, arguments)

    assert theirs == ours
