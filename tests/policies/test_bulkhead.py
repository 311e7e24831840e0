import asyncio
import gc
import threading
import tracemalloc

import pytest

from meshkit import Backoff, Bulkhead, BulkheadFullError, ConfigurationError, Pipeline, Retry, Scope, listen
from meshkit.core.call import Call, Outcome
from meshkit.core.events import BulkheadRejected
from meshkit.core.scope import scope_open
from meshkit.policies.bulkhead import bulkheads


@pytest.fixture
def refused():
    heard = []
    stop = listen(heard.append, kind=BulkheadRejected)
    yield heard
    stop()


class Work:
    """Calls that go on until they are let go, and the order in which they began."""

    def __init__(self):
        self.begun = []
        self._ends = {}

    async def __call__(self, number):
        self.begun.append(number)
        end = self._ends[number] = asyncio.get_running_loop().create_future()
        return await end

    def end(self, number):
        self._ends[number].set_result(number)


async def turns():
    for _ in range(5):
        await asyncio.sleep(0)


def start(bulkhead, work, *numbers):
    guarded = Pipeline("prices", bulkhead)
    return [asyncio.create_task(guarded.call(work, number)) for number in numbers]


# -- limits -----------------------------------------------------------------------------------------------------------


async def test_so_many_run_at_once_and_no_more(refused):
    """Two places bear two calls, the third one is refused and not called, and a place that is given back is free, as
    Resilience4j's `testBulkhead` and `shouldReturnTheCorrectName`, and failsafe-go's `TestBulkheadFull`."""
    bulkhead, work = Bulkhead("test", limit=2), Work()
    tasks = start(bulkhead, work, 1, 2)
    await turns()
    assert (2, 0) == (bulkhead.in_use, bulkhead.waiting)
    with pytest.raises(BulkheadFullError, match="all 2 places of bulkhead 'test' are taken") as caught:
        await Pipeline("prices", bulkhead).call(work, 3)
    assert ("MK502", "test", None) == (caught.value.code, caught.value.policy, caught.value.retry_after)
    assert [BulkheadRejected(source="test", reason="full")] == refused
    work.end(1)
    await turns()
    assert 1 == bulkhead.in_use
    work.end(2)
    assert [1, 2] == await asyncio.gather(*tasks)
    assert (0, [1, 2]) == (bulkhead.in_use, work.begun)


@pytest.mark.parametrize("error", [OSError, asyncio.CancelledError, KeyboardInterrupt])
async def test_a_call_that_fails_gives_its_place_back(error):
    """However a call ends, its place is free."""
    bulkhead = Bulkhead(limit=1)

    async def fails():
        raise error

    with pytest.raises(error):
        await Pipeline("prices", bulkhead).call(fails)
    assert 0 == bulkhead.in_use


async def test_a_place_is_waited_for(clock):
    """A call in the queue runs once a place is free, as failsafe-go's `TestBulkheadPermitAcquiredAfterWait`."""
    bulkhead, work = Bulkhead(limit=2, queue=1, wait=1.0, clock=clock), Work()
    tasks = start(bulkhead, work, 1, 2, 3)
    await turns()
    assert (2, 1, [1, 2]) == (bulkhead.in_use, bulkhead.waiting, work.begun)
    await clock.advance(0.9)
    work.end(1)
    await turns()
    assert [1, 2, 3] == work.begun
    await clock.advance(5)
    work.end(2)
    work.end(3)
    assert [1, 2, 3] == await asyncio.gather(*tasks)


async def test_a_queue_has_an_end(clock, refused):
    """Beyond `queue` nobody waits."""
    bulkhead, work = Bulkhead(limit=1, queue=2, clock=clock), Work()
    tasks = start(bulkhead, work, 1, 2, 3, 4)
    await turns()
    with pytest.raises(BulkheadFullError, match="are taken, and so are the 2 of its queue"):
        await tasks[3]
    assert ["full"] == [event.reason for event in refused]
    for number in (1, 2, 3):
        work.end(number)
        await turns()
    assert [1, 2, 3] == await asyncio.gather(*tasks[:3])


async def test_a_wait_has_an_end(clock, refused):
    """After `wait` seconds a call in the queue is refused, as Resilience4j's `testTryEnterWithTimeout` and
    `testEntryTimeout`, and failsafe-go's `TestBulkheadMaxWaitTimeExceeded`."""
    bulkhead, work = Bulkhead(limit=1, queue=5, wait=0.05, clock=clock), Work()
    first, second = start(bulkhead, work, 1, 2)
    await turns()
    await clock.advance(0.049)
    assert not second.done()
    await clock.advance(0.002)
    with pytest.raises(BulkheadFullError, match="stayed taken"):
        await second
    assert (0, ["timeout"]) == (bulkhead.waiting, [event.reason for event in refused])
    work.end(1)
    await first
    assert (0, [1]) == (bulkhead.in_use, work.begun)


