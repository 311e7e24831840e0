"""The Grafana dashboards, as a few words per panel that become Grafana's classic JSON (schema version 42).

The classic form loads from Grafana 10 on and by file provisioning everywhere. The generator is our own and small:
what comes out is the same on every run, and every key in it is one that somebody chose.
"""

import string
from dataclasses import dataclass
from typing import Literal

# Must equal the scrape interval of the Prometheus behind it, else `$__rate_interval` is too short and panels are empty.
SCRAPE_INTERVAL = "15s"

PanelKind = Literal["stat", "timeseries", "heatmap", "table"]

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SIZES = {"stat": (4, 4), "timeseries": (12, 8), "heatmap": (12, 8), "table": (24, 8)}

# One service's series. The broker's own metrics come from other jobs and carry neither.
_SEL = 'job=~"$job", instance=~"$instance"'
_QUEUE = f'{_SEL}, queue=~"$queue"'
_PROCESSED = "meshkit_message_process_duration_seconds"
_DLQ = 'rabbitmq_detailed_queue_messages{queue=~"($queue)[.]dlq"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One query of a panel and what its lines are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel. `unit` is Grafana's id of the unit; `alarm` is the value from which a stat turns red."""

    kind: PanelKind
    title: str
    description: str
    unit: str
    targets: tuple[Target, ...]
    alarm: float | None = None
    exemplars: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A heading and the panels below it."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """One dashboard; `uid` is what links point to, so it never changes."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]


def _stat(title: str, unit: str, expr: str, description: str, *, alarm: float | None = None) -> Panel:
    return Panel(
        kind="stat", title=title, description=description, unit=unit, targets=(Target(expr=expr),), alarm=alarm
    )


def _lines(title: str, unit: str, description: str, *targets: tuple[str, str], exemplars: bool = False) -> Panel:
    return Panel(
        kind="timeseries",
        title=title,
        description=description,
        unit=unit,
        targets=tuple(Target(expr=expr, legend=legend) for expr, legend in targets),
        exemplars=exemplars,
    )


def _rate(series: str, selector: str, by: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({series}{{{selector}}}[$__rate_interval]))"


def _quantile(q: float, histogram: str, selector: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {_rate(f'{histogram}_bucket', selector, labels)})"


