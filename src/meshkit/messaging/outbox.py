"""What an outbox needs of a bus: envelopes to write down, and a way to publish them later as they are."""

from __future__ import annotations

from typing import Any, Protocol

from meshkit.messaging.message import Message


class Publisher(Protocol):
    """A bus, as an outbox sees it: `meshkit.rabbitmq.RabbitBus` is one."""

    def envelope(self, event: Any, *, key: str | None = None) -> tuple[Message, str, str]:
        """The finished message of an event, with the exchange and the routing key it is to be published to.

        The span that is made here is the message's creation context; inside a delivery the id is derived from the
        message that is handled.
        """
        ...

    async def publish_message(self, message: Message, exchange: str, routing_key: str) -> None:
        """Publish a finished message as it is, and return once the broker has confirmed it.

        Raises:
            PublishError: it was not confirmed; safe to publish again.
        """
        ...
