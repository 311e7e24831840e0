"""What an installed meshkit must do with nothing but its eight packages; test_wheel.py runs it in an empty environment."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
from pathlib import Path

import aio_pika

import meshkit
from meshkit.embedded import AmqpServer


async def round_trip() -> bytes:
    async with AmqpServer() as server:
        connection = await aio_pika.connect(server.url)
        async with connection:
            channel = await connection.channel(publisher_confirms=True)
            queue = await channel.declare_queue("smoke", durable=True, arguments={"x-queue-type": "quorum"})
            await channel.default_exchange.publish(aio_pika.Message(b"hello", message_id="1"), routing_key=queue.name)
            arrived = await queue.get(timeout=5)
            await arrived.ack()
            return arrived.body


async def pipeline() -> str:
    outcomes: list[Exception | str] = [OSError("once"), "ok"]

    async def fetch() -> str:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    policies = (
        meshkit.Retry(on=OSError, attempts=2, backoff=meshkit.Backoff(first=0.001)),
        meshkit.CircuitBreaker("smoke"),
        meshkit.Timeout(seconds=5),
    )
    answer: str = await meshkit.Pipeline("smoke", *policies).call(fetch)
    return answer


def missing_extra() -> str:
    """What is said where a library that an extra brings is not installed."""
    try:
        meshkit.fastapi.install  # noqa: B018 - the module is loaded when it is first named
    except meshkit.ConfigurationError as error:
        return str(error)
    return "meshkit.fastapi was loaded without FastAPI"


def main() -> None:
    package = Path(meshkit.__file__).parent
    assert package.parent.name == "site-packages", f"this is not an installed meshkit: {package}"
    assert (package / "py.typed").is_file()
    command = Path(sys.executable).parent / "meshkit"
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    assert meshkit.__version__ in said, said
    assert "ok" == asyncio.run(pipeline())
    assert b"hello" == asyncio.run(round_trip())
    if importlib.util.find_spec("fastapi") is None:
        assert 'pip install "meshkit-py[fastapi]"' in missing_extra(), missing_extra()
    print(f"meshkit {meshkit.__version__} works")


if __name__ == "__main__":
    main()
