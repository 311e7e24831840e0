"""What everybody who works on one request or one delivery shares: one mutable object in a context variable.

The edge that opens a request or a delivery opens the Scope; child tasks share it. Policies write into it, edges read it
when they answer. Without an edge, a pipeline's call opens one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Handling:
    """The message that is being handled: from it, the ids of what the handler publishes are derived."""

    message_id: str
    queue: str
    published: dict[str, int] = field(default_factory=dict)

    def ordinal(self, kind: str) -> int:
        """0 for the first message of `kind` that this delivery publishes, 1 for the second, and so on: the same
        numbers again when the message is redelivered and the handler does the same in the same order."""
        number = self.published.get(kind, 0)
        self.published[kind] = number + 1
        return number


class Scope:
    """Deadline, degraded marks, exhaustion and what a breaker said, for one request or delivery.

    Attributes:
        deadline: point on the clock's `now()` scale after which nobody waits for an answer; `None` is never.
        handling: the message that is handled, `None` outside a delivery.
    """

    __slots__ = ("_degraded", "_exhausted", "_opened", "_parent", "deadline", "handling")

    def __init__(
        self, *, deadline: float | None = None, handling: Handling | None = None, parent: Scope | None = None
    ) -> None:
        self.deadline = deadline
        self.handling = handling
        self._parent = parent
        # Made when there is something to write: most calls have nothing to say.
        self._degraded: dict[str, float | None] | None = None
        self._exhausted = False
        self._opened: float | None = None

    # A narrowed scope has a deadline of its own; all that it learns belongs to the request.

    @property
    def _root(self) -> Scope:
        scope = self
        while scope._parent is not None:
            scope = scope._parent
        return scope

    @property
    def degraded(self) -> tuple[str, ...]:
        """Names of the fallbacks that answered, in order, each once; with the age of what they answered, in seconds,
        where that was kept from an earlier call: `last-known-prices;age=42`."""
        marks = self._root._degraded or {}
        return tuple(name if age is None else f"{name};age={age:.0f}" for name, age in marks.items())

    def mark_degraded(self, name: str, *, age: float | None = None) -> None:
        """Say that fallback `name` answered in place of the real thing, with something `age` seconds old. Of several
        ages the oldest one is told."""
        root = self._root
        if root._degraded is None:
            root._degraded = {}
        known = root._degraded.get(name)
        root._degraded[name] = known if age is None else age if known is None else max(known, age)

    @property
    def exhausted(self) -> bool:
        """Whether retries below have been used up, so that trying again above would only multiply them."""
        return self._root._exhausted

    def mark_exhausted(self) -> None:
        """Say that retries were used up."""
        self._root._exhausted = True

    def clear_exhausted(self) -> None:
        """Say that what was used up no longer matters: something has answered in its place."""
        self._root._exhausted = False

    @property
    def opened(self) -> float | None:
        """Seconds until the breaker that opened (or re-opened) during this request probes again; `None` if none did."""
        return self._root._opened

    def note_opened(self, retry_after: float) -> None:
        """Say that a breaker opened. Of several, the one that stays open longest counts."""
        root = self._root
        root._opened = retry_after if root._opened is None else max(root._opened, retry_after)

    def narrowed(self, deadline: float) -> Scope:
        """A scope of the same request with a deadline that is not later than this one's."""
        if self.deadline is not None:
            deadline = min(deadline, self.deadline)
        return Scope(deadline=deadline, handling=self.handling, parent=self)


_current: ContextVar[Scope | None] = ContextVar("meshkit_scope", default=None)


def current_scope() -> Scope | None:
    """The scope of the request or delivery that runs here, `None` outside one."""
    return _current.get()


def open_scope(scope: Scope) -> Token[Scope | None]:
    """Make `scope` the current one until `close_scope` is called in the same function: `scope_open` for paths on which
    a context manager costs too much."""
    return _current.set(scope)


def close_scope(token: Token[Scope | None]) -> None:
    """Make that scope the current one again which was so before `open_scope`."""
    try:
        _current.reset(token)
    except ValueError:
        # A coroutine that was dropped in the middle is closed by the collector, in a context that is not its own. There
        # is nothing to undo, and a policy further out would take the error for the call's.
        return


@contextmanager
def scope_open(scope: Scope) -> Iterator[Scope]:
    """Make `scope` the current one for the block, and for tasks that are started in it."""
    token = _current.set(scope)
    try:
        yield scope
    finally:
        close_scope(token)
