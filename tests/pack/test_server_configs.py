"""The configuration of Prometheus, Alertmanager, the collector and compose, each accepted by what will read it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meshkit import pack
from meshkit.pack.rules import ALERTS
from meshkit.testing import servers

ROOT = Path(__file__).parents[2]
PACK = ROOT / "dashboards"
COMPOSE = ROOT / "docker-compose.observability.yml"


def run(*command: str | Path) -> str:
    """The output of a checking tool, which must be content."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert 0 == done.returncode, output
    return output


def tool(server: str, name: str) -> Path:
    """A tool that comes with a server: beside it, or on the PATH."""
    program = servers.available()[server]
    assert program is not None
    beside = program.with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    assert found, f"{server} is here and its {name} is not"
    return Path(found)


# --- Prometheus ------------------------------------------------------------------------------------------------------


@pytest.mark.real("prometheus")
def test_prometheus_takes_the_rules():
    """promtool finds as many rules as were written, and nothing wrong."""
    output = run(tool("prometheus", "promtool"), "check", "rules", PACK / "prometheus/rules/meshkit.yml")
    (group,) = yaml.safe_load((PACK / "prometheus/rules/meshkit.yml").read_text())["groups"]
    assert f"{len(group['rules'])} rules found" in output


@pytest.mark.real("prometheus")
def test_prometheus_takes_its_configuration():
    """promtool reads prometheus.yml with the rule and target files that it names."""
    run(tool("prometheus", "promtool"), "check", "config", PACK / "prometheus/prometheus.yml")


@pytest.mark.real("prometheus", "alertmanager")
@pytest.mark.parametrize("scale", [1 / 3, 0.01, 0.001])
def test_prometheus_takes_an_export_with_a_shorter_time_scale(tmp_path, scale):
    """Shortened durations are still durations."""
    pack.export(tmp_path, time_scale=scale)
    run(tool("prometheus", "promtool"), "check", "config", tmp_path / "prometheus/prometheus.yml")
    run(tool("alertmanager", "amtool"), "check-config", tmp_path / "alertmanager/alertmanager.yml")


@pytest.mark.real("prometheus")
def test_the_alerts_do_over_days_what_they_should():
    """promtool plays the cases of dashboards/prometheus/tests through."""
    for cases in sorted((PACK / "prometheus/tests").glob("*.yml")):
        assert "SUCCESS" in run(tool("prometheus", "promtool"), "test", "rules", cases)


@pytest.mark.real("prometheus")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # A counter's increase instead of the depth: resolves by itself.
        (
            "meshkit:dlq_messages > 0\nunless (\n"
            "  min_over_time(meshkit:dlq_messages[1d]) >= meshkit:dlq_messages\n"
            "  and\n  last_over_time(meshkit:dlq_messages[12h] offset 1d)\n)",
            "sum by (job, vhost, queue) (increase(meshkit:dlq_messages[10m])) > 0",
        ),
        # No memory of a depth that cannot be asked.
        ('(last_over_time(rabbitmq_detailed_queue_messages{queue=~".+[.]dlq"}[1h]))', "(absent(up) > 1)"),
        # Only what is known for a day counts: a young queue is silent.
        ("and\n  last_over_time(meshkit:dlq_messages[12h] offset 1d)", ""),
        # No exemption for what is paused on purpose.
        ("unless on (queue) max by (queue) (meshkit_consumer_paused) == 1", ""),
        # A breaker must be open without a break.
        ('avg_over_time(meshkit_circuitbreaker_state{state="open"}[5m])', 'meshkit_circuitbreaker_state{state="open"}'),
        # Blind to what is born at 1.
        ("  (meshkit_dead_letters_total unless meshkit_dead_letters_total offset 1d) > 0\n  or\n", ""),
    ],
)
def test_the_cases_notice_a_wrong_rule(tmp_path, right, wrong):
    """Each clause that somebody may take for superfluous is held by a case."""
    rules = yaml.safe_load((PACK / "prometheus/rules/meshkit.yml").read_text())
    changed = 0
    for rule in rules["groups"][0]["rules"]:
        if right in rule["expr"]:
            rule["expr"] = rule["expr"].replace(right, wrong)
            changed += 1
    assert changed
    (tmp_path / "rules").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "rules/meshkit.yml").write_text(yaml.safe_dump(rules))
    shutil.copy(PACK / "prometheus/tests/meshkit_test.yml", tmp_path / "tests")
    promtool = tool("prometheus", "promtool")
    run(promtool, "check", "rules", tmp_path / "rules/meshkit.yml")
    done = subprocess.run(
        [promtool, "test", "rules", tmp_path / "tests/meshkit_test.yml"], capture_output=True, text=True, check=False
    )
    assert 1 == done.returncode
    assert "FAILED" in done.stdout + done.stderr


