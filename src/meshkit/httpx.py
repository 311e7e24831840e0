"""Resilience and traces for `httpx.AsyncClient`, and for httpx2's, as a transport that goes around the real one.

    client = meshkit.httpx.client("user-service", base_url="http://users")
    client = httpx.AsyncClient(transport=meshkit.httpx.transport("user-service"), …)

The first is for a new client, the second for one that exists. What is tried again and what a circuit breaker counts:

| outcome                                                      | retry                                           | breaker |
|--------------------------------------------------------------|-------------------------------------------------|---------|
| connect, TLS or proxy error: nothing was sent                | any method                                      | failure |
| no free connection in the pool                               | any method                                      | neutral |
| connection closed before a byte of the answer, on a reused one | idempotent, at once, once                     | neutral |
| read or write error or timeout after that, broken body       | idempotent, while nothing has been handed out   | failure |
| 408, 502, 503, 504                                           | idempotent; 503 with `Retry-After` any method   | failure |
| 429                                                          | any method, after `Retry-After`                 | neutral |
| any of these, and any 5xx, with `meshkit-retry`              | no: retries below are used up                   | neutral |
| 500 and other 5xx                                            | no                                              | failure |
| other answers                                                | no                                              | success |

Idempotent: GET, HEAD, OPTIONS, PUT, DELETE, TRACE, and anything with an `Idempotency-Key`. A body that can be read only
once is never sent twice.

What travels with a call, so that services together retry no more than one of them would:

* `meshkit-timeout-ms`: for how long anybody waits for this attempt. Who serves it gives up when the caller does.
* `meshkit-attempt`: which try this is, from 1.
* `meshkit-retry` on an error that comes back: whoever answered has tried again enough (`exhausted`), or something below
  is shut off (`rejected`). There is no further attempt here, and the request that is being served learns it, so that
  its own answer says the same to its caller.
* `meshkit-degraded` on an answer: a fallback has had a part in it. Shown on the span, and passed on to the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import ipaddress
import logging
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypedDict, Unpack, cast, overload

from meshkit.core.call import Call, Judgement, Outcome, Policy
from meshkit.core.clock import SYSTEM_CLOCK, Clock
from meshkit.core.events import ClientAttemptEnded, ClientCallEnded, RetryScheduled, TimedOut, emit, heard
from meshkit.core.events import error_type as _type_of
from meshkit.core.explain import Finding, Step, attempts_of, explain, warn
from meshkit.core.pipeline import Pipeline
from meshkit.core.retry_after import seconds_asked
from meshkit.core.scope import Scope, current_scope, scope_open
from meshkit.core.trace import AttributeValue, tracer
from meshkit.errors import (
    AttemptTimeoutError,
    ConfigurationError,
    DeadlineExceededError,
    RejectedError,
    TimeoutExceededError,
    missing_extra,
)
from meshkit.policies.circuit_breaker import CircuitBreaker
from meshkit.policies.fallback import Fallback
from meshkit.policies.keyed import Kept
from meshkit.policies.retry import Retry
from meshkit.policies.retry_budget import RetryBudget
from meshkit.policies.timeout import Timeout

if TYPE_CHECKING:
    import ssl

    import httpx
    import httpx2

_log = logging.getLogger("meshkit")

Library = Literal["httpx", "httpx2"]
CallOutcome = Literal["success", "error", "fallback", "rejected", "cancelled"]

IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})
MOST_HOSTS: Final = 128

# What meshkit keeps in `request.extensions`, which survive redirects and authentication. A caller may set the second:
# a name for what is asked, for metrics and spans.
_LOGICAL: Final = "meshkit.call"
OPERATION: Final = "meshkit.operation"

# https://opentelemetry.io/docs/specs/semconv/http/http-spans/ has these by name, and asks for the signatures below.
_METHODS: Final = IDEMPOTENT | {"CONNECT", "PATCH", "POST", "QUERY"}
SENSITIVE_PARAMETERS: Final = frozenset(
    {"token", "access_token", "refresh_token", "api_key", "apikey", "key", "password", "secret", "client_secret"}
    | {"sig", "signature", "awsaccesskeyid", "x-goog-signature", "x-goog-credential"}
)

STANDARD_RETRY: Final = Retry()
_SUCCESS: Final = Judgement()
# Without an attempt timeout, and around a pipeline of the user's, the innermost timeout is the total one: the deadline of
# the call is around all of it, and this is who stops a call that comes to it.
_ALLOWED: Final[dict[str, str]] = dict.fromkeys(
    ("total-inside-retry", "timeout-never-fires"), "the transport bounds the whole call from outside"
)
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_CHALLENGES: Final = frozenset({401, 407})

# Errors before which nothing was sent: a retry of these repeats nothing.
_UNSENT: Final = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError"})
# The words of `meshkit-retry`. Anything else in that header is somebody else's.
_NO_MORE: Final = frozenset({"exhausted", "rejected"})
# What is taken over from `meshkit-degraded`: it is shown to people and sent on, whoever wrote it.
_MOST_MARKS: Final = 8
_MOST_MARK: Final = 64


class ConnectionSettings(TypedDict, total=False):
    """What goes on to the transport that has the connections; the meaning is the library's own."""

    verify: ssl.SSLContext | str | bool
    cert: Any
    http1: bool
    http2: bool
    limits: Any
    proxy: Any
    trust_env: bool
    local_address: str | None
    uds: str | None
    socket_options: Iterable[Any] | None


class _Policies(TypedDict, total=False):
    timeout: float | None
    attempt_timeout: float | None
    retry: Retry | None
    budget: RetryBudget | Literal["per-host"] | None
    breaker: CircuitBreaker | Literal["per-host"] | None
    fallback: Fallback | Callable[[Outcome], Any] | None
    pipeline: Pipeline | None
    inner: Any
    clock: Clock


