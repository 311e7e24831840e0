"""Ctrl-C, as a terminal sends it (`./run proof ctrl_c` does the same at more moments), and a broker that dies."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from learning_hub.demo import show
from meshkit.testing import servers
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


@pytest.mark.real("rabbitmq")
async def test_a_broker_that_dies_breaks_the_story_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """RabbitMQ is killed once people have enrolled: one line says so, the exit code is 1, and nothing stays."""
    started: list[int] = []

    class Killed(show.Show):
        async def acts(self) -> None:
            await self.driver.create(1)
            started.extend(p.running.pid for p in self.platform.processes.values() if p.running is not None)
            server.kill()
            await self.dead_letters()

    monkeypatch.setattr(show, "Show", Killed)
    with servers.rabbitmq() as server:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

        @contextlib.asynccontextmanager
        async def ours(choice: str) -> AsyncIterator[tuple[str, str]]:
            yield choice, server.url

        monkeypatch.setattr(show, "broker", ours)
        options = argparse.Namespace(broker="local", otlp=None, keep=None, json=False, once=True)
        assert 1 == await show.show(options)
    tale = capsys.readouterr()
    assert 1 == tale.out.count("the story broke off: MK102 the broker at ")
    assert "Traceback" not in tale.err
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process, signal.SIG_DFL)
    assert [] == os.listdir(tmp_path)
