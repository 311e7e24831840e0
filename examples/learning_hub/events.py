"""The events that the services tell each other: the one thing all of them share."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from pydantic import BaseModel

from meshkit import event


@event("user.created", exchange="user-events", version=1)
class UserCreated(BaseModel):
    user_id: UUID
    name: str
    email: str


@event("course.created", exchange="course-events", version=1)
class CourseCreated(BaseModel):
    course_id: UUID
    title: str


@event("enrollment.requested", exchange="enrollment-events", version=1)
class EnrollmentRequested(BaseModel):
    """Somebody wants to take a course. `price` is in cents, before the coupon."""

    enrollment_id: UUID
    user_id: UUID
    course_id: UUID
    price: int
    card: str
    coupon: str = ""


@event("payment.completed", exchange="payment-events", version=1)
class PaymentCompleted(BaseModel):
    enrollment_id: UUID
    user_id: UUID
    course_id: UUID
    paid: int


@event("payment.refused", exchange="payment-events", version=1)
class PaymentRefused(BaseModel):
    """The provider's last word: trying again would not help."""

    enrollment_id: UUID
    user_id: UUID
    reason: str


@event("content.granted", exchange="content-events", version=1)
class ContentGranted(BaseModel):
    enrollment_id: UUID
    user_id: UUID
    course_id: UUID


@event("notification.sent", exchange="notification-events", version=1)
class NotificationSent(BaseModel):
    enrollment_id: UUID
    user_id: UUID
    kind: Literal["requested", "completed", "refused"]
