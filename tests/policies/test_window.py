"""What a breaker remembers, against a plain list of everything that ever happened."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshkit.policies.window import CountWindow, TimeWindow, Totals

OK, FAILED, SLOW, BOTH = (False, False), (True, False), (False, True), (True, True)


def totals_of(calls):
    return Totals(len(calls), sum(failed for failed, _ in calls), sum(slow for _, slow in calls))


class Listed:
    """The last `size` calls, in the simplest way there is."""

    def __init__(self, size):
        self._size = size
        self._calls = []

    def add(self, now, failed, slow):
        self._calls.append((failed, slow))

    def totals(self, now):
        return totals_of(self._calls[-self._size :])

    def clear(self):
        self._calls = []


class ListedByTime:
    """The calls of this tenth of `seconds` and of the nine before it. Calls are noted in the order in which they come,
    and one that looked at the clock before another one but comes after it belongs where that one does."""

    def __init__(self, seconds):
        self._tenth = seconds / 10
        self._calls = []

    def _number(self, now):
        return math.floor(now / self._tenth)

    def add(self, now, failed, slow):
        self.totals(now)
        latest = max([self._number(now), *(number for number, _ in self._calls)])
        self._calls.append((latest, (failed, slow)))

    def totals(self, now):
        self._calls = [(number, call) for number, call in self._calls if number > self._number(now) - 10]
        return totals_of([call for _, call in self._calls])

    def clear(self):
        self._calls = []


calls = st.tuples(st.just("add"), st.booleans(), st.booleans())
successes = st.tuples(st.just("successes"), st.integers(0, 30))
steps = st.lists(st.tuples(st.floats(-1, 8), st.one_of(calls, successes, st.just(("clear",)), st.just(("look",)))))


def same(window, listed, moves, start):
    now = start
    for seconds, (what, *with_) in moves:
        now += seconds
        if what == "add":
            window.add(now, failed=with_[0], slow=with_[1])
            listed.add(now, *with_)
        elif what == "successes":
            window.add_successes(now, with_[0])
            for _ in range(with_[0]):
                listed.add(now, *OK)
        elif what == "clear":
            window.clear()
            listed.clear()
        assert listed.totals(now) == window.totals(now)


@given(moves=steps, size=st.integers(1, 12))
def test_a_count_window_is_the_end_of_a_list(moves, size):
    """After any sequence its totals equal those of a naive list, as Resilience4j's
    `FixedSizeSlidingWindowMetricsTest` and failsafe-go's `internal/util/stats_test.go` check by examples."""
    same(CountWindow(size), Listed(size), moves, 1000.0)


@given(moves=steps, seconds=st.floats(0.1, 100), start=st.floats(-1000, 1e9))
def test_a_time_window_is_a_list_with_times(moves, seconds, start):
    """After any sequence its totals equal those of a naive list, as Resilience4j's `SlidingTimeWindowMetricsTest` and
    Polly's `GetHealthInfo_EnsureWindowRespected` check by examples."""
    same(TimeWindow(seconds), ListedByTime(seconds), moves, start)


def test_a_count_window_fills_wraps_and_evicts():
    """The oldest call goes when a further one comes, each kind with its own share (Resilience4j's
    `FixedSizeSlidingWindowMetricsTest`)."""
    window = CountWindow(3)
    assert Totals(0, 0, 0) == window.totals(0)
    seen = []
    for failed, slow in (FAILED, SLOW, BOTH, OK, OK, OK):
        window.add(0, failed=failed, slow=slow)
        seen.append(tuple(window.totals(0)))
    assert [(1, 1, 0), (2, 1, 1), (3, 2, 2), (3, 1, 2), (3, 1, 1), (3, 0, 0)] == seen


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 10**6])
def test_successes_at_once_are_successes_one_by_one(count):
    """They push out as many calls as they are, and no more than there are."""
    window = CountWindow(4)
    for failed, slow in (FAILED, BOTH, SLOW):
        window.add(0, failed=failed, slow=slow)
    window.add_successes(0, count)
    assert {0: (3, 2, 2), 1: (4, 2, 2), 2: (4, 1, 2), 3: (4, 0, 1)}.get(count, (4, 0, 0)) == tuple(window.totals(0))


@pytest.mark.parametrize("window", [CountWindow(3), TimeWindow(10.0)], ids=["count", "time"])
def test_a_call_of_which_nothing_is_said_was_good(window):
    """Neither failed nor slow is what `add` takes for granted; `clear` forgets all of it, each kind too."""
    window.add(1000.0)
    assert Totals(1, 0, 0) == window.totals(1000.0)
    window.add(1000.0, failed=True, slow=True)
    window.clear()
    assert Totals(0, 0, 0) == window.totals(1000.0)
    window.add(1000.0)
    assert Totals(1, 0, 0) == window.totals(1000.0)


def test_a_time_window_reaches_back_nine_to_ten_tenths():
    """A call is remembered for the rest of its tenth and the nine after it (Resilience4j's
    `SlidingTimeWindowMetricsTest`: by seconds; ours by tenths)."""
    window = TimeWindow(10.0)
    window.add(1000.5, failed=True, slow=True)
    assert Totals(1, 1, 1) == window.totals(1009.99)
    assert Totals(0, 0, 0) == window.totals(1010.0)


def test_a_time_window_drops_its_oldest_tenth_only():
    """What is in younger tenths stays."""
    window = TimeWindow(10.0)
    for second in range(10):
        window.add(float(second), failed=second < 2)
    assert Totals(10, 2, 0) == window.totals(9.9)
    assert Totals(9, 1, 0) == window.totals(10.0)
    assert Totals(8, 0, 0) == window.totals(11.9)
    assert Totals(0, 0, 0) == window.totals(1e9)


def test_a_call_that_comes_late_counts_where_the_newest_ones_do():
    """A thread that read the clock before another one and comes after it: nothing is lost, nothing goes back."""
    window = TimeWindow(10.0)
    window.add(1005.0, failed=True)
    window.add(1003.0, failed=True)
    assert Totals(2, 2, 0) == window.totals(1003.0)
    assert Totals(2, 2, 0) == window.totals(1014.9)
    assert Totals(0, 0, 0) == window.totals(1015.0)


def test_no_successes_are_no_call():
    """Adding none leaves a time window as empty as it was, and one begins a tenth."""
    window = TimeWindow(10.0)
    window.add_successes(1000.0, 0)
    assert Totals(0, 0, 0) == window.totals(1000.0)
    window.add_successes(1000.0, 3)
    assert Totals(3, 0, 0) == window.totals(1000.0)


def test_a_time_window_does_not_grow_with_its_calls():
    """A hundred thousand calls are ten numbers of each kind."""
    window = TimeWindow(10.0)
    for call in range(100_000):
        window.add(call * 0.001, failed=call % 2 == 0)
        assert len(window._slices) <= 10
    assert Totals(10_000, 5_000, 0) == window.totals(99.999)
