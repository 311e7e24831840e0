"""The one table of metrics: what the code records, the dashboards draw, the alerts watch and the docs list.

A metric name is promised here and nowhere else. `telemetry.recorder` makes the instruments from these rows, `pack`
makes dashboards, rules and `docs/metrics.md` from them, and a test holds every name used in either against this table.
A row that nothing records would be a lie, so a row is added together with the code that records it.

Naming follows Prometheus: the prefix `meshkit_`, base units, `_total` for counters, label values in lower case.
Labels take the name of the stable OpenTelemetry attribute where there is one (`http_request_method`, `error_type`).
"""

import itertools
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "info"]

# How the processes behind one PROMETHEUS_MULTIPROC_DIR are joined; the words are prometheus-client's.
Joined = Literal["livesum", "livemax", "livemin", "livemostrecent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """One label: what it says, and its values where they are a closed set.

    A label without `values` is open: its values come from the user's own names, and the recorder caps how many.
    """

    name: str
    help: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row: everything an instrument, a panel, a rule and the docs need to know of a metric.

    `name` is the family as it is queried; an info metric ends in `_info`. `unit` is the base unit (`seconds`,
    `messages`, …), empty where the value has none. `buckets` are upper bounds, `+Inf` left out. `exemplars` says that
    the recorder attaches the trace of a sampled span. `joined` is how a gauge is read over several processes.
    """

    name: str
    kind: Kind
    help: str
    unit: str = ""
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    exemplars: bool = False
    joined: Joined | None = None

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels, in the order in which an instrument takes them."""
        return tuple(label.name for label in self.labels)

    @property
    def series(self) -> tuple[str, ...]:
        """The names under which Prometheus stores the samples of this metric."""
        if self.kind == "histogram":
            return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")
        return (self.name,)

    def children(self, **known: str) -> tuple[dict[str, str], ...]:
        """Every set of label values that can be named as soon as the open labels in `known` are.

        The recorder makes these children at 0 when a queue, a breaker or a client first shows itself. A counter that
        is born at 1 instead has no earlier sample to grow from, and its first dead letter would be invisible to
        `increase()`. Empty where an open label is not in `known`.
        """
        choices = [label.values or ((known[label.name],) if label.name in known else ()) for label in self.labels]
        return tuple(dict(zip(self.label_names, values, strict=True)) for values in itertools.product(*choices))


# The boundaries of the OpenTelemetry conventions jump from 0.1 to 0.25, and "95 % under 200 ms" cannot be measured
# where 0.2 is no boundary. So 0.15, 0.2 and 0.3 join them.
HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)

# A logical call with its waits, and a handler, may take the whole 30 s that such platforms allow a request.
LONG_BUCKETS = (*HTTP_BUCKETS, 30.0, 60.0)

# From the first publish on, over all retries: the default schedule alone spans more than 20 minutes.
AGE_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 21600.0, 86400.0)

DEAD_LETTER_REASONS = (
    "retries_exhausted",
    "permanent",
    "unparseable",
    "crash_loop",
    "expired",
    "rejected_by_handler",
)
BREAKER_STATES = ("closed", "open", "half_open", "isolated", "disabled")
CALL_OUTCOMES = ("success", "error", "fallback", "rejected", "cancelled")
PUBLISH_OUTCOMES = ("confirmed", "returned", "nacked", "timeout", "error")
MESSAGE_OUTCOMES = ("ack", "retry", "dead_letter", "requeue", "discard")

_METHOD = Label(name="http_request_method", help="method as sent, `_OTHER` where it is not a known one")
_ROUTE = Label(name="http_route", help="template of the matched route, empty where none matched")
_STATUS = Label(name="http_response_status_code", help="status code, empty where no response came")
_ERROR_TYPE = Label(name="error_type", help="`module.Class` of the exception, never its text; empty without one")
_CLIENT = Label(name="client", help="configured name of the wrapped client or pipeline")
_OPERATION = Label(name="operation", help="configured name of the operation, empty without one")
_BREAKER = Label(name="breaker", help="name of the circuit breaker")
_BULKHEAD = Label(name="bulkhead", help="name of the bulkhead")
_LIMITER = Label(name="ratelimiter", help="name of the rate limiter")
_QUEUE = Label(name="queue", help="queue the message was consumed from, never its delay rung, suspect lane or DLQ")
_HANDLER = Label(name="handler", help="name of the handler")
_DESTINATION = Label(name="destination", help="exchange and declared template of the routing key, or the queue")
_CONNECTION = Label(name="connection", help="what the connection is for: `publish` or `consume`")
_OUTBOX = Label(name="outbox", help="name of the outbox table")

METRICS: tuple[Metric, ...] = (
    Metric(
        name="meshkit_http_server_request_duration_seconds",
        kind="histogram",
        unit="seconds",
        help="Time from the first byte of a request to the last of its response.",
        labels=(_METHOD, _ROUTE, _STATUS),
        buckets=HTTP_BUCKETS,
        exemplars=True,
    ),
    Metric(
        name="meshkit_http_server_active_requests",
        kind="gauge",
        unit="requests",
        help="Requests that are being answered now.",
        labels=(_METHOD,),
        joined="livesum",
    ),
    Metric(
        name="meshkit_client_call_duration_seconds",
        kind="histogram",
        unit="seconds",
        help="Time of a logical call, its retries and the waits between them included.",
        labels=(_CLIENT, _OPERATION, Label(name="outcome", help="how the call ended", values=CALL_OUTCOMES)),
        buckets=LONG_BUCKETS,
        exemplars=True,
    ),
    Metric(
        name="meshkit_client_attempt_duration_seconds",
        kind="histogram",
        unit="seconds",
        help="Time of one attempt at a call, those that ended in an exception included.",
        labels=(_CLIENT, _STATUS, _ERROR_TYPE),
        buckets=HTTP_BUCKETS,
        exemplars=True,
    ),
    Metric(
        name="meshkit_retries_total",
        kind="counter",
        unit="attempts",
        help="Attempts after the first, by the error that made them necessary.",
        labels=(_CLIENT, _ERROR_TYPE),
        exemplars=True,
    ),
    Metric(
        name="meshkit_retry_budget_exhausted_total",
        kind="counter",
        unit="attempts",
        help="Retries and hedges that were not made because the budget of the destination was used up.",
        labels=(_CLIENT, Label(name="kind", help="what was not made", values=("retry", "hedge"))),
    ),
    Metric(
        name="meshkit_retry_budget_balance",
        kind="gauge",
        unit="attempts",
        help="Retries and hedges that the budget of the destination allows now.",
        labels=(_CLIENT,),
        joined="livesum",
    ),
    Metric(
        name="meshkit_hedges_total",
        kind="counter",
        unit="attempts",
        help="Attempts that were started beside one that had not answered yet.",
        labels=(_CLIENT,),
    ),
    Metric(
        name="meshkit_hedged_calls_total",
        kind="counter",
        unit="calls",
        help="Calls with more than one attempt at once, by the attempt that answered.",
        labels=(_CLIENT, Label(name="winner", help="which attempt answered", values=("first", "hedge", "none"))),
    ),
    Metric(
        name="meshkit_bulkhead_calls",
        kind="gauge",
        unit="calls",
        help="Calls that hold a place of a bulkhead, and calls that wait for one.",
        labels=(_BULKHEAD, Label(name="state", help="whether it has its place", values=("running", "waiting"))),
        joined="livesum",
    ),
    Metric(
        name="meshkit_bulkhead_limit",
        kind="gauge",
        unit="calls",
        help="Places of a bulkhead, taken and free.",
        labels=(_BULKHEAD,),
        joined="livesum",
    ),
    Metric(
        name="meshkit_bulkhead_rejections_total",
        kind="counter",
        unit="calls",
        help="Calls that a bulkhead refused.",
        labels=(
            _BULKHEAD,
            Label(name="reason", help="the queue was full, or the wait in it was over", values=("full", "timeout")),
        ),
    ),
    Metric(
        name="meshkit_ratelimiter_available",
        kind="gauge",
        unit="calls",
        help="Calls that a rate limiter would let through at once.",
        labels=(_LIMITER,),
        joined="livesum",
    ),
    Metric(
        name="meshkit_ratelimiter_rejections_total",
        kind="counter",
        unit="calls",
        help="Calls that a rate limiter refused.",
        labels=(_LIMITER,),
    ),
    Metric(
        name="meshkit_circuitbreaker_state",
        kind="gauge",
        help="1 for the state the breaker is in, 0 for the others.",
        labels=(_BREAKER, Label(name="state", help="state of the breaker", values=BREAKER_STATES)),
        joined="livemax",
    ),
    Metric(
        name="meshkit_circuitbreaker_transitions_total",
        kind="counter",
        unit="transitions",
        help="Changes of a breaker's state.",
        labels=(
            _BREAKER,
            Label(name="from_state", help="state that was left", values=BREAKER_STATES),
            Label(name="to_state", help="state that was entered", values=BREAKER_STATES),
        ),
    ),
    Metric(
        name="meshkit_circuitbreaker_calls_total",
        kind="counter",
        unit="calls",
        help="Calls through a breaker, by what it made of them.",
        labels=(
            _BREAKER,
            Label(
                name="result",
                help="`ignored` counted neither way, `rejected` was never started",
                values=("success", "failure", "ignored", "rejected", "shadowed"),
            ),
        ),
    ),
    Metric(
        name="meshkit_fallbacks_total",
        kind="counter",
        unit="calls",
        help="Calls that a fallback was asked to answer.",
        labels=(
            _CLIENT,
            Label(
                name="reason",
                help="why the call itself had no answer",
                values=("breaker_open", "rejected", "timeout", "retries_exhausted", "error"),
            ),
            Label(name="result", help="whether the fallback had one", values=("success", "failure")),
        ),
    ),
    Metric(
        name="meshkit_publish_duration_seconds",
        kind="histogram",
        unit="seconds",
        help="Time from handing a message to the broker to its confirm, or to what came instead.",
        labels=(_DESTINATION, Label(name="outcome", help="what the broker answered", values=PUBLISH_OUTCOMES)),
        buckets=HTTP_BUCKETS,
        exemplars=True,
    ),
    Metric(
        name="meshkit_messages_received_total",
        kind="counter",
        unit="messages",
        help="Deliveries that arrived from the broker.",
        labels=(
            _QUEUE,
            Label(name="redelivered", help="whether the broker had delivered it before", values=("true", "false")),
        ),
    ),
    Metric(
        name="meshkit_message_process_duration_seconds",
        kind="histogram",
        unit="seconds",
        help="Time a handler took for one delivery.",
        labels=(
            _QUEUE,
            _HANDLER,
            Label(name="outcome", help="how the delivery was settled", values=MESSAGE_OUTCOMES),
            _ERROR_TYPE,
        ),
        buckets=LONG_BUCKETS,
        exemplars=True,
    ),
    Metric(
        name="meshkit_messages_in_progress",
        kind="gauge",
        unit="messages",
        help="Deliveries that a handler is working on now.",
        labels=(_QUEUE,),
        joined="livesum",
    ),
    Metric(
        name="meshkit_message_age_seconds",
        kind="histogram",
        unit="seconds",
        help="Age of a message when its handler starts, counted from its first publish over all retries.",
        labels=(_QUEUE,),
        buckets=AGE_BUCKETS,
        exemplars=True,
    ),
    Metric(
        name="meshkit_message_retries_total",
        kind="counter",
        unit="messages",
        help="Messages sent on for another attempt.",
        labels=(
            _QUEUE,
            Label(
                name="attempt",
                help="number of the attempt they wait for",
                values=("2", "3", "4", "5", "6", "7", "8", "9", "10+"),
            ),
        ),
        exemplars=True,
    ),
    Metric(
        name="meshkit_dead_letters_total",
        kind="counter",
        unit="messages",
        help="Messages moved to the dead-letter queue.",
        labels=(_QUEUE, Label(name="reason", help="why no attempt followed", values=DEAD_LETTER_REASONS)),
        exemplars=True,
    ),
    Metric(
        name="meshkit_dead_letters_replayed_total",
        kind="counter",
        unit="messages",
        help="Dead letters that a replay took up.",
        labels=(
            _QUEUE,
            Label(
                name="result",
                help="`republished` went back to its own queue, `failed` and `skipped` did not",
                values=("republished", "failed", "skipped"),
            ),
        ),
    ),
    Metric(
        name="meshkit_consumer_last_settle_timestamp_seconds",
        kind="gauge",
        unit="seconds",
        help="Unix time at which the consumer last settled a message, at first the time it started.",
        labels=(_QUEUE,),
        joined="livemostrecent",
    ),
    Metric(
        name="meshkit_consumer_paused",
        kind="gauge",
        help="1 while the consumer waits for a dependency to come back, else 0.",
        labels=(_QUEUE,),
        joined="livemax",
    ),
    Metric(
        name="meshkit_broker_connected",
        kind="gauge",
        help="1 while the connection to the broker is open, else 0.",
        labels=(_CONNECTION,),
        joined="livemin",
    ),
    Metric(
        name="meshkit_broker_blocked",
        kind="gauge",
        help="1 while the broker takes no publishes because it is out of memory or disk, else 0.",
        labels=(_CONNECTION,),
        joined="livemax",
    ),
    Metric(
        name="meshkit_broker_reconnects_total",
        kind="counter",
        unit="connections",
        help="Connections to the broker that were lost and opened again.",
        labels=(_CONNECTION,),
    ),
    Metric(
        name="meshkit_outbox_pending_messages",
        kind="gauge",
        unit="messages",
        help="Messages that are committed to the outbox and not published yet.",
        labels=(_OUTBOX,),
        joined="livemostrecent",
    ),
    Metric(
        name="meshkit_outbox_oldest_message_timestamp_seconds",
        kind="gauge",
        unit="seconds",
        help="Unix time at which the oldest unpublished message was written to the outbox, 0 where there is none.",
        labels=(_OUTBOX,),
        joined="livemostrecent",
    ),
    Metric(
        name="meshkit_inbox_duplicates_total",
        kind="counter",
        unit="messages",
        help="Deliveries that the inbox knew already, so that their handler did not run again.",
        labels=(_QUEUE,),
    ),
    Metric(
        name="meshkit_metric_label_overflow_total",
        kind="counter",
        help="Label values folded into `__other__` because the metric had too many already.",
        labels=(Label(name="metric", help="name of the metric"), Label(name="label", help="name of the label")),
    ),
    Metric(
        name="meshkit_invalid_context_total",
        kind="counter",
        unit="headers",
        help="Trace headers that were dropped on arrival.",
        labels=(
            Label(name="carrier", help="what brought the header", values=("http", "amqp")),
            Label(name="reason", help="what is wrong with it", values=("malformed", "oversize", "type")),
        ),
    ),
    Metric(
        name="meshkit_build_info",
        kind="info",
        help="Version of meshkit and of the Python it runs on; the value is always 1.",
        labels=(Label(name="version", help="version of meshkit"), Label(name="python", help="version of Python")),
    ),
)
