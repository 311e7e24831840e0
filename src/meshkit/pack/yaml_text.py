"""Writes plain data as YAML, so that exporting the pack needs no library a service would not have."""

import json
import re
from collections.abc import Mapping, Sequence

# What may stand without quotes. Words that YAML reads as something else (yes, no, null, on) and anything that looks
# like a number stay out of it, as they do not begin with a letter or are listed here.
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*\Z")
_NOT_TEXT = {"true", "false", "null", "yes", "no", "on", "off", "y", "n"}


def yaml_text(value: object) -> str:
    """`value`, made of mappings, sequences, text, numbers and booleans, as a YAML document that ends in a newline.

    Text of several lines becomes a literal block, which is what makes PromQL readable in a rule file.
    """
    return "\n".join(_lines(value)) + "\n"


def _lines(value: object) -> list[str]:
    if isinstance(value, Mapping) and value:
        lines: list[str] = []
        for key, item in value.items():
            lines += _entry(f"{_scalar(str(key))}:", item)
        return lines
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        lines = []
        for item in value:
            inner = _lines(item)
            if isinstance(item, Mapping | list | tuple) and item:
                lines += [f"- {inner[0]}", *(f"  {line}" for line in inner[1:])]
            else:
                lines += _entry("-", item)
        return lines
    return [_scalar(value)]


def _entry(head: str, item: object) -> list[str]:
    if isinstance(item, str) and "\n" in item:
        return [f"{head} |-", *(f"  {line}".rstrip() for line in item.rstrip("\n").split("\n"))]
    if isinstance(item, Mapping | list | tuple) and item:
        return [head, *(f"  {line}" for line in _lines(item))]
    return [f"{head} {_scalar(item)}"]


def _scalar(value: object) -> str:
    if isinstance(value, str) and _PLAIN.match(value) and value.lower() not in _NOT_TEXT:
        return value
    # JSON's scalars, its empty list and its empty object are YAML too.
    return json.dumps(value, ensure_ascii=False)
