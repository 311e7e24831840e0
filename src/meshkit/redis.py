"""The edge to Redis: where a fleet keeps what its circuit breakers and their operators say.

    shared = SharedState(meshkit.redis.BreakerStore("redis://cache:6379/0", prefix="shop"))

The keys are those of `pybreaker.CircuitRedisStorage(…, namespace="shop:<breaker>")`, so that services on stock pybreaker
and dashboards that know these read the same. What is different: an error is raised and not answered with what an empty
store would say, no command hangs, and keys that nobody uses any more expire.
"""

from __future__ import annotations

import math
import re
from calendar import timegm
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

from meshkit.errors import ConfigurationError, MeshkitError, missing_extra
from meshkit.policies.shared_state import SWITCH, Switch

try:
    import redis
except ModuleNotFoundError as error:
    if error.name != "redis":
        raise
    raise missing_extra("redis", "redis") from error

# What pybreaker puts between the namespace and the name of a value.
_BASE: Final = "pybreaker"
_STATE, _FAILURES, _SUCCESSES, _OPENED = "state", "fail_counter", "success_counter", "opened_at"
# The keys are told every minute that they are in use; a store that was away for a while must not lose them by that.
_SHORTEST_TTL: Final = 600.0
_UNREADABLE: Final = "unreadable"
_NO_NAME: Final = "name unreadable: the key is no UTF-8"

T = TypeVar("T")


class BreakerStorage:
    """The values of one breaker in Redis, as `pybreaker.CircuitRedisStorage` keeps them.

    It can be given to a `pybreaker.CircuitBreaker` as `state_storage` too. Its calls block; `meshkit.SharedState` makes
    them in a thread.

    Args:
        client: a `redis.Redis`.
        namespace: begins the keys: `<namespace>:pybreaker:state`.
        ttl: seconds after which keys that nobody uses expire.
        keep_state: never let the state expire: it is an operator's word.
    """

    def __init__(self, client: Any, namespace: str, *, ttl: float, keep_state: bool = False) -> None:
        self.name = "redis"
        self._client = client
        self._namespace = namespace
        self._ttl = math.ceil(ttl)
        self._keep_state = keep_state

    def __repr__(self) -> str:
        return f"BreakerStorage({self._namespace!r})"

    @property
    def state(self) -> str:
        return self._get(_STATE) or "closed"

    @state.setter
    def state(self, state: str) -> None:
        self._client.set(self._key(_STATE), state, ex=None if self._keep_state else self._ttl)

    @property
    def counter(self) -> int:
        return int(self._get(_FAILURES) or 0)

    def increment_counter(self) -> None:
        self._count(_FAILURES)

    def reset_counter(self) -> None:
        self.set_counter(0)

    def set_counter(self, count: int) -> None:
        """The count in one round trip, which pybreaker's storages need one a step for."""
        self._set(_FAILURES, count)

    @property
    def success_counter(self) -> int:
        return int(self._get(_SUCCESSES) or 0)

    def increment_success_counter(self) -> None:
        self._count(_SUCCESSES)

    def reset_success_counter(self) -> None:
        self._set(_SUCCESSES, 0)

    @property
    def opened_at(self) -> datetime | None:
        since = self._get(_OPENED)
        return datetime.fromtimestamp(int(since), UTC) if since else None

    @opened_at.setter
    def opened_at(self, datetime: datetime) -> None:
        # Forward only, as pybreaker has it. Without its transaction: where two write at once, both mean this second.
        since, before = timegm(datetime.utctimetuple()), self._get(_OPENED)
        if not before or since > int(before):
            self._set(_OPENED, since)

    def touch(self) -> None:
        """Say that the keys are in use."""
        for value in (_FAILURES, _SUCCESSES, _OPENED, *(() if self._keep_state else (_STATE,))):
            self._client.expire(self._key(value), self._ttl)

    def _key(self, value: str) -> str:
        return f"{self._namespace}:{_BASE}:{value}"

    def _get(self, value: str) -> str | None:
        found = self._client.get(self._key(value))
        # A client may have been told to decode.
        return found.decode() if isinstance(found, bytes) else cast("str | None", found)

    def _set(self, value: str, number: int) -> None:
        self._client.set(self._key(value), number, ex=self._ttl)

    def _count(self, value: str) -> None:
        key = self._key(value)
        self._client.incr(key)
        self._client.expire(key, self._ttl)


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerRow:
    """What the store says of one breaker: what the process that wrote last says, and what an operator has said.

    Attributes:
        name: of bytes that are no text, those that are none as `\\xff`.
        state: "unreadable" where something else stands there.
        failures: `None` where something else stands there.
        opened_at: seconds since the epoch; `None` also where something else stands there.
        problem: what stands where a state, a number, a time or a switch should.
    """

    name: str
    state: str
    failures: int | None
    opened_at: float | None
    switch: Switch | None
    problem: str = ""


