"""The broker that the demo runs on: the embedded one, a RabbitMQ of its own, or one that is there already."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import aio_pika

from meshkit import MeshkitError
from meshkit.embedded import run_in_thread
from meshkit.rabbitmq.dead_letters import DeadLetters
from meshkit.testing import servers

EXCHANGES = (
    "user-events",
    "course-events",
    "enrollment-events",
    "payment-events",
    "content-events",
    "notification-events",
)
QUEUES = (
    "user-service.notification-sent",
    "course-service.user-created",
    "course-service.content-granted",
    "enrollment-service.payment-completed",
    "enrollment-service.payment-refused",
    "payment-service.enrollment-requested",
    "notification-content-worker.course-created",
    "notification-content-worker.enrollment-requested",
    "notification-content-worker.payment-completed",
    "notification-content-worker.payment-refused",
)
DEAD_LETTER_QUEUES = tuple(f"{queue}.dlq" for queue in QUEUES)


class CannotStart(Exception):
    """The demo cannot run as asked; the text is one line for the user."""


@contextlib.asynccontextmanager
async def broker(choice: str) -> AsyncIterator[tuple[str, str]]:
    """The name for the summary, and the URL, of a running broker.

    Raises:
        CannotStart: rabbitmq-server is not installed or does not start, or nothing answers at the URL.
    """
    if choice == "embedded":
        with run_in_thread() as server:
            yield "embedded", server.url
    elif choice == "local":
        async with _local() as url:
            yield "local", url
    else:
        async with _existing(choice) as url:
            yield _without_password(choice), url


@contextlib.asynccontextmanager
async def _local() -> AsyncIterator[str]:
    try:
        server = servers.RabbitMQ()
    except servers.NotInstalledError as error:
        raise CannotStart(str(error)) from error
    starting = asyncio.ensure_future(asyncio.to_thread(server.start))
    try:
        try:
            await asyncio.shield(starting)
        except (servers.NotInstalledError, servers.NotReadyError, OSError) as error:
            # The server may be there without epmd, which comes with Erlang.
            raise CannotStart(" ".join(str(error).split())[:300]) from error
        yield server.url
    finally:
        while not starting.done():
            # Interrupted while it starts: the thread that waits for it gives up once it is gone.
            if server.running:
                server.kill()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)
        await asyncio.gather(starting, return_exceptions=True)
        server.close()


@contextlib.asynccontextmanager
async def _existing(url: str) -> AsyncIterator[str]:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("amqp", "amqps") and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise CannotStart(f"--broker is `local` or an amqp:// URL, not {_without_password(url)!r}")
    try:
        async with DeadLetters(url) as letters:
            taken = await letters.depths((*QUEUES, *DEAD_LETTER_QUEUES))
    except (MeshkitError, OSError, ValueError) as error:
        raise CannotStart(f"--broker: {' '.join(str(error).split())}") from error
    if taken:
        # They could be somebody's real ones.
        raise CannotStart(
            f"{_without_password(url)} has a queue {taken[0].queue!r} already; give the demo a virtual host of its own"
        )
    try:
        yield url
    finally:
        await _tidy(url)


async def _tidy(url: str) -> None:
    """Take away what the demo declared; the delay rungs belong to all services of the virtual host and stay."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(10), await aio_pika.connect(url) as connection:
            channel = await connection.channel()
            for queue in QUEUES:
                for name in (queue, f"{queue}.dlq", f"{queue}.suspect"):
                    await channel.queue_delete(name)
            for exchange in EXCHANGES:
                await channel.exchange_delete(exchange)


def _without_password(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "that"
    return parts._replace(netloc=f"{parts.username}:***@{host}" if parts.password else parts.netloc).geturl()
