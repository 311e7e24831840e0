import asyncio
import contextlib
import json
import logging
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tenacity import stop_after_attempt, stop_after_delay, stop_never, wait_fixed

from meshkit import Backoff, CircuitBreaker, ConfigurationError, Fallback, Pipeline, Retry, Timeout
from meshkit.core.explain import FINDINGS, Finding, explain
from meshkit.policies.hedge import Hedge
from meshkit.testing.clock import ManualClock


def said(*policies, name="prices", allow=None):
    """A pipeline of dicts, explained."""
    return explain({"kind": "pipeline", "name": name, "policies": policies, "allow": allow or {}})


def retry(attempts: float | None = 3, **settings):
    return {"kind": "retry", "attempts": attempts, "seconds": None, "waits": 0.3, "jitter": True, **settings}


def timeout(seconds=None, *, total=None):
    return {"kind": "timeout", "seconds": seconds, "total": total}


def breaker(name="prices", **settings):
    return {"kind": "circuit_breaker", "name": name, "open_for": 15.0, "open_at_most": 15.0, **settings}


def fallback(**settings):
    return {"kind": "fallback", "name": "empty", **settings}


def bulkhead(limit=10, **settings):
    return {"kind": "bulkhead", "limit": limit, **settings}


def hedge(delay=0.2, attempts=2):
    return {"kind": "hedge", "attempts": attempts, "delay": delay}


LIMITER = {"kind": "rate_limiter", "wait": 0.5}


def nested(*policies, name="inner", **settings):
    return {"kind": "pipeline", "name": name, "policies": policies, **settings}


@pytest.mark.parametrize(
    ("policies", "attempts", "seconds"),
    [
        ((), 1, None),
        ((timeout(2),), 1, 2),
        ((retry(), timeout(2)), 3, 6.3),
        ((timeout(total=5), retry(), timeout(2)), 3, 5),
        ((retry(seconds=4), timeout(2)), 3, 6),
        ((retry(waits=None), timeout(2)), 3, None),
        ((timeout(total=5), retry(None, waits=None)), None, 5),
        ((retry(), retry(2, waits=0.1), timeout(1)), 6, 6.6),
        ((retry(), nested(retry(2, waits=0.1), timeout(1))), 6, 6.6),
        ((hedge(), timeout(1)), 2, 1.2),
        ((hedge(2), timeout(1)), 2, 1),
        ((hedge(0, 3), timeout(1)), 3, 1),
        ((hedge(math.inf), timeout(1)), 2, 1),
        ((retry(2, waits=0), hedge(), timeout(1)), 4, 2.4),
        ((bulkhead(wait=0.5), timeout(1)), 1, 1.5),
        ((LIMITER, timeout(1)), 1, 1.5),
        ((retry(2, waits=0, patient=True), breaker(open_at_most=30.0), timeout(1)), 2, 35),
        ((retry(1, waits=0), timeout(1)), 1, 1),
        (({"kind": "mine", "attempts": 4}, timeout(1)), 4, 4),
        (({"kind": "mine"}, timeout(1)), 1, 1),
    ],
)
def test_the_worst_case_is_a_product_of_attempts_and_a_sum_of_times(policies, attempts, seconds):
    """Nested attempts multiply; attempts and waits add up to the nearest limit around them; unbounded is None."""
    explained = said(*policies)
    assert (attempts, seconds) == (explained.attempts, explained.seconds)


