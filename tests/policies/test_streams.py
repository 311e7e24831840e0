"""A call whose result comes item by item: when it is judged, what it holds, and that all is released at its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import warnings
import weakref

import pytest
from sweep import SteppedLoop, drained

from meshkit import (
    AttemptTimeoutError,
    Backoff,
    Bulkhead,
    CircuitBreaker,
    CircuitOpenError,
    ConfigurationError,
    DeadlineExceededError,
    Fallback,
    Outcome,
    Pipeline,
    Retry,
    Scope,
    Timeout,
    current_attempt,
    current_scope,
    listen,
)
from meshkit.core.events import TimedOut
from meshkit.core.scope import scope_open
from meshkit.testing.clock import ManualClock


@pytest.fixture
def clock():
    return ManualClock(hold=True)


class Place:
    """A policy that holds a place, as a bulkhead does, and keeps what each call came to."""

    def __init__(self):
        self.held = 0
        self.ends = []

    def describe(self):
        return {"kind": "place"}

    async def run(self, call, call_next):
        self.held += 1
        call.on_end(self._over)
        return await call_next(call)

    def _over(self, outcome):
        self.held -= 1
        self.ends.append(outcome)


class Feed:
    """Makes streams of items: one that is an exception is raised, `None` never comes.

    Attributes:
        opened, closed: streams. All that were opened are closed in the end.
    """

    def __init__(self, *streams):
        self._streams = list(streams)
        self.opened = self.closed = 0
        self.attempts = []

    async def __call__(self):
        self.opened += 1
        items = self._streams.pop(0) if len(self._streams) > 1 else self._streams[0]
        try:
            for item in items:
                self.attempts.append(current_attempt())
                await asyncio.sleep(0)
                if item is None:
                    await asyncio.Event().wait()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.closed += 1


def guarded(feed, *policies):
    """`feed` as a function that a pipeline guards."""

    async def prices():
        async with contextlib.aclosing(feed()) as items:
            async for item in items:
                yield item

    return Pipeline("prices", *policies)(prices)


async def turns(number=5):
    for _ in range(number):
        await asyncio.sleep(0)


# -- at its end -------------------------------------------------------------------------------------------------------


async def test_a_stream_holds_its_place_up_to_the_last_item():
    """What a policy holds for a call is held while items come, and let go of with the last one."""
    place, feed = Place(), Feed([1, 2])
    stream = guarded(feed, place)()
    assert (0, 0) == (place.held, feed.opened)
    assert 1 == await anext(stream)
    assert 2 == await anext(stream)
    assert (1, []) == (place.held, place.ends)
    assert [] == await drained(stream)
    assert (0, [Outcome()]) == (place.held, place.ends)
    assert 1 == feed.closed


async def test_an_empty_stream_is_a_call_that_worked():
    """A stream without items ends at once, as a success."""
    place, breaker = Place(), CircuitBreaker("prices")
    assert [] == await drained(guarded(Feed([]), place, breaker)())
    assert (0, [Outcome()]) == (place.held, place.ends)
    assert 1 == breaker.counts["success"]


@pytest.mark.parametrize("items", [[OSError("torn")], [1, 2, OSError("torn")]], ids=["first", "middle"])
async def test_a_stream_that_breaks_is_a_failure(items):
    """Whether with the first item or in the middle: its error comes out, the breaker counts it, the place is free."""
    place, breaker, feed = Place(), CircuitBreaker("prices"), Feed(items)
    stream = guarded(feed, place, breaker)()
    for item in items[:-1]:
        assert item == await anext(stream)
    with pytest.raises(OSError, match="torn") as caught:
        await anext(stream)
    assert (0, [Outcome(error=caught.value)]) == (place.held, place.ends)
    assert (1, 0) == (breaker.counts["failure"], breaker.counts["success"])
    assert 1 == feed.closed


async def test_a_stream_that_was_left_early_is_no_failure():
    """`break` with `aclosing` closes the function's own generator, and the call ends there and then, as a success."""
    place, breaker, feed = Place(), CircuitBreaker("prices"), Feed([1, 2, 3])
    async with contextlib.aclosing(guarded(feed, place, breaker)()) as stream:
        async for _ in stream:
            break
        assert 1 == place.held
    assert (0, [Outcome()], 1) == (place.held, place.ends, feed.closed)
    assert 1 == breaker.counts["success"]


