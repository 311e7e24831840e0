"""course-service: what there is to learn, for whom it is open, and who takes part.

It knows users from their events and keeps a copy of its own, so enrolling does not depend on user-service being up.
"""

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
from learning_hub.events import ContentGranted, CourseCreated, UserCreated
from learning_hub.serve import serve
from meshkit.rabbitmq import RabbitBus
from meshkit.sqlalchemy import SqlInbox, SqlOutbox

SERVICE = "course-service"


class Table(DeclarativeBase):
    pass


class Course(Table):
    __tablename__ = "courses"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    title: Mapped[str]
    price: Mapped[int]


class KnownUser(Table):
    __tablename__ = "known_users"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(index=True)
    name: Mapped[str]


class Participant(Table):
    __tablename__ = "participants"
    id: Mapped[int] = mapped_column(primary_key=True)
    course_id: Mapped[UUID] = mapped_column(index=True)
    user_id: Mapped[UUID]
    enrollment_id: Mapped[UUID]


database = Database(SERVICE, Table.metadata)
bus = RabbitBus(service=SERVICE, retry=settings.RETRY)
inbox = SqlInbox(database.sessions)
outbox = SqlOutbox(database.sessions, bus)

app = FastAPI(title=SERVICE, telemetry={"tracing": False})
meshkit.fastapi.install(app, service=SERVICE, parts=(database, bus, outbox.relay()), timeout=settings.TOTAL_TIMEOUT)


class NewCourse(BaseModel):
    title: str
    price: int


class Offer(BaseModel):
    """What a user is asked for a course; `price` is in cents."""

    course_id: UUID
    title: str
    price: int


@app.put("/courses/{course_id}", status_code=201)
async def create_course(course_id: UUID, new: NewCourse) -> dict[str, str]:
    """The id is the caller's, so that asking twice makes one course."""
    with suppress(IntegrityError):
        async with database.sessions.begin() as session:
            session.add(Course(id=course_id, title=new.title, price=new.price))
            await outbox.publish(session, CourseCreated(course_id=course_id, title=new.title))
    return {"course_id": str(course_id)}


@app.get("/courses/{course_id}/offers/{user_id}")
async def offer(course_id: UUID, user_id: UUID) -> Offer:
    async with database.sessions() as session:
        course = await session.get(Course, course_id)
        user = await session.scalar(sa.select(KnownUser.id).where(KnownUser.user_id == user_id).limit(1))
    if course is None or user is None:
        raise HTTPException(404, "there is no such course" if course is None else "there is no such user")
    return Offer(course_id=course.id, title=course.title, price=course.price)


@bus.subscribe(UserCreated, inbox=inbox)
async def on_user_created(event: UserCreated, session: AsyncSession) -> None:
    session.add(KnownUser(user_id=event.user_id, name=event.name))


@bus.subscribe(ContentGranted, inbox=inbox)
async def on_content_granted(event: ContentGranted, session: AsyncSession) -> None:
    session.add(Participant(course_id=event.course_id, user_id=event.user_id, enrollment_id=event.enrollment_id))


if __name__ == "__main__":
    serve(app, service=SERVICE)