class TransportOptions(_Policies, ConnectionSettings, total=False):
    """The keywords of `transport`."""


class ClientOptions(_Policies, ConnectionSettings, total=False):
    """The keywords of `client`: those of `transport`, and what the client itself takes."""

    base_url: Any
    auth: Any
    params: Any
    headers: Any
    cookies: Any
    mounts: Mapping[str, Any] | None
    follow_redirects: bool
    max_redirects: int
    event_hooks: Mapping[str, list[Callable[..., Any]]] | None
    default_encoding: Any


@overload
def transport(
    name: str, *, library: Literal["httpx"] | None = None, **options: Unpack[TransportOptions]
) -> httpx.AsyncBaseTransport: ...
@overload
def transport(
    name: str, *, library: Literal["httpx2"], **options: Unpack[TransportOptions]
) -> httpx2.AsyncBaseTransport: ...
def transport(
    name: str,
    *,
    timeout: float | None = 30.0,
    attempt_timeout: float | None = 5.0,
    retry: Retry | None = STANDARD_RETRY,
    budget: RetryBudget | Literal["per-host"] | None = "per-host",
    breaker: CircuitBreaker | Literal["per-host"] | None = "per-host",
    fallback: Fallback | Callable[[Outcome], Any] | None = None,
    pipeline: Pipeline | None = None,
    inner: Any = None,
    library: Library | None = None,
    clock: Clock = SYSTEM_CLOCK,
    **connection: Any,
) -> Any:
    """A transport for an `AsyncClient`, with policies around each request and traces and metrics of all of it.

    Args:
        name: what is called, for events, metrics, spans and errors: `"user-service"`.
        timeout: seconds for the whole call: all attempts, waits, redirects, and the body; `None` for no limit. The
            deadline of the request that is being served holds as well, if it is earlier.
        attempt_timeout: seconds for one attempt, until the headers of its response; `None` for no limit. The body that
            follows is bounded by `timeout` and by the client's own read timeout.
        retry: `None` for none. The standard one makes 3 attempts with growing waits of random length.
        budget: how many retries a host bears: one of your own, `None` for any number, or one for each host, which lets
            retries be a fifth of the calls of the last 10 s, and 3 where those are few. A `Retry` that has a budget
            keeps it.
        breaker: one of your own, `None` for none, or one for each host, of which the 128 used last are kept.
        fallback: a function (plain or async) of the `Outcome` that failed, which returns a response of the library; or
            a `Fallback`, where the name of the mark matters. It runs outside of `timeout`.
        pipeline: instead of the five above (`timeout` stays): policies that you put together. They find what a failure
            is by the table of this module, where they have no rule of their own.
        inner: the transport that does the work; made from the connection settings where left out.
        library: "httpx" or "httpx2"; that of `inner`, or httpx, where left out.
        clock: where time and chance come from.
        connection: `verify`, `cert`, `http1`, `http2`, `limits`, `proxy`, `trust_env`, `local_address`, `uds` and
            `socket_options`, as the client takes them. Proxies from the environment are honoured as the client would.

    What a call raises: the library's own errors of its last attempt, and those of the policies (`CircuitOpenError`,
    `AttemptTimeoutError`, `DeadlineExceededError`), which are errors of the library as well: `except httpx.HTTPError` and
    `except httpx.TimeoutException` catch them.

    Raises:
        ConfigurationError: arguments that do not go together, or a library that is not installed.
    """
    family = _family(library or _library_of(inner))
    return _make(
        family,
        name,
        timeout=timeout,
        attempt_timeout=attempt_timeout,
        retry=retry,
        budget=budget,
        breaker=breaker,
        fallback=fallback,
        pipeline=pipeline,
        inner=inner,
        clock=clock,
        connection=connection,
        home="",
    )


@overload
def client(
    name: str, *, library: Literal["httpx"] | None = None, **options: Unpack[ClientOptions]
) -> httpx.AsyncClient: ...
@overload
def client(name: str, *, library: Literal["httpx2"], **options: Unpack[ClientOptions]) -> httpx2.AsyncClient: ...
def client(
    name: str,
    *,
    base_url: Any = "",
    timeout: float | None = 30.0,
    attempt_timeout: float | None = 5.0,
    retry: Retry | None = STANDARD_RETRY,
    budget: RetryBudget | Literal["per-host"] | None = "per-host",
    breaker: CircuitBreaker | Literal["per-host"] | None = "per-host",
    fallback: Fallback | Callable[[Outcome], Any] | None = None,
    pipeline: Pipeline | None = None,
    inner: Any = None,
    library: Library | None = None,
    clock: Clock = SYSTEM_CLOCK,
    **settings: Any,
) -> Any:
    """An `AsyncClient` with policies around each request and traces and metrics of all of it.

    Args:
        name: what is called, for events, metrics, spans and errors. The breaker of `base_url`'s host has this name.
        base_url: as the client takes it.
        timeout, attempt_timeout, retry, budget, breaker, fallback, pipeline, inner, library, clock: as `transport` takes
            them. The client's own timeouts (connect, read, write, pool) are `attempt_timeout` each.
        settings: the connection settings that `transport` takes, and the client's own (`auth`, `headers`, `cookies`,
            `params`, `follow_redirects`, `max_redirects`, `event_hooks`, `default_encoding`, `mounts`).

    Raises:
        ConfigurationError: arguments that do not go together, or a library that is not installed.
    """
    family = _family(library or _library_of(inner))
    connection = {key: settings.pop(key) for key in _CONNECTION if key in settings}
    for key in ("retries", "transport"):
        if key in settings:
            connection[key] = settings.pop(key)
    for pattern, mounted in (settings.get("mounts") or {}).items():
        if not isinstance(mounted, _Transport):
            _log.warning(
                "client %r: requests to %r go through a mount of their own, not through meshkit", name, pattern
            )
    home = _origin(family.module.URL(base_url)) if base_url else ""
    made = _make(
        family,
        name,
        timeout=timeout,
        attempt_timeout=attempt_timeout,
        retry=retry,
        budget=budget,
        breaker=breaker,
        fallback=fallback,
        pipeline=pipeline,
        inner=inner,
        clock=clock,
        connection=connection,
        home=home,
    )
    try:
        return family.module.AsyncClient(
            transport=made,
            base_url=base_url,
            timeout=attempt_timeout if attempt_timeout is not None else timeout,
            trust_env=connection.get("trust_env", True),
            **settings,
        )
    except TypeError as error:
        raise ConfigurationError(f"client {name!r}: {error}.") from error