async def test_a_stream_that_is_dropped_half_read_lets_go_when_it_is_collected():
    """Without `aclosing`, `break` leaves a stream to the collector: it gives the place back and closes the generator."""
    place, breaker, feed = Place(), CircuitBreaker("prices"), Feed([1, 2, 3])
    async for _ in guarded(feed, place, breaker)():
        break
    await turns()
    assert (0, [Outcome()], 1) == (place.held, place.ends, feed.closed)
    assert 1 == breaker.counts["success"]


async def test_a_stream_that_nobody_reads_begins_nothing():
    """Made and dropped, or closed, before the first item was asked for: no policy has heard of it."""
    place, feed = Place(), Feed([1])
    stream = guarded(feed, place)()
    await stream.aclose()
    assert [] == await drained(stream)
    del stream
    guarded(feed, place)()
    await turns()
    assert (0, [], 0) == (place.held, place.ends, feed.opened)


async def test_a_stream_that_is_over_stays_over():
    """After its end it yields nothing more, can be closed again, and raises what is thrown into it."""
    place = Place()
    stream = guarded(Feed([1]), place)()
    assert [1] == await drained(stream)
    assert [] == await drained(stream)
    with pytest.raises(StopAsyncIteration):
        await stream.asend(None)
    await stream.aclose()
    with pytest.raises(KeyError):
        await stream.athrow(KeyError("late"))
    assert [Outcome()] == place.ends


async def test_the_order_of_the_end_is_from_the_inside_out():
    """The policy that is innermost lets go first, as with any call."""
    order = []

    class Named(Place):
        def _over(self, outcome):
            super()._over(outcome)
            order.append(self)

    outer, inner = Named(), Named()
    await drained(guarded(Feed([1]), outer, inner)())
    assert [inner, outer] == order


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [[None], [1, None]], ids=["first", "middle"])
@pytest.mark.parametrize(
    ("limit", "error"),
    [({"seconds": 2.0}, AttemptTimeoutError), ({"total": 2.0}, DeadlineExceededError)],
    ids=["attempt", "total"],
)
async def test_a_stream_that_stalls_is_stopped_for_its_time(clock, items, limit, error):
    """Attempt and total reach up to the last item: it raises their error, counts as failed, and leaves no timer."""
    place, breaker, feed = Place(), CircuitBreaker("prices", clock=clock), Feed(items)
    heard = []
    stop = listen(heard.append, kind=TimedOut)
    stream = guarded(feed, place, breaker, Timeout(**limit, clock=clock))
    reader = asyncio.create_task(drained(stream()))
    await turns()
    await clock.advance(2.0)
    stop()
    with pytest.raises(error) as caught:
        await reader
    assert (0, [Outcome(error=caught.value)], 1) == (place.held, place.ends, feed.closed)
    assert (1, 1) == (breaker.counts["failure"], len(heard))
    assert [] == live(clock)


def live(clock):
    """Timers that wait."""
    return [timer for _, _, timer in clock._timers if not timer.cancelled]


@pytest.mark.parametrize("ended", ["to its end", "closed", "dropped", "broken"])
async def test_a_stream_that_ends_in_time_leaves_no_timer(clock, ended):
    """However it ends, the timer goes with it."""
    feed = Feed([1, OSError() if ended == "broken" else 2])
    stream = guarded(feed, Timeout(total=9, clock=clock), Timeout(5, clock=clock))()
    assert 1 == await anext(stream)
    assert live(clock)
    if ended == "closed":
        await stream.aclose()
    elif ended != "dropped":
        with contextlib.suppress(OSError):
            await drained(stream)
    del stream
    await turns()
    assert [] == live(clock)
    assert 1 == feed.closed


