"""What a circuit breaker can be put around, and what its refusals and options are."""

import asyncio
import copy
import gc
import inspect
import pickle
import tracemalloc

import pybreaker
import pytest

from meshkit import (
    BulkheadFullError,
    CircuitBreaker,
    CircuitOpenError,
    ConfigurationError,
    DeadlineExceededError,
    Pipeline,
    RejectedError,
    Scope,
)
from meshkit.core.call import Call, Judgement, Outcome
from meshkit.core.scope import scope_open

BOOLS = ("shadow", "heed_retry_after", "half_open_by_timer")


def make(clock, **options):
    return CircuitBreaker("payments", **{"min_calls": 4, "window": 10, "open_for": 10.0, "clock": clock, **options})


def fail(breaker, times=1):
    for _ in range(times):
        with pytest.raises(ConnectionError), breaker.calling():
            raise ConnectionError("no")


@pytest.fixture(autouse=True)
def no_rule_fails(caplog):
    """What counts as nothing does so by a rule, and not because the rule has failed."""
    yield
    assert [] == [record for record in caplog.get_records("call") if "the rule of circuit" in record.getMessage()]


def half_opened(clock, **options):
    breaker = make(clock, **options)
    fail(breaker, breaker.min_calls)
    clock.block(10)
    return breaker


# -- blocks -----------------------------------------------------------------------------------------------------------


async def test_a_block_counts_as_a_call(clock):
    """`with` and `async with` alike: left normally it is a success, by an error a failure, and the error comes out."""
    breaker = make(clock)
    with breaker.calling():
        pass
    async with breaker.calling():
        pass
    with pytest.raises(ConnectionError), breaker.calling():
        raise ConnectionError
    with pytest.raises(ConnectionError):
        async with breaker.calling():
            raise ConnectionError
    assert {"success": 2, "failure": 2, "ignored": 0, "rejected": 0, "shadowed": 0} == breaker.counts
    assert "open" == breaker.state


async def test_a_block_is_not_entered_while_open(clock):
    """Both kinds of `with` refuse on entering."""
    breaker = make(clock)
    breaker.isolate()
    with pytest.raises(CircuitOpenError):
        async with breaker.calling():
            raise AssertionError("entered")
    with pytest.raises(CircuitOpenError), breaker.calling():
        raise AssertionError("entered")
    assert 2 == breaker.counts["rejected"]


async def test_a_block_can_be_used_once(clock):
    """`calling()` is for one `with`: a second use is refused, in and after the first."""
    breaker = make(clock)
    calling = breaker.calling()
    with calling as entered:
        assert entered is calling
        with pytest.raises(RuntimeError, match=r"calling\(\) is for one block"):
            calling.__enter__()
    with pytest.raises(RuntimeError, match="ask the breaker for another one"):
        async with calling:
            raise AssertionError("entered")
    assert 1 == breaker.counts["success"]


async def test_a_refused_block_may_try_again(clock):
    """What was refused has not been used."""
    breaker = make(clock)
    breaker.force_open()
    calling = breaker.calling()
    with pytest.raises(CircuitOpenError):
        calling.__enter__()
    clock.block(10)
    async with calling as entered:
        assert entered is calling
    assert "closed" == breaker.state


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_exits_are_no_failures(clock, error):
    """What is no `Exception` comes out as it is and counts as nothing (pybreaker makes it a CircuitBreakerError: finding
    O)."""
    breaker = half_opened(clock)

    @breaker
    def leaving():
        raise error

    for _ in range(3):
        with pytest.raises(error), breaker.calling():
            raise error
        with pytest.raises(error):
            leaving()
        with pytest.raises(error):
            Pipeline("payments", breaker).call_sync(leaving.__wrapped__)
    assert ("half_open", 9) == (breaker.state, breaker.counts["ignored"])


# -- functions --------------------------------------------------------------------------------------------------------


