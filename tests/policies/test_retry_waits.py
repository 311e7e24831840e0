"""How long a Retry waits, and when it rather ends."""

import asyncio
import email.utils
import math
import random
import statistics
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshkit import (
    Backoff,
    BulkheadFullError,
    CircuitOpenError,
    ConfigurationError,
    DeadlineTooCloseError,
    Pipeline,
    RateLimitedError,
    Retry,
    Scope,
    Timeout,
    listen,
    retry_end,
)
from meshkit.core.call import Call, Judgement
from meshkit.core.events import RetryEnded, RetryScheduled
from meshkit.core.scope import scope_open
from meshkit.testing.clock import ManualClock

NONE = Backoff(jitter="none")


class Busy(Exception):
    def __init__(self, retry_after):
        super().__init__("busy")
        self.retry_after = retry_after


def failing(*errors):
    left = list(errors)

    async def fn():
        if left:
            raise left.pop(0)
        return "ok"

    return fn


class Dice(ManualClock):
    """A clock whose chance comes from a seeded generator."""

    def __init__(self, seed=1):
        super().__init__()
        self._dice = random.Random(seed)

    def random(self):
        return self._dice.random()


# -- jitter -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("jitter", "least", "mean"), [("full", 0.0, 0.5), ("equal", 0.5, 0.75), ("none", 1.0, 1.0)])
@pytest.mark.parametrize("attempt", [1, 2, 5, 9])
def test_each_jitter_keeps_to_its_bounds_and_mean(jitter, least, mean, attempt):
    """Waits lie between the kind's share of the longest length and all of it, and around its mean: as Polly's
    `RetryHelperTests`, Resilience4j's `IntervalFunctionTest` and hyx's `test_jitters.py`."""
    backoff, clock = Backoff(first=0.2, factor=2.0, most=8.0, jitter=jitter), Dice()
    longest = min(8.0, 0.2 * 2 ** (attempt - 1))
    waits = [backoff.wait(attempt, clock) for _ in range(4000)]
    assert longest == backoff.longest(attempt)
    assert least * longest <= min(waits)
    assert longest >= max(waits)
    assert mean * longest == pytest.approx(statistics.mean(waits), rel=0.03)


def test_a_decorrelated_wait_comes_from_the_one_before():
    """It lies between `first` and three times the wait before, never over `most`: as hyx's `test_jitters.py` has for
    its decorrelated jitter, and Polly's `RetryHelperTests` for the bounds of its own."""
    backoff, clock = Backoff(first=0.1, most=5.0, jitter="decorrelated"), Dice()
    for _ in range(500):
        before = None
        for attempt in range(1, 12):
            wait = backoff.wait(attempt, clock, before)
            assert 0.1 <= wait <= min(5.0, 3 * (0.1 if before is None else before), backoff.longest(attempt))
            before = wait
    firsts = [backoff.wait(1, clock) for _ in range(4000)]
    assert 0.2 == pytest.approx(statistics.mean(firsts), rel=0.03)


async def test_a_retry_remembers_the_wait_before_for_decorrelated_jitter(clock):
    """Each call has its own chain of waits."""
    clock.chance = 1.0
    retry = Retry(attempts=4, backoff=Backoff(first=0.1, most=5.0, jitter="decorrelated"), clock=clock)
    for _ in range(2):
        assert "ok" == await Pipeline("prices", retry).call(failing(OSError(), OSError(), OSError()))
    assert [pytest.approx(wait) for wait in (0.3, 0.9, 2.7)] * 2 == clock.sleeps


def test_a_function_of_ones_own_makes_the_wait_and_is_held_to_the_longest(clock):
    """A plain function gets the longest length and gives the wait; more than `most` is never waited, nor is less than
    nothing or no number."""
    asked = []

    def half(longest):
        asked.append(longest)
        return longest / 2

    backoff = Backoff(first=1.0, most=4.0, jitter=half)
    assert [0.5, 1.0, 2.0, 2.0] == [backoff.wait(attempt, clock) for attempt in (1, 2, 3, 4)]
    assert [1.0, 2.0, 4.0, 4.0] == asked
    assert 4.0 == Backoff(first=1.0, most=4.0, jitter=lambda longest: 100.0).wait(1, clock)
    assert 0.0 == Backoff(jitter=lambda longest: -1.0).wait(1, clock)
    assert 0.0 == Backoff(jitter=lambda longest: math.nan).wait(1, clock)


