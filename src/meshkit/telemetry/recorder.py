"""Keeps the metrics of the catalogue: listens to events, and asks the circuit breakers when somebody scrapes.

    recorder = install()                                  # into prometheus-client's own registry, or a given one
    content_type, body = recorder.render(accept)          # what `/metrics` answers

A metric is a row of `catalogue.METRICS`; here stands what moves it. Children with closed label sets are made at 0 as
soon as their queue, client or breaker is known, because `increase()` does not see a counter that is born at 1.
"""

from __future__ import annotations

import glob
import logging
import os
import platform
import re
import threading
from collections.abc import Iterable
from typing import Any, Final, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from meshkit._version import __version__
from meshkit.core import events
from meshkit.core.clock import SYSTEM_CLOCK, Clock
from meshkit.core.events import CircuitState, Event, listen
from meshkit.core.trace import tracer
from meshkit.policies.bulkhead import bulkheads
from meshkit.policies.circuit_breaker import CircuitBreaker, breakers
from meshkit.policies.rate_limiter import rate_limiters
from meshkit.policies.retry_budget import budgets
from meshkit.telemetry.catalogue import METRICS, Metric

_log = logging.getLogger("meshkit")

OTHER: Final = "__other__"
GENERATED: Final = "amq.gen"
MOST_VALUES: Final = 200
MOST_ERROR_TYPES: Final = 50
LONGEST_VALUE: Final = 200

# https://opentelemetry.io/docs/specs/semconv/attributes-registry/http/#http-request-method
_METHODS: Final = frozenset(
    ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"),
)
# Names that a broker, a client library or a uuid made up: each is used once, so as a label each would be a new series.
_GENERATED_NAME: Final = re.compile(
    r"amq[._]gen|amq_[0-9a-f]{16}|[0-9a-f]{32}|[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}"
)
# Breakers of one name show the state that rejects most.
_SEVERITY: Final[tuple[CircuitState, ...]] = ("disabled", "closed", "half_open", "open", "isolated")
# So often, at the most, the breakers' figures are written where other processes read them.
_REFRESH_EVERY: Final = 1.0

# So often a child of a histogram gets an exemplar, at the most.
_EXEMPLAR_EVERY: Final = 0.1
_NEVER: Final = (float("-inf"), 0.0)

_ROWS: Final = {metric.name: metric for metric in METRICS}

I = TypeVar("I", Counter, Gauge, Histogram)  # noqa: E741


class _Overflow(Protocol):
    def __call__(self, metric: str, label: str) -> object: ...


class _Row(Generic[I]):
    """One row of the catalogue: its instrument, and the children by the values they were asked for with."""

    __slots__ = ("_children", "_has_siblings", "_lock", "_overflow", "_seen", "instrument", "metric")

    def __init__(self, metric: Metric, instrument: I, overflow: _Overflow) -> None:
        self.metric = metric
        self.instrument: I = instrument
        self._overflow = overflow
        self._children: dict[tuple[object, ...], I] = {}
        self._seen: list[set[str]] = [set(label.values) for label in metric.labels]
        self._lock = threading.RLock()
        self._has_siblings = "error_type" not in metric.label_names and any(label.values for label in metric.labels)

    def child(self, *values: object) -> I:
        """The child for these label values, in the order of the row; too many or generated ones share one."""
        found = self._children.get(values)
        return self._make(values) if found is None else found

    def start(self, **known: str) -> None:
        """Make all children at 0 that can be named from the open labels in `known`."""
        for labels in self.metric.children(**known):
            self.child(*labels.values())

    def fold(self, position: int, value: object) -> str:
        """What stands for `value` in the label at `position`."""
        # A name may come from a request: one that is no text (a lone surrogate), or a book, is not to end all scrapes.
        text = str(value)[:LONGEST_VALUE].encode(errors="replace").decode()
        label = self.metric.labels[position]
        if label.name in ("queue", "destination") and _GENERATED_NAME.search(text):
            text = GENERATED
        seen = self._seen[position]
        with self._lock:
            if text in seen:
                return text
            most = MOST_ERROR_TYPES if label.name == "error_type" else MOST_VALUES
            if not label.values and len(seen) < most:
                seen.add(text)
                return text
        self._overflow(self.metric.name, label.name)
        return OTHER

    def _make(self, values: tuple[object, ...]) -> I:
        texts = [self.fold(position, value) for position, value in enumerate(values)]
        with self._lock:
            child = self.instrument.labels(*texts)
            # What was folded is not kept: there may be any number of such values.
            if texts != [str(value) for value in values]:
                return child
            self._children[values] = child
            # Where a label is closed, its other values begin at 0 now. An error type goes with one outcome only, so
            # there the other combinations would never move.
            if self._has_siblings:
                self.start(
                    **{
                        label.name: text
                        for label, text in zip(self.metric.labels, texts, strict=True)
                        if not label.values
                    }
                )
        return child

    def drop(self, *values: str) -> None:
        with self._lock:
            if self._children.pop(values, None) is not None:
                self.instrument.remove(*values)


