"""The bytes: what is kept, what is refused."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, header

from meshkit.embedded import wire
from meshkit.embedded.wire import Malformed, Properties


def raw(**properties: object) -> bytes:
    return header.ContentHeader(properties=commands.Basic.Properties(**properties)).marshal()[12:]  # type: ignore[arg-type]


def test_replacing_one_property_keeps_the_bytes_of_the_others():
    """Headers of every type are byte for byte what they were, beside the one that is added."""
    table = {"long": 1, "when": datetime(2026, 1, 1, tzinfo=UTC), "deep": {"list": [1, None, "x"]}}
    before = Properties(raw(headers=table, content_type="text/plain", timestamp=datetime(2026, 1, 1, tzinfo=UTC)))

    after = before.replace(headers={**before.headers, "more": wire.long_field(1)}, expiration="5")

    assert before.headers == {name: field for name, field in after.headers.items() if name != "more"}
    assert ("text/plain", "5", None) == (after.text("content_type"), after.text("expiration"), after.text("reply_to"))
    assert {**table, "more": 1} == after.decoded().headers


def test_taking_a_property_away_takes_its_flag():
    """A property replaced by None is not there at all."""
    properties = Properties(raw(expiration="5", message_id="1")).replace(expiration=None)

    assert raw(message_id="1") == properties.raw


@given(st.binary(max_size=200))
def test_any_bytes_are_properties_or_malformed(data: bytes):
    """No input does anything but parse or raise Malformed, and what parses leaves as it came."""
    try:
        properties = Properties(data)
        _ = properties.headers
    except Malformed:
        return
    assert data == properties.replace().raw


@given(st.binary(max_size=200))
def test_any_bytes_are_a_table_or_malformed(data: bytes):
    """Tables and arrays never read past their end."""
    for split in (wire.split_table, wire.split_array):
        try:
            split(data)
        except Malformed:
            continue


@given(st.binary(max_size=60))
def test_any_bytes_are_a_publish_or_malformed(data: bytes):
    """The busiest method is read by hand, and as strictly."""
    try:
        wire.read_publish(b"\x00\x3c\x00\x28" + data)
    except Malformed:
        return


@pytest.mark.parametrize("name", ["", "key", "grün", "\udcff"])
def test_names_leave_as_they_came(name: str):
    """Short strings in any encoding survive reading and writing."""
    data = wire.short_string(name)

    assert (name, len(data)) == wire.read_short_string(data, 0)


def test_integers_of_every_width_are_read():
    """field_number knows each integer type of RabbitMQ, signed where it is."""
    fields = [b"b\xff", b"B\xff", b"s\xff\xfe", b"u\xff\xfe", b"I\xff\xff\xff\xfd", b"i\0\0\0\x05", b"l" + b"\xff" * 8]

    assert [-1, 255, -2, 65534, -3, 5, -1] == [wire.field_number(field) for field in fields]
    assert wire.field_number(b"S\0\0\0\x011") is None


def test_long_bodies_are_cut_into_frames():
    """A body that fits exactly is one frame; one byte more makes two."""
    exact = wire.content_frames(1, b"\0\0", b"x" * 4088, 4096)
    more = wire.content_frames(1, b"\0\0", b"x" * 4089, 4096)

    assert (1, 2) == tuple(frames.count(b"\x03\x00\x01") for frames in (exact, more))
