"""Reading headers that the protocol allows and pamqp does not: without this, one such message stops its consumer.

pamqp raises for a timestamp out of Python's range (microseconds, a sentinel) and for a short string that is no UTF-8.
It does so in the task that reads the connection: the connection ends, the message is delivered again, and so on for
ever, before any handler is called (https://github.com/mosquito/aiormq/issues/186). What is put in place here only
answers where pamqp would raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pamqp import decode

_TIMESTAMP: Final = decode.METHODS["timestamp"]
_SHORT_STRING: Final = decode.METHODS["shortstr"]
_WIDTH: Final = 8


def _property_timestamp(value: bytes) -> tuple[int, Any]:
    try:
        return _TIMESTAMP(value)
    except (OverflowError, OSError, ValueError):
        # As if the producer had set none: there is no such time.
        return _WIDTH, None


def _header_timestamp(value: bytes) -> tuple[int, Any]:
    try:
        return _TIMESTAMP(value)
    except (OverflowError, OSError, ValueError):
        return _WIDTH, int.from_bytes(value[:_WIDTH], signed=True)


def _short_string(value: bytes) -> tuple[int, Any]:
    try:
        return _SHORT_STRING(value)
    except UnicodeDecodeError:
        length = value[0]
        return length + 1, value[1 : length + 1].decode("latin-1")


def tolerate() -> None:
    """Have pamqp read such values, in this process, from now on."""
    methods: dict[str, Callable[..., tuple[int, Any]]] = decode.METHODS
    table: dict[bytes, Callable[..., tuple[int, Any]]] = decode.TABLE_MAPPING
    methods["timestamp"] = _property_timestamp
    methods["shortstr"] = _short_string
    table[b"T"] = _header_timestamp
