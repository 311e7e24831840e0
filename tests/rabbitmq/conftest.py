"""Brokers of both kinds, buses that are closed at the end, and what was told meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from bus_steps import QUICK, Broker, MakeBus, Outside

from meshkit.core.events import Event, listen
from meshkit.embedded import AmqpServer
from meshkit.rabbitmq import RabbitBus


@pytest.fixture(params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.real("rabbitmq"))])
async def broker(request: pytest.FixtureRequest) -> AsyncIterator[Broker]:
    """An empty broker, of each kind unless the test is marked `embedded`."""
    if request.param == "embedded":
        async with AmqpServer() as server:
            yield Broker(server.url, server)
    else:
        yield Broker(request.getfixturevalue("rabbitmq_url"), None)


@pytest.fixture
def server(broker: Broker) -> AmqpServer:
    """The embedded server, for tests that make it misbehave."""
    assert broker.server is not None, "mark the test with @embedded"
    return broker.server


@pytest.fixture
async def outside(broker: Broker) -> AsyncIterator[Outside]:
    """Another client of the same broker."""
    other = Outside(broker.url)
    yield other
    await other.close()


@pytest.fixture
async def make_bus(broker: Broker) -> AsyncIterator[MakeBus]:
    """Makes buses on the test's broker, with short waits; closes them at the end."""
    made: list[RabbitBus] = []

    def make(url: str | None = None, service: str = "course-service", **options: Any) -> RabbitBus:
        bus = RabbitBus(url or broker.url, service, **{"retry": QUICK, **options})
        made.append(bus)
        return bus

    yield make
    for bus in reversed(made):
        await bus.close()


@pytest.fixture
def told() -> Iterator[list[Event]]:
    """All events since the test began."""
    events: list[Event] = []
    stop = listen(events.append, kind=Event)
    yield events
    stop()