async def test_a_guarded_function_stays_what_it_was(clock):
    """Name, arguments and kind are kept, for plain and async functions and async generators."""
    breaker = make(clock)

    @breaker
    def plain(a, *, b):
        """Plain."""
        return a, b

    @breaker
    async def later(a, *, b):
        return a, b

    @breaker
    async def items(a, *, b):
        yield a
        yield b

    assert ((1, 2), (1, 2), [1, 2]) == (plain(1, b=2), await later(1, b=2), [item async for item in items(1, b=2)])
    assert ("plain", "Plain.", "later") == (plain.__name__, plain.__doc__, later.__name__)
    assert inspect.iscoroutinefunction(later)
    assert not inspect.iscoroutinefunction(plain)
    assert 3 == breaker.counts["success"]


@pytest.mark.parametrize("late", [True, False])
async def test_what_is_called_through_it_is_handed_on(clock, late):
    """`run` and `run_sync` return what the call returns, in closed and in half-open."""
    for breaker in (make(clock), half_opened(clock, probes=2)):
        call = Call("payments", late=late)
        assert "answer" == breaker.run_sync(call, lambda _: "answer")
        call.end(Outcome("answer"))
        call = Call("payments", late=late)
        assert "answer" == await breaker.run(call, lambda _: asyncio.sleep(0, "answer"))
        call.end(Outcome("answer"))
        assert (2, "closed") == (breaker.counts["success"], breaker.state)


@pytest.mark.parametrize("state", ["closed", "half_open"])
async def test_a_plain_function_that_returns_a_coroutine_is_refused(clock, state):
    """It has not run, so it is no success: the error says what to do, the place is back, and nothing is left unawaited
    (pybreaker counts it as a success: finding A)."""
    breaker = make(clock) if state == "closed" else half_opened(clock)

    async def later():
        raise AssertionError("never run")

    for guarded in (breaker(lambda: later()), lambda: Pipeline("payments", breaker).call_sync(lambda: later())):
        with pytest.raises(ConfigurationError, match="Make it `async def`"):
            guarded()
    gc.collect()
    assert (state, 2, 0) == (breaker.state, breaker.counts["ignored"], breaker.counts["success"])


async def test_a_rejected_plain_function_is_not_called(clock):
    """While open, no guarded function runs, whatever its kind."""
    breaker = make(clock)
    breaker.force_open()

    def never():
        raise AssertionError("called")

    with pytest.raises(CircuitOpenError):
        breaker(never)()
    with pytest.raises(CircuitOpenError):
        Pipeline("payments", breaker).call_sync(never)


# -- async generators -------------------------------------------------------------------------------------------------


async def _three(error=None):
    yield 1
    yield 2
    if error is not None:
        raise error
    yield 3


async def test_a_stream_is_judged_at_its_end(clock):
    """A probe that hands out items has shown nothing until its last one (pybreaker judges when it is made: finding Q)."""
    breaker = half_opened(clock)
    stream = breaker(_three)()
    async for item in stream:
        assert ("half_open", None) == (breaker.state, breaker.retry_after), item
    assert "closed" == breaker.state


async def test_a_stream_that_breaks_is_a_failure(clock):
    """Three items and then an error: it failed."""
    breaker = half_opened(clock)
    stream = breaker(_three)(ConnectionError("reset by peer"))
    assert (1, 2) == (await anext(stream), await anext(stream))
    with pytest.raises(ConnectionError):
        await anext(stream)
    assert "open" == breaker.state


async def test_a_stream_that_stalls_is_found_out(clock):
    """One that hands out no more items holds its place for `probe_for`, then the circuit opens again."""
    breaker = half_opened(clock, probe_for=30.0)
    stream = breaker(_three)()
    assert 1 == await anext(stream)
    clock.block(30)
    with pytest.raises(CircuitOpenError) as caught:
        breaker.calling().__enter__()
    assert "open" == caught.value.state
    assert [2, 3] == [item async for item in stream]
    assert ("open", 10.0) == (breaker.state, breaker.retry_after)


async def test_a_stream_that_is_closed_early_was_good(clock):
    """Whoever has had enough of it says nothing against it; the place is released at the close."""
    breaker = half_opened(clock)
    stream = breaker(_three)()
    assert 1 == await anext(stream)
    assert breaker.retry_after is None
    await stream.aclose()
    assert "closed" == breaker.state