class BreakerStore:
    """Storages for all breakers of a fleet in one Redis, each with keys of its own: what `meshkit.SharedState` takes.

    Args:
        redis: the URL (`redis://`, `rediss://`, `unix://`), or a `redis.Redis` that is used as it is: give it a
            `socket_timeout`.
        prefix: begins all keys. The same in every process, and for the operator's command (`--prefix`).
        ttl: seconds after which the keys of a breaker that no process has any more expire. An operator's word does not.
        timeout: seconds for a connection, and for the answer to a command. Only with a URL.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    def __init__(
        self, redis: str | redis.Redis, *, prefix: str = "meshkit", ttl: float = 86_400.0, timeout: float = 2.0
    ) -> None:
        if not prefix:
            raise ConfigurationError("prefix begins the keys of the breakers, so that they can be told from others.")
        if not _SHORTEST_TTL <= ttl < math.inf:
            raise ConfigurationError(
                f"ttl is how many seconds unused keys are kept, {_SHORTEST_TTL:g} or above, not {ttl}."
            )
        if not 0 < timeout < math.inf:
            raise ConfigurationError(f"timeout is how long a command may take, so above 0, not {timeout}.")
        self.prefix = prefix
        self.ttl = ttl
        self._own = isinstance(redis, str)
        self._client = _connected(redis, timeout) if isinstance(redis, str) else _checked(redis)

    def __repr__(self) -> str:
        return f"BreakerStore(prefix={self.prefix!r})"

    def __call__(self, name: str) -> BreakerStorage:
        """The storage of the breaker of this name."""
        return BreakerStorage(self._client, f"{self.prefix}:{name}", ttl=self.ttl, keep_state=name.endswith(SWITCH))

    def names(self) -> list[str]:
        """The breakers that have a state or a switch here.

        Raises:
            MeshkitError: Redis cannot be reached, or refuses.
        """
        return sorted(self._found()[0])

    def look(self) -> list[BreakerRow]:
        """What stands here of each breaker. What cannot be read of one hides neither its rest nor the others.

        Raises:
            MeshkitError: Redis cannot be reached, or refuses.
        """
        names, odd = self._found()
        try:
            rows = [self._row(name) for name in names]
        except redis.RedisError as error:
            raise unreachable(error) from error
        rows += [
            BreakerRow(name=name, state=_UNREADABLE, failures=None, opened_at=None, switch=None, problem=_NO_NAME)
            for name in odd
        ]
        return sorted(rows, key=lambda row: row.name)

    def _found(self) -> tuple[set[str], set[str]]:
        """The names that stand here, and what stands in the place of a name and is no text."""
        begin, end = f"{self.prefix}:".encode(), f":{_BASE}:{_STATE}".encode()
        pattern = re.sub(rb"([][*?\\])", rb"\\\1", begin) + b"*" + end
        names: set[str] = set()
        odd: set[str] = set()
        try:
            for key in self._client.scan_iter(pattern, 1000):
                # A client may have been told to decode.
                whole = key if isinstance(key, bytes) else cast("str", key).encode()
                name = whole[len(begin) : -len(end)].removesuffix(SWITCH.encode())
                try:
                    names.add(name.decode())
                except UnicodeDecodeError:
                    odd.add(name.decode(errors="backslashreplace"))
        except (redis.RedisError, ValueError) as error:
            raise unreachable(error) from error
        return names, odd

    def _row(self, name: str) -> BreakerRow:
        mirror, problems = self(name), list[str]()

        def read(what: str, ask: Callable[[], T]) -> T | None:
            try:
                return ask()
            except (ValueError, OverflowError) as error:
                problems.append(f"{what} {_UNREADABLE}: {error}")
            except redis.ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    # Of the server or of who asks, and not of this key.
                    raise
                problems.append(f"{what} {_UNREADABLE}: the key holds no string")
            return None

        switch = read("switch", lambda: Switch.parse(self(name + SWITCH).state))
        state = read("state", lambda: mirror.state)
        failures = read("failures", lambda: mirror.counter)
        opened = read("opened_at", lambda: mirror.opened_at)
        return BreakerRow(
            name=name,
            state=_UNREADABLE if state is None else state,
            failures=failures,
            opened_at=None if opened is None else opened.timestamp(),
            switch=switch,
            problem="; ".join(problems),
        )

    def close(self) -> None:
        """Close the connections of a client that was made here. Calling it twice is allowed."""
        if self._own:
            self._client.close()


def unreachable(error: Exception) -> MeshkitError:
    """What is said of a Redis that does not do what it should."""
    return MeshkitError(
        f"Redis cannot be used: {str(error).rstrip('.') or type(error).__name__}.",
        "Check the address, whether it runs, and user and password.",
        code="MK102",
    )


def _connected(url: str, timeout: float) -> Any:
    try:
        # Asked first, because the library's own words may quote the URL, and with it a password.
        urlsplit(url).port  # noqa: B018
        return redis.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)
    except ValueError:
        raise ConfigurationError(
            "the address of Redis is no URL that it understands.", "redis://user:password@host:6379/0, say."
        ) from None


def _checked(client: object) -> Any:
    if not isinstance(client, redis.Redis | redis.RedisCluster):
        raise ConfigurationError(
            f"redis is a URL or a redis.Redis, not a {type(client).__module__}.{type(client).__qualname__}.",
            "An asyncio client does not do: pybreaker's storages are asked in a thread, without awaiting.",
        )
    return client
