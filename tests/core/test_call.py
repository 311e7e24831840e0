import pytest

from meshkit import Call, ConfigurationError, Outcome, Pipeline


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

    async def items():
        yield 1

    with pytest.raises(ConfigurationError, match="is a generator"):
        Pipeline("prices")(items)
