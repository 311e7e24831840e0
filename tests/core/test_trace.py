import pytest

from meshkit.core.trace import TraceContext, parse_traceparent

GOOD = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03"


def test_reads_a_traceparent():
    """Ids, flags and the vendor list are taken over, and the text can be made again."""
    context = parse_traceparent(GOOD, "a=1")
    assert TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", 3, "a=1") == context
    assert (GOOD, True) == (context.traceparent, context.sampled)


def test_bytes_are_text_too():
    """What a broker hands over as bytes is read like text."""
    assert parse_traceparent(GOOD) == parse_traceparent(GOOD.encode())


def test_a_later_version_may_hold_more():
    """A version after 00 is read by its first four fields (W3C Trace Context, section 3.2)."""
    assert parse_traceparent("01" + GOOD[2:] + "-more") is not None


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        {"a": 1},
        "",
        GOOD.upper(),
        GOOD[:-1],
        GOOD + "-more",
        "ff" + GOOD[2:],
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
        "01" + GOOD[2:] + "-" + "x" * 600,
        b"\xff" * 55,
    ],
    ids=str,
)
def test_anything_else_is_no_context(value):
    """A header that is not a traceparent, of whatever type, gives no context and no error."""
    assert parse_traceparent(value) is None


def test_a_tracestate_that_no_header_can_hold_is_left_out():
    """A line break in it would be a header of somebody else's choosing; the trace itself goes on."""
    given = "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    assert "a=1,b=2" == parse_traceparent(given, "a=1,b=2").tracestate
    for hostile in ("a=1\r\nx-evil: 1", "a=\x00", "ä=1", b"a=\xff", ["a=1"], "a=" + "1" * 600):
        assert "" == parse_traceparent(given, hostile).tracestate
