"""What may stand in headers, and how it is made to fit."""

from datetime import UTC, datetime

import pytest

from meshkit.errors import EnvelopeError
from meshkit.messaging import headers as h
from meshkit.messaging.message import Message, received


def test_a_copy_carries_nothing_that_the_broker_wrote():
    """Death notes, counts, CC and BCC stay behind; everything else goes along, whatever its type."""
    theirs = {"tenant": b"\xff", "nested": {"x": [1, None]}, "x-custom": 1, "traceparent": "00-…"}
    broken = {
        "x-death": [{"count": 1}],
        "x-first-death-queue": "q",
        "x-last-death-reason": "expired",
        "x-delivery-count": 3,
        "x-acquired-count": 4,
        "CC": ["a"],
        "BCC": ["b"],
    }
    assert theirs == h.without_broker_headers({**theirs, **broken})
    assert {} == h.without_broker_headers(None)


def test_times_are_text_in_utc_with_milliseconds():
    """A point in time survives being written and read."""
    at = datetime(2026, 11, 21, 13, 0, 0, 123_000, tzinfo=UTC).timestamp()
    assert "2026-11-21T13:00:00.123Z" == h.rfc3339(at)
    assert at == pytest.approx(h.parse_rfc3339(h.rfc3339(at)))
    assert at == pytest.approx(h.parse_rfc3339("2026-11-21T15:00:00.123+02:00"))


@pytest.mark.parametrize("text", ["", "now", "2026-11-21", "2026-11-21T13:00:00", "1732194000", "2026-99-21T13:00:00Z"])
def test_refuses_what_is_no_time(text: str):
    """A time without a zone, or something else altogether, is no RFC 3339 time."""
    with pytest.raises(ValueError):
        h.parse_rfc3339(text)


@pytest.mark.parametrize(
    "headers",
    [
        {h.ATTEMPT: "zero"},
        {h.ATTEMPT: "0"},
        {h.ATTEMPT: "-1"},
        {h.ATTEMPT: 1.5},
        {h.ATTEMPT: True},
        {h.ATTEMPT: "9" * 40},
        {h.REPLAY_COUNT: "many"},
        {h.FIRST_PUBLISHED_AT: "yesterday"},
        {h.DEADLINE: "2026-11-21T13:00:00"},
        {h.DEADLINE: 17},
    ],
)
def test_an_envelope_that_does_not_hold_what_it_promises_is_refused(headers: dict[str, object]):
    """A header of meshkit's own with an impossible value makes the message unreadable."""
    with pytest.raises(EnvelopeError):
        _received(headers)


def test_the_attempt_is_the_number_of_this_try():
    """Absent is 1; text, bytes and integers are understood; an absurd one is cut."""
    assert [1, 3, 3, 3, 1_000_000_000] == [
        _received({h.ATTEMPT: value} if value is not None else {}).attempt
        for value in (None, "3", b"3", 3, "999999999999")
    ]


def test_first_facts_are_put_back():
    """A message that came back through a rung says what it said when it first came."""
    delivery = _received({h.EXCHANGE: "user-events", h.ROUTING_KEY: "user.created"}, exchange="meshkit.delay.10s")
    assert ("user-events", "user.created") == (delivery.exchange, delivery.routing_key)
    direct = _received({h.EXCHANGE: "", h.ROUTING_KEY: "work"}, exchange="meshkit.delay.10s")
    assert ("", "work") == (direct.exchange, direct.routing_key)
    fresh = _received({}, exchange="user-events")
    assert ("user-events", "key") == (fresh.exchange, fresh.routing_key)


def test_age_is_never_negative_and_falls_back_to_the_timestamp():
    """Clocks of two hosts differ; a producer that knows no meshkit may have set AMQP's own timestamp."""
    assert 0.0 == _received({h.FIRST_PUBLISHED_AT: "2026-11-21T13:00:00.000Z"}).age(0.0)
    assert _received({}).age(0.0) is None
    stamped = Message(body=b"", timestamp=datetime.fromtimestamp(100, UTC))
    delivery = received(stamped, queue="q", exchange="", routing_key="q", redelivered=False, max_attempts=1)
    assert 5.0 == delivery.age(105.0)


def test_a_table_that_is_too_large_is_made_to_fit():
    """The stack loses its beginning first, then the message its end, then the largest headers of others go; what
    meshkit needs stays."""
    headers = {
        h.ATTEMPT: "3",
        h.TRACEPARENT: "00-trace",
        h.ERROR_MESSAGE: "m" * h.MOST_MESSAGE,
        h.ERROR_STACK: "s" * (h.MOST_STACK - 4) + "last",
        "small": "kept",
        "huge": "x" * 60_000,
    }
    fitted = h.fitted(headers)
    assert h.size(fitted) <= h.MOST_BYTES
    assert "huge" not in fitted
    assert ("3", "00-trace", "kept") == (fitted[h.ATTEMPT], fitted[h.TRACEPARENT], fitted["small"])


@pytest.mark.parametrize("name", ["meshkit-foo", "ce-foo", h.TRACEPARENT, h.REPLAYED_BY])
def test_even_own_names_give_way(name: str):
    """What somebody else wrote under a name of meshkit's does not keep a copy from being stored."""
    headers = {"other": "x" * 40_000, name: "x" * 60_000, h.ATTEMPT: "3", h.ROUTING_KEY: "k" * 255}
    assert {h.ATTEMPT: "3", h.ROUTING_KEY: "k" * 255} == h.fitted(headers)


def test_a_stack_loses_its_beginning_when_the_table_is_slightly_too_large():
    """What failed stands last in a stack, so that is what is kept."""
    headers = {"theirs": "x" * 26_000, h.ERROR_STACK: "s" * (h.MOST_STACK - 4) + "last"}
    fitted = h.fitted(headers)
    assert h.size(fitted) <= h.MOST_BYTES
    assert fitted[h.ERROR_STACK].endswith("last")
    assert "theirs" in fitted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (h.EXCHANGE, "x" * 256),
        (h.ROUTING_KEY, "x" * 60_000),
        (h.DEADLINE, "0001-01-01T00:00:00+23:59"),
        (h.DEADLINE, "9999-12-31T23:59:59-23:59"),
        (h.FIRST_PUBLISHED_AT, "9999-12-31T23:59:59-23:59"),
    ],
)
def test_what_could_not_be_written_again_is_not_read(name: str, value: str):
    """A name longer than names are, and a time outside the years of the format, are no envelope."""
    with pytest.raises(EnvelopeError, match=name):
        _received({name: value})


def test_a_time_may_be_written_in_small_letters():
    """RFC 3339 has `t` and `z` too."""
    assert h.parse_rfc3339("2026-11-21T13:00:00.5Z") == h.parse_rfc3339("2026-11-21t13:00:00.5z")


def test_cuts_text_between_characters():
    """A length is in bytes of UTF-8, and no character is cut in two."""
    assert "ää" == h.cut("äää", 5)
    assert "ää" == h.tail("äää", 5)
    assert ("", "") == (h.cut("ää", 0), h.tail("ää", 0))


def _received(headers: dict[str, object], *, exchange: str = "e"):
    message = Message(body=b"", message_id="1", headers=headers)
    return received(message, queue="q", exchange=exchange, routing_key="key", redelivered=False, max_attempts=3)