@pytest.mark.parametrize(
    ("policies", "found"),
    [
        ((retry(), fallback()), "fallback-inside-retry"),
        ((retry(), fallback(on=["ConnectionError"])), "fallback-inside-retry"),
        ((retry(), fallback(on="ConnectionError")), "fallback-inside-retry"),
        ((breaker(), fallback()), "fallback-inside-breaker"),
        ((fallback(), fallback()), "fallback-never-used"),
        ((breaker(), retry()), "breaker-outside-retry"),
        ((breaker(), breaker()), "same-breaker-name"),
        ((breaker(slow_after=3.0), timeout(2)), "slow-never-seen"),
        ((bulkhead(), retry()), "bulkhead-outside-retry"),
        ((bulkhead(5), bulkhead(10)), "bulkhead-never-full"),
        ((LIMITER, retry()), "rate-limiter-outside-retry"),
        ((retry(), retry()), "retry-inside-retry"),
        ((retry(), nested(retry())), "retry-inside-retry"),
        ((retry(math.inf),), "retry-unbounded"),
        ((retry(jitter=False),), "jitter-off"),
        ((timeout(total=6), retry(), timeout(2)), "attempts-exceed-total"),
        ((retry(seconds=4), timeout(2)), "attempts-exceed-total"),
        ((timeout(30), retry(), timeout(2)), "attempt-timeout-outside-retry"),
        ((retry(), timeout(total=2)), "total-inside-retry"),
        ((retry(seconds=60), timeout(total=30)), "total-inside-retry"),
        ((timeout(total=2), timeout(2)), "timeout-never-fires"),
        ((timeout(3), breaker(), timeout(2)), "timeout-never-fires"),
        ((timeout(0.2), hedge(0.2)), "hedge-never-starts"),
        ((hedge(0.2), timeout(0.2)), "hedge-never-starts"),
    ],
)
def test_what_works_against_itself_is_found(policies, found):
    """Each rule finds what it is for, and says what it is about and what to do."""
    findings = said(*policies).findings
    assert [found] == [finding.id for finding in findings]
    assert findings[0].what.endswith(".")
    assert findings[0].remedy.endswith(".")
    assert findings[0].steps


@pytest.mark.parametrize(
    "policies",
    [
        (timeout(total=10), fallback(), retry(), breaker(slow_after=1.0), bulkhead(), timeout(2)),
        (retry(), fallback(on=["meshkit.CircuitOpenError", "BulkheadFullError"])),
        (retry(), fallback(on="CircuitOpenError")),
        (retry(1), fallback()),
        (breaker(), retry(1)),
        (breaker(), fallback(on=["KeyError"])),
        (fallback(), fallback(on=["KeyError"])),
        (fallback(), breaker(), fallback(on=["KeyError"])),
        (breaker("outer"), breaker("inner")),
        (bulkhead(10), bulkhead(5)),
        (bulkhead(5), hedge(), bulkhead(10)),
        (retry(None), timeout(2)),
        (timeout(total=10), retry(math.inf), timeout(2)),
        (retry(math.inf, seconds=3.0),),
        (retry(jitter=None), retry(1)),
        (timeout(total=6.3), retry(), timeout(2)),
        (retry(seconds=4.31), timeout(2)),
        (timeout(3), fallback(), timeout(2)),
        (timeout(total=3), breaker(), timeout(2)),
        (hedge(0.2), timeout(0.3)),
        (hedge(0.2, 1), timeout(0.1)),
        (hedge(math.inf), timeout(0.1)),
        ({"kind": "mine"}, {}, timeout(2)),
    ],
)
def test_what_works_is_not_found(policies):
    """No rule speaks of what is in order, or of what nobody can know."""
    assert () == said(*policies).findings


def test_every_rule_is_listed_and_tested():
    """The ids are the ones that can be silenced, and each stands in the table of what is found above."""
    table = test_what_works_against_itself_is_found.pytestmark[0].args[1]
    # The last one is of an edge, and tested with it.
    assert set(FINDINGS) - {"unsafe-method-retried"} == {row[1] for row in table}


def test_the_text_says_order_settings_worst_case_and_findings():
    """What a person reads."""
    text = str(said(timeout(total=6), retry(), nested(breaker(), timeout(2)), name="prices"))
    assert (
        "pipeline 'prices', outermost first\n"
        "  1. timeout          total 6\n"
        "  2. retry            attempts 3, waits 0.3, jitter yes\n"
        "  3. circuit breaker  name 'prices', open_for 15, open_at_most 15  (in inner)\n"
        "  4. timeout          seconds 2  (in inner)\n"
        "worst case: 3 attempts, 6 s\n"
        "finding attempts-exceed-total: 3 attempts of 2 s and their waits (2) can take 6.3 s, and there are 6 s (1): the"
        " last of them are never made. Make the attempts fewer or shorter, or the time longer."
    ) == text
    assert "worst case: 1 attempt, unbounded time" in str(said())
    assert "worst case: unbounded attempts" in str(said(retry(None)))


