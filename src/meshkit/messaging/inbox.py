"""What an inbox is: it lets a handler take effect once for each message, however often that is delivered."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from meshkit.messaging.message import Delivery


class AlreadyHandled(Exception):
    """The message has taken effect before: the consumer acknowledges it without running the handler."""


class Inbox(Protocol):
    """A store in which the handled messages are written down together with what the handler does.

    `meshkit.sqlalchemy.SqlInbox` is one.
    """

    def open(self, delivery: Delivery) -> AbstractAsyncContextManager[Any]:
        """Begin the transaction in which the delivery is handled, and hand out what the handler works with (a session).

        It is keyed by queue and message id, commits on leaving, and rolls back on an error.

        Raises:
            AlreadyHandled: on entering, where the message has been handled.
        """
        ...