async def test_nobody_waits_past_the_deadline_of_the_request(clock, refused):
    """The request's deadline ends a wait that may otherwise be longer, and begins none when it is over."""
    bulkhead, work = Bulkhead(limit=1, queue=5, wait=60, clock=clock), Work()
    (first,) = start(bulkhead, work, 1)
    await turns()
    with scope_open(Scope(deadline=clock.now() + 2)):
        (second,) = start(bulkhead, work, 2)
    await turns()
    await clock.advance(2)
    with pytest.raises(BulkheadFullError):
        await second
    with scope_open(Scope(deadline=clock.now())), pytest.raises(BulkheadFullError):
        await Pipeline("prices", bulkhead).call(work, 3)
    assert (0, 2) == (bulkhead.waiting, len(refused))
    work.end(1)
    await first


# -- fairness ---------------------------------------------------------------------------------------------------------


async def test_first_come_first_served():
    """The queue is in the order of coming, and nobody who comes later overtakes it."""
    bulkhead, work = Bulkhead(limit=1, queue=10), Work()
    tasks = start(bulkhead, work, 1, 2, 3, 4)
    await turns()
    work.end(1)
    await asyncio.sleep(0)  # the place is handed over, and its owner has not come to run yet
    tasks += start(bulkhead, work, 5)
    for number in (2, 3, 4, 5):
        await turns()
        work.end(number)
    await asyncio.gather(*tasks)
    assert [1, 2, 3, 4, 5] == work.begun


async def test_order_is_kept_when_somebody_leaves_the_queue(clock):
    """One who is cancelled and one whose time is over leave the order of the others as it was."""
    bulkhead, work = Bulkhead(limit=1, queue=10, clock=clock), Work()
    tasks = start(bulkhead, work, 1, 2, 3)
    await turns()
    with scope_open(Scope(deadline=clock.now() + 1)):
        tasks += start(bulkhead, work, 4)
    tasks += start(bulkhead, work, 5, 6)
    await turns()
    tasks[1].cancel()
    await clock.advance(1)
    assert 3 == bulkhead.waiting
    for number in (1, 3, 5, 6):
        await turns()
        work.end(number)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [1, asyncio.CancelledError, 3, BulkheadFullError, 5, 6] == [
        result if isinstance(result, int) else type(result) for result in results
    ]
    assert ([1, 3, 5, 6], 0, 0) == (work.begun, bulkhead.in_use, bulkhead.waiting)


async def test_cancelled_in_the_queue_counts_as_nothing(refused):
    """A cancelled waiter gives its slot back, and comes out cancelled; so does, in Resilience4j, one that is interrupted
    (`testAcquireWithInterruptDuringTimeout`)."""
    bulkhead, work = Bulkhead(limit=1, queue=1), Work()
    first, second = start(bulkhead, work, 1, 2)
    await turns()
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert second.cancelled()
    assert (1, 0, []) == (bulkhead.in_use, bulkhead.waiting, refused)
    work.end(1)
    await first


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_a_place_that_is_handed_to_somebody_cancelled_goes_to_the_next(cancelled_first):
    """In whichever order a release and a cancellation come in one turn, the next in the queue gets the place."""
    bulkhead, work = Bulkhead(limit=1, queue=5), Work()
    tasks = start(bulkhead, work, 1, 2, 3)
    await turns()
    if cancelled_first:
        tasks[1].cancel()
    work.end(1)
    await asyncio.sleep(0)
    assert 1 == bulkhead.in_use
    if not cancelled_first:
        tasks[1].cancel()
    await turns()
    assert [1, 3] == work.begun
    work.end(3)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (True, 0, 0) == (tasks[1].cancelled(), bulkhead.in_use, bulkhead.waiting)


async def test_a_waiter_whose_coroutine_is_closed_leaves_the_queue():
    """A coroutine that nobody runs to its end holds no slot."""
    bulkhead, work = Bulkhead(limit=1, queue=1), Work()
    (first,) = start(bulkhead, work, 1)
    await turns()
    waits = Pipeline("prices", bulkhead).call(work, 2)
    waits.send(None)
    assert 1 == bulkhead.waiting
    waits.close()
    assert (1, 0) == (bulkhead.in_use, bulkhead.waiting)
    work.end(1)
    await first


