"""The demo's dead letters on the whole way to a pager: RabbitMQ, Prometheus, Alertmanager, a webhook.

`tests/pack` shows that the rules work on messages put down by hand; here the demo makes the dead letters and replays
them, started as a user starts it, and the shipped configuration has to notice both.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_alerting_live import SCALE, Webhook, configuration, wait_until

from meshkit import pack
from meshkit.testing import servers

pytestmark = [pytest.mark.real("rabbitmq", "prometheus", "alertmanager"), pytest.mark.once]

ROOT = Path(__file__).parents[2]
QUEUE = "payment-service.enrollment-requested"
GROWING = "MeshkitDLQGrowing"


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    listening = Webhook()
    yield listening
    listening.close()


@pytest.fixture
def prometheus(rabbitmq_server: servers.RabbitMQ, webhook: Webhook, tmp_path: Path) -> Iterator[servers.Prometheus]:
    """Prometheus and Alertmanager as exported, on a shorter time scale, with this broker and this webhook in them."""
    pack.export(tmp_path, time_scale=SCALE)
    routes = yaml.safe_load((tmp_path / "alertmanager/alertmanager.yml").read_text())
    routes["receivers"][0]["webhook_configs"][0]["url"] = webhook.url
    with ExitStack() as running:
        alertmanager = running.enter_context(servers.alertmanager(config=yaml.safe_dump(routes)))
        files = configuration(tmp_path, rabbitmq_server.prometheus_port, alertmanager.port, service_port=0)
        # The demo's services are on ports of their own choice: what the broker says has to be enough.
        files["targets/services.yml"] = "[]"
        yield running.enter_context(servers.prometheus(config=files.pop("prometheus.yml"), files=files))


@contextmanager
def demo(broker: str) -> Iterator[subprocess.Popen[str]]:
    """The demo as a user runs it; its tale is on stderr, its summary on stdout."""
    command = [sys.executable, "-m", "learning_hub.demo", "--once", "--json", "--broker", broker]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples")}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            # Where the test has failed while it was held: it has to run to take its services away.
            process.send_signal(signal.SIGCONT)
            process.terminate()


def told_until(process: subprocess.Popen[str], words: str = "") -> list[str]:
    """The lines of the tale up to the one with these words; all that are left where it does not come, or without words."""
    lines: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line.rstrip())
        if words and words in line:
            break
    return lines


@contextmanager
def held(process: subprocess.Popen[str]) -> Iterator[None]:
    """Ctrl-Z to whoever plays the demo; its services, in sessions of their own, go on.

    The demo plays in seconds what takes an on-call person an hour. RabbitMQ tells the depth of a quorum queue each five
    seconds, so without waiting the dead letters could be replayed, and their queue removed, before anybody has seen them.
    """
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.mark.timeout(240)
def test_the_demos_dead_letters_are_heard_of_until_they_are_replayed(
    rabbitmq_url: str, prometheus: servers.Prometheus, webhook: Webhook
) -> None:
    """The growth alert keeps silent through the demo's outage, fires for the defect's dead letters and for no other
    queue, reaches a webhook, and resolves with the replay.
    """
    vhost = rabbitmq_url.rpartition("/")[2]

    def heard() -> list[str]:
        return webhook.states(GROWING, QUEUE)

    def depth() -> list[int]:
        found = prometheus.query(f'meshkit:dlq_messages{{vhost="{vhost}",queue="{QUEUE}"}}')
        return [int(series["value"][1]) for series in found]

    with demo(rabbitmq_url) as process:
        tale = told_until(process, "Act 3: a defect")
        assert tale[-1].startswith("Act 3"), tale
        assert [] == growing(webhook)

        tale += told_until(process, " dead letters after ")
        with held(process):
            found = re.search(r"(\d+) dead letters after", tale[-1])
            assert found is not None, tale
            dead = int(found[1])
            wait_until(lambda: ["firing"] == heard() and [dead] == depth(), within=60, what=lambda: webhook.said)

        tale += told_until(process, "Act 5: ")
        assert tale[-1].startswith("Act 5"), tale
        with held(process):
            # The queues are still there: it ends because they are empty.
            wait_until(lambda: ["firing", "resolved"] == heard(), within=60, what=lambda: webhook.said)
            assert [0] == depth()

        tale += told_until(process)
        assert process.stdout is not None
        summary: dict[str, Any] = json.loads(process.stdout.read())
    assert 0 == process.returncode, tale
    assert dead == summary["dead_lettered"] == summary["replayed"] > 0

    assert ["firing", "resolved"] == heard()
    assert {(QUEUE, vhost, "warning")} == {
        (entry["labels"]["queue"], entry["labels"]["vhost"], entry["labels"]["severity"]) for entry in growing(webhook)
    }
    told = growing(webhook)[0]["annotations"]["summary"]
    assert told.startswith(f"{QUEUE}.dlq has grown. Dead letters in it: "), told


def growing(webhook: Webhook) -> list[dict[str, Any]]:
    """Every growth alert that the webhook was told of, in order."""
    alerts = [entry for notification in list(webhook.said) for entry in notification["alerts"]]
    return [entry for entry in alerts if GROWING == entry["labels"]["alertname"]]
