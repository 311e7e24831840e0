"""payment-service: charges what was enrolled for, at a provider that has its own ups and downs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from fastapi import FastAPI
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import meshkit
from learning_hub import settings
from learning_hub.database import Database
from learning_hub.events import EnrollmentRequested, PaymentCompleted, PaymentRefused
from learning_hub.pricing import RELEASE, discounted
from learning_hub.serve import serve
from meshkit import CircuitBreaker
from meshkit.rabbitmq import Delivery, RabbitBus
from meshkit.sqlalchemy import SqlInbox, SqlOutbox

SERVICE = "payment-service"


class Table(DeclarativeBase):
    pass


class Payment(Table):
    __tablename__ = "payments"
    id: Mapped[int] = mapped_column(primary_key=True)
    enrollment_id: Mapped[UUID] = mapped_column(index=True)
    amount: Mapped[int]
    outcome: Mapped[str]


database = Database(SERVICE, Table.metadata)
bus = RabbitBus(service=SERVICE, retry=settings.RETRY)
inbox = SqlInbox(database.sessions)
outbox = SqlOutbox(database.sessions, bus)
provider = meshkit.httpx.client(
    "payment-provider",
    base_url=settings.url_of("payment-provider"),
    timeout=settings.TOTAL_TIMEOUT,
    attempt_timeout=settings.ATTEMPT_TIMEOUT,
    breaker=CircuitBreaker("payment-provider", open_for=settings.BREAKER_OPEN_FOR),
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with provider:
        yield


app = FastAPI(title=SERVICE, version=RELEASE, lifespan=lifespan, telemetry={"tracing": False})
meshkit.fastapi.install(app, service=SERVICE, parts=(database, bus, outbox.relay()), timeout=settings.TOTAL_TIMEOUT)


@app.get("/payment-methods")
async def payment_methods() -> list[str]:
    """What one can pay with now, as the provider says."""
    methods: list[str] = (await provider.get("/methods")).raise_for_status().json()
    return methods


@bus.subscribe(EnrollmentRequested)
async def on_enrollment_requested(event: EnrollmentRequested, delivery: Delivery) -> None:
    """Charge, then record and tell in one transaction.

    No transaction waits for the provider. Killed in between, the message comes again, and the idempotency key makes the
    second charge the answer to the first.
    """
    amount = discounted(event.price, event.coupon)
    answer = await provider.post(
        "/charges",
        headers={"Idempotency-Key": str(event.enrollment_id)},
        json={"reference": str(event.enrollment_id), "amount": amount, "card": event.card},
    )
    refused = answer.status_code == 402
    if not refused:
        answer.raise_for_status()
    async with inbox.open(delivery) as session:
        outcome = "refused" if refused else "charged"
        session.add(Payment(enrollment_id=event.enrollment_id, amount=amount, outcome=outcome))
        ids = {"enrollment_id": event.enrollment_id, "user_id": event.user_id}
        if refused:
            await outbox.publish(session, PaymentRefused(**ids, reason=answer.json()["reason"]))
        else:
            await outbox.publish(session, PaymentCompleted(**ids, course_id=event.course_id, paid=amount))


if __name__ == "__main__":
    serve(app, service=SERVICE, version=RELEASE)
