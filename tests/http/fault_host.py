"""An HTTP host on a real socket that misbehaves by script."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field


@dataclass
class Asked:
    """A request as the host saw it, and the number of the connection it came on."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int


Step = Callable[[Asked, asyncio.StreamWriter], Awaitable[bool]]


def answer(status: int = 200, body: bytes = b"ok", *, close: bool = False, **headers: str) -> Step:
    """A complete answer. Header names are written with _ for -."""

    async def step(asked: Asked, writer: asyncio.StreamWriter) -> bool:
        lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if close:
            lines.append("connection: close")
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if asked.method == "HEAD" else body))
        await writer.drain()
        return not close

    return step


async def hang_up(asked: Asked, writer: asyncio.StreamWriter) -> bool:
    """Close the connection without a byte."""
    return False


async def reset(asked: Asked, writer: asyncio.StreamWriter) -> bool:
    """Reset the connection (RST), as a process that was killed does."""
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


def half(body: bytes = b"hello") -> Step:
    """Promise twice as much as is sent."""

    async def step(asked: Asked, writer: asyncio.StreamWriter) -> bool:
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {2 * len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        return False

    return step


@dataclass
class Gate:
    """Holds an answer until the test opens it. `reached` is set when the host waits there."""

    opened: asyncio.Event = field(default_factory=asyncio.Event)
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self) -> None:
        self.reached.set()
        await self.opened.wait()


def silent(gate: Gate) -> Step:
    """Say nothing at all until the gate opens."""

    async def step(asked: Asked, writer: asyncio.StreamWriter) -> bool:
        await gate.wait()
        return False

    return step


def dripping(gate: Gate, *chunks: bytes) -> Step:
    """Send the headers and the first chunk, the others when the gate opens."""

    async def step(asked: Asked, writer: asyncio.StreamWriter) -> bool:
        total = sum(map(len, chunks))
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {total}\r\n\r\n".encode() + chunks[0])
        await writer.drain()
        await gate.wait()
        writer.write(b"".join(chunks[1:]))
        await writer.drain()
        return True

    return step


class FaultHost:
    """An HTTP/1.1 server on a socket: each request takes the next step of the script, the last one for good."""

    def __init__(self) -> None:
        self.script: list[Step] = [answer()]
        self.asked: list[Asked] = []
        self._connections = 0
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer, self._connections))
        self._open[task] = writer
        task.add_done_callback(lambda task: self._open.pop(task, None))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        try:
            while True:
                asked = await _read(reader, number)
                self.asked.append(asked)
                step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
                if not await step(asked, writer):
                    break
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def close(self) -> None:
        self._server.close()
        for task, writer in list(self._open.items()):
            writer.transport.abort()
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)


async def _read(reader: asyncio.StreamReader, connection: int) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = head[0].split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = b""
    if "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    elif headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    return Asked(method, path, headers, body, connection)
