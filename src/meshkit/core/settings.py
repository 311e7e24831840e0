"""Where a setting's value comes from: argument, then `MESHKIT_*`, then `OTEL_*`, then the default."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Final, TypeVar

from meshkit.errors import ConfigurationError

T = TypeVar("T")
_CREDENTIALS: Final = re.compile(r"//\S*@")

# The units of a length of time, in seconds.
UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_LENGTH: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?")


def seconds(text: str) -> float:
    """Read a length of time: `"250ms"`, `"10s"`, `"1.5m"`, `"2h"`, `"1d"`, or a number of seconds.

    Raises:
        ValueError: the text is none.
    """
    match = _LENGTH.fullmatch(text.strip())
    if match is None:
        raise ValueError('a length of time is a number of seconds, or one with a unit: "250ms", "10s", "1.5m"')
    length, unit = match.groups()
    return round(float(length) * UNITS[unit or "s"], 6)


def setting(name: str, argument: T | None, *, parse: Callable[[str], T], default: T, otel: str = "") -> T:
    """The value of one setting.

    Args:
        name: what is set, `"amqp_url"`: read from the environment as `MESHKIT_AMQP_URL`.
        argument: what the caller gave; `None` where nothing was given.
        parse: makes the value from text, and raises `ValueError` (or `OverflowError`) where it cannot.
        default: the value where nobody said anything.
        otel: the standard `OTEL_*` variable that means the same, if there is one.

    Raises:
        ConfigurationError: the environment holds a text that is no such value.
    """
    if argument is not None:
        return argument
    for variable in (f"MESHKIT_{name.upper()}", otel):
        # An empty variable counts as not set, as the OpenTelemetry specification has it.
        if variable and (text := os.environ.get(variable, "").strip()):
            try:
                return parse(text)
            except (ValueError, ArithmeticError) as error:
                # A URL's password belongs into no log.
                shown = _CREDENTIALS.sub("//…@", text)
                why = error.cause if isinstance(error, ConfigurationError) else _CREDENTIALS.sub("//…@", str(error))
                raise ConfigurationError(f"{variable} is {shown!r}: {why.rstrip('.')}.") from (
                    error if shown == text else None
                )
    return default