async def test_a_reader_that_stalls_is_told_at_its_next_read(clock):
    """Where the time is over while nobody reads, nobody is cancelled; the call is judged and lets go of what it holds
    there and then, and the next read gets the error and closes the generator."""
    place, breaker, feed = Place(), CircuitBreaker("prices", clock=clock), Feed([1, 2])
    stream = guarded(feed, place, breaker, Timeout(2.0, clock=clock))()
    assert 1 == await anext(stream)
    await clock.advance(60.0)
    assert 0 == asyncio.current_task().cancelling()
    assert (0, 0, 1) == (place.held, feed.closed, breaker.counts["failure"])
    with pytest.raises(AttemptTimeoutError):
        await anext(stream)
    assert (0, 1, 1) == (place.held, feed.closed, breaker.counts["failure"])
    assert [] == await drained(stream)


@pytest.mark.parametrize("how", ["closed", "dropped"])
async def test_a_reader_that_has_stalled_and_has_enough_hears_nothing(clock, how):
    """Closed or dropped after its time: nothing is raised, and it was too late all the same."""
    place, breaker, feed = Place(), CircuitBreaker("prices", clock=clock), Feed([1, 2])
    stream = guarded(feed, place, breaker, Timeout(2.0, clock=clock))()
    assert 1 == await anext(stream)
    await clock.advance(2.0)
    if how == "closed":
        await stream.aclose()
    del stream
    await turns()
    assert (0, 1, 1) == (place.held, feed.closed, breaker.counts["failure"])
    assert isinstance(place.ends[0].error, AttemptTimeoutError)


@pytest.mark.parametrize("then", ["raises", "returns", "yields", "waits"])
async def test_a_generator_that_survives_its_time_leaves_no_cancellation_behind(clock, then):
    """Whatever it does with the cancellation, its reader's task is not left with one."""

    async def prices():
        yield 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if then == "raises":
                raise OSError("torn") from None
            if then == "waits":
                await asyncio.sleep(0)
            if then in ("yields", "waits"):
                yield 2

    async def read():
        got = []
        stream = Pipeline("prices", Timeout(2.0, clock=clock))(prices)()
        while not got or isinstance(got[-1], int):
            try:
                got.append(await anext(stream))
            except Exception as error:
                got.append(type(error))
        cancelling = asyncio.current_task().cancelling()
        await asyncio.sleep(0)
        return got, cancelling

    reader = asyncio.create_task(read())
    await turns()
    await clock.advance(2.0)
    expected = {"raises": [1, OSError], "returns": [1, StopAsyncIteration]}.get(then, [1, 2, AttemptTimeoutError])
    assert (expected, 0) == await reader
    assert [] == live(clock)


async def test_a_cancellation_in_the_turn_of_the_timeout_is_a_cancellation(clock):
    """Whoever cancels the reader when the time is over gets CancelledError, once."""
    place = Place()
    reader = asyncio.create_task(drained(guarded(Feed([1, None]), place, Timeout(2.0, clock=clock))()))
    await turns()
    clock.block(2.0)  # the time is over, and nothing else has run yet
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert reader.cancelled()
    assert isinstance(place.ends[0].error, asyncio.CancelledError)


async def test_items_are_read_in_the_scope_and_attempt_of_the_first(clock):
    """What the generator does after its first item has the narrowed deadline and the attempt's number as before."""
    seen = []
    failing = [OSError()]

    async def prices():
        for number in range(3):
            scope = current_scope()
            seen.append((scope.deadline - clock.now(), current_attempt()))
            scope.mark_degraded(f"cache-{number}")
            if failing:
                raise failing.pop()
            yield number

    retry = Retry(on=OSError, backoff=Backoff(first=0), clock=clock)
    pipeline = Pipeline("prices", Timeout(total=30, clock=clock), retry)
    with scope_open(Scope(deadline=clock.now() + 60)) as scope:
        assert [0, 1, 2] == await drained(pipeline(prices)())
        assert scope is current_scope()
    assert [(30, 1), (30, 2), (30, 2), (30, 2)] == seen
    assert ("cache-0", "cache-1", "cache-2") == scope.degraded
    assert 1 == current_attempt()


# -- before the first item --------------------------------------------------------------------------------------------


async def test_a_stream_is_tried_again_before_its_first_item(clock):
    """An attempt that brings no item is over, with all that it held, before the next one begins."""
    place, feed = Place(), Feed([OSError("no")], [1, 2])
    retry = Retry(on=OSError, backoff=Backoff(first=0), clock=clock)
    assert [1, 2] == await drained(guarded(feed, retry, place)())
    assert [1, 2, 2] == feed.attempts
    assert (0, ["no", "None"]) == (place.held, [str(end.error) for end in place.ends])
    assert 2 == feed.closed


