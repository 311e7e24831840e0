"""enrollment-service: takes enrollments, and follows each until it is completed or compensated."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal
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
from learning_hub.events import EnrollmentRequested, PaymentCompleted, PaymentRefused
from learning_hub.serve import serve
from meshkit import Fallback, Pipeline
from meshkit.rabbitmq import RabbitBus
from meshkit.sqlalchemy import SqlInbox, SqlOutbox

SERVICE = "enrollment-service"
State = Literal["pending", "completed", "compensated"]


class Table(DeclarativeBase):
    pass


class Enrollment(Table):
    __tablename__ = "enrollments"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID]
    course_id: Mapped[UUID]
    state: Mapped[State] = mapped_column(sa.String(20))


class Step(Table):
    """What was heard of an enrollment's payment, in order: also what came too late to change anything."""

    __tablename__ = "enrollment_steps"
    id: Mapped[int] = mapped_column(primary_key=True)
    enrollment_id: Mapped[UUID] = mapped_column(index=True)
    state: Mapped[str]
    because: Mapped[str]


database = Database(SERVICE, Table.metadata)
bus = RabbitBus(service=SERVICE, retry=settings.RETRY)
inbox = SqlInbox(database.sessions)
outbox = SqlOutbox(database.sessions, bus)
courses = meshkit.httpx.client(
    "course-service",
    base_url=settings.url_of("course-service"),
    timeout=settings.TOTAL_TIMEOUT,
    attempt_timeout=settings.ATTEMPT_TIMEOUT,
)
payments = meshkit.httpx.client(
    "payment-service",
    base_url=settings.url_of("payment-service"),
    timeout=settings.TOTAL_TIMEOUT,
    attempt_timeout=settings.ATTEMPT_TIMEOUT,
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with courses, payments:
        yield


app = FastAPI(title=SERVICE, lifespan=lifespan, telemetry={"tracing": False})
meshkit.fastapi.install(app, service=SERVICE, parts=(database, bus, outbox.relay()), timeout=settings.TOTAL_TIMEOUT)


class NewEnrollment(BaseModel):
    user_id: UUID
    course_id: UUID
    card: str
    coupon: str = ""


class Accepted(BaseModel):
    enrollment_id: UUID
    state: State
    message: str


@app.put("/enrollments/{enrollment_id}", status_code=202)
async def enroll(enrollment_id: UUID, new: NewEnrollment) -> Accepted:
    """The id is the caller's, so that asking twice enrolls once."""
    answer = await courses.get(f"/courses/{new.course_id}/offers/{new.user_id}")
    if answer.status_code == 404:
        raise HTTPException(404, answer.json()["detail"])
    price = answer.raise_for_status().json()["price"]
    at_once = await takes_payments()
    enrollment = Enrollment(id=enrollment_id, user_id=new.user_id, course_id=new.course_id, state="pending")
    try:
        async with database.sessions.begin() as session:
            # Enrollment and event are one transaction: there is never one without the other.
            session.add(enrollment)
            await outbox.publish(
                session, EnrollmentRequested(enrollment_id=enrollment_id, price=price, **new.model_dump())
            )
    except IntegrityError:
        # Asked for before, or by two requests at once.
        async with database.sessions() as session:
            enrollment = await session.get_one(Enrollment, enrollment_id)
    message = "you will hear from us in a moment" if at_once else "enrollment pending: we charge your card later"
    return Accepted(enrollment_id=enrollment_id, state=enrollment.state, message=message)


@Pipeline("takes-payments", Fallback(answer=False, name="enrollment-pending"))
async def takes_payments() -> bool:
    """Whether a payment would go through now. Where nobody can say, we enroll all the same and charge later."""
    answer = await payments.get("/payment-methods")
    return bool(answer.raise_for_status().json())


@app.get("/enrollments/{enrollment_id}")
async def enrollment_state(enrollment_id: UUID) -> dict[str, str]:
    async with database.sessions() as session:
        enrollment = await session.get(Enrollment, enrollment_id)
    if enrollment is None:
        raise HTTPException(404, "there is no such enrollment")
    return {"enrollment_id": str(enrollment_id), "state": enrollment.state}


@bus.subscribe(PaymentCompleted, inbox=inbox)
async def on_payment_completed(event: PaymentCompleted, session: AsyncSession) -> None:
    await _move(session, event.enrollment_id, "completed", f"paid {event.paid / 100:.2f}")


@bus.subscribe(PaymentRefused, inbox=inbox)
async def on_payment_refused(event: PaymentRefused, session: AsyncSession) -> None:
    """The compensation: what was promised is taken back."""
    await _move(session, event.enrollment_id, "compensated", event.reason)


async def _move(session: AsyncSession, enrollment_id: UUID, state: State, because: str) -> None:
    # The first word holds: nothing leads out of completed or compensated.
    pending = sa.and_(Enrollment.id == enrollment_id, Enrollment.state == "pending")
    await session.execute(sa.update(Enrollment).where(pending).values(state=state))
    session.add(Step(enrollment_id=enrollment_id, state=state, because=because))


if __name__ == "__main__":
    serve(app, service=SERVICE)
