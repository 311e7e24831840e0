"""The dashboards: every name in them exists, Grafana's linter would be content, and the layout has no holes.

The rules are those of grafana/dashboard-linter, written anew here because Grafana's tools are not at hand everywhere.
"""

import itertools
import json
import re
from pathlib import Path

import pytest
from promql_names import groupings, selectors

from meshkit.pack.broker_metrics import BROKER_METRICS
from meshkit.pack.dashboards import SCRAPE_INTERVAL
from meshkit.pack.rules import ALERTS, RECORDINGS, scaled
from meshkit.telemetry.catalogue import METRICS

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "dashboards/grafana").glob("*.json"))
OF_SERIES = {series: metric for metric in METRICS for series in metric.series}
RECORDED = {rule.name for rule in RECORDINGS}
# What Prometheus itself adds: to every scrape, to every series of a job, to a histogram, for every alert.
OF_PROMETHEUS = {"up", "ALERTS"}
ADDED_LABELS = {"job", "instance", "le"}
BROKER_LABELS = {"job", "instance", "vhost", "queue", "queue_type", "dead_letter_strategy", "reason"}
UNITS = {"percentunit", "s", "ops", "reqps", "short", "bytes", "bool_on_off", "none"}


def dashboards() -> list[dict]:
    return [json.loads(path.read_text()) for path in FILES]


def panels(dashboard: dict) -> list[dict]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def every_panel() -> list:
    return [pytest.param(panel, id=panel["title"]) for dashboard in dashboards() for panel in panels(dashboard)]


def every_expression() -> list:
    in_panels = [
        pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")
        for dashboard in dashboards()
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]
    in_rules = [
        pytest.param(scaled(rule.expr, 1.0), id=f"{rule.name}-{i}") for i, rule in enumerate((*RECORDINGS, *ALERTS))
    ]
    return in_panels + in_rules


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", every_expression())
def test_every_name_is_promised_somewhere(expression):
    """A series is a row of the catalogue, one of the broker's that are checked against a broker, or a recording."""
    known = set(OF_SERIES) | BROKER_METRICS | RECORDED | OF_PROMETHEUS
    assert set() == {selector.name for selector in selectors(expression)} - known


@pytest.mark.parametrize("expression", every_expression())
def test_every_label_and_closed_value_exists(expression):
    """A matcher of one of our metrics names a label that the metric has, and a value that the label can take."""
    for selector in selectors(expression):
        metric = OF_SERIES.get(selector.name)
        if metric is None:
            continue
        labels = {label.name: label for label in metric.labels}
        for name, operator, value in selector.matchers:
            assert name in labels.keys() | ADDED_LABELS, (selector.name, name)
            closed = labels[name].values if name in labels else ()
            if closed and "$" not in value:
                wanted = value.split("|") if "~" in operator else [value]
                assert set(wanted) <= set(closed), (selector.name, name, value)


@pytest.mark.parametrize("expression", every_expression())
def test_every_grouping_is_a_label_of_what_is_grouped(expression):
    """`by` and `on` name labels that at least one series of the expression has."""
    there = set(ADDED_LABELS)
    for selector in selectors(expression):
        if selector.name in OF_SERIES:
            there |= set(OF_SERIES[selector.name].label_names)
        else:
            there |= BROKER_LABELS
    assert set() == groupings(expression) - there


def test_the_reader_of_names_sees_them_all():
    """The helper behind these tests finds series in ranges, joins, groupings and bare."""
    expression = (
        'sum by (a) (rate(x_total{l=~"v|w", m!="}"}[5m])) / on (b) group_left max without (c) (y offset 1d) > z'
    )
    assert ["x_total", "y", "z"] == [selector.name for selector in selectors(expression)]
    assert {"a", "b", "c"} == groupings(expression)
    assert ["up"] == [selector.name for selector in selectors("up")]


# --- structure -------------------------------------------------------------------------------------------------------


def test_there_is_a_dashboard():
    """The folder is not empty, so the tests above have something to say."""
    assert ["event-processing.json"] == [path.name for path in FILES]


