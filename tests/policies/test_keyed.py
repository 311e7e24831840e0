import asyncio
import functools
import gc
import logging
import random
import threading
import tracemalloc

import pytest
from prometheus_client import CollectorRegistry

from meshkit import CircuitBreaker, CircuitBreakers, CircuitOpenError, ConfigurationError, Pipeline, Retry, listen
from meshkit.core.call import Call
from meshkit.core.events import CircuitChanged
from meshkit.policies.circuit_breaker import breakers
from meshkit.policies.keyed import families
from meshkit.telemetry.recorder import Recorder


def by_first(clock, **options):
    return CircuitBreakers(
        "orders-db",
        **{
            "key": lambda tenant, **_: tenant,
            "min_calls": 2,
            "window": 4,
            "open_for": 10.0,
            "clock": clock,
            **options,
        },
    )


async def load(tenant, *, broken=False):
    if broken:
        raise ConnectionError(tenant)
    return tenant


async def fail(guarded, tenant, times=2):
    for _ in range(times):
        with pytest.raises(ConnectionError):
            await guarded(tenant, broken=True)


def open_it(family, *keys):
    for key in keys:
        family.get(key).force_open()


async def test_a_key_that_fails_shuts_off_no_other(clock):
    """The breaker of one tenant opens, and the calls of another go on."""
    guarded = by_first(clock)(load)
    await fail(guarded, "a")
    with pytest.raises(CircuitOpenError) as caught:
        await guarded("a")
    assert "b" == await guarded("b")
    assert ("orders-db", ["key 'a'"]) == (caught.value.policy, caught.value.__notes__)


async def test_it_is_a_policy_of_a_pipeline(clock):
    """Inside a Retry, each attempt is judged by the breaker of its key, and an open one ends the retry."""
    family = by_first(clock)
    calls = []

    async def attempt(tenant):
        calls.append(tenant)
        raise ConnectionError(tenant)

    guarded = Pipeline("orders", Retry(attempts=5, clock=clock), family)(attempt)
    with pytest.raises((ConnectionError, CircuitOpenError)):
        await guarded("a")
    assert (["a", "a"], "open") == (calls, family.get("a").state)


def test_plain_functions_are_guarded_too(clock):
    """A plain function finds its breaker the same way."""

    def broken(tenant):
        raise ConnectionError(tenant)

    guarded = by_first(clock)(broken)
    for expected in (ConnectionError, ConnectionError, CircuitOpenError):
        with pytest.raises(expected):
            guarded("a")
    with pytest.raises(ConnectionError):
        guarded("b")


async def test_a_stream_is_judged_at_its_end(clock):
    """A call of an async generator counts for its key when the generator has ended."""
    family = by_first(clock)

    @family
    async def rows(tenant):
        yield tenant
        raise ConnectionError(tenant)

    for _ in range(2):
        with pytest.raises(ConnectionError):
            assert ["a"] == [row async for row in rows("a")]
    with pytest.raises(CircuitOpenError):
        async for _ in rows("a"):
            pass


async def test_cancelled_calls_count_for_no_key(clock):
    """A cancelled probe of a key gives its place back, as with a breaker of its own."""
    family = by_first(clock)

    async def wait(tenant):
        await asyncio.Event().wait()

    waiting = family(wait)
    open_it(family, "a")
    await clock.advance(10)
    probe = asyncio.create_task(waiting("a"))
    await asyncio.sleep(0)
    assert family.get("a").retry_after is None
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert ("half_open", 0.0) == (family.get("a").state, family.get("a").retry_after)


# -- the bound --------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_key_goes(clock):
    """Above the bound the key that was not used for longest loses its breaker."""
    family = by_first(clock, most=3)
    first = {key: family.get(key) for key in "abc"}
    family.get("a")
    family.get("d")
    assert ["c", "a", "d"] == [key for key, _ in family.items()]
    assert first["a"] is family.get("a")
    assert first["b"] is not family.get("b")