# -- putting it together ----------------------------------------------------------------------------------------------

_CONNECTION = tuple(ConnectionSettings.__annotations__)


@dataclass(frozen=True, slots=True)
class _Family:
    """One library's classes: its own base classes under ours, and its errors by what they mean."""

    module: Any
    transport: type[_Transport]
    body: type[_Body]
    not_sent: tuple[type[Exception], ...]
    local: tuple[type[Exception], ...]
    broken: tuple[type[Exception], ...]
    errors: dict[type[BaseException], Any] = field(default_factory=dict)

    def adopt(self, error: BaseException) -> None:
        """Make an error of a policy one of the library's too.

        Code that was there before meshkit says `except httpx.HTTPError`, and a refusal or a timeout is to end up there
        as well. It stays the same object, with its notes and its traceback, and what it was before.
        """
        kind = type(error)
        if isinstance(error, RejectedError):
            base = self.module.TransportError
        elif isinstance(error, TimeoutExceededError):
            base = self.module.TimeoutException
        else:
            return
        if isinstance(error, base):
            return
        both = self.errors.get(kind)
        if both is None:
            both = self.errors[kind] = type(
                kind.__name__, (kind, base), {"__module__": __name__, "__doc__": kind.__doc__}
            )
        # A class of a user's own may be laid out differently; then it stays what it is.
        with contextlib.suppress(TypeError):
            error.__class__ = both


@functools.cache
def _family(library: str) -> _Family:
    if library not in ("httpx", "httpx2"):
        raise ConfigurationError(f'library is "httpx" or "httpx2", not {library!r}.')
    try:
        module: Any = importlib.import_module(library)
    except ImportError as error:
        raise missing_extra("httpx2", library) from error
    # A client checks that a body is an AsyncByteStream of its own library, so each library has a class of its own.
    return _Family(
        module,
        cast("type[_Transport]", type("MeshTransport", (_Transport, module.AsyncBaseTransport), {})),
        cast("type[_Body]", type("MeshBody", (_Body, module.AsyncByteStream), {})),
        not_sent=(module.ConnectError, module.ConnectTimeout, module.ProxyError),
        local=(module.UnsupportedProtocol, module.LocalProtocolError),
        broken=(module.RemoteProtocolError, module.ReadError, module.WriteError),
    )


def _library_of(inner: object) -> Library:
    for base in type(inner).__mro__:
        if base.__name__ == "AsyncBaseTransport" and base.__module__.split(".")[0] == "httpx2":
            return "httpx2"
    return "httpx"


def _make(
    family: _Family,
    name: str,
    *,
    timeout: float | None,
    attempt_timeout: float | None,
    retry: Retry | None,
    budget: RetryBudget | Literal["per-host"] | None,
    breaker: CircuitBreaker | Literal["per-host"] | None,
    fallback: Fallback | Callable[[Outcome], Any] | None,
    pipeline: Pipeline | None,
    inner: Any,
    clock: Clock,
    connection: dict[str, Any],
    home: str,
) -> _Transport:
    if not name:
        raise ConfigurationError('name says what is called, in metrics and traces: "user-service", say.')
    if isinstance(inner, _Transport):
        raise ConfigurationError(f"{name!r}: inner is a transport of meshkit already.", "Two would multiply retries.")
    if "retries" in connection:
        raise ConfigurationError(
            "retries= makes connections anew beneath all policies.", "Use retry=Retry(attempts=…)."
        )
    if "transport" in connection:
        raise ConfigurationError("a transport of your own is given as inner=.")
    unknown = set(connection) - set(_CONNECTION)
    if unknown:
        raise ConfigurationError(
            f"{', '.join(sorted(unknown))} is no connection setting.", f"There are {', '.join(_CONNECTION)}."
        )
    if inner is not None and set(connection) - {"trust_env"}:
        raise ConfigurationError(
            f"{', '.join(sorted(connection))} would not reach the inner transport.", "Give them to that one."
        )
    for value, what in ((timeout, "timeout"), (attempt_timeout, "attempt_timeout")):
        if value is not None and not value > 0:
            raise ConfigurationError(f"{what} is how long a call may take in seconds, so above 0, not {value}.")
    if not isinstance(cast("object", pipeline), Pipeline | None):
        raise ConfigurationError(f'pipeline is a Pipeline("{name}", policy, …), not {pipeline!r}.')
    if pipeline is not None and (
        retry is not STANDARD_RETRY
        or budget != "per-host"
        or breaker != "per-host"
        or fallback is not None
        or attempt_timeout != 5.0
    ):
        raise ConfigurationError(
            "pipeline= takes the place of retry, budget, breaker, fallback and attempt_timeout.",
            "Put those into the pipeline.",
        )
    if not (budget is None or budget == "per-host" or isinstance(budget, RetryBudget)):
        raise ConfigurationError(f'budget is a RetryBudget, "per-host", or None for none, not {budget!r}.')
    if budget != "per-host" and retry is not None and retry.budget is not None:
        raise ConfigurationError("retry has a budget, and budget= says something else.", "Give one of them.")
    if budget is not None and budget != "per-host" and retry is None:
        raise ConfigurationError("budget= bounds retries, and retry=None makes none.", "Leave one of them out.")
    if retry is STANDARD_RETRY and clock is not SYSTEM_CLOCK:
        retry = Retry(clock=clock)
    if fallback is not None and not isinstance(fallback, Fallback):
        fallback = Fallback(answer=fallback, name=name)
    of_pipeline = () if pipeline is None else pipeline.explain().steps
    if (fallback is not None and fallback.last_good is not None) or any(
        step.kind == "fallback" and step.settings.get("last_good") is not None for step in of_pipeline
    ):
        raise ConfigurationError(
            "last_good= keeps what a function has answered, and a response can be read once, so none can be kept.",
            "Put the Fallback around the function that reads it.",
        )
    routes = _Routes(family, connection) if inner is None else None

    outer: list[Policy] = [] if fallback is None else [fallback]
    innermost: list[Policy] = []
    if pipeline is not None:
        outer = [pipeline]
        attempt_timeout, retry, breaker = None, None, None
    if attempt_timeout is not None:
        innermost.append(Timeout(attempt_timeout, clock=clock))
    elif timeout is not None:
        innermost.append(Timeout(total=timeout, clock=clock))

    _warn_of_repeats(name, pipeline, retry)

    from meshkit.telemetry import recorder, tracing

    tracing.install()
    recorder.install()
    return family.transport(
        family,
        name,
        _Hosts(name, outer, retry, budget, breaker, innermost, home, clock),
        timeout=timeout,
        attempt_timeout=attempt_timeout,
        resends=_retries(outer if retry is None else [retry]),
        inner=inner,
        routes=routes,
        clock=clock,
    )


