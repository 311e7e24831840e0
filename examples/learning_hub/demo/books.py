"""The books, held against each other: what people were told, the services' tables, and the provider's own lists.

Nothing in here was written by meshkit. The tables count effects without a unique key that would hide a second one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from learning_hub.demo.driver import Told
from learning_hub.demo.platform import Platform


class Asked(NamedTuple):
    """One line of the provider's lists, of requests or of charges: under which key, how many cents."""

    key: str
    amount: int


@dataclass(slots=True)
class Books:
    """What the tables and the provider hold of what was accepted, each by the id it is about."""

    states: dict[str, str] = field(default_factory=dict)
    # By enrollment: what the provider was asked for, repeats included; what it took; what payment-service noted as paid.
    requests: dict[str, list[Asked]] = field(default_factory=dict)
    charges: dict[str, list[Asked]] = field(default_factory=dict)
    paid: dict[str, list[int]] = field(default_factory=dict)
    # What happened, and how often: ("content granted", enrollment id) → 1.
    effects: Counter[tuple[str, str]] = field(default_factory=Counter)

    def any_of(self, whats: Iterable[str], id_: str) -> bool:
        """Whether at least one of these has happened to `id_`."""
        return any(self.effects[what, id_] for what in whats)

    @property
    def repeated(self) -> int:
        """How many requests for a charge came again under a key that the provider had had: none of them may take money."""
        return sum(len(lines) - len({line.key for line in lines}) for lines in self.requests.values())


async def read(platform: Platform, told: Told) -> Books:
    """Read every table, and the provider's lists."""
    mine = {*told.users, *told.courses, *told.enrollments}
    books = Books()
    for name, queries in _QUERIES.items():
        for what, rows in (await _rows(platform.databases[name], queries)).items():
            books.effects.update((what, id_) for (id_,) in rows if id_ in mine)
    for id_, amount in (await _rows(platform.databases["payment-service"], {"": _PAID}))[""]:
        if id_ in mine:
            books.paid.setdefault(id_, []).append(amount)
    await read_provider(platform.folder / "payment-provider.db", mine, books)
    states = await _rows(platform.databases["enrollment-service"], {"": "SELECT id, state FROM enrollments"})
    books.states = {id_: state for id_, state in states[""] if id_ in mine}
    return books


async def read_provider(file: Path, mine: set[str], books: Books) -> None:
    """Read the provider's lists of requests and of charges, by what each was for and not by its key."""
    found = await _rows(
        f"sqlite+aiosqlite:///{file}",
        {name: f"SELECT reference, key, amount FROM {name} ORDER BY id" for name in ("requests", "charges")},
    )
    for name, lines in (("requests", books.requests), ("charges", books.charges)):
        for id_, key, amount in found[name]:
            if id_ in mine:
                lines.setdefault(id_, []).append(Asked(key, amount))
    books.effects.update({("charged", id_): len(lines) for id_, lines in books.charges.items()})


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
    for id_, wrong in ((id_, _wrong_money(told, books, id_)) for id_ in books.charges):
        if wrong:
            found.setdefault(id_, []).extend(wrong)
    return found


def _wrong_money(told: Told, books: Books, id_: str) -> list[str]:
    """What is wrong with the money taken for an enrollment, by three books: requests, charges, payments."""
    charges = books.charges[id_]
    keys, taken = {charge.key for charge in charges}, sum(charge.amount for charge in charges)
    wrong = []
    if len(keys) > 1:
        wrong.append(f"charged under {len(keys)} keys")
    if not set(charges) <= set(books.requests.get(id_, [])):
        wrong.append("charged what nobody asked for")
    price, coupon = told.prices.get(id_, taken), id_ in told.coupons
    if taken > price or (taken < price and not coupon):
        wrong.append(f"charged {taken}, owed {'at most ' if coupon else ''}{price}")
    # Charged and not yet noted is on its way, and lost if it stays so.
    if id_ in books.paid and taken != sum(books.paid[id_]):
        wrong.append(f"charged {taken}, noted as paid {sum(books.paid[id_])}")
    return wrong


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
_PAID = "SELECT enrollment_id, amount FROM payments WHERE outcome = 'charged'"
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


async def _rows(url: str, queries: dict[str, str]) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of each query; the first column is an id."""
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            return {
                what: [(_as_id(id_), *rest) for id_, *rest in (await connection.execute(sa.text(query))).all()]
                for what, query in queries.items()
            }
    finally:
        await engine.dispose()


def _as_id(value: object) -> str:
    """SQLite holds a UUID as 32 hex digits, PostgreSQL as itself, the provider as text."""
    text = str(value).replace("-", "")
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
