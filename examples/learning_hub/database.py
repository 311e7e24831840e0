"""A service's own database, as a part of its life: tables at the start, connections closed at the end."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from learning_hub.settings import database_of
from meshkit import Check
from meshkit.sqlalchemy import create_tables, tuned


class Database:
    """Engine and sessions of one service.

    Args:
        service: whose it is.
        tables: what to make where it is missing; inbox and outbox come with them.
    """

    name = "database"

    def __init__(self, service: str, tables: sa.MetaData) -> None:
        self.engine = tuned(create_async_engine(database_of(service)))
        self.sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        self._tables = tables
        self._ready = False

    async def start(self) -> None:
        async with self.engine.begin() as connection:
            await connection.run_sync(self._tables.create_all)
        await create_tables(self.engine)
        self._ready = True

    def checks(self) -> Sequence[Check]:
        return [Check(name=self.name, ok=self._ready)]

    async def drain(self, grace: float) -> None:
        """Nothing to give back: a transaction is part of the request or message that it serves."""

    async def close(self) -> None:
        await self.engine.dispose()
