"""What a test may make go wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol


class _Link(Protocol):
    """A client connection, as faults see it."""

    @property
    def client_name(self) -> str: ...

    def cut(self) -> None: ...

    def set_blocked(self, reason: str | None) -> None: ...

    def close_channels(self, code: int, text: str) -> None: ...


class Faults:
    """Switches of one server. Each may be used from any thread; `restore()` puts all back.

    Deliveries, acks and everything else go on as they should, unless a switch says otherwise.
    """

    def __init__(self, links: Callable[[], list[_Link]], in_server: Callable[[Callable[[], int]], int]) -> None:
        self._links = links
        self._in_server = in_server
        self._drop: int | None = 0
        self._nack: int | None = 0
        self.refusing_logins = False
        self.refusing_connections = False
        self.blocked: str | None = None

    def drop_confirms(self, count: int | None = None) -> None:
        """Take the next `count` publishes (None: all until `restore()`) and never confirm them: they are stored."""
        self._drop = count

    def nack_publishes(self, count: int | None = None) -> None:
        """Answer the next `count` confirmed publishes (None: all until `restore()`) with a nack, storing nothing."""
        self._nack = count

    def cut_connections(self, matching: str = "") -> int:
        """End TCP connections as a broken network does, without a word of AMQP; returns how many.

        `matching` is a part of the connection's name (the client property `connection_name`); empty is all.
        """
        return self._for_links(matching, lambda link: link.cut())

    def close_channels(self, code: int = 406, text: str = "closed by a test", matching: str = "") -> int:
        """Close all channels of the connections that match with an error of AMQP; returns how many connections."""
        return self._for_links(matching, lambda link: link.close_channels(code, text))

    def refuse_logins(self) -> None:
        """Answer every login as if the password were wrong; open connections stay."""
        self.refusing_logins = True

    def refuse_connections(self) -> None:
        """Cut every connection and each new one at once, as if the server were down. Queues keep their messages,
        but for exclusive ones."""
        self.refusing_connections = True
        self.cut_connections()

    def block_publishers(self, reason: str = "low on memory") -> None:
        """Do as RabbitMQ does under a resource alarm: say `connection.blocked`, and read nothing more from whoever
        publishes."""
        self.blocked = reason
        self._for_links("", lambda link: link.set_blocked(reason))

    def restore(self) -> None:
        """Behave again. Confirms that were dropped stay dropped, connections that were cut stay cut."""
        self._drop = self._nack = 0
        self.refusing_logins = self.refusing_connections = False
        if self.blocked is not None:
            self.blocked = None
            self._for_links("", lambda link: link.set_blocked(None))

    def next_confirm(self) -> Literal["send", "drop"]:
        """What to do with the confirm of a publish that was just taken; counts it."""
        if self._drop == 0:
            return "send"
        if self._drop is not None:
            self._drop -= 1
        return "drop"

    def next_publish(self) -> Literal["take", "nack"]:
        """What to do with a publish in confirm mode; counts it."""
        if self._nack == 0:
            return "take"
        if self._nack is not None:
            self._nack -= 1
        return "nack"

    def _for_links(self, matching: str, act: Callable[[_Link], None]) -> int:
        def run() -> int:
            links = [link for link in self._links() if matching in link.client_name]
            for link in links:
                act(link)
            return len(links)

        return self._in_server(run)
