"""Requests with an id of the caller's that come twice, and news of a payment that comes too late: one service in the process."""

from __future__ import annotations

import asyncio
import importlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from meshkit.sqlalchemy import create_tables, outbox_table, tuned
from meshkit.testing import servers

pytestmark = [pytest.mark.timeout(60)]


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=[pytest.mark.real("postgresql")])])
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path / 'service.db'}"
    else:
        server: servers.PostgreSQL = request.getfixturevalue("postgresql_server")
        url = server.url_of(server.new_database(), driver="asyncpg")
    engine = tuned(create_async_engine(url))
    yield engine
    await engine.dispose()


@pytest.fixture
async def service(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Awaitable[ModuleType]]:
    """A service's module, with its tables in the database of this test; its outbox is written and not published."""

    async def prepared(name: str) -> ModuleType:
        module = importlib.import_module(f"learning_hub.{name}")
        monkeypatch.setattr(module.database, "sessions", async_sessionmaker(engine, expire_on_commit=False))
        async with engine.begin() as connection:
            await connection.run_sync(module.Table.metadata.create_all)
        await create_tables(engine)
        return module

    return prepared


async def put_at_once(app: FastAPI, path: str, body: dict[str, object], times: int = 5) -> list[httpx.Response]:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        return await asyncio.gather(*(client.put(path, json=body) for _ in range(times)))


async def rows(engine: AsyncEngine, table: sa.Table) -> int:
    async with engine.connect() as connection:
        return (await connection.scalar(sa.select(sa.func.count()).select_from(table))) or 0


@pytest.mark.parametrize(
    ("name", "path", "body", "table"),
    [
        ("user_service", "users", {"name": "Learner", "email": "learner@example.org"}, "users"),
        ("course_service", "courses", {"title": "Sailing", "price": 4900}, "courses"),
    ],
)
async def test_equal_requests_at_once_make_one(
    service: Callable[[str], Awaitable[ModuleType]],
    engine: AsyncEngine,
    name: str,
    path: str,
    body: dict[str, object],
    table: str,
):
    """Five equal requests at once are all answered 201; there is one row, and one event in the outbox."""
    module = await service(name)
    answers = await put_at_once(module.app, f"/{path}/{uuid.uuid4()}", body)
    assert [201] * 5 == [answer.status_code for answer in answers]
    assert (1, 1) == (await rows(engine, module.Table.metadata.tables[table]), await rows(engine, outbox_table))


async def test_equal_enrollments_at_once_make_one(
    service: Callable[[str], Awaitable[ModuleType]], engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
):
    """Five equal enrollments at once are one; asked again later, the answer has the state it has come to by then."""
    module = await service("enrollment_service")
    offers = httpx.MockTransport(lambda request: httpx.Response(200, json={"price": 4900}))
    wish = {"user_id": str(uuid.uuid4()), "course_id": str(uuid.uuid4()), "card": "4242"}
    enrollment = uuid.uuid4()
    async with httpx.AsyncClient(transport=offers, base_url="http://others") as others:
        monkeypatch.setattr(module, "courses", others)
        monkeypatch.setattr(module, "payments", others)
        answers = await put_at_once(module.app, f"/enrollments/{enrollment}", wish)
        assert [(202, "pending")] * 5 == [(answer.status_code, answer.json()["state"]) for answer in answers]
        assert (1, 1) == (await rows(engine, module.Enrollment.__table__), await rows(engine, outbox_table))
        async with module.database.sessions.begin() as session:
            await module._move(session, enrollment, "completed", "paid 49.00")
        (again,) = await put_at_once(module.app, f"/enrollments/{enrollment}", wish, times=1)
        assert (202, "completed") == (again.status_code, again.json()["state"])


async def test_a_late_refusal_changes_nothing(service: Callable[[str], Awaitable[ModuleType]]):
    """What was completed stays completed; that a refusal was heard of is noted."""
    module = await service("enrollment_service")
    ids = {"id": uuid.uuid4(), "user_id": uuid.uuid4(), "course_id": uuid.uuid4()}
    async with module.database.sessions.begin() as session:
        session.add(module.Enrollment(**ids, state="pending"))
    for state in ("completed", "compensated"):
        async with module.database.sessions.begin() as session:
            await module._move(session, ids["id"], state, "")
    async with module.database.sessions() as session:
        assert "completed" == (await session.get(module.Enrollment, ids["id"])).state
        assert ["completed", "compensated"] == list(
            await session.scalars(sa.select(module.Step.state).order_by(module.Step.id))
        )
