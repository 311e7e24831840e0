"""Draws a trace as text: who did what, when, how often, and how it ended.

Everything here is a pure function of spans; nothing reads a terminal, a clock or an environment variable. `waterfall` is
the picture; `tree`, `roots`, `orphans` and `services` are the questions a test asks of the same spans.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

__all__ = [
    "Node",
    "SpanEvent",
    "SpanLink",
    "SpanRecord",
    "orphans",
    "roots",
    "services",
    "tree",
    "waterfall",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanEvent:
    """Something that happened during a span; `time` is nanoseconds since 1970."""

    name: str
    time: int
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanLink:
    """A span elsewhere that this one has to do with, other than its parent. Ids are lower-case hex."""

    trace_id: str
    span_id: str
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRecord:
    """One finished span as it was exported.

    Ids are lower-case hex, `parent_span_id` is "" for a root. `start` and `end` are nanoseconds since 1970. `kind` is
    internal, server, client, producer or consumer; `status` is unset, ok or error. `service` is the resource's
    `service.name`, "" where it has none.
    """

    trace_id: str
    span_id: str
    parent_span_id: str = ""
    name: str
    kind: str = "internal"
    start: int
    end: int
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    events: tuple[SpanEvent, ...] = ()
    links: tuple[SpanLink, ...] = ()
    status: str = "unset"
    status_message: str = ""
    service: str = ""
    resource: Mapping[str, Any] = field(default_factory=dict, hash=False)
    scope: str = ""

    @property
    def duration(self) -> float:
        """Seconds; 0 where the end is missing or lies before the start."""
        return max(0, self.end - self.start) / 1e9


@dataclass(slots=True, eq=False)
class Node:
    """A span with its children, oldest first. `orphan`: it names a parent that is not among the spans."""

    span: SpanRecord
    orphan: bool = False
    children: list[Node] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents before their children."""
        waiting: list[Node] = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.children))


def services(spans: Iterable[SpanRecord]) -> list[str]:
    """The service names that took part, in the order in which each first did something."""
    return list(dict.fromkeys(span.service for span in _in_time(spans) if span.service))


def roots(spans: Iterable[SpanRecord]) -> list[SpanRecord]:
    """The spans that name no parent, oldest first: one for each trace that is told from its beginning."""
    return [span for span in _in_time(spans) if not span.parent_span_id]


def orphans(spans: Iterable[SpanRecord]) -> list[SpanRecord]:
    """The spans whose parent is not among `spans`, oldest first: it was lost, is not yet exported, or was not sampled."""
    known = _in_time(spans)
    ids = {(span.trace_id, span.span_id) for span in known}
    return [s for s in known if s.parent_span_id and (s.trace_id, s.parent_span_id) not in ids]


def tree(spans: Iterable[SpanRecord]) -> list[Node]:
    """Every span exactly once, under its parent; at the top stand roots and orphans, all in the order they started."""
    nodes = {(span.trace_id, span.span_id): Node(span) for span in _in_time(spans)}
    top: list[Node] = []
    for node in nodes.values():
        parent = nodes.get((node.span.trace_id, node.span.parent_span_id))
        if parent is None:
            node.orphan = bool(node.span.parent_span_id)
            top.append(node)
        else:
            parent.children.append(node)
    # Spans that name each other as parent hang from nowhere. They come from a defect, and that is what one wants to see:
    # each ring is cut before its first span.
    reached = {id(node) for head in top for node in head.walk()}
    for node in nodes.values():
        if id(node) not in reached:
            nodes[node.span.trace_id, node.span.parent_span_id].children.remove(node)
            node.orphan = True
            top.append(node)
            reached.update(id(below) for below in node.walk())
    return sorted(top, key=lambda node: (node.span.start, -node.span.end))


def _in_time(spans: Iterable[SpanRecord]) -> list[SpanRecord]:
    return sorted(spans, key=lambda span: (span.start, -span.end))


# --- what a span says ---------------------------------------------------------------------------------------------------


def _transport(span: SpanRecord) -> str:
    if "messaging.system" in span.attributes or span.kind in ("producer", "consumer"):
        return "amqp"
    if any(name in span.attributes for name in ("http.request.method", "http.route", "http.method")):
        return "http"
    return ""


