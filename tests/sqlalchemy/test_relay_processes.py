"""Relays in processes of their own: killed at the worst moment, and several at once."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest
from sql_steps import RecordingBus, Sessions, waiting
from sqlalchemy.ext.asyncio import AsyncEngine

from meshkit.sqlalchemy import SqlOutbox

SCRIPT = Path(__file__).with_name("relay_process.py")


async def start(url: str, ledger: Path, *, dies_after: int = 0) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(SCRIPT), url, str(ledger), str(dies_after)), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    return process


async def end(process: asyncio.subprocess.Process) -> int:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    await process.communicate()
    assert process.returncode is not None
    return process.returncode


async def until_empty(engine: AsyncEngine) -> None:
    async with asyncio.timeout(30):
        while await waiting(engine):  # noqa: ASYNC110 - another process empties it
            await asyncio.sleep(0.02)


async def write(sessions: Sessions, count: int) -> list[str]:
    outbox = SqlOutbox(sessions, RecordingBus())
    ids = []
    for n in range(count):
        async with sessions() as session, session.begin():
            ids.append(await outbox.publish(session, str(n)))
    return ids


async def test_killed_between_confirm_and_delete(
    database: str, engine: AsyncEngine, sessions: Sessions, tmp_path: Path
):
    """A relay that is killed loses nothing: its successor publishes the rest at once, repeating only what was not yet
    deleted, under the same ids and in order."""
    ids = await write(sessions, 30)
    ledger = tmp_path / "ledger"

    first = await start(database, ledger, dies_after=15)
    assert -signal.SIGKILL == await first.wait()
    await first.communicate()
    second = await start(database, ledger)
    await until_empty(engine)
    assert 0 == await end(second)

    published = ledger.read_text().split()
    assert ids == list(dict.fromkeys(published))
    assert published == [*ids[:15], *ids[10:]]


async def test_two_processes_neither_repeat_nor_reorder(
    database: str, engine: AsyncEngine, sessions: Sessions, tmp_path: Path
):
    """Relays of two processes on one table publish each event once and in order, while a third one writes."""
    ledger = tmp_path / "ledger"
    relays = [await start(database, ledger) for _ in range(2)]

    ids = await write(sessions, 60)
    await until_empty(engine)

    assert [0, 0] == [await end(relay) for relay in relays]
    assert ids == ledger.read_text().split()


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_processes_share_a_sqlite_file(database: str, engine: AsyncEngine, sessions: Sessions):
    """Several that write into one SQLite file at the same time wait for each other and do not fail."""
    written = await asyncio.gather(*(write(sessions, 20) for _ in range(4)))

    assert 80 == len({message_id for ids in written for message_id in ids}) == len(await waiting(engine))
