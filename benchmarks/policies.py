"""Circuit breakers and retries around a function that does nothing, beside other libraries; and how each of them behaves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import itertools
import logging
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from typing import Any

from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry

import meshkit
from benchmarks import Row, Sample, each_async, each_sync
from benchmarks._telemetry import provider
from meshkit.core.trace import tracer, use_tracer
from meshkit.telemetry import recorder
from meshkit.telemetry.tracing import OtelTracer

Fn = Callable[[], Awaitable[object]]
# What decorates a function, plain or async. `Any`, because each library has its own opinion of the type.
Guard = Callable[[Any], Any]

_LONG = 3600.0
_names = (f"bench-{number}" for number in itertools.count())


class _Failed(Exception):
    pass


async def _nothing() -> None: ...


def _nothing_sync() -> None: ...


async def _raises() -> None:
    raise _Failed


def _raises_sync() -> None:
    raise _Failed


# --- the contenders --------------------------------------------------------------------------------------------------
#
# Each as its library makes it where nothing is said, but for how long a breaker stays open, three attempts and no waits.
# A library is imported when it is its turn, so that one which is not installed is left out and no more.


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """``distribution`` is its name in the package index; ``guard`` makes a new breaker that stays open for so many seconds, or a
    new retry, and ``guard_sync`` the same for plain functions, `None` where there is no such thing."""

    distribution: str
    guard: Callable[..., Guard]
    guard_sync: Callable[..., Guard] | None


def _of(module: str) -> Any:
    return importlib.import_module(module)


def _meshkit_breaker(open_for: float) -> Guard:
    return meshkit.CircuitBreaker(next(_names), open_for=open_for)


def _circuitbreaker(open_for: float) -> Guard:
    made: Guard = _of("circuitbreaker").CircuitBreaker(recovery_timeout=open_for, name=next(_names))
    return made


def _hyx_breaker(open_for: float) -> Guard:
    made: Guard = _of("hyx.circuitbreaker").consecutive_breaker(recovery_time_secs=open_for)
    return made


def _pybreaker(open_for: float) -> Guard:
    breaker = _of("pybreaker").CircuitBreaker(reset_timeout=open_for)

    def guard(fn: Fn) -> Fn:
        async def through() -> object:
            with breaker.calling():
                return await fn()

        return through

    return guard


def _pybreaker_sync(open_for: float) -> Guard:
    breaker = _of("pybreaker").CircuitBreaker(reset_timeout=open_for)

    def guard(fn: Callable[[], object]) -> Callable[[], object]:
        def through() -> object:
            with breaker.calling():
                return fn()

        return through

    return guard


def _purgatory(open_for: float) -> Guard:
    made: Guard = _of("purgatory").AsyncCircuitBreakerFactory(default_ttl=open_for)(next(_names))
    return made


def _purgatory_sync(open_for: float) -> Guard:
    made: Guard = _of("purgatory").SyncCircuitBreakerFactory(default_ttl=open_for)(next(_names))
    return made


def _aiobreaker(open_for: float) -> Guard:
    made: Guard = _of("aiobreaker").CircuitBreaker(timeout_duration=timedelta(seconds=open_for))
    return made


def _interlock(open_for: float) -> Guard:
    interlock = _of("interlock")
    made: Guard = interlock.CircuitBreaker(name=next(_names), config=interlock.Config(wait_duration_in_open=open_for))
    return made


def _nopanic_breaker(open_for: float) -> Guard:
    made: Guard = _of("nopanic").circuit_breaker(reset_timeout=open_for)
    return made


BREAKERS: Mapping[str, Peer] = {
    "meshkit breaker": Peer(distribution="meshkit-py", guard=_meshkit_breaker, guard_sync=_meshkit_breaker),
    "circuitbreaker": Peer(distribution="circuitbreaker", guard=_circuitbreaker, guard_sync=_circuitbreaker),
    "hyx": Peer(distribution="hyx", guard=_hyx_breaker, guard_sync=None),
    "pybreaker calling()": Peer(distribution="pybreaker", guard=_pybreaker, guard_sync=_pybreaker_sync),
    "purgatory": Peer(distribution="purgatory", guard=_purgatory, guard_sync=_purgatory_sync),
    "aiobreaker": Peer(distribution="aiobreaker", guard=_aiobreaker, guard_sync=_aiobreaker),
    "interlock": Peer(distribution="interlock-cb", guard=_interlock, guard_sync=_interlock),
    "nopanic": Peer(distribution="nopanic", guard=_nopanic_breaker, guard_sync=_nopanic_breaker),
}


def _loop() -> Guard:
    def guard(fn: Fn) -> Fn:
        async def call() -> object:
            for attempt in range(3):
                try:
                    return await fn()
                except _Failed:
                    if attempt == 2:
                        raise
                    await asyncio.sleep(0)
            raise AssertionError

        return call

    return guard


def _loop_sync() -> Guard:
    def guard(fn: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            for attempt in range(3):
                try:
                    return fn()
                except _Failed:
                    if attempt == 2:
                        raise
            raise AssertionError

        return call

    return guard


def _meshkit_retry() -> Guard:
    no_wait = meshkit.Backoff(first=0, jitter=lambda longest: longest)
    return meshkit.Pipeline("bench", meshkit.Retry(on=_Failed, attempts=3, backoff=no_wait))


def _hyx_retry() -> Guard:
    made: Guard = _of("hyx.retry").retry(on=_Failed, attempts=3, backoff=0)
    return made


def _tenacity() -> Guard:
    tenacity = _of("tenacity")
    made: Guard = tenacity.retry(
        retry=tenacity.retry_if_exception_type(_Failed), stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_none()
    )
    return made


def _stamina() -> Guard:
    made: Guard = _of("stamina").retry(on=_Failed, attempts=3, wait_initial=0, wait_max=0, wait_jitter=0)
    return made


def _backoff() -> Guard:
    backoff = _of("backoff")
    made: Guard = backoff.on_exception(backoff.constant, _Failed, max_tries=3, interval=0, jitter=None)
    return made


def _nopanic_retry() -> Guard:
    made: Guard = _of("nopanic").retry(attempts=3, on=_Failed, backoff=0)
    return made


RETRIES: Mapping[str, Peer] = {
    "hand-written loop": Peer(distribution="", guard=_loop, guard_sync=_loop_sync),
    "meshkit retry": Peer(distribution="meshkit-py", guard=_meshkit_retry, guard_sync=_meshkit_retry),
    "hyx": Peer(distribution="hyx", guard=_hyx_retry, guard_sync=None),
    "tenacity": Peer(distribution="tenacity", guard=_tenacity, guard_sync=_tenacity),
    "stamina": Peer(distribution="stamina", guard=_stamina, guard_sync=_stamina),
    "backoff": Peer(distribution="backoff", guard=_backoff, guard_sync=_backoff),
    "nopanic": Peer(distribution="nopanic", guard=_nopanic_retry, guard_sync=_nopanic_retry),
}


# Calls a function behind the breaker of a key, and tells how many breakers there are.
Keyed = tuple[Callable[[int, Fn], Awaitable[object]], Callable[[], int]]


def _meshkit_keyed() -> Keyed:
    breakers = meshkit.CircuitBreakers(next(_names), key=lambda key, fn: key, open_for=_LONG)

    @breakers
    async def call(key: int, fn: Fn) -> object:
        return await fn()

    return call, lambda: len(breakers)


def _purgatory_keyed() -> Keyed:
    factory = _of("purgatory").AsyncCircuitBreakerFactory(default_ttl=_LONG)
    context = _of("purgatory.domain.model").Context

    async def call(key: int, fn: Fn) -> object:
        async with await factory.get_breaker(str(key)):
            return await fn()

    def alive() -> int:
        gc.collect()
        return sum(isinstance(held, context) for held in gc.get_objects())

    # It does not tell; those of other factories were there before.
    before = alive()
    return call, lambda: alive() - before


def _interlock_keyed() -> Keyed:
    interlock = _of("interlock")
    registry = interlock.Registry(config=interlock.Config(wait_duration_in_open=_LONG))

    async def call(key: int, fn: Fn) -> object:
        return await registry.get(str(key)).call_async(fn)

    return call, lambda: len(registry.names())


def _nopanic_keyed() -> Keyed:
    nopanic = _of("nopanic")
    breakers = nopanic.keyed(lambda key: nopanic.circuit_breaker(reset_timeout=_LONG), key=lambda key, fn: key)

    @breakers  # type: ignore[untyped-decorator]
    async def call(key: int, fn: Fn) -> object:
        return await fn()

    return call, lambda: len(breakers.keys())


# Those that make a breaker a key by themselves.
REGISTRIES: Mapping[str, Callable[[], Keyed]] = {
    "meshkit breaker": _meshkit_keyed,
    "purgatory": _purgatory_keyed,
    "interlock": _interlock_keyed,
    "nopanic": _nopanic_keyed,
}


def _version(peer: Peer) -> str | None:
    """The version that is installed; `None` where none is."""
    try:
        return metadata.version(peer.distribution)
    except metadata.PackageNotFoundError:
        return None


def _installed(peers: Mapping[str, Peer]) -> dict[str, Peer]:
    return {name: peer for name, peer in peers.items() if not peer.distribution or _version(peer) is not None}


# --- what is measured ------------------------------------------------------------------------------------------------


def _beside(peers: Mapping[str, Peer], against: str, ours: str, *states: str, plain: bool = False) -> Iterator[Row]:
    """A row without a target for every peer in every state."""
    for state in states:
        for name, peer in peers.items():
            if name not in (against, ours) and not (plain and peer.guard_sync is None):
                yield Row(what=f"{name}, {state}", against=f"{against}, {state}", target=None)


ROWS = (
    Row(what="meshkit breaker, closed", against="circuitbreaker, closed", target=0.55),
    Row(what="meshkit breaker, open", against="bare raise", target=1.5),
    Row(what="meshkit retry, nothing fails", against="hand-written loop, nothing fails", target=1.4),
    Row(what="meshkit retry, two failures", against="hand-written loop, two failures", target=3.5),
    # What a tracer adds: all of this happens in a span that is recorded.
    Row(what="meshkit breaker, closed, traced", against="circuitbreaker, closed", target=None),
    Row(what="meshkit breaker, open, traced", against="bare raise", target=None),
    Row(what="meshkit retry, nothing fails, traced", against="hand-written loop, nothing fails", target=None),
    Row(what="meshkit retry, two failures, traced", against="hand-written loop, two failures", target=None),
    Row(what="bare call", against="circuitbreaker, closed", target=None),
    *_beside(BREAKERS, "circuitbreaker", "meshkit breaker", "closed"),
    *(Row(what=f"{name}, open", against="bare raise", target=None) for name in BREAKERS if name != "meshkit breaker"),
    Row(what="meshkit breaker, closed, sync", against="circuitbreaker, closed, sync", target=None),
    *_beside(BREAKERS, "circuitbreaker", "meshkit breaker", "closed, sync", plain=True),
    Row(what="meshkit breaker, open, sync", against="bare raise, sync", target=None),
    *(
        Row(what=f"{name}, open, sync", against="bare raise, sync", target=None)
        for name, peer in BREAKERS.items()
        if name != "meshkit breaker" and peer.guard_sync is not None
    ),
    *_beside(RETRIES, "hand-written loop", "meshkit retry", "nothing fails", "two failures"),
    Row(what="meshkit retry, nothing fails, sync", against="hand-written loop, nothing fails, sync", target=None),
    *_beside(RETRIES, "hand-written loop", "meshkit retry", "nothing fails, sync", plain=True),
)


def _fails_twice() -> Fn:
    calls = 0

    async def flaky() -> None:
        nonlocal calls
        calls += 1
        if calls % 3:
            raise _Failed

    return flaky


def _open(make: Callable[[float], Guard]) -> Sample:
    """Rejections of a new breaker in each round: there is one whose rejections become dearer with their number."""

    def sample() -> float:
        fn = make(_LONG)(_raises)

        async def until_open() -> None:
            for _ in range(50):
                with contextlib.suppress(Exception):
                    await fn()

        asyncio.run(until_open())
        return _rejected(fn)()

    return sample


def _open_sync(make: Callable[[float], Guard]) -> Sample:
    def sample() -> float:
        fn = make(_LONG)(_raises_sync)
        for _ in range(50):
            with contextlib.suppress(Exception):
                fn()
        return _rejected_sync(fn)()

    return sample


def _rejected(fn: Fn) -> Sample:
    async def once() -> None:
        try:
            await fn()
        except Exception:
            return
        raise AssertionError("the call was let through")

    return each_async(once)


def _rejected_sync(fn: Callable[[], object]) -> Sample:
    def once() -> None:
        try:
            fn()
        except Exception:
            return
        raise AssertionError("the call was let through")

    return each_sync(once)


def _traced(sample: Sample, spans: TracerProvider) -> Sample:
    """The same with a tracer, inside a span that is recorded: what a policy does goes onto it."""
    ours = OtelTracer(provider=spans)

    def one() -> float:
        before = tracer()
        use_tracer(ours)
        span = ours.start("bench")
        try:
            with span.active():
                return sample()
        finally:
            span.end()
            use_tracer(before)

    return one


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    registry = CollectorRegistry()
    recorder.install(registry)
    spans = provider()
    samples: dict[str, Sample] = {
        "bare call": each_async(_nothing),
        "bare raise": _rejected(_raises),
        "bare raise, sync": _rejected_sync(_raises_sync),
    }
    for name, peer in _installed(BREAKERS).items():
        samples[f"{name}, closed"] = each_async(peer.guard(_LONG)(_nothing))
        samples[f"{name}, open"] = _open(peer.guard)
        if peer.guard_sync is not None:
            samples[f"{name}, closed, sync"] = each_sync(peer.guard_sync(_LONG)(_nothing_sync))
            samples[f"{name}, open, sync"] = _open_sync(peer.guard_sync)
    for name, peer in _installed(RETRIES).items():
        samples[f"{name}, nothing fails"] = each_async(peer.guard()(_nothing))
        samples[f"{name}, two failures"] = each_async(peer.guard()(_fails_twice()))
        if peer.guard_sync is not None:
            samples[f"{name}, nothing fails, sync"] = each_sync(peer.guard_sync()(_nothing_sync))
    for name in ("breaker, closed", "breaker, open", "retry, nothing fails", "retry, two failures"):
        samples[f"meshkit {name}, traced"] = _traced(samples[f"meshkit {name}"], spans)
    with _quiet():
        yield samples
    spans.shutdown()
    recorder.uninstall(registry)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines that some write per retry by themselves: they are not what is compared."""
    hooks = importlib.util.find_spec("stamina") and _of("stamina.instrumentation")
    log = logging.getLogger("backoff")
    log.disabled = True
    if hooks:
        hooks.set_on_retry_hooks([])
    try:
        yield
    finally:
        log.disabled = False
        if hooks:
            hooks.set_on_retry_hooks(None)


