"""The people who use the hub, and their own book of what they were told. Plain httpx: nothing of meshkit is in here."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

from learning_hub.demo.platform import Platform, ServiceError, until

COURSES = (("Sailing for beginners", 4900), ("Bread, slowly", 2900), ("The night sky", 3900))


@dataclass(slots=True)
class Told:
    """What the services said they have taken: from then on it is theirs to keep."""

    users: list[str] = field(default_factory=list)
    courses: list[str] = field(default_factory=list)
    enrollments: list[str] = field(default_factory=list)
    declined: set[str] = field(default_factory=set)
    coupons: dict[str, str] = field(default_factory=dict)
    # Cents, by course and by enrollment: what it costs without a coupon, and at most with one.
    prices: dict[str, int] = field(default_factory=dict)
    pending: int = 0


class Driver:
    """Makes users, courses and enrollments over HTTP, and asks again with the same id where no answer came.

    Args:
        platform: where the services are.
        seed: what chance goes by.
    """

    def __init__(self, platform: Platform, *, seed: int = 1) -> None:
        self.told = Told()
        self._platform = platform
        self._random = random.Random(seed)
        self._enough = asyncio.Semaphore(8)

    async def create(self, users: int) -> None:
        """Some users, and the courses; returns once course-service knows them too."""
        for title, price in COURSES:
            course = str(uuid.uuid4())
            await self._put("course-service", f"/courses/{course}", {"title": title, "price": price})
            self.told.courses.append(course)
            self.told.prices[course] = price
        for number in range(1, users + 1):
            user = str(uuid.uuid4())
            person = {"name": f"Learner {number}", "email": f"learner{number}@example.org"}
            await self._put("user-service", f"/users/{user}", person)
            self.told.users.append(user)
        for user in self.told.users:
            await until(partial(self._knows, user), within=60)

    async def enroll(
        self, count: int, *, every: float = 0.05, declined: int = 0, coupons: tuple[str, ...] = ()
    ) -> None:
        """`count` enrollments, one each `every` seconds, the first `declined` of them with a card that is refused."""
        try:
            async with asyncio.TaskGroup() as all_of_them:
                for number in range(count):
                    coupon = coupons[number % len(coupons)] if coupons else ""
                    all_of_them.create_task(self._enroll("declined" if number < declined else "4242", coupon))
                    await asyncio.sleep(every)
        except ExceptionGroup as group:
            raise group.exceptions[0] from group

    async def _enroll(self, card: str, coupon: str) -> None:
        enrollment = str(uuid.uuid4())
        wish = {
            "user_id": self._random.choice(self.told.users),
            "course_id": self._random.choice(self.told.courses),
            "card": card,
            "coupon": coupon,
        }
        async with self._enough:
            answer = await self._put("enrollment-service", f"/enrollments/{enrollment}", wish)
        self.told.enrollments.append(enrollment)
        self.told.prices[enrollment] = self.told.prices[wish["course_id"]]
        if card == "declined":
            self.told.declined.add(enrollment)
        if coupon:
            self.told.coupons[enrollment] = coupon
        if "meshkit-degraded" in answer.headers:
            self.told.pending += 1

    async def _put(self, service: str, path: str, body: dict[str, Any]) -> httpx.Response:
        deadline = time.monotonic() + 120
        while True:
            try:
                answer = await self._platform.http.put(self._platform.url(service) + path, json=body)
            except httpx.TransportError as error:
                said = type(error).__name__
            else:
                if answer.is_success:
                    return answer
                said = f"{answer.status_code} {answer.text[:200]}"
                if answer.status_code < 500:
                    raise ServiceError(f"PUT {path} of {service} was answered {said}")
            if time.monotonic() > deadline:
                raise ServiceError(f"{service} did not take PUT {path} for two minutes: {said}")
            await asyncio.sleep(0.2)

    async def _knows(self, user: str) -> bool:
        url = f"{self._platform.url('course-service')}/courses/{self.told.courses[0]}/offers/{user}"
        try:
            return (await self._platform.http.get(url)).is_success
        except httpx.TransportError:
            return False

    # -- the partner outside ------------------------------------------------------------------------------------------

    async def provider(self, behaviour: str, *, seconds: float = 1.0) -> None:
        """Tell the payment provider how to behave from now on."""
        await self._provider("PUT", "/mode", {"behaviour": behaviour, "seconds": seconds})

    async def asked(self, behaviour: str) -> int:
        """How often the provider was asked for a charge while it behaved like this, by its own book."""
        requests = (await self._provider("GET", "/requests")).json()
        return sum(request["behaviour"] == behaviour for request in requests)

    async def _provider(self, method: str, path: str, body: object = None) -> httpx.Response:
        async with asyncio.timeout(120):
            while True:
                try:
                    answer = await self._platform.http.request(
                        method, self._platform.url("payment-provider") + path, json=body
                    )
                except httpx.TransportError:
                    await asyncio.sleep(0.2)
                else:
                    return answer.raise_for_status()