def test_one_that_guards_is_never_forgotten(clock):
    """Open, isolated, disabled and probing breakers outlast any number of other keys."""
    family = by_first(clock, most=5)
    kept = {key: family.get(key) for key in ("open", "isolated", "disabled", "probing")}
    kept["open"].force_open(1000)
    kept["isolated"].isolate()
    kept["disabled"].disable()
    kept["probing"].core.half_open()
    with kept["probing"].calling():
        for number in range(50):
            family.get(number)
        assert kept == {key: breaker for key, breaker in family.items() if key in kept}
    assert 5 == len(family)


async def test_one_whose_time_is_over_goes_before_one_that_rejects(clock):
    """Where none is closed, a breaker that nobody has called since it may probe makes room."""
    family = by_first(clock, most=2)
    family.get("waited").force_open(5)
    family.get("open").force_open(50)
    await clock.advance(6)
    assert family.get("new") is not None
    assert {"open", "new"} == {key for key, _ in family.items()}


async def test_where_all_are_open_further_keys_go_without(clock, caplog):
    """Calls of a key beyond the bound are made without a breaker while all are open, with one warning."""
    family = by_first(clock, most=2)
    guarded = family(load)
    open_it(family, "a", "b")
    with caplog.at_level(logging.WARNING, "meshkit"):
        for _ in range(20):
            assert "c" == await guarded("c")
            await fail(guarded, "d")
    assert ["circuit breakers of 'orders-db': all 2 are open; calls of further keys ('c') go without a breaker"] == [
        record.getMessage() for record in caplog.records
    ]
    family.get("a").reset()
    await clock.advance(1)
    assert family.get("c") is not None


async def test_nobody_is_asked_again_at_once_where_all_are_open(clock, monkeypatch):
    """While all breakers are open, further keys cost one look through them a second, not one a call."""
    family = by_first(clock, most=100)
    open_it(family, *range(100))
    states = 0
    real = CircuitBreaker.state.fget

    def counted(self):
        nonlocal states
        states += 1
        return real(self)

    monkeypatch.setattr(CircuitBreaker, "state", property(counted))
    for number in range(1000):
        assert family.get(f"further {number}") is None
    assert 100 == states
    await clock.advance(1)
    assert family.get("one more") is None
    assert 200 == states


async def test_old_failures_of_others_take_no_protection_away(clock, monkeypatch):
    """Where keys that failed once and were never called again fill all places, those that are called now have breakers
    that open, and none of their calls looks through all of them."""
    family = by_first(clock, most=100)
    guarded = family(load)
    for number in range(100):
        await fail(guarded, number)
    await clock.advance(86_400)
    states = 0
    real = CircuitBreaker.state.fget

    def counted(self):
        nonlocal states
        states += 1
        return real(self)

    monkeypatch.setattr(CircuitBreaker, "state", property(counted))
    reached = []
    for _ in range(50):
        for tenant in ("a", "b"):
            try:
                await guarded(tenant, broken=True)
            except ConnectionError:
                reached.append(tenant)
            except CircuitOpenError:
                pass
    assert (["a", "b", "a", "b"], 2) == (reached, states)


async def test_the_least_recently_called_goes_be_it_closed_or_open_with_its_time_over(clock):
    """One whose time is over stays where it was used after a closed one, and goes where it was used before it."""
    family = by_first(clock, most=3)
    family.get("closed")
    open_it(family, "over", "later")
    await clock.advance(11)
    family.get("new")
    assert ["over", "later", "new"] == [key for key, _ in family.items()]
    family.get("over")
    family.get("newer")
    assert ["new", "over", "newer"] == [key for key, _ in family.items()]


async def test_one_with_a_probe_under_way_stays_until_its_time_is_over(clock):
    """A breaker that probes is kept while a probe is under way, also where further places are free, and no longer than a
    probe may take; between probes it goes like any other."""
    family = by_first(clock, most=2, probes=3, probe_for=30.0)
    for key in ("hangs", "between"):
        family.get(key).force_open(5)
    await clock.advance(6)
    family.get("hangs").calling().__enter__()
    with family.get("between").calling():
        assert family.get("none") is None
    assert ("half_open", 1, 0) == (
        family.get("between").state,
        family.get("hangs").probing,
        family.get("between").probing,
    )
    await clock.advance(1)
    assert family.get("first") is not None
    assert ["hangs", "first"] == [key for key, _ in family.items()]
    family.get("first").isolate()
    assert family.get("none") is None
    await clock.advance(30)
    assert family.get("second") is not None
    assert ["first", "second"] == [key for key, _ in family.items()]


