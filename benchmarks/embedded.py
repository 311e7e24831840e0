"""The embedded AMQP server: its own processor time for a message published, confirmed, delivered and acknowledged."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping

import aio_pika

from benchmarks import MICROSECOND, Row, Sample

ROWS = (
    Row(what="embedded server, a message through a classic queue", against=MICROSECOND, target=None),
    Row(what="embedded server, a message through a quorum queue", against=MICROSECOND, target=None),
)

# Many, because the system counts a process's time in hundredths of a second.
_MESSAGES = 4000

_SERVER = """
import asyncio
from meshkit.embedded import serve
asyncio.run(serve(port=0, ready=lambda server: print(server.url, flush=True)))
"""


def _processor_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _send_through(url: str, kind: str) -> None:
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=100)
        name = f"bench-{kind}"
        queue = await channel.declare_queue(name, durable=True, arguments={"x-queue-type": kind})
        arrived = asyncio.Semaphore(0)

        async def take(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            await message.ack()
            arrived.release()

        tag = await queue.consume(take)
        for _ in range(_MESSAGES // 100):
            message = aio_pika.Message(b"x" * 100, delivery_mode=2)
            await asyncio.gather(*(channel.default_exchange.publish(message, routing_key=name) for _ in range(100)))
        for _ in range(_MESSAGES):
            await arrived.acquire()
        await queue.cancel(tag)


@contextlib.contextmanager
def contenders() -> Iterator[Mapping[str, Sample]]:
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()

        def through(kind: str) -> Sample:
            def sample() -> float:
                before = _processor_seconds(server.pid)
                asyncio.run(_send_through(url, kind))
                return (_processor_seconds(server.pid) - before) / _MESSAGES

            return sample

        yield {
            "embedded server, a message through a classic queue": through("classic"),
            "embedded server, a message through a quorum queue": through("quorum"),
        }
    finally:
        server.terminate()
        server.wait()
