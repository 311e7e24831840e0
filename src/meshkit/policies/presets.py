"""The usual policies in their usual order, with numbers that are argued for.

The order, outermost first: total deadline → fallback → retry → hedge → circuit breaker → rate limiter → bulkhead →
attempt timeout. Each attempt is judged by the breaker, and refused by it without taking a permit or a place; a fallback
answers whatever is left; and all of it, waits included, is over at the deadline.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

from meshkit.core.call import Policy
from meshkit.core.clock import SYSTEM_CLOCK, Clock, check_clock
from meshkit.core.pipeline import Pipeline, check_name
from meshkit.errors import ConfigurationError
from meshkit.policies.bulkhead import Bulkhead
from meshkit.policies.circuit_breaker import CircuitBreaker
from meshkit.policies.fallback import Fallback
from meshkit.policies.hedge import Hedge
from meshkit.policies.rate_limiter import RateLimiter
from meshkit.policies.retry import Retry
from meshkit.policies.retry_budget import RetryBudget
from meshkit.policies.timeout import Timeout

# What the presets say of a part where it is not the part's own default; configuration builds upon the same.
KEYWORDS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "retry": MappingProxyType({"attempts": 3}),
        "bulkhead": MappingProxyType({"limit": 50, "queue": 50, "wait": 0.5}),
    }
)
TOTAL: Final = 10.0
ATTEMPT: Final = 2.0
MESSAGE_ATTEMPT: Final = 10.0

_NOTHING: Final[Mapping[str, str]] = MappingProxyType({})
_budgets: weakref.WeakValueDictionary[tuple[str, int], RetryBudget] = weakref.WeakValueDictionary()
_budgets_lock = threading.Lock()


def budget_of(name: str, clock: Clock = SYSTEM_CLOCK) -> RetryBudget:
    """The budget of a destination: the same one for all that are made with its name, as long as any of them lives."""
    with _budgets_lock:
        found = _budgets.get((name, id(clock)))
        if found is None:
            found = _budgets[name, id(clock)] = RetryBudget(name, clock=clock)
        return found


def standard(
    name: str,
    *,
    total: float | None = TOTAL,
    fallback: Fallback | None = None,
    retry: Retry | Literal["standard"] | None = "standard",
    hedge: Hedge | None = None,
    breaker: CircuitBreaker | Literal["standard"] | None = "standard",
    rate_limiter: RateLimiter | None = None,
    bulkhead: Bulkhead | Literal["standard"] | None = "standard",
    attempt_timeout: float | None = ATTEMPT,
    allow: Mapping[str, str] = _NOTHING,
    clock: Clock = SYSTEM_CLOCK,
) -> Pipeline:
    """For a call that somebody waits for: a request to another service.

    The numbers are for a dependency that answers 95 of 100 calls within 200 ms. For one of another speed, scale
    `attempt_timeout` and `total` with it; `explain()` tells what comes of them.

    * `attempt_timeout` is 2 s, ten times the 95th percentile: a slow answer is still an answer, and what takes ten times
      as long as nearly all others has most likely been lost.
    * `retry` makes 3 attempts. Where one call in ten fails by chance, three of them leave one in a thousand; a fourth
      would help nine in ten thousand, and adds a third to the load on what is down. It waits up to 0.1 s and 0.2 s, of
      random length (full jitter): a restart behind a load balancer is over by then, and whoever waits has hardly noticed.
    * A `RetryBudget` for `name` allows one retry for five calls, and 3 in 10 s in any case: blips are retried, an outage
      is not multiplied. All pipelines of that name share it.
    * `total` is 10 s: three attempts and their waits come to 6.3 s, or 7.8 s if each of them has to wait for a place,
      which leaves room for a `Retry-After` of a second or two. The deadline of the request that is being served holds as well, where it is earlier.
    * `breaker` opens when half of the last 20 calls failed (10 at least), for 15 s. Half is above what a bad deployment
      of one of three instances does, which retries take care of, and below what an outage does. Counting calls and not
      seconds, it judges a quiet client by the same evidence as a busy one.
    * `bulkhead` has 50 places and as many that wait, for half a second: at 200 ms each, 250 calls a second. What hangs
      for the full 2 s holds 50 connections of this process and no more.
    * `fallback` is none, because only you know what may be answered instead; likewise `hedge`, which makes calls twice,
      and `rate_limiter`, which needs to know what the other side allows.

    Args:
        name: what is called, for events, metrics and errors.
        total: seconds for everything; `None` for no limit.
        fallback: what answers where nothing else does.
        retry: one of your own, with its own budget; `None` for none.
        hedge: a second attempt beside a slow one.
        breaker: one of your own; `None` for none.
        rate_limiter: how many calls the other side allows.
        bulkhead: one of your own; `None` for none.
        attempt_timeout: seconds for one attempt; `None` for no limit.
        allow: as `Pipeline` takes it.
        clock: where the parts that are made here have time and chance from.

    Raises:
        ConfigurationError: a value that cannot work.
    """
    check_name(name, "a pipeline")
    check_clock(clock)
    if retry == "standard":
        retry = Retry(**KEYWORDS["retry"], budget=budget_of(name, clock), clock=clock)
    if bulkhead == "standard":
        bulkhead = Bulkhead(name, **KEYWORDS["bulkhead"], clock=clock)
    return _made(
        name,
        total,
        fallback,
        retry,
        hedge,
        CircuitBreaker(name, clock=clock) if breaker == "standard" else breaker,
        rate_limiter,
        bulkhead,
        attempt_timeout,
        allow,
        clock,
    )


def messaging(
    name: str,
    *,
    total: float | None = None,
    fallback: Fallback | None = None,
    retry: Retry | None = None,
    hedge: Hedge | None = None,
    breaker: CircuitBreaker | Literal["standard"] | None = "standard",
    rate_limiter: RateLimiter | None = None,
    bulkhead: Bulkhead | None = None,
    attempt_timeout: float | None = MESSAGE_ATTEMPT,
    allow: Mapping[str, str] = _NOTHING,
    clock: Clock = SYSTEM_CLOCK,
) -> Pipeline:
    """For a call that a message handler makes: nobody waits for it, and the message itself comes back.

    A circuit breaker around an attempt timeout, and nothing else, because the consumer does the rest better:

    * No `retry`. The schedule of the message is one already, of ten attempts by default, the second after 50 ms in the
      same process. Three attempts inside each of them would make thirty, and hold the message's place and its
      acknowledgement while they wait; what the schedule waits for, it waits for in a queue, where a crash or a
      deployment costs nothing.
    * The `breaker` is not waited for either (a `patient` retry would fill all places of the consumer with handlers that
      sleep). Its refusal is no attempt at the message: the consumer pauses, probes with one message, and resumes, so
      that an outage costs no attempts and no dead letters.
    * `attempt_timeout` is 10 s: longer than where a person waits, because a slow success saves a redelivery, and well
      below the 20 s that a consumer has to finish what it has in hand when it is stopped. `total` is none: with one
      attempt, the two would say the same.
    * No `bulkhead`: the prefetch of the consumer says how many handlers run. Give the one of the HTTP side, where both
      call the same dependency.
    * No `fallback`: a message that was answered with something else is acknowledged, and gone.

    Args:
        name: what is called, for events, metrics and errors.
        total, fallback, retry, hedge, rate_limiter, bulkhead: as `standard` takes them; none where left out.
        breaker: one of your own; `None` for none.
        attempt_timeout: seconds for the call; `None` for no limit.
        allow: as `Pipeline` takes it.
        clock: where the parts that are made here have time and chance from.

    Raises:
        ConfigurationError: a value that cannot work.
    """
    check_name(name, "a pipeline")
    check_clock(clock)
    return _made(
        name,
        total,
        fallback,
        retry,
        hedge,
        CircuitBreaker(name, clock=clock) if breaker == "standard" else breaker,
        rate_limiter,
        bulkhead,
        attempt_timeout,
        allow,
        clock,
    )


def _made(
    name: str,
    total: float | None,
    fallback: Fallback | None,
    retry: Retry | None,
    hedge: Hedge | None,
    breaker: CircuitBreaker | None,
    rate_limiter: RateLimiter | None,
    bulkhead: Bulkhead | None,
    attempt_timeout: float | None,
    allow: Mapping[str, str],
    clock: Clock,
) -> Pipeline:
    kinds: dict[str, tuple[object, type]] = {
        "fallback": (fallback, Fallback),
        "retry": (retry, Retry),
        "hedge": (hedge, Hedge),
        "breaker": (breaker, CircuitBreaker),
        "rate_limiter": (rate_limiter, RateLimiter),
        "bulkhead": (bulkhead, Bulkhead),
    }
    for keyword, (given, kind) in kinds.items():
        if given is not None and not isinstance(given, kind):
            raise ConfigurationError(f"{keyword} is a {kind.__name__}, or None to go without, not {given!r}.")
    policies: list[Policy | None] = [
        None if total is None else Timeout(total=total, clock=clock),
        fallback,
        retry,
        hedge,
        breaker,
        rate_limiter,
        bulkhead,
        None if attempt_timeout is None else Timeout(attempt_timeout, clock=clock),
    ]
    return Pipeline(name, *(policy for policy in policies if policy is not None), allow=allow)