EVENTS = Dashboard(
    uid="meshkit-events",
    title="meshkit: events and dead letters",
    description="What becomes of the messages of a service: handled, retried, given up, replayed.",
    rows=(
        Row(
            title="Now",
            panels=(
                _stat(
                    "Handled / s",
                    "ops",
                    _rate(f"{_PROCESSED}_count", f'{_QUEUE}, outcome="ack"'),
                    "Deliveries whose handler returned.",
                ),
                _stat(
                    "Failed attempts",
                    "percentunit",
                    _rate(f"{_PROCESSED}_count", f'{_QUEUE}, outcome!="ack"')
                    + " / "
                    + _rate(f"{_PROCESSED}_count", _QUEUE),
                    "Share of the deliveries that were not acknowledged: retried, dead-lettered, requeued, discarded.",
                    alarm=0.05,
                ),
                _stat(
                    "p95 age when handled",
                    "s",
                    _quantile(0.95, "meshkit_message_age_seconds", _QUEUE),
                    "Time since the first publish, over all retries: how late the readers of these events are.",
                ),
                _stat(
                    "In progress",
                    "short",
                    f"sum(meshkit_messages_in_progress{{{_QUEUE}}})",
                    "Deliveries that a handler works on now.",
                ),
                _stat(
                    "Paused consumers",
                    "short",
                    f"sum(max by (job, queue) (meshkit_consumer_paused{{{_QUEUE}}}))",
                    "Consumers that wait for a dependency. They probe with one message and resume by themselves.",
                    alarm=1,
                ),
                _stat(
                    "Alerts firing",
                    "short",
                    'count(ALERTS{alertname=~"Meshkit.*", alertname!="MeshkitWatchdog", alertstate="firing"})'
                    " or vector(0)",
                    "Alerts of the shipped rules, the watchdog apart.",
                    alarm=1,
                ),
            ),
        ),
        Row(
            title="Dead letters",
            panels=(
                _stat(
                    "In dead-letter queues",
                    "short",
                    f"sum(max by (vhost, queue) ({_DLQ}))",
                    "Messages that wait for somebody to replay or drop them, as the broker counts them.",
                    alarm=1,
                ),
                _stat(
                    "Given up (range)",
                    "short",
                    f"sum(increase(meshkit_dead_letters_total{{{_QUEUE}}}[$__range]))",
                    "Messages that became dead letters within the time shown. Extrapolated, so not always whole.",
                    alarm=1,
                ),
                _stat(
                    "Thrown away by the broker (range)",
                    "short",
                    " + ".join(
                        f"sum(increase(rabbitmq_global_messages_dead_lettered_{reason}_total"
                        '{dead_letter_strategy="disabled"}[$__range]))'
                        for reason in ("rejected", "expired", "maxlen")
                    ),
                    "Messages of queues without a dead-letter exchange. They are gone.",
                    alarm=1,
                ),
                _lines(
                    "Dead-letter queue depth",
                    "short",
                    "Down only by a replay or a drop.",
                    (f"max by (vhost, queue) ({_DLQ})", "{{queue}}"),
                ),
                _lines(
                    "Dead letters by reason",
                    "ops",
                    "`retries_exhausted` points at a dependency or a defect, the other reasons at the message itself.",
                    (_rate("meshkit_dead_letters_total", _QUEUE, "queue, reason"), "{{queue}} {{reason}}"),
                ),
                _lines(
                    "Given up and replayed",
                    "ops",
                    "What goes into the dead-letter queues, and what processes that are scraped took out again. "
                    "A replay from the command line shows in the depth.",
                    (_rate("meshkit_dead_letters_total", _QUEUE, "queue"), "in {{queue}}"),
                    (_rate("meshkit_dead_letters_replayed_total", _QUEUE, "queue, result"), "{{result}} {{queue}}"),
                ),
                _lines(
                    "Growth over 30 minutes",
                    "short",
                    "Dead letters above the lowest depth of the last half hour: what the critical alert looks at.",
                    (f"max by (vhost, queue) ({_DLQ} - min_over_time({_DLQ}[30m]))", "{{queue}}"),
                ),
            ),
        ),
        Row(
            title="Handling",
            panels=(
                _lines(
                    "Outcome of deliveries",
                    "ops",
                    "How deliveries were settled.",
                    (_rate(f"{_PROCESSED}_count", _QUEUE, "outcome"), "{{outcome}}"),
                ),
                _lines(
                    "Published, received, settled",
                    "ops",
                    "Received above settled for long: the consumer falls behind.",
                    (_rate("meshkit_publish_duration_seconds_count", f'{_SEL}, outcome="confirmed"'), "published"),
                    (_rate("meshkit_messages_received_total", _QUEUE), "received"),
                    (_rate(f"{_PROCESSED}_count", _QUEUE), "settled"),
                ),
                _lines(
                    "Handler time",
                    "s",
                    "p50, p95 and p99 of one delivery. The dots are exemplars and open the trace.",
                    *((_quantile(q, _PROCESSED, _QUEUE), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)),
                    exemplars=True,
                ),
                Panel(
                    kind="heatmap",
                    title="Handler time, all of it",
                    description="Two bands mean two kinds of messages, which a quantile hides.",
                    unit="s",
                    targets=(Target(expr=_rate(f"{_PROCESSED}_bucket", _QUEUE, "le"), legend="{{le}}"),),
                    exemplars=True,
                ),
                _lines(
                    "Age when handled",
                    "s",
                    "Time since the first publish, over all retries.",
                    *(
                        (_quantile(q, "meshkit_message_age_seconds", _QUEUE, "queue"), f"p{q * 100:g} {{{{queue}}}}")
                        for q in (0.5, 0.95)
                    ),
                    exemplars=True,
                ),
                _lines(
                    "Errors by type",
                    "ops",
                    "What handlers raised, also where a later attempt succeeded.",
                    (_rate(f"{_PROCESSED}_count", f'{_QUEUE}, error_type!=""', "error_type"), "{{error_type}}"),
                ),
                _lines(
                    "Retries by attempt",
                    "ops",
                    "Messages sent on for another attempt. High numbers end in the dead-letter queue.",
                    (_rate("meshkit_message_retries_total", _QUEUE, "attempt"), "attempt {{attempt}}"),
                ),
                _lines(
                    "Redelivered share",
                    "percentunit",
                    "Deliveries the broker had handed out before: consumers die or lose their connection.",
                    (
                        _rate("meshkit_messages_received_total", f'{_QUEUE}, redelivered="true"', "queue")
                        + " / "
                        + _rate("meshkit_messages_received_total", _QUEUE, "queue"),
                        "{{queue}}",
                    ),
                ),
                _lines(
                    "Seconds since the last settle",
                    "s",
                    "A straight rise while messages wait is a consumer that hangs.",
                    (
                        f"time() - max by (queue) (meshkit_consumer_last_settle_timestamp_seconds{{{_QUEUE}}})",
                        "{{queue}}",
                    ),
                ),
                _lines(
                    "Known to the inbox",
                    "ops",
                    "Duplicates that were acknowledged without running their handler again.",
                    (_rate("meshkit_inbox_duplicates_total", _QUEUE, "queue"), "{{queue}}"),
                ),
                Panel(
                    kind="table",
                    title="Handlers",
                    description="Deliveries a second, share not acknowledged, p95 time.",
                    unit="none",
                    targets=(
                        Target(expr=_rate(f"{_PROCESSED}_count", _QUEUE, "queue, handler")),
                        Target(
                            expr=_rate(f"{_PROCESSED}_count", f'{_QUEUE}, outcome!="ack"', "queue, handler")
                            + " / "
                            + _rate(f"{_PROCESSED}_count", _QUEUE, "queue, handler")
                        ),
                        Target(expr=_quantile(0.95, _PROCESSED, _QUEUE, "queue, handler")),
                    ),
                ),
            ),
        ),
        Row(
            title="Publishing and the broker",
            panels=(
                _lines(
                    "Publish time p95",
                    "s",
                    "From handing over to the broker's confirm.",
                    (_quantile(0.95, "meshkit_publish_duration_seconds", _SEL, "destination"), "{{destination}}"),
                    exemplars=True,
                ),
                _lines(
                    "Publishes that failed",
                    "ops",
                    "`returned`: no queue is bound. `nacked`: a queue is full. `timeout`, `error`: slow or away.",
                    (
                        _rate(
                            "meshkit_publish_duration_seconds_count",
                            f'{_SEL}, outcome!="confirmed"',
                            "destination, outcome",
                        ),
                        "{{destination}} {{outcome}}",
                    ),
                ),
                _lines(
                    "Waiting in the outbox",
                    "short",
                    "Committed and not published yet.",
                    (f"max by (job, outbox) (meshkit_outbox_pending_messages{{{_SEL}}})", "{{job}} {{outbox}}"),
                ),
                _lines(
                    "Broker connection",
                    "bool_on_off",
                    "Connected, and blocked by a memory or disk alarm.",
                    (
                        f"min by (instance, connection) (meshkit_broker_connected{{{_SEL}}})",
                        "{{instance}} {{connection}} connected",
                    ),
                    (
                        f"max by (instance, connection) (meshkit_broker_blocked{{{_SEL}}})",
                        "{{instance}} {{connection}} blocked",
                    ),
                ),
                _lines(
                    "Ready and unacknowledged",
                    "short",
                    "Per queue, as the broker counts them.",
                    (
                        'max by (vhost, queue) (rabbitmq_detailed_queue_messages_ready{queue=~"$queue"})',
                        "{{queue}} ready",
                    ),
                    (
                        'max by (vhost, queue) (rabbitmq_detailed_queue_messages_unacked{queue=~"$queue"})',
                        "{{queue}} unacked",
                    ),
                ),
                _lines(
                    "Waiting in delay rungs",
                    "short",
                    "Messages between two attempts. The rungs are shared by all queues of the vhost.",
                    (
                        'max by (vhost, queue) (rabbitmq_detailed_queue_messages{queue=~"meshkit[.]delay[.].+"})',
                        "{{queue}}",
                    ),
                ),
                _lines(
                    "Consumers",
                    "short",
                    "Connected to each queue; a paused consumer is not.",
                    ('max by (vhost, queue) (rabbitmq_detailed_queue_consumers{queue=~"$queue"})', "{{queue}}"),
                ),
                _lines(
                    "Unroutable at the broker",
                    "ops",
                    "Returned to the publisher, or dropped because it did not ask to have them back.",
                    ("sum(rate(rabbitmq_global_messages_unroutable_returned_total[$__rate_interval]))", "returned"),
                    ("sum(rate(rabbitmq_global_messages_unroutable_dropped_total[$__rate_interval]))", "dropped"),
                ),
            ),
        ),
    ),
)

