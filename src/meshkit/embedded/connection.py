"""A connection: handshake, heartbeats, frames in and out, back-pressure, and the errors that end it.

All of it runs in callbacks of one event loop, and nothing waits.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pamqp import base, commands

from meshkit.embedded import wire
from meshkit.embedded.broker import Broker
from meshkit.embedded.channel import PRODUCT, Channel, method_frame, read_method
from meshkit.embedded.faults import Faults
from meshkit.embedded.queues import Refused
from meshkit.embedded.wire import Malformed

log = logging.getLogger("meshkit.embedded")

# Clients that adapt to a broker's version are to treat this one as the RabbitMQ whose rules it follows.
FOLLOWS_VERSION = "3.10.8"
CHANNEL_MAX = 2047
FRAME_MAX = 131_072
HEARTBEAT_SECONDS = 60
HANDSHAKE_SECONDS = 10.0
CLOSE_SECONDS = 5.0
# A client that does not read: beyond this nothing more is written for it, and nothing read from it.
WRITE_HIGH_WATER = 1 << 20

# Why nothing is read from a client for now.
_SLOW, _BLOCKED = "it does not read", "publishers are blocked"
_GREETING = b"AMQP\x00\x00\x09\x01"


@dataclass(slots=True, kw_only=True)
class Hub:
    """What all connections of a server share."""

    broker: Broker
    faults: Faults
    user: str
    password: str
    consumer_timeout: float | None = None
    connections: set[Connection] = field(default_factory=set)
    connection_gone: Callable[[], None] = lambda: None


def _short(text: str) -> str:
    """As much of a text as a short string holds."""
    return text.encode("utf-8", "replace")[:255].decode("utf-8", "ignore")


class Connection(asyncio.Protocol):
    """One client: handshake, heartbeats, frames in and out, and the errors that end it."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.frame_max = FRAME_MAX
        self.writable = True
        self.client_properties: dict[str, Any] = {}
        self._transport: asyncio.Transport
        self._channels: dict[int, Channel] = {}
        # Channels that we closed with an error, until the client has said that it knows.
        self._closing_channels: set[int] = set()
        self._on_method: Callable[[base.Frame], None] = self._on_start_ok
        self._state: str = "greeting"
        self._channel_max = CHANNEL_MAX
        self._heartbeat = 0.0
        self._rest = bytearray()
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._reading = False
        self._flush_planned = False
        self._to_confirm: dict[Channel, None] = {}
        self._received_any = self._sent_any = False
        self._silent_ticks = 0
        self._buffered_before = 0
        self._timer: asyncio.TimerHandle | None = None
        self._alarm: str | None = hub.faults.blocked
        self._stopped_reading: set[str] = set()
        self._class_and_method = (0, 0)

    @property
    def client_name(self) -> str:
        """The client property `connection_name`; empty where the client sent none."""
        name = self.client_properties.get("connection_name", "")
        return name if isinstance(name, str) else ""

    def can(self, capability: str) -> bool:
        """Whether the client said that it has this capability."""
        capabilities = self.client_properties.get("capabilities")
        return isinstance(capabilities, dict) and capabilities.get(capability) is True

    # -- the socket --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        if self.hub.faults.refusing_connections:
            transport.abort()
            return
        self.hub.connections.add(self)
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = "closed"
        self.writable = False
        if self._timer is not None:
            self._timer.cancel()
        self._end_channels()
        self.hub.connections.discard(self)
        self.hub.connection_gone()

    def data_received(self, data: bytes) -> None:
        self._received_any = True
        self._rest += data
        self._carry_out()

    def _carry_out(self) -> None:
        """Do what the frames that have arrived say, as far as that may be done now."""
        self._reading = True
        try:
            self._read_frames()
        except Refused as refused:
            self._close_with(refused)
        except Malformed as malformed:
            self._close_with(Refused(502, str(malformed)))
        except Exception:
            log.exception("a defect of the server, met by the connection %r", self.client_name)
            self._close_with(Refused(541, "a defect of the server; its log has the traceback"))
        finally:
            self._reading = False
            self._flush_confirms()
            self._flush()

    def pause_writing(self) -> None:
        self.writable = False
        self._stop_reading(_SLOW)

    def resume_writing(self) -> None:
        if self._state != "open":
            return
        self.writable = True
        self._resume_reading(_SLOW)
        for channel in list(self._channels.values()):
            channel.deliver()
        self._carry_out()

    def _stop_reading(self, why: str) -> None:
        if not self._stopped_reading and not self._transport.is_closing():
            self._transport.pause_reading()
        self._stopped_reading.add(why)

    def _resume_reading(self, why: str) -> None:
        self._stopped_reading.discard(why)
        if not self._stopped_reading and not self._transport.is_closing():
            self._transport.resume_reading()

    def write(self, data: bytes) -> None:
        """Send bytes with this turn of the loop; many small frames then cost one system call."""
        if self._state == "closed":
            return
        self._out.append(data)
        self._out_bytes += len(data)
        if self._out_bytes > WRITE_HIGH_WATER:
            self._flush()
        elif not self._reading and not self._flush_planned:
            self._flush_planned = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_planned = False
        if not self._out:
            return
        out, self._out, self._out_bytes = self._out, [], 0
        if self._state != "closed" and not self._transport.is_closing():
            self._sent_any = True
            self._transport.write(b"".join(out))

    def confirm_soon(self, channel: Channel) -> None:
        """Confirm at the end of this turn, so that a burst of publishes gets one confirm."""
        self._to_confirm[channel] = None

    def _flush_confirms(self) -> None:
        channels, self._to_confirm = self._to_confirm, {}
        for channel in channels:
            channel.flush_confirms()

    # -- faults --

    def cut(self) -> None:
        """End the TCP connection with a reset, as a broken network would."""
        self._transport.abort()

    def set_blocked(self, reason: str | None) -> None:
        """End a resource alarm, or (with a reason) begin one: as in RabbitMQ it is felt at the next publish."""
        self._alarm = reason
        if reason is None and _BLOCKED in self._stopped_reading:
            if self.can("connection.blocked"):
                self.write(method_frame(0, commands.Connection.Unblocked()))
            self._resume_reading(_BLOCKED)
            self._carry_out()

    def _block(self, reason: str) -> None:
        if self.can("connection.blocked"):
            self.write(method_frame(0, commands.Connection.Blocked(reason)))
        self._stop_reading(_BLOCKED)

    def close_channels(self, code: int, text: str) -> None:
        for number in list(self._channels):
            self.close_channel(number, Refused(code, text), caused_by=(0, 0))

    # -- frames --

    def _read_frames(self) -> None:
        data, at = self._rest, 0
        try:
            if self._state == "greeting":
                if len(data) < 8:
                    if not _GREETING.startswith(bytes(data[:4])):
                        self._wrong_protocol()
                    return
                if data[:8] != _GREETING:
                    self._wrong_protocol()
                    return
                at = 8
                self._greet()
            while len(data) - at >= 7 and self._state not in ("closed", "dropped"):
                if self._stopped_reading and self._state == "open":
                    # One read may hold thousands of requests, each with an answer: these have to wait too.
                    return
                kind, number, size = wire.FRAME_HEAD.unpack_from(data, at)
                if size + wire.FRAME_OVERHEAD > self.frame_max:
                    raise Refused(501, f"type {kind}, size {size}: larger than the negotiated {self.frame_max} bytes")
                end = at + 7 + size
                if len(data) <= end:
                    return
                if data[end] != 0xCE:
                    raise Refused(501, f"type {kind}, size {size}: a frame ends with 206, not with {data[end]}")
                payload = bytes(data[at + 7 : end])
                at = end + 1
                self._on_frame(kind, number, payload)
        finally:
            del data[:at]

    def _wrong_protocol(self) -> None:
        # What a client of another protocol or version is to learn: the one that is spoken here.
        self._transport.write(_GREETING)
        self._drop()

    def _drop(self) -> None:
        """Close the socket once what is written has left, and soon even if nobody reads it."""
        self._flush()
        if self._state == "closed":
            return
        self._state = "dropped"
        self._rest.clear()
        self._transport.close()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._transport.abort)

    def _on_frame(self, kind: int, number: int, payload: bytes) -> None:
        if kind == wire.FRAME_HEARTBEAT:
            if number:
                raise Refused(501, f"a heartbeat belongs on channel 0, not on {number}")
            return
        if kind not in (wire.FRAME_METHOD, wire.FRAME_HEADER, wire.FRAME_BODY):
            raise Refused(501, f"type {kind} is no frame of AMQP 0-9-1")
        if number == 0:
            self._on_connection_frame(kind, payload)
        elif self._state == "closing":
            return  # what the client sent before it read our close
        elif self._state != "open":
            raise Refused(504, f"channel {number} is used before the connection is open")
        else:
            self._on_channel_frame(kind, number, payload)

    def _on_connection_frame(self, kind: int, payload: bytes) -> None:
        if kind != wire.FRAME_METHOD:
            raise Refused(503, f"channel 0 carries methods, not frames of type {kind}")
        method = read_method(payload)
        if self._state == "closing":
            if isinstance(method, commands.Connection.CloseOk):
                self._drop()
            elif isinstance(method, commands.Connection.Close):
                self.write(method_frame(0, commands.Connection.CloseOk()))
            return
        self._class_and_method = (method.index >> 16, method.index & 0xFFFF)
        if isinstance(method, commands.Connection.Close):
            self._end_channels()
            self.write(method_frame(0, commands.Connection.CloseOk()))
            self._drop()
            return
        self._on_method(method)

    def _on_channel_frame(self, kind: int, number: int, payload: bytes) -> None:
        is_method = kind == wire.FRAME_METHOD
        if is_method:
            self._class_and_method = (int.from_bytes(payload[:2], "big"), int.from_bytes(payload[2:4], "big"))
        if number in self._closing_channels:
            if is_method and self._class_and_method == (20, 41):
                self._closing_channels.discard(number)
            elif is_method and self._class_and_method == (20, 40):
                self.write(method_frame(number, commands.Channel.CloseOk()))
            return
        channel = self._channels.get(number)
        if is_method and self._class_and_method[0] in (10, 20) and self._class_and_method != (20, 20):
            self._on_channel_life(number, channel, payload)
            return
        if channel is None:
            raise Refused(504, f"expected 'channel.open' on channel {number}")
        try:
            if kind == wire.FRAME_METHOD:
                channel.on_method(payload)
                if self._alarm is not None and self._class_and_method == (60, 40):
                    self._block(self._alarm)
            elif kind == wire.FRAME_HEADER:
                channel.on_header(payload)
            else:
                channel.on_body(payload)
        except Refused as refused:
            if refused.hard:
                raise
            self.close_channel(number, refused, caused_by=self._class_and_method)

    def _on_channel_life(self, number: int, channel: Channel | None, payload: bytes) -> None:
        method = read_method(payload)
        if isinstance(method, commands.Channel.Open):
            if number > self._channel_max:
                raise Refused(530, f"channel number {number} is greater than the negotiated channel_max {self._channel_max}")  # fmt: skip
            if channel is not None:
                raise Refused(504, f"second 'channel.open' seen on channel {number}")
            self._channels[number] = Channel(self, number)
            self.write(method_frame(number, commands.Channel.OpenOk()))
        elif isinstance(method, commands.Channel.Close):
            if channel is not None:
                channel.flush_confirms()
                del self._channels[number]
                channel.close()
            self.write(method_frame(number, commands.Channel.CloseOk()))
        elif not isinstance(method, commands.Channel.CloseOk):
            raise Refused(503, f"{method.name} does not belong on channel {number}")

    def close_channel(self, number: int, refused: Refused, *, caused_by: tuple[int, int]) -> None:
        """A soft error: the channel ends and says why. `caused_by` is class and method of what the client asked."""
        channel = self._channels.pop(number)
        channel.flush_confirms()
        self._closing_channels.add(number)
        log.info("channel %d of %r closed: %s", number, self.client_name, refused.text)
        self.write(method_frame(number, commands.Channel.Close(refused.code, _short(refused.text), *caused_by)))  # fmt: skip
        channel.close()

    def _end_channels(self) -> None:
        # First all are closed to deliveries: what the first gives back must not go to the second.
        self.writable = False
        for channel in list(self._channels.values()):
            channel.close()
        self._channels.clear()
        self.hub.broker.delete_queues_of(self)

    def _close_with(self, refused: Refused) -> None:
        """A hard error: say why, and give the client a little time to answer."""
        if self._state in ("closing", "closed", "dropped"):
            self._drop()
            return
        log.info("connection %r closed: %s", self.client_name, refused.text)
        if self._state == "greeting":
            self._drop()
            return
        self._flush_confirms()
        close = commands.Connection.Close(refused.code, _short(refused.text), *self._class_and_method)
        self.write(method_frame(0, close))
        self._end_channels()
        self._state = "closing"
        self._rest.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._drop)

    def shut_down(self) -> None:
        """The server stops."""
        reads = self.writable
        self._close_with(Refused(320, "broker forced connection closure with reason 'shutdown'"))
        if reads:
            self._drop()
        else:
            self._transport.abort()  # it would not read the goodbye either

    # -- handshake --

    def _greet(self) -> None:
        self._state = "handshake"
        capabilities = dict.fromkeys(
            (
                "publisher_confirms",
                "exchange_exchange_bindings",
                "basic.nack",
                "consumer_cancel_notify",
                "connection.blocked",
                "consumer_priorities",
                "authentication_failure_close",
                "per_consumer_qos",
                "direct_reply_to",
            ),
            True,
        )
        properties: dict[str, Any] = {
            "product": PRODUCT,
            "version": FOLLOWS_VERSION,
            "platform": "Python",
            "information": "For development and tests: follows the rules of RabbitMQ, keeps nothing after it ends",
            "capabilities": capabilities,
        }
        self.write(method_frame(0, commands.Connection.Start(0, 9, properties, "PLAIN", "en_US")))

    def _on_start_ok(self, method: base.Frame) -> None:
        if not isinstance(method, commands.Connection.StartOk):
            raise Refused(503, f"{method.name} where connection.start-ok was expected")
        self.client_properties = method.client_properties or {}
        if method.mechanism != "PLAIN":
            raise Refused(504, f"mechanism {method.mechanism!r} was not offered; PLAIN was")
        response: str | bytes = method.response
        raw = response.encode() if isinstance(response, str) else response
        secret = f"\0{self.hub.user}\0{self.hub.password}".encode()
        if self.hub.faults.refusing_logins or not secrets.compare_digest(raw, secret):
            log.info("login of %r refused", self.client_name)
            if self.can("authentication_failure_close"):
                raise Refused(403, "Login was refused using authentication mechanism PLAIN. For details see the broker logfile.")  # fmt: skip
            self._drop()
            return
        self._on_method = self._on_tune_ok
        self.write(method_frame(0, commands.Connection.Tune(CHANNEL_MAX, FRAME_MAX, HEARTBEAT_SECONDS)))

    def _on_tune_ok(self, method: base.Frame) -> None:
        if not isinstance(method, commands.Connection.TuneOk):
            raise Refused(503, f"{method.name} where connection.tune-ok was expected")
        for what, value, most in (
            ("frame_max", method.frame_max, FRAME_MAX),
            ("channel_max", method.channel_max, CHANNEL_MAX),
        ):
            if not 0 < value <= most:
                asked = value or "no limit"
                raise Refused(530, f"negotiated {what} = {asked} is higher than the maximum allowed value ({most})")
        if method.frame_max < wire.FRAME_MIN_SIZE:
            raise Refused(530, f"negotiated frame_max = {method.frame_max} is lower than the minimum allowed value ({wire.FRAME_MIN_SIZE})")  # fmt: skip
        self.frame_max = method.frame_max
        self._channel_max = method.channel_max
        self._heartbeat = float(method.heartbeat)
        self._on_method = self._on_open

    def _on_open(self, method: base.Frame) -> None:
        if not isinstance(method, commands.Connection.Open):
            raise Refused(503, f"{method.name} where connection.open was expected")
        if method.virtual_host != "/":
            raise Refused(530, f"vhost {method.virtual_host} not found")
        self._state = "open"
        self._on_method = self._on_open_connection
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._heartbeat:
            self._timer = asyncio.get_running_loop().call_later(self._heartbeat / 2, self._beat)
        self.write(method_frame(0, commands.Connection.OpenOk()))

    def _on_open_connection(self, method: base.Frame) -> None:
        if isinstance(method, commands.Connection.UpdateSecret):
            raise Refused(540, f"{method.name} is not implemented by {PRODUCT}")
        raise Refused(504, f"unexpected method in connection state running: {method.name}")

    # -- heartbeats: in real time, whatever clock drives the queues --

    def _beat(self) -> None:
        """Every half interval: send where nothing was sent, cut where nothing came for two intervals."""
        self._timer = asyncio.get_running_loop().call_later(self._heartbeat / 2, self._beat)
        buffered = self._transport.get_write_buffer_size()
        # Where we have stopped reading because the client does not read, progress there is its sign of life; where
        # we read nothing because publishers are blocked, its silence is our doing.
        draining = bool(self._stopped_reading) and buffered < self._buffered_before
        ours = _BLOCKED in self._stopped_reading
        self._buffered_before = buffered
        alive = self._received_any or draining or ours
        self._silent_ticks = 0 if alive else self._silent_ticks + 1
        self._received_any = False
        if self._silent_ticks >= 4:
            log.info("connection %r cut: no heartbeat for %.1f s", self.client_name, 2 * self._heartbeat)
            self._transport.abort()
            return
        if not self._sent_any and self.writable:
            self.write(wire.HEARTBEAT_FRAME)
            self._flush()
        self._sent_any = False