def test_the_data_goes_into_json():
    """as_dict() holds plain types only; what is unbounded is null."""
    explained = said(retry(math.inf, waits=math.inf, on=("KeyError",)), allow={"retry-unbounded": "a poller"})
    read = json.loads(json.dumps(explained.as_dict(), allow_nan=False))
    assert {"attempts": None, "seconds": None} == read["worst_case"]
    assert [["KeyError"]] == [policy["on"] for policy in read["policies"]]
    assert [("retry-unbounded", "a poller")] == [(found["id"], found["allowed"]) for found in read["findings"]]


def test_a_pipeline_says_what_it_found_when_it_is_made(caplog):
    """One warning with all of it, and the same one only once, however often the same pipeline is made."""
    policies = (Retry(attempts=2), Fallback(answer=0), Timeout(5))
    for _ in range(3):
        Pipeline("said-once", *policies)
    (record,) = [record for record in caplog.records if "said-once" in record.getMessage()]
    assert ("meshkit", logging.WARNING) == (record.name, record.levelno)
    assert "fallback-inside-retry: The fallback (2) is inside the retry (1)" in record.getMessage()


def test_what_is_wanted_is_not_warned_of(caplog):
    """It stays in what explain() says, with its reason, and everything else is still warned of."""
    pipeline = Pipeline(
        "wanted", Retry(attempts=2), Fallback(answer=0), allow={"fallback-inside-retry": "the answer is as good"}
    )
    assert "wanted" not in caplog.text
    assert ["the answer is as good"] == [finding.allowed for finding in pipeline.explain().findings]
    assert "allowed fallback-inside-retry" in str(pipeline.explain())
    assert "the answer is as good" in str(pipeline.explain())


def test_a_nested_pipeline_speaks_for_itself(caplog):
    """What it has said, and what it wants, is not said again by the pipeline around it; what comes of both is."""
    inner = Pipeline("speaks-inner", Retry(attempts=2), Fallback(answer=0))
    assert 1 == caplog.text.count("fallback-inside-retry")
    quiet = Pipeline("quiet", Retry(attempts=2), Fallback(answer=0), allow={"fallback-inside-retry": "wanted"})
    again = Pipeline("speaks-inner", Fallback(answer=0), Timeout(1), Timeout(2))
    Pipeline("around", inner, quiet, again)
    said_again = [record.getMessage() for record in caplog.records if "'around'" in record.getMessage()]
    assert 1 == len(said_again)
    # The fallback of the second is inside the retry of the first: that is new. The retries multiply: that is, too.
    assert "retry-inside-retry" in said_again[0]
    assert "(3) is inside the retry (1)" not in said_again[0]
    assert "(5) is inside the retry (1)" in said_again[0]
    assert "timeout-never-fires" not in said_again[0]


@pytest.mark.parametrize(
    ("allow", "says"),
    [
        ({"breaker-outside-rerty": "why"}, "Did you mean breaker-outside-retry?"),
        ({"jitter-off": " "}, "why it is wanted"),
        (("jitter-off",), 'Write allow={"breaker-outside-retry"'),
    ],
)
def test_what_cannot_be_allowed_is_refused(allow, says):
    """An id that is none, a missing reason, or a list."""
    with pytest.raises(ConfigurationError) as caught:
        Pipeline("prices", allow=allow)
    assert says in str(caught.value)


def test_one_breaker_cannot_be_in_a_pipeline_twice():
    """Its probe would be refused for itself, so it could never close: that is an error, also across nested ones."""
    breaker = CircuitBreaker("prices")
    with pytest.raises(ConfigurationError, match="twice"):
        Pipeline("prices", breaker, Retry(attempts=2), Pipeline("inner", breaker))
    shared = Timeout(5)
    assert 1 == len(Pipeline("prices", shared, shared).explain().findings)


