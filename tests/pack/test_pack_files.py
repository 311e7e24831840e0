"""What the pack writes: the committed files, an export of a user's own, and the YAML it makes."""

import re
from pathlib import Path

import pytest
import yaml

from meshkit import pack
from meshkit.errors import ConfigurationError
from meshkit.pack.rules import ALERTS, RECORDINGS, scaled
from meshkit.pack.yaml_text import yaml_text

ROOT = Path(__file__).parents[2]


def test_what_is_committed_is_what_the_code_makes():
    """`dashboards/` and `docs/metrics.md` have not drifted from catalogue and pack."""
    assert () == pack.check(ROOT)


def test_a_change_by_hand_is_drift(tmp_path):
    """A committed file that was edited, or is missing, is named."""
    written = pack.write(tmp_path)
    assert () == pack.check(tmp_path)
    written[0].write_text("edited\n")
    (tmp_path / "docs/metrics.md").unlink()
    assert (written[0].relative_to(tmp_path).as_posix(), "docs/metrics.md") == pack.check(tmp_path)


def test_nothing_generated_is_left_over():
    """Every file below `dashboards/`, the tests of the rules apart, is one that the pack makes."""
    made = {path.relative_to(ROOT) for path in pack_files()}
    there = {path.relative_to(ROOT) for path in (ROOT / "dashboards").rglob("*") if path.is_file()}
    assert {path for path in there if path.parent.name != "tests"} == {
        path for path in made if path.parts[0] == "dashboards"
    }


def pack_files() -> list[Path]:
    return [ROOT / name for name in pack._committed()]


def test_an_export_keeps_what_else_is_in_the_folder(tmp_path):
    """Files of a user's own stay, those of the pack are replaced."""
    own = tmp_path / "prometheus/rules/ours.yml"
    own.parent.mkdir(parents=True)
    own.write_text("groups: []\n")
    (tmp_path / "prometheus/rules/meshkit.yml").write_text("old\n")
    pack.export(tmp_path)
    assert "groups: []\n" == own.read_text()
    assert "MeshkitDLQGrowing" in (tmp_path / "prometheus/rules/meshkit.yml").read_text()


def test_an_export_says_where_its_links_lead(tmp_path):
    """The links in alerts begin with the addresses given."""
    pack.export(tmp_path, grafana="https://grafana.example", runbooks="https://wiki.example/meshkit")
    (group,) = yaml.safe_load((tmp_path / "prometheus/rules/meshkit.yml").read_text())["groups"]
    annotations = group["rules"][1]["annotations"]
    assert "https://wiki.example/meshkit#meshkitdlqgrowing" == annotations["runbook_url"]
    assert annotations["dashboard_url"].startswith("https://grafana.example/d/meshkit-events?")


@pytest.mark.parametrize("scale", [0, -1.0])
def test_a_time_scale_that_cannot_be_is_refused(tmp_path, scale):
    """A scale must be above 0."""
    with pytest.raises(ConfigurationError, match="above 0"):
        pack.export(tmp_path, time_scale=scale)


def test_durations_shrink_with_the_scale():
    """Ranges, offsets and numbers of seconds follow the scale; the text around them stays."""
    text = "x[<10m>] offset <1d> > <5m in seconds> and y < 3"
    assert "x[10m] offset 1d > 300 and y < 3" == scaled(text, 1.0)
    assert "x[6000ms] offset 864000ms > 3 and y < 3" == scaled(text, 0.01)


def test_no_alert_holds_a_duration_that_would_not_scale():
    """A duration written without angle brackets would stay hours in a demo of seconds."""
    for rule in (*RECORDINGS, *ALERTS):
        assert not re.search(r"(\[|offset )[0-9]", rule.expr), rule.name


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1, "b": [1, 2.5, True, None], "c": {}, "d": []},
        {"text": "yes", "number": "1", "empty": "", "colon": "a: b", "quote": '"', "dash": "- a", "null": "null"},
        [{"a": [[1, 2], {"b": "x\n  y\nz"}]}, "plain", ["x"]],
        {"on": "${env:X:-y}", "template": "{{ $labels.queue }}", "star": "*", "unicode": "é"},
    ],
)
def test_yaml_reads_back_as_it_was(value):
    """Our small writer and a real YAML parser agree."""
    assert value == yaml.safe_load(yaml_text(value))