DASHBOARDS: dict[str, Dashboard] = {"event-processing.json": EVENTS}


def grafana_json(dashboard: Dashboard) -> dict[str, object]:
    """`dashboard` as Grafana reads it: panels laid out row by row from left to right, ids counted from 1."""
    panels: list[dict[str, object]] = []
    top = 0
    for row in dashboard.rows:
        heading: dict[str, object] = {
            "id": len(panels) + 1,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
            "panels": [],
        }
        panels.append(heading)
        left, top, tallest = 0, top + 1, 0
        for panel in row.panels:
            width, height = _SIZES[panel.kind]
            # A row holds panels of one height only, so that nothing leaves a hole.
            if left + width > 24 or (tallest and height != tallest):
                left, top, tallest = 0, top + tallest, 0
            panels.append(_panel(panel, len(panels) + 1, {"x": left, "y": top, "w": width, "h": height}))
            left, tallest = left + width, height
        top += tallest
    return {
        "id": None,
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["meshkit"],
        "schemaVersion": 42,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [],
        "annotations": {"list": [_FIRING]},
        "templating": {"list": _VARIABLES},
        "panels": panels,
    }


_FIRING = {
    "name": "Alerts",
    "datasource": _DATASOURCE,
    "enable": True,
    "hide": False,
    "iconColor": "red",
    "expr": 'ALERTS{alertname=~"Meshkit.*", alertname!="MeshkitWatchdog", alertstate="firing"}',
    "titleFormat": "{{alertname}}",
    "textFormat": "{{queue}} {{breaker}} {{destination}}",
    "step": "30s",
}