def test_an_edge_adds_its_own_findings():
    """A rule is given the steps and answers with findings; they can be silenced like all others."""

    def rule(steps):
        assert ["retry", "timeout"] == [step.kind for step in steps]
        yield Finding(id="jitter-off", what="Posts are repeated.", remedy="Send a key.", steps=(1,))

    pipeline = Pipeline("posts", Retry(attempts=2), Timeout(2), allow={"jitter-off": "keys are sent"})
    (found,) = pipeline.explain(rule).findings
    assert ("Posts are repeated.", "keys are sent") == (found.what, found.allowed)


def test_the_policies_say_what_is_read():
    """Of the real ones: attempts, waits, limits and jitter arrive in the worst case and the findings."""
    steady = Retry(attempts=4, backoff=Backoff(first=1, factor=1, jitter="none"))
    explained = Pipeline("real", Timeout(total=10), steady, CircuitBreaker("real"), Timeout(1.5)).explain()
    assert (4, 9.0) == (explained.attempts, explained.seconds)
    assert ["jitter-off"] == [finding.id for finding in explained.findings]
    foreign = Pipeline("foreign", Retry(stop=stop_after_attempt(4), wait=wait_fixed(1)), Timeout(1)).explain()
    assert (4, 61.0) == (foreign.attempts, foreign.seconds)
    assert () == foreign.findings
    unknown = Pipeline("unknown", Retry(stop=stop_after_delay(4) | stop_after_attempt(4), within=None)).explain()
    assert (None, ()) == (unknown.attempts, unknown.findings)
    endless = Pipeline("endless", Retry(stop=stop_never, within=None)).explain()
    assert ["retry-unbounded"] == [finding.id for finding in endless.findings]
    assert () == Pipeline("within", Retry(stop=stop_never, within=5)).explain().findings
    assert "fallback-inside-retry" not in str(Pipeline("order", Fallback(answer=0), Retry(), Timeout(1)).explain())


SECONDS = st.sampled_from([0.25, 0.5, 1.0, 2.0])
STEP = 0.25


@st.composite
def guards(draw, depth=1):
    """Makers of policies, outermost first: what they are made with is a clock."""

    def retry_of(attempts, wait, within):
        backoff = Backoff(first=wait, factor=1, jitter="none")
        return lambda clock: Retry(attempts=attempts, backoff=backoff, within=within, clock=clock)

    one = [
        st.builds(retry_of, st.integers(1, 3), st.sampled_from([0.0, 0.25, 1.0]), st.none() | SECONDS),
        st.builds(lambda seconds: lambda clock: Timeout(seconds, clock=clock), SECONDS),
        st.builds(lambda seconds: lambda clock: Timeout(total=seconds, clock=clock), SECONDS),
    ]
    if not draw(st.integers(0, 3)):
        one.append(st.builds(lambda delay: lambda clock: Hedge(delay, clock=clock), SECONDS))
    if depth:
        inner = guards(depth=depth - 1)
        one.append(st.builds(lambda made: lambda clock: Pipeline("inner", *(make(clock) for make in made)), inner))
    return draw(st.lists(st.one_of(one), max_size=4))


@settings(max_examples=150, deadline=None)
@given(makers=guards(), durations=st.lists(st.sampled_from([0.0, 0.25, 1.0, 5.0]), min_size=1, max_size=4))
def test_no_call_is_worse_than_the_worst_case(makers, durations):
    """Whatever the policies, and however long each attempt takes before it fails: there are no more attempts than
    explain() says, and it takes no longer."""

    async def run():
        clock = ManualClock(hold=True)
        pipeline = Pipeline("any", *(make(clock) for make in makers))
        calls, started = 0, clock.now()

        async def fails():
            nonlocal calls
            calls += 1
            await clock.sleep(durations[calls % len(durations)])
            raise ConnectionError

        call = asyncio.create_task(pipeline.call(fails))
        # A hedge makes its attempts in tasks, which begin some turns of the loop later.
        await clock.advance(0)
        while not call.done():
            await clock.advance(STEP)
        with contextlib.suppress(ConnectionError, TimeoutError):
            call.result()
        return pipeline.explain(), calls, clock.now() - started

    explained, calls, took = asyncio.run(run())
    assert explained.attempts is not None
    assert calls <= explained.attempts
    if explained.seconds is not None:
        # A last step may have begun when the call was over already.
        assert took <= explained.seconds + STEP
