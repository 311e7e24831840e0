"""A client that speaks AMQP frame by frame, so that a test can say what no library would."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from pamqp import base, commands, frame, header, heartbeat
from pamqp.body import ContentBody

M = TypeVar("M", bound=base.Frame)


class Closed(Exception):
    """The broker closed the connection, with a reason or without one (code 0)."""

    def __init__(self, code: int = 0, text: str = "") -> None:
        super().__init__(f"{code} {text}")
        self.code = code
        self.text = text


class WireClient:
    """One TCP connection. `send` writes frames, `expect` reads up to a method of a kind."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname, parts.port
        self.user, self.password = parts.username or "", parts.password or ""
        self.vhost = unquote(parts.path[1:]) or "/"
        self.capabilities: dict[str, bool] = {"authentication_failure_close": True, "connection.blocked": True}
        self.frame_max = 131_072

    async def dial(self) -> None:
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port, limit=1 << 22)

    async def open(self, *, heartbeat: int = 0) -> None:
        """The whole handshake, and channel 1."""
        await self.log_in()
        await self.tune(heartbeat=heartbeat)
        self.send(0, commands.Connection.Open(self.vhost))
        await self.expect(commands.Connection.OpenOk)
        self.send(1, commands.Channel.Open())
        await self.expect(commands.Channel.OpenOk)

    async def log_in(self, password: str | None = None) -> None:
        await self.dial()
        self.writer.write(b"AMQP\x00\x00\x09\x01")
        self.start = await self.expect(commands.Connection.Start)
        secret = f"\0{self.user}\0{self.password if password is None else password}"
        self.send(0, commands.Connection.StartOk({"capabilities": self.capabilities}, "PLAIN", secret, "en_US"))

    async def tune(self, *, heartbeat: int = 0, frame_max: int | None = None, channel_max: int = 2047) -> None:
        await self.expect(commands.Connection.Tune)
        self.send(0, commands.Connection.TuneOk(channel_max, self.frame_max if frame_max is None else frame_max, heartbeat))  # fmt: skip

    def send(self, channel: int, *methods: frame.FrameTypes) -> None:
        for method in methods:
            self.writer.write(frame.marshal(method, channel))

    def send_raw(self, kind: int, channel: int, payload: bytes, end: bytes = b"\xce") -> None:
        self.writer.write(struct.pack(">BHI", kind, channel, len(payload)) + payload + end)

    def publish(self, queue: str, body: bytes, **properties: Any) -> None:
        self.send(
            1,
            commands.Basic.Publish(exchange="", routing_key=queue),
            header.ContentHeader(body_size=len(body), properties=commands.Basic.Properties(**properties)),
            *([ContentBody(body)] if body else []),
        )

    async def read(self, within: float = 5.0) -> tuple[int, frame.FrameTypes]:
        """The next frame with its channel; `Closed` where the broker closes instead."""
        async with asyncio.timeout(within):
            try:
                head = await self.reader.readexactly(7)
                rest = await self.reader.readexactly(struct.unpack(">I", head[3:])[0] + 1)
            except (asyncio.IncompleteReadError, ConnectionError):
                raise Closed from None
        _, channel, got = frame.unmarshal(head + rest)
        if isinstance(got, commands.Connection.Close):
            self.send(0, commands.Connection.CloseOk())
            raise Closed(got.reply_code or 0, got.reply_text)
        return channel, got

    async def expect(self, kind: type[M]) -> M:
        """The next method of this kind; heartbeats and content before it are read over."""
        while True:
            _, got = await self.read()
            if isinstance(got, kind):
                return got
            assert not isinstance(got, commands.Channel.Close), got.reply_text

    async def fate(self) -> Closed:
        """How the broker ends the connection."""
        while True:
            try:
                await self.read()
            except Closed as closed:
                self.writer.close()
                return closed

    async def beats(self, within: float) -> int:
        """How many heartbeats come within a time."""
        count = 0
        try:
            async with asyncio.timeout(within):
                while True:
                    _, got = await self.read(within=within + 1)
                    count += isinstance(got, heartbeat.Heartbeat)
        except TimeoutError:
            return count

    def cut(self) -> None:
        """End the TCP connection without a word."""
        self.writer.transport.abort()
