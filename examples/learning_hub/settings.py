"""What differs between a laptop and production, read from the environment: addresses, databases, patience.

`COURSE_SERVICE_URL` is where course-service listens and is found, `COURSE_SERVICE_DATABASE_URL` its database, and so on
for each service. The broker (`MESHKIT_AMQP_URL`) and the traces (`OTEL_*`) are meshkit's own settings.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

PORTS = {
    "user-service": 8001,
    "course-service": 8002,
    "enrollment-service": 8003,
    "payment-service": 8004,
    "notification-content-worker": 8005,
    "payment-provider": 8010,
}

# A request may take 30 seconds in all; one transaction with another party 5.
TOTAL_TIMEOUT = 30.0
ATTEMPT_TIMEOUT = 5.0

# When a message is tried again, and how long a breaker keeps calls away: a demo has less patience than production.
RETRY = os.environ.get("LEARNING_HUB_RETRY", "50ms, 10s*3, 1m*3, 10m*2")
BREAKER_OPEN_FOR = float(os.environ.get("LEARNING_HUB_BREAKER_OPEN_FOR", "15"))


def variable(service: str, what: str) -> str:
    """The name of a service's own variable: `variable("course-service", "URL")` is `COURSE_SERVICE_URL`."""
    return f"{service.upper().replace('-', '_')}_{what}"


def url_of(service: str) -> str:
    """Where a service is found."""
    return os.environ.get(variable(service, "URL"), f"http://127.0.0.1:{PORTS[service]}")


def port_of(service: str) -> int:
    """Where a service listens."""
    return urlsplit(url_of(service)).port or 80


def database_of(service: str) -> str:
    """A service's own database: a file beside it, or `postgresql+asyncpg://…`."""
    return os.environ.get(variable(service, "DATABASE_URL"), f"sqlite+aiosqlite:///{service}.db")
