"""tenacity's strategies in a Retry: each decides as it does in tenacity, with our clock and our rules around it."""

import asyncio
import math
import threading

import pytest
import tenacity
from tenacity import (
    retry_all,
    retry_always,
    retry_any,
    retry_if_exception,
    retry_if_exception_cause_type,
    retry_if_exception_message,
    retry_if_exception_type,
    retry_if_not_exception_message,
    retry_if_not_exception_type,
    retry_if_not_result,
    retry_if_result,
    retry_never,
    retry_unless_exception_type,
    stop_after_attempt,
    stop_after_delay,
    stop_before_delay,
    stop_never,
    stop_when_event_set,
    wait_chain,
    wait_exponential,
    wait_fixed,
    wait_incrementing,
    wait_none,
    wait_random,
    wait_random_exponential,
)

from meshkit import Backoff, ConfigurationError, Pipeline, RateLimitedError, Retry, Scope, listen, retry_end
from meshkit.core.call import Call
from meshkit.core.events import RetryScheduled
from meshkit.core.scope import scope_open


def caused(error, cause):
    error.__cause__ = cause
    return error


def scripted(*outcomes):
    left, seen = list(outcomes), []

    def fn():
        seen.append(1)
        outcome = left.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return fn, seen


async def attempts(sync, clock, outcomes, **options):
    """How many attempts there were, and what came out."""
    fn, seen = scripted(*outcomes)

    async def afn():
        return fn()

    pipeline = Pipeline(
        "prices", Retry(**{**({} if "wait" in options else {"backoff": Backoff(first=0)}), **options}, clock=clock)
    )
    try:
        result = pipeline(fn)() if sync else await pipeline(afn)()
    except Exception as error:
        result = error
    return len(seen), result


BOTH = pytest.mark.parametrize("sync", [False, True], ids=["async", "plain"])
DOWN, GONE = OSError("down for repair"), KeyError("gone")


@BOTH
@pytest.mark.parametrize(
    ("strategy", "outcomes", "expected"),
    [
        (retry_always, ["a", "b", "c"], (3, "c")),
        (retry_never, [DOWN], (1, DOWN)),
        (retry_if_exception(lambda e: "down" in str(e)), [DOWN, GONE], (2, GONE)),
        (retry_if_exception_type(OSError), [DOWN, "ok"], (2, "ok")),
        (retry_if_exception_type(OSError), [GONE], (1, GONE)),
        (retry_if_not_exception_type(KeyError), [DOWN, GONE], (2, GONE)),
        (retry_unless_exception_type(KeyError), ["a", DOWN, GONE], (3, GONE)),
        (retry_if_exception_cause_type(OSError), [caused(ValueError(), DOWN), "ok"], (2, "ok")),
        (retry_if_exception_cause_type(OSError), [GONE], (1, GONE)),
        (retry_if_exception_message(match="down.*"), [DOWN, "ok"], (2, "ok")),
        (retry_if_exception_message(message="down"), [DOWN], (1, DOWN)),
        (retry_if_not_exception_message(match="down.*"), [GONE, DOWN], (2, DOWN)),
        (retry_if_result(lambda r: r is None), [None, None, "ok"], (3, "ok")),
        (retry_if_result(lambda r: r is None), [DOWN], (1, DOWN)),
        (retry_if_not_result(lambda r: r == "ok"), [None, "ok"], (2, "ok")),
        (retry_if_not_result(lambda r: r == "ok"), ["a", "b", "c"], (3, "c")),
        (
            retry_any(retry_if_exception_type(OSError), retry_if_result(lambda r: r is None)),
            [DOWN, None, "ok"],
            (3, "ok"),
        ),
        (retry_if_exception_type(OSError) | retry_if_result(lambda r: r is None), [None, DOWN, "ok"], (3, "ok")),
        (
            retry_all(retry_if_exception_type(OSError), retry_if_exception_message(match="down.*")),
            [DOWN, OSError("up")],
            (2, ...),
        ),
        (retry_if_exception_type(OSError) & retry_if_exception_message(match="up.*"), [DOWN], (1, DOWN)),
        (lambda state: state.attempt_number < 2, ["a", "b"], (2, "b")),
    ],
)
async def test_each_retry_strategy_decides_as_in_tenacity(clock, sync, strategy, outcomes, expected):
    """Attempts and outcome are those that the strategy asks for."""
    count, came_out = expected
    seen, result = await attempts(sync, clock, outcomes, retry=strategy)
    assert count == seen
    assert came_out is ... or came_out == result