def _attempt(span: SpanRecord) -> int:
    """Which try this span is, from 1; 0 where it is no try at all."""
    said = span.attributes.get("meshkit.attempt")
    if said is None and span.kind == "consumer":
        said = span.attributes.get("meshkit.message.attempt")
    if said is None and isinstance(resent := span.attributes.get("http.request.resend_count"), int):
        said = resent + 1
    return said if isinstance(said, int) else 0


def _is_retry_hop(span: SpanRecord) -> bool:
    return span.kind != "consumer" and "meshkit.retry.delay" in span.attributes


def _is_dead_letter_hop(span: SpanRecord) -> bool:
    return span.kind != "consumer" and "meshkit.dead_letter.reason" in span.attributes


def _words(value: object) -> str:
    return str(value).replace("_", " ")


def _notes(node: Node, siblings: Sequence[Node] = (), story: str | None = None, link: str = "") -> list[str]:
    """What an on-call engineer wants to know of this span and cannot see from its bar, most telling first."""
    span, say = node.span, node.span.attributes
    notes: list[str] = []
    if node.orphan:
        notes.append("parent missing")

    attempt = _attempt(span)
    most = say.get("meshkit.message.max_attempts")
    if span.kind == "consumer" and attempt:
        if attempt > 1 or say.get("meshkit.message.outcome") != "ack":
            notes.append(f"attempt {attempt}/{most}" if most else f"attempt {attempt}")
    elif attempt > 1 or (attempt and any(_attempt(other.span) > 1 for other in siblings)):
        notes.append(f"attempt {attempt}")

    if _is_retry_hop(span):
        following = say.get("meshkit.message.attempt")
        waits = f"waits {_seconds(say['meshkit.retry.delay'])}"
        notes.append(f"{waits}, then attempt {following}" if following else waits)
    if _is_dead_letter_hop(span):
        notes.append(f"dead letter: {_words(say['meshkit.dead_letter.reason'])}")
    if say.get("meshkit.publish.outcome", "confirmed") != "confirmed":
        notes.append(_words(say["meshkit.publish.outcome"]))

    rejected = False
    for event in span.events:
        named = str(event.attributes.get("meshkit.circuit_breaker.name", ""))
        breaker = "breaker" if not named or named in span.name else f"breaker {named}"
        if event.name == "meshkit.circuit_breaker.rejected":
            rejected = True
            notes.append(f"rejected, {breaker} open")
        elif event.name == "meshkit.circuit_breaker.state_change":
            to = event.attributes.get("meshkit.circuit_breaker.to", event.attributes.get("to"))
            notes.append(f"{breaker} now {_words(to)}" if to else f"{breaker} changes")
        elif event.name == "meshkit.fallback":
            reason = event.attributes.get("meshkit.fallback.reason")
            notes.append("fallback" if rejected or not reason else f"fallback: {_words(reason)}")

    if span.status == "error" and not rejected:
        code, kind = say.get("http.response.status_code"), say.get("error.type")
        if code:
            notes.append(str(code))
        elif kind:
            notes.append(str(kind).rpartition(".")[2])
        elif span.status_message:
            notes.append(span.status_message[:60])
    elif say.get("http.response.status_code") in (429, 503):
        # A server that refuses is doing its job, so its own span is no error; the caller's picture still needs it.
        notes.append(str(say["http.response.status_code"]))

    if (tries := say.get("meshkit.attempts", 0)) and isinstance(tries, int) and tries > 1:
        notes.append(f"{tries} attempts")
    outcome = say.get("meshkit.outcome")
    if outcome in ("rejected", "fallback", "cancelled") and not any(note.startswith(outcome) for note in notes):
        notes.append(outcome)
    if "meshkit.message.outcome" in say:
        notes.append(_words(say["meshkit.message.outcome"]))
    if story is not None and any(link.trace_id == story for link in span.links):
        notes.append(f"{link} story")
    elif span.links and (elsewhere := [link for link in span.links if link.trace_id not in (span.trace_id, story)]):
        notes.append(f"links {elsewhere[0].trace_id[:8]}")
    return notes


# --- folding ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Fold:
    """Subtrees that are told in one line, because they are alike or belong to other stories."""

    nodes: list[Node]
    others: bool = False

    def spans(self) -> list[SpanRecord]:
        return [below.span for node in self.nodes for below in node.walk()]