async def test_a_stream_that_is_dropped_half_read_releases_its_place(clock):
    """Nobody has it any more: its place is free as soon as the loop has had a turn."""
    breaker = half_opened(clock)
    stream = breaker(_three)()
    assert 1 == await anext(stream)
    del stream
    gc.collect()
    for _ in range(3):
        await asyncio.sleep(0)
    assert ("closed", 0.0) == (breaker.state, breaker.retry_after)


async def test_a_stream_that_is_cancelled_counts_as_nothing(clock):
    """Its reader is cancelled between two items: the place is back, and the next stream is the probe."""
    breaker = half_opened(clock)

    @breaker
    async def waiting():
        yield 1
        await asyncio.Event().wait()

    async def read():
        async for _ in waiting():
            pass

    reader = asyncio.create_task(read())
    await asyncio.sleep(0)
    assert breaker.retry_after is None
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert ("half_open", 0.0, 1) == (breaker.state, breaker.retry_after, breaker.counts["ignored"])
    assert [1, 2, 3] == [item async for item in breaker(_three)()]
    assert "closed" == breaker.state


async def test_a_stream_is_refused_at_its_first_item(clock):
    """Making one takes nothing; reading it asks the breaker, and while open the generator does not begin."""
    breaker = half_opened(clock)
    unread = breaker(_three)()
    assert 0.0 == breaker.retry_after
    breaker.force_open()
    with pytest.raises(CircuitOpenError):
        await anext(unread)
    await unread.aclose()
    assert 1 == breaker.counts["rejected"]


