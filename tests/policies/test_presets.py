import gc

import pytest

import meshkit
from meshkit import CircuitBreaker, ConfigurationError, Fallback, Retry, Timeout
from meshkit.policies.bulkhead import Bulkhead
from meshkit.policies.hedge import Hedge
from meshkit.policies.presets import budget_of, messaging, standard
from meshkit.policies.rate_limiter import RateLimiter


def kinds(pipeline):
    return [step.kind for step in pipeline.explain().steps]


def part(pipeline, kind):
    return next(policy for policy in pipeline.policies if isinstance(policy, kind))


ORDER = ["timeout", "fallback", "retry", "hedge", "circuit_breaker", "rate_limiter", "bulkhead", "timeout"]


def test_the_standard_order(clock):
    """Total deadline, retry, breaker, bulkhead, attempt timeout; what is not given has no place."""
    assert ["timeout", "retry", "circuit_breaker", "bulkhead", "timeout"] == kinds(standard("users", clock=clock))


@pytest.mark.parametrize("preset", [standard, messaging])
def test_whatever_is_given_has_its_place(clock, preset):
    """The order is the same for both presets, whichever parts there are."""
    pipeline = preset(
        "users",
        total=10,
        fallback=Fallback(answer=None),
        retry=Retry(clock=clock),
        hedge=Hedge(delay=0.2),
        breaker=CircuitBreaker("mine", clock=clock),
        rate_limiter=RateLimiter(permits=10),
        bulkhead=Bulkhead(limit=3),
        attempt_timeout=1,
        clock=clock,
    )
    assert ORDER == kinds(pipeline)
    assert "mine" == part(pipeline, CircuitBreaker).name
    assert () == pipeline.explain().findings


@pytest.mark.parametrize("preset", [standard, messaging])
def test_each_part_can_be_left_out(preset):
    """None goes without."""
    none = dict.fromkeys(
        ("total", "fallback", "retry", "hedge", "breaker", "rate_limiter", "bulkhead", "attempt_timeout")
    )
    assert () == preset("users", **none).policies


def test_the_numbers_of_the_docstring_hold(clock):
    """Three attempts and their waits come to 6.3 s, to 7.8 s where they queue; that is within the total of 10 s."""
    explained = standard("users", clock=clock).explain()
    assert (3, 7.8) == (explained.attempts, explained.seconds)
    assert () == explained.findings
    assert 6.3 == standard("users", bulkhead=None, clock=clock).explain().seconds


def test_messaging_leaves_retries_to_the_schedule(clock):
    """One attempt, the breaker, and a timeout below the 20 s that a stopping consumer has."""
    pipeline = messaging("payments", clock=clock)
    assert ["circuit_breaker", "timeout"] == kinds(pipeline)
    assert (1, 10.0) == (pipeline.explain().attempts, pipeline.explain().seconds)


def test_pipelines_of_one_name_share_a_budget(clock):
    """A destination has one budget, however many clients it has in the process, and it goes with the last of them."""
    first, second, other = standard("users", clock=clock), standard("users", clock=clock), standard("mail", clock=clock)
    assert part(first, Retry).budget is part(second, Retry).budget
    assert part(first, Retry).budget is not part(other, Retry).budget
    assert "users" == part(first, Retry).budget.name
    part(first, Retry).budget.withdraw()
    del first, second
    gc.collect()
    assert 3 == budget_of("users", clock).balance


async def test_a_failure_by_chance_is_not_seen(clock):
    """Two failures in a row are made up for."""
    outcomes = [ConnectionError(), ConnectionError(), "ok"]

    @standard("users", clock=clock)
    async def fetch():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert "ok" == await fetch()
    assert 2 == len(clock.sleeps)


async def test_an_outage_is_not_multiplied(clock):
    """Of 100 calls that fail, those that the budget bears are repeated, and the breaker ends even that."""
    calls = 0

    @standard("down", clock=clock)
    async def fetch():
        nonlocal calls
        calls += 1
        raise ConnectionError

    for _ in range(100):
        with pytest.raises((ConnectionError, meshkit.CircuitOpenError)):
            await fetch()
    assert 10 == calls


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"retry": 3}, "retry is a Retry, or None to go without, not 3"),
        ({"breaker": "per-host"}, "breaker is a CircuitBreaker"),
        ({"bulkhead": Timeout(1)}, "bulkhead is a Bulkhead"),
        ({"total": 0}, "above 0"),
        ({"allow": {"jitter": "why"}}, "Did you mean jitter-off?"),
    ],
)
def test_what_cannot_work_is_refused(options, says):
    """The error names the keyword and what it takes."""
    with pytest.raises(ConfigurationError) as caught:
        standard("users", **options)
    assert says in str(caught.value)


@pytest.mark.parametrize("preset", [standard, messaging])
def test_a_name_or_clock_that_is_none_is_refused_as_the_pipelines_own(preset):
    """The error speaks of what was asked for, and not of a part that the preset would have made."""
    with pytest.raises(ConfigurationError, match="a pipeline begins with the name of what it calls, and '' is none"):
        preset("")
    with pytest.raises(ConfigurationError, match="clock is where the time comes from, and 3 is none"):
        preset("prices", clock=3)
