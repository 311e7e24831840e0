"""The picture of a story, read as a person reads it, and the questions that tests ask of spans."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshkit.embedded.story import SpanEvent, SpanLink, SpanRecord, orphans, roots, services, tree, waterfall
from tests.embedded_otlp.story_spans import BEGAN, QUEUE, REPLAY, STORY, Telling, enrolment, outage

SECOND = 10**9


def line(picture: str, *words: str) -> str:
    """The one line that has all the words."""
    (found,) = [line for line in picture.splitlines() if all(word in line for word in words)]
    return found


def row(span: SpanRecord, **more: object) -> str:
    """The line of one span that stands alone."""
    return waterfall([replace(span, **more)]).splitlines()[3]  # type: ignore[arg-type]


# --- the whole picture --------------------------------------------------------------------------------------------------

STORY_AND_REPLAY = """\
Story 4bf92f3577b34da6a3ce929d0e0e4736
  2026-09-21 14:13:20 UTC · 15 spans · 4 services · 6.39 s · 5 errors · 1 dead letter
  service         span                              0 s             5 s             10 s        took
  driver          enrol a student                   ▌               ┊               ┊         171 ms
  driver          └→ POST                           ▌               ┊               ┊         168 ms
  enrollment-ser…  └→ POST /enrollments             ▌               ┊               ┊         163 ms
  enrollment-ser…   ├ meshkit.call course-service   ▌ 2 attempts    ┊               ┊         131 ms
✗ enrollment-ser…   │├→ GET /courses/{id}           ▌ attempt 1 · 503               ┊          12 ms
  enrollment-ser…   │└→ GET /courses/{id}           ▌ attempt 2     ┊               ┊          20 ms
  course-service    │ └→ GET /courses/{course_id}   ▌               ┊               ┊          16 ms
  enrollment-ser…   └⇢ publish enrollment-events    ▌               ┊               ┊          14 ms
✗ payment-service    ├⇢ process …rollment-requested ▌ attempt 1/4 · CurrencyError · retry      36 ms
✗ payment-service    ├⇢ process …rollment-requested ▌ attempt 2/4 · CurrencyError · retry      36 ms
  payment-service    │└⇢ publish meshkit.delay.1s   ▌╌╌╌╌ waits 1 s, then attempt 3 ┊         4.0 ms
✗ payment-service    ├⇢ process …rollment-requested ┊   ▌           ┊               ┊          36 ms
                     ││                             ┊   attempt 3/4 · CurrencyError · retry
  payment-service    │└⇢ publish meshkit.delay.5s   ┊   ▌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌           ┊         4.0 ms
                     │                              ┊   waits 5 s, then attempt 4   ┊
✗ payment-service    └⇢ process …rollment-requested ┊               ┊   ▌           ┊          36 ms
                      │                             ┊      attempt 4/4 · CurrencyError · dead letter
  payment-service     └⇢ publish …ent-requested.dlq ┊               ┊   ▌           ┊         4.0 ms
                                                    ┊               ┊ dead letter: retries exhausted

Replay 9c41d0e2a7b84f6c8f1e5b7a3d2c1e0f
  2026-09-21 14:13:32 UTC · 9 spans · 4 services · 480 ms
  receive payment-service…nrollment-requested.dlq ↩ publish enrollment-events
  receive payment-service…nrollment-requested.dlq ↩ publish payment-service.enrollment-requested.dlq
  publish payment-service.enrollment-requested    ↩ publish enrollment-events
  service         span                              0 s             5 s             10 s        took
  meshkit         meshkit.replay p…nt-requested.dlq ┊               ┊               ┊     ██  400 ms
  meshkit         ├⇢ receive payme…nt-requested.dlq ┊               ┊             ↩ story ▌   3.0 ms
  meshkit         └⇢ publish payme…llment-requested ┊               ┊             ↩ story ▌   5.0 ms
  payment-service  └⇢ process …enrollment-requested ┊               ┊               ┊ ack ▌   310 ms
  payment-service   ├ meshkit.call…-provider charge ┊               ┊               ┊     ▌   210 ms
  payment-service   │└→ POST /charges               ┊               ┊               ┊     ▌   200 ms
  payment-provid…   │ └→ POST /charges              ┊               ┊               ┊     ▌   180 ms
  payment-service   └⇢ publish payment-events       ┊               ┊               ┊      ▌   10 ms
  notification-w…    └⇢ process co…ayment-completed ┊               ┊               ┊  ack ▌   50 ms

  → HTTP   ⇢ AMQP   ✗ error   ╌ waiting for the next attempt   ↩ linked to the story