@pytest.mark.parametrize("jitter", ["full", "equal", "decorrelated", "none"])
@pytest.mark.parametrize("attempt", [1_100, 5_000, 10**9])
def test_a_wait_late_in_a_long_retry_does_not_overflow(jitter, attempt):
    """At attempt 1,100 and far beyond the wait is within `most`: what Polly's `IssuesTests.InfiniteRetry_2163` and stamina
    #137 are about."""
    backoff = Backoff(jitter=jitter)
    assert 10.0 == backoff.longest(attempt)
    assert 0.0 <= backoff.wait(attempt, ManualClock(chance=0.999), 10.0) <= 10.0
    assert 0.0 == Backoff(first=0, jitter=jitter).longest(attempt)


async def test_a_retry_goes_on_after_attempt_1100(clock):
    """A call that fails 1,100 times and then works comes to its result: what Polly's `IssuesTests.InfiniteRetry_2163` and
    stamina #137 are about."""
    retry = Retry(attempts=2_000, within=None, backoff=Backoff(jitter="none"), clock=clock)
    assert "ok" == await Pipeline("prices", retry).call(failing(*[OSError() for _ in range(1_100)]))
    assert 1_100 == len(clock.sleeps)
    assert 10.0 == max(clock.sleeps)


@given(
    first=st.floats(0, 100),
    factor=st.floats(1, 10),
    most=st.floats(0, 1000),
    waits=st.integers(0, 60),
    jitter=st.sampled_from(["full", "equal", "none"]),
)
def test_the_total_of_a_backoff_is_the_sum_of_its_longest_waits(first, factor, most, waits, jitter):
    """`total` is what adding up one by one comes to."""
    backoff = Backoff(first=first, factor=factor, most=most, jitter=jitter)
    added = sum(backoff.longest(attempt) for attempt in range(1, waits + 1))
    assert added == pytest.approx(backoff.total(waits))


def test_the_total_of_many_waits_is_had_at_once():
    """Nobody counts to a billion for it, whatever the kind."""
    assert 10.0 * 10**9 == pytest.approx(Backoff().total(10**9))
    assert 0.0 == Backoff(first=0).total(10**9)
    assert 0.1 * 10**9 == pytest.approx(Backoff(factor=1.0).total(10**9))
    assert 10.0 * 10**9 == pytest.approx(Backoff(jitter="decorrelated").total(10**9))
    assert 30.0 == Backoff(jitter=lambda longest: longest).total(3)
    assert 0.3 + 0.9 == pytest.approx(Backoff(jitter="decorrelated").total(2))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"first": -1}, "seconds to wait"),
        ({"first": "1"}, "seconds to wait, not '1' and 10.0"),
        ({"first": None}, "seconds to wait"),
        ({"first": True}, "seconds to wait"),
        ({"most": "1"}, "seconds to wait, not 0.1 and '1'"),
        ({"factor": "2"}, "1 or above, not '2'"),
        ({"jitter": lambda: 1.0}, "^MK100  jitter is called with the longest wait"),
        ({"first": math.nan}, "seconds to wait"),
        ({"first": math.inf}, "seconds to wait"),
        ({"most": -1}, "seconds to wait"),
        ({"factor": math.inf}, "1 or above"),
        ({"most": math.inf}, "seconds to wait"),
        ({"factor": 0.5}, "1 or above"),
        ({"jitter": "fall"}, "full, equal, decorrelated, none"),
        ({"jitter": None}, "full, equal, decorrelated, none"),
        ({"jitter": "decorrelated", "factor": 3.0}, "Leave factor out"),
    ],
)
def test_a_wrong_backoff_says_what_would_be_right(wrong, said):
    """A value that cannot work is refused when the backoff is made."""
    with pytest.raises(ConfigurationError, match=said):
        Backoff(**wrong)


# -- what the other side asks for -------------------------------------------------------------------------------------

# ManualClock: 1,700,000,000 s after the epoch, Tue, 14 Nov 2023 22:13:20 GMT.
NOW = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)