async def test_few_places_among_many_that_guard_cost_one_look_a_second(clock, monkeypatch):
    """Where all but one breaker reject calls, keys that take turns for the last place ask each of them once a second, and
    have a place more as soon as the time of one is over."""
    family = by_first(clock, most=100, open_for=50.0)
    open_it(family, *range(99))
    states = 0
    real = CircuitBreaker.state.fget

    def counted(self):
        nonlocal states
        states += 1
        return real(self)

    monkeypatch.setattr(CircuitBreaker, "state", property(counted))
    for number in range(1000):
        assert family.get(f"further {number}") is not None
    assert 99 + 999 == states
    assert [*range(99), "further 999"] == [key for key, _ in family.items()]
    await clock.advance(50)
    kept = {key: family.get(key) for key in ("x", "y", "z")}
    assert kept == {key: breaker for key, breaker in family.items() if key in kept}


def test_a_listener_may_ask_for_a_key_while_room_is_made(clock):
    """Whoever hears that a breaker has opened again, because its probe took too long, may use the family."""
    family = by_first(clock, most=2, probe_for=5.0)
    for key in ("a", "b"):
        family.get(key).core.half_open()
        family.get(key).calling().__enter__()
    clock.block(5)
    heard = []

    def again(event):
        heard.append((event.new, family.get("a") is not None))

    stop = listen(again, kind=CircuitChanged)
    try:
        assert family.get("c") is None
    finally:
        stop()
    assert [("open", True)] * 2 == heard
    assert 2 == len(family)


def test_ten_thousand_keys_stay_within_the_bound(clock):
    """10,000 keys leave `most` breakers alive, and no more memory than those take."""
    family = by_first(clock, most=100)
    for number in range(100):
        family.get(("warm", number))
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(10_000):
        family.get(number)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 100 == len(family) == len([each for each in breakers() if each.name == "orders-db"])
    # The hundred that stay are as heavy as those that were there before; what is left is the table's own.
    assert grown < 500_000


def test_metrics_have_one_series_for_all_keys(clock):
    """Ten thousand keys are one name in the metrics, with the state of the one that rejects most."""
    family = by_first(clock, most=50)
    family.get("bad").isolate()
    for number in range(10_000):
        family.get(number)
    registry = CollectorRegistry()
    recorder = Recorder(registry)
    try:
        states = {
            sample.labels["state"]: sample.value
            for metric in registry.collect()
            for sample in metric.samples
            if sample.name == "meshkit_circuitbreaker_state" and sample.labels["breaker"] == "orders-db"
        }
        overflow = registry.get_sample_value(
            "meshkit_metric_label_overflow_total", {"metric": "meshkit_circuitbreaker_state", "label": "breaker"}
        )
    finally:
        recorder.close()
    assert {"isolated"} == {state for state, on in states.items() if on}
    assert 0 == overflow


def test_few_keys_may_have_names_of_their_own(clock):
    """With `named`, metrics and events tell the keys apart."""
    family = by_first(clock, named=lambda shard: f"orders-db {shard}")
    heard = []
    stop = listen(heard.append, kind=CircuitChanged)
    try:
        family.get(3).force_open()
    finally:
        stop()
    assert ["orders-db 3"] == [event.source for event in heard]


def test_threads_share_them(clock):
    """Threads that use the same keys at once get the same breakers, and the bound holds."""
    family = by_first(clock, most=20)
    family.get("down").isolate()
    seen = []
    go = threading.Barrier(8)

    def use(seed):
        chance = random.Random(seed)
        go.wait()
        for _ in range(500):
            seen.append(len(family))
            family.get(chance.randrange(40))
        seen.append(family.get("down").state)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 20 >= max(each for each in seen if isinstance(each, int))
    assert ["isolated"] * 8 == [each for each in seen if isinstance(each, str)]


# -- by hand, for all of them -----------------------------------------------------------------------------------------


