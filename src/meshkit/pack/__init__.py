"""Makes what is drawn and what is watched from the code: dashboards, rules, server configuration, the metrics page.

`export` is for users: it writes the pack into a folder of theirs. `write` and `check` are for the repository, where
`dashboards/` and `docs/metrics.md` are committed and a test asserts that they are what the code makes.
"""

import json
from pathlib import Path

from meshkit.errors import ConfigurationError
from meshkit.pack import servers
from meshkit.pack.dashboards import DASHBOARDS, grafana_json
from meshkit.pack.metrics_page import metrics_page
from meshkit.pack.rules import rule_file
from meshkit.pack.yaml_text import yaml_text

__all__ = ["check", "export", "write"]

_HEADER = "# Made by meshkit.pack; `meshkit export` writes it anew.\n"


def export(
    folder: Path | str,
    *,
    time_scale: float = 1.0,
    grafana: str = "http://localhost:3000",
    runbooks: str = "docs/runbooks.md",
) -> tuple[Path, ...]:
    """Write dashboards, rules and server configuration into `folder`, over what stands there under the same names.

    Args:
        folder: made where it is missing. Files that are not of the pack stay.
        time_scale: what every duration in rules and intervals is multiplied by. 0.01 shows in seconds what takes
            minutes, for a demo or a test; dashboards keep their own times.
        grafana: where Grafana answers, for the links in alerts.
        runbooks: address of the page of runbooks, for the links in alerts.

    Returns:
        The files written.

    Raises:
        ConfigurationError: the scale is not above 0.
    """
    if time_scale <= 0:
        raise ConfigurationError(
            f"time_scale is {time_scale}.",
            "It is what durations are multiplied by, so above 0; 1.0 leaves them as they are.",
        )
    return _write(Path(folder), _files(time_scale=time_scale, grafana=grafana, runbooks=runbooks))


def write(repository: Path | str) -> tuple[Path, ...]:
    """Write what the repository commits: `dashboards/` and `docs/metrics.md`. Returns the files written."""
    return _write(Path(repository), _committed())


def check(repository: Path | str) -> tuple[str, ...]:
    """Which committed files differ from what the code makes, or are missing; empty where nothing drifted."""
    root = Path(repository)
    return tuple(
        name
        for name, text in _committed().items()
        if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != text
    )


def _committed() -> dict[str, str]:
    pack = _files(time_scale=1.0, grafana="http://localhost:3000", runbooks="docs/runbooks.md")
    return {**{f"dashboards/{name}": text for name, text in pack.items()}, "docs/metrics.md": metrics_page()}


def _files(*, time_scale: float, grafana: str, runbooks: str) -> dict[str, str]:
    """Every file of the pack by its path inside the folder."""
    rules = rule_file(time_scale=time_scale, grafana=grafana, runbooks=runbooks)
    documents: dict[str, object] = {
        "prometheus/prometheus.yml": servers.prometheus(time_scale=time_scale),
        "prometheus/rules/meshkit.yml": rules,
        "prometheus/targets/services.yml": servers.prometheus_targets(),
        "alertmanager/alertmanager.yml": servers.alertmanager(time_scale=time_scale),
        "otel-collector/config.yaml": servers.collector(),
        "grafana/provisioning/datasources/meshkit.yaml": servers.grafana_datasources(),
        "grafana/provisioning/dashboards/meshkit.yaml": servers.grafana_provider(),
    }
    return {
        **{name: _HEADER + yaml_text(document) for name, document in documents.items()},
        **{
            f"grafana/{name}": json.dumps(grafana_json(dashboard), indent=2, ensure_ascii=False) + "\n"
            for name, dashboard in DASHBOARDS.items()
        },
        "rabbitmq/enabled_plugins": servers.rabbitmq_plugins(),
    }


def _write(root: Path, files: dict[str, str]) -> tuple[Path, ...]:
    written = []
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return tuple(written)