# --- how each behaves ------------------------------------------------------------------------------------------------

_CALLERS = 20
_REJECTIONS = 10_000
_KEYS = 10_000
# How long a breaker stays open where it is to be seen half-open, and how long we wait for that: real time, because not every library lets
# its clock be given.
_SHORT = 0.05


def behaviour() -> dict[str, list[dict[str, object]]]:
    """What the speeds above are worth: each library is run into failures, cancellations and an open circuit, and watched."""
    with _quiet():
        breakers = [
            {"breaker": name, **asyncio.run(_breaker(peer.guard))} for name, peer in _installed(BREAKERS).items()
        ]
        retries = [{"retry": name, **asyncio.run(_retry(peer.guard))} for name, peer in _installed(RETRIES).items()]
        registries = [
            {"a breaker a key": name, **asyncio.run(_registry(make))}
            for name, make in REGISTRIES.items()
            if name in _installed(BREAKERS)
        ]
    return {"breakers": breakers, "retries": retries, "registries": registries, "versions": _versions()}


async def _breaker(make: Callable[[float], Guard]) -> dict[str, object]:
    work = _Scripted()
    opens_after = await _failures_until_open(make(_LONG)(_function(work)), work)
    return {
        "opens after": opens_after,
        f"of {_CALLERS} at half-open": await _let_through(make),
        "a cancelled call": await _cancelled(make, opens_after),
        "the caller sees": await _what_a_cancelled_caller_sees(make, opens_after),
        **await _rejections(make),
    }


