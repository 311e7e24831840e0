"""Reads of a PromQL expression which series, label matchers and groupings it uses.

Not a parser: what parses is promtool's to say. It knows as much as the expressions of the pack use.
"""

import re
from dataclasses import dataclass

_KEYWORDS = {"and", "or", "unless", "offset", "bool", "inf", "nan"}
_GROUPINGS = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_TOKEN = re.compile(
    r'(?P<text>"(?:[^"\\]|\\.)*")|(?P<range>\[[^\]]*\])|(?P<name>[A-Za-z_:][A-Za-z0-9_:]*)|(?P<number>[0-9][0-9A-Za-z.]*)'
    r"|(?P<sign>[{}(),=~!<>+*/%^-]+?)|\s+"
)
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Selector:
    """One use of a series: its name and its matchers, each a label, an operator and a value."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]


def selectors(expression: str) -> list[Selector]:
    """Every series that `expression` selects, in order."""
    found = []
    tokens = [match for match in _TOKEN.finditer(expression) if match.lastgroup]
    skip_to = -1
    for i, token in enumerate(tokens):
        if token.start() < skip_to or token.lastgroup != "name" or token.group() in _KEYWORDS:
            continue
        following = tokens[i + 1].group() if i + 1 < len(tokens) else ""
        if token.group() in _GROUPINGS:
            skip_to = expression.index(")", token.end())
        elif following == "{":
            skip_to = expression.index("}", token.end())
            matchers = _MATCHER.findall(expression[token.end() : skip_to])
            found.append(Selector(token.group(), tuple(matchers)))
        elif following not in {"(", "by", "without"} and not (following == "" and i == 0 and "(" in expression):
            found.append(Selector(token.group(), ()))
    return found


def groupings(expression: str) -> set[str]:
    """Every label that `expression` groups or joins by."""
    lists = re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expression)
    return {name.strip() for names in lists for name in names.split(",") if name.strip()}
