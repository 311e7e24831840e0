"""The recording rule and the alerts: what is watched, and why each expression reads as it does.

Durations in an expression stand in angle brackets, `[<10m>]`, `offset <1d>`, `> <5m in seconds>`, so that the whole
set can be exported with a shorter time scale and a test sees in seconds what takes hours in production.

**Growth of a dead-letter queue.** The rule has to speak up for a single dead letter in a queue that is otherwise
quiet, to last as long as that dead letter lies there, and to resolve when it has been replayed. Rates do none of
this, so it looks at the depth that the broker reports:

* Depth, not a counter: the broker knows it when the service that gave up is gone, it survives restarts of both, and
  it goes back to 0 with the replay. `increase()` of a counter would resolve after its own window whatever lies there,
  and it cannot see a counter that is born at 1.
* "More than the lowest depth of the last day", not `> 0`: otherwise a queue with known, parked dead letters fires for
  ever, and hides the next one. And not `delta()`: it extrapolates, compares only the ends of its window, and sees
  nothing in a queue that was drained and filled again.
* A queue seen for less than a day counts as empty before, because a dead letter may be older than its queue's first
  scrape: a quorum queue reports its depth only every five seconds, so it may be born at 1, and Prometheus may be new.
  Half a day in which it may have been seen (`[12h] offset 1d`) bridges an outage of Prometheus itself.
* A depth that cannot be asked now (the broker restarts) stays what it was for up to an hour; a scrape that fails must
  not look like a replay. A present sample always wins, so a real replay resolves at once.
* After a quiet day the stock is old: `MeshkitDLQNotDrained` takes over at the moment `MeshkitDLQGrowing` lets go.

`MeshkitDeadLetters` is the second source, the service's own counter. It knows the reason, and it works where nobody
scrapes the broker. The two carry the same `queue` (the one that was consumed), so one notification holds both.
"""

import re
from dataclasses import dataclass
from typing import Literal

Severity = Literal["critical", "warning", "none"]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"<(\d+)([smhd])( in seconds)?>")


