"""How long the other side asks to be left alone: read from a header or from an error, whatever form it has."""

from __future__ import annotations

import email.utils
import math
from datetime import UTC, datetime, timedelta

from meshkit.core.clock import Clock


def seconds_asked(after: object, clock: Clock) -> float | None:
    """Seconds that a `Retry-After` asks for from now on: 0 where that is past, `None` where it says nothing.

    Both forms of the header (https://www.rfc-editor.org/rfc/rfc9110#field.retry-after), a number of seconds, a
    `timedelta`, or a point in time (UTC where it has no zone). It comes from elsewhere, so whatever else it is, is nothing.
    """
    try:
        if isinstance(after, str):
            text = after.strip()
            # Nobody waits for more seconds than ten digits hold.
            digits = text.isascii() and text.isdigit()
            after = float(text.lstrip("0")[:10] or 0) if digits else email.utils.parsedate_to_datetime(text)
        if isinstance(after, datetime):
            aware = after if after.tzinfo is not None else after.replace(tzinfo=UTC)
            seconds = aware.timestamp() - clock.time()
        elif isinstance(after, timedelta):
            seconds = after.total_seconds()
        elif isinstance(after, int | float) and not isinstance(after, bool):
            seconds = float(after)
        else:
            return None
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return None
    return max(0.0, seconds) if seconds < math.inf else None


def asked_by(error: BaseException | None, clock: Clock) -> float | None:
    """What the `retry_after` of an error asks for, if it has one."""
    try:
        after = getattr(error, "retry_after", None)
    except Exception:
        # A property of somebody else's; what it stumbles over is no matter of the call.
        return None
    return None if after is None else seconds_asked(after, clock)
