"""Ctrl-C, as a terminal sends it; `./run proof ctrl_c` does the same at more moments."""

from __future__ import annotations

import pytest

from proofs.ctrl_c import interrupted

pytestmark = [pytest.mark.once, pytest.mark.timeout(100)]


@pytest.mark.parametrize(
    ("moment", "options", "line", "wait"),
    [
        ("while the services start", [], "learning hub:", 0.4),
        ("in normal traffic", [], "Act 1", 0.4),
        pytest.param("while RabbitMQ starts", ["--broker", "local"], "", 2.5, marks=pytest.mark.real("rabbitmq")),
    ],
)
def test_ctrl_c_leaves_nothing_behind(moment: str, options: list[str], line: str, wait: float):
    """No process, port or file is left, the exit code is 130, and a second Ctrl-C changes nothing."""
    seen = interrupted(moment, options, line, wait, leave=False)
    assert (130, False, [], [], []) == tuple(seen[key] for key in ("exit", "traceback", "processes", "ports", "files"))


def test_a_killed_demo_is_taken_away_by_its_guard():
    """SIGKILL, which nobody can answer: services and folder are gone a moment later all the same."""
    seen = interrupted("killed", [], "Act 1", 0.2, leave=True)
    assert seen["processes"]
    assert (-9, True) == (seen["exit"], seen["gone_after_a_while"])
