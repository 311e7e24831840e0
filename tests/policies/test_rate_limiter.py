import asyncio
import contextlib
import gc
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshkit import Backoff, ConfigurationError, Pipeline, RateLimitedError, RateLimiter, Retry, Scope, listen
from meshkit.core.events import RateLimited
from meshkit.core.scope import scope_open
from meshkit.policies.rate_limiter import rate_limiters
from meshkit.testing.clock import ManualClock


@pytest.fixture
def refused():
    heard = []
    stop = listen(heard.append, kind=RateLimited)
    yield heard
    stop()


class Calls:
    """Calls through a limiter, and when each was made, in seconds from the start."""

    def __init__(self, limiter, clock):
        self.guarded, self.clock, self.start = Pipeline("prices", limiter), clock, clock.now()
        self.made = []

    def task(self, number=0):
        return asyncio.create_task(self.guarded.call(self._work, number))

    def tasks(self, *numbers):
        return [self.task(number) for number in numbers]

    async def _work(self, number):
        self.made.append((number, round(self.clock.now() - self.start, 3)))
        return number


async def turns():
    for _ in range(5):
        await asyncio.sleep(0)


# -- the rate ---------------------------------------------------------------------------------------------------------


async def test_a_burst_and_then_one_by_one(clock, refused):
    """After `burst` calls at once there is one more each `per / permits` seconds, and the refusal says when."""
    limiter = RateLimiter("prices", permits=2, per=1.0, burst=3, clock=clock)
    calls = Calls(limiter, clock)
    assert [1, 2, 3] == await asyncio.gather(*calls.tasks(1, 2, 3))
    with pytest.raises(RateLimitedError, match=r"allows 2 calls each 1 s, and has a permit in 0\.5 s") as caught:
        await calls.task()
    assert ("MK503", "prices", 0.5) == (caught.value.code, caught.value.policy, caught.value.retry_after)
    assert [RateLimited(source="prices", retry_after=0.5)] == refused
    await clock.advance(caught.value.retry_after)
    assert 4 == await calls.task(4)
    with pytest.raises(RateLimitedError):
        await calls.task()


async def test_a_quiet_time_fills_the_bucket_and_no_more(clock):
    """However long nobody calls, `burst` calls are there."""
    limiter = RateLimiter(permits=2, burst=3, clock=clock)
    assert 3 == limiter.available
    await clock.advance(1000)
    assert 3 == limiter.available
    await asyncio.gather(*Calls(limiter, clock).tasks(1, 2))
    assert 1 == limiter.available
    await clock.advance(0.5)
    assert 2 == limiter.available


@settings(max_examples=100, deadline=None)
@given(
    permits=st.integers(1, 5),
    burst=st.integers(1, 6),
    gaps=st.lists(st.floats(0, 2), min_size=1, max_size=60),
)
def test_it_never_lets_more_through_than_a_bucket_would(permits, burst, gaps):
    """A plain token bucket, counted by hand, gives the same answer at every call."""
    clock = ManualClock()
    limiter = RateLimiter(permits=permits, burst=burst, clock=clock)
    guarded = Pipeline("prices", limiter)
    tokens = float(burst)
    for gap in gaps:
        clock.block(gap)
        tokens = min(burst, tokens + gap * permits)
        refusal = None
        try:
            guarded.call_sync(lambda: None)
        except RateLimitedError as error:
            refusal = error
        if refusal is None:
            # What is taken a millionth of a second early counts as there.
            assert tokens >= 1 - 1e-5
            tokens = max(0.0, tokens - 1)
        else:
            assert tokens < 1
            assert (1 - tokens) / permits == pytest.approx(refusal.retry_after, abs=1e-5)


# -- waiting ----------------------------------------------------------------------------------------------------------


