"""A service of the learning hub with a mistake planted into it: `python _planted.py MISTAKE MODULE`. See `unsafe.py`.

`ack-first` acknowledges a message before the copy for its next try is published. `no-inbox` handles a message without looking whether
that was done before. `none` plants nothing. All three wait a moment at the place where a kill would hurt, so that it is the mistake, and
not the wait, which makes the difference.
"""

from __future__ import annotations

import asyncio
import runpy
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from meshkit import sqlalchemy as meshkit_sqlalchemy
from meshkit.messaging.message import Delivery
from meshkit.rabbitmq import consumer as meshkit_consumer

_MOMENT = 0.3


def plant(mistake: str) -> None:
    consumer, inbox = meshkit_consumer.Consumer, meshkit_sqlalchemy.SqlInbox
    to_rung, ack, opened = consumer._to_rung, consumer._ack, inbox.open
    acked: set[int] = set()

    async def copied(self: meshkit_consumer.Consumer, hand: Any, *rest: Any) -> bool:
        if mistake == "ack-first":
            await ack(self, hand)
            acked.add(id(hand))
            await asyncio.sleep(_MOMENT)
            return await to_rung(self, hand, *rest)
        done = await to_rung(self, hand, *rest)
        await asyncio.sleep(_MOMENT)
        return done

    async def acked_once(self: meshkit_consumer.Consumer, hand: Any) -> None:
        if id(hand) in acked:
            acked.discard(id(hand))
        else:
            await ack(self, hand)

    @asynccontextmanager
    async def slowly(self: meshkit_sqlalchemy.SqlInbox, delivery: Delivery) -> AsyncIterator[Any]:
        if mistake == "no-inbox":
            async with self._sessions() as session, session.begin():
                yield session
        else:
            async with opened(self, delivery) as session:
                yield session
        await asyncio.sleep(_MOMENT)

    consumer._to_rung = copied  # type: ignore[method-assign, assignment]
    consumer._ack = acked_once  # type: ignore[method-assign]
    inbox.open = slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    plant(sys.argv[1])
    # The services' own folder is on the path by PYTHONPATH; this one must not hide what is there.
    del sys.path[0]
    runpy.run_module(sys.argv[2], run_name="__main__", alter_sys=True)
