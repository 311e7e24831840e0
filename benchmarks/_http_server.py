"""The other side of the HTTP bench: answers every request with the same 35 bytes of JSON, on a keep-alive connection."""

from __future__ import annotations

import asyncio

_BODY = b'{"id": 1, "name": "a user", "n": 0}'
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(_BODY), _BODY)


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._got = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        # Only GET comes here: a request ends with its headers.
        *requests, self._got = (self._got + data).split(b"\r\n\r\n")
        self._transport.write(_ANSWER * len(requests))


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