@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard["uid"])
def test_a_dashboard_can_be_provisioned(dashboard):
    """A fixed uid, no id, no import inputs, not editable, in the form that Grafana writes today."""
    assert dashboard["id"] is None
    assert re.fullmatch(r"[a-z-]{1,40}", dashboard["uid"])
    assert dashboard["editable"] is False
    assert 42 == dashboard["schemaVersion"]
    assert "__inputs" not in dashboard


@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard["uid"])
def test_panels_are_laid_out_without_overlap(dashboard):
    """Ids are unique, and every panel lies within 24 columns and on nobody else."""
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= 24
    for one, other in itertools.combinations([panel["gridPos"] for panel in dashboard["panels"]], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


def test_the_data_source_knows_the_scrape_interval():
    """Where the two differ, `$__rate_interval` is too short and panels are empty."""
    assert f'scrape_interval: "{SCRAPE_INTERVAL}"' in (ROOT / "dashboards/prometheus/prometheus.yml").read_text()
    datasources = (ROOT / "dashboards/grafana/provisioning/datasources/meshkit.yaml").read_text()
    assert f'timeInterval: "{SCRAPE_INTERVAL}"' in datasources


# --- the linter's rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard["uid"])
def test_variables(dashboard):
    """template-datasource, -job, -instance, -on-time-change-reload, and that label_values asks for a promised name."""
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert ("datasource", "Data source") == (variables["datasource"]["type"], variables["datasource"]["label"])
    for name in ("job", "instance"):
        variable = variables[name]
        assert (name.capitalize(), "query", True, ".+") == tuple(
            variable[key] for key in ("label", "type", "multi", "allValue")
        )
    for variable in variables.values():
        if variable["type"] != "query":
            continue
        assert "${datasource}" == variable["datasource"]["uid"]
        assert 2 == variable["refresh"]
        call = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
        assert call, variable["query"]
        (selector,) = selectors(call[1])
        assert call[2] in set(OF_SERIES[selector.name].label_names) | ADDED_LABELS


@pytest.mark.parametrize("panel", every_panel())
def test_panel(panel):
    """panel-datasource, -title-description, -units, -no-targets; targets differ in their letter."""
    assert "${datasource}" == panel["datasource"]["uid"]
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    letters = [target["refId"] for target in panel["targets"]]
    assert letters
    assert len(set(letters)) == len(letters)
    assert {"${datasource}"} == {target["datasource"]["uid"] for target in panel["targets"]}


@pytest.mark.parametrize("panel", every_panel())
def test_rates_and_counters(panel):
    """target-rate-interval and target-counter-agg: a counter is only read as a rate or an increase."""
    for target in panel["targets"]:
        expression = target["expr"]
        for window in re.findall(r"\b(?:rate|irate)\([^\[]*\[([^\]]+)\]", expression):
            assert "$__rate_interval" == window
        for window in re.findall(r"\bincrease\([^\[]*\[([^\]]+)\]", expression):
            assert window in ("$__rate_interval", "$__range")
        bare = re.sub(r"\b(?:rate|irate|increase)\([^\[]*\[[^\]]+\]\)", "", expression)
        assert not any(selector.name.endswith("_total") for selector in selectors(bare)), bare


@pytest.mark.parametrize("panel", every_panel())
def test_job_and_instance(panel):
    """target-job and target-instance, for every series of a service.

    Left out with a reason: the broker's own series, which come from the broker's job and not from the service's, and
    ALERTS, which Prometheus makes and whose job and instance are those of whatever the alert is about.
    """
    for target in panel["targets"]:
        for selector in selectors(target["expr"]):
            if selector.name in BROKER_METRICS or selector.name == "ALERTS":
                continue
            assert {("job", "=~", "$job"), ("instance", "=~", "$instance")} <= set(selector.matchers), selector


@pytest.mark.parametrize("panel", every_panel())
def test_exemplars_are_asked_of_histograms_that_have_them(panel):
    """Where the dots of a panel open traces, its metric carries exemplars."""
    for target in panel["targets"]:
        for selector in selectors(target["expr"]) if target["exemplar"] else []:
            assert OF_SERIES[selector.name].exemplars
            assert selector.name.endswith("_bucket")
