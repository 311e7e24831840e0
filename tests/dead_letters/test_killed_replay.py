"""A replay that is killed in the middle loses nothing."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from aio_pika.abc import AbstractChannel
from dlq_steps import DLQ, QUEUE, dead_letter, environment, ids, put, until_depth

SCRIPT = Path(__file__).with_name("replay_process.py")
NAMES = [f"m{n:03d}" for n in range(120)]


async def test_killed_with_sigkill(broker: str, channel: AbstractChannel):
    """Killed again and again, replays leave each message in at least one of the two queues, and the last one ends the
    work: nothing is lost, and hardly anything is there twice."""
    await put(channel, *map(dead_letter, NAMES))
    seen: list[str] = []
    for after in (1, 7, 30):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(SCRIPT), broker, DLQ), stdout=asyncio.subprocess.PIPE, env=environment()
        )
        assert process.stdout is not None
        for _ in range(after):
            await process.stdout.readline()
        process.kill()
        await process.communicate()
        assert -signal.SIGKILL == process.returncode
        seen += await ids(channel, QUEUE)
    left = len(NAMES) - len(set(seen))
    # One that was confirmed and not yet acked at a kill is in both.
    for _ in range(500):
        depth = (await channel.declare_queue(DLQ, passive=True)).declaration_result.message_count or 0
        if left <= depth <= left + 3:
            break
        await asyncio.sleep(0.01)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(SCRIPT), broker, DLQ), stdout=asyncio.subprocess.DEVNULL, env=environment()
    )
    assert 0 == await process.wait()
    seen += await ids(channel, QUEUE)

    assert NAMES == sorted(set(seen))
    assert len(NAMES) + 3 >= len(seen)
    assert NAMES == list(dict.fromkeys(seen))
    await until_depth(channel, DLQ, 0)
