"""An empty database of each kind, with the tables of inbox and outbox."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sql_steps import RecordingBus, Sessions, effects
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from meshkit.sqlalchemy import create_tables, tuned


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.real("postgresql")),
        pytest.param("mariadb", marks=pytest.mark.real("mariadb")),
    ]
)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """SQLAlchemy's address of an empty database."""
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path}/service.db"
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
async def engine(database: str) -> AsyncIterator[AsyncEngine]:
    engine = tuned(create_async_engine(database))
    await create_tables(engine)
    async with engine.begin() as connection:
        await connection.run_sync(effects.metadata.create_all)
    yield engine
    await engine.dispose()


@pytest.fixture
def sessions(engine: AsyncEngine) -> Sessions:
    return async_sessionmaker(engine, expire_on_commit=False)


@pytest.fixture
def bus() -> RecordingBus:
    return RecordingBus()