class _Scripted:
    """A call that fails, or waits until it is cancelled or let go, and counts how often it was made."""

    def __init__(self) -> None:
        self.calls = 0
        self.waits = False
        self.go = asyncio.Event()

    async def __call__(self) -> None:
        self.calls += 1
        if not self.waits:
            raise _Failed
        await self.go.wait()


async def _failures_until_open(fn: Fn, work: _Scripted) -> int:
    """How many calls fail before one is rejected; 50 where none is."""
    for failures in range(50):
        before = work.calls
        with contextlib.suppress(Exception):
            await fn()
        if work.calls == before:
            return failures
    return 50


async def _let_through(make: Callable[[float], Guard]) -> int:
    """How many of the callers at once get through to a service that has just been given time to recover."""
    work = _Scripted()
    fn = make(_SHORT)(_function(work))
    await _failures_until_open(fn, work)
    await asyncio.sleep(4 * _SHORT)
    work.waits, before = True, work.calls
    callers = [asyncio.ensure_future(fn()) for _ in range(_CALLERS)]
    await asyncio.sleep(_SHORT)
    reached = work.calls - before
    work.go.set()
    await asyncio.gather(*callers, return_exceptions=True)
    return reached


async def _cancelled(make: Callable[[float], Guard], opens_after: int) -> str:
    """What a cancelled call counts as: shown by how many failures are still needed to open."""
    first, second = _Scripted(), _Scripted()
    fn = make(_LONG)(_function(first))
    for _ in range(opens_after - 1):
        await _cancel(fn, first)
    failures_first = await _failures_until_open(fn, first)
    fn = make(_LONG)(_function(second))
    for _ in range(opens_after - 1):
        with contextlib.suppress(Exception):
            await fn()
    await _cancel(fn, second)
    failures_then = await _failures_until_open(fn, second)
    if (failures_first, failures_then) == (opens_after, 1):
        return "counts as nothing"
    return "is a failure" if failures_first <= 1 else "is a success"