# --- alerts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: f"{alert.name}-{alert.severity}")
def test_an_alert_tells_whoever_it_wakes_what_to_do(alert):
    """Every alert has a summary, a description and a section of the runbook under its name."""
    assert alert.summary
    assert alert.description.endswith(".")
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/runbooks.md").read_text(), re.MULTILINE)
    assert alert.name in headings


def test_the_runbook_has_no_section_too_many():
    """A section without an alert would be read by nobody; a link inside leads to a section."""
    text = (ROOT / "docs/runbooks.md").read_text()
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert {alert.name for alert in ALERTS} == set(headings)
    assert {heading.lower() for heading in headings} >= set(re.findall(r"\(#(\w+)\)", text))


def test_every_rule_in_the_file_has_its_annotations():
    """Severity, summary, description, runbook and dashboard are on each rule that can fire."""
    (group,) = yaml.safe_load((PACK / "prometheus/rules/meshkit.yml").read_text())["groups"]
    alerts = [rule for rule in group["rules"] if "alert" in rule]
    assert len(ALERTS) == len(alerts)
    for rule in alerts:
        assert rule["labels"]["severity"] in ("critical", "warning", "none")
        assert {"summary", "description", "runbook_url", "dashboard_url"} == set(rule["annotations"])
        assert rule["annotations"]["runbook_url"].endswith("#" + rule["alert"].lower())
        assert "/d/meshkit-events" in rule["annotations"]["dashboard_url"]


# --- Alertmanager and the collector ----------------------------------------------------------------------------------


@pytest.mark.real("alertmanager")
def test_alertmanager_takes_its_configuration():
    """amtool reads alertmanager.yml."""
    run(tool("alertmanager", "amtool"), "check-config", PACK / "alertmanager/alertmanager.yml")


@pytest.mark.real("alertmanager")
@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        (["alertname=MeshkitDLQGrowing", "queue=orders", "severity=warning"], "meshkit"),
        (["alertname=MeshkitBrokerDisconnected", "severity=critical"], "meshkit"),
        (["alertname=MeshkitWatchdog", "severity=none"], "nobody"),
    ],
)
def test_alerts_reach_who_they_should(labels, receiver):
    """The watchdog bothers nobody until it is routed, everything else reaches the receiver."""
    configuration = PACK / "alertmanager/alertmanager.yml"
    output = run(tool("alertmanager", "amtool"), "config", "routes", "test", f"--config.file={configuration}", *labels)
    assert receiver == output.splitlines()[0]


@pytest.mark.real("collector")
def test_the_collector_takes_its_configuration():
    """The collector's own validation accepts every component and setting."""
    collector = servers.available()["collector"]
    assert collector is not None
    run(collector, "validate", "--config", PACK / "otel-collector/config.yaml")


# --- compose ---------------------------------------------------------------------------------------------------------


def compose() -> dict:
    return yaml.safe_load(COMPOSE.read_text())


def test_compose_fits_its_schema():
    """The compose file is what the compose specification allows; the schema comes with the tool, no network is asked."""
    checker = Path(sys.executable).with_name("check-jsonschema")
    run(checker, "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_what_compose_mounts_is_there():
    """Every path of the repository that a container gets exists."""
    mounted = [
        volume.split(":")[0]
        for service in compose()["services"].values()
        for volume in service.get("volumes", [])
        if volume.startswith(".")
    ]
    assert mounted
    assert [] == [path for path in mounted if not (ROOT / path).exists()]


def test_nothing_is_published_beyond_the_machine():
    """Every published port is bound to 127.0.0.1, because the passwords are the defaults."""
    for name, service in compose()["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), (name, port)


def test_every_service_is_pinned_bounded_and_asked_how_it_is():
    """An image by version, a memory limit, a health check; the collector's image has nothing to run one with."""
    for name, service in compose()["services"].items():
        assert re.search(r":v?[0-9]+\.[0-9]+(\.[0-9]+)?(-management)?$", service["image"]), name
        assert service["mem_limit"], name
        assert ("healthcheck" in service) == (name != "otel-collector"), name


def test_the_configurations_call_each_other_by_the_names_of_compose():
    """Each host name in a mounted configuration is a service of the compose file, or the machine itself."""
    known = set(compose()["services"]) | {"localhost", "0.0.0.0", "host.docker.internal"}
    files = [
        PACK / "prometheus/prometheus.yml",
        PACK / "prometheus/targets/services.yml",
        PACK / "alertmanager/alertmanager.yml",
        PACK / "otel-collector/config.yaml",
        PACK / "grafana/provisioning/datasources/meshkit.yaml",
    ]
    for path in files:
        hosts = re.findall(r"([a-z0-9][a-z0-9.-]*[a-z0-9]):[0-9]{4,5}\b", path.read_text())
        assert hosts, path
        assert set() == set(hosts) - known, path