def _add(values: dict[tuple[str, ...], float], labels: tuple[str, ...], value: float) -> None:
    values[labels] = values.get(labels, 0.0) + value


class _BeforeScrape:
    """Stands first in the registry, so that a scrape brings the breakers up to date before it reads their metrics."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def describe(self) -> Iterable[Family]:
        return ()

    def collect(self) -> Iterable[Family]:
        self._recorder.refresh()
        return ()


class Recorder:
    """The metrics of this process, in one registry, from the moment it is made until `close()`.

    Args:
        registry: where the instruments are registered; prometheus-client's own where left out.
        clock: where the time of a settled message comes from.

    Where `PROMETHEUS_MULTIPROC_DIR` is set (before prometheus-client is imported), the processes of one service are
    joined through the files there: there are no exemplars then, and the breakers' figures of a process are as fresh
    as its last event, at most once a second. One process a container needs none of this.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.registry = REGISTRY if registry is None else registry
        self._clock = clock
        self._shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR", "")
        self._collectors: list[Any] = []
        self._refreshing = threading.Lock()
        self._refreshed = clock.now()
        self._counted: WeakKeyDictionary[CircuitBreaker, dict[str, int]] = WeakKeyDictionary()
        self._shown: dict[_Row[Gauge], set[tuple[str, ...]]] = {}
        self._exemplified: dict[Histogram, tuple[float, float]] = {}
        if not self._shared:
            self._register(_BeforeScrape(self))

        self._overflow = self._counter("meshkit_metric_label_overflow_total")
        self._requests = self._histogram("meshkit_http_server_request_duration_seconds")
        self._active = self._gauge("meshkit_http_server_active_requests")
        self._calls = self._histogram("meshkit_client_call_duration_seconds")
        self._attempts = self._histogram("meshkit_client_attempt_duration_seconds")
        self._retries = self._counter("meshkit_retries_total")
        self._budgets_exhausted = self._counter("meshkit_retry_budget_exhausted_total")
        self._budget_balances = self._gauge("meshkit_retry_budget_balance")
        self._hedges = self._counter("meshkit_hedges_total")
        self._hedged = self._counter("meshkit_hedged_calls_total")
        self._bulkhead_calls = self._gauge("meshkit_bulkhead_calls")
        self._bulkhead_limits = self._gauge("meshkit_bulkhead_limit")
        self._bulkhead_rejections = self._counter("meshkit_bulkhead_rejections_total")
        self._limiter_available = self._gauge("meshkit_ratelimiter_available")
        self._limiter_rejections = self._counter("meshkit_ratelimiter_rejections_total")
        self._states = self._gauge("meshkit_circuitbreaker_state")
        self._transitions = self._counter("meshkit_circuitbreaker_transitions_total")
        self._breaker_calls = self._counter("meshkit_circuitbreaker_calls_total")
        self._fallbacks = self._counter("meshkit_fallbacks_total")
        self._publishes = self._histogram("meshkit_publish_duration_seconds")
        self._received = self._counter("meshkit_messages_received_total")
        self._handled = self._histogram("meshkit_message_process_duration_seconds")
        self._in_progress = self._gauge("meshkit_messages_in_progress")
        self._ages = self._histogram("meshkit_message_age_seconds")
        self._message_retries = self._counter("meshkit_message_retries_total")
        self._dead_letters = self._counter("meshkit_dead_letters_total")
        self._replayed = self._counter("meshkit_dead_letters_replayed_total")
        self._last_settle = self._gauge("meshkit_consumer_last_settle_timestamp_seconds")
        self._paused = self._gauge("meshkit_consumer_paused")
        self._connected = self._gauge("meshkit_broker_connected")
        self._blocked = self._gauge("meshkit_broker_blocked")
        self._reconnects = self._counter("meshkit_broker_reconnects_total")
        self._outbox_pending = self._gauge("meshkit_outbox_pending_messages")
        self._outbox_oldest = self._gauge("meshkit_outbox_oldest_message_timestamp_seconds")
        self._duplicates = self._counter("meshkit_inbox_duplicates_total")
        self._invalid_contexts = self._counter("meshkit_invalid_context_total")
        self._invalid_contexts.start()
        self._build_info()
        for metric in METRICS:
            for label in metric.labels:
                if not label.values and metric.kind != "info":
                    self._overflow.child(metric.name, label.name)

        self._clients: set[str] = set()
        self._queues: set[str] = set()
        self._stops = [
            listen(self._on_request_started, kind=events.ServerRequestStarted),
            listen(self._on_request_ended, kind=events.ServerRequestEnded),
            listen(self._on_attempt_ended, kind=events.ClientAttemptEnded),
            listen(self._on_call_ended, kind=events.ClientCallEnded),
            listen(self._on_retry, kind=events.RetryScheduled),
            listen(self._on_budget_exhausted, kind=events.RetryBudgetExhausted),
            listen(self._on_hedge, kind=events.HedgeStarted),
            listen(self._on_hedged, kind=events.HedgeEnded),
            listen(self._on_bulkhead_full, kind=events.BulkheadRejected),
            listen(self._on_rate_limited, kind=events.RateLimited),
            listen(self._on_circuit_changed, kind=events.CircuitChanged),
            listen(self._on_fallback, kind=events.FallbackUsed),
            listen(self._on_published, kind=events.MessagePublished),
            listen(self._on_consumer_started, kind=events.ConsumerStarted),
            listen(self._on_received, kind=events.MessageReceived),
            listen(self._on_settled, kind=events.MessageSettled),
            listen(self._on_message_retried, kind=events.MessageRetried),
            listen(self._on_dead_lettered, kind=events.MessageDeadLettered),
            listen(self._on_replayed, kind=events.DeadLetterReplayed),
            listen(self._on_paused, kind=events.ConsumerPaused),
            listen(self._on_resumed, kind=events.ConsumerResumed),
            listen(self._on_connection, kind=events.BrokerConnectionChanged),
            listen(self._on_blocked, kind=events.BrokerBlocked),
            listen(self._on_duplicate, kind=events.DuplicateSkipped),
            listen(self._on_outbox, kind=events.OutboxMeasured),
            listen(self._on_invalid_context, kind=events.InvalidContext),
        ]
        if self._shared:
            self._stops.append(listen(self._on_any, kind=Event))
            _log.warning(
                "PROMETHEUS_MULTIPROC_DIR is set: metrics of several processes are joined, without exemplars. "
                "One process a container, and more containers, is the supported way."
            )

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """The metrics as text, for an HTTP answer.

        Args:
            accept: the request's `Accept` header: OpenMetrics, with exemplars, for a client that asks for it.

        Returns:
            the content type and the body.
        """
        registry = self.registry
        if self._shared:
            self.refresh()
            _forget_the_dead(self._shared)
            registry = CollectorRegistry()
            MultiProcessCollector(registry, self._shared)  # type: ignore[no-untyped-call]
        encode, content_type = choose_encoder(accept)
        return content_type, encode(registry)

    def close(self) -> None:
        """Stop listening, and take the instruments out of the registry. Calling it twice is allowed."""
        for stop in self._stops:
            stop()
        while self._collectors:
            self.registry.unregister(self._collectors.pop())

    def refresh(self) -> None:
        """Write down what breakers, bulkheads, rate limiters and retry budgets say of themselves."""
        self._refreshed = self._clock.now()
        states: dict[str, CircuitState] = {}
        counts: list[tuple[CircuitBreaker, dict[str, int]]] = []
        # All breakers are asked before our lock is taken: one that was opened by hand notices it when it is asked, and
        # its event comes back to us.
        for breaker in breakers():
            name = self._states.fold(0, breaker.name)
            states[name] = _SEVERITY[max(map(_SEVERITY.index, (states.get(name, "disabled"), breaker.state)))]
            counts.append((breaker, breaker.counts))
        with self._refreshing:
            for breaker, now in counts:
                self._transitions.start(breaker=breaker.name)
                before = self._counted.setdefault(breaker, {})
                for result, count in now.items():
                    child = self._breaker_calls.child(breaker.name, result)
                    # Another scrape may have been faster and know of more.
                    if (more := count - before.get(result, 0)) > 0:
                        before[result] = count
                        child.inc(more)
            self._show(
                self._states, {(name, each): each == state for name, state in states.items() for each in _SEVERITY}
            )
            self._refresh_policies()

    def _refresh_policies(self) -> None:
        """Those of one name are added up: to whoever watches a destination, they are one."""
        balances: dict[tuple[str, ...], float] = {}
        for budget in budgets():
            if not budget.name:
                continue
            self._budgets_exhausted.start(client=budget.name)
            _add(balances, (self._budget_balances.fold(0, budget.name),), budget.balance)
        self._show(self._budget_balances, balances)
        calls: dict[tuple[str, ...], float] = {}
        limits: dict[tuple[str, ...], float] = {}
        for bulkhead in bulkheads():
            self._bulkhead_rejections.start(bulkhead=bulkhead.name)
            name = self._bulkhead_calls.fold(0, bulkhead.name)
            _add(calls, (name, "running"), bulkhead.in_use)
            _add(calls, (name, "waiting"), bulkhead.waiting)
            _add(limits, (self._bulkhead_limits.fold(0, bulkhead.name),), bulkhead.limit)
        self._show(self._bulkhead_calls, calls)
        self._show(self._bulkhead_limits, limits)
        available: dict[tuple[str, ...], float] = {}
        for limiter in rate_limiters():
            self._limiter_rejections.start(ratelimiter=limiter.name)
            _add(available, (self._limiter_available.fold(0, limiter.name),), limiter.available)
        self._show(self._limiter_available, available)

    def _show(self, row: _Row[Gauge], values: dict[tuple[str, ...], float]) -> None:
        """Set the children of a gauge to what there is now, and take away those of what is gone."""
        for labels, value in values.items():
            row.child(*labels).set(value)
        for labels in self._shown.get(row, set()) - values.keys():
            if self._shared:
                row.child(*labels).set(0)
            else:
                row.drop(*labels)
        self._shown[row] = set(values)

    # -- instruments --------------------------------------------------------------------------------------------------

    def _register(self, collector: Any) -> None:
        self.registry.register(collector)
        self._collectors.append(collector)

    def _counter(self, name: str) -> _Row[Counter]:
        metric = _ROWS[name]
        instrument = Counter(name, metric.help, metric.label_names, registry=None)
        self._register(instrument)
        return _Row(metric, instrument, self._count_overflow)

    def _gauge(self, name: str) -> _Row[Gauge]:
        metric = _ROWS[name]
        instrument = Gauge(
            name, metric.help, metric.label_names, registry=None, multiprocess_mode=metric.joined or "all"
        )
        self._register(instrument)
        return _Row(metric, instrument, self._count_overflow)

    def _histogram(self, name: str) -> _Row[Histogram]:
        metric = _ROWS[name]
        instrument = Histogram(name, metric.help, metric.label_names, buckets=metric.buckets, registry=None)
        self._register(instrument)
        return _Row(metric, instrument, self._count_overflow)

    def _build_info(self) -> None:
        metric = _ROWS["meshkit_build_info"]
        facts = {"version": __version__, "python": platform.python_version()}
        if self._shared:
            # prometheus-client has no Info over several processes; a gauge of 1 reads the same.
            gauge = Gauge(metric.name, metric.help, tuple(facts), registry=None, multiprocess_mode="livemax")
            self._register(gauge)
            gauge.labels(**facts).set(1)
        else:
            info = Info(metric.name.removesuffix("_info"), metric.help, registry=None)
            self._register(info)
            info.info(facts)

    def _count_overflow(self, metric: str, label: str) -> None:
        self._overflow.child(metric, label).inc()

    def _exemplar(self, traceparent: str) -> dict[str, str] | None:
        # The last digit's lowest bit is "sampled": a trace that nobody has stored is no example.
        if self._shared or len(traceparent) != 55 or traceparent[54] not in "13579bdf":
            return None
        return {"trace_id": traceparent[3:35], "span_id": traceparent[36:52]}

    def _observe(self, child: Histogram, seconds: float, traceparent: str) -> None:
        exemplar = self._exemplar(traceparent)
        if exemplar is not None:
            # An exemplar costs more than the observation, and a scrape sees the last one of a bucket only. So a busy
            # child gets one now and then, and whatever is slower than that one gets its own.
            now = self._clock.now()
            then, slowest = self._exemplified.get(child, _NEVER)
            if now - then < _EXEMPLAR_EVERY and seconds <= slowest:
                exemplar = None
            else:
                self._exemplified[child] = now, seconds
        child.observe(seconds, exemplar)

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    def _on_request_started(self, event: events.ServerRequestStarted) -> None:
        self._active.child(_method(event.method)).inc()

    def _on_request_ended(self, event: events.ServerRequestEnded) -> None:
        method = _method(event.method)
        self._active.child(method).dec()
        child = self._requests.child(method, event.route, event.status or "")
        self._observe(child, event.seconds, event.traceparent)

    def _on_attempt_ended(self, event: events.ClientAttemptEnded) -> None:
        self._meet_client(event.source)
        child = self._attempts.child(event.source, event.status or "", event.error_type)
        self._observe(child, event.seconds, event.traceparent)

    def _on_call_ended(self, event: events.ClientCallEnded) -> None:
        self._meet_client(event.source)
        child = self._calls.child(event.source, event.operation, event.outcome)
        self._observe(child, event.seconds, event.traceparent)

    def _on_retry(self, event: events.RetryScheduled) -> None:
        here = tracer().current().context
        self._retries.child(event.source, event.error_type).inc(
            1, None if here is None else self._exemplar(here.traceparent)
        )

    def _on_budget_exhausted(self, event: events.RetryBudgetExhausted) -> None:
        self._budgets_exhausted.child(event.source, event.kind).inc()

    def _on_hedge(self, event: events.HedgeStarted) -> None:
        self._hedges.child(event.source).inc()

    def _on_hedged(self, event: events.HedgeEnded) -> None:
        winner = "none" if event.winner is None else "first" if event.winner == 1 else "hedge"
        self._hedged.child(event.source, winner).inc()

    def _on_bulkhead_full(self, event: events.BulkheadRejected) -> None:
        self._bulkhead_rejections.child(event.source, event.reason).inc()

    def _on_rate_limited(self, event: events.RateLimited) -> None:
        self._limiter_rejections.child(event.source).inc()

    def _on_circuit_changed(self, event: events.CircuitChanged) -> None:
        self._transitions.child(event.source, event.old, event.new).inc()
        if self._shared:
            self.refresh()

    def _on_fallback(self, event: events.FallbackUsed) -> None:
        self._fallbacks.child(event.source, event.reason, event.result).inc()

    def _meet_client(self, name: str) -> None:
        if name not in self._clients and len(self._clients) < MOST_VALUES:
            self._clients.add(name)
            self._fallbacks.start(client=name)

    # -- messaging ----------------------------------------------------------------------------------------------------

    def _on_published(self, event: events.MessagePublished) -> None:
        self._observe(self._publishes.child(event.source, event.outcome), event.seconds, event.traceparent)

    def _on_consumer_started(self, event: events.ConsumerStarted) -> None:
        self._queues.discard(event.source)
        self._meet_queue(event.source)
        self._paused.child(event.source).set(0)

    def _on_received(self, event: events.MessageReceived) -> None:
        self._meet_queue(event.source)
        self._received.child(event.source, "true" if event.redelivered else "false").inc()
        self._in_progress.child(event.source).inc()

    def _on_settled(self, event: events.MessageSettled) -> None:
        self._in_progress.child(event.source).dec()
        self._last_settle.child(event.source).set(self._clock.time())
        child = self._handled.child(event.source, event.handler, event.outcome, event.error_type)
        self._observe(child, event.seconds, event.traceparent)
        if event.age is not None:
            self._observe(self._ages.child(event.source), event.age, event.traceparent)

    def _on_message_retried(self, event: events.MessageRetried) -> None:
        attempt = "10+" if event.attempt >= 10 else str(event.attempt)
        self._message_retries.child(event.source, attempt).inc(1, self._exemplar(event.traceparent))

    def _on_dead_lettered(self, event: events.MessageDeadLettered) -> None:
        self._dead_letters.child(event.source, event.reason).inc(1, self._exemplar(event.traceparent))

    def _on_replayed(self, event: events.DeadLetterReplayed) -> None:
        self._replayed.child(event.source, event.result).inc()

    def _on_paused(self, event: events.ConsumerPaused) -> None:
        self._paused.child(event.source).set(1)

    def _on_resumed(self, event: events.ConsumerResumed) -> None:
        self._paused.child(event.source).set(0)

    def _on_duplicate(self, event: events.DuplicateSkipped) -> None:
        self._duplicates.child(event.source).inc()

    def _meet_queue(self, name: str) -> None:
        if name in self._queues:
            return
        if _GENERATED_NAME.search(name):
            name = GENERATED
        if name in self._queues or len(self._queues) >= MOST_VALUES:
            return
        self._queues.add(name)
        self._received.start(queue=name)
        self._in_progress.start(queue=name)
        self._ages.start(queue=name)
        self._message_retries.start(queue=name)
        self._dead_letters.start(queue=name)
        self._paused.start(queue=name)
        self._duplicates.start(queue=name)
        self._last_settle.child(name).set(self._clock.time())

    def _on_connection(self, event: events.BrokerConnectionChanged) -> None:
        self._connected.child(event.source).set(event.connected)
        self._blocked.start(connection=event.source)
        reconnects = self._reconnects.child(event.source)
        if event.reconnect:
            reconnects.inc()
        if not event.connected:
            # The alarm belonged to a connection that is gone; a new one is told again.
            self._blocked.child(event.source).set(0)

    def _on_blocked(self, event: events.BrokerBlocked) -> None:
        self._blocked.child(event.source).set(event.blocked)

    def _on_outbox(self, event: events.OutboxMeasured) -> None:
        self._outbox_pending.child(event.source).set(event.pending)
        self._outbox_oldest.child(event.source).set(event.oldest or 0)

    # -- all ----------------------------------------------------------------------------------------------------------

    def _on_invalid_context(self, event: events.InvalidContext) -> None:
        self._invalid_contexts.child(event.source, event.reason).inc()

    def _on_any(self, event: Event) -> None:
        if self._clock.now() - self._refreshed >= _REFRESH_EVERY:
            self.refresh()


def _method(method: str) -> str:
    return method if method in _METHODS else "_OTHER"


def _forget_the_dead(path: str) -> None:
    """Take the gauges of processes that are gone (killed ones, too) out of the sums."""
    if os.name != "posix":
        return
    for pid in {
        int(found[1]) for file in glob.glob(f"{path}/gauge_live*.db") if (found := re.search(r"_(\d+)\.db$", file))
    }:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, path)  # type: ignore[no-untyped-call]
        except PermissionError:
            pass


# -- one a registry ---------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_installed: dict[CollectorRegistry, Recorder] = {}


def install(registry: CollectorRegistry | None = None) -> Recorder:
    """The recorder of `registry` (prometheus-client's own where left out), made at the first call."""
    key = REGISTRY if registry is None else registry
    with _lock:
        if key not in _installed:
            _installed[key] = Recorder(key)
        return _installed[key]


def uninstall(registry: CollectorRegistry | None = None) -> None:
    """Stop recording into `registry`, and take meshkit's metrics out of it."""
    with _lock:
        recorder = _installed.pop(REGISTRY if registry is None else registry, None)
    if recorder is not None:
        recorder.close()