@pytest.mark.parametrize(
    ("asked", "waited"),
    [
        (4, 4.0),
        (4.5, 4.5),
        ("4", 4.0),
        (" 4 ", 4.0),
        (timedelta(seconds=4), 4.0),
        ("Tue, 14 Nov 2023 22:13:24 GMT", 4.0),
        ("Tue, 14 Nov 2023 22:13:24 -0000", 4.0),
        ("Wed, 15 Nov 2023 00:13:24 +0200", 4.0),
        (NOW + timedelta(seconds=4), 4.0),
        ((NOW + timedelta(seconds=4)).replace(tzinfo=None), 4.0),
        ((NOW + timedelta(seconds=4)).astimezone(timezone(timedelta(hours=-8))), 4.0),
    ],
    ids=str,
)
async def test_each_form_of_retry_after_is_understood(clock, asked, waited):
    """Seconds, a date, a `timedelta` and a `datetime` all mean the same wait: as httpx-retries' `tests/test_retry.py` and
    Microsoft's `RetryAfterHelperTests` have for the header's two forms."""
    clock.chance = 0.0
    assert "ok" == await Pipeline("prices", Retry(clock=clock)).call(failing(Busy(asked)))
    assert [pytest.approx(waited)] == clock.sleeps


@pytest.mark.parametrize(
    "asked",
    [
        "soon",
        "",
        "-4",
        "4.5",
        "4 s",
        "Tue, 99 Nov 2023 22:13:24 GMT",
        -4,
        0,
        math.nan,
        math.inf,
        10**400,
        True,
        None,
        b"4",
        object(),
        [4],
        lambda: 4,
        timedelta(seconds=-4),
        email.utils.format_datetime(NOW - timedelta(hours=1)),
        NOW - timedelta(days=1),
    ],
    # Those of objects would be their addresses, which differ from run to run.
    ids=lambda value: type(value).__name__ if " at 0x" in repr(value) else repr(value),
)
async def test_a_retry_after_that_is_past_or_nonsense_is_ignored(clock, asked):
    """What is past, or cannot be waited for, leaves the backoff as it is: as Microsoft's `RetryAfterHelperTests` and
    httpx-retries' `tests/test_retry.py` have for dates in the past and garbage."""
    assert "ok" == await Pipeline("prices", Retry(backoff=NONE, clock=clock)).call(failing(Busy(asked)))
    assert [0.1] == clock.sleeps


@pytest.mark.parametrize("digits", [5, 400, 5000])
async def test_more_seconds_than_anybody_waits_for_end_it(clock, digits):
    """A number of seconds is one however many digits it has, and zeros in front of it are none of them."""
    error = Busy("9" * digits)
    with pytest.raises(Busy):
        await Pipeline("prices", Retry(clock=clock)).call(failing(error))
    assert [] == clock.sleeps
    assert "deadline" == retry_end(error)
    assert "ok" == await Pipeline("prices", Retry(backoff=NONE, clock=clock)).call(failing(Busy("0" * digits + "5")))
    assert [pytest.approx(5.25)] == clock.sleeps


async def test_the_longer_one_of_backoff_and_retry_after_is_waited(clock):
    """A backoff beyond what the other side asks for stays; what is asked for is stretched by up to a tenth."""
    for chance, waited in ((0.0, 4.0), (0.5, 4.2), (0.999999, 4.4)):
        clock.chance = chance
        await Pipeline("prices", Retry(backoff=NONE, clock=clock)).call(failing(Busy(4)))
        assert pytest.approx(waited, abs=1e-5) == clock.sleeps.pop()
    backoff = Backoff(first=5.0, jitter="none")
    assert "ok" == await Pipeline("prices", Retry(backoff=backoff, clock=clock)).call(failing(Busy(4)))
    assert [5.0] == clock.sleeps


async def test_what_the_edge_says_goes_before_what_the_error_says(clock):
    """A judgement's `retry_after` counts, and the event says that the wait came from the server."""
    heard, answers = [], [503, 200]

    async def send(call):
        return answers.pop(0)

    call = Call("prices", judge=lambda o: Judgement(retry=o.result == 503, retry_after=2.0, error_type="503"))
    stop = listen(heard.append, kind=RetryScheduled)
    try:
        clock.chance = 0.0
        assert 200 == await Retry(clock=clock).run(call, send)
    finally:
        stop()
    assert [RetryScheduled(source="prices", attempt=1, delay=2.0, error_type="503", from_server=True)] == heard


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync", [False, True], ids=["async", "plain"])
async def test_a_retry_after_beyond_the_time_left_ends_it_at_once(clock, sync):
    """With 2 s left and 60 s asked for the error comes out now, ended by the deadline: dotnet/extensions 7701 waits in
    vain there."""
    pipeline, started = Pipeline("prices", Retry(clock=clock)), clock.now()

    def plain():
        raise Busy(60)

    async def coroutine():
        raise Busy(60)

    with scope_open(Scope(deadline=clock.now() + 2.0)), pytest.raises(Busy) as caught:
        await (asyncio.to_thread(pipeline(plain)) if sync else pipeline(coroutine)())
    assert started == clock.now()
    assert "deadline" == retry_end(caught.value)


