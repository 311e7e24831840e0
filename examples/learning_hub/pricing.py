"""What a coupon takes off a price, in each release of payment-service: the only thing in which they differ.

In life there is one release at a time. Here they stand side by side, so that a demo can roll out the one with the
defect (`LEARNING_HUB_RELEASE=1.1.0`) and then the one that mends it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable


def _release_1_0_0(price: int, coupon: str) -> int:
    """Coupons are accepted and ignored."""
    return price


def _release_1_1_0(price: int, coupon: str) -> int:
    """The last two characters are the percentage: WELCOME10, but not SPRING5."""
    percent = int(coupon[-2:]) if coupon else 0
    return price * (100 - percent) // 100


def _release_1_1_1(price: int, coupon: str) -> int:
    """The digits at the end are the percentage."""
    digits = re.search(r"\d+$", coupon)
    percent = min(int(digits[0]), 100) if digits else 0
    return price * (100 - percent) // 100


RELEASES: dict[str, Callable[[int, str], int]] = {
    "1.0.0": _release_1_0_0,
    "1.1.0": _release_1_1_0,
    "1.1.1": _release_1_1_1,
}
RELEASE = os.environ.get("LEARNING_HUB_RELEASE", "1.1.1")

discounted = RELEASES[RELEASE]