def repeats(steps: Sequence[Step]) -> Iterable[Finding]:
    """The rule of HTTP for `Pipeline.explain(meshkit.httpx.repeats)`: nothing repeats a request that may have had its
    effect, unless both sides know that it is the same one."""
    for step in steps:
        rule, named = step.settings.get("rule"), step.settings.get("on") or ()
        if step.kind != "retry" or attempts_of(step) <= 1 or rule is None:
            continue
        if rule == "on" and _UNSENT.issuperset(named):
            continue
        yield Finding(
            id="unsafe-method-retried",
            what=f"A retry ({step.position}) says by a rule of its own what is tried again, whatever the method: a POST "
            "without an Idempotency-Key takes effect twice.",
            remedy="Leave the rule out, so that the table of meshkit.httpx decides, or send a key with each POST.",
            steps=(step.position,),
        )


def _warn_of_repeats(name: str, pipeline: Pipeline | None, retry: Retry | None) -> None:
    described: dict[str, object] = {"kind": "pipeline", "name": name, "policies": [retry.describe()] if retry else []}
    explanation = explain(described if pipeline is None else pipeline.describe(), repeats)
    # Everything else is said when the pipelines are made, by each of its own; this none of them has said.
    warn(
        replace(
            explanation,
            steps=tuple(replace(step, nested=0) for step in explanation.steps),
            findings=tuple(found for found in explanation.findings if found.id == "unsafe-method-retried"),
        )
    )


def _retries(policies: Iterable[Policy]) -> bool:
    """Whether anything in here makes a second attempt: who has switched retries off gets none at all."""

    def found(described: dict[str, object]) -> bool:
        if described.get("kind") == "retry":
            return described.get("attempts") != 1
        return any(found(part) for part in cast("list[dict[str, object]]", described.get("policies", [])))

    return any(found(policy.describe()) for policy in policies)


class _Hosts:
    """The pipeline of each host: the same policies, and where asked for a breaker and a retry budget of its own.

    Of these, the `MOST_HOSTS` used last are kept. An open breaker is never dropped: forgetting that a host is down is
    worse than forgetting that it is up. One that has been open long enough to probe counts as forgettable.
    """

    def __init__(
        self,
        name: str,
        outer: list[Policy],
        retry: Retry | None,
        budget: RetryBudget | Literal["per-host"] | None,
        breaker: CircuitBreaker | Literal["per-host"] | None,
        innermost: list[Policy],
        home: str,
        clock: Clock,
    ) -> None:
        self._name = name
        self._outer = outer
        self._retry = retry
        self._innermost = innermost
        self._home = home
        self._clock = clock
        # Who has given a Retry with a budget has said what its destination is.
        self._budgets = budget == "per-host" and retry is not None and retry.budget is None and retry.attempts > 1
        if isinstance(budget, RetryBudget) and retry is not None:
            self._retry = replace(retry, budget=budget)
        self._breakers = breaker == "per-host"
        self._breaker = breaker if isinstance(breaker, CircuitBreaker) else None
        self._per_host = self._breakers or self._budgets
        # For all hosts, or else for those that there is no room for: these have one budget together, and no breaker.
        self._common = None if self._per_host else self._made(name, None)
        self._known: Kept[str, tuple[CircuitBreaker | None, Pipeline]] = Kept(
            name, MOST_HOSTS, lambda known: known[0], clock
        )

    def pipeline(self, url: Any) -> Pipeline:
        if not self._per_host and self._common is not None:
            return self._common
        host = _origin(url)
        known = self._known.get(host)
        if known is not None:
            return known[1]
        if not self._known.has_room(host):
            if self._common is None:
                self._common = self._made(f"{self._name} (others)", None)
            return self._common
        name = self._name if host == self._home else f"{self._name} {host}"
        breaker = CircuitBreaker(name, clock=self._clock) if self._breakers else None
        made = self._made(name, breaker)
        self._known.put(host, (breaker, made))
        return made

    def _made(self, budget: str, breaker: CircuitBreaker | None) -> Pipeline:
        retry = self._retry
        if retry is not None and self._budgets:
            retry = replace(retry, budget=RetryBudget(budget, clock=self._clock))
        inside = [policy for policy in (retry, breaker or self._breaker) if policy is not None]
        return Pipeline(self._name, *self._outer, *inside, *self._innermost, allow=_ALLOWED)


