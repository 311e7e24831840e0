"""What every folder of tests shares: the real servers, and two habits that no test may break.

A test that wants a real server takes a fixture (``rabbitmq_server``, ``rabbitmq_url``, ``jaeger_server``, …) or, where it kills or
configures one of its own, starts it from ``meshkit.testing.servers`` under ``@pytest.mark.real("rabbitmq")``. Where the server is not
installed the test is left out and the run ends by naming it; with ``MESHKIT_REQUIRE_REAL=1`` it fails instead.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

import pytest

from meshkit.testing import servers

S = TypeVar("S", bound=servers.Server)

_SERVER_OF_FIXTURE = {
    "rabbitmq_server": "rabbitmq",
    "rabbitmq_url": "rabbitmq",
    "prometheus_server": "prometheus",
    "alertmanager_server": "alertmanager",
    "jaeger_server": "jaeger",
    "redis_server": "redis",
    "postgresql_server": "postgresql",
    "postgresql_url": "postgresql",
    "mariadb_server": "mariadb",
    "mariadb_url": "mariadb",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real(*servers): needs these real servers; left out where one is not installed")
    config.addinivalue_line(
        "markers", "once: runs on one Python only, because the version makes no difference or it is long"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        wanted = sorted({_SERVER_OF_FIXTURE[name] for name in item.fixturenames if name in _SERVER_OF_FIXTURE})
        if wanted:
            item.add_marker(pytest.mark.real(*wanted))
        if inspect.iscoroutinefunction(item.function) and "no_leaked_tasks" not in item.fixturenames:
            # First in, so last out: what other fixtures start is theirs to end before it is counted.
            item.fixturenames.insert(0, "no_leaked_tasks")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("real"):
        for name in marker.args:
            _require(name)


# --- real servers ----------------------------------------------------------------------------------------------------------------


def _require(server: str) -> None:
    if servers.available()[server] is not None:
        return
    reason = f"{server} (not installed; ./run servers)"
    if os.environ.get("MESHKIT_REQUIRE_REAL", "") not in ("", "0"):
        pytest.fail(f"MESHKIT_REQUIRE_REAL is set, and this is not here: {reason}", pytrace=False)
    pytest.skip(reason)


def _real(name: str, server: AbstractContextManager[S]) -> Iterator[S]:
    _require(name)
    with server as started:
        yield started


@pytest.fixture(scope="session")
def rabbitmq_server() -> Iterator[servers.RabbitMQ]:
    """One RabbitMQ for the whole run; a test that kills it or needs settings starts its own."""
    yield from _real("rabbitmq", servers.rabbitmq())


@pytest.fixture
def rabbitmq_url(rabbitmq_server: servers.RabbitMQ) -> Iterator[str]:
    """An empty virtual host on the run's RabbitMQ, gone after the test: names of queues and exchanges never meet."""
    vhost = f"test-{uuid.uuid4().hex[:12]}"
    rabbitmq_server.api(f"/api/vhosts/{vhost}", method="PUT", body={})
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    rabbitmq_server.api(f"/api/permissions/{vhost}/guest", method="PUT", body=everything)
    yield f"amqp://guest:guest@127.0.0.1:{rabbitmq_server.port}/{vhost}"
    rabbitmq_server.api(f"/api/vhosts/{vhost}", method="DELETE")


@pytest.fixture(scope="session")
def prometheus_server() -> Iterator[servers.Prometheus]:
    """One Prometheus that scrapes nothing; a test with rules or targets starts its own."""
    yield from _real("prometheus", servers.prometheus())


@pytest.fixture(scope="session")
def alertmanager_server() -> Iterator[servers.Alertmanager]:
    """One Alertmanager that tells nobody; a test with routes starts its own."""
    yield from _real("alertmanager", servers.alertmanager())


@pytest.fixture(scope="session")
def jaeger_server() -> Iterator[servers.Jaeger]:
    """One Jaeger for the whole run: traces of different tests differ by their trace ids and service names."""
    yield from _real("jaeger", servers.jaeger())


@pytest.fixture(scope="session")
def redis_server() -> Iterator[servers.Redis]:
    """One Redis for the whole run; keys need a prefix of the test's own."""
    yield from _real("redis", servers.redis())


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[servers.PostgreSQL]:
    """One PostgreSQL for the whole run."""
    yield from _real("postgresql", servers.postgresql())


@pytest.fixture
def postgresql_url(postgresql_server: servers.PostgreSQL) -> str:
    """SQLAlchemy's address of an empty database on the run's PostgreSQL, with asyncpg."""
    return postgresql_server.url_of(postgresql_server.new_database(), driver="asyncpg")


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[servers.MariaDB]:
    """One MariaDB for the whole run."""
    yield from _real("mariadb", servers.mariadb())


@pytest.fixture
def mariadb_url(mariadb_server: servers.MariaDB) -> str:
    """SQLAlchemy's address of an empty database on the run's MariaDB, with aiomysql."""
    return mariadb_server.url_of(mariadb_server.new_database(), driver="aiomysql")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was left out, with the number of tests; say nothing where all ran."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            reasons[re.sub("^Skipped: ", "", str(report.longrepr[2]))] += 1
    if not reasons:
        return
    terminalreporter.section("left out")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"left out: {reason} – {count} {'test' if count == 1 else 'tests'}")


# --- habits ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def no_leaked_tasks() -> AsyncIterator[None]:
    """Fails an async test that leaves a task running behind; added to each of them at collection."""
    before = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        # What was cancelled, or is about to end by itself, gets the time to.
        _, left = await asyncio.wait(left, timeout=0.5)
    if left:
        names = "\n".join(f"  {task!r}" for task in left)
        pytest.fail(f"{len(left)} left running after the test:\n{names}", pytrace=False)
