"""A relay in a process of its own, for the tests that kill it.

    python relay_process.py URL LEDGER DIES_AFTER

It publishes by writing message ids into LEDGER, and kills itself between a confirm and the delete after so many (0:
never). It ends by itself when the table is empty, or at SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from sql_steps import RecordingBus
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from meshkit.messaging.message import Message
from meshkit.sqlalchemy import SqlOutbox, tuned


class LedgerBus(RecordingBus):
    def __init__(self, ledger: str, dies_after: int) -> None:
        super().__init__()
        self._ledger = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._dies_after = dies_after

    async def publish_message(self, message: Message, exchange: str, routing_key: str) -> None:
        self.tried += 1
        await asyncio.sleep(0.001)
        os.write(self._ledger, f"{message.message_id}\n".encode())
        if self.tried == self._dies_after:
            os.kill(os.getpid(), signal.SIGKILL)


async def main(url: str, ledger: str, dies_after: int) -> None:
    engine = tuned(create_async_engine(url))
    outbox = SqlOutbox(async_sessionmaker(engine), LedgerBus(ledger, dies_after))
    relay = outbox.relay(poll=0.02, batch=10)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await relay.start()
    print("ready", flush=True)
    await stop.wait()
    await relay.drain(5.0)
    await relay.close()
    await engine.dispose()


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
