"""The pack on live servers: RabbitMQ, Prometheus, Alertmanager, and a process that records into the catalogue.

Checking tools are not enough: a rule that promtool takes can still fail against real series. So Prometheus scrapes, the
rules run on a time scale of 1 to 100, and a webhook listens to what Alertmanager sends.
"""

import json
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from promql_names import selectors

from meshkit import pack
from meshkit.pack.broker_metrics import BROKER_METRICS
from meshkit.pack.dashboards import DASHBOARDS
from meshkit.telemetry.catalogue import METRICS
from meshkit.testing import servers

pytestmark = [pytest.mark.real("rabbitmq", "prometheus", "alertmanager"), pytest.mark.once]

SCALE = 0.01
# What `for 10 quiet minutes` is on that scale.
TEN_MINUTES = 600 * SCALE


# --- the stack -------------------------------------------------------------------------------------------------------


class Webhook:
    """Listens to Alertmanager and keeps what it said, in order."""

    def __init__(self) -> None:
        said = self.said = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                said.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Keep the test's output to what fails."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/alerts"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def states(self, alert: str, queue: str) -> list[str]:
        """What was said of `alert` for `queue`, each change of state once."""
        heard: list[str] = []
        for notification in list(self.said):
            for entry in notification["alerts"]:
                if (alert, queue) == (entry["labels"]["alertname"], entry["labels"].get("queue")):
                    heard += [entry["status"]] if heard[-1:] != [entry["status"]] else []
        return heard


@dataclass
class Stack:
    """The running servers, and a virtual host of RabbitMQ that is the tests' own."""

    rabbitmq: servers.RabbitMQ
    prometheus: servers.Prometheus
    webhook: Webhook
    vhost: str

    def declare(self, queue: str) -> None:
        """Declare a durable quorum queue, as meshkit's queues are."""
        body = {"durable": True, "arguments": {"x-queue-type": "quorum"}}
        self.rabbitmq.api(f"/api/queues/{quote(self.vhost, safe='')}/{queue}", method="PUT", body=body)

    def publish(self, queue: str) -> None:
        """Put one message into `queue` by the default exchange."""
        body = {"properties": {"delivery_mode": 2}, "routing_key": queue, "payload": "{}", "payload_encoding": "string"}
        path = f"/api/exchanges/{quote(self.vhost, safe='')}/amq.default/publish"
        assert {"routed": True} == self.rabbitmq.api(path, method="POST", body=body)

    def replay(self, queue: str) -> None:
        """Move one message from the dead-letter queue back to `queue`: publish the copy, then take it out."""
        self.publish(queue)
        body = {"count": 1, "ackmode": "ack_requeue_false", "encoding": "auto"}
        path = f"/api/queues/{quote(self.vhost, safe='')}/{queue}.dlq/get"
        assert 1 == len(self.rabbitmq.api(path, method="POST", body=body))


def wait_until(holds: Callable[[], object], within: float, what: Callable[[], object]) -> None:
    """Ask a live server until it says so."""
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)


