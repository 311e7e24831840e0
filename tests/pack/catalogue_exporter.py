"""A process that exposes every row of the catalogue with prometheus-client, as a busy service would.

    python catalogue_exporter.py PORT

Every child moves a little every 200 ms. Open labels take the values below.
"""

import sys
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from meshkit.telemetry.catalogue import METRICS, Metric

OPEN = {
    "http_request_method": "GET",
    "http_route": "/courses/{id}",
    "http_response_status_code": "200",
    "error_type": "builtins.OSError",
    "client": "payment-provider",
    "operation": "charge",
    "breaker": "payment-provider",
    "queue": "orders",
    "handler": "charge",
    "destination": "payment-events",
    "connection": "publish",
    "outbox": "outbox",
    "metric": "meshkit_retries_total",
    "label": "error_type",
}


def expose(registry: CollectorRegistry) -> list[tuple[Metric, list[object]]]:
    """Make an instrument of every row, and all children that the values above name."""
    made: list[tuple[Metric, list[object]]] = []
    for metric in METRICS:
        if metric.kind == "info":
            Info(metric.name.removesuffix("_info"), metric.help, registry=registry).info(
                {"version": "0", "python": "3"}
            )
            continue
        if metric.kind == "histogram":
            family = Histogram(metric.name, metric.help, metric.label_names, buckets=metric.buckets, registry=registry)
        else:
            family = {"counter": Counter, "gauge": Gauge}[metric.kind](
                metric.name, metric.help, metric.label_names, registry=registry
            )
        children = metric.children(**OPEN)
        made.append((metric, [family.labels(**child) for child in children]))
    return made


def main() -> None:
    registry = CollectorRegistry()
    made = expose(registry)
    start_http_server(int(sys.argv[1]), addr="127.0.0.1", registry=registry)
    print("ready", flush=True)
    while True:
        for metric, children in made:
            for child in children:
                if metric.kind == "counter":
                    child.inc()
                elif metric.kind == "histogram":
                    child.observe(0.12)
                elif metric.name.endswith("_timestamp_seconds"):
                    child.set_to_current_time()
                elif metric.name == "meshkit_consumer_paused":
                    child.set(0)
                else:
                    child.set(1)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