# -- the real end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["read", "closed", "dropped", "broken"])
async def test_a_stream_holds_its_place_to_its_end(way):
    """A stream that is read, closed, dropped half read or broken gives its place back then, and not before."""
    bulkhead = Bulkhead(limit=1)

    @Pipeline("rows", bulkhead)
    async def rows():
        yield 1
        if way == "broken":
            raise OSError
        yield 2

    stream = rows()
    await anext(stream)
    assert 1 == bulkhead.in_use
    if way == "read":
        assert [2] == [row async for row in stream]
    elif way == "closed":
        await stream.aclose()
    elif way == "broken":
        with pytest.raises(OSError):
            await anext(stream)
    del stream
    gc.collect()
    await turns()
    assert 0 == bulkhead.in_use


async def test_a_call_that_an_edge_leads_holds_its_place_until_the_edge_ends_it():
    """A response whose body is still being read is under way."""
    bulkhead = Bulkhead(limit=1)
    call = Call("prices")

    async def send(call):
        return "response"

    assert "response" == await bulkhead.run(call, send)
    assert 1 == bulkhead.in_use
    call.end(Outcome("response"))
    assert 0 == bulkhead.in_use


# -- threads, loops, plain functions ----------------------------------------------------------------------------------


def test_plain_functions_are_guarded_too(clock, refused):
    """A plain function takes a place, and is refused where there is none."""
    bulkhead = Bulkhead(limit=1, clock=clock)
    guarded = Pipeline("prices", bulkhead)

    def outer():
        assert 1 == bulkhead.in_use
        with pytest.raises(BulkheadFullError):
            guarded.call_sync(lambda: None)
        return "done"

    assert "done" == guarded.call_sync(outer)
    assert (0, 1) == (bulkhead.in_use, len(refused))


def test_a_plain_function_waits_so_long(clock, refused):
    """A plain function in the queue holds its thread for `wait` seconds of the clock, and is refused then."""
    bulkhead = Bulkhead(limit=1, queue=1, wait=2.0, clock=clock)
    guarded = Pipeline("prices", bulkhead)

    def outer():
        with pytest.raises(BulkheadFullError):
            guarded.call_sync(lambda: None)

    guarded.call_sync(outer)
    assert [2.0] == clock.sleeps
    assert ["timeout"] == [event.reason for event in refused]


def test_a_release_wakes_a_thread_that_waits():
    """Threads in the queue are woken by a release, in order, without polling."""
    bulkhead = Bulkhead(limit=1, queue=10)
    guarded = Pipeline("prices", bulkhead)
    began, go, order = threading.Event(), threading.Event(), []

    def first():
        began.set()
        go.wait()

    threads = [threading.Thread(target=guarded.call_sync, args=(first,))]
    threads[0].start()
    began.wait()
    for number in range(5):
        thread = threading.Thread(target=guarded.call_sync, args=(order.append, number))
        thread.start()
        threads.append(thread)
        while bulkhead.waiting <= number:
            pass
    go.set()
    for thread in threads:
        thread.join()
    assert (list(range(5)), 0, 0) == (order, bulkhead.in_use, bulkhead.waiting)


def test_an_interrupt_in_the_queue_gives_the_slot_back(clock):
    """A thread that is interrupted while it waits is in the queue no longer, as Resilience4j's
    `testTryEnterWithInterruptDuringTimeout`."""
    bulkhead = Bulkhead(limit=1, queue=1, wait=2.0, clock=clock)
    guarded = Pipeline("prices", bulkhead)

    def interrupt():
        raise KeyboardInterrupt

    def outer():
        clock.call_at(clock.now() + 1, interrupt)
        with pytest.raises(KeyboardInterrupt):
            guarded.call_sync(lambda: None)
        assert 0 == bulkhead.waiting

    guarded.call_sync(outer)
    assert 0 == bulkhead.in_use