def _origin(url: Any) -> str:
    """`host`, with the port where it is not the scheme's own."""
    return f"{url.host}:{url.port}" if url.port is not None else str(url.host)


class _Routes:
    """The transports that have the connections: a direct one, and one for each proxy of the environment.

    A client that is given a transport reads no proxy variables, so this does, by the client's own rules.
    """

    def __init__(self, family: _Family, connection: dict[str, Any]) -> None:
        module = family.module
        settings = dict(connection)
        trust_env = settings.get("trust_env", True)
        context = module.create_ssl_context(
            verify=settings.pop("verify", True), cert=settings.pop("cert", None), trust_env=trust_env
        )
        make = functools.partial(module.AsyncHTTPTransport, verify=context, trust_env=trust_env)
        self.direct = make(**settings)
        self._proxied: dict[str, Any] = {}
        self._exempt: tuple[str, ...] = ()
        if trust_env and settings.get("proxy") is None:
            found = urllib.request.getproxies()
            self._exempt = tuple(entry.strip().lower() for entry in found.get("no", "").split(",") if entry.strip())
            made: dict[str, Any] = {}
            for scheme in ("http", "https", "all"):
                if address := found.get(scheme):
                    address = address if "://" in address else f"http://{address}"
                    # One for both schemes where the proxy is the same, so that the limits count once.
                    if address not in made:
                        made[address] = make(**{**settings, "proxy": address})
                    self._proxied[scheme] = made[address]

    def all(self) -> list[Any]:
        return [self.direct, *dict.fromkeys(self._proxied.values())]

    def to(self, url: Any) -> Any:
        if not self._proxied or self._is_exempt(url.host, url.port):
            return self.direct
        return self._proxied.get(url.scheme) or self._proxied.get("all") or self.direct

    def _is_exempt(self, host: str, port: int | None) -> bool:
        for entry in self._exempt:
            name, wanted = entry.partition("://")[2] if "://" in entry else entry, ""
            if not _is_address(name) and name.rpartition(":")[2].isdigit():
                name, _, wanted = name.rpartition(":")
            if name == "*":
                return True
            if wanted and wanted != str(port):
                continue
            if _is_address(name) or name == "localhost":
                if host == name.strip("[]"):
                    return True
            elif (host == name.lstrip(".") and not name.startswith(".")) or host.endswith("." + name.lstrip(".")):
                return True
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


# -- one call ---------------------------------------------------------------------------------------------------------


class _Transport:
    """What `transport` gives: mixed with the library's own AsyncBaseTransport."""

    def __init__(
        self,
        family: _Family,
        name: str,
        hosts: _Hosts,
        *,
        timeout: float | None,
        attempt_timeout: float | None,
        resends: bool,
        inner: Any,
        routes: _Routes | None,
        clock: Clock,
    ) -> None:
        self.family = family
        self.name = name
        self.hosts = hosts
        self.timeout = timeout
        self.attempt_timeout = attempt_timeout
        self.resends = resends
        self.clock = clock
        self._inner = inner
        self._routes = routes

    def __repr__(self) -> str:
        return f"<meshkit.httpx.transport {self.name!r}>"

    def inner(self, url: Any) -> Any:
        """The transport that has the connections to `url`."""
        return self._inner if self._routes is None else self._routes.to(url)

    def _inners(self) -> list[Any]:
        return [self._inner] if self._routes is None else self._routes.all()

    async def handle_async_request(self, request: Any) -> Any:
        before = request.extensions.get(_LOGICAL)
        logical = before if isinstance(before, _Logical) and before.resume() else _Logical(self, request, before)
        return await _Exchange(self, logical, request).run()

    async def __aenter__(self) -> Self:
        for inner in self._inners():
            await inner.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        for inner in self._inners():
            await inner.__aexit__(kind, error, traceback)

    async def aclose(self) -> None:
        for inner in self._inners():
            await inner.aclose()


