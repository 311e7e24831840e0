"""Reads the pages of the repository: their links, code spans, blocks, and the commands in both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = tuple(
    sorted(
        [
            *ROOT.glob("*.md"),
            *(
                page
                for folder in ("docs", "examples", "proofs", "benchmarks")
                for page in (ROOT / folder).rglob("*.md")
            ),
        ]
    )
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_ENUMERATION = re.compile(r"`([^`]+)`((?:, `\w+`)+)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: `language` is "" where the fence names none."""

    language: str
    text: str


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, of one language or all."""
    found = [Block(*groups) for groups in _FENCE.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if language in (None, block.language)]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """What stands between backquotes in the prose; a span may go over the end of a line."""
    return [" ".join(span.split()) for span in _SPAN.findall(prose(page))]


def links(page: Path) -> list[str]:
    return _LINK.findall(_SPAN.sub("", prose(page)))


def anchors(page: Path) -> set[str]:
    """The names by which headings can be linked to, made as GitHub makes them."""
    headings = (heading.replace("`", "").lower() for heading in _HEADING.findall(prose(page)))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def commands(page: Path, program: str) -> Iterator[str]:
    """Every use of a program that the page shows: in a span, or in a line of a block, without its comment."""
    # "`meshkit dlq list`, `show`, `replay`" is said as `meshkit dlq list | show | replay`.
    said = [" | ".join([first, *_SPAN.findall(others)]) for first, others in _ENUMERATION.findall(prose(page))]
    lines = [line.partition(" # ")[0].strip() for block in blocks(page) for line in block.text.splitlines()]
    for text in [*spans(page), *said, *lines]:
        if text == program or text.startswith(f"{program} "):
            yield text