async def test_a_stream_is_not_tried_again_after_its_first_item(clock):
    """What was handed out cannot be taken back: the error comes out, no attempt is made, no fallback answers."""
    place, feed = Place(), Feed([1, OSError("torn")])
    policies = Fallback(answer=lambda outcome: Feed([7])()), Retry(on=OSError, clock=clock), place
    stream = guarded(feed, *policies)()
    assert 1 == await anext(stream)
    with pytest.raises(OSError, match="torn"):
        await anext(stream)
    assert (1, 0, []) == (feed.opened, place.held, clock.sleeps)


async def test_a_stream_that_is_turned_down_is_closed(clock):
    """An attempt of which a rule of the user's turns down the beginning is closed before the next one begins."""
    feed = Feed([1, 2], [3])
    asked = iter([True, False])
    retry = Retry(on_result=lambda begun: next(asked), backoff=Backoff(first=0), clock=clock)
    assert [3] == await drained(guarded(feed, retry)())
    assert (2, 2) == (feed.opened, feed.closed)


async def test_a_fallback_answers_with_another_stream():
    """Where there was no first item, its items come instead, and the scope says so."""
    place, breaker = Place(), CircuitBreaker("prices")
    fallback = Fallback(answer=lambda outcome: Feed([7, 8])(), name="kept")
    with scope_open(Scope()) as scope:
        assert [7, 8] == await drained(guarded(Feed([OSError()]), place, fallback, breaker)())
    assert ("kept",) == scope.degraded
    assert (1, 0) == (breaker.counts["failure"], breaker.counts["success"])
    assert (0, [Outcome()]) == (place.held, place.ends)


async def test_what_answers_with_no_stream_is_refused():
    """A fallback that answers with a list is told what it has to be, and nothing is held."""
    place = Place()
    with pytest.raises(ConfigurationError, match=r"stands in for the items of 'prices' is \[7\]"):
        await drained(guarded(Feed([OSError()]), place, Fallback(answer=[7]))())
    assert 0 == place.held


async def test_a_fallback_that_is_no_generator_takes_no_values():
    """An async iterable without `asend` can be read; what it cannot do ends nothing."""

    class Kept:
        def __init__(self):
            self.left = [7, 8]

        def __aiter__(self):
            return self

        async def __anext__(self):
            if not self.left:
                raise StopAsyncIteration
            return self.left.pop(0)

    place = Place()
    stream = guarded(Feed([OSError()]), place, Fallback(answer=lambda outcome: Kept()))()
    assert 7 == await anext(stream)
    with pytest.raises(AttributeError):
        await stream.asend("more")
    with pytest.raises(AttributeError):
        await stream.athrow(KeyError())
    assert (8, 1) == (await anext(stream), place.held)
    await stream.aclose()
    assert 0 == place.held


# -- a breaker's probe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "after"), [([1, 2], "closed"), ([1, OSError()], "open")], ids=["to its end", "broken"]
)
async def test_a_stream_as_a_probe_decides_at_its_end(clock, items, after):
    """A half-open breaker waits for the end of the stream that it probes with, and lets nobody else through."""
    breaker = CircuitBreaker("prices", clock=clock)
    breaker.force_open()
    await clock.advance(breaker.open_for)
    stream = guarded(Feed(items), breaker)()
    assert 1 == await anext(stream)
    assert "half_open" == breaker.state
    with pytest.raises(CircuitOpenError):
        await drained(guarded(Feed([1]), breaker)())
    with contextlib.suppress(OSError):
        await drained(stream)
    assert after == breaker.state


