"""notification-content-worker: opens the content that was paid for, and tells people. It has no web app."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import meshkit
from learning_hub import settings
from learning_hub.database import Database
from learning_hub.events import (
    ContentGranted,
    CourseCreated,
    EnrollmentRequested,
    NotificationSent,
    PaymentCompleted,
    PaymentRefused,
)
from meshkit.rabbitmq import RabbitBus
from meshkit.sqlalchemy import SqlInbox, SqlOutbox

SERVICE = "notification-content-worker"


class Table(DeclarativeBase):
    pass


class Content(Table):
    __tablename__ = "contents"
    id: Mapped[int] = mapped_column(primary_key=True)
    course_id: Mapped[UUID] = mapped_column(index=True)
    title: Mapped[str]


class Grant(Table):
    __tablename__ = "content_grants"
    id: Mapped[int] = mapped_column(primary_key=True)
    enrollment_id: Mapped[UUID] = mapped_column(index=True)
    user_id: Mapped[UUID]
    course_id: Mapped[UUID]


class Notification(Table):
    __tablename__ = "notifications"
    id: Mapped[int] = mapped_column(primary_key=True)
    enrollment_id: Mapped[UUID] = mapped_column(index=True)
    user_id: Mapped[UUID]
    kind: Mapped[str]


database = Database(SERVICE, Table.metadata)
bus = RabbitBus(service=SERVICE, retry=settings.RETRY)
inbox = SqlInbox(database.sessions)
outbox = SqlOutbox(database.sessions, bus)


@bus.subscribe(CourseCreated, inbox=inbox)
async def on_course_created(event: CourseCreated, session: AsyncSession) -> None:
    session.add(Content(course_id=event.course_id, title=event.title))


@bus.subscribe(EnrollmentRequested, inbox=inbox)
async def on_enrollment_requested(event: EnrollmentRequested, session: AsyncSession) -> None:
    await _notify(session, event, "requested")


@bus.subscribe(PaymentCompleted, inbox=inbox)
async def on_payment_completed(event: PaymentCompleted, session: AsyncSession) -> None:
    ids = {"enrollment_id": event.enrollment_id, "user_id": event.user_id, "course_id": event.course_id}
    session.add(Grant(**ids))
    await outbox.publish(session, ContentGranted(**ids))
    await _notify(session, event, "completed")


@bus.subscribe(PaymentRefused, inbox=inbox)
async def on_payment_refused(event: PaymentRefused, session: AsyncSession) -> None:
    await _notify(session, event, "refused")


async def _notify(
    session: AsyncSession,
    event: EnrollmentRequested | PaymentCompleted | PaymentRefused,
    kind: Literal["requested", "completed", "refused"],
) -> None:
    session.add(Notification(enrollment_id=event.enrollment_id, user_id=event.user_id, kind=kind))
    await outbox.publish(session, NotificationSent(enrollment_id=event.enrollment_id, user_id=event.user_id, kind=kind))


if __name__ == "__main__":
    meshkit.telemetry.setup(service=SERVICE)
    meshkit.worker.run(database, bus, outbox.relay(), service=SERVICE, port=settings.port_of(SERVICE))