# -- what is a failure ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RejectedError("no", policy="other"),
        BulkheadFullError("full", policy="other"),
        CircuitOpenError(policy="other", retry_after=1.0),
        ConfigurationError("wrong"),
        DeadlineExceededError("no time was left", seconds=0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_refusals_further_inside_count_as_nothing(clock, error):
    """A call that was never started says nothing of what it would have called, in closed and in half-open."""
    breaker = make(clock)
    for _ in range(10):
        with pytest.raises(type(error)), breaker.calling():
            raise error
    assert ("closed", 0, 10) == (breaker.state, breaker.snapshot().calls, breaker.counts["ignored"])
    breaker = half_opened(clock)
    with pytest.raises(type(error)), breaker.calling():
        raise error
    assert ("half_open", 0.0) == (breaker.state, breaker.retry_after)


def test_a_deadline_that_passed_during_the_call_is_a_failure(clock):
    """There was time, and it was used up."""
    breaker = make(clock, min_calls=1)
    with pytest.raises(DeadlineExceededError), breaker.calling():
        raise DeadlineExceededError("too long", seconds=5.0)
    assert "open" == breaker.state


def test_the_rule_is_asked_of_refusals_too(clock):
    """Where the user gives the rule, it alone decides, but of what is ignored and of cancellations."""
    asked = []
    breaker = make(clock, failed=lambda outcome: asked.append(outcome.error) or True, ignore=KeyError)
    refusal = BulkheadFullError("full", policy="other")
    for error in (refusal, KeyError("x"), asyncio.CancelledError()):
        with pytest.raises(type(error)), breaker.calling():
            raise error
    assert [refusal] == asked
    assert (1, 2) == (breaker.counts["failure"], breaker.counts["ignored"])


class Edge:
    """Calls as an edge makes them: with a judgement of its own."""

    def __init__(self, breaker, judgement):
        self._breaker = breaker
        self._judge = lambda outcome: judgement

    async def call(self, result="answer", error=None, *, late=True):
        call = Call("payments", judge=self._judge, late=late)

        async def send(_):
            if error is not None:
                raise error
            return result

        try:
            outcome = Outcome(await self._breaker.run(call, send))
        except BaseException as raised:
            outcome = Outcome(error=raised)
        call.end(outcome)

    def call_sync(self, result="answer", error=None, *, late=True):
        call = Call("payments", judge=self._judge, late=late)

        def send(_):
            if error is not None:
                raise error
            return result

        try:
            outcome = Outcome(self._breaker.run_sync(call, send))
        except BaseException as raised:
            outcome = Outcome(error=raised)
        call.end(outcome)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("plain", [True, False])
async def test_an_edge_judges_results_and_errors(clock, late, plain):
    """Its word counts for an answer as well as for an error, and its `retry_after` is heeded."""
    breaker = make(clock, min_calls=2)

    async def once(judgement, **came):
        edge = Edge(breaker, judgement)
        edge.call_sync(late=late, **came) if plain else await edge.call(late=late, **came)

    await once(Judgement(breaker="success"), error=ConnectionError("not its fault"))
    await once(Judgement(breaker="neutral"))
    assert (1, 0, 1) == tuple(breaker.counts[key] for key in ("success", "failure", "ignored"))
    await once(Judgement(breaker="failure", retry_after=40.0))
    assert ("open", 40.0) == (breaker.state, breaker.retry_after)


@pytest.mark.parametrize("late", [True, False])
async def test_the_users_rule_goes_before_the_edge_whose_retry_after_is_still_heeded(clock, late):
    """`failed` says what a failure is; how long to wait, the answer says."""
    breaker = make(clock, min_calls=1, failed=lambda outcome: outcome.result == "busy")
    await Edge(breaker, Judgement(breaker="failure", retry_after=40.0)).call("fine", late=late)
    assert "closed" == breaker.state
    await Edge(breaker, Judgement(breaker="success", retry_after=40.0)).call("busy", late=late)
    assert ("open", 40.0) == (breaker.state, breaker.retry_after)


class Busy(Exception):
    retry_after = 20.0


async def test_the_error_itself_goes_before_the_edge(clock):
    """An error with a `retry_after` of its own, which the user's rule calls a failure, is asked first."""
    breaker = make(clock, min_calls=1, failed=lambda outcome: True)
    await Edge(breaker, Judgement(retry_after=40.0)).call(error=Busy())
    assert 20.0 == breaker.retry_after


async def test_a_late_end_is_judged_by_what_it_came_to(clock):
    """An edge's answer is there and its body breaks off: the call failed, and only then."""
    breaker = half_opened(clock, slow_after=5.0)
    call = Call("payments")
    assert "head" == await breaker.run(call, lambda _: asyncio.sleep(0, "head"))
    assert breaker.retry_after is None
    call.end(Outcome(error=ConnectionError("body")))
    assert "open" == breaker.state


async def test_the_request_hears_of_each_way_to_open(clock):
    """A failure while the circuit is open or opening leaves in the Scope for how long it is; one in shadow mode, isolated
    or with nothing opened does not."""

    def heard(breaker):
        with scope_open(Scope()) as scope:
            fail(breaker)
        return scope.opened

    breaker = make(clock)
    fail(breaker, 3)
    late = breaker.calling()
    late.__enter__()
    assert 10.0 == heard(breaker)
    clock.block(4)
    with scope_open(Scope()) as scope:
        error = ConnectionError("late")
        late.__exit__(type(error), error, None)
    assert 6.0 == scope.opened
    assert heard(half_opened(clock)) == 10.0
    assert heard(make(clock)) is None
    shadowed = make(clock, shadow=True)
    fail(shadowed, 3)
    assert heard(shadowed) is None
    disabled = make(clock)
    fail(disabled, 4)
    disabled.disable()
    assert heard(disabled) is None


async def test_the_request_of_a_late_end_is_the_one_that_called(clock):
    """A body that breaks off after its request has ended is told to the Scope in which the call was made."""
    breaker = make(clock, min_calls=1)
    call = Call("payments")
    with scope_open(Scope()) as scope:
        await breaker.run(call, lambda _: asyncio.sleep(0))
    with scope_open(Scope()) as other:
        call.end(Outcome(error=ConnectionError("body")))
    assert (10.0, None) == (scope.opened, other.opened)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["open", "half_open", "isolated"])