@pytest.mark.parametrize("how", ["reader cancelled", "step closed"])
async def test_a_probe_that_is_cancelled_gives_its_place_back(clock, how):
    """A stream whose reader is cancelled, or goes away in the middle of a read, was no probe."""
    breaker, feed = CircuitBreaker("prices", clock=clock), Feed([1, None])
    breaker.force_open()
    await clock.advance(breaker.open_for)
    stream = guarded(feed, breaker)()
    if how == "reader cancelled":
        reader = asyncio.create_task(drained(stream))
        await turns()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert 1 == feed.closed
    else:
        assert 1 == await anext(stream)
        read = stream.__anext__()
        for _ in range(2):
            read.send(None)
        read.close()
    assert ("half_open", 1) == (breaker.state, breaker.counts["ignored"])
    assert 0 == breaker.retry_after


# -- who reads --------------------------------------------------------------------------------------------------------


async def test_two_readers_at_once_are_refused_and_change_nothing():
    """Whoever reads, closes or throws while another one reads gets RuntimeError; the stream goes on."""
    place, feed = Place(), Feed([1, 2])
    stream = guarded(feed, place)()
    for first in (1, 2):
        reader = asyncio.create_task(anext(stream, "end"))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="being read already"):
            await anext(stream)
        with pytest.raises(RuntimeError, match="being read already"):
            await stream.aclose()
        with pytest.raises(RuntimeError, match="being read already"):
            await stream.athrow(KeyError())
        assert first == await reader
    assert 1 == place.held
    assert [] == await drained(stream)
    assert (0, 1) == (place.held, feed.closed)


async def test_a_stream_may_be_read_by_one_task_after_another(clock):
    """Started in one task and read on in others, it still ends for its time in the one that reads."""
    place = Place()
    stream = guarded(Feed([1, 2, None]), place, Timeout(2.0, clock=clock))()
    for expected in (1, 2):
        assert expected == await asyncio.create_task(anext(stream, "end"))
    reader = asyncio.create_task(anext(stream, "end"))
    await turns()
    await clock.advance(2.0)
    with pytest.raises(AttemptTimeoutError):
        await reader
    assert (0, []) == (place.held, live(clock))


async def test_values_and_errors_go_into_the_generator():
    """`asend` and `athrow` reach the generator; an error that it deals with ends nothing."""
    place = Place()

    async def echo():
        said = yield "first"
        while True:
            try:
                said = yield said
            except KeyError:
                said = "caught"

    stream = Pipeline("echo", place)(echo)()
    with pytest.raises(TypeError, match="just-started"):
        await stream.asend("too early")
    assert "first" == await stream.asend(None)
    assert "hello" == await stream.asend("hello")
    assert "caught" == await stream.athrow(KeyError("x"))
    assert (1, []) == (place.held, place.ends)
    with pytest.raises(OSError, match="out"):
        await stream.athrow(OSError("out"))
    assert (0, "out") == (place.held, str(place.ends[0].error))


async def test_an_error_thrown_before_the_first_item_ends_it():
    """As with a generator: the error comes out, and nothing was begun."""
    place = Place()
    stream = guarded(Feed([1]), place)()
    with pytest.raises(KeyError):
        await stream.athrow(KeyError())
    assert [] == await drained(stream)
    assert [] == place.ends


async def test_a_generator_that_will_not_close_still_ends():
    """One that yields when it is closed gets Python's RuntimeError, and what was held is let go of."""
    place = Place()

    async def prices():
        try:
            yield 1
        except GeneratorExit:
            yield 2

    stream = Pipeline("prices", place)(prices)()
    await anext(stream)
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        await stream.aclose()
    assert 0 == place.held


async def test_a_reader_that_is_cancelled_ends_the_stream():
    """CancelledError goes into the generator and comes out of it; the call counts as nothing."""
    place, breaker, feed = Place(), CircuitBreaker("prices"), Feed([1, None])
    stream = guarded(feed, place, breaker)()
    reader = asyncio.create_task(drained(stream))
    await turns()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert reader.cancelled()
    assert (0, 1) == (place.held, feed.closed)
    assert (0, 0, 1) == tuple(breaker.counts[kind] for kind in ("success", "failure", "ignored"))
    assert [] == await drained(stream)