async def test_what_is_ordered_for_all_holds_for_keys_to_come(clock):
    """Forced open, the keys that are there, those that come, and those without a place are all rejected; then all
    probe."""
    family = by_first(clock, most=2)
    guarded = family(load)
    await guarded("a")
    family.force_open(30)
    for tenant in ("a", "b", "without a place"):
        with pytest.raises(CircuitOpenError) as caught:
            await guarded(tenant)
        assert 30.0 == caught.value.retry_after
    await clock.advance(31)
    for tenant in ("a", "b", "c"):
        assert tenant == await guarded(tenant)
    assert {"closed"} == {breaker.state for _, breaker in family.items()}


async def test_isolated_until_reset(clock):
    """Isolated, all keys are rejected until `reset`; disabled, none is."""
    family = by_first(clock, most=2)
    guarded = family(load)
    open_it(family, "a")
    family.isolate()
    await clock.advance(10_000)
    for tenant in ("a", "b", "c"):
        with pytest.raises(CircuitOpenError):
            await guarded(tenant)
    family.reset()
    assert "a" == await guarded("a")
    family.disable()
    await fail(guarded, "a", 9)
    await fail(guarded, "new", 9)
    family.reset()
    assert {"closed"} == {breaker.state for _, breaker in family.items()}


# -- what is refused, what is told ------------------------------------------------------------------------------------


def test_wrong_values_say_what_would_be_right():
    """Each value that cannot work is refused when the object is made, or the key is asked for."""

    def key(tenant):
        return tenant

    for options, words in (
        ({"key": "tenant"}, "function that gets the arguments"),
        ({"key": key, "most": 0}, "1 or above, not 0"),
        ({"key": key, "most": 1.5}, "1 or above, not 1.5"),
        ({"key": key, "open_fro": 3}, "open_fro is no option of a circuit breaker. There are concurrent_probes"),
        ({"key": key, "open_for": -1}, "open_for is how long"),
        ({"key": key, "named": 3}, "named is a function of a key"),
        ({"key": key, "clock": 3}, "clock is where the time comes from, and 3 is none"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            CircuitBreakers("x", **options)
    for name in ("", 3, None):
        with pytest.raises(ConfigurationError, match="begins with the name of what it calls"):
            CircuitBreakers(name, key=key)
    family = CircuitBreakers("x", key=key)
    with pytest.raises(ConfigurationError, match="must be hashable, and \\[1\\]"):
        family.get([1])
    with pytest.raises(ConfigurationError, match="seconds is how long"):
        family.force_open(-1)


async def test_a_key_that_would_have_to_be_awaited_is_refused():
    """A coroutine function as `key` would give each call a breaker of its own, so it is refused: when the object is made,
    or at the first call where only what it returns shows it."""

    async def key(tenant):
        return tenant

    class Key:
        async def __call__(self, tenant):
            return tenant

    for wrong in (key, functools.partial(key), Key(), Key().__call__):
        with pytest.raises(ConfigurationError, match="is a coroutine function"):
            CircuitBreakers("x", key=wrong)
    family = CircuitBreakers("x", key=lambda tenant: key(tenant))
    with pytest.raises(ConfigurationError, match="'x' has returned a coroutine"):
        await family(load)("a")
    assert 0 == len(family)


async def test_a_call_without_arguments_of_its_own_is_refused():
    """An edge's call has no arguments to make a key from, and the error says so."""
    family = CircuitBreakers("x", key=lambda tenant: tenant)

    async def nothing(call):
        raise AssertionError

    with pytest.raises(ConfigurationError, match="an edge leads it"):
        await family.run(Call("x"), nothing)


def test_it_describes_itself_as_the_breakers_it_makes():
    """`explain()` and the linter see a circuit breaker, with its bound."""
    family = CircuitBreakers("x", key=lambda tenant: tenant, most=7, open_for=3.0)
    said = family.describe()
    assert ("circuit_breaker", "x", 7, 3.0) == tuple(said[each] for each in ("kind", "name", "most", "open_for"))
    assert "CircuitBreakers('x', 0 of 7)" == repr(family)


def test_it_can_be_let_go_of():
    """Nothing keeps the breakers of keys alive but their owner."""
    family = CircuitBreakers("gone", key=lambda tenant: tenant)
    family.get("a")
    assert family in families()
    del family
    gc.collect()
    assert [] == [each for each in families() if each.name == "gone"]
    assert [] == [each for each in breakers() if each.name == "gone"]