def _fold(top: list[Node], *, most: int, story: str | None) -> dict[int, list[Node | _Fold]]:
    """The children to draw, by the id of their parent (0: the top), so that about `most` lines are left.

    Two reasons to fold. In a replay, what was replayed beside the story's message belongs to other stories. And where
    there are more lines than `most`, siblings whose whole subtrees look alike (names, kinds, ends, attempts) are drawn
    once. What cannot be folded honestly is drawn, so the picture may be longer than `most`.
    """
    groups: list[tuple[int, list[Node]]] = [(0, top)]
    groups += [(id(node), node.children) for head in top for node in head.walk() if node.children]
    shape, size, ours, theirs = _shapes(top, story)
    drawn: dict[int, list[Node | _Fold]] = {key: list(children) for key, children in groups}
    hidden: set[int] = set()
    lines = sum(size[id(node)] for node in top)

    def hide(key: int, nodes: list[Node], *, others: bool) -> None:
        nonlocal lines
        gone = {id(below) for node in nodes for below in node.walk()}
        lines -= len(gone - hidden) - 1
        hidden.update(gone)
        kept = [child for child in drawn[key] if id(child) not in gone]
        at = next((i for i, child in enumerate(drawn[key]) if id(child) in gone), len(kept))
        drawn[key] = [*kept[:at], _Fold(nodes, others), *kept[at:]]

    if story is not None:
        for key, children in groups:
            other = [node for node in children if id(node) in theirs and id(node) not in ours]
            if any(id(node) in ours for node in children) and sum(size[id(node)] for node in other) > 2:
                hide(key, other, others=True)

    alike: list[tuple[int, list[Node]]] = []
    for key, children in groups:
        same: dict[int, list[Node]] = {}
        for node in children:
            if id(node) not in ours:
                same.setdefault(shape[id(node)], []).append(node)
        alike += [(key, nodes[1:]) for nodes in same.values() if len(nodes) > 2]
    alike.sort(key=lambda group: -sum(size[id(node)] for node in group[1]))
    for key, nodes in alike:
        if lines <= most:
            break
        if key not in hidden and not any(id(node) in hidden for node in nodes):
            hide(key, nodes, others=False)
    return drawn


def _shapes(top: list[Node], story: str | None) -> tuple[dict[int, int], dict[int, int], set[int], set[int]]:
    """By node id: a number that is equal for subtrees that look alike, the spans in it; and which subtrees hold a link
    to the story, which one to some other trace."""
    numbers: dict[object, int] = {}
    shape: dict[int, int] = {}
    size: dict[int, int] = {}
    ours: set[int] = set()
    theirs: set[int] = set()
    for head in top:
        for node in reversed(list(head.walk())):  # children before their parents
            span, below = node.span, [id(child) for child in node.children]
            looks = (span.service, span.name, span.kind, span.status, node.orphan, tuple(_notes(node)))
            # The order of children is left out: two consumers of one event finish in any order.
            key = (looks, tuple(sorted(shape[child] for child in below)))
            shape[id(node)] = numbers.setdefault(key, len(numbers))
            size[id(node)] = 1 + sum(size[child] for child in below)
            if any(link.trace_id == story for link in span.links) or any(child in ours for child in below):
                ours.add(id(node))
            if any(link.trace_id not in (story, span.trace_id) for link in span.links) or any(
                child in theirs for child in below
            ):
                theirs.add(id(node))
    return shape, size, ours, theirs


# --- the picture --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Glyphs:
    bar: str = "█"
    sliver: str = "▌"
    folded: str = "▒"
    wait: str = "╌"
    guide: str = "┊"
    fork: str = "├"
    last: str = "└"
    pipe: str = "│"
    http: str = "→"
    amqp: str = "⇢"
    error: str = "✗"
    cut: str = "…"
    dot: str = " · "
    micro: str = "µs"
    link: str = "↩"


_ASCII = _Glyphs(
    bar="#", sliver="#", folded="%", wait="-", guide=":", fork="+", last="`", pipe="|", http=">", amqp="~", error="x",
    cut="..", dot=", ", micro="us", link="<-",
)  # fmt: skip
_DRAWN = "".join(getattr(_Glyphs(), name) for name in _Glyphs.__slots__)

_RED, _YELLOW, _MAGENTA, _CYAN, _GREEN, _DIM, _BOLD = "31", "33", "35", "36", "32", "2", "1"


@dataclass(slots=True)
class _Row:
    stem: str
    under: str
    service: str
    name: str
    glyph: str
    start: int
    end: int
    wait_until: int
    notes: list[str]
    error: bool
    colour: str
    folded: bool