@pytest.mark.parametrize("form", ["decorated", "pipeline"])
async def test_10000_rejections_grow_nothing(clock, state, form):
    """Neither a traceback nor memory: each is an error of its own, as Polly's
    `OnActionPreExecute_CircuitOpened_EnsureExceptionStackTraceDoesNotGrow`; purgatory raises one for ever."""
    breaker = half_opened(clock)
    if state == "half_open":
        breaker.calling().__enter__()
    elif state == "open":
        breaker.force_open()
    else:
        breaker.isolate()

    async def never():
        raise AssertionError("called")

    pipeline = Pipeline("payments", breaker)
    guarded = breaker(never) if form == "decorated" else lambda: pipeline.call(never)

    async def reject(times):
        depths = set()
        for _ in range(times):
            try:
                await guarded()
            except CircuitOpenError as error:
                depth, traceback = 0, error.__traceback__
                while traceback is not None:
                    depth, traceback = depth + 1, traceback.tb_next
                depths.add(depth)
        return depths

    (first,) = await reject(100)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        depths = await reject(10_000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {first} == depths
    assert after - before < 20_000
    assert 10_100 == breaker.counts["rejected"]


@pytest.mark.parametrize(
    ("left", "state", "text"),
    [
        (3.0, "open", "MK501  circuit 'payments' is open; it lets a probe through in 3 s."),
        (0.123456, "open", "MK501  circuit 'payments' is open; it lets a probe through in 0.123 s."),
        (None, "half_open", "MK501  circuit 'payments' is half-open."),
        (None, "isolated", "MK501  circuit 'payments' is isolated."),
    ],
)
def test_a_rejection_says_what_it_knows_however_it_travels(left, state, text):
    """Copied, pickled or raised anew, it is a pybreaker error and a RejectedError with name, wait and state."""
    error = CircuitOpenError(policy="payments", retry_after=left, state=state)
    error.add_note("seen in worker 3")
    for each in (error, copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert (text, "payments", left, state) == (str(each), each.policy, each.retry_after, each.state)
        assert (CircuitOpenError, "MK501", ["seen in worker 3"]) == (type(each), each.code, each.__notes__)
        assert isinstance(each, RejectedError)
        assert isinstance(each, pybreaker.CircuitBreakerError)
        assert ("", "") == (each.cause, each.remedy)


def test_a_rejection_of_which_no_state_is_said_is_of_an_open_circuit():
    """What a test or a fake raises needs no more than name and wait."""
    assert "open" == CircuitOpenError(policy="payments", retry_after=1.0).state


def test_a_rejection_of_a_guarded_function_is_the_same_error(clock):
    """The fast path of a guarded function and the slow one raise errors that nobody can tell apart."""
    breaker = make(clock)
    breaker.force_open()
    errors = []
    for refuse in (breaker(lambda: None), lambda: breaker.calling().__enter__()):
        with pytest.raises(CircuitOpenError) as caught:
            refuse()
        errors.append(pickle.loads(pickle.dumps(caught.value)))
    assert errors[0].args == errors[1].args == ("payments", 10.0, "open")
    assert vars(errors[0]) == vars(errors[1])


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"failure_rate": 0}, "failure_rate is a share of calls, above 0 up to 1, not 0."),
        ({"failure_rate": 1.01}, "failure_rate is a share of calls, above 0 up to 1, not 1.01."),
        ({"failure_rate": float("nan")}, "failure_rate is a share"),
        ({"slow_after": 1.0, "slow_rate": 0}, "slow_rate is a share of calls"),
        ({"slow_after": 1.0, "slow_rate": 1.5}, "slow_rate is a share of calls"),
        ({"slow_rate": 0.5}, "slow_rate needs slow_after"),
        ({"slow_after": 0}, "slow_after is what a slow call takes at least, in seconds above 0, not 0."),
        ({"slow_after": float("inf")}, "slow_after is what"),
        ({"window": 10, "window_for": 60.0}, "a breaker has one window. Give one of them."),
        ({"window": 0, "min_calls": 1}, "window is how many calls are judged, so a whole number from 1 on, not 0."),
        ({"window": 9.5, "min_calls": 1}, "window is how many calls are judged"),
        ({"window": 10, "min_calls": 11}, "min_calls is how many calls of the window are needed, so 1 to 10, not 11."),
        ({"window": 10, "min_calls": 0}, "so 1 to 10, not 0."),
        ({"window": 10, "min_calls": 2.5}, "so 1 to 10, not 2.5."),
        ({"window": None, "min_calls": 21}, "so 1 to 20, not 21."),
        ({"window": None, "window_for": 0}, "window_for is how far back calls are judged, in seconds above 0, not 0."),
        (
            {"window": None, "window_for": 60, "min_calls": 0},
            "min_calls is how many calls of the window are needed, so a",
        ),
        (
            {"window": None, "window_for": 60, "min_calls": 1.5},
            "min_calls is how many calls of the window are needed, so",
        ),
        ({"open_for": 0}, "open_for is how long the breaker stays open, in seconds above 0, not 0."),
        ({"open_for": -1}, "open_for is how long"),
        ({"open_for": float("inf")}, "open_for is how long"),
        (
            {"open_backoff": 0.9},
            "open_backoff is how many times as long each further opening lasts, so 1 or above, not 0.9.",
        ),
        ({"open_backoff": float("inf")}, "open_backoff is how many times"),
        (
            {"open_at_most": 9.9},
            "open_at_most bounds open_for (10.0 s), so it is a length of time from that on, not 9.9.",
        ),
        ({"open_at_most": float("inf")}, "open_at_most bounds open_for"),
        ({"probes": 0}, "probes is how many calls decide in half-open, so a whole number from 1 on, not 0."),
        ({"probes": 1.5}, "probes is how many"),
        (
            {"probes": 2, "concurrent_probes": 3},
            "concurrent_probes is how many of the probes run at once, so 1 to 2, not 3.",
        ),
        ({"probes": 2, "concurrent_probes": 0}, "so 1 to 2, not 0."),
        ({"probes": 2, "concurrent_probes": 1.5}, "so 1 to 2, not 1.5."),
        ({"probe_for": 0}, "probe_for is how long probes may take, so above 0, not 0."),
        ({"ignore": "KeyError"}, "ignore lists exception classes, and 'KeyError' is none."),
        ({"ignore": (KeyError, BaseException)}, "Cancellation and exits (BaseException) count as nothing anyway."),
        ({"ignore": KeyError("x")}, "ignore lists exception classes"),
        ({"failed": True}, "failed is a function of the outcome, not True."),
        *(
            ({name: wrong}, f"not {wrong!r}.")
            for name in ("failure_rate", "open_for", "open_backoff", "probe_for", "slow_after", "probes", "min_calls")
            for wrong in ("5", [])
        ),
        *(({name: None}, "not None.") for name in ("failure_rate", "open_for", "open_backoff", "probe_for", "probes")),
        ({"open_at_most": "20"}, "from that on, not '20'."),
        ({"window": None, "window_for": "60"}, "in seconds above 0, not '60'."),
        *(({name: wrong}, f"{name} is True or False, not {wrong!r}.") for name in BOOLS for wrong in ("no", 1, None)),
        ({"failure_rate": True}, "not True."),
        ({"listeners": 3}, "listeners are objects of classes made from pybreaker.CircuitBreakerListener, not 3."),
        ({"listeners": [pybreaker.CircuitBreakerListener]}, "listeners are objects of classes"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_with_what_would_be_right(clock, wrong, says):
    """A value that cannot work, or that does not go with another one, is refused when the breaker is made."""
    with pytest.raises(ConfigurationError) as caught:
        make(clock, **wrong)
    code, option, *_ = str(caught.value).split()
    assert code == "MK100"
    assert option in wrong
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "right",
    [
        {"failure_rate": 1.0},
        {"failure_rate": 1e-9},
        {"slow_after": 1e-9, "slow_rate": 1.0},
        {"slow_after": 1.0, "slow_rate": 0.001},
        {"window": 1, "min_calls": 1},
        {"window": 10, "min_calls": 10},
        {"window": None, "window_for": 0.5, "min_calls": 1000},
        {"open_for": 0.001},
        {"open_at_most": 10.0},
        {"open_backoff": 1},
        {"probes": 2, "concurrent_probes": 2},
        {"probes": 2, "concurrent_probes": 1},
        {"probe_for": float("inf")},
        {"probe_for": 1e-9},
        {"ignore": ()},
        {"ignore": [KeyError][0]},
    ],
    ids=str,
)
def test_the_edges_of_what_is_allowed(clock, right):
    """The last value that makes sense is allowed."""
    assert "closed" == make(clock, **right).state


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan")])
def test_force_open_refuses_what_is_no_time(clock, seconds):
    """And leaves the breaker as it was."""
    breaker = make(clock)
    with pytest.raises(ConfigurationError, match=r"^MK100  seconds is how long calls are rejected, in seconds above 0"):
        breaker.force_open(seconds)
    assert "closed" == breaker.state