@contextmanager
def busy_service() -> Iterator[int]:
    """A process in which everything happens that a metric can tell; the port of its metrics."""
    (port,) = servers.free_ports(1)
    script = Path(__file__).with_name("busy_service.py")
    with subprocess.Popen([sys.executable, script, str(port)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready")
            yield port
        finally:
            process.terminate()
            process.wait(10)


def configuration(folder: Path, rabbitmq_port: int, alertmanager_port: int, service_port: int) -> dict[str, str]:
    """What was exported, with the addresses of this machine instead of compose's, and without what does not run here."""
    prometheus = yaml.safe_load((folder / "prometheus/prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in prometheus["scrape_configs"]}
    for name in ("rabbitmq", "rabbitmq-detailed"):
        jobs[name]["static_configs"] = [{"targets": [f"127.0.0.1:{rabbitmq_port}"]}]
    prometheus["scrape_configs"] = [jobs[name] for name in ("meshkit", "rabbitmq", "rabbitmq-detailed")]
    prometheus["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{alertmanager_port}"]}]
    services = [{"targets": [f"127.0.0.1:{service_port}"], "labels": {"job": "payments"}}]
    return {
        "prometheus.yml": yaml.safe_dump(prometheus),
        "rules/meshkit.yml": (folder / "prometheus/rules/meshkit.yml").read_text(),
        "targets/services.yml": yaml.safe_dump(services),
    }


@pytest.fixture(scope="module")
def stack(rabbitmq_server: servers.RabbitMQ, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Exported with a short time scale, started as exported, with a queue, its dead-letter queue and a delay rung."""
    folder = tmp_path_factory.mktemp("pack")
    pack.export(folder, time_scale=SCALE)
    vhost = f"pack-{uuid.uuid4().hex[:12]}"
    rabbitmq_server.api(f"/api/vhosts/{vhost}", method="PUT", body={})
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    rabbitmq_server.api(f"/api/permissions/{vhost}/guest", method="PUT", body=everything)
    with ExitStack() as running:
        running.callback(rabbitmq_server.api, f"/api/vhosts/{vhost}", method="DELETE")
        webhook = Webhook()
        running.callback(webhook.close)
        routes = yaml.safe_load((folder / "alertmanager/alertmanager.yml").read_text())
        routes["receivers"][0]["webhook_configs"][0]["url"] = webhook.url
        alertmanager = running.enter_context(servers.alertmanager(config=yaml.safe_dump(routes)))
        service_port = running.enter_context(busy_service())
        files = configuration(folder, rabbitmq_server.prometheus_port, alertmanager.port, service_port)
        prometheus = running.enter_context(servers.prometheus(config=files.pop("prometheus.yml"), files=files))
        made = Stack(rabbitmq_server, prometheus, webhook, vhost)
        for queue in ("orders", "orders.dlq", "meshkit.delay.10s"):
            made.declare(queue)
        yield made


# --- what it shows ---------------------------------------------------------------------------------------------------


def test_the_broker_has_every_metric_that_the_pack_asks_it_for(stack: Stack):
    """Each name on our list is exposed by the running broker, on the pages that Prometheus is told to scrape."""
    every = [selector.name for panel in panels() for _, expr in panel for selector in selectors(expr)]
    assert {name for name in every if name.startswith("rabbitmq_")} <= BROKER_METRICS
    wait_until(
        lambda: not missing(stack, BROKER_METRICS), within=30, what=lambda: sorted(missing(stack, BROKER_METRICS))
    )


def test_every_row_of_the_catalogue_is_scraped(stack: Stack):
    """What a service of users records arrives in Prometheus under the names of the catalogue, with exemplars."""
    promised = frozenset(name for metric in METRICS for name in metric.series)
    wait_until(lambda: not missing(stack, promised), within=30, what=lambda: sorted(missing(stack, promised)))
    now = time.time()
    query = quote("meshkit_message_process_duration_seconds_bucket")
    found = stack.prometheus.api(f"/api/v1/query_exemplars?query={query}&start={now - 60}&end={now + 60}")
    traces = {exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]}
    assert {"0af7651916cd43dd8448eb211c80319c"} == traces


def missing(stack: Stack, names: frozenset[str]) -> set[str]:
    known = set(stack.prometheus.api("/api/v1/label/__name__/values"))
    return names - known


def panels() -> list[list[tuple[str, str]]]:
    """For each panel its queries, by the panel's title, as Grafana would send them over all jobs and queues."""
    return [
        [(panel.title, as_sent(target.expr)) for target in panel.targets]
        for dashboard in DASHBOARDS.values()
        for row in dashboard.rows
        for panel in row.panels
    ]


def as_sent(expression: str) -> str:
    filled = expression.replace("$__rate_interval", "10s").replace("$__range", "1m")
    return re.sub(r"\$(job|instance|queue)\b", ".+", filled)


def test_every_panel_has_something_to_draw(stack: Stack):
    """Each query of each panel finds series in a Prometheus that scrapes a busy service and a broker."""
    queries = [query for panel in panels() for query in panel]
    assert queries

    def empty() -> list[tuple[str, str]]:
        return [(title, expr) for title, expr in queries if not stack.prometheus.query(expr)]

    wait_until(lambda: not empty(), within=30, what=empty)


def test_every_rule_is_evaluated_without_an_error(stack: Stack):
    """Prometheus itself says of each rule, with real series behind it, that it is well."""

    def rules() -> list[dict[str, Any]]:
        return [rule for group in stack.prometheus.api("/api/v1/rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: {rule["health"] for rule in rules()} == {"ok"}, within=20, what=lambda: rules())
    assert [] == [rule["lastError"] for rule in rules() if rule.get("lastError")]


def test_every_target_is_scraped(stack: Stack):
    """The service, and both pages of the broker, answer with something that Prometheus takes."""

    def health() -> dict[str, str]:
        return {
            target["labels"]["job"]: target["health"]
            for target in stack.prometheus.api("/api/v1/targets")["activeTargets"]
        }

    wanted = {"payments": "up", "rabbitmq": "up", "rabbitmq-detailed": "up"}
    wait_until(lambda: wanted == health(), within=20, what=health)


def test_one_dead_letter_is_heard_of_until_it_is_replayed(stack: Stack):
    """The growth alert fires for a single dead letter, reaches a webhook, outlasts ten quiet minutes, and resolves
    with the replay and not before.
    """

    def heard() -> list[str]:
        return stack.webhook.states("MeshkitDLQGrowing", "orders")

    stack.publish("orders.dlq")
    wait_until(lambda: ["firing"] == heard(), within=30, what=lambda: stack.webhook.said)
    quiet_until = time.monotonic() + 2 * TEN_MINUTES
    while time.monotonic() < quiet_until:
        assert ["firing"] == heard()
        time.sleep(0.2)
    stack.replay("orders")
    wait_until(lambda: ["firing", "resolved"] == heard(), within=30, what=lambda: stack.webhook.said)

    alerts = [entry for notification in stack.webhook.said for entry in notification["alerts"]]
    mine = next(entry for entry in alerts if entry["labels"].get("vhost") == stack.vhost)
    assert "orders.dlq has grown. Dead letters in it: 1" == mine["annotations"]["summary"]
    assert mine["annotations"]["runbook_url"].endswith("#meshkitdlqgrowing")
    assert "warning" == mine["labels"]["severity"]


def test_a_queue_that_is_first_seen_with_a_dead_letter_is_heard_of(stack: Stack):
    """A quorum queue is first reported seconds after it was declared, with what it holds by then: born at 1."""
    stack.declare("late")
    stack.declare("late.dlq")
    stack.publish("late.dlq")
    wait_until(
        lambda: ["firing"] == stack.webhook.states("MeshkitDLQGrowing", "late"),
        within=30,
        what=lambda: stack.webhook.said,
    )
    stack.replay("late")


def test_reason_and_depth_come_in_one_notification(stack: Stack):
    """What the service counted and what the broker holds are grouped by the queue that was consumed."""
    stack.publish("orders.dlq")

    def together() -> bool:
        return any(
            {"MeshkitDLQGrowing", "MeshkitDeadLetters"} <= {entry["labels"]["alertname"] for entry in said["alerts"]}
            for said in list(stack.webhook.said)
        )

    wait_until(together, within=30, what=lambda: stack.webhook.said)
    stack.replay("orders")


def test_the_watchdog_fires_and_bothers_nobody(stack: Stack):
    """Alertmanager has it, the receiver does not hear of it."""

    def firing() -> set[str]:
        return {alert["labels"]["alertname"] for alert in stack.prometheus.api("/api/v1/alerts")["alerts"]}

    wait_until(lambda: "MeshkitWatchdog" in firing(), within=20, what=firing)
    said = {entry["labels"]["alertname"] for notification in stack.webhook.said for entry in notification["alerts"]}
    assert "MeshkitWatchdog" not in said
