"""The books, held against each other: what people were told, the services' tables, and the provider's own list.

Nothing in here was written by meshkit. The tables count effects without a unique key that would hide a second one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from learning_hub.demo.driver import Told
from learning_hub.demo.platform import Platform


@dataclass(slots=True)
class Books:
    """What the tables and the provider hold of what was accepted, each by the id it is about."""

    states: dict[str, str] = field(default_factory=dict)
    # What happened, and how often: ("content granted", enrollment id) → 1.
    effects: Counter[tuple[str, str]] = field(default_factory=Counter)

    def any_of(self, whats: Iterable[str], id_: str) -> bool:
        """Whether at least one of these has happened to `id_`."""
        return any(self.effects[what, id_] for what in whats)


async def read(platform: Platform, told: Told) -> Books:
    """Read every table, and the provider's list of charges."""
    tables = {name: await _rows(platform.databases[name], _QUERIES[name]) for name in _QUERIES}
    charges = await _rows(f"sqlite+aiosqlite:///{platform.folder / 'payment-provider.db'}", {"charged": _CHARGES})
    mine = {*told.users, *told.courses, *told.enrollments}
    books = Books()
    for found in (*tables.values(), charges):
        for what, ids in found.items():
            books.effects.update((what, id_) for id_ in ids if id_ in mine)
    states = await _pairs(platform.databases["enrollment-service"], "SELECT id, state FROM enrollments")
    books.states = {id_: state for id_, state in states if id_ in mine}
    return books


def lost(told: Told, books: Books) -> dict[str, list[str]]:
    """What was accepted and has not come to everything it should have: by id, what is missing."""
    missing: dict[str, list[str]] = {}

    def must(what: str, ids: Iterable[str]) -> None:
        for id_ in ids:
            if not books.effects[what, id_]:
                missing.setdefault(id_, []).append(f"not {what}")

    must("known to course-service", told.users)
    must("prepared as content", told.courses)
    for what in ALWAYS:
        must(what, told.enrollments)
    for id_ in told.enrollments:
        match books.states.get(id_):
            case "completed":
                ending: tuple[str, ...] = WHEN_COMPLETED
            case "compensated":
                ending = WHEN_COMPENSATED
            case state:
                missing.setdefault(id_, []).append(state or "unknown to enrollment-service")
                continue
        for what in ending:
            must(what, [id_])
    return missing


def doubled(told: Told, books: Books) -> dict[str, list[str]]:
    """What took effect more than once, or both ways: by id, what did."""
    found: dict[str, list[str]] = {}
    for (what, id_), count in books.effects.items():
        if count > 1:
            found.setdefault(id_, []).append(f"{what} {count} times")
    for id_ in told.enrollments:
        if books.any_of(WHEN_COMPLETED, id_) and books.any_of(WHEN_COMPENSATED, id_):
            found.setdefault(id_, []).append("completed and compensated")
    return found


# What belongs to each enrollment, and what to one that ended in this way or that.
ALWAYS = ("told: requested", "seen by the user: requested")
WHEN_COMPLETED = (
    "charged",
    "paid",
    "completed",
    "content granted",
    "taking part",
    "told: completed",
    "seen by the user: completed",
)
WHEN_COMPENSATED = ("refused", "compensated", "told: refused", "seen by the user: refused")
_CHARGES = "SELECT key FROM charges"
_QUERIES = {
    "course-service": {
        "known to course-service": "SELECT user_id FROM known_users",
        "taking part": "SELECT enrollment_id FROM participants",
    },
    "enrollment-service": {
        "completed": "SELECT enrollment_id FROM enrollment_steps WHERE state = 'completed'",
        "compensated": "SELECT enrollment_id FROM enrollment_steps WHERE state = 'compensated'",
    },
    "payment-service": {
        "paid": "SELECT enrollment_id FROM payments WHERE outcome = 'charged'",
        "refused": "SELECT enrollment_id FROM payments WHERE outcome = 'refused'",
    },
    "notification-content-worker": {
        "prepared as content": "SELECT course_id FROM contents",
        "content granted": "SELECT enrollment_id FROM content_grants",
        **{
            f"told: {kind}": f"SELECT enrollment_id FROM notifications WHERE kind = '{kind}'"
            for kind in ("requested", "completed", "refused")
        },
    },
    "user-service": {
        f"seen by the user: {kind}": f"SELECT enrollment_id FROM notices WHERE kind = '{kind}'"
        for kind in ("requested", "completed", "refused")
    },
}


async def _rows(url: str, queries: dict[str, str]) -> dict[str, list[str]]:
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            return {
                what: [_as_id(value) for value in (await connection.scalars(sa.text(query))).all()]
                for what, query in queries.items()
            }
    finally:
        await engine.dispose()


async def _pairs(url: str, query: str) -> list[tuple[str, str]]:
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            return [(_as_id(key), str(value)) for key, value in (await connection.execute(sa.text(query))).all()]
    finally:
        await engine.dispose()


def _as_id(value: object) -> str:
    """SQLite holds a UUID as 32 hex digits, PostgreSQL as itself, the provider as text."""
    text = str(value).replace("-", "")
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