async def test_a_stream_in_a_timeout_and_in_a_task_group_of_asyncio():
    """asyncio's own timeout raises its own error, and a group whose other task fails cancels the reader."""
    place, feed = Place(), Feed([1, None])

    async def in_time():
        async with asyncio.timeout(0):
            return await drained(guarded(feed, place)())

    with pytest.raises(TimeoutError) as caught:
        await in_time()
    assert not isinstance(caught.value, AttemptTimeoutError)

    async def fail():
        await turns()
        raise LookupError

    readers = []

    async def in_a_group():
        async with asyncio.TaskGroup() as tasks:
            readers.append(tasks.create_task(drained(guarded(feed, place)())))
            tasks.create_task(fail())

    with pytest.raises(ExceptionGroup) as group:
        await in_a_group()
    assert [LookupError] == [type(error) for error in group.value.exceptions]
    assert readers[0].cancelled()
    assert (0, 2) == (place.held, feed.closed)


# -- nothing is left --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", ["read", "closed", "dropped", "broken", "timed out", "timed out unread", "cancelled"])
async def test_nothing_keeps_a_stream_alive(clock, ended):
    """After its end, a stream and what it was called with go with the last reference: no cycle waits for the collector."""

    class Argument:
        pass

    last = {"broken": OSError(), "timed out": None, "cancelled": None}.get(ended, 2)

    async def prices(argument):
        yield 1
        await asyncio.sleep(0)
        if isinstance(last, OSError):
            raise OSError
        if last is None:
            await asyncio.Event().wait()
        yield last

    retry, breaker = Retry(on=OSError, clock=clock), CircuitBreaker("prices", clock=clock)
    pipeline = Pipeline("prices", Timeout(total=9, clock=clock), retry, breaker, Timeout(5, clock=clock))
    argument = Argument()
    stream = pipeline(prices)(argument)
    kept = [weakref.ref(stream), weakref.ref(argument)]
    gc.disable()
    try:
        assert 1 == await anext(stream)
        if ended == "timed out unread":
            await clock.advance(5)
        if ended == "closed":
            await stream.aclose()
        elif ended != "dropped":
            reader = asyncio.create_task(drained(stream))
            await turns()
            if ended == "timed out":
                await clock.advance(5)
            elif ended == "cancelled":
                reader.cancel()
            await asyncio.wait([reader])
            if not reader.cancelled():
                # It holds its traceback, which holds the frames of those who read.
                error = reader.exception()
                assert (error is None) == (ended == "read")
                del error
            del reader
        del stream, argument
        await turns()
        assert [None, None] == [each() for each in kept]
    finally:
        gc.enable()
    assert [] == live(clock)


def test_a_stream_that_outlives_its_loop_lets_go_silently(clock):
    """Half read when its loop is closed: in another loop it can be read to its end; to drop it warns of nothing, and
    gives back the place, for which other loops may wait."""
    first, second = SteppedLoop(clock), SteppedLoop(clock)
    place, bulkhead = Place(), Bulkhead("prices", limit=2)

    async def prices():
        for item in (1, 2, 3):
            yield item

    def on(loop, coro):
        task = loop.create_task(coro)
        loop.settle()
        return task.result()

    streams = [Pipeline("prices", place, bulkhead)(prices)() for _ in range(2)]
    assert [1, 1] == [on(first, anext(stream, "end")) for stream in streams]
    first.close()
    assert [2, 3] == on(second, drained(streams.pop()))
    assert (1, 1) == (place.held, bulkhead.in_use)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streams.clear()
        gc.collect()
    assert (0, 0) == (place.held, bulkhead.in_use)


def test_a_stream_that_a_program_leaves_half_read_lets_go_at_the_latest_with_its_loop():
    """`asyncio.run` around a reader that keeps its stream in a cycle: the place is free when the cycle is collected."""
    place, feed = Place(), Feed([1, 2])

    async def main():
        stream = guarded(feed, place)()
        cycle = [stream]
        cycle.append(cycle)
        assert 1 == await anext(stream)

    asyncio.run(main())
    assert 1 == place.held
    gc.collect()
    assert (0, 1) == (place.held, feed.closed)


async def test_a_stream_that_is_dropped_is_ended_in_a_turn_of_its_loop():
    """Collection may come in the middle of anything: the policies are told later, by the loop."""
    place = Place()
    stream = guarded(Feed([1, 2]), place)()
    await anext(stream)
    del stream
    assert 1 == place.held
    await turns()
    assert 0 == place.held
