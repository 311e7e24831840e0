"""The configuration of what stands around a service: Prometheus, Alertmanager, the collector, Grafana, RabbitMQ.

Written for the names that `docker-compose.observability.yml` gives its services. Durations stand in angle brackets,
as in `rules`, and follow the same time scale.
"""

from meshkit.pack.broker_metrics import DETAILED_FAMILIES
from meshkit.pack.dashboards import SCRAPE_INTERVAL
from meshkit.pack.rules import scaled


def prometheus(*, time_scale: float) -> dict[str, object]:
    """`prometheus.yml`. Services are found by files, so that adding one needs no restart."""
    # Below a second a scrape would still run while the next begins.
    interval = scaled(f"<{SCRAPE_INTERVAL}>", max(time_scale, 1 / 15))
    return {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": ["rules/*.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": ["alertmanager:9093"]}]}]},
        "scrape_configs": [
            {"job_name": "meshkit", "file_sd_configs": [{"files": ["targets/*.yml"]}]},
            {"job_name": "rabbitmq", "static_configs": [{"targets": ["rabbitmq:15692"]}]},
            {
                # Without a family the broker answers with no queue at all.
                "job_name": "rabbitmq-detailed",
                "metrics_path": "/metrics/detailed",
                "params": {"family": list(DETAILED_FAMILIES)},
                "static_configs": [{"targets": ["rabbitmq:15692"]}],
            },
            {
                # 8889: the RED metrics made from spans, 8888: the collector's own.
                "job_name": "otel-collector",
                "static_configs": [{"targets": ["otel-collector:8889", "otel-collector:8888"]}],
            },
            {"job_name": "prometheus", "static_configs": [{"targets": ["localhost:9090"]}]},
            {"job_name": "alertmanager", "static_configs": [{"targets": ["alertmanager:9093"]}]},
        ],
    }


def prometheus_targets() -> list[dict[str, object]]:
    """The services to scrape, one job each: a first one on the host, to be replaced by a user's own."""
    return [{"targets": ["host.docker.internal:8000"], "labels": {"job": "my-service"}}]


def alertmanager(*, time_scale: float) -> dict[str, object]:
    """`alertmanager.yml`: one notification a queue, and no second one for what follows from the first."""
    return {
        "route": {
            "receiver": "meshkit",
            "group_by": ["alertname", "job"],
            "group_wait": scaled("<15s>", time_scale),
            "group_interval": scaled("<1m>", time_scale),
            "repeat_interval": scaled("<4h>", time_scale),
            "routes": [
                # Replace by a receiver that speaks up when the watchdog falls silent.
                {"receiver": "nobody", "matchers": ['alertname="MeshkitWatchdog"']},
                # Depth from the broker and reason from the service belong into one notification.
                {"receiver": "meshkit", "matchers": ['queue!=""'], "group_by": ["queue"]},
            ],
        },
        "inhibit_rules": [
            {
                "source_matchers": ['severity="critical"'],
                "target_matchers": ['severity="warning"'],
                "equal": ["alertname", "queue", "vhost"],
            },
            {
                "source_matchers": ['alertname="MeshkitTargetDown"'],
                "target_matchers": ['alertname=~"MeshkitConsumerStalled|MeshkitBrokerDisconnected"'],
                "equal": ["job"],
            },
            {
                # A blocked or lost broker is why a publish fails.
                "source_matchers": ['alertname=~"MeshkitBrokerBlocked|MeshkitBrokerDisconnected"'],
                "target_matchers": ['alertname=~"MeshkitPublishFailures|MeshkitOutboxLag"'],
                "equal": ["job"],
            },
        ],
        "receivers": [
            {
                "name": "meshkit",
                # A placeholder: put the webhook of your pager or chat here.
                "webhook_configs": [{"url": "http://host.docker.internal:9099/alerts", "send_resolved": True}],
            },
            {"name": "nobody"},
        ],
    }


def collector() -> dict[str, object]:
    """The OpenTelemetry Collector: spans to Jaeger, and RED metrics made from all of them before any is sampled away."""
    return {
        "receivers": {
            "otlp": {"protocols": {"grpc": {"endpoint": "0.0.0.0:4317"}, "http": {"endpoint": "0.0.0.0:4318"}}}
        },
        "processors": {
            "memory_limiter": {"check_interval": "1s", "limit_percentage": 80, "spike_limit_percentage": 25},
            "transform/redact": {
                "error_mode": "ignore",
                "trace_statements": [
                    {
                        "context": "span",
                        "statements": [
                            f'delete_key(attributes, "http.request.header.{name}")'
                            for name in ("authorization", "cookie", "proxy-authorization", "x-api-key")
                        ],
                    }
                ],
            },
            "tail_sampling": {
                "decision_wait": "10s",
                "policies": [
                    {"name": "errors", "type": "status_code", "status_code": {"status_codes": ["ERROR"]}},
                    {
                        "name": "dead-letters",
                        "type": "boolean_attribute",
                        "boolean_attribute": {"key": "meshkit.sampling.keep", "value": True},
                    },
                    {"name": "slow", "type": "latency", "latency": {"threshold_ms": 1000}},
                    # All of the rest, too, on a laptop. Lower it in production.
                    {"name": "rest", "type": "probabilistic", "probabilistic": {"sampling_percentage": 100}},
                ],
            },
            "batch": {},
        },
        "connectors": {
            "span_metrics": {
                "histogram": {
                    "unit": "s",
                    "explicit": {
                        "buckets": [
                            f"{ms}ms" for ms in (5, 10, 25, 50, 75, 100, 150, 200, 250, 300, 500, 750, 1000, 2500, 5000)
                        ]
                        + ["7500ms", "10s"]
                    },
                },
                "exemplars": {"enabled": True},
                "dimensions": [{"name": "messaging.destination.name"}],
            }
        },
        "exporters": {
            "otlp_grpc/jaeger": {"endpoint": "${env:JAEGER_OTLP:-jaeger:4317}", "tls": {"insecure": True}},
            "prometheus": {"endpoint": "0.0.0.0:8889", "enable_open_metrics": True},
        },
        "extensions": {"health_check": {"endpoint": "0.0.0.0:13133"}},
        "service": {
            "extensions": ["health_check"],
            "telemetry": {
                "metrics": {
                    "readers": [{"pull": {"exporter": {"prometheus": {"host": "0.0.0.0", "port": 8888}}}}],
                }
            },
            "pipelines": {
                # Before sampling: rates made from what was kept would shrink with it.
                "traces/red": {
                    "receivers": ["otlp"],
                    "processors": ["memory_limiter"],
                    "exporters": ["span_metrics"],
                },
                "traces": {
                    "receivers": ["otlp"],
                    "processors": ["memory_limiter", "transform/redact", "tail_sampling", "batch"],
                    "exporters": ["otlp_grpc/jaeger"],
                },
                "metrics": {
                    "receivers": ["span_metrics"],
                    "processors": ["memory_limiter", "batch"],
                    "exporters": ["prometheus"],
                },
            },
        },
    }


def grafana_datasources() -> dict[str, object]:
    """Prometheus and Jaeger with fixed uids, and the way from an exemplar to its trace."""
    return {
        "apiVersion": 1,
        "datasources": [
            {
                "name": "Prometheus",
                "uid": "prometheus",
                "type": "prometheus",
                "access": "proxy",
                "url": "http://prometheus:9090",
                "isDefault": True,
                "jsonData": {
                    "timeInterval": SCRAPE_INTERVAL,
                    "exemplarTraceIdDestinations": [{"name": "trace_id", "datasourceUid": "jaeger"}],
                },
            },
            {
                "name": "Jaeger",
                "uid": "jaeger",
                "type": "jaeger",
                "access": "proxy",
                "url": "http://jaeger:16686",
                "jsonData": {"nodeGraph": {"enabled": True}},
            },
        ],
    }


def grafana_provider() -> dict[str, object]:
    """Has Grafana load the dashboards from its folder, where they are changed in the code and not on the page."""
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": "meshkit",
                "folder": "meshkit",
                "folderUid": "meshkit",
                "type": "file",
                "disableDeletion": True,
                "allowUiUpdates": False,
                "options": {"path": "/var/lib/grafana/dashboards/meshkit"},
            }
        ],
    }


def rabbitmq_plugins() -> str:
    """`enabled_plugins`, an Erlang term: the management page, and the metrics endpoint on 15692."""
    return "[rabbitmq_management,rabbitmq_prometheus].\n"