def waterfall(
    spans: Iterable[SpanRecord],
    *,
    replay: Iterable[SpanRecord] | None = None,
    width: int = 100,
    color: bool = False,
    encoding: str = "utf-8",
    max_lines: int = 60,
) -> str:
    """The story of one event as a picture for a terminal: one line a span, all on one linear time axis.

    `replay` is drawn below on the same axis, with what it links to. `width` is the terminal's columns (below 72 it is
    taken as 72). `color` adds ANSI colours; whether they are wanted (NO_COLOR, a pipe) is for the caller to say.
    `encoding` is the terminal's: where it cannot show the lines and marks, plain ASCII is drawn. From `max_lines` spans
    a trace on, siblings that look alike are told in one line that says how many they are.

    Service and span names are shown with control characters replaced, so a name cannot command the terminal.
    """
    first = _in_time(spans)
    second = _in_time(replay or ())
    if not first and not second:
        return "no spans\n"
    glyphs = _Glyphs() if _can_show(encoding) else _ASCII
    page = _Page(first + second, width=max(72, width), glyphs=glyphs, color=color)
    story = first[0].trace_id if first else None
    for title, told, origin in (("Story", first, None), ("Replay", second, story)):
        for trace_id in dict.fromkeys(span.trace_id for span in told):
            trace = [span for span in told if span.trace_id == trace_id]
            page.section(title, trace, story=first if origin else None, most=max_lines)
    text = page.text()
    return text if glyphs is not _ASCII else text.encode(encoding, "replace").decode(encoding)


def _can_show(encoding: str) -> bool:
    try:
        _DRAWN.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


