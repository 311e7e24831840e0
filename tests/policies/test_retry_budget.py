import asyncio
import gc
import math
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshkit import Backoff, Call, ConfigurationError, Judgement, Pipeline, Retry, RetryBudget, Scope
from meshkit.core.scope import scope_open
from meshkit.policies.retry_budget import budgets
from meshkit.testing.clock import ManualClock


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.25, 0.75, 0.99, 0.999, 0.9999, 0.01, 0.001, 0.0001])
def test_a_share_of_the_calls_can_be_retried(clock, ratio):
    """Of 10,000 calls in one window, each followed by an attempt to retry, `ratio` of them can: as Finagle's
    `RetryBudgetTest` "apply minRetriesPerSec=0"."""
    budget = RetryBudget(ratio=ratio, at_least=0, clock=clock)
    assert 0 == budget.balance
    assert not budget.withdraw()
    retried = 0
    for _ in range(10_000):
        budget.deposit()
        if budget.withdraw():
            retried += 1
        else:
            assert 0 == budget.balance
    assert round(10_000 * ratio) == retried


def test_an_empty_budget_allows_nothing(clock):
    """Without a share and without a floor no retry is ever made: as Finagle's `RetryBudgetTest` "Empty" and "apply
    minRetriesPerSec=0 maxPercentOver=0 should be empty"."""
    budget = RetryBudget(ratio=0, at_least=0, clock=clock)
    assert not budget.withdraw()
    budget.deposit()
    assert 0 == budget.balance
    assert not budget.withdraw()


def test_a_call_may_allow_several_retries(clock):
    """A ratio above 1 allows more retries than calls: as Finagle's `RetryBudgetTest` "apply minRetries=0
    maxPercentOver greater than 1.0"."""
    budget = RetryBudget(ratio=2.0, at_least=0, clock=clock)
    assert not budget.withdraw()
    for _ in range(10_000):
        budget.deposit()
    assert 20_000 == budget.balance


def test_a_floor_is_there_without_any_calls(clock):
    """`at_least` retries a window need no calls: as Finagle's `RetryBudgetTest` "apply with minRetries and
    maxPercentOver=0"."""
    budget = RetryBudget(ratio=0, at_least=10, clock=clock)
    assert 10 == budget.balance
    assert [True] * 10 + [False] == [budget.withdraw() for _ in range(11)]


def test_the_larger_of_floor_and_share_holds(clock):
    """The floor is not on top of the share (Finagle adds them, `RetryBudgetTest` "apply with minRetries and
    maxPercentOver"): a destination with traffic bears the share and no more."""
    budget = RetryBudget(ratio=0.1, at_least=3, clock=clock)
    for _ in range(30):
        budget.deposit()
    assert 3 == budget.balance
    for _ in range(10):
        budget.deposit()
    assert 4 == budget.balance


async def test_the_floor_allows_a_retry_although_the_share_is_exceeded(clock):
    """One call, and one retry of the two that the floor has is spent: the other is allowed, no third, as failsafe-go's
    `TestBudget` "when minConcurrency floor allows permit despite rate exceeded"."""
    budget = RetryBudget(ratio=0.5, at_least=2, clock=clock)
    budget.deposit()
    assert budget.withdraw()
    assert budget.withdraw()
    assert not budget.withdraw()


def test_what_was_taken_can_be_given_back(clock):
    """A retry that was not made after all is there again: as failsafe-go's `TestBudget` "should acquire and release
    permit". Giving back what nobody took adds nothing."""
    budget = RetryBudget(ratio=0.5, at_least=1, clock=clock)
    assert budget.withdraw()
    assert not budget.withdraw()
    budget.give_back()
    budget.give_back()
    assert budget.withdraw()
    assert not budget.withdraw()


async def test_calls_and_retries_count_for_one_window(clock):
    """A call and a retry count up to, and not at, `window` seconds: as the ttl of Finagle's `RetryBudget`."""
    budget = RetryBudget(ratio=1.0, window=10.0, at_least=0, clock=clock)
    budget.deposit()
    await clock.advance(9.999)
    assert 1 == budget.balance
    assert budget.withdraw()
    budget.deposit()
    assert 1 == budget.balance
    await clock.advance(0.001)
    assert 0 == budget.balance
    await clock.advance(9.998)
    assert 0 == budget.balance


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ratio": -1.0}, "0 or above"),
        ({"ratio": "20%"}, "0 or above, not '20%'"),
        ({"ratio": True}, "0 or above"),
        ({"window": "10s"}, "above 0 up to 60 s, not '10s'"),
        ({"window": None}, "above 0 up to 60"),
        ({"window": True}, "above 0 up to 60"),
        ({"clock": None}, "^MK100  clock is"),
        ({"ratio": math.nan}, "0 or above"),
        ({"ratio": math.inf}, "0 or above"),
        ({"window": 0}, "above 0 up to 60"),
        ({"window": 61}, "above 0 up to 60"),
        ({"window": math.nan}, "above 0 up to 60"),
        ({"at_least": -1}, "0, 1, 2"),
        ({"at_least": 0.5}, "0, 1, 2"),
        ({"at_least": True}, "0, 1, 2"),
        ({"name": 3}, "destination"),
    ],
)
def test_wrong_options_say_what_would_be_right(wrong, said):
    """A value that cannot work is refused when the budget is made: as Finagle's `RetryBudgetTest` "apply ttl bounds
    check", "apply minRetriesPerSec bounds check" and "apply maxPercentOver bounds"."""
    with pytest.raises(ConfigurationError, match=said):
        RetryBudget(**wrong)