def test_threads_and_loops_share_one():
    """Event loops in several threads and plain threads share the places: never more than `limit` at once, everybody gets
    one, nobody stalls."""
    bulkhead = Bulkhead(limit=3, queue=1000)
    guarded = Pipeline("prices", bulkhead)
    most, done = [], []

    async def work():
        most.append(bulkhead.in_use)
        await asyncio.sleep(0)
        done.append(1)

    def plain():
        most.append(bulkhead.in_use)
        done.append(1)

    async def main():
        for _ in range(5):
            await asyncio.gather(*(guarded.call(work) for _ in range(40)))

    def many():
        for _ in range(200):
            guarded.call_sync(plain)

    threads = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(3)]
    threads += [threading.Thread(target=many) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (1200, 0, 0) == (len(done), bulkhead.in_use, bulkhead.waiting)
    assert max(most) <= 3


def test_a_waiter_whose_loop_is_gone_is_passed_over():
    """A place is not handed to a task whose event loop was closed around it."""
    bulkhead, work = Bulkhead(limit=1, queue=5), Work()
    guarded = Pipeline("prices", bulkhead)

    def outer():
        loop = asyncio.new_event_loop()
        lost = loop.create_task(guarded.call(work, 1))
        lost._log_destroy_pending = False
        loop.run_until_complete(asyncio.sleep(0))
        assert 1 == bulkhead.waiting
        loop.close()
        return lost

    lost = guarded.call_sync(outer)
    assert (0, 0) == (bulkhead.in_use, bulkhead.waiting)
    assert "free" == guarded.call_sync(lambda: "free")
    del lost


async def test_a_retry_around_it_tries_again_only_where_it_is_told_to(clock, refused):
    """As failsafe-go's composition "RetryPolicy with Bulkhead": with `on` naming it, each attempt is refused and nothing is
    called; without, a refusal is not retried, because that would only add to what is too much already."""
    bulkhead, work = Bulkhead(limit=1), Work()
    (first,) = start(bulkhead, work, 1)
    await turns()
    for on, attempts in ((BulkheadFullError, 7), (None, 1)):
        del refused[:]
        retry = Retry(attempts=7, on=on, patient=on is not None, backoff=Backoff(first=0), clock=clock)
        with pytest.raises(BulkheadFullError):
            await Pipeline("prices", retry, bulkhead).call(work, 2)
        assert (attempts, [1]) == (len(refused), work.begun)
    work.end(1)
    await first


# -- the rest ---------------------------------------------------------------------------------------------------------


async def test_ten_thousand_refusals_grow_nothing():
    """Each refusal is an error of its own with a short traceback, and no memory stays, as Polly's
    `OnActionPreExecute_CircuitOpened_EnsureExceptionStackTraceDoesNotGrow`."""
    bulkhead, work = Bulkhead(limit=1), Work()
    (first,) = start(bulkhead, work, 1)
    await turns()
    guarded = Pipeline("prices", bulkhead)

    async def refuse():
        try:
            await guarded.call(work, 2)
        except BulkheadFullError as error:
            frames, traceback = 0, error.__traceback__
            while traceback is not None:
                frames, traceback = frames + 1, traceback.tb_next
            return frames

    frames = {await refuse() for _ in range(100)}
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(10_000):
        frames.add(await refuse())
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1 == len(frames)
    assert after - before < 20_000
    work.end(1)
    await first


def test_what_a_scrape_reads():
    """Bulkheads that are alive are listed, and the others are not."""
    bulkhead = Bulkhead("scraped", limit=7, queue=2, wait=3.0)
    assert bulkhead in bulkheads()
    assert {"kind": "bulkhead", "name": "scraped", "limit": 7, "queue": 2, "wait": 3.0} == bulkhead.describe()
    assert "Bulkhead('scraped', limit=7, in_use=0, waiting=0)" == repr(bulkhead)
    del bulkhead
    gc.collect()
    assert "scraped" not in [known.name for known in bulkheads()]


def test_a_wait_without_end_is_described_as_such():
    """explain() can tell a queue that nobody leaves in time from none at all."""
    assert float("inf") == Bulkhead(limit=1, queue=1).describe()["wait"]
    assert 0.0 == Bulkhead(limit=1).describe()["wait"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": 0},
        {"limit": 1.5},
        {"limit": True},
        {"limit": 10**9},
        {"limit": 1, "queue": -1},
        {"limit": 1, "queue": None},
        {"limit": 1, "wait": 1.0},
        {"limit": 1, "queue": 1, "wait": 0},
        {"limit": 1, "queue": 1, "wait": float("nan")},
        {"limit": 1, "queue": 1, "wait": "1s"},
        {"name": "", "limit": 1},
        {"name": 5, "limit": 1},
        {"limit": 1, "clock": 3},
        {"limit": 1, "clock": None},
    ],
    ids=str,
)
def test_wrong_options_are_refused(wrong):
    """As Resilience4j's `testCreateWithNullConfig`, but also for a limit of 0, which would refuse everything."""
    with pytest.raises(ConfigurationError):
        Bulkhead(**wrong)