class _Logical:
    """What the caller thinks of as one call: its attempts, and the requests that a redirect or a challenge adds."""

    __slots__ = (
        "_clock",
        "_may_go_on",
        "_over",
        "_pending",
        "_started",
        "deadline",
        "name",
        "operation",
        "sends",
        "span",
    )

    def __init__(self, owner: _Transport, request: Any, before: object) -> None:
        self._clock = owner.clock
        self._started = now = owner.clock.now()
        self.name = owner.name
        self.operation = str(request.extensions.get(OPERATION, ""))
        self.sends = 0
        self._over = False
        self._may_go_on = False
        self._pending: asyncio.Handle | None = None
        self.deadline = None if owner.timeout is None else now + owner.timeout
        scope = current_scope()
        if scope is not None and scope.deadline is not None:
            self.deadline = scope.deadline if self.deadline is None else min(self.deadline, scope.deadline)
        if isinstance(before, _Logical) and before._may_go_on and before.deadline is not None and now < before.deadline:
            # A hook or an authentication flow took its time between two requests of one call: the span of the call has
            # ended by then, its time and its count of attempts go on.
            self.deadline = before.deadline
            self.sends = before.sends
        attributes: dict[str, AttributeValue] = {"meshkit.client.name": owner.name}
        title = f"meshkit.call {owner.name}"
        if self.operation:
            attributes["meshkit.operation"] = self.operation
            title = f"{title} {self.operation}"
        self.span = tracer().start(title, attributes=attributes)
        request.extensions[_LOGICAL] = self

    def resume(self) -> bool:
        """Whether this call goes on with another request; a call that is over does not."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None
        return not self._over

    def left(self) -> float | None:
        return None if self.deadline is None else self.deadline - self._clock.now()

    def pause(self, outcome: CallOutcome) -> None:
        """A request has been answered by a redirect or a challenge, which the client may follow: at once, or never."""
        self._may_go_on = True
        self._pending = asyncio.get_running_loop().call_soon(self.end, outcome, None)

    def end(self, outcome: CallOutcome, error: BaseException | None) -> None:
        if self._over:
            return
        self._over = True
        seconds = self._clock.now() - self._started
        context = self.span.context
        if self.span.recording:
            self.span.set({"meshkit.attempts": self.sends, "meshkit.outcome": outcome})
            if error is not None and outcome != "cancelled":
                self.span.fail(_type_of(error), str(error))
        if heard(ClientCallEnded):
            emit(
                ClientCallEnded(
                    source=self.name,
                    operation=self.operation,
                    outcome=outcome,
                    attempts=self.sends,
                    seconds=seconds,
                    traceparent="" if context is None else context.traceparent,
                )
            )
        self.span.end()


class _Exchange:
    """One request of a logical call, with its attempts, until the end of its body.

    What is known of the present attempt comes from the library's `trace` extension
    (https://www.encode.io/httpcore/extensions/): whether a connection was made, whether anything was sent.
    """

    __slots__ = (
        "_answered",
        "_attempt",
        "_body_begun",
        "_connected",
        "_extensions",
        "_inner",
        "_last",
        "_pooled",
        "_resent",
        "_sent",
        "_traced",
        "call",
        "ended",
        "logical",
        "owner",
        "read_timeout",
        "request",
    )

    def __init__(self, owner: _Transport, logical: _Logical, request: Any) -> None:
        self.owner = owner
        self.logical = logical
        self.request = request
        self.call = Call(owner.name, judge=self.judge, discard=_discard)
        self.read_timeout: float | None = None
        self._inner = owner.inner(request.url)
        self._traced = isinstance(self._inner, owner.family.module.AsyncHTTPTransport)
        self._extensions = {key: request.extensions.get(key) for key in ("timeout", "trace")}
        self._last: Any = None
        self._attempt: _Attempt | None = None
        self._resent = False
        self.ended = False
        self._pooled = self._connected = self._sent = self._body_begun = self._answered = False

    async def run(self) -> Any:
        logical = self.logical
        outer = current_scope()
        if logical.deadline is None:
            scope = Scope() if outer is None else outer
        else:
            scope = Scope(deadline=logical.deadline) if outer is None else outer.narrowed(logical.deadline)
        try:
            with scope_open(scope), logical.span.active():
                response = await self.owner.hosts.pipeline(self.request.url).run(self.call, self._send)
                self._check(response)
            self._learn(scope, response)
        except BaseException as error:
            if isinstance(error, (RejectedError, DeadlineExceededError)):
                # Whoever handles this may answer with an error of its own making. It is to say all the same that
                # another attempt from above cannot help: what is shut off stays so, and the time is over.
                scope.mark_exhausted()
            self.owner.family.adopt(error)
            self.end(Outcome(error=error))
            raise
        finally:
            # The request may be sent again, by the client or by the caller: with the settings it came with.
            for key, value in self._extensions.items():
                if value is None:
                    self.request.extensions.pop(key, None)
                else:
                    self.request.extensions[key] = value
        if response.is_closed:
            # A ready-made answer, a fallback's say: nothing of its body is still to come.
            self.end(Outcome(response))
        else:
            response.stream = self.owner.family.body(self, response)
        return response

    def _check(self, response: Any) -> None:
        if not isinstance(response, self.owner.family.module.Response):
            raise ConfigurationError(
                f"a fallback or policy of client {self.owner.name!r} returned {type(response).__name__}.",
                f"It has to return a response of {self.owner.family.module.__name__}.",
            )

    def _learn(self, scope: Scope, response: Any) -> None:
        """Write down what the answer says of what happened below, whatever policies there are between."""
        headers = response.headers
        if "meshkit-retry" in headers and self.judge(Outcome(response)).exhausted:
            scope.mark_exhausted()
        if "meshkit-degraded" in headers:
            for name in _marks(headers["meshkit-degraded"]):
                scope.mark_degraded(name)

    def end(self, outcome: Outcome) -> None:
        """The body has ended, failed or been closed, or there was none: policies learn of it, then the call ends."""
        if self.ended:
            return
        self.ended = True
        logical = self.logical
        with logical.span.active():
            self.call.end(outcome)
        word = self._word(outcome)
        if outcome.error is None and self.followable(outcome.result):
            logical.pause(word)
        else:
            logical.end(word, outcome.error)

    def late(self) -> DeadlineExceededError:
        """The error for a body that is not over when the time of the whole call is."""
        limit = self.owner.timeout or 0.0
        emit(TimedOut(source=self.owner.name, seconds=limit, kind="total"))
        return DeadlineExceededError(
            f"the body of a response of {self.owner.name!r} did not end in time.", seconds=limit
        )

    def followable(self, response: Any) -> bool:
        """Whether a client may follow this answer by another request of the same call."""
        return (response.status_code in _REDIRECTS and "location" in response.headers) or (
            response.status_code in _CHALLENGES
        )

    def _word(self, outcome: Outcome) -> CallOutcome:
        if isinstance(outcome.error, RejectedError):
            return "rejected"
        if isinstance(outcome.error, asyncio.CancelledError):
            return "cancelled"
        if outcome.error is not None:
            return "error"
        if outcome.result is not self._last:
            # No attempt gave this response, so somebody answered in its place.
            return "fallback"
        return "error" if self.judge(outcome).error_type else "success"

    # -- attempts -----------------------------------------------------------------------------------------------------

    async def _send(self, call: Call) -> Any:
        while True:
            attempt = _Attempt(self)
            call.on_end(attempt.end)
            try:
                response = await self._request(attempt)
            except self.owner.family.broken as error:
                if not self._may_resend():
                    raise
                # The server closed a connection that we kept while our request was on its way: no fault of anybody's,
                # and the retry that RFC 9112 section 9.3.1 has for it.
                self._resent = True
                attempt.end(Outcome(error=error))
                reason = _type_of(error)
                emit(RetryScheduled(source=call.name, attempt=self.logical.sends, delay=0.0, error_type=reason))
                tracer().current().event(
                    "meshkit.retry",
                    {"meshkit.retry.delay": 0.0, "meshkit.retry.reason": reason, "meshkit.attempt": self.logical.sends},
                )
                continue
            self._last = attempt.response = response
            return response

    async def _request(self, attempt: _Attempt) -> Any:
        logical, request, owner = self.logical, self.request, self.owner
        self._pooled = self._connected = self._sent = self._body_begun = self._answered = False
        left = logical.left()
        extensions = request.extensions
        given: Mapping[str, float | None] = self._extensions["timeout"] or {}
        if left is None:
            timeouts = dict(given)
        else:
            timeouts = {
                key: left if (wanted := given.get(key)) is None else min(wanted, left)
                for key in ("connect", "read", "write", "pool")
            }
        self.read_timeout = timeouts.get("read")
        extensions["timeout"] = timeouts
        if self._traced:
            extensions["trace"] = self._trace

        headers = request.headers
        carrier: dict[str, str] = {}
        tracer().inject(carrier, span=attempt.span)
        for key, value in carrier.items():
            headers[key] = value
        headers["meshkit-attempt"] = str(logical.sends)
        # As long as anybody waits for this attempt, and not longer.
        limits = [limit for limit in (left, owner.attempt_timeout) if limit is not None]
        if limits:
            headers["meshkit-timeout-ms"] = str(max(1, int(min(limits) * 1000)))
        with attempt.span.active(), tracer().alone():
            return await self._inner.handle_async_request(request)

    async def _trace(self, name: str, info: dict[str, Any]) -> None:
        event = name.partition(".")[2]
        if event in ("connect_tcp.started", "connect_unix_socket.started"):
            self._pooled = self._connected = True
        elif event == "start_tls.started":
            # Through a proxy, what was sent until here was the request for the tunnel.
            self._sent = self._body_begun = self._answered = False
        elif event == "send_request_headers.started":
            self._pooled = self._sent = True
        elif event == "send_request_body.started":
            self._body_begun = True
        elif event == "receive_response_headers.complete":
            self._answered = True
        users = self._extensions["trace"]
        if users is not None:
            await users(name, info)

    # -- the table ----------------------------------------------------------------------------------------------------

    @property
    def _idempotent(self) -> bool:
        return self.request.method in IDEMPOTENT or "idempotency-key" in self.request.headers

    @property
    def _replayable(self) -> bool:
        """Whether the request's body can be sent once more: it is held as bytes, or nobody has begun to read it."""
        return isinstance(self.request.stream, self.owner.family.module.ByteStream) or (
            self._traced and not self._body_begun
        )

    @property
    def _reused(self) -> bool:
        return self._traced and self._sent and not self._connected

    def _may_resend(self) -> bool:
        return (
            self.owner.resends
            and not self._resent
            and self._reused
            and not self._answered
            and self._idempotent
            and self._replayable
        )

    def judge(self, outcome: Outcome) -> Judgement:
        """The table at the top of this module."""
        if outcome.error is not None:
            return self._judge_error(outcome.error)
        response = outcome.result
        status = response.status_code
        if status < 400 or (status < 500 and status not in (408, 429)):
            return _SUCCESS
        error_type = str(status)
        if response.headers.get("meshkit-retry", "") in _NO_MORE:
            return Judgement(retry=True, breaker="neutral", error_type=error_type, exhausted=True)
        after = seconds_asked(response.headers.get("retry-after"), self.owner.clock)
        if status == 429:
            return Judgement(retry=self._replayable, breaker="neutral", error_type=error_type, retry_after=after)
        if status in (408, 502, 503, 504):
            wanted = self._idempotent or (status == 503 and after is not None)
            return Judgement(
                retry=wanted and self._replayable, breaker="failure", error_type=error_type, retry_after=after
            )
        return Judgement(breaker="failure", error_type=error_type)

    def _judge_error(self, error: BaseException) -> Judgement:
        family, error_type = self.owner.family, _type_of(error)
        if isinstance(error, RejectedError):
            return Judgement(breaker="neutral", error_type=error_type, retry_after=error.retry_after)
        if not isinstance(error, Exception) or isinstance(error, (ConfigurationError, *family.local)):
            return Judgement(breaker="neutral", error_type=error_type)
        if isinstance(error, DeadlineExceededError):
            # No time for another attempt. Where there was none for this one either, that is no news of the server.
            return Judgement(breaker="failure" if self._tried else "neutral", error_type=error_type)
        if isinstance(error, family.module.PoolTimeout) or (
            isinstance(error, AttemptTimeoutError) and self._traced and not self._pooled
        ):
            return Judgement(retry=self._replayable, breaker="neutral", error_type=error_type)
        if isinstance(error, family.not_sent) or (self._traced and self._pooled and not self._sent):
            return Judgement(retry=self._replayable, breaker="failure", error_type=error_type)
        if isinstance(error, family.broken) and self._reused and not self._answered:
            return Judgement(retry=self._idempotent and self._replayable, breaker="neutral", error_type=error_type)
        if isinstance(error, (family.module.TransportError, TimeoutError, OSError)):
            return Judgement(retry=self._idempotent and self._replayable, breaker="failure", error_type=error_type)
        return Judgement(breaker="neutral", error_type=error_type)

    @property
    def _tried(self) -> bool:
        return self._pooled if self._traced else self.logical.sends > 0


class _Attempt:
    """One HTTP request on the wire: its span, and its end."""

    __slots__ = ("_ended", "_exchange", "_started", "response", "span")

    def __init__(self, exchange: _Exchange) -> None:
        logical, request = exchange.logical, exchange.request
        logical.sends += 1
        self._exchange = exchange
        self._ended = False
        self._started = exchange.owner.clock.now()
        self.response: Any = None
        method = request.method
        attributes: dict[str, AttributeValue] = {}
        if logical.span.recording:
            url = request.url
            attributes = {
                "http.request.method": method if method in _METHODS else "_OTHER",
                "server.address": url.host,
                "server.port": url.port or (443 if url.scheme == "https" else 80),
                "url.full": redacted(str(url)),
                "meshkit.client.name": logical.name,
                "meshkit.attempt": logical.sends,
            }
            if method not in _METHODS:
                attributes["http.request.method_original"] = method
            if logical.sends > 1:
                attributes["http.request.resend_count"] = logical.sends - 1
        self.span = tracer().start(
            method if method in _METHODS else "HTTP", kind="client", parent=logical.span, attributes=attributes
        )

    def end(self, outcome: Outcome) -> None:
        if self._ended:
            return
        self._ended = True
        exchange, span, response, error = self._exchange, self.span, self.response, outcome.error
        status = 0 if response is None else response.status_code
        error_type = str(status) if status >= 400 else ""
        if error is not None:
            error_type = "" if isinstance(error, asyncio.CancelledError) else _type_of(error)
        if span.recording:
            if response is not None:
                attributes: dict[str, AttributeValue] = {"http.response.status_code": status}
                version = response.extensions.get("http_version")
                if isinstance(version, bytes):
                    attributes["network.protocol.version"] = version.decode("ascii", "replace").removeprefix("HTTP/")
                if marks := _marks(response.headers.get("meshkit-degraded", "")):
                    attributes["meshkit.degraded"] = ", ".join(marks)
                span.set(attributes)
            if error_type:
                span.fail(error_type, "" if error is None else str(error))
        if heard(ClientAttemptEnded):
            context = span.context
            emit(
                ClientAttemptEnded(
                    source=exchange.owner.name,
                    status=status,
                    error_type=error_type,
                    seconds=exchange.owner.clock.now() - self._started,
                    traceparent="" if context is None else context.traceparent,
                )
            )
        span.end()


class _Body:
    """The body of a response that was handed out: mixed with the library's own AsyncByteStream.

    Its end, failure, close or collection is the end of the call. Each read is bounded by the time the call has left.
    """

    def __init__(self, exchange: _Exchange, response: Any) -> None:
        self._stream = response.stream
        self._exchange = exchange
        self._outcome = Outcome(response)
        self._loop = asyncio.get_running_loop()
        self._reader: AsyncIterator[bytes] | None = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._reader = aiter(self._stream)
        return cast("AsyncIterator[bytes]", self)

    async def __anext__(self) -> bytes:
        exchange = self._exchange
        try:
            return await self._read()
        except StopAsyncIteration:
            # A client that follows a redirect does so right after the close, not necessarily right after the end.
            if not exchange.followable(self._outcome.result):
                exchange.end(self._outcome)
            raise
        except BaseException as error:
            scope = current_scope()
            if scope is not None and isinstance(error, DeadlineExceededError):
                scope.mark_exhausted()
            exchange.owner.family.adopt(error)
            exchange.end(Outcome(error=error))
            raise

    async def _read(self) -> bytes:
        exchange, reader = self._exchange, self._reader
        assert reader is not None
        left = exchange.logical.left()
        if left is None or (exchange.read_timeout is not None and exchange.read_timeout < left):
            # The library's own limit is the earlier one.
            return await anext(reader)
        if left <= 0:
            raise exchange.late()
        return await Timeout(total=left, clock=exchange.owner.clock).run(exchange.call, lambda _: anext(reader))

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._exchange.end(self._outcome)

    def __del__(self) -> None:
        # Collection may come in the middle of anything, under a policy's or a metric's lock too: so not here and now.
        if not self._exchange.ended and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._exchange.end, self._outcome)