async def _what_a_cancelled_caller_sees(make: Callable[[float], Guard], opens_after: int) -> str:
    """What comes out of a cancelled call, also of the one that would be a failure too many."""
    work = _Scripted()
    fn = make(_LONG)(_function(work))
    for _ in range(opens_after - 1):
        with contextlib.suppress(Exception):
            await fn()
    return await _cancel(fn, work)


async def _cancel(fn: Fn, work: _Scripted) -> str:
    """Cancel a call under way; the name of what comes out of it."""
    work.waits = True
    task = asyncio.ensure_future(fn())
    await asyncio.sleep(0)
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    work.waits = False
    return type(outcome).__name__


async def _rejections(make: Callable[[float], Guard]) -> dict[str, object]:
    """What so many rejections leave behind: entries that the traceback of the last one has more than that of the first, and memory."""
    work = _Scripted()
    fn = make(_LONG)(_function(work))
    await _failures_until_open(fn, work)
    first = _entries(await _rejection(fn))
    # What is filled once, and stays as it is, is no growth.
    for _ in range(100):
        await _rejection(fn)
    tracemalloc.start()
    try:
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(_REJECTIONS):
            last = await _rejection(fn)
        more = _entries(last) - first
        del last
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    return {"traceback grows by": more, "memory grows by KiB": round(grown / 1024)}


