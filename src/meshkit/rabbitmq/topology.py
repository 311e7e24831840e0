"""The queues and exchanges that meshkit needs on the broker, and how each of them is declared.

    user-events (topic)                      what the events are published to
      └─ course-service.user-created         quorum; what its consumer cannot settle goes to its dead-letter queue
           course-service.user-created.dlq   quorum; looking at it is harmless
    meshkit.delay.10s (fanout + quorum queue) one for each wait, shared by all services of the vhost

A rung gives a message back through the default exchange by its own routing key, the name of the queue it failed in: so
one set serves all queues, and no other subscriber gets a second copy.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal

import aiormq.exceptions
from aiormq.abc import AbstractChannel

from meshkit.core.clock import Clock
from meshkit.errors import ConfigurationError, TopologyError
from meshkit.messaging.schedule import rung_name
from meshkit.rabbitmq.connection import RPC_TIMEOUT, Link, within

Declare = Literal["active", "passive", "off"]

DEAD_LETTER_SUFFIX: Final = ".dlq"

# The broker's own crash guard, behind the consumer's (ten): what reaches it is dead-lettered without a word of why.
# Always a positive number: none is "for ever" up to 3.13 and 20 from 4.0 on, and -1 dead-letters at once on 3.10.
_DELIVERY_LIMIT: Final = 20
# Each look at a quorum queue counts as a delivery, so there is no limit that matters; and with a limit, what is given
# back keeps its place.
_NEVER: Final = 2_000_000_000


def dead_letter_queue(queue: str) -> str:
    return queue + DEAD_LETTER_SUFFIX


def queue_arguments(queue: str) -> dict[str, Any]:
    """How the queue of a subscription is declared."""
    return {
        "x-queue-type": "quorum",
        "x-delivery-limit": _DELIVERY_LIMIT,
        "x-overflow": "reject-publish",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead_letter_queue(queue),
        "x-dead-letter-strategy": "at-least-once",
    }


def dead_letter_arguments() -> dict[str, Any]:
    """How a dead-letter queue is declared."""
    return {"x-queue-type": "quorum", "x-delivery-limit": _NEVER}


def rung_arguments(delay: float) -> dict[str, Any]:
    """How the queue of a delay rung is declared.

    Without a dead-letter routing key: what expires keeps its own. At least once, which needs `reject-publish`: the
    broker takes a message out of the rung only when the queue it goes back to has confirmed it.
    """
    return {
        "x-queue-type": "quorum",
        "x-message-ttl": round(delay * 1000),
        "x-dead-letter-exchange": "",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


class Topology:
    """Declares what is needed, each thing once a connection or when it turns out to be missing.

    Args:
        declare: `"active"` makes what is missing and changes nothing that exists; `"passive"` only looks whether it is
            there; `"off"` does neither.
    """

    def __init__(self, link: Link, *, declare: Declare, clock: Clock) -> None:
        if declare not in ("active", "passive", "off"):
            raise ConfigurationError(f'declare is "active", "passive" or "off", not {declare!r}.')
        self.declare = declare
        self._link = link
        self._clock = clock
        self._rungs: set[float] = set()

    async def exchange(self, name: str) -> None:
        """The topic exchange that events are published to."""
        await self._do(
            f"exchange {name!r}",
            lambda channel, passive: channel.exchange_declare(
                name, exchange_type="topic", durable=True, passive=passive
            ),
        )

    async def queue(self, name: str, *, exchange: str, routing_key: str) -> None:
        """The queue of a subscription, bound to its exchange."""
        await self._do(
            f"queue {name!r}",
            lambda channel, passive: channel.queue_declare(
                name, durable=True, passive=passive, arguments=None if passive else queue_arguments(name)
            ),
        )
        if self.declare == "active":
            await self._do(
                f"the binding of {name!r} to {exchange!r}",
                lambda channel, passive: channel.queue_bind(name, exchange, routing_key),
            )

    async def existing(self, name: str) -> None:
        """A queue that somebody else declares; looked for, whatever `declare` says."""
        channel = await self._link.channel()
        try:
            async with within(self._clock, RPC_TIMEOUT):
                await channel.queue_declare(name, passive=True)
        except aiormq.exceptions.ChannelNotFoundEntity as error:
            raise TopologyError(f"there is no queue {name!r}: {_reply(error)}.", "Declare it first.") from error
        finally:
            if not channel.is_closed:
                await channel.close()

    async def dead_letters(self, queue: str) -> None:
        """The dead-letter queue of a queue."""
        name = dead_letter_queue(queue)
        await self._do(
            f"queue {name!r}",
            lambda channel, passive: channel.queue_declare(
                name, durable=True, passive=passive, arguments=None if passive else dead_letter_arguments()
            ),
        )

    async def rung(self, delay: float) -> str:
        """The rung that holds a message for `delay` seconds; its name."""
        name = rung_name(delay)
        if delay in self._rungs:
            return name

        async def both(channel: AbstractChannel, passive: bool) -> None:
            await channel.exchange_declare(name, exchange_type="fanout", durable=True, passive=passive)
            await channel.queue_declare(
                name, durable=True, passive=passive, arguments=None if passive else rung_arguments(delay)
            )
            if not passive:
                await channel.queue_bind(name, name)

        await self._do(f"delay rung {name!r}", both)
        self._rungs.add(delay)
        return name

    def forget(self) -> None:
        """Look again, next time, whether the rungs are there."""
        self._rungs.clear()

    async def _do(self, what: str, act: Callable[[AbstractChannel, bool], Awaitable[object]]) -> None:
        if self.declare == "off":
            return
        passive = self.declare == "passive"
        # A channel of its own: a declaration that the broker refuses closes the channel it was made on.
        channel = await self._link.channel()
        try:
            async with within(self._clock, RPC_TIMEOUT):
                await act(channel, passive)
        except aiormq.exceptions.ChannelPreconditionFailed as error:
            raise TopologyError(f"{what} exists on the broker, {_difference(error)}.", _REMEDY) from error
        except aiormq.exceptions.ChannelNotFoundEntity as error:
            raise TopologyError(
                f"{what} is not there: {_reply(error)}.", 'Make it, or let meshkit make it with declare="active".'
            ) from error
        except aiormq.exceptions.ChannelAccessRefused as error:
            raise TopologyError(
                f"{what} may not be declared by this user: {_reply(error)}.",
                'Grant the permission, or have it made by somebody else and use declare="passive".',
            ) from error
        finally:
            if not channel.is_closed:
                await channel.close()


_REMEDY: Final = "Delete it once it is empty, or change it by a policy; meshkit does not touch what exists."
# "PRECONDITION_FAILED - inequivalent arg 'x-message-ttl' for queue 'q' in vhost '/': received '5' but current is '10'"
_INEQUIVALENT: Final = re.compile(
    r"inequivalent arg '(?P<name>[^']+)' for (?P<kind>\w+) .*?: received (?P<wanted>.+?) but current is (?P<current>.+)",
    re.S,
)


def _reply(error: aiormq.exceptions.AMQPError) -> str:
    return " ".join(str(part) for part in error.args) or type(error).__name__


def _difference(error: aiormq.exceptions.AMQPError) -> str:
    said = _reply(error)
    match = _INEQUIVALENT.search(said)
    if match is None:
        return f"and differs from what is asked for: {said}"
    return (
        f"and its {match['name']} differs: asked for is {_value(match['wanted'])}, there is {_value(match['current'])}"
    )


def _value(said: str) -> str:
    """`the value '10' of type 'signedint'` → `10`."""
    quoted = re.search(r"'([^']*)'", said)
    return quoted[1] if quoted else said.strip()