async def test_waiters_are_let_through_evenly_and_in_order(clock):
    """Those who wait come at the rate, first come first served, and nobody overtakes them."""
    limiter = RateLimiter(permits=1, burst=1, wait=10, clock=clock)
    calls = Calls(limiter, clock)
    tasks = calls.tasks(1, 2, 3, 4)
    await turns()
    assert 3 == limiter.waiting
    await clock.advance(2.5)
    tasks += calls.tasks(5)
    await clock.advance(10)
    await asyncio.gather(*tasks)
    assert [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)] == calls.made
    assert 0 == sum(not timer.cancelled for _, _, timer in clock._timers)


async def test_what_would_take_too_long_is_refused_at_once(clock, refused):
    """A call that would wait for longer than `wait` is not kept, and is told when there is a permit."""
    limiter = RateLimiter(permits=1, burst=1, wait=2, clock=clock)
    calls = Calls(limiter, clock)
    tasks = calls.tasks(1, 2, 3)
    await turns()
    with pytest.raises(RateLimitedError) as caught:
        await calls.task(4)
    assert 3 == pytest.approx(caught.value.retry_after)
    assert 1 == len(refused)
    await clock.advance(5)
    await asyncio.gather(*tasks)


async def test_nobody_waits_past_the_deadline_of_the_request(clock):
    """A permit that comes after the deadline is not waited for."""
    limiter = RateLimiter(permits=1, burst=1, wait=None, clock=clock)
    calls = Calls(limiter, clock)
    await calls.task(1)
    with scope_open(Scope(deadline=clock.now() + 0.9)):
        with pytest.raises(RateLimitedError) as caught:
            await calls.task(2)
        assert 1 == pytest.approx(caught.value.retry_after)
    with scope_open(Scope(deadline=clock.now() + 1.1)):
        task = calls.task(3)
    await turns()
    await clock.advance(1)
    assert 3 == await task


async def test_a_cancelled_waiter_gives_its_turn_to_the_next(clock, refused):
    """Who is cancelled while it waits comes out cancelled, those behind move up, and no permit is lost."""
    limiter = RateLimiter(permits=1, burst=1, wait=60, clock=clock)
    calls = Calls(limiter, clock)
    tasks = calls.tasks(1, 2, 3, 4, 5)
    await turns()
    tasks[1].cancel()
    tasks[3].cancel()
    await clock.advance(0)
    await clock.advance(10)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [(1, 0), (3, 1), (5, 2)] == calls.made
    assert (True, True, []) == (tasks[1].cancelled(), tasks[3].cancelled(), refused)
    assert [1, 3, 5] == [result for result in results if isinstance(result, int)]


async def test_a_permit_that_is_given_to_somebody_cancelled_goes_to_the_next(clock):
    """A cancellation in the turn in which the permit comes leaves the permit for the next."""
    limiter = RateLimiter(permits=1, burst=1, wait=60, clock=clock)
    calls = Calls(limiter, clock)
    tasks = calls.tasks(1, 2, 3)
    await turns()
    clock.block(1)  # the permit is given, and nothing else has run yet
    tasks[1].cancel()
    await turns()
    assert [(1, 0), (3, 1)] == calls.made
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_loop_that_was_held_up_lets_no_burst_through(clock):
    """Where the bucket ran over while nobody could look, the others come at the rate still, or are refused where that is
    too late for them."""
    limiter = RateLimiter(permits=1, burst=1, wait=3.2, clock=clock)
    calls = Calls(limiter, clock)
    tasks = calls.tasks(1, 2, 3, 4)
    await turns()
    clock._now += 1.5  # and no timer rings in time
    await clock.advance(0)
    await clock.advance(10)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [(1, 0), (2, 1.5), (3, 2.5)] == calls.made
    assert isinstance(results[3], RateLimitedError)
    assert 0 == limiter.waiting


class Counting(ManualClock):
    """Tells a queue that looks again and again at the same moment from one that waits."""

    asked = 0

    def call_at(self, when, callback):
        self.asked += 1
        assert self.asked < 20_000, "the event loop is kept busy"
        return super().call_at(when, callback)


