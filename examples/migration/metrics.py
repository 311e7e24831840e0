"""The metrics of the client, made by hand; `after.py` does without them."""

from __future__ import annotations

from typing import Any

import pybreaker
from prometheus_client import Counter, Gauge, Histogram

ANSWERS = Counter("prices_answers_total", "Answers of the price service.", ["status"])
SECONDS = Histogram("prices_attempt_seconds", "How long one attempt took.")
RETRIES = Counter("prices_retries_total", "Attempts after the first.")
OPEN = Gauge("prices_breaker_open", "1 while the breaker is open.")


class BreakerMetrics(pybreaker.CircuitBreakerListener):
    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        OPEN.set(new_state.name == "open")
