"""The demo, run once for each broker: every test here looks at one of these runs, because a run takes half a minute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from demo_runs import Run, keep

from meshkit.testing import servers


@pytest.fixture(scope="session")
def jaeger_of_the_run() -> Iterator[servers.Jaeger | None]:
    """A Jaeger that the run's traces are sent on to, where one is installed."""
    if servers.available()["jaeger"] is None:
        yield None
        return
    with servers.jaeger() as jaeger:
        yield jaeger


@pytest.fixture(scope="session")
def embedded_run(tmp_path_factory: pytest.TempPathFactory, jaeger_of_the_run: servers.Jaeger | None) -> Run:
    """`--once --json` on the embedded broker, with its traces sent on to Jaeger where there is one."""
    otlp = ("--otlp", jaeger_of_the_run.otlp_url) if jaeger_of_the_run is not None else ()
    return keep(tmp_path_factory.mktemp("demo") / "embedded", *otlp)


@pytest.fixture(scope="session")
def local_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same with `--broker local`."""
    return keep(tmp_path_factory.mktemp("demo") / "local", "--broker", "local")


# Which of the two a test looks at; the second is left out where there is no RabbitMQ.
BROKERS = ["embedded_run", pytest.param("local_run", marks=pytest.mark.real("rabbitmq"))]


@pytest.fixture(params=BROKERS)
def run(request: pytest.FixtureRequest) -> Run:
    found: Run = request.getfixturevalue(request.param)
    return found
