"""user-service: who there is, and what each of them was told."""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

import sqlalchemy as sa
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import meshkit
from learning_hub import settings
from learning_hub.database import Database
from learning_hub.events import NotificationSent, UserCreated
from learning_hub.serve import serve
from meshkit.rabbitmq import RabbitBus
from meshkit.sqlalchemy import SqlInbox, SqlOutbox

SERVICE = "user-service"


class Table(DeclarativeBase):
    pass


class User(Table):
    __tablename__ = "users"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]


class Notice(Table):
    __tablename__ = "notices"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(index=True)
    enrollment_id: Mapped[UUID]
    kind: Mapped[str]


database = Database(SERVICE, Table.metadata)
bus = RabbitBus(service=SERVICE, retry=settings.RETRY)
inbox = SqlInbox(database.sessions)
outbox = SqlOutbox(database.sessions, bus)

app = FastAPI(title=SERVICE, telemetry={"tracing": False})
meshkit.fastapi.install(app, service=SERVICE, parts=(database, bus, outbox.relay()), timeout=settings.TOTAL_TIMEOUT)


class NewUser(BaseModel):
    name: str
    email: str


@app.put("/users/{user_id}", status_code=201)
async def create_user(user_id: UUID, new: NewUser) -> dict[str, str]:
    """The id is the caller's, so that asking twice makes one user."""
    with suppress(IntegrityError):
        # Where there is one already, row and event are rolled back together; two requests at once are told apart too.
        async with database.sessions.begin() as session:
            session.add(User(id=user_id, name=new.name, email=new.email))
            await outbox.publish(session, UserCreated(user_id=user_id, name=new.name, email=new.email))
    return {"user_id": str(user_id)}


@app.get("/users/{user_id}/notices")
async def notices(user_id: UUID) -> list[dict[str, str]]:
    async with database.sessions() as session:
        if await session.get(User, user_id) is None:
            raise HTTPException(404, "there is no such user")
        found = await session.scalars(sa.select(Notice).where(Notice.user_id == user_id).order_by(Notice.id))
        return [{"enrollment_id": str(notice.enrollment_id), "kind": notice.kind} for notice in found]


@bus.subscribe(NotificationSent, inbox=inbox)
async def on_notification_sent(event: NotificationSent, session: AsyncSession) -> None:
    session.add(Notice(user_id=event.user_id, enrollment_id=event.enrollment_id, kind=event.kind))


if __name__ == "__main__":
    serve(app, service=SERVICE)
