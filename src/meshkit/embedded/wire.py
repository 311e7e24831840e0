"""The bytes of AMQP 0-9-1 that a server must read without changing them.

A server passes on what publishers wrote. Decoding a header table and encoding it again would turn a long into a short
and a timestamp that Python cannot hold into a torn connection, so the properties of a message stay the bytes that came;
what the server itself adds (`x-death`, `x-delivery-count`) is put between them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from pamqp import commands, header

FRAME_METHOD, FRAME_HEADER, FRAME_BODY, FRAME_HEARTBEAT = 1, 2, 3, 8
FRAME_END = b"\xce"
FRAME_OVERHEAD = 8
FRAME_MIN_SIZE = 4096

FRAME_HEAD = struct.Struct(">BHI")
_content_head = struct.Struct(">HHQ")
_u16 = struct.Struct(">H")
_u32 = struct.Struct(">I")
_i64 = struct.Struct(">q")
_u64 = struct.Struct(">Q")

HEARTBEAT_FRAME = FRAME_HEAD.pack(FRAME_HEARTBEAT, 0, 0) + FRAME_END

# A short string may be in any encoding; this way what is not UTF-8 leaves as it came.
_ESCAPE = "surrogateescape"


class Malformed(ValueError):
    """Bytes that are no AMQP 0-9-1 data of the kind they claim to be."""


def frame(kind: int, channel: int, payload: bytes) -> bytes:
    """One frame, ready for the socket."""
    return FRAME_HEAD.pack(kind, channel, len(payload)) + payload + FRAME_END


def read_short_string(data: bytes, at: int) -> tuple[str, int]:
    """The short string that begins at `at`, and the index after it."""
    if at >= len(data) or at + 1 + data[at] > len(data):
        raise Malformed("a short string is longer than its frame")
    end = at + 1 + data[at]
    return data[at + 1 : end].decode("utf-8", _ESCAPE), end


def short_string(text: str) -> bytes:
    """`text` with the octet of its length before it; at most 255 bytes."""
    raw = text.encode("utf-8", _ESCAPE)
    if len(raw) > 255:
        raise Malformed(f"a short string holds 255 bytes, not {len(raw)}")
    return bytes((len(raw),)) + raw


# --- values of header tables -----------------------------------------------------------------------------------------
# A *field* is a value with the octet of its type before it, as it stands in a table or array.

_FIXED_SIZE = {
    ord(kind): size
    for kind, size in {
        "t": 1, "b": 1, "B": 1, "s": 2, "u": 2, "U": 2, "I": 4, "i": 4, "l": 8, "L": 8, "f": 4, "d": 8, "D": 5, "T": 8, "V": 0,
    }.items()
}  # fmt: skip
_SIZED = frozenset(b"SAFx")


def _field_end(data: bytes, at: int, limit: int) -> int:
    """The index after the field at `at`."""
    if at >= limit:
        raise Malformed("a table ends before its last value")
    kind = data[at]
    if kind in _SIZED:
        if at + 5 > limit:
            raise Malformed("a table value has no length")
        end = at + 5 + int(_u32.unpack_from(data, at + 1)[0])
    elif kind in _FIXED_SIZE:
        end = at + 1 + _FIXED_SIZE[kind]
    else:
        raise Malformed(f"no table value has the type {bytes((kind,))!r}")
    if end > limit:
        raise Malformed("a table value is longer than its table")
    return end


def _limit(data: bytes, at: int) -> int:
    """The index after the table or array whose length stands at `at`."""
    if at + 4 > len(data):
        raise Malformed("a table has no length")
    limit = at + 4 + int(_u32.unpack_from(data, at)[0])
    if limit > len(data):
        raise Malformed("a table is longer than its frame")
    return limit


def split_table(data: bytes) -> dict[str, bytes]:
    """The fields of a table by name, each as its bytes; nested ones stay closed."""
    at, limit, fields = 4, _limit(data, 0), {}
    while at < limit:
        name, at = read_short_string(data, at)
        end = _field_end(data, at, limit)
        fields[name] = data[at:end]
        at = end
    return fields


def split_array(data: bytes) -> list[bytes]:
    """The fields of an array, each as its bytes."""
    at, limit, fields = 4, _limit(data, 0), []
    while at < limit:
        end = _field_end(data, at, limit)
        fields.append(data[at:end])
        at = end
    return fields


def join_table(fields: Mapping[str, bytes]) -> bytes:
    """The table that holds these fields, with its length before it."""
    raw = b"".join(short_string(name) + field for name, field in fields.items())
    return _u32.pack(len(raw)) + raw


def text_field(text: str) -> bytes:
    """A long string as a field."""
    raw = text.encode("utf-8", _ESCAPE)
    return b"S" + _u32.pack(len(raw)) + raw


def long_field(number: int) -> bytes:
    """A 64-bit number as a field."""
    return b"l" + _i64.pack(number)


def timestamp_field(seconds: float) -> bytes:
    """Seconds since the epoch as a field."""
    return b"T" + _u64.pack(int(seconds))


def table_field(fields: Mapping[str, bytes]) -> bytes:
    """A nested table as a field."""
    return b"F" + join_table(fields)


def array_field(fields: Iterable[bytes]) -> bytes:
    """An array as a field."""
    raw = b"".join(fields)
    return b"A" + _u32.pack(len(raw)) + raw


def field_text(field: bytes | None) -> str | None:
    """The text of a long string field; None for any other."""
    return field[5:].decode("utf-8", _ESCAPE) if field is not None and field[:1] == b"S" else None


def field_number(field: bytes | None) -> int | None:
    """The number in an integer field of any width; None for any other."""
    if field is None or field[:1] not in (b"b", b"B", b"s", b"u", b"U", b"I", b"i", b"l", b"L"):
        return None
    return int.from_bytes(field[1:], "big", signed=field[:1] in b"bsUIl")


def field_texts(field: bytes | None) -> list[str] | None:
    """The long strings of an array field; None where it is no array of such."""
    if field is None or field[:1] != b"A":
        return None
    texts = [field_text(item) for item in split_array(field[1:])]
    return [text for text in texts if text is not None] if None not in texts else None


# --- properties -------------------------------------------------------------------------------------------------------

_PROPERTIES = (  # in the order of the wire, with the size of those that have a fixed one
    ("content_type", 1 << 15, None),
    ("content_encoding", 1 << 14, None),
    ("headers", 1 << 13, None),
    ("delivery_mode", 1 << 12, 1),
    ("priority", 1 << 11, 1),
    ("correlation_id", 1 << 10, None),
    ("reply_to", 1 << 9, None),
    ("expiration", 1 << 8, None),
    ("message_id", 1 << 7, None),
    ("timestamp", 1 << 6, 8),
    ("message_type", 1 << 5, None),
    ("user_id", 1 << 4, None),
    ("app_id", 1 << 3, None),
    ("cluster_id", 1 << 2, None),
)


class Properties:
    """The properties of one message, kept as the bytes its publisher sent.

    Raises `Malformed` when made from bytes that are none.
    """

    __slots__ = ("_fields", "raw")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self._fields: dict[str, bytes] = {}
        if len(raw) < 2:
            raise Malformed("a content header has no property flags")
        flags, at = int(_u16.unpack_from(raw)[0]), 2
        if flags & 0b11:
            raise Malformed("a content header has property flags that no property of basic has")
        for name, bit, size in _PROPERTIES:
            if not flags & bit:
                continue
            if size is not None:
                end = at + size
            elif name == "headers":
                end = _limit(raw, at)
            else:
                end = at + 1 + (raw[at] if at < len(raw) else 0)
            if end > len(raw):
                raise Malformed(f"the property {name} is longer than its frame")
            self._fields[name] = raw[at:end]
            at = end
        if at != len(raw):
            raise Malformed("a content header goes on after its last property")

    @classmethod
    def of(cls, fields: Mapping[str, bytes]) -> Properties:
        """Properties from their encoded values, by name."""
        flags = sum(bit for name, bit, _ in _PROPERTIES if name in fields)
        return cls(_u16.pack(flags) + b"".join(fields[name] for name, _, _ in _PROPERTIES if name in fields))

    def text(self, name: str) -> str | None:
        """A property that is a short string; None where the message has none."""
        field = self._fields.get(name)
        return None if field is None else field[1:].decode("utf-8", _ESCAPE)

    @property
    def priority(self) -> int:
        """0 where the message has none."""
        return self._fields.get("priority", b"\0")[0]

    @property
    def headers(self) -> dict[str, bytes]:
        """The header fields by name, each as its bytes; `Malformed` where the table is none."""
        table = self._fields.get("headers")
        return {} if table is None else split_table(table)

    def may_have_header(self, name: str) -> bool:
        """False where the message surely has no such header; cheaper than to look."""
        return short_string(name) in self._fields.get("headers", b"")

    def replace(self, **changes: Mapping[str, bytes] | str | None) -> Properties:
        """The same with other headers (a mapping of fields) or short strings; None takes a property away."""
        fields = dict(self._fields)
        for name, value in changes.items():
            if value is None:
                fields.pop(name, None)
            else:
                fields[name] = short_string(value) if isinstance(value, str) else join_table(value)
        return Properties.of(fields)

    def decoded(self) -> commands.Basic.Properties:
        """The properties as pamqp reads them, for people and tests; raises what pamqp raises."""
        head = header.ContentHeader()
        head.unmarshal(_content_head.pack(commands.Basic.frame_id, 0, 0) + self.raw)
        return head.properties


# --- content frames ---------------------------------------------------------------------------------------------------


def read_publish(payload: bytes) -> tuple[str, str, bool, bool]:
    """Exchange, routing key, mandatory and immediate of a `basic.publish`, read by hand: it is the busiest method."""
    exchange, at = read_short_string(payload, 6)
    routing_key, at = read_short_string(payload, at)
    if at >= len(payload):
        raise Malformed("basic.publish ends before its flags")
    return exchange, routing_key, bool(payload[at] & 1), bool(payload[at] & 2)


def read_content_header(payload: bytes) -> tuple[int, int, bytes]:
    """Class, body size and raw properties of a content header frame."""
    if len(payload) < 14:
        raise Malformed("a content header is at least 14 bytes long")
    class_id, _weight, body_size = _content_head.unpack_from(payload)
    return class_id, body_size, payload[12:]


def content_frames(channel: int, properties: bytes, body: bytes, frame_max: int) -> bytes:
    """The header frame and the body frames of one message."""
    head = frame(FRAME_HEADER, channel, _content_head.pack(commands.Basic.frame_id, 0, len(body)) + properties)
    room = frame_max - FRAME_OVERHEAD
    if len(body) <= room:
        return head + frame(FRAME_BODY, channel, body) if body else head
    pieces = [head]
    pieces += [frame(FRAME_BODY, channel, body[at : at + room]) for at in range(0, len(body), room)]
    return b"".join(pieces)


def deliver_frame(
    channel: int, consumer: bytes, delivery_tag: int, redelivered: bool, exchange: str, routing_key: str
) -> bytes:
    """A `basic.deliver`, written by hand like `read_publish`; `consumer` is the tag as a short string."""
    payload = b"".join(
        (
            b"\x00\x3c\x00\x3c",
            consumer,
            _u64.pack(delivery_tag),
            b"\1" if redelivered else b"\0",
            short_string(exchange),
            short_string(routing_key),
        )
    )
    return frame(FRAME_METHOD, channel, payload)


def get_ok_frame(
    channel: int, delivery_tag: int, redelivered: bool, exchange: str, routing_key: str, left: int
) -> bytes:
    """A `basic.get-ok`, with names in whatever encoding they came."""
    flags = b"\1" if redelivered else b"\0"
    names = short_string(exchange) + short_string(routing_key)
    payload = b"\x00\x3c\x00\x47" + _u64.pack(delivery_tag) + flags + names + _u32.pack(left)
    return frame(FRAME_METHOD, channel, payload)


def return_frame(channel: int, code: int, text: str, exchange: str, routing_key: str) -> bytes:
    """A `basic.return`, with names in whatever encoding they came."""
    names = short_string(text) + short_string(exchange) + short_string(routing_key)
    return frame(FRAME_METHOD, channel, b"\x00\x3c\x00\x32" + _u16.pack(code) + names)