async def test_async_retry_strategies_combine_with_plain_ones(clock):
    """`|` and `&` of async and plain strategies, in either order, are awaited."""

    async def none(result):
        await asyncio.sleep(0)
        return result is None

    async def down(error):
        await asyncio.sleep(0)
        return "down" in str(error)

    none_yet = tenacity.asyncio.retry_if_result(none)
    is_down = tenacity.asyncio.retry_if_exception(down)
    type_is_os = retry_if_exception_type(OSError)
    for strategy in (none_yet | type_is_os, type_is_os | none_yet, tenacity.asyncio.retry_any(type_is_os, none_yet)):
        assert (3, "ok") == await attempts(False, clock, [None, DOWN, "ok"], retry=strategy)
    for strategy in (is_down & type_is_os, type_is_os & is_down, tenacity.asyncio.retry_all(is_down, type_is_os)):
        assert (2, GONE) == await attempts(False, clock, [DOWN, GONE], retry=strategy)


async def test_async_waits_and_stops_are_awaited(clock):
    """A wait and a stop may be coroutine functions, as tenacity's AsyncRetrying takes them."""

    async def wait(state):
        await asyncio.sleep(0)
        return 2.0 * state.attempt_number

    async def stop(state):
        await asyncio.sleep(0)
        return state.attempt_number >= 3

    seen, result = await attempts(False, clock, [DOWN, DOWN, DOWN], wait=wait, stop=stop)
    assert (3, DOWN) == (seen, result)
    assert [2.0, 4.0] == clock.sleeps


@pytest.mark.parametrize("part", ["retry", "wait", "stop"])
def test_a_plain_function_refuses_what_it_would_have_to_await(clock, part):
    """An async strategy in a plain function is a configuration error that keeps the call's own error."""

    async def strategy(state):
        await asyncio.sleep(0)
        return 1

    def fails():
        raise DOWN

    with pytest.raises(ConfigurationError, match="async tenacity strategy") as caught:
        Pipeline("prices", Retry(**{part: strategy}, clock=clock))(fails)()
    assert caught.value.__context__ is DOWN