async def test_a_deadline_is_never_passed_by_a_wait(clock):
    """Whatever the jitter comes to, no attempt begins at or after the deadline."""
    for chance in (0.0, 0.3, 0.7, 0.999):
        clock.chance = chance
        began, deadline = [], clock.now() + 3.0

        async def fails(began=began):
            began.append(clock.now())
            clock.block(0.25)
            raise OSError

        with scope_open(Scope(deadline=deadline)), pytest.raises(OSError):
            await Pipeline("prices", Retry(attempts=50, clock=clock)).call(fails)
        assert max(began) < deadline


@pytest.mark.parametrize("given", ["by the request", "by a timeout"])
@pytest.mark.parametrize("chance", [0.0, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("takes", [0.04, 60.0], ids=["quick", "hangs"])
async def test_a_call_is_over_by_its_deadline(given, chance, takes):
    """Attempts that fail, attempts that hang, and waits of any length between them: the deadline is never exceeded by
    more than one scheduler tick, here a tenth of a second."""
    tick, clock, began = 0.1, ManualClock(chance=chance, hold=True), []

    async def fails():
        began.append(clock.now())
        await clock.sleep(takes)
        raise OSError

    policies = [Retry(attempts=1_000, within=None, clock=clock), Timeout(0.25, clock=clock)]
    deadline = clock.now() + 3.0
    if given == "by a timeout":
        task = asyncio.create_task(Pipeline("prices", Timeout(total=3.0, clock=clock), *policies).call(fails))
    else:
        with scope_open(Scope(deadline=deadline)):
            task = asyncio.create_task(Pipeline("prices", *policies).call(fails))
    await asyncio.sleep(0)
    while not task.done() and clock.now() < deadline + 10 * tick:
        await clock.advance(tick)
    assert task.done()
    assert isinstance(task.exception(), OSError)
    assert clock.now() <= deadline + tick
    assert max(began) < deadline


async def test_it_is_bounded_in_time_by_default(clock):
    """After a minute no further wait begins, however many attempts are left; `within=None` takes that away."""
    began = []

    async def fails():
        began.append(clock.now())
        raise OSError

    started = clock.now()
    with pytest.raises(OSError) as caught:
        await Pipeline("prices", Retry(attempts=1_000, backoff=NONE, clock=clock)).call(fails)
    assert "deadline" == retry_end(caught.value)
    assert 50.0 < max(began) - started < 60.0
    began.clear()
    started = clock.now()
    with pytest.raises(OSError) as caught:
        await Pipeline("prices", Retry(attempts=20, within=None, backoff=NONE, clock=clock)).call(fails)
    assert "attempts" == retry_end(caught.value)
    assert max(began) - started > 60.0


async def test_the_time_of_attempts_counts(clock):
    """`within` begins with the first attempt, not with the first wait."""

    async def slow():
        clock.block(4.0)
        raise OSError

    with pytest.raises(OSError) as caught:
        await Pipeline("prices", Retry(attempts=10, within=9.0, backoff=Backoff(first=0), clock=clock)).call(slow)
    assert "deadline" == retry_end(caught.value)
    assert 1012.0 == clock.now()


async def test_a_wall_clock_that_jumps_changes_nothing(clock):
    """Two hours forth or back on the wall clock move neither the waits nor the end."""
    jumps = [7200, -14_400, 7200]

    async def fails():
        clock._offset += jumps.pop(0)
        raise OSError

    with pytest.raises(OSError) as caught:
        await Pipeline("prices", Retry(backoff=NONE, clock=clock)).call(fails)
    assert [0.1, 0.2] == clock.sleeps
    assert "attempts" == retry_end(caught.value)


@pytest.mark.parametrize("start", [0.0, 1e12], ids=["zero", "huge"])
async def test_where_the_clock_begins_means_nothing(start):
    """At time 0 and at huge values the waits are the same."""
    clock = ManualClock(start=start)
    assert "ok" == await Pipeline("prices", Retry(backoff=NONE, clock=clock)).call(failing(OSError(), OSError()))
    assert [0.1, 0.2] == clock.sleeps


async def test_a_wait_without_end_is_not_begun(clock):
    """A strategy that says "for ever" ends it, also where there is no limit."""
    retry = Retry(wait=lambda state: math.inf, within=None, clock=clock)
    with pytest.raises(OSError) as caught:
        await Pipeline("prices", retry).call(failing(OSError()))
    assert "deadline" == retry_end(caught.value)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CircuitOpenError(policy="prices", retry_after=3.0), "breaker"),
        (BulkheadFullError(policy="prices"), "rejected"),
        (RateLimitedError(policy="prices", retry_after=3.0), "rejected"),
        (DeadlineTooCloseError(policy="prices"), "deadline"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_refusal_ends_it_under_its_own_name(clock, error, reason):
    """No refusal is retried, and only an open breaker is told as one."""
    heard = []
    stop = listen(heard.append, kind=RetryEnded)
    try:
        with pytest.raises(type(error)):
            await Pipeline("prices", Retry(clock=clock)).call(failing(error))
    finally:
        stop()
    assert [reason] == [event.reason for event in heard]
    assert reason == retry_end(error)


async def test_patience_takes_the_longest_of_backoff_and_breaker(clock):
    """A patient retry waits for the breaker, or for its backoff if that is longer, and never beyond the deadline."""
    clock.chance = 0.0
    error = CircuitOpenError(policy="prices", retry_after=3.0)
    for first, waited in ((0.1, 3.0), (5.0, 5.0)):
        retry = Retry(patient=True, backoff=Backoff(first=first, jitter="none"), clock=clock)
        assert "ok" == await Pipeline("prices", retry).call(failing(error))
        assert waited == clock.sleeps.pop()
    with scope_open(Scope(deadline=clock.now() + 2.0)), pytest.raises(CircuitOpenError) as caught:
        await Pipeline("prices", Retry(patient=True, clock=clock)).call(failing(error))
    assert "deadline" == retry_end(caught.value)
    assert [] == clock.sleeps


async def test_patience_has_no_use_where_the_time_is_over(clock):
    """Too little time is left: waiting makes it less."""
    with pytest.raises(DeadlineTooCloseError) as caught:
        await Pipeline("prices", Retry(patient=True, clock=clock)).call(failing(DeadlineTooCloseError()))
    assert "deadline" == retry_end(caught.value)


async def test_the_default_leaves_room_for_a_breaker_that_is_open_for_30_seconds(clock):
    """A patient retry with nothing else said outlives one open period of a breaker with nothing else said."""
    clock.chance = 0.999
    error = CircuitOpenError(policy="prices", retry_after=30.0)
    assert "ok" == await Pipeline("prices", Retry(patient=True, clock=clock)).call(failing(error))


@pytest.mark.parametrize("sync", [False, True])
async def test_an_error_whose_retry_after_raises_is_still_the_error_that_comes_out(clock, sync):
    """A property of somebody else's that stumbles asks for nothing: it is waited as ever, and the error comes out."""

    class Odd(Exception):
        @property
        def retry_after(self):
            raise RuntimeError("no headers")

    def fails():
        raise Odd

    async def fails_later():
        raise Odd

    pipeline = Pipeline("prices", Retry(attempts=2, backoff=Backoff(first=0.5, jitter="none"), clock=clock))
    with pytest.raises(Odd):
        _ = pipeline(fails)() if sync else await pipeline(fails_later)()
    assert [0.5] == clock.sleeps


async def test_a_short_wait_that_the_other_side_asks_for_is_its_own_too(clock):
    """Also less than a second is told as asked for by the server."""
    heard = []
    stop = listen(heard.append, kind=RetryScheduled)
    try:
        await Pipeline("prices", Retry(backoff=Backoff(first=0), clock=clock)).call(failing(Busy(0.5)))
    finally:
        stop()
    assert [True] == [event.from_server for event in heard]
