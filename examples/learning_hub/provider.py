"""payment-provider: somebody else's service, in the part of the unreliable partner. It does not use meshkit.

`PUT /mode` tells it how to behave; `GET /requests` and `GET /charges` are its books, which it writes before it answers
and keeps in a file, so that they can be held against what everybody else believes.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from typing import Annotated, Literal

import uvicorn
from fastapi import FastAPI, Header
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from learning_hub.settings import port_of

app = FastAPI(title="payment-provider")
books = sqlite3.connect(os.environ.get("PAYMENT_PROVIDER_BOOKS", "payment-provider.db"), isolation_level=None)
books.executescript(
    """
    PRAGMA journal_mode = WAL;
    CREATE TABLE IF NOT EXISTS mode (only_row INTEGER PRIMARY KEY, behaviour TEXT, seconds REAL);
    CREATE TABLE IF NOT EXISTS requests (
        id INTEGER PRIMARY KEY, at REAL, key TEXT, reference TEXT, amount INTEGER, behaviour TEXT
    );
    CREATE TABLE IF NOT EXISTS charges (
        id INTEGER PRIMARY KEY, at REAL, key TEXT, reference TEXT, amount INTEGER, card TEXT
    );
    """
)


class Mode(BaseModel):
    """`ok`; `fail` answers 503; `slow` waits `seconds` first; `busy` answers 429 with `Retry-After: seconds`;
    `refuse` answers 402 to every charge."""

    behaviour: Literal["ok", "fail", "slow", "busy", "refuse"] = "ok"
    seconds: float = 1.0


class Charge(BaseModel):
    """`amount` is in cents; `reference` is what the customer knows the payment by, and nothing that we look at."""

    reference: str
    amount: int
    card: str


def mode() -> Mode:
    row = books.execute("SELECT behaviour, seconds FROM mode").fetchone()
    return Mode(behaviour=row[0], seconds=row[1]) if row else Mode()


async def trouble(now: Mode) -> JSONResponse | None:
    """The answer of a bad day, if it is one."""
    if now.behaviour == "slow":
        await asyncio.sleep(now.seconds)
    if now.behaviour == "fail":
        return JSONResponse({"reason": "out of order"}, 503)
    if now.behaviour == "busy":
        return JSONResponse({"reason": "too many requests"}, 429, {"Retry-After": f"{now.seconds:.0f}"})
    return None


@app.put("/mode")
async def set_mode(new: Mode) -> Mode:
    books.execute("INSERT OR REPLACE INTO mode VALUES (1, ?, ?)", (new.behaviour, new.seconds))
    return new


@app.get("/methods")
async def methods() -> JSONResponse:
    return await trouble(mode()) or JSONResponse(["card"])


@app.post("/charges")
async def charge(new: Charge, idempotency_key: Annotated[str, Header()]) -> JSONResponse:
    now = mode()
    books.execute(
        "INSERT INTO requests (at, key, reference, amount, behaviour) VALUES (?, ?, ?, ?, ?)",
        (time.time(), idempotency_key, new.reference, new.amount, now.behaviour),
    )
    if problem := await trouble(now):
        return problem
    # No await between looking and writing: two requests with one key make one charge.
    known = books.execute("SELECT id FROM charges WHERE key = ?", (idempotency_key,)).fetchone()
    if known is None:
        if now.behaviour == "refuse" or new.card == "declined":
            return JSONResponse({"reason": "card declined"}, 402)
        known = books.execute(
            "INSERT INTO charges (at, key, reference, amount, card) VALUES (?, ?, ?, ?, ?) RETURNING id",
            (time.time(), idempotency_key, new.reference, new.amount, new.card),
        ).fetchone()
    return JSONResponse({"charge_id": known[0]}, 201)


@app.get("/requests")
async def requests() -> list[dict[str, object]]:
    return _book("SELECT at, key, reference, amount, behaviour FROM requests ORDER BY id")


@app.get("/charges")
async def charges() -> list[dict[str, object]]:
    return _book("SELECT id, at, key, reference, amount, card FROM charges ORDER BY id")


def _book(query: str) -> list[dict[str, object]]:
    rows = books.execute(query)
    return [dict(zip((column[0] for column in rows.description), row, strict=True)) for row in rows]


@app.get("/health/ready")
async def ready() -> dict[str, str]:
    return {"status": "ok"}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=port_of("payment-provider"), log_level="warning")
