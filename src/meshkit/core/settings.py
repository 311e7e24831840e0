"""Where a setting's value comes from: argument, then `MESHKIT_*`, then `OTEL_*`, then the default."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from meshkit.errors import ConfigurationError

T = TypeVar("T")


def setting(name: str, argument: T | None, *, parse: Callable[[str], T], default: T, otel: str = "") -> T:
    """The value of one setting.

    Args:
        name: what is set, `"amqp_url"`: read from the environment as `MESHKIT_AMQP_URL`.
        argument: what the caller gave; `None` where nothing was given.
        parse: makes the value from text, and raises `ValueError` where it cannot.
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
            except ValueError as error:
                raise ConfigurationError(f"{variable} is {text!r}: {error}.") from error
    return default
