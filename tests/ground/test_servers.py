"""The real servers as meshkit.testing.servers starts them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from meshkit.testing import servers

ROOT = Path(__file__).parents[2]
START: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "rabbitmq": servers.rabbitmq,
    "prometheus": servers.prometheus,
    "alertmanager": servers.alertmanager,
    "jaeger": servers.jaeger,
    "redis": servers.redis,
    "postgresql": servers.postgresql,
    "mariadb": servers.mariadb,
}


def _each(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.real(name)) for name in names])


def _alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        # One that is dead and not yet waited for by its new parent is dead.
        return "Z" != Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return False


@pytest.mark.once
@_each(*START)
def test_a_killed_server_comes_back_where_it_was(name: str) -> None:
    """SIGKILL and a start give a new process that answers at the same address; the end takes process and folder away."""
    with START[name]() as server:
        first = server.pid
        server.kill()
        assert not server.running
        server.start()
        assert first != server.pid
        assert server.running
    assert not server.folder.exists()
    assert not _alive(server._guard.pid)


@pytest.mark.once
@_each("redis", "postgresql", "rabbitmq")
def test_a_starter_that_is_killed_leaves_nothing(name: str) -> None:
    """When the process that started a server dies by SIGKILL, the server ends and its folder goes."""
    script = (
        "import sys, time; from meshkit.testing import servers\n"
        f"with servers.{name}() as server:\n"
        "    print(*[p.pid for p in server._processes], server.folder, flush=True); time.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    *pids, folder = starter.stdout.readline().split()
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (Path(folder).exists() or any(_alive(int(pid)) for pid in pids)):
        time.sleep(0.05)
    assert [] == [pid for pid in pids if _alive(int(pid))]
    assert not Path(folder).exists()


@pytest.mark.once
@pytest.mark.real("collector")
def test_the_collector_takes_a_configuration() -> None:
    """The collector built from servers/otelcol-builder.yaml starts with a configuration and listens where it says."""
    http, health = servers.free_ports(2)
    config = f"""
extensions: {{health_check: {{endpoint: "127.0.0.1:{health}"}}}}
receivers: {{otlp: {{protocols: {{http: {{endpoint: "127.0.0.1:{http}"}}}}}}}}
exporters: {{debug: {{}}}}
service:
  extensions: [health_check]
  telemetry: {{metrics: {{level: none}}}}
  pipelines: {{traces: {{receivers: [otlp], exporters: [debug]}}}}
"""
    with servers.collector(config=config, ready_port=http) as server:
        assert server.running


def test_a_missing_server_names_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Starting what is not installed is one sentence with the command that installs it, and makes no folder."""
    monkeypatch.setattr(servers, "_program", lambda server: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(servers.NotInstalledError, match=r"^jaeger is not installed; \./run servers installs it$"):
        servers.jaeger().__enter__()
    assert [] == list(tmp_path.iterdir())


@pytest.mark.real("redis")
def test_a_server_that_does_not_start_says_why() -> None:
    """A server that ends at once gives an error with the end of its own log, and leaves nothing."""
    server = servers.Redis()
    server.port = 99999
    try:
        with pytest.raises(servers.NotReadyError, match="ended with exit code 1 before it was ready"):
            server.start()
    finally:
        server.close()
    assert not server.folder.exists()


def test_ports_stay_out_of_the_way_of_outgoing_connections() -> None:
    """Free ports are different ones, below those that the system gives to outgoing connections."""
    ports = servers.free_ports(20)
    assert 20 == len(set(ports))
    assert max(ports) < 61_000


def test_the_installer_finds_what_the_tests_find() -> None:
    """`./run servers --check` names the same servers as there and as missing that meshkit.testing.servers does, and installs nothing."""
    done = subprocess.run(
        ["sh", ROOT / "servers" / "install.sh", "--check"], capture_output=True, text=True, check=False
    )
    there = set(re.findall(r"^servers: (\w+): /", done.stderr, flags=re.MULTILINE))
    assert {name for name, program in servers.available().items() if program is not None} == there
    assert (0 if len(there) == len(servers.available()) else 3) == done.returncode


def test_the_installer_refuses_what_it_does_not_know() -> None:
    """An unknown option is one line and exit code 2."""
    done = subprocess.run(["sh", ROOT / "servers" / "install.sh", "--all"], capture_output=True, text=True, check=False)
    assert (2, "servers: unknown option --all (there is only --check)\n") == (done.returncode, done.stderr)