async def test_a_loop_that_was_held_up_after_some_gave_up_keeps_nobody_busy():
    """Where waiters in the middle have left and others have come, a loop that was held up looks once for each waiter and
    then when there is a permit, and all have theirs at the rate."""
    clock = Counting()
    limiter = RateLimiter(permits=5, burst=1, wait=None, clock=clock)
    calls = Calls(limiter, clock)
    tasks = calls.tasks(*range(13))
    await turns()
    for task in tasks[2:12]:
        task.cancel()
    await turns()
    tasks += calls.tasks(*range(13, 28))
    await turns()
    clock._now += 3.0  # and no timer rings in time
    await clock.advance(0)
    asked = clock.asked
    await clock.advance(0.5)
    assert 4 >= clock.asked - asked
    await clock.advance(10)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert [(0, 0), *((n, round(3.0 + 0.2 * place, 3)) for place, n in enumerate([1, *range(12, 28)]))] == calls.made


async def test_who_comes_late_is_refused_when_its_wait_is_over(clock, refused):
    """A waiter whose permit would come too late, because the loop was held up, is told so by the end of its wait, also
    while those in front of it wait on."""
    limiter = RateLimiter(permits=1, burst=1, wait=None, clock=clock)
    calls = Calls(limiter, clock)
    tasks = calls.tasks(*range(10))
    with scope_open(Scope(deadline=clock.now() + 10.5)):
        late = calls.task(10)
    await turns()
    clock._now += 5.0
    await clock.advance(0)
    await clock.advance(5.4)
    assert not late.done()
    await clock.advance(0.1)
    with pytest.raises(RateLimitedError):
        await late
    assert (7, 3) == (len(calls.made), limiter.waiting)
    await clock.advance(10)
    await asyncio.gather(*tasks)


async def test_thousands_that_come_too_late_are_refused(clock):
    """Everybody in a long queue that has become too late is refused, however many there are."""
    limiter = RateLimiter(permits=1000, burst=1, wait=3, clock=clock)
    calls = Calls(limiter, clock)
    tasks = calls.tasks(*range(3001))
    await turns()
    clock._now += 10.0
    await clock.advance(0)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert (2, 2999) == (len(calls.made), sum(isinstance(result, RateLimitedError) for result in results))
    assert 0 == limiter.waiting


# Long enough for a queue to form that some leave, others join, and a loop that is held up comes back to.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.integers(1, 8)),
        st.tuples(st.just("leave"), st.integers(0, 1000)),
        st.tuples(st.just("pass"), st.floats(0.01, 0.5)),
        st.tuples(st.just("held up"), st.floats(0.01, 3)),
        st.tuples(st.just("turn"), st.just(0)),
    ),
    min_size=20,
    max_size=100,
)


@settings(max_examples=150, deadline=None)
@given(
    permits=st.sampled_from([1, 2, 5, 10]),
    per=st.sampled_from([0.3, 1.0, 10.0]),
    burst=st.sampled_from([1, 2, 5, 20]),
    wait=st.sampled_from([0.0, 1.0, 3.0, None]),
    start=st.sampled_from([0.0, 1000.0, 1e9]),
    steps=STEPS,
)
def test_whatever_happens_the_rate_holds_and_everybody_is_answered(permits, per, burst, wait, start, steps):
    """Callers come, give up, and are served by a loop that may be held up: within any `per` seconds at most
    `burst + permits` calls are made, nobody waits for longer than its wait in a loop that runs, the queue ends empty
    without keeping the loop busy, and no permit is lost."""

    async def main():
        clock = Counting(start=start)
        limiter = RateLimiter(
            permits=permits, per=per, burst=burst, wait=None if wait is None else wait * per, clock=clock
        )
        guarded, made, tasks, late = Pipeline("prices", limiter), [], [], 0.0

        async def work():
            made.append(clock.now())

        async def one():
            came = clock.now()
            with contextlib.suppress(RateLimitedError):
                await guarded.call(work)
            return clock.now() - came

        for what, amount in steps:
            if what == "come":
                tasks += [asyncio.create_task(one()) for _ in range(amount)]
            elif what == "leave" and tasks:
                # Of those that came last, because most others have been answered.
                tasks[-1 - amount % min(len(tasks), 20)].cancel()
            elif what == "pass":
                await clock.advance(amount * per)
            elif what == "held up":
                clock._now += amount * per
                late += amount * per
                await asyncio.sleep(0)
                await clock.advance(0)
            else:
                await asyncio.sleep(0)
        # Those of the last step join at the end of the first advance, and the times add up but for a binary fraction.
        for _ in range(len(tasks) + 2):
            await clock.advance(per / permits)
        assert ([], 0) == ([task for task in tasks if not task.done()], limiter.waiting)
        for number, first in enumerate(made):
            within = [each for each in made[number:] if each < first + per - 1e-5]
            assert burst + permits >= len(within)
        if wait is not None:
            waited = [task.result() for task in tasks if not task.cancelled()]
            assert all(each <= wait * per + late + 1e-5 for each in waited)
        await clock.advance(2 * per * burst)
        assert burst == limiter.available
        assert 0 == sum(not timer.cancelled for _, _, timer in clock._timers)

    asyncio.run(main())