"""


def test_a_story_and_its_replay_at_100_columns() -> None:
    """An enrolment is retried over HTTP, then over AMQP through rungs into the dead-letter queue, and replayed."""
    story, replay = enrolment()
    assert STORY_AND_REPLAY.splitlines() == waterfall(story, replay=replay).splitlines()


OUTAGE_IN_ASCII = """\
Story 4bf92f3577b34da6a3ce929d0e0e4736
  2026-09-21 14:13:20 UTC, 2 spans, 1 service, 20 ms
  service         span                            0 ms      5 ms       10 ms     15 ms          took
  enrollment-se.. > POST /enrollments             ##########################################   20 ms
  enrollment-se.. ` meshkit.call payment-service  :       ###          :         :            1.0 ms
                                                  :       rejected, breaker open, fallback

  > HTTP
"""


def test_a_terminal_without_unicode_gets_ascii() -> None:
    """Where the encoding cannot show the lines and marks, plain characters tell the same: here a breaker and a fallback."""
    assert OUTAGE_IN_ASCII.splitlines() == waterfall(outage(), encoding="ascii").splitlines()


def test_wide_terminals_show_names_whole() -> None:
    """At 160 columns no name is cut, and the picture uses the width."""
    story, replay = enrolment()
    picture = waterfall(story, replay=replay, width=160)
    assert "…" not in picture
    assert 4 == sum(f"process {QUEUE} " in line for line in picture.partition("Replay")[0].splitlines())
    assert 160 == max(map(len, picture.splitlines()))


@pytest.mark.parametrize("width", [0, 72, 80, 100, 131, 160, 240])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    """Every line fits, also the notes that find no room beside their bar."""
    story, replay = enrolment()
    assert max(map(len, waterfall(story, replay=replay, width=width).splitlines())) <= max(72, width)


def test_both_traces_stand_on_one_axis() -> None:
    """The axis is printed above each trace and is the same; what happens later stands further right, in proportion."""
    story, replay = enrolment()
    picture = waterfall(story, replay=replay, width=160).splitlines()
    first, second = (line for line in picture if line.startswith("  service"))
    assert first == second
    # The dead letter came at 6.38 s, the replay began at 12 s, of 12.48 s.
    zero, ten = first.index("0 s"), first.index("10 s")
    dead = next(line for line in picture if "dead letter: retries" in line).index("▌")
    back = next(line for line in picture if "meshkit.replay" in line).index("█")
    assert 6.38 == pytest.approx((dead - zero) / (ten - zero) * 10, abs=0.25)
    assert 12.0 == pytest.approx((back - zero) / (ten - zero) * 10, abs=0.25)


def test_the_replay_names_what_it_continues() -> None:
    """Below the replay's name stands each link into the story with the names of both ends; without one, that is said."""
    story, replay = enrolment()
    assert line(waterfall(story, replay=replay, width=120), f"receive {QUEUE}.dlq", "↩", f"publish {QUEUE}.dlq")
    alone = [replace(span, links=()) for span in replay]
    assert line(waterfall(story, replay=alone), f"no link to the story {STORY}")
    unknown = [replace(replay[0], links=(SpanLink(trace_id=STORY, span_id="feedfeedfeedfeed"),))]
    assert line(waterfall(story, replay=unknown), "↩ span feedfeedfeedfeed")


def test_other_stories_in_a_replay_are_one_line() -> None:
    """What a batch replayed beside the story's message is one line that counts it, however little it is."""
    story, replay = enrolment()
    batch = Telling(REPLAY)
    batch.spans = list(replay)
    for number in range(2):
        other = (SpanLink(trace_id=f"{number + 1:032x}", span_id="1" * 16),)
        back = batch.amqp("meshkit", "publish q", 12.2, 0.01, parent=replay[0].span_id, kind="producer", links=other)
        batch.amqp("payment-service", "process q", 12.3, 0.01, parent=back, kind="consumer", error="Oops")
    picture = waterfall(story, replay=batch.spans)
    assert line(picture, "… 2 more, of other stories", "4 spans, 2 errors", "✗")
    assert "process q" not in picture


# --- one line -----------------------------------------------------------------------------------------------------------

PLAIN = SpanRecord(trace_id=STORY, span_id="1" * 16, name="work", start=BEGAN, end=BEGAN + SECOND, service="shop")


def told(**attributes: object) -> str:
    """The line of a failed or fine consumer span with these attributes, `__` for a dot."""
    attributes = {key.replace("__", "."): value for key, value in attributes.items()}
    short = replace(PLAIN, end=BEGAN + 1, attributes=attributes, kind=str(attributes.pop("kind", "internal")))
    later = replace(PLAIN, span_id="2" * 16, start=BEGAN + SECOND)
    return waterfall([short, later]).splitlines()[3]


@pytest.mark.parametrize(
    ("attributes", "note"),
    [
        ({"kind": "consumer", "meshkit__message__attempt": 1, "meshkit__message__outcome": "ack"}, "▌ ack"),
        ({"kind": "consumer", "meshkit__message__attempt": 2, "meshkit__message__outcome": "ack"}, "attempt 2 · ack"),
        (
            {
                "kind": "consumer",
                "meshkit__message__attempt": 4,
                "meshkit__message__max_attempts": 4,
                "meshkit__message__outcome": "dead_letter",
            },
            "attempt 4/4 · dead letter",
        ),
        ({"kind": "client", "http__request__resend_count": 2}, "attempt 3"),
        ({"kind": "client", "meshkit__attempt": 1}, "▌   "),
        ({"meshkit__attempts": 3, "meshkit__outcome": "error"}, "3 attempts"),
        ({"meshkit__outcome": "cancelled"}, "cancelled"),
        ({"kind": "client", "meshkit__retry__delay": 600}, "waits 10 min"),
        (
            {"kind": "client", "meshkit__retry__delay": 0.05, "meshkit__message__attempt": 2},
            "waits 50 ms, then attempt 2",
        ),
        ({"kind": "client", "meshkit__dead_letter__reason": "crash_loop"}, "dead letter: crash loop"),
        ({"kind": "producer", "meshkit__publish__outcome": "returned"}, "returned"),
        ({"kind": "producer", "meshkit__publish__outcome": "confirmed"}, "▌   "),
        ({"kind": "server", "http__response__status_code": 503}, "503"),
    ],
)
def test_a_line_says_what_matters(attributes: dict[str, object], note: str) -> None:
    """Attempts, outcomes, waits, dead letters and refusals stand beside the bar in words; the ordinary stays silent."""
    assert note in told(**attributes)


def test_a_state_change_of_a_breaker_is_told() -> None:
    """The span that opened a breaker says so, with the breaker's name where the span's own does not hold it."""
    event = SpanEvent(
        name="meshkit.circuit_breaker.state_change",
        time=BEGAN,
        attributes={"meshkit.circuit_breaker.name": "stripe", "meshkit.circuit_breaker.to": "half_open"},
    )
    spans = [replace(PLAIN, events=(event,)), replace(PLAIN, span_id="2" * 16, start=BEGAN + 9 * SECOND)]
    assert "breaker stripe now half open" in waterfall(spans)


def test_http_and_amqp_are_told_apart() -> None:
    """Spans over HTTP and over AMQP have marks of their own, also in instrumentation of others, and a legend says which."""
    http = replace(PLAIN, attributes={"http.method": "GET"})
    amqp = replace(PLAIN, span_id="2" * 16, attributes={"messaging.system": "rabbitmq"})
    picture = waterfall([http, amqp, replace(PLAIN, span_id="3" * 16)])
    assert ["→ work", "⇢ work", "work"] == re.findall(r"shop    ((?:[→⇢] )?work)", picture)
    assert "→ HTTP   ⇢ AMQP" in picture.splitlines()[-1]


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (900, "1 µs"),
        (850_000, "850 µs"),
        (9_940_000, "9.9 ms"),
        (999_000_000, "999 ms"),
        (1_240_000_000, "1.24 s"),
        (12_400_000_000, "12.4 s"),
        (330 * SECOND, "5.5 min"),
        (3000 * SECOND, "50 min"),
        (7200 * SECOND, "2.0 h"),
        (10 * 86_400 * SECOND, "10.0 d"),
        (-5, "0 µs"),
    ],
)
def test_lengths_are_short_and_readable(nanoseconds: int, text: str) -> None:
    """A duration takes the unit that leaves it two or three figures; an end before the start counts as none."""
    assert row(PLAIN, end=BEGAN + nanoseconds).endswith(f" {text}")


@pytest.mark.parametrize(
    ("seconds", "labels"),
    [
        (0.000_04, ["0 µs", "10 µs", "20 µs", "30 µs"]),
        (0.9, ["0 ms", "200 ms", "400 ms", "600 ms", "800 ms"]),
        (12.0, ["0 s", "2 s", "4 s", "6 s", "8 s", "10 s"]),
        (200.0, ["0 s", "30 s", "60 s", "90 s", "120 s", "150 s", "180 s"]),
        (1500.0, ["0 min", "5 min", "10 min", "15 min", "20 min"]),
        (30_000.0, ["0 h", "2 h", "4 h", "6 h", "8 h"]),
    ],
)
def test_the_axis_has_round_times(seconds: float, labels: list[str]) -> None:
    """Ticks stand at round times in one unit, with the room their labels need."""
    axis = waterfall([replace(PLAIN, end=BEGAN + round(seconds * SECOND))], width=106).splitlines()[2]
    assert labels == re.findall(r"\d+ (?:µs|ms|s|min|h)\b", axis)


def test_a_name_cannot_command_the_terminal() -> None:
    """Escape sequences, line breaks and direction marks in names from other programs are shown as question marks."""
    picture = waterfall(
        [replace(PLAIN, name="a\x1b[2J\nb\u202ec", service="s\x07", status="error", status_message="m\x1b")]
    )
    assert "a?[2J?b?c" in picture
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", picture)


def test_wide_characters_keep_the_columns() -> None:
    """Names in scripts whose characters take two columns do not push the axis."""
    picture = waterfall([PLAIN, replace(PLAIN, span_id="2" * 16, name="注文を受け付ける", service="注文")])
    plain, wide = picture.splitlines()[3:5]
    assert plain.index("█") == wide.index("█") + len("注文") + len("注文を受け付ける")


def test_colour_only_when_asked_for() -> None:
    """Without `color` there is no escape sequence; with it the text below the colours is the same."""
    story, replay = enrolment()
    plain, coloured = waterfall(story, replay=replay), waterfall(story, replay=replay, color=True)
    assert "\x1b" not in plain
    bare = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in plain.splitlines()] == [line.rstrip() for line in bare.splitlines()]
    assert "\x1b[31m✗" in coloured


def test_nothing_to_draw_is_said() -> None:
    """No spans are no picture but a sentence, and a replay may stand alone."""
    assert "no spans\n" == waterfall([])
    assert waterfall([], replay=enrolment()[1]).startswith(f"Replay {REPLAY}\n")


# --- folding ------------------------------------------------------------------------------------------------------------


def with_queries(count: int) -> list[SpanRecord]:
    told = Telling(STORY)
    root = told.add("shop", "GET /", 0, 1)
    for number in range(count):
        told.add("shop", "SELECT", number / 1000, 0.0005, parent=root)
    told.add("shop", "SELECT", 0.9, 0.0005, parent=root, error="OperationalError")
    return told.spans


def test_many_alike_are_one_line_that_counts_them() -> None:
    """Beyond `max_lines` siblings that look alike are drawn once and counted; the one that failed is not among them."""
    picture = waterfall(with_queries(100))
    assert line(picture, "… 99 more like it", "▒", "99 spans")
    assert line(picture, "✗", "SELECT", "OperationalError")
    assert line(picture, "102 spans")
    assert line(picture, "▒ several spans in one line")
    assert 3 == sum("SELECT" in line or "more like" in line for line in picture.splitlines())


def test_few_are_never_folded() -> None:
    """Up to `max_lines` every span has its line."""
    assert 51 == sum("SELECT" in line for line in waterfall(with_queries(50)).splitlines())


def test_what_differs_is_never_folded() -> None:
    """A long trace of different spans is drawn whole, because nothing could stand for the rest."""
    told = Telling(STORY)
    for number in range(90):
        told.add("shop", f"step {number}", number, 1)
    assert 90 == sum("step" in line for line in waterfall(told.spans).splitlines())


# --- broken traces ------------------------------------------------------------------------------------------------------


def test_a_span_without_its_parent_is_drawn_and_marked() -> None:
    """An orphan stands at the left edge with a note, and the head counts it."""
    lost = replace(PLAIN, span_id="2" * 16, parent_span_id="9" * 16, name="lost", end=BEGAN + SECOND // 4)
    picture = waterfall([PLAIN, lost])
    assert line(picture, "shop    lost", "parent missing")
    assert line(picture, "1 span without parent")


def test_spans_that_are_each_others_parent_are_drawn_once() -> None:
    """A ring of parents, and a span that is its own, are drawn, not followed for ever."""
    one = replace(PLAIN, name="one", parent_span_id="2" * 16)
    two = replace(PLAIN, name="two", span_id="2" * 16, parent_span_id="1" * 16, start=BEGAN + 1)
    own = replace(PLAIN, name="own", span_id="3" * 16, parent_span_id="3" * 16, start=BEGAN + 2)
    picture = waterfall([one, two, own])
    assert [1, 1, 1] == [picture.count(name) for name in ("one ", "two ", "own ")]
    assert line(picture, "0 roots")


def test_a_very_deep_trace_is_drawn() -> None:
    """Three thousand spans, each within the last, are drawn with the names still readable."""
    told, parent = Telling(STORY), ""
    for number in range(3000):
        parent = told.add("shop", f"deep {number}", number, 1, parent=parent)
    assert line(waterfall(told.spans), "└ deep 2999 ")


_IDS = st.sampled_from(["1" * 16, "2" * 16, "3" * 16, "4" * 16, ""])
_VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_NAMES = [
    "meshkit.attempt",
    "meshkit.retry.delay",
    "meshkit.message.attempt",
    "meshkit.message.outcome",
    "meshkit.dead_letter.reason",
    "http.response.status_code",
    "http.request.resend_count",
    "meshkit.attempts",
    "error.type",
]
_SPANS = st.builds(
    SpanRecord,
    trace_id=st.sampled_from([STORY, REPLAY]),
    span_id=_IDS,
    parent_span_id=_IDS,
    name=st.text(max_size=60),
    service=st.text(max_size=30),
    kind=st.sampled_from(["internal", "server", "client", "producer", "consumer"]),
    status=st.sampled_from(["unset", "error"]),
    start=st.integers(0, 2**64 - 1),
    end=st.integers(0, 2**64 - 1),
    attributes=st.dictionaries(st.sampled_from(_NAMES), _VALUES, max_size=4),
    links=st.just(()) | st.builds(lambda i: (SpanLink(trace_id=STORY, span_id=i),), _IDS),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(_SPANS, max_size=6), st.lists(_SPANS, max_size=6), st.sampled_from(["utf-8", "ascii", "cp1252"]))
def test_any_spans_can_be_drawn(spans: list[SpanRecord], replay: list[SpanRecord], encoding: str) -> None:
    """Whatever other programs send, there is a picture, and the terminal's encoding can show it."""
    waterfall(spans, replay=replay, encoding=encoding, max_lines=2).encode(encoding)


# --- questions ----------------------------------------------------------------------------------------------------------


def test_a_story_answers_questions() -> None:
    """Services come in the order they took part, there is one root, and the tree holds each span once, in time order."""
    story, _ = enrolment()
    shuffled = sorted(story, key=lambda span: span.span_id)
    assert ["driver", "enrollment-service", "course-service", "payment-service"] == services(shuffled)
    assert ["enrol a student"] == [span.name for span in roots(shuffled)]
    assert [] == orphans(shuffled)
    (top,) = tree(shuffled)
    assert story == sorted((node.span for node in top.walk()), key=story.index)
    published = next(node for node in top.walk() if node.span.name == "publish enrollment-events")
    assert [1, 2, 3, 4] == [node.span.attributes["meshkit.message.attempt"] for node in published.children]
    assert ["publish meshkit.delay.1s"] == [node.span.name for node in published.children[1].children]


def test_orphans_are_found() -> None:
    """A span whose parent is in another trace, or nowhere, is an orphan and not a root."""
    elsewhere = replace(PLAIN, trace_id=REPLAY, span_id="2" * 16, parent_span_id=PLAIN.span_id)
    assert [elsewhere] == orphans([PLAIN, elsewhere])
    assert [PLAIN] == roots([PLAIN, elsewhere])
    assert [False, True] == [node.orphan for node in tree([PLAIN, elsewhere])]
