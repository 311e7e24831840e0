"""The shipped collector configuration on a running collector: spans reach Jaeger, without what must not leave."""

import json
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import yaml

from meshkit.testing import servers

ROOT = Path(__file__).parents[2]
T = TypeVar("T")

pytestmark = [pytest.mark.real("collector", "jaeger"), pytest.mark.once]


def wait_for(ask: Callable[[], T | None], within: float, log: Callable[[], str]) -> T:
    """Ask a live server until it has an answer."""
    deadline = time.monotonic() + within
    while not (answer := ask()):
        assert time.monotonic() < deadline, log()
        time.sleep(0.1)
    return answer


def configuration(otlp_port: int, grpc_port: int, red_port: int, own_port: int, health_port: int) -> str:
    """What is shipped, on ports of the test's own, and with a decision after one second instead of ten."""
    shipped = yaml.safe_load((ROOT / "dashboards/otel-collector/config.yaml").read_text())
    protocols = shipped["receivers"]["otlp"]["protocols"]
    protocols["grpc"]["endpoint"] = f"127.0.0.1:{grpc_port}"
    protocols["http"]["endpoint"] = f"127.0.0.1:{otlp_port}"
    shipped["exporters"]["prometheus"]["endpoint"] = f"127.0.0.1:{red_port}"
    shipped["extensions"]["health_check"]["endpoint"] = f"127.0.0.1:{health_port}"
    (reader,) = shipped["service"]["telemetry"]["metrics"]["readers"]
    reader["pull"]["exporter"]["prometheus"] = {"host": "127.0.0.1", "port": own_port}
    shipped["processors"]["tail_sampling"]["decision_wait"] = "1s"
    shipped["processors"]["batch"] = {"timeout": "200ms"}
    shipped["connectors"]["span_metrics"]["metrics_flush_interval"] = "1s"
    return yaml.safe_dump(shipped)


def span(trace_id: str) -> dict:
    """One process span of a consumer, in OTLP's JSON, with a header among its attributes that nobody should see."""
    now = time.time_ns()
    attributes = {"messaging.destination.name": "orders", "http.request.header.authorization": "Bearer s3cret"}
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "payments"}}]},
                "scopeSpans": [
                    {
                        "scope": {"name": "meshkit"},
                        "spans": [
                            {
                                "traceId": trace_id,
                                "spanId": trace_id[:16],
                                "name": "process orders",
                                "kind": 5,
                                "startTimeUnixNano": str(now - 50_000_000),
                                "endTimeUnixNano": str(now),
                                "attributes": [
                                    {"key": key, "value": {"stringValue": value}} for key, value in attributes.items()
                                ],
                            }
                        ],
                    }
                ],
            }
        ]
    }


def test_a_span_reaches_jaeger_redacted_and_counts_in_the_red_metrics():
    """One span in over OTLP/HTTP: a trace in Jaeger without its credentials, and a rate, an error and a duration."""
    otlp, grpc, red, own, health = servers.free_ports(5)
    trace_id = uuid.uuid4().hex
    with (
        servers.jaeger() as jaeger,
        servers.collector(
            config=configuration(otlp, grpc, red, own, health),
            ready_port=otlp,
            environment={"JAEGER_OTLP": f"127.0.0.1:{jaeger.otlp_grpc_port}"},
        ) as collector,
    ):
        request = urllib.request.Request(
            f"http://127.0.0.1:{otlp}/v1/traces",
            data=json.dumps(span(trace_id)).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert 200 == answer.status

        trace = wait_for(lambda: jaeger.trace(trace_id), within=20, log=collector.log)
        (arrived,) = trace["spans"]
        tags = {tag["key"] for tag in arrived["tags"]}
        assert "process orders" == arrived["operationName"]
        assert "messaging.destination.name" in tags
        assert "http.request.header.authorization" not in tags

        def counted() -> list[str]:
            with urllib.request.urlopen(f"http://127.0.0.1:{red}/metrics", timeout=5) as page:
                lines = page.read().decode().splitlines()
            return [line for line in lines if "_calls_total{" in line and "process orders" in line]

        (calls,) = wait_for(counted, within=20, log=collector.log)
        assert 'service_name="payments"' in calls
        assert 'messaging_destination_name="orders"' in calls
