import asyncio
import inspect

import pytest

from meshkit import Call, CircuitBreaker, ConfigurationError, Outcome, Pipeline, Retry, Timeout, current_attempt


class Note:
    """A policy that notes when it is entered and left."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def describe(self):
        return {"kind": "note", "name": self.name}

    async def run(self, call, call_next):
        self.notes.append(f"into {self.name}")
        call.on_end(lambda outcome: self.notes.append(f"end {self.name}"))
        return await call_next(call)

    def run_sync(self, call, call_next):
        self.notes.append(f"into {self.name}")
        return call_next(call)


async def test_the_first_policy_is_outermost():
    """Policies are entered in the order given, and told of the end from the inside out."""
    notes = []
    await Pipeline("prices", Note("a", notes), Pipeline("inner", Note("b", notes), Note("c", notes))).call(_nothing)
    assert ["into a", "into b", "into c", "end c", "end b", "end a"] == notes


async def _nothing():
    return None


def test_an_end_is_told_once():
    """Ending a call again tells nobody anything."""
    told, call = [], Call("prices")
    call.on_end(told.append)
    call.end(Outcome(1))
    call.end(Outcome(2))
    assert [Outcome(1)] == told


def test_an_ender_that_fails_keeps_no_other_from_its_end(caplog):
    """All are told, and the log names the call."""
    told, call = [], Call("prices")
    call.on_end(told.append)

    def fails(outcome):
        raise RuntimeError

    call.on_end(fails)
    call.end(Outcome(1))
    assert [Outcome(1)] == told
    assert "'prices'" in caplog.text


def test_only_what_was_given_since_a_mark_ends():
    """What was asked for before the mark is kept for the end of the whole call."""
    told, call = [], Call("prices")
    call.on_end(lambda outcome: told.append("whole"))
    mark = call.mark()
    call.on_end(lambda outcome: told.append("attempt"))
    call.end(Outcome(), since=mark)
    assert ["attempt"] == told


def test_what_is_no_policy_is_refused():
    """A pipeline says what it cannot use."""
    with pytest.raises(ConfigurationError, match="is none"):
        Pipeline("prices", 7)


async def test_a_decorated_function_keeps_its_face():
    """Name and docstring stay, and generators are refused."""

    @Pipeline("prices")
    async def price(of):
        """What it costs."""
        return of

    assert ("price", "What it costs.", 3) == (price.__name__, price.__doc__, await price(3))

    def items():
        yield 1

    with pytest.raises(ConfigurationError, match="is a generator"):
        Pipeline("prices")(items)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_pipeline_has_a_name(name):
    """An empty one would be a series and log lines that say nothing."""
    with pytest.raises(ConfigurationError, match="a pipeline begins with the name of what it calls, and"):
        Pipeline(name)


@pytest.mark.parametrize("make", [lambda: Pipeline("prices", Timeout(1)), lambda: CircuitBreaker("prices")])
async def test_only_a_function_is_decorated(make):
    """A thing that cannot be called is no function, whatever the policies; a call that was made already is none either."""
    with pytest.raises(ConfigurationError, match="a pipeline guards a function, and 3 is none"):
        make()(3)
    made = _nothing()
    with pytest.raises(ConfigurationError, match=r"a call of one that was made already.*Give the function itself"):
        make()(made)
    await made


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_a_method_is_decorated_beneath_staticmethod_and_classmethod(kind):
    """The wrong order is refused when the class is made, with the right one; the right one works."""

    async def price(*_):
        return 3

    with pytest.raises(ConfigurationError, match=f"Put @{kind.__name__} outermost"):
        Pipeline("prices")(kind(price))

    class Prices:
        of = kind(Pipeline("prices")(price))

    assert 3 == asyncio.run(Prices.of())


def test_an_ender_that_is_cancelled_keeps_no_other_from_its_end():
    """What an ender raises is nobody's cancellation: the others hear of the end."""
    told, call = [], Call("prices")
    call.on_end(told.append)

    def cancelled(outcome):
        raise asyncio.CancelledError

    call.on_end(cancelled)
    call.end(Outcome(1))
    assert [Outcome(1)] == told


async def test_an_object_with_an_async_call_is_a_coroutine_function():
    """It is awaited through the policies, and its failures are failures."""

    class Client:
        async def __call__(self, of):
            return of

    guarded = Pipeline("prices")(Client())
    assert inspect.iscoroutinefunction(guarded)
    assert 3 == await guarded(3)


def test_a_plain_function_that_returns_a_coroutine_is_refused():
    """Nobody counts a coroutine that has not run as a success."""
    with pytest.raises(ConfigurationError, match="has returned a coroutine"):
        Pipeline("prices")(lambda: _nothing())()


@pytest.mark.parametrize("wrong", [("prices", Retry), (Retry(),)], ids=["class", "no name"])
def test_a_pipeline_is_made_of_a_name_and_policies(wrong):
    """A class in place of its object, or a missing name, is refused when the pipeline is made."""
    with pytest.raises(ConfigurationError):
        Pipeline(*wrong)


async def test_a_pipeline_in_a_policy_of_a_pipeline_goes_on_with_the_call():
    """A policy that leads its call through a pipeline of its own comes out at the next step."""
    notes = []

    class Wraps(Note):
        async def run(self, call, call_next):
            return await Pipeline("inner", Note("b", notes)).run(call, call_next)

    await Pipeline("prices", Note("a", notes), Wraps("w", notes), Note("c", notes)).call(_nothing)
    assert ["into a", "into b", "into c", "end c", "end b", "end a"] == notes


async def test_a_call_inside_a_later_attempt_counts_from_one(clock):
    """The attempt that a function sees is that of the pipeline next to it."""
    seen = []

    async def inner():
        seen.append(("inner", current_attempt()))

    async def outer():
        await Pipeline("inner").call(inner)
        seen.append(("outer", current_attempt()))
        if len(seen) < 4:
            raise OSError

    await Pipeline("outer", Retry(clock=clock)).call(outer)
    assert [("inner", 1), ("outer", 1), ("inner", 1), ("outer", 2)] == seen
