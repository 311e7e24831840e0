"""A circuit breaker for each key of a call (tenant, shard, host), and never more of them than a bound.

One tenant whose database is down must not shut off the others, and a service with a million tenants must not keep a
million breakers: the keys used last keep theirs, and a breaker that guards something is not forgotten.
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Final, Generic, Literal, ParamSpec, TypeVar, cast

from meshkit.core.call import NO_WORK, Call, Next, NextSync, is_async
from meshkit.core.clock import SYSTEM_CLOCK, Clock, check_clock
from meshkit.core.pipeline import Pipeline, check_name
from meshkit.errors import ConfigurationError
from meshkit.policies.circuit_breaker import CircuitBreaker, CircuitOpenError, announce

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
_log = logging.getLogger("meshkit")

# A breaker that was found to guard something is not asked again for so many seconds, where nobody uses it.
_LOOK_AGAIN: Final = 1.0
# So often, at the most, the log says that keys go without a breaker.
_WARN_EVERY: Final = 60.0

_families: weakref.WeakSet[CircuitBreakers] = weakref.WeakSet()
_families_lock = threading.Lock()


def families() -> list[CircuitBreakers]:
    """All per-key breakers of this process that are alive."""
    with _families_lock:
        return list(_families)


class Kept(Generic[K, V]):
    """The `most` things used last, a breaker with each: one whose breaker guards something is never dropped. Whoever has
    it sees to the threads. To make room takes the same time however many are kept, but for one look a second at all that
    guard.

    Args:
        name: what the log calls them.
        most: so many are kept.
        breaker_of: the breaker of a thing; one without may always be dropped.
        clock: where the time comes from.
    """

    __slots__ = ("_breaker_of", "_clock", "_guarding", "_look_at", "_name", "_things", "_warned_at", "most")

    def __init__(self, name: str, most: int, breaker_of: Callable[[V], CircuitBreaker | None], clock: Clock) -> None:
        self._name = name
        self.most = most
        self._breaker_of = breaker_of
        self._clock = clock
        # Both least recently used first; what guards was used before all others.
        self._things: OrderedDict[K, V] = OrderedDict()
        self._guarding: dict[K, V] = {}
        self._look_at = -math.inf
        self._warned_at: float | None = None

    def __len__(self) -> int:
        return len(self._things) + len(self._guarding)

    def items(self) -> list[tuple[K, V]]:
        """What is kept, least recently used first."""
        return [*self._guarding.items(), *self._things.items()]

    def get(self, key: K) -> V | None:
        """What is kept for a key, which counts as a use of it."""
        found = self._things.get(key)
        if found is not None:
            self._things.move_to_end(key)
        elif (found := self._guarding.pop(key, None)) is not None:
            self._things[key] = found
        return found

    def has_room(self, key: K) -> bool:
        """Whether a further thing can be kept; drops the least recently used one where that is what it takes."""
        if len(self) < self.most:
            return True
        now = self._clock.now()
        dropped = self._drop_one(now)
        if not dropped and (self._warned_at is None or now - self._warned_at >= _WARN_EVERY):
            self._warned_at = now
            _log.warning(
                "circuit breakers of %r: all %d are open; calls of further keys (%.100r) go without a breaker",
                self._name,
                self.most,
                key,
            )
        return dropped

    def put(self, key: K, thing: V) -> None:
        self._things[key] = thing

    def look_again(self) -> None:
        """Somebody has closed breakers by hand."""
        self._look_at = -math.inf

    def _drop_one(self, now: float) -> bool:
        if now >= self._look_at:
            # In front again, where they were: nobody has used them since.
            for key in reversed(self._guarding):
                self._things[key] = self._guarding[key]
                self._things.move_to_end(key, last=False)
            self._guarding.clear()
            self._look_at = now + _LOOK_AGAIN
        while self._things:
            key, thing = next(iter(self._things.items()))
            # Whoever hears of its state may come back here, so `key` need not be there any more.
            if _may_go(self._breaker_of(thing)):
                if self._things.pop(key, None) is not None:
                    return True
            elif key in self._things:
                self._guarding[key] = self._things.pop(key)
        return False


def _may_go(breaker: CircuitBreaker | None) -> bool:
    """Whether nothing is lost with a breaker but what is old: it is closed; or its time is over and no probe is out, so
    that the next call goes through with it and without it."""
    if breaker is None:
        return True
    state = breaker.state
    return state == "closed" or (state == "half_open" and not breaker.probing)


class CircuitBreakers:
    """A circuit breaker a key: in a pipeline, as a decorator, or one at a time by `get`.

    The `most` keys used last have one. For a further key the least recently used breaker goes, be it closed, or open with
    its time over and no probe under way; one that rejects calls, that is probing, or that was isolated or disabled by
    hand is never forgotten. Where that leaves none to forget, calls of further keys go without a breaker, and the log
    says so. Threads and event loops may share one.

        breakers = CircuitBreakers("orders-db", key=lambda tenant, order_id: tenant, open_for=30)

        @breakers
        async def load(tenant, order_id): ...

    Args:
        name: what all of them guard. In events and metrics each breaker has this name, so that no number of keys makes
            more series: the state shown is that of the breaker that rejects most, and what a forgotten one has counted
            since the last scrape is missing. The key stands in a note on the `CircuitOpenError`.
        key: called with the arguments of the call, as the guarded function is; returns the key, which must be hashable.
        most: so many breakers are kept.
        named: given a key, the name of its breaker, instead of one for all. For keys that are few: metrics show the
            first hundred names.
        clock: where the time comes from.
        options: those of `CircuitBreaker`, for each of them.

    Raises:
        ConfigurationError: a value that cannot work, or an option that a `CircuitBreaker` does not have.
    """

    def __init__(
        self,
        name: str,
        *,
        key: Callable[..., Hashable],
        most: int = 1000,
        named: Callable[[Any], str] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        **options: Any,
    ) -> None:
        check_name(name, "a family of circuit breakers")
        if not callable(key):
            raise ConfigurationError(
                f"key is a function that gets the arguments of the call and returns its key, not {key!r}.",
                "For the first argument: key=lambda first, *rest: first.",
            )
        if is_async(key):
            raise ConfigurationError(
                f"key returns the key of a call at once, and {key!r} is a coroutine function: each call would be a key.",
                "Await what the key needs before the call, and hand it over as an argument.",
            )
        if not (isinstance(most, int) and most >= 1):
            raise ConfigurationError(f"most is how many breakers are kept, so 1 or above, not {most}.")
        if named is not None and not callable(cast("object", named)):
            raise ConfigurationError(
                f"named is a function of a key that returns the name of its breaker, not {named!r}.",
                "Leave it out to give all of them one name.",
            )
        check_clock(clock)
        known = set(inspect.signature(CircuitBreaker).parameters) - {"name", "clock"}
        if unknown := sorted(options.keys() - known):
            raise ConfigurationError(
                f"{', '.join(unknown)} is no option of a circuit breaker.", f"There are {', '.join(sorted(known))}."
            )
        self.name = name
        self.most = most
        self._key = key
        self._named = named
        self._clock = clock
        self._options = options
        # A wrong option is told now and not at the first call.
        self._described = self._make(name).describe()
        # Re-entrant, because asking a breaker for its state may tell listeners, who may ask for another one.
        self._lock = threading.RLock()
        self._kept: Kept[Hashable, CircuitBreaker] = Kept(name, most, lambda breaker: breaker, clock)
        # What was ordered for all, and for how long; and the breaker of those keys that have none meanwhile.
        self._order: Literal["force_open", "isolate", "disable"] | None = None
        self._until = 0.0
        self._gate: CircuitBreaker | None = None
        with _families_lock:
            _families.add(self)
        announce(self)

    def __repr__(self) -> str:
        return f"CircuitBreakers({self.name!r}, {len(self)} of {self.most})"

    def __len__(self) -> int:
        return len(self._kept)

    # -- one of them --------------------------------------------------------------------------------------------------

    def get(self, key: Hashable) -> CircuitBreaker | None:
        """The breaker of a key, made where it has none; `None` where there is no place for one.

        Raises:
            ConfigurationError: `key` is not hashable.
        """
        with self._lock:
            try:
                found = self._kept.get(key)
            except TypeError as error:
                raise ConfigurationError(f"a key must be hashable, and {key!r} of {self.name!r} is not.") from error
            if found is not None:
                return found
            if isinstance(key, Coroutine):
                # Of a plain function that calls an async one. Asked here, where nothing slows the keys that are known.
                key.close()
                raise ConfigurationError(
                    f"the key function of {self.name!r} has returned a coroutine: each call would be a key.",
                    "Await what the key needs before the call, and hand it over as an argument.",
                )
            if not self._kept.has_room(key):
                # While all are ordered to reject, that holds for this key too.
                return self._gate if self.ordered else None
            made = self._make(self.name if self._named is None else self._named(key))
            self._kept.put(key, made)
            ordered = self.ordered
        if ordered:
            self._obey(made)
        return made

    def items(self) -> list[tuple[Hashable, CircuitBreaker]]:
        """The keys that have a breaker, least recently used first."""
        with self._lock:
            return self._kept.items()

    def describe(self) -> dict[str, object]:
        return {**self._described, "name": self.name, "most": self.most}

    def _make(self, name: str) -> CircuitBreaker:
        return CircuitBreaker(name, clock=self._clock, **self._options)

    # -- by hand, for all keys, those to come included ----------------------------------------------------------------

    @property
    def ordered(self) -> bool:
        """Whether something was ordered for all keys and still holds."""
        with self._lock:
            if self._order == "force_open" and self._clock.now() >= self._until:
                self._order = self._gate = None
            return self._order is not None

    def force_open(self, seconds: float | None = None) -> None:
        """Reject the calls of all keys for `seconds` (`open_for` where left out), then probe as usual.

        Raises:
            ConfigurationError: `seconds` is no length of time.
        """
        gate = self._make(self.name)
        gate.force_open(seconds)
        self._give("force_open", gate, gate.open_for if seconds is None else seconds)

    def isolate(self) -> None:
        """Reject the calls of all keys until `reset`."""
        gate = self._make(self.name)
        gate.isolate()
        self._give("isolate", gate)

    def disable(self) -> None:
        """Let the calls of all keys through, and judge none, until `reset`."""
        self._give("disable", None)

    def reset(self) -> None:
        """Close the breakers of all keys, with empty windows."""
        with self._lock:
            self._order = self._gate = None
            present = self._kept.items()
            self._kept.look_again()
        for _, breaker in present:
            breaker.reset()

    def _give(
        self, order: Literal["force_open", "isolate", "disable"], gate: CircuitBreaker | None, seconds: float = 0.0
    ) -> None:
        with self._lock:
            self._order, self._gate, self._until = order, gate, self._clock.now() + seconds
            present = self._kept.items()
        for _, breaker in present:
            self._obey(breaker)

    def _obey(self, breaker: CircuitBreaker) -> None:
        if self._order == "isolate":
            breaker.isolate()
        elif self._order == "disable":
            breaker.disable()
        elif (left := self._until - self._clock.now()) > 0:
            breaker.force_open(left)

    # -- as a policy --------------------------------------------------------------------------------------------------

    async def run(self, call: Call, call_next: Next[T]) -> T:
        key = self._key_of(call)
        breaker = self.get(key)
        if breaker is None:
            return await call_next(call)
        try:
            return await breaker.run(call, call_next)
        except CircuitOpenError as error:
            _note(error, breaker, key)
            raise

    def run_sync(self, call: Call, call_next: NextSync[T]) -> T:
        key = self._key_of(call)
        breaker = self.get(key)
        if breaker is None:
            return call_next(call)
        try:
            return breaker.run_sync(call, call_next)
        except CircuitOpenError as error:
            _note(error, breaker, key)
            raise

    def __call__(self, fn: Callable[P, R]) -> Callable[P, R]:
        """Guard a function, plain or async, or an async generator function."""
        return Pipeline(self.name, self)(fn)

    def _key_of(self, call: Call) -> Hashable:
        if call.work is NO_WORK:
            raise ConfigurationError(
                f"the key of {self.name!r} is made from the arguments of a call, and this one has none: an edge leads it.",
                "Guard the function that is called, or take the breaker of a key by get(key).",
            )
        _, args, kwargs = call.work
        return self._key(*args, **kwargs)


def _note(error: CircuitOpenError, breaker: CircuitBreaker, key: Hashable) -> None:
    # One that comes from a breaker further inside has nothing to do with this key.
    if error.policy == breaker.name and not getattr(error, "__notes__", None):
        error.add_note(f"key {key!r}")