class _Page:
    """The lines so far, and the columns and axis that every trace on the page shares."""

    def __init__(self, spans: list[SpanRecord], *, width: int, glyphs: _Glyphs, color: bool) -> None:
        self._glyphs, self._color, self._width = glyphs, color, width
        self._start = min(span.start for span in spans)
        self._total = max(1, max(max(span.start, span.end) for span in spans) - self._start)
        tops = tree(spans)
        depth: dict[int, int] = {}
        wanted = 28  # what a folded line needs
        for head in tops:
            for node in head.walk():
                deep = depth.setdefault(id(node), 0)
                wanted = max(wanted, deep + 2 + _cells(_clean(node.span.name)))
                for child in node.children:
                    depth[id(child)] = deep + 1
        self._service = min(max(7, *(_cells(_clean(span.service)) for span in spans)), 20 if width >= 120 else 15)
        # Mark, service, name, lane, duration, with a blank between. The lane takes what the names leave, and at least
        # half: it is the point of the picture, and the notes stand in it.
        room = width - 2 - self._service - 1 - 1 - 1 - 7
        self._name = min(wanted, room - room * 11 // 20)
        self._lane = room - self._name
        self._ticks = _ticks(self._total, self._lane, glyphs.micro)
        self._lines: list[str] = []
        self._seen: set[str] = set()

    # text and colour

    def _paint(self, text: str, *codes: str) -> str:
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if self._color and any(codes) and text else text

    def _fit(self, text: str, cells: int, *, middle: bool = True) -> str:
        """Exactly `cells` wide. A queue's name is cut in the middle, because its service and its event both tell."""
        if _cells(text) <= cells:
            return text + " " * (cells - _cells(text))
        cut = self._glyphs.cut
        keep = max(0, cells - len(cut))
        behind = keep // 2 if middle else 0
        head, tail = _take(text, keep - behind), _take(text[::-1], behind)[::-1]
        short = head + cut + tail
        return short + " " * (cells - _cells(short))

    def text(self) -> str:
        legend = [
            (self._glyphs.http, "HTTP"),
            (self._glyphs.amqp, "AMQP"),
            (self._glyphs.error, "error"),
            (self._glyphs.wait, "waiting for the next attempt"),
            (self._glyphs.folded, "several spans in one line"),
            (self._glyphs.link, "linked to the story"),
        ]
        said = [f"{glyph} {meaning}" for glyph, meaning in legend if glyph in self._seen]
        if said:
            self._lines.append("")
            self._lines += [self._paint(line, _DIM) for line in self._wrapped(said, between="   ")]
        return "\n".join(line.rstrip() for line in self._lines) + "\n"

    # one trace

    def section(self, title: str, spans: list[SpanRecord], *, story: list[SpanRecord] | None, most: int) -> None:
        glyphs = self._glyphs
        if self._lines:
            self._lines.append("")
        origin = story[0].trace_id if story else None
        self._lines.append(self._paint(f"{title} {spans[0].trace_id}", _BOLD))
        self._lines += self._wrapped(self._facts(spans), between=glyphs.dot)
        if story is not None:
            self._lines += self._linked(spans, story)
        self._lines.append(self._axis())
        tops = tree(spans)
        drawn = _fold(tops, most=most, story=origin)
        for row in self._rows(tops, drawn, origin):
            self._draw(row)

    def _facts(self, spans: list[SpanRecord]) -> list[str]:
        took = max(max(span.start, span.end) for span in spans) - spans[0].start
        failed = sum(span.status == "error" for span in spans)
        dead = sum(_is_dead_letter_hop(span) for span in spans)
        facts = [
            f"{datetime.fromtimestamp(spans[0].start / 1e9, UTC):%Y-%m-%d %H:%M:%S} UTC",
            _count(len(spans), "span"),
            _count(len(services(spans)), "service"),
            _length(took, self._glyphs.micro),
        ]
        facts += [_count(failed, "error")] if failed else []
        facts += [_count(dead, "dead letter")] if dead else []
        if len(heads := roots(spans)) != 1:
            facts.append(f"{len(heads)} roots")
        if lost := len(orphans(spans)):
            facts.append(f"{_count(lost, 'span')} without parent")
        return facts

    def _linked(self, spans: list[SpanRecord], story: list[SpanRecord]) -> list[str]:
        """One line for each link into the story, with both ends named."""
        known = {(span.trace_id, span.span_id): _clean(span.name) for span in story}
        told = [
            (_clean(span.name), known.get((link.trace_id, link.span_id), f"span {link.span_id}"))
            for span in _in_time(spans)
            for link in span.links
            if link.trace_id == story[0].trace_id
        ]
        if not told:
            return [f"  no link to the story {story[0].trace_id}"]
        self._seen.add(self._glyphs.link)
        room = self._width - 4 - len(self._glyphs.link)
        wide = [max(map(_cells, ends)) for ends in zip(*told, strict=True)]
        left = min(wide[0], max(room // 2, room - wide[1]))
        lines = [
            f"  {self._fit(name, left)} {self._glyphs.link} {self._fit(to, min(wide[1], room - left))}"
            for name, to in dict.fromkeys(told)
        ]
        return lines if len(lines) <= 4 else [*lines[:3], f"  and {len(lines) - 3} links more"]

    def _wrapped(self, parts: Iterable[str], *, between: str) -> list[str]:
        lines: list[str] = []
        for part in parts:
            if lines and _cells(lines[-1] + between + part) <= self._width:
                lines[-1] += between + part
            else:
                lines.append(f"  {part}")
        return lines

    def _axis(self) -> str:
        lane = [" "] * self._lane
        for column, label in self._ticks:
            lane[column : column + len(label)] = label
        head = " " * 2 + self._fit("service", self._service) + " " + self._fit("span", self._name) + " "
        return self._paint(head + "".join(lane)[: self._lane] + "    took", _DIM)

    # one span

    def _rows(self, tops: list[Node], drawn: Mapping[int, list[Node | _Fold]], story: str | None) -> Iterable[_Row]:
        waiting: list[tuple[Node | _Fold, Sequence[Node], str, str]] = []

        def push(key: int, siblings: Sequence[Node], below: str, *, top: bool) -> None:
            items = drawn.get(key, [])
            for i in range(len(items) - 1, -1, -1):
                last = i == len(items) - 1
                branch = "" if top else self._glyphs.last if last else self._glyphs.fork
                under = "" if top else below + (" " if last else self._glyphs.pipe)
                waiting.append((items[i], siblings, below + branch, under))

        push(0, tops, "", top=True)
        while waiting:
            item, siblings, stem, under = waiting.pop()
            if isinstance(item, _Fold):
                yield self._fold_row(item, stem, under)
                continue
            yield self._row(item, siblings, stem, under + (self._glyphs.pipe if item.children else ""), story)
            push(id(item), item.children, under, top=False)

    def _row(self, node: Node, siblings: Sequence[Node], stem: str, under: str, story: str | None) -> _Row:
        span = node.span
        glyph = {"http": self._glyphs.http, "amqp": self._glyphs.amqp}.get(_transport(span), "")
        end = max(span.start, span.end)
        colour = _CYAN if glyph == self._glyphs.amqp else _GREEN if glyph else ""
        if _is_retry_hop(span):
            colour = _YELLOW
        if _is_dead_letter_hop(span):
            colour = _MAGENTA
        wait = end
        delay = span.attributes.get("meshkit.retry.delay")
        if _is_retry_hop(span) and isinstance(delay, (int, float)) and delay > 0:
            # What was asked for, not when the next attempt came: a late one then shows as a gap.
            wait = end + int(min(delay * 1e9, self._total))
        return _Row(
            stem, under, _clean(span.service), _clean(span.name), glyph, span.start, end, wait,
            [_clean(note) for note in _notes(node, siblings, story, self._glyphs.link)],
            span.status == "error", colour, False,
        )  # fmt: skip

    def _fold_row(self, fold: _Fold, stem: str, under: str) -> _Row:
        spans = fold.spans()
        failed = sum(span.status == "error" for span in spans)
        count = _count(len(spans), "span") + (f", {_count(failed, 'error')}" if failed else "")
        if fold.others:
            name = f"{self._glyphs.cut} {len(fold.nodes)} more, of other stories"
        else:
            name = f"{self._glyphs.cut} {len(fold.nodes)} more like it"
        ends = max(max(span.start, span.end) for span in spans)
        return _Row(
            stem, under, "", name, "", min(s.start for s in spans), ends, ends, [count], bool(failed), _DIM, True
        )

    def _column(self, time: int, *, end: bool = False) -> int:
        # The last nanosecond of a span belongs to it, the first after it does not.
        place = (time - self._start) * self._lane - (1 if end else 0)
        return min(self._lane - 1, max(0, place // self._total))

    def _empty(self) -> tuple[list[str], list[str]]:
        lane, style = [" "] * self._lane, [""] * self._lane
        for column, _ in self._ticks:
            lane[column], style[column] = self._glyphs.guide, _DIM
        return lane, style

    def _draw(self, row: _Row) -> None:
        glyphs = self._glyphs
        lane, style = self._empty()
        left = self._column(row.start)
        right = max(left, self._column(row.end, end=True))
        bar = glyphs.folded if row.folded else glyphs.bar
        if (row.end - row.start) * self._lane < self._total and not row.folded:
            # Less than a cell, so it is not drawn as two where it lies across a border.
            bar, right = glyphs.sliver, left
        for i in range(left, right + 1):
            lane[i], style[i] = bar, _RED if row.error else row.colour
        edge = right
        if row.wait_until > row.end:
            edge = max(right, self._column(row.wait_until, end=True))
            for i in range(right + 1, edge + 1):
                lane[i], style[i] = glyphs.wait, _YELLOW
        self._seen.update((row.glyph, glyphs.error if row.error else "", glyphs.wait if edge > right else ""))
        self._seen.add(bar if row.folded else "")

        note = glyphs.dot.join(row.notes)
        if any(part.startswith(glyphs.link) for part in row.notes):
            self._seen.add(glyphs.link)
        tint = _RED if row.error else row.colour
        at = self._place(note, left, right, edge)
        if note and at is not None:
            self._write(lane, style, at, note, tint)

        mark, red = (glyphs.error, _RED) if row.error else (" ", "")
        stem = self._stem(row.stem)
        lead = stem + (f"{row.glyph} " if row.glyph else " " if stem else "")
        label = lead + row.name
        operation, own, event = row.name.partition(f" {row.service}.")
        if own and _cells(label) > self._name:
            # A queue is called <service>.<event>; in its own service's line the first half is said already.
            lead += f"{operation} {glyphs.cut}"
            label = lead + _take(event[::-1], max(0, self._name - _cells(lead)))[::-1]
        self._lines.append(
            f"{self._paint(mark, red)} {self._fit(row.service, self._service, middle=False)} "
            f"{self._paint(self._fit(label, self._name), red)} {self._runs(lane, style)} "
            f"{_length(row.end - row.start, glyphs.micro):>7}"
        )
        if note and at is None:
            # Below the bar, and to the left over the names where it is long.
            head = self._fit("", 2 + self._service + 1) + self._fit(self._stem(row.under), self._name) + " "
            lane, style = self._empty()
            line = [*head, *lane, *" " * 8]
            tints = [""] * len(head) + style + [""] * 8
            note = self._fit(note, min(_cells(note), self._width - 4))
            self._write(line, tints, max(4, min(len(head) + left, self._width - _cells(note))), note, tint)
            self._lines.append(self._runs(line, tints))

    def _stem(self, stem: str) -> str:
        most = self._name // 2
        return stem if len(stem) <= most else self._glyphs.cut + stem[len(self._glyphs.cut) - most :]

    def _write(self, lane: list[str], style: list[str], at: int, note: str, tint: str) -> None:
        cells = _split(note)
        for edge in (at - 1, at + len(cells)):
            if 0 <= edge < len(lane) and lane[edge] == self._glyphs.guide:
                lane[edge] = " "
        lane[at : at + len(cells)] = cells
        style[at : at + len(cells)] = [tint] * len(cells)

    def _place(self, note: str, left: int, right: int, edge: int) -> int | None:
        """Where in the lane the note stands: right of the bar and its wait, inside the wait, left of the bar; None where
        none has the room."""
        wide = _cells(note)
        if edge + 2 + wide <= self._lane:
            return edge + 2
        if edge - right >= wide + 4:
            return right + 3
        if left - 1 - wide >= 0:
            return left - 1 - wide
        return None

    def _runs(self, chars: Sequence[str], styles: Sequence[str]) -> str:
        out, i = [], 0
        while i < len(chars):
            j = i
            while j < len(chars) and styles[j] == styles[i]:
                j += 1
            out.append(self._paint("".join(chars[i:j]), styles[i]))
            i = j
        return "".join(out)


# --- lengths, ticks and cells -------------------------------------------------------------------------------------------

_STEPS = (
    *(base * 10**power for power in range(3, 9) for base in (1, 2, 5)),
    *(
        seconds * 10**9
        for seconds in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200)
    ),
    *(days * 86_400 * 10**9 for days in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)),
)


def _ticks(total: int, lane: int, micro: str) -> list[tuple[int, str]]:
    """Columns and labels of the axis: round times, as many as stand apart by 8 columns or more."""
    step = next((step for step in _STEPS if step * lane >= 8 * total), total)
    if step < 10**6:
        unit, scale = micro, 10**3
    elif step < 10**9 and total < 2 * 10**9:
        unit, scale = "ms", 10**6
    elif step < 60 * 10**9:
        unit, scale = "s", 10**9
    elif step < 3600 * 10**9:
        unit, scale = "min", 60 * 10**9
    elif step < 86_400 * 10**9:
        unit, scale = "h", 3600 * 10**9
    else:
        unit, scale = "d", 86_400 * 10**9
    ticks = [(time * lane // total, f"{time / scale:g} {unit}") for time in range(0, total, step)]
    return [(column, label) for column, label in ticks if column + len(label) <= lane]


def _length(nanoseconds: int, micro: str) -> str:
    """A duration in at most seven characters, three figures where they mean something."""
    if nanoseconds < 1_000_000:
        return f"{nanoseconds / 1e3:.0f} {micro}"
    if nanoseconds < 999_500_000:
        return f"{nanoseconds / 1e6:.{1 if nanoseconds < 9_950_000 else 0}f} ms"
    seconds = nanoseconds / 1e9
    if seconds < 99.95:
        return f"{seconds:.{2 if seconds < 9.995 else 1}f} s"
    if seconds < 5_970:
        return f"{seconds / 60:.{1 if seconds < 597 else 0}f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 356_400 else f"{seconds / 86_400:.1f} d"


def _seconds(value: object) -> str:
    if not isinstance(value, (int, float)):
        return _words(value)
    if value < 1:
        return f"{value * 1e3:g} ms"
    return f"{value:g} s" if value < 120 else f"{value / 60:g} min"


def _count(number: int, of: str) -> str:
    return f"{number} {of}" if number == 1 else f"{number} {of}s"


def _clean(text: str) -> str:
    """The text without what would move the cursor, recolour the screen or hide: names come from other programs."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _char_cells(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _cells(text: str) -> int:
    return len(text) if text.isascii() else sum(map(_char_cells, text))


def _take(text: str, cells: int) -> str:
    taken = 0
    for i, char in enumerate(text):
        taken += _char_cells(char)
        if taken > cells:
            return text[:i]
    return text


def _split(text: str) -> list[str]:
    """One string a column: a wide character is followed by an empty one, a combining one stays with its base."""
    columns: list[str] = []
    for char in text:
        wide = _char_cells(char)
        if wide == 0 and columns:
            columns[-1] += char
        else:
            columns += [char, ""][: max(1, wide)]
    return columns
