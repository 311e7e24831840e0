"""A service mesh you import: resilience and observability for asyncio services over HTTP and RabbitMQ.

The public names stand here, each with the module it lives in, and are loaded when first used: `import meshkit` alone
loads no third-party library. What plugs into a library is a module of that library's name (`meshkit.httpx`,
`meshkit.fastapi`, `meshkit.rabbitmq`, `meshkit.redis`, `meshkit.sqlalchemy`), loaded the same way.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from meshkit._version import __version__ as __version__

if TYPE_CHECKING:
    from meshkit import embedded as embedded
    from meshkit import fastapi as fastapi
    from meshkit import httpx as httpx
    from meshkit import rabbitmq as rabbitmq
    from meshkit import redis as redis
    from meshkit import sqlalchemy as sqlalchemy
    from meshkit import telemetry as telemetry
    from meshkit import testing as testing
    from meshkit import worker as worker
    from meshkit.core.call import Call as Call
    from meshkit.core.call import Judgement as Judgement
    from meshkit.core.call import Outcome as Outcome
    from meshkit.core.call import Policy as Policy
    from meshkit.core.call import current_attempt as current_attempt
    from meshkit.core.clock import Clock as Clock
    from meshkit.core.events import Event as Event
    from meshkit.core.events import listen as listen
    from meshkit.core.lifecycle import Check as Check
    from meshkit.core.lifecycle import Part as Part
    from meshkit.core.pipeline import Pipeline as Pipeline
    from meshkit.core.scope import Scope as Scope
    from meshkit.core.scope import current_scope as current_scope
    from meshkit.core.wrap import wrap as wrap
    from meshkit.errors import AttemptTimeoutError as AttemptTimeoutError
    from meshkit.errors import BulkheadFullError as BulkheadFullError
    from meshkit.errors import ConfigurationError as ConfigurationError
    from meshkit.errors import ContractError as ContractError
    from meshkit.errors import DeadLetter as DeadLetter
    from meshkit.errors import DeadlineExceededError as DeadlineExceededError
    from meshkit.errors import DeadlineTooCloseError as DeadlineTooCloseError
    from meshkit.errors import Discard as Discard
    from meshkit.errors import EnvelopeError as EnvelopeError
    from meshkit.errors import HandlerVerdict as HandlerVerdict
    from meshkit.errors import MeshkitError as MeshkitError
    from meshkit.errors import MessagingError as MessagingError
    from meshkit.errors import PublishError as PublishError
    from meshkit.errors import PublishNackedError as PublishNackedError
    from meshkit.errors import PublishTimeoutError as PublishTimeoutError
    from meshkit.errors import RateLimitedError as RateLimitedError
    from meshkit.errors import RejectedError as RejectedError
    from meshkit.errors import RetryLater as RetryLater
    from meshkit.errors import TimeoutExceededError as TimeoutExceededError
    from meshkit.errors import TopologyError as TopologyError
    from meshkit.errors import UnroutableError as UnroutableError
    from meshkit.messaging.events import event as event
    from meshkit.policies.bulkhead import Bulkhead as Bulkhead
    from meshkit.policies.circuit_breaker import CircuitBreaker as CircuitBreaker
    from meshkit.policies.circuit_breaker import CircuitOpenError as CircuitOpenError
    from meshkit.policies.config import Policies as Policies
    from meshkit.policies.fallback import Fallback as Fallback
    from meshkit.policies.fallback import LastGood as LastGood
    from meshkit.policies.hedge import Hedge as Hedge
    from meshkit.policies.keyed import CircuitBreakers as CircuitBreakers
    from meshkit.policies.presets import standard as standard
    from meshkit.policies.rate_limiter import RateLimiter as RateLimiter
    from meshkit.policies.retry import Backoff as Backoff
    from meshkit.policies.retry import Retry as Retry
    from meshkit.policies.retry import retry_end as retry_end
    from meshkit.policies.retry_budget import RetryBudget as RetryBudget
    from meshkit.policies.shared_state import SharedState as SharedState
    from meshkit.policies.timeout import Timeout as Timeout

# Name → the module it lives in. A test holds this against the imports above, which type checkers read.
_PUBLIC = {
    **dict.fromkeys(("Call", "Judgement", "Outcome", "Policy", "current_attempt"), "meshkit.core.call"),
    "Clock": "meshkit.core.clock",
    **dict.fromkeys(("Event", "listen"), "meshkit.core.events"),
    **dict.fromkeys(("Check", "Part"), "meshkit.core.lifecycle"),
    "Pipeline": "meshkit.core.pipeline",
    **dict.fromkeys(("Scope", "current_scope"), "meshkit.core.scope"),
    "wrap": "meshkit.core.wrap",
    **dict.fromkeys(
        (
            "AttemptTimeoutError",
            "BulkheadFullError",
            "ConfigurationError",
            "ContractError",
            "DeadLetter",
            "DeadlineExceededError",
            "DeadlineTooCloseError",
            "Discard",
            "EnvelopeError",
            "HandlerVerdict",
            "MeshkitError",
            "MessagingError",
            "PublishError",
            "PublishNackedError",
            "PublishTimeoutError",
            "RateLimitedError",
            "RejectedError",
            "RetryLater",
            "TimeoutExceededError",
            "TopologyError",
            "UnroutableError",
        ),
        "meshkit.errors",
    ),
    "event": "meshkit.messaging.events",
    "Bulkhead": "meshkit.policies.bulkhead",
    **dict.fromkeys(("CircuitBreaker", "CircuitOpenError"), "meshkit.policies.circuit_breaker"),
    "Policies": "meshkit.policies.config",
    **dict.fromkeys(("Fallback", "LastGood"), "meshkit.policies.fallback"),
    "Hedge": "meshkit.policies.hedge",
    "CircuitBreakers": "meshkit.policies.keyed",
    "standard": "meshkit.policies.presets",
    "RateLimiter": "meshkit.policies.rate_limiter",
    **dict.fromkeys(("Backoff", "Retry", "retry_end"), "meshkit.policies.retry"),
    "RetryBudget": "meshkit.policies.retry_budget",
    "SharedState": "meshkit.policies.shared_state",
    "Timeout": "meshkit.policies.timeout",
}
_MODULES = ("embedded", "fastapi", "httpx", "rabbitmq", "redis", "sqlalchemy", "telemetry", "testing", "worker")

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll] - made from the table, which a test holds against the imports
    "__version__",
    *_PUBLIC,
    *_MODULES,
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"meshkit.{name}")
    else:
        raise AttributeError(f"module 'meshkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