def _query_variable(name: str, label: str, query: str) -> dict[str, object]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": f"variable-{name}"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


_VARIABLES: list[dict[str, object]] = [
    {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "refresh": 1,
    },
    _query_variable("job", "Job", "label_values(meshkit_build_info, job)"),
    _query_variable("instance", "Instance", 'label_values(meshkit_build_info{job=~"$job"}, instance)'),
    _query_variable("queue", "Queue", f"label_values(meshkit_messages_received_total{{{_SEL}}}, queue)"),
]


def _panel(panel: Panel, number: int, position: dict[str, int]) -> dict[str, object]:
    defaults: dict[str, object] = {"unit": panel.unit}
    if panel.alarm is not None:
        steps = [{"color": "green", "value": None}, {"color": "red", "value": panel.alarm}]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    if panel.kind in ("stat", "timeseries") and panel.unit in ("short", "bool_on_off"):
        defaults["min"] = 0
    drawn: dict[str, object] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": _table_columns() if panel.kind == "table" else []},
        "options": _OPTIONS[panel.kind],
        "targets": [
            _target(target, letter, panel)
            for target, letter in zip(panel.targets, string.ascii_uppercase, strict=False)
        ],
    }
    if panel.kind == "table":
        drawn["transformations"] = [
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {"excludeByName": {"Time": True}}},
        ]
    return drawn


def _target(target: Target, letter: str, panel: Panel) -> dict[str, object]:
    instant = panel.kind == "table"
    return {
        "refId": letter,
        "datasource": _DATASOURCE,
        "editorMode": "code",
        "expr": target.expr,
        "legendFormat": target.legend or "__auto",
        "format": {"table": "table", "heatmap": "heatmap"}.get(panel.kind, "time_series"),
        "instant": instant,
        "range": not instant,
        "exemplar": panel.exemplars,
    }


def _table_columns() -> list[dict[str, object]]:
    columns = (("A", "Deliveries / s", "ops"), ("B", "Not acknowledged", "percentunit"), ("C", "p95", "s"))
    return [
        {
            "matcher": {"id": "byName", "options": f"Value #{letter}"},
            "properties": [{"id": "displayName", "value": title}, {"id": "unit", "value": unit}],
        }
        for letter, title, unit in columns
    ]


_OPTIONS: dict[PanelKind, dict[str, object]] = {
    "stat": {
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
    },
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
        "exemplars": {"color": "rgba(80,120,255,0.7)"},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "showColorScale": False, "yHistogram": True},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": "s"},
    },
    "table": {"cellHeight": "sm", "showHeader": True, "footer": {"show": False, "reducer": ["sum"], "fields": ""}},
}