@BOTH
@pytest.mark.parametrize(
    ("wait", "waited"),
    [
        (wait_fixed(2), [2, 2, 2]),
        (wait_none(), []),
        (wait_incrementing(start=1, increment=2), [1, 3, 5]),
        (wait_exponential(multiplier=1, max=3), [1, 2, 3]),
        (wait_fixed(1) + wait_incrementing(start=0, increment=1), [1, 2, 3]),
        (wait_chain(wait_fixed(1), wait_fixed(5)), [1, 5, 5]),
        (wait_random(2, 2), [2, 2, 2]),
        (lambda state: state.attempt_number / 2, [0.5, 1, 1.5]),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_each_wait_strategy_waits_as_in_tenacity(clock, sync, wait, waited):
    """Waits are the strategy's own, slept on our clock."""
    await attempts(sync, clock, [DOWN, DOWN, DOWN, "ok"], wait=wait, attempts=4)
    assert waited == clock.sleeps


async def test_a_random_exponential_wait_does_not_overflow_late(clock):
    """At attempt 1,100 tenacity's own exponential wait is its `max`."""
    outcomes = [DOWN] * 1_100 + ["ok"]
    options = {"attempts": 2_000, "within": None, "wait": wait_random_exponential(multiplier=1, max=1)}
    assert (1_101, "ok") == await attempts(False, clock, outcomes, **options)
    assert max(clock.sleeps) <= 1.0


@BOTH
@pytest.mark.parametrize(
    ("stop", "count"),
    [
        (stop_after_attempt(2), 2),
        (stop_after_delay(5), 4),
        (stop_before_delay(5), 3),
        (stop_after_delay(5) | stop_after_attempt(2), 2),
        (stop_after_delay(5) & stop_after_attempt(6), 6),
        (lambda state: state.idle_for >= 4, 3),
    ],
)
async def test_each_stop_strategy_stops_on_our_clock(clock, sync, stop, count):
    """With 2 s between attempts, each stops where it would in tenacity, though no time really passes."""
    outcomes = [DOWN] * 10
    seen, result = await attempts(sync, clock, outcomes, stop=stop, wait=wait_fixed(2))
    assert (count, DOWN) == (seen, result)
    assert "attempts" == retry_end(result)


async def test_stop_never_is_still_bounded_in_time(clock):
    """A retry that nothing else ends is over within a minute."""
    seen, result = await attempts(False, clock, [DOWN] * 1_000, stop=stop_never, wait=wait_fixed(1))
    assert (60, "deadline") == (seen, retry_end(result))


async def test_an_event_stops_it(clock):
    """`stop_when_event_set` is asked after each attempt."""
    event = threading.Event()

    @Pipeline("prices", Retry(stop=stop_when_event_set(event), wait=wait_none(), clock=clock))
    async def fetch():
        seen.append(1)
        if len(seen) == 4:
            event.set()
        raise OSError

    seen = []
    with pytest.raises(OSError):
        await fetch()
    assert 4 == len(seen)


async def test_a_retry_that_never_waits_lets_others_run(clock):
    """Even a loop without end and without waits gives way now and then, so it can be cancelled."""

    retry = Retry(stop=stop_never, wait=wait_none(), within=None, clock=clock)

    @Pipeline("prices", retry)
    async def fetch():
        raise OSError

    async def loop():
        async for attempt in retry.context("prices"):
            with attempt:
                raise OSError

    for endless in (fetch, loop):
        task = asyncio.ensure_future(endless())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_strategies_see_one_state_of_the_call(clock):
    """All three are asked with the same `RetryCallState`: function, arguments, attempt, outcome, times, the wait."""
    seen = []

    def look(what, answer):
        def asked(state):
            outcome = state.outcome.exception() if state.outcome.failed else state.outcome.result()
            seen.append(
                (what, id(state), state.attempt_number, outcome, state.seconds_since_start, state.upcoming_sleep)
            )
            assert (fetch, (1,), {"b": 2}) == (state.fn, state.args, state.kwargs)
            return answer

        return asked

    async def fetch(a, b):
        clock.block(1.0)
        if len(seen) < 3:
            raise DOWN
        return "ok"

    retry = Retry(
        retry=look("retry", True), wait=look("wait", 2.0), stop=lambda s: look("stop", len(seen) > 3)(s), clock=clock
    )
    assert "ok" == await Pipeline("prices", retry).call(fetch, 1, b=2)
    assert 1 == len({entry[1] for entry in seen})
    assert [
        ("retry", 1, DOWN, 1.0, 0.0),
        ("wait", 1, DOWN, 1.0, 0.0),
        ("stop", 1, DOWN, 1.0, 2.0),
        ("retry", 2, "ok", 4.0, 2.0),
        ("wait", 2, "ok", 4.0, 2.0),
        ("stop", 2, "ok", 4.0, 2.0),
    ] == [(what, *rest) for what, _, *rest in seen]


async def test_a_stop_sees_the_wait_that_the_server_asks_for(clock):
    """`stop_before_delay` counts `Retry-After`, not only the wait strategy."""

    class Busy(Exception):
        retry_after = 30.0

    seen, result = await attempts(False, clock, [Busy(), "ok"], stop=stop_before_delay(10), wait=wait_fixed(1))
    assert (1, "attempts") == (seen, retry_end(result))


@pytest.mark.parametrize(
    "strategy",
    [
        retry_if_exception(lambda error: True),
        retry_if_not_exception_type(ValueError),
        retry_if_exception_type(BaseException),
        retry_always,
    ],
    ids=["any error", "not a type", "BaseException", "always"],
)
@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
async def test_no_predicate_sees_a_cancellation_or_an_exit(clock, strategy, error):
    """tenacity retries a cancelled call where a predicate is wide (its issue 529): here the cancellation comes out."""

    @Pipeline("prices", Retry(retry=strategy, clock=clock))
    async def fetch():
        seen.append(1)
        raise error

    seen = []
    coroutine = fetch()
    with pytest.raises(error):
        # By hand: a loop would end with the exits.
        coroutine.send(None)
    assert [1] == seen


async def test_no_predicate_overrules_a_refusal(clock):
    """`retry_always` does not retry what a policy refused to start."""
    seen, result = await attempts(False, clock, [RateLimitedError(), "ok"], retry=retry_always)
    assert (1, "rejected") == (seen, retry_end(result))
    assert (2, "ok") == await attempts(False, clock, [RateLimitedError(), "ok"], retry=retry_never, patient=True)


async def test_concurrent_calls_share_no_state(clock):
    """Calls at once through one Retry with tenacity's objects keep their own attempt numbers, where tenacity's own
    `async for` loses failures: as tenacity's `test_attempt_number_is_correct_for_interleaved_coroutines`."""
    numbers = {}

    def stop(state):
        numbers.setdefault(state.args[0], []).append(state.attempt_number)
        return state.attempt_number >= 4

    @Pipeline("prices", Retry(retry=retry_if_exception_type(OSError), wait=wait_none(), stop=stop, clock=clock))
    async def fetch(name, failures):
        await asyncio.sleep(0)
        calls[name] = calls.get(name, 0) + 1
        if calls[name] <= failures:
            raise OSError
        return calls[name]

    calls = {}
    assert [1, 2, 3, 4] == await asyncio.gather(*(fetch(n, n) for n in range(4)))
    assert {1: [1], 2: [1, 2], 3: [1, 2, 3]} == numbers


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"stop": stop_after_attempt}, r"^MK100  stop is .* Write attempts=3, or stop=stop_after_attempt\(3\)\."),
        ({"stop": 5}, r"^MK100  stop is .*, not 5\. Write attempts=3"),
        ({"wait": wait_fixed}, r"^MK100  wait is .* Write backoff=Backoff\(first=1\.0\), or wait=wait_fixed\(1\.0\)\."),
        ({"wait": 1.0}, r"^MK100  wait is .*, not 1\.0\. Write backoff="),
        ({"wait": lambda: 3}, "^MK100  wait is called with the state of the retry"),
        ({"stop": lambda: True}, "^MK100  stop is called with the state of the retry"),
        ({"retry": lambda state, more: True}, "^MK100  retry is called with the state of the retry"),
        ({"retry": 3}, "^MK100  retry is"),
        ({"retry": OSError}, r"^MK100  retry is .*\. Write on=OSError, or retry=retry_if_exception_type\(OSError\)\."),
        ({"retry": retry_always, "on_result": bool}, "Give one"),
        ({"retry": retry_always, "on": OSError}, "Give one"),
        ({"wait": wait_none(), "backoff": Backoff(first=1)}, "Give one"),
        ({"wait": wait_none(), "backoff": Backoff()}, "Give one"),
        ({"stop": stop_never, "attempts": 5}, "Give one"),
        ({"stop": stop_never, "attempts": 3}, "Give one"),
    ],
    ids=[
        "a class as stop",
        "a number as stop",
        "a class as wait",
        "a number as wait",
        "wait of nothing",
        "stop of nothing",
        "retry of two",
        "a number as retry",
        "an error as retry",
        "retry and on_result",
        "retry and on",
        "wait and backoff",
        "wait and the default backoff",
        "stop and attempts",
        "stop and the default attempts",
    ],
)
def test_a_strategy_that_cannot_work_says_what_would_be_right(wrong, said):
    """A class instead of its object, a function that cannot be asked, or two ways of saying the same thing (also where
    one of them says what holds anyway) are refused when the policy is made."""
    with pytest.raises(ConfigurationError, match=said):
        Retry(**wrong)