def test_a_misspelt_option_is_refused():
    """As any keyword that a function does not have."""
    with pytest.raises(TypeError, match="failure_ratio"):
        CircuitBreaker("payments", failure_ratio=0.5)


def test_the_defaults_are_those_of_the_docstring(clock):
    """Ten calls of the last twenty, half of them failed; 15 seconds; one probe, for a minute."""
    breaker = CircuitBreaker("payments", clock=clock)
    for _ in range(12):
        with breaker.calling():
            pass
    fail(breaker, 9)
    assert ("closed", 20, 9) == (breaker.state, breaker.snapshot().calls, breaker.snapshot().failures)
    fail(breaker, 1)
    assert ("open", 15.0) == (breaker.state, breaker.retry_after)
    clock.block(15)
    breaker.calling().__enter__()
    clock.block(59.9)
    assert "half_open" == refused(breaker).state
    clock.block(0.1)
    assert "open" == refused(breaker).state


def refused(breaker):
    with pytest.raises(CircuitOpenError) as caught:
        breaker.calling().__enter__()
    return caught.value


@pytest.mark.parametrize("name", ["", None, 3, lambda: None], ids=["empty", "none", "number", "function"])
def test_a_breaker_has_a_name(name):
    """A breaker without the name of what it guards is refused; so is the class itself as a decorator."""
    with pytest.raises(ConfigurationError, match="begins with the name of what it guards"):
        CircuitBreaker(name)


