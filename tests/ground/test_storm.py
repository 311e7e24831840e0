"""The storm proof is about services: what happens to its own client is counted and told, and does not end it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from proofs.storm.__main__ import Chain, Options, _within
from proofs.storm.process import Port, Processes


async def test_a_request_without_an_answer_is_counted_by_its_kind(tmp_path: Path) -> None:
    """Connections that are closed without an answer, and a port that refuses, fail their request and no other."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()
        await writer.wait_closed()

    port = Port()
    options = Options(
        requests=3, rate=1000.0, hang_rate=1.0, seed=1, open_for=1.0, leaves=(), parts=(), say=lambda line: None
    )
    async with httpx.AsyncClient(trust_env=False) as client:
        chain = Chain(Processes(tmp_path), client, {"edge": port}, options)
        await chain.load(3)
        server = await asyncio.start_server(hang_up, sock=port.socket)
        async with server:
            await chain.load(2)
    assert {"ConnectError": 3, "RemoteProtocolError": 2} == chain.unanswered
    assert 0 == chain.statuses.total()


def test_all_that_is_in_a_group_is_told() -> None:
    """Where it breaks off with several errors at once, each is named and not only that there were some."""
    error = ExceptionGroup("outer", [ValueError("one"), ExceptionGroup("inner", [TimeoutError(), ValueError("one")])])
    assert ["ValueError: one", "TimeoutError", "ValueError: one"] == list(_within(error))
