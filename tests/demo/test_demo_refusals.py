"""What the demo cannot do it says in one line, with exit code 2 and no traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from demo_runs import ROOT, demo

from learning_hub.demo.broker import CannotStart, broker
from meshkit.testing import servers

pytestmark = [pytest.mark.once, pytest.mark.timeout(60)]


def refused(*options: str, **environment: str) -> str:
    """The one line."""
    done = demo("--once", "--json", *options, **environment)
    assert (2, "") == (done.returncode, done.stdout), done.stderr
    assert 1 == len(done.stderr.splitlines()), done.stderr
    assert done.stderr.startswith("demo: ")
    return done.stderr


def test_an_unknown_option():
    """An option that there is not is named, with the way to those that there are."""
    assert "--bogus; --help lists the options" in refused("--bogus")


@pytest.mark.parametrize("url", ["rabbit", "http://127.0.0.1", "amqp://", "amqp://127.0.0.1:port/", "amqp://[::1"])
def test_a_broker_that_is_no_url(url: str):
    """What is neither `local` nor an AMQP URL is told what would be."""
    assert "amqp://" in refused("--broker", url)


def test_a_broker_that_is_not_there():
    """Nothing listens at the URL: its address is said, its password is not."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        line = refused("--broker", f"amqp://guest:secret@127.0.0.1:{taken.getsockname()[1]}/")
    assert "cannot be used" in line
    assert "secret" not in line


def test_a_broker_at_no_name():
    """What cannot be the name of a host is no traceback of the resolver."""
    assert "a..b" in refused("--broker", "amqp://a..b/")


def test_a_wrong_password(rabbitmq_server: servers.RabbitMQ):
    """The broker refuses the login: that is said, without the password."""
    line = refused("--broker", f"amqp://guest:wrong-one@127.0.0.1:{rabbitmq_server.port}/")
    assert "wrong-one" not in line


async def test_no_rabbitmq_installed(monkeypatch: pytest.MonkeyPatch):
    """`--broker local` without a rabbitmq-server names the command that installs it."""
    monkeypatch.setattr(servers, "_program", lambda server: None)
    with pytest.raises(CannotStart, match=r"^rabbitmq is not installed; \./run servers installs it$"):
        async with broker("local"):
            pass


@pytest.mark.real("rabbitmq")
async def test_a_rabbitmq_without_its_epmd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """rabbitmq-server is there and Erlang's epmd is not: that is said, and nothing of the server stays."""

    def beside(program: Path, *names: str) -> Path:
        raise servers.NotInstalledError(names[0])

    monkeypatch.setattr(servers, "_beside", beside)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CannotStart, match=r"^epmd is not installed; \./run servers installs it$"):
        async with broker("local"):
            pass
    assert [] == os.listdir(tmp_path)


@pytest.mark.parametrize(
    "url",
    ["localhost:4318", "ftp://localhost", "http://user:pass@127.0.0.1:1", "http://a..b:4318", "http://[::1"],
)
def test_an_otlp_address_that_is_none(url: str):
    """What cannot be the base of an OTLP/HTTP endpoint is told what would be."""
    assert "OTLP" in refused("--otlp", url).upper()


def test_an_otlp_endpoint_that_is_not_there():
    """Nothing listens at --otlp: better said at once than after the last act."""
    assert "nothing answers at --otlp" in refused("--otlp", "http://127.0.0.1:1")


def test_a_folder_that_is_not_empty(tmp_path):
    """--keep does not write into somebody's folder."""
    (tmp_path / "mine").touch()
    assert "empty folder" in refused("--keep", str(tmp_path))


def test_a_database_that_is_not_there():
    """A service that does not come up is named, with what it complains about; it is not tried for ever."""
    done = demo("--once", "--json", USER_SERVICE_DATABASE_URL="postgresql+asyncpg://nobody@127.0.0.1:1/none")
    assert (2, "") == (done.returncode, done.stdout)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("demo: user-service does not become ready: ")
    assert "Connect call failed" in last
    assert "Traceback" not in done.stderr


def in_shell(redirected: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the demo with its streams as a shell makes them."""
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-m", "learning_hub.demo", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "examples")},
        timeout=60,
    )


@pytest.mark.parametrize("options", [("--once",), ("--once", "--json")])
def test_a_closed_stdout(options: tuple[str, ...]):
    """Where nothing could be shown at the end, nothing begins, and that is said."""
    done = in_shell("1>&-", *options)
    assert (1, "demo: cannot write to stdout: it is closed\n") == (done.returncode, done.stderr)


def test_a_full_disk():
    """A tale that cannot be written ends at once, in one line."""
    done = in_shell("> /dev/full", "--once")
    assert (1, "demo: cannot write to stdout: No space left on device\n") == (done.returncode, done.stderr)


def test_a_reader_who_has_gone():
    """`| true`: nobody is left to be told anything, so nothing is said."""
    done = in_shell("| true", "--once")
    assert "" == done.stderr


def test_a_closed_stdin_and_stderr():
    """Nobody can press a key or read a complaint; what is refused is refused by the exit code all the same."""
    assert (2, "") == ((done := in_shell("<&- 2>&-", "--json", "--broker", "rabbit")).returncode, done.stdout)