def test_a_clock_is_asked_for_the_time():
    """What tells no time is refused."""
    with pytest.raises(ConfigurationError, match="clock is where the time comes from"):
        CircuitBreaker("payments", clock=None)


def test_shadow_is_switched_by_a_truth_value_only(clock):
    """A word that means no, and would be true, is refused."""
    breaker = make(clock)
    with pytest.raises(ConfigurationError, match="shadow is True or False, not 'no'"):
        breaker.shadow = "no"
    assert breaker.shadow is False


async def test_a_rule_is_a_plain_function(clock):
    """A coroutine function as rule is refused: what it returns would always be true."""

    async def rule(outcome):
        return False

    with pytest.raises(ConfigurationError, match="failed is a plain function"):
        make(clock, failed=rule)


def test_a_window_of_no_length_is_refused(clock):
    """Less than a millisecond is no window: ten slices of it would have no length at all."""
    for seconds in (1e-323, 1e-310, 0.0009):
        with pytest.raises(ConfigurationError, match=r"from 0.001 s on"):
            make(clock, window=None, window_for=seconds)


def test_a_block_is_left_once(clock):
    """Leaving a block that was never entered, or leaving it twice, is refused and counts as nothing."""
    breaker = half_opened(clock, probes=2)
    block = breaker.calling()
    with pytest.raises(RuntimeError, match="not entered"):
        block.__exit__(None, None, None)
    with block:
        pass
    with pytest.raises(RuntimeError, match="left already"):
        block.__exit__(None, None, None)
    assert ("half_open", 1) == (breaker.state, breaker.counts["success"])


def test_a_result_that_is_awaitable_and_no_coroutine_is_handed_on(clock):
    """Only a coroutine that was never started is refused: whatever else has send, throw and close is somebody's."""

    class Odd:
        def send(self, value): ...
        def throw(self, *error): ...
        def close(self): ...
        def __await__(self):
            yield

    odd = Odd()
    assert odd is make(clock)(lambda: odd)()