# -- threads, loops, plain functions, other policies -------------------------------------------------------------------


def test_plain_functions_wait_and_are_refused_too(clock, refused):
    """A plain function holds its thread until its permit comes."""
    limiter = RateLimiter(permits=2, burst=1, wait=0.5, clock=clock)
    guarded = Pipeline("prices", limiter)
    guarded.call_sync(lambda: None)
    guarded.call_sync(lambda: None)
    assert [0.5] == clock.sleeps
    with scope_open(Scope(deadline=clock.now() + 0.1)), pytest.raises(RateLimitedError):
        guarded.call_sync(lambda: None)
    assert [0.5] == [event.retry_after for event in refused]


def test_an_interrupt_while_waiting_gives_the_turn_back(clock):
    """A thread that is interrupted waits no more."""
    limiter = RateLimiter(permits=1, burst=1, wait=5, clock=clock)
    guarded = Pipeline("prices", limiter)
    guarded.call_sync(lambda: None)

    def interrupt():
        raise KeyboardInterrupt

    clock.call_at(clock.now() + 0.5, interrupt)
    with pytest.raises(KeyboardInterrupt):
        guarded.call_sync(lambda: None)
    assert 0 == limiter.waiting


class Running(ManualClock):
    """Time that goes on by a millisecond whenever somebody looks, from whatever thread."""

    def now(self):
        self._now += 0.001
        return self._now

    def call_at(self, when, callback):
        loop = asyncio.get_running_loop()
        return loop.call_soon(lambda: callback() if self.now() >= when else self.call_at(when, callback))

    def block(self, seconds, until=None):
        if until is not None and not until.is_set():
            self._now += 0.001