STEPS = st.one_of(
    st.just("call"),
    st.just("retry"),
    st.just("give back"),
    st.sampled_from([0.001, 0.5, 1.0, 2.5, 4.999, 5.0, 5.001, 60.0]),
)


@given(
    steps=st.lists(STEPS, max_size=80),
    ratio=st.sampled_from([0.0, 0.1, 0.2, 0.29, 0.5, 1.0, 2.0]),
    at_least=st.integers(0, 4),
)
def test_it_is_what_a_naive_list_says(steps, ratio, at_least):
    """After any sequence of calls, retries and pauses the balance is what comes out of counting everything anew."""
    clock = ManualClock(start=0.0)
    budget = RetryBudget(ratio=ratio, window=5.0, at_least=at_least, clock=clock)
    calls: list[float] = []
    retries: list[float] = []

    def naive():
        now = clock.now()
        counted = sum(1 for at in calls if at > now - 5.0)
        spent = sum(1 for at in retries if at > now - 5.0)
        share = math.floor(round(counted * ratio, 6))
        return max(max(at_least, share) - spent, 0)

    for step in steps:
        if step == "call":
            calls.append(clock.now())
            budget.deposit()
        elif step == "retry":
            allowed = naive() > 0
            if allowed:
                retries.append(clock.now())
            assert allowed == budget.withdraw()
        elif step == "give back":
            budget.give_back()
            if any(at > clock.now() - 5.0 for at in retries):
                retries.pop()
        else:
            clock.block(step)
        assert naive() == budget.balance