async def _discard(response: Any) -> None:
    """Close a response that nobody gets. One that cannot be closed must not keep the call from going on."""
    try:
        await response.aclose()
    except Exception:
        _log.debug("a discarded response could not be closed", exc_info=True)


def _marks(value: str) -> list[str]:
    """The names of fallbacks in a `meshkit-degraded` header; what a name of ours cannot be is left out."""
    names = (name.strip() for name in value[: 2 * _MOST_MARKS * _MOST_MARK].split(","))
    return [name for name in names if 0 < len(name) <= _MOST_MARK and name.isascii() and name.isprintable()][
        :_MOST_MARKS
    ]


def redacted(url: str) -> str:
    """`url` as it may be shown: without user, password, and the values of parameters that are known to be secret."""
    if "?" not in url and "@" not in url and "#" not in url:
        return url
    parts = urllib.parse.urlsplit(url)
    netloc = parts.netloc
    if "@" in netloc:
        netloc = f"REDACTED:REDACTED@{netloc.rpartition('@')[2]}"
    query = parts.query
    if query:
        pairs = []
        for pair in query.split("&"):
            name, equals, _ = pair.partition("=")
            plain = urllib.parse.unquote_plus(name).lower()
            secret = plain in SENSITIVE_PARAMETERS or plain.startswith("x-amz-")
            pairs.append(f"{name}=REDACTED" if equals and secret else pair)
        query = "&".join(pairs)
    return urllib.parse.urlunsplit((parts.scheme, netloc, parts.path, query, ""))