async def test_a_deadline_goes_before_a_stop_that_would_go_on(clock):
    """tenacity knows no deadline: ours holds beside any of its strategies."""
    with scope_open(Scope(deadline=clock.now() + 3.0)):
        seen, result = await attempts(False, clock, [DOWN] * 9, stop=stop_never, wait=wait_fixed(1))
    assert (3, "deadline") == (seen, retry_end(result))


@BOTH
@pytest.mark.parametrize("fails", [1, 2])
async def test_a_predicate_that_fails_leaves_no_result_open(clock, sync, fails):
    """Where a strategy raises over a result, the result is disposed of: nobody will get it. An error stays as it is."""
    closed, answers = [], ["body", "body"]

    async def discard(result):
        closed.append(result)

    def send(call):
        return answers[call.attempt - 1]

    async def asend(call):
        return send(call)

    def broken(state):
        if state.attempt_number == fails:
            raise ZeroDivisionError
        return True

    call, retry = Call("prices", discard=discard), Retry(retry=broken, clock=clock)
    with pytest.raises(ZeroDivisionError):
        _ = retry.run_sync(call, send) if sync else await retry.run(call, asend)
    assert ["body"] * fails == closed


@pytest.mark.parametrize("wait", [-1.0, float("nan")], ids=["negative", "no number"])
async def test_a_wait_strategy_out_of_its_mind_is_no_wait(clock, wait):
    """A wait below nothing, or that is no number, is none, and is told as none."""
    heard = []
    stop = listen(heard.append, kind=RetryScheduled)
    try:
        assert (2, "ok") == await attempts(False, clock, [DOWN, "ok"], wait=lambda state: wait)
    finally:
        stop()
    assert [0.0] == [event.delay for event in heard]
    assert [] == clock.sleeps


@pytest.mark.parametrize(
    ("stop", "described"),
    [
        (stop_after_attempt(4), (4, 0.7)),
        (stop_after_attempt(0), (1, 0.0)),
        (stop_never, (math.inf, None)),
        (stop_after_delay(5), (None, None)),
        (stop_after_attempt(4) | stop_after_delay(5), (None, None)),
    ],
)
def test_a_stop_is_described_as_far_as_it_tells(stop, described):
    """How many attempts there are, and how long they wait, is said where the strategy says it."""
    said = Retry(stop=stop).describe()
    assert described == (said["attempts"], None if said["waits"] is None else round(said["waits"], 6))
