"""The other side of the FastAPI bench: 32 connections that ask one path over and over, told over the pipe how often."""

from __future__ import annotations

import asyncio
import sys

_CONNECTIONS = 32


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, count: int) -> None:
    for _ in range(count):
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(head.decode())
        (length,) = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))


async def main(port: str, path: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\naccept: */*\r\n\r\n".encode()
    connections = [await asyncio.open_connection("127.0.0.1", int(port)) for _ in range(_CONNECTIONS)]
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        share = -(-int(line) // _CONNECTIONS)
        await asyncio.gather(*(_ask(*connection, request, share) for connection in connections))
        print(share * _CONNECTIONS, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