def test_threads_and_loops_share_one():
    """Event loops in several threads and plain threads share the permits: everybody gets one, none too many."""
    clock = Running()
    limiter = RateLimiter(permits=100, burst=5, wait=None, clock=clock)
    guarded = Pipeline("prices", limiter)
    start, made = clock.now(), []

    async def work():
        made.append(1)

    async def main():
        await asyncio.gather(*(guarded.call(work) for _ in range(100)))

    def many():
        for _ in range(100):
            guarded.call_sync(made.append, 1)

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(2)]
    threads += [threading.Thread(target=many) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (400, 0) == (len(made), limiter.waiting)
    assert 395 / 100 <= clock.now() - start


def test_waiters_of_a_loop_that_was_closed_are_passed_over(clock):
    """Whoever stands in front of hundreds of waiters whose event loop was closed around them comes out cancelled, and the
    next one that is there has the permit."""
    limiter = RateLimiter(permits=1, burst=1, wait=None, clock=clock)
    calls = Calls(limiter, clock)
    lost, mine = asyncio.new_event_loop(), asyncio.new_event_loop()

    async def wait(*numbers):
        tasks = calls.tasks(*numbers)
        await turns()
        return tasks

    async def main(front):
        front.cancel()
        (last,) = await wait(7)
        with pytest.raises(asyncio.CancelledError):
            await front
        await clock.advance(1)
        await last

    try:
        _, front = mine.run_until_complete(wait(0, 1))
        gone = lost.run_until_complete(wait(*range(2000)))
        lost.close()
        mine.run_until_complete(main(front))
        assert ([(0, 0), (7, 1)], 0) == (calls.made, limiter.waiting)
    finally:
        mine.close()
        for task in gone:
            # Nobody can end them any more.
            task._log_destroy_pending = False
            task.get_coro().close()


async def test_each_attempt_of_a_retry_takes_a_permit(clock):
    """Inside a Retry the permits bound the attempts, as failsafe-go's composition "RetryPolicy with RateLimiter"; a
    refusal is not tried again at once, and the error is that of the last call that was made."""
    limiter = RateLimiter(permits=3, burst=3, clock=clock)
    made = []

    async def fails():
        made.append(1)
        raise OSError(len(made))

    with pytest.raises(OSError) as caught:
        await Pipeline("prices", Retry(attempts=7, backoff=Backoff(first=0, most=0), clock=clock), limiter).call(fails)
    assert (3, (3,)) == (len(made), caught.value.args)


async def test_ten_thousand_refusals_grow_nothing(clock):
    """Each refusal is an error of its own, and nobody stays in the queue."""
    limiter = RateLimiter(permits=1, clock=clock)
    calls = Calls(limiter, clock)
    await calls.task()
    errors = set()
    for _ in range(10_000):
        with pytest.raises(RateLimitedError) as caught:
            await calls.guarded.call(calls._work, 1)
        errors.add(len(caught.traceback))
    assert (1, 0, 1) == (len(errors), limiter.waiting, len(calls.made))


def test_what_a_scrape_reads(clock):
    """Rate limiters that are alive are listed, and the others are not."""
    limiter = RateLimiter("scraped", permits=7, per=60, wait=3.0, clock=clock)
    assert limiter in rate_limiters()
    assert {
        "kind": "rate_limiter",
        "name": "scraped",
        "permits": 7,
        "per": 60,
        "burst": 7,
        "wait": 3.0,
    } == limiter.describe()
    assert "RateLimiter('scraped', permits=7, per=60, available=7, waiting=0)" == repr(limiter)
    del limiter
    gc.collect()
    assert "scraped" not in [known.name for known in rate_limiters()]


@pytest.mark.parametrize(
    "wrong",
    [
        {"permits": 0},
        {"permits": 0.5},
        {"permits": True},
        {"permits": 1, "per": 0},
        {"permits": 1, "per": "1s"},
        {"permits": 1, "burst": 0},
        {"permits": 1, "burst": 1.5},
        {"permits": 1, "wait": -1},
        {"permits": 1, "wait": float("inf")},
        {"name": "", "permits": 1},
        {"permits": 1, "clock": 3},
        {"permits": 1, "clock": None},
    ],
    ids=str,
)
def test_wrong_options_are_refused(wrong):
    """Each value that cannot work is refused when the limiter is made."""
    with pytest.raises(ConfigurationError):
        RateLimiter(**wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"permits": 10, "per": 5e-324},
        {"permits": 10**10},
        {"permits": 10**400},
        {"permits": 1, "per": 10**400},
        {"permits": 1, "burst": 10**400},
        {"permits": 1, "per": 1e308, "burst": 10},
    ],
    ids=["no time", "ten a nanosecond", "many permits", "a long time", "a large bucket", "a slow bucket"],
)
def test_a_rate_that_no_clock_can_follow_is_refused(options):
    """Numbers of the right kind whose quotient or product is none that can be timed are a mistake of the options."""
    with pytest.raises(ConfigurationError, match="a rate that can be timed"):
        RateLimiter(**options)


def test_the_fastest_and_the_slowest_rate_can_be_asked(clock):
    """At both ends of what is accepted, all that can be read of a limiter is a number."""
    for options in ({"permits": 10**9, "burst": 1}, {"permits": 1, "per": 1e300, "burst": 10**6}):
        limiter = RateLimiter(**options, clock=clock)
        Pipeline("prices", limiter).call_sync(lambda: None)
        assert 0 <= limiter.available <= limiter.burst