def test_threads_share_a_budget_to_the_last_retry():
    """32 threads count their calls and take their retries: none is lost, and none is given twice."""
    budget = RetryBudget(ratio=0.25, window=60.0, at_least=0)
    start, taken = threading.Barrier(32), []

    def work():
        start.wait()
        for _ in range(200):
            budget.deposit()
        start.wait()
        taken.append(sum(budget.withdraw() for _ in range(100)))

    threads = [threading.Thread(target=work) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 32 * 200 * 0.25 == sum(taken)
    assert 0 == budget.balance


def test_two_event_loops_share_a_budget():
    """It holds nothing of an event loop: two of them in two threads draw on one."""
    budget, taken = RetryBudget(ratio=0, at_least=10), []

    async def draw():
        for _ in range(10):
            await asyncio.sleep(0)
            taken.append(budget.withdraw())

    threads = [threading.Thread(target=lambda: asyncio.run(draw())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 10 == sum(taken)


def test_memory_is_bound_by_the_window(clock):
    """Calls that no longer count are forgotten also where nobody ever retries: a sixteenth of a window more is kept."""
    budget, most = RetryBudget(window=1.0, clock=clock), 0
    for _ in range(10_000):
        budget.deposit()
        most = max(most, len(budget._calls))
        clock.block(0.01)
    assert 100 <= most <= 108


def test_a_scrape_sees_the_budgets_that_are_alive(clock):
    """`budgets()` lists every budget under its name, and forgets those that nobody holds any more."""
    budget = RetryBudget("prices", clock=clock)
    assert budget in budgets()
    assert "RetryBudget('prices', ratio=0.2, window=10.0, at_least=3, balance=3)" == repr(budget)
    del budget
    gc.collect()
    assert "prices" not in [known.name for known in budgets()]


class Down(Exception):
    def __init__(self, exhausted):
        super().__init__("down")
        self.exhausted = exhausted


@pytest.mark.parametrize(
    ("budgets_on", "marker_on", "most"),
    [(False, False, 27.0), (True, False, 1.76), (False, True, 3.0), (True, True, 1.5)],
)
async def test_a_chain_of_three_hops_does_not_multiply(budgets_on, marker_on, most):
    """1,000 requests at 100/s through three hops of three attempts each to a dead leaf: budget and the word that retries
    below are used up leave at most 1.5 calls a request, where plain retries make 27. Finagle's, gRPC's and Envoy's
    budgets are for this, and each alone is not enough."""
    clock, hits = ManualClock(), 0
    hops = [
        Retry(
            backoff=Backoff(first=0),
            budget=RetryBudget(f"hop {level}", clock=clock) if budgets_on else None,
            clock=clock,
        )
        for level in range(3)
    ]

    def judge(outcome):
        return Judgement(
            retry=True, breaker="failure", error_type="503", exhausted=marker_on and outcome.error.exhausted
        )

    async def request(level):
        nonlocal hits
        if level == len(hops):
            hits += 1
            raise Down(exhausted=False)
        # Each hop is a service of its own, with a scope of its own, whose answer says what that scope has learnt.
        with scope_open(Scope()) as scope:
            try:
                return await hops[level].run(Call(f"hop {level}", judge=judge), lambda call: request(level + 1))
            except Down:
                raise Down(exhausted=scope.exhausted) from None

    for _ in range(1_000):
        with pytest.raises(Down):
            await request(0)
        clock.block(0.01)
    assert hits / 1_000 <= most
    assert budgets_on or hits / 1_000 == most


def test_counting_a_call_takes_no_lock():
    """While somebody has the lock, a call is counted all the same: only every sixteenth of a window takes it."""
    budget = RetryBudget(ratio=1.0, at_least=0)
    with budget._lock:
        counting = threading.Thread(target=budget.deposit, daemon=True)
        counting.start()
        counting.join(5)
        assert not counting.is_alive()
    assert 1 == budget.balance


class _ComesBack(ManualClock):
    """Runs a function once, where the budget asks for the time with its lock held: as the collector may anywhere."""

    then = None

    def now(self):
        then, self.then = self.then, None
        if then is not None:
            then()
        return super().now()


def _in_a_thread(function):
    """Run it where a deadlock does not hold the test."""
    done = []
    thread = threading.Thread(target=lambda: done.append(function()), daemon=True)
    thread.start()
    thread.join(5)
    assert done, "it does not come back"
    return done[0]


@pytest.mark.parametrize("inner", ["give_back", "withdraw", "deposit", "balance"])
@pytest.mark.parametrize("outer", ["withdraw", "balance"])
def test_a_destructor_may_come_back_to_a_budget_that_is_being_used(outer, inner):
    """The collector closes a coroutine that was dropped in the wait for its retry, in whatever runs just then: also in a
    `withdraw` of the same thread."""
    clock = _ComesBack()
    budget = RetryBudget(at_least=3, clock=clock)
    assert budget.withdraw()

    def use(name):
        return budget.balance if name == "balance" else getattr(budget, name)()

    def both():
        clock.then = lambda: use(inner)
        use(outer)
        return budget.balance

    taken = 1 + (inner == "withdraw") + (outer == "withdraw") - (inner == "give_back")
    assert 3 - taken == _in_a_thread(both)


class _Falls(float):
    """A point in time that is looked at while a destructor comes back."""

    then = None

    def __le__(self, other):
        then, _Falls.then = _Falls.then, None
        if then is not None:
            then()
        return float(self) <= other


@pytest.mark.parametrize("inner", ["give_back", "withdraw", "deposit", "balance"])
def test_a_destructor_may_come_back_in_the_middle_of_a_sweep(inner):
    """What it does there is counted once, and nothing that still counts is dropped."""

    class Times(ManualClock):
        def now(self):
            return _Falls(super().now())

    clock = Times()
    budget = RetryBudget(ratio=0, at_least=5, window=10, clock=clock)
    assert budget.withdraw()
    clock.block(5)
    assert budget.withdraw()

    def sweep():
        # The first is to be dropped, and the second still counts.
        clock.block(6)
        _Falls.then = lambda: budget.balance if inner == "balance" else getattr(budget, inner)()
        assert budget.withdraw()
        return budget.balance

    try:
        taken = 2 + (inner == "withdraw") - (inner == "give_back")
        assert 5 - taken == _in_a_thread(sweep)
    finally:
        _Falls.then = None


def test_a_retry_that_is_given_back_where_none_was_taken_allows_no_further_one(clock):
    """Giving back too often, or too late, is not a credit."""
    budget = RetryBudget(ratio=0, at_least=2, clock=clock)
    budget.give_back()
    assert [True, True, False] == [budget.withdraw() for _ in range(3)]
    clock.block(11)
    budget.give_back()
    assert [True, True, False] == [budget.withdraw() for _ in range(3)]


def test_coroutines_that_are_dropped_in_the_wait_for_a_retry_give_it_back_by_the_collector():
    """A loop is closed with calls under way, and the collector finds them while the same thread uses the budget."""
    budget = RetryBudget(at_least=1000)
    retry = Retry(attempts=3, budget=budget, backoff=Backoff(first=10, most=10, jitter="none"))

    class Waits:
        """A wait that is never over; with its coroutine in a cycle, as a task has it, only the collector ends it."""

        def __await__(self):
            yield self

    class Stuck(ManualClock):
        async def sleep(self, seconds):
            await Waits()

    async def fails():
        raise ConnectionError

    def use():
        was_on, threshold = gc.isenabled(), gc.get_threshold()
        gc.collect()
        gc.disable()
        try:
            waiting = replace(retry, clock=Stuck())
            for _ in range(50):
                coroutine = Pipeline("prices", waiting).call(fails)
                assert isinstance(coroutine.send(None), Waits)
                cycle = [coroutine]
                cycle.append(cycle)
                del coroutine, cycle
            assert 950 == budget.balance
            gc.set_threshold(1, 1, 1)
            gc.enable()
            for _ in range(20):
                budget.withdraw()
                budget.give_back()
                [[] for _ in range(100)]
        finally:
            gc.set_threshold(*threshold)
            if not was_on:
                gc.disable()
        gc.collect()
        return budget.balance

    assert 1000 == _in_a_thread(use)