async def _rejection(fn: Fn) -> BaseException:
    try:
        await fn()
    except Exception as error:
        return error
    raise AssertionError("the call was let through")


def _entries(error: BaseException) -> int:
    """How many entries the traceback of an error has."""
    count, entry = 0, error.__traceback__
    while entry is not None:
        count, entry = count + 1, entry.tb_next
    return count


def _function(work: _Scripted) -> Fn:
    """A coroutine function in form too: not every library takes an object for one."""

    async def call() -> None:
        await work()

    return call


async def _retry(make: Callable[[], Guard]) -> dict[str, object]:
    work = _Scripted()
    try:
        await make()(_function(work))()
    except Exception as error:
        raised = type(error).__name__
    attempts = work.calls
    work.calls = 0
    seen = await _cancel(make()(_function(work)), work)
    return {
        "attempts of 3": attempts,
        "raises": "the error itself" if raised == _Failed.__name__ else raised,
        "attempts of a cancelled call": work.calls,
        "its caller sees": seen,
    }


async def _registry(make: Callable[[], Keyed]) -> dict[str, object]:
    """How many of many keys have a breaker in the end, and whether one that was open before they came still is."""
    call, kept = make()
    for _ in range(50):
        with contextlib.suppress(Exception):
            await call(0, _raises)
    for key in range(1, _KEYS):
        await call(key, _nothing)
    held = kept()
    work = _Scripted()
    with contextlib.suppress(Exception):
        await call(0, _function(work))
    return {f"kept of {_KEYS:,}": held, "an open one is": "forgotten" if work.calls else "kept"}


def _versions() -> list[dict[str, object]]:
    peers = {peer.distribution: peer for peer in [*BREAKERS.values(), *RETRIES.values()] if peer.distribution}
    return [{"library": name, "version": _version(peer) or "not installed, left out"} for name, peer in peers.items()]