def scaled(text: str, time_scale: float) -> str:
    """`text` with every `<10m>` as a Prometheus duration, and every `<5m in seconds>` as a number, times the scale."""

    def replace(found: re.Match[str]) -> str:
        amount, unit, as_number = found.groups()
        if time_scale == 1.0:
            return str(int(amount) * _SECONDS[unit]) if as_number else f"{amount}{unit}"
        milliseconds = round(int(amount) * _SECONDS[unit] * 1000 * time_scale)
        return f"{milliseconds / 1000:g}" if as_number else f"{milliseconds}ms"

    return _DURATION.sub(replace, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A series that is worked out once and used by several rules."""

    name: str
    expr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alert. `hold` is how long the expression must be true first, as text for `scaled`.

    `summary` is what a pager shows: what is wrong, where, how much. `description` says what it means and what to do
    first; the section of the runbook that bears the alert's name has the rest.
    """

    name: str
    severity: Severity
    expr: str
    summary: str
    description: str
    hold: str = "<0s>"


def _counted(counter: str, by: str, window: str) -> str:
    """How much `counter` grew over `window`, as far as it can be known.

    `increase()` needs an earlier sample, so it misses what a series was born with: a process that fails before its
    first scrape, an open label value seen for the first time. All that such a young series holds is new, so it counts
    whole.
    """
    return f"sum by ({by}) (\n  ({counter} unless {counter} offset {window}) > 0\n  or\n  increase({counter}[{window}]) > 0\n)"


_DISCARDED = "\nor\n".join(
    "label_replace(\n"
    f"  sum by (job, queue_type) (increase(rabbitmq_global_messages_dead_lettered_{reason}_total"
    f'{{dead_letter_strategy="disabled"}}[<10m>])),\n'
    f'  "reason", "{reason}", "", ""\n) > 0'
    for reason in ("rejected", "expired", "maxlen", "delivery_limit")
)

# Only what is consumed in the ordinary way: nobody consumes a dead-letter queue or a delay rung, and the suspect lane
# is emptied one at a time.
_CONSUMED = 'queue!~".+[.](dlq|suspect)|meshkit[.]delay[.].+"'

_DEPTH = 'rabbitmq_detailed_queue_messages{queue=~".+[.]dlq"}'

RECORDINGS: tuple[Recording, ...] = (
    Recording(
        name="meshkit:dlq_messages",
        # max: every node that knows the queue reports it. `queue` loses its `.dlq`, as in meshkit's own metrics.
        expr=f"""\
label_replace(
  max by (job, vhost, queue) ({_DEPTH})
  or
  max by (job, vhost, queue) (last_over_time({_DEPTH}[<1h>])),
  "queue", "$1", "queue", "(.+)[.]dlq"
)""",
    ),
)

ALERTS: tuple[Alert, ...] = (
    Alert(
        name="MeshkitDLQGrowing",
        severity="warning",
        expr="""\
meshkit:dlq_messages > 0
unless (
  min_over_time(meshkit:dlq_messages[<1d>]) >= meshkit:dlq_messages
  and
  last_over_time(meshkit:dlq_messages[<12h>] offset <1d>)
)""",
        summary="{{ $labels.queue }}.dlq has grown. Dead letters in it: {{ $value }}",
        description=(
            "Messages of {{ $labels.queue }} (vhost {{ $labels.vhost }}) were given up within the last day and lie in "
            "{{ $labels.queue }}.dlq. Look at their causes, mend them, replay. The alert lasts until the queue is back "
            "at its lowest depth of the day, 0 after a full replay."
        ),
    ),
    Alert(
        name="MeshkitDLQGrowing",
        severity="critical",
        expr="meshkit:dlq_messages - min_over_time(meshkit:dlq_messages[<30m>]) > 10",
        hold="<2m>",
        summary="{{ $labels.queue }}.dlq grew by {{ $value }} dead letters in half an hour",
        description=(
            "This is no single bad message: a release, a schema or a dependency of the consumers of "
            "{{ $labels.queue }} (vhost {{ $labels.vhost }}) fails for many. Stop what is being rolled out, then look "
            "at the causes."
        ),
    ),
    Alert(
        name="MeshkitDLQNotDrained",
        severity="warning",
        expr="""\
meshkit:dlq_messages > 0
and
min_over_time(meshkit:dlq_messages[<1d>]) > 0
and
last_over_time(meshkit:dlq_messages[<12h>] offset <1d>)""",
        summary="{{ $labels.queue }}.dlq was not empty for a day. Dead letters in it: {{ $value }}",
        description=(
            "Nobody has replayed or dropped the dead letters of {{ $labels.queue }} (vhost {{ $labels.vhost }}). What "
            "they stand for has not happened. Replay them, or drop them on purpose."
        ),
    ),
    Alert(
        name="MeshkitDeadLetters",
        severity="warning",
        # Those that the broker knows to be gone again are not worth a page. Where nobody scrapes the broker there is
        # no depth to ask, and the alert ends a day after the last dead letter.
        expr=f"""\
{_counted("meshkit_dead_letters_total", "job, queue, reason", "<1d>")}
unless on (queue) max by (queue) (meshkit:dlq_messages) == 0""",
        summary="{{ $labels.job }} gave up on messages of {{ $labels.queue }}: {{ $labels.reason }}",
        description=(
            '{{ $value | printf "%.0f" }} messages of {{ $labels.queue }} became dead letters within a day, with the '
            "reason {{ $labels.reason }}, and the dead-letter queue is not known to be empty again."
        ),
    ),
    Alert(
        name="MeshkitMessagesDiscardedByBroker",
        severity="critical",
        expr=_DISCARDED,
        summary="The broker threw messages away ({{ $labels.reason }}, {{ $labels.queue_type }})",
        description=(
            '{{ $value | printf "%.0f" }} messages were dropped because their queue has no dead-letter exchange. They '
            "are gone. A queue that meshkit declares has a dead-letter queue; find the one that has not."
        ),
    ),
    Alert(
        name="MeshkitQueueWithoutConsumers",
        severity="critical",
        # A paused consumer is cancelled at the broker on purpose, and MeshkitConsumerPaused speaks for it.
        expr=f"""\
max by (job, vhost, queue) (rabbitmq_detailed_queue_messages{{{_CONSUMED}}}) > 0
unless max by (job, vhost, queue) (rabbitmq_detailed_queue_consumers) > 0
unless on (queue) max by (queue) (meshkit_consumer_paused) == 1""",
        hold="<5m>",
        summary="{{ $labels.queue }} holds {{ $value }} messages and nobody consumes it",
        description=(
            "No consumer is connected to {{ $labels.queue }} (vhost {{ $labels.vhost }}), and none says that it is "
            "paused. The service is down, was renamed, or lost its subscription."
        ),
    ),
    Alert(
        name="MeshkitConsumerStalled",
        severity="critical",
        expr="""\
time() - max by (job, queue) (meshkit_consumer_last_settle_timestamp_seconds) > <5m in seconds>
and on (queue) max by (queue) (rabbitmq_detailed_queue_messages) > 0
unless on (queue) max by (queue) (meshkit_consumer_paused) == 1""",
        hold="<5m>",
        summary="{{ $labels.job }} has settled nothing of {{ $labels.queue }} for {{ $value | humanizeDuration }}",
        description=("Messages wait and the consumer is not paused: its handlers hang, or its event loop is blocked."),
    ),
    Alert(
        name="MeshkitConsumerPaused",
        severity="warning",
        # An average, because a probe that fails again may show as a short 0.
        expr="max by (job, queue) (avg_over_time(meshkit_consumer_paused[<10m>])) > 0.5",
        hold="<5m>",
        summary="{{ $labels.job }} has paused {{ $labels.queue }}: a dependency is down",
        description=(
            "The consumer waits for a circuit breaker to close and probes with one message at a time. Nothing is lost "
            "and nothing becomes a dead letter, but nothing is handled either. Mend the dependency."
        ),
    ),
    Alert(
        name="MeshkitCircuitBreakerOpen",
        severity="warning",
        # A breaker that probes is half-open for moments, so `state == 1 for …` would never come true; an isolated one
        # was isolated by somebody.
        expr='max by (job, breaker) (avg_over_time(meshkit_circuitbreaker_state{state="open"}[<5m>])) > 0.5',
        hold="<1m>",
        summary="The breaker {{ $labels.breaker }} in {{ $labels.job }} is open",
        description=(
            "Calls to what {{ $labels.breaker }} protects failed, and are refused now until a probe succeeds. Look at "
            "the dependency first; the breaker closes by itself."
        ),
    ),
    Alert(
        name="MeshkitPublishFailures",
        severity="critical",
        expr=_counted(
            'meshkit_publish_duration_seconds_count{outcome!="confirmed"}', "job, destination, outcome", "<5m>"
        ),
        hold="<1m>",
        summary="{{ $labels.job }} cannot publish to {{ $labels.destination }}: {{ $labels.outcome }}",
        description=(
            'The broker did not confirm {{ $value | printf "%.0f" }} messages within five minutes. `returned`: no '
            "queue is bound to the routing key. `nacked`: a queue is full. `timeout`, `error`: the broker is slow or "
            "away. Without an outbox the caller has seen an error, and the event may be missing."
        ),
    ),
    Alert(
        name="MeshkitBrokerDisconnected",
        severity="critical",
        expr="min by (job, instance, connection) (meshkit_broker_connected) == 0",
        hold="<1m>",
        summary="{{ $labels.instance }} ({{ $labels.job }}) has no {{ $labels.connection }} connection to the broker",
        description="It keeps trying. Until it succeeds it handles no messages, or publishes none.",
    ),
    Alert(
        name="MeshkitBrokerBlocked",
        severity="critical",
        expr="""\
max by (job) (meshkit_broker_blocked) == 1
or
max by (job) (rabbitmq_alarms_memory_used_watermark) == 1
or
max by (job) (rabbitmq_alarms_free_disk_space_watermark) == 1""",
        hold="<1m>",
        summary="The broker takes no publishes (seen by {{ $labels.job }})",
        description="RabbitMQ is over its memory or disk watermark and blocks everybody who publishes.",
    ),
    Alert(
        name="MeshkitOutboxLag",
        severity="warning",
        expr="""\
time() - min by (job, outbox) (meshkit_outbox_oldest_message_timestamp_seconds > 0) > <1m in seconds>""",
        hold="<2m>",
        summary="{{ $labels.job }} has not published what it committed {{ $value | humanizeDuration }} ago",
        description=(
            "Events wait in the outbox {{ $labels.outbox }}: its relay does not run, or the broker takes nothing. "
            "Nothing is lost; whoever waits for the events waits longer."
        ),
    ),
    Alert(
        name="MeshkitTargetDown",
        severity="critical",
        # The second part knows meshkit's services and the broker by what they said of themselves, whatever the job is
        # called; the first also sees one that has never been up.
        expr="""\
up{job=~"meshkit.*|rabbitmq.*"} == 0
or
up == 0 and on (job) count by (job) (last_over_time(meshkit_build_info[<1d>]))
or
up == 0 and on (job) count by (job) (last_over_time(rabbitmq_identity_info[<1d>]))""",
        hold="<2m>",
        summary="{{ $labels.instance }} ({{ $labels.job }}) does not answer Prometheus",
        description="The process is down, or its metrics are not reachable; then every other alert about it is blind.",
    ),
    Alert(
        name="MeshkitLabelOverflow",
        severity="warning",
        expr=_counted("meshkit_metric_label_overflow_total", "job, metric, label", "<1h>"),
        summary="{{ $labels.job }}: {{ $labels.metric }} has too many values of {{ $labels.label }}",
        description=(
            "Further values are counted as `__other__`. Something unbounded (an id, a raw path) is used as a name."
        ),
    ),
    Alert(
        name="MeshkitWatchdog",
        severity="none",
        expr="vector(1)",
        summary="The alerting path works",
        description="Always firing. Route it to something that speaks up when it stops.",
    ),
)


def rule_file(*, time_scale: float, grafana: str, runbooks: str) -> dict[str, object]:
    """The rules as Prometheus reads them. `grafana` and `runbooks` are what the links in the annotations begin with."""
    # One group, in this order: the rules of a group run one after the other, so that an alert sees the series that was
    # recorded for the same moment. Two groups would run side by side.
    rules = [{"record": rule.name, "expr": scaled(rule.expr, time_scale)} for rule in RECORDINGS]
    alerts = [_rule(alert, time_scale, grafana, runbooks) for alert in ALERTS]
    return {
        "groups": [
            {
                "name": "meshkit",
                "interval": scaled("<15s>", max(time_scale, 1 / 15)),
                "rules": [*rules, *alerts],
            }
        ]
    }


def _rule(alert: Alert, time_scale: float, grafana: str, runbooks: str) -> dict[str, object]:
    # Only what the expression groups by is there to be put into the link.
    queue = "?var-queue={{ $labels.queue | urlquery }}" if "$labels.queue " in alert.summary else ""
    return {
        "alert": alert.name,
        "expr": scaled(alert.expr, time_scale),
        "for": scaled(alert.hold, time_scale),
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description,
            "runbook_url": f"{runbooks}#{alert.name.lower()}",
            "dashboard_url": f"{grafana}/d/meshkit-events{queue}",
        },
    }
