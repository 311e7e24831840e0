"""The retry schedule: its text, its waits, its rungs."""

import math

import pytest

from meshkit.errors import ConfigurationError
from meshkit.messaging.schedule import DEFAULT, Schedule, Wait, rung_at_least, rung_name
from meshkit.testing.clock import ManualClock


def test_reads_lengths_units_and_counts():
    """Each step is a length with a unit, once or so many times, in the order written."""
    assert (0.05, 10, 10, 10, 60, 60, 60, 600, 600) == Schedule.parse(DEFAULT).steps
    assert (5400, 7200, 86_400, 0.5) == Schedule.parse("1.5h,2h , 1d,500ms").steps
    assert 10 == Schedule.parse(DEFAULT).max_attempts


def test_an_empty_text_means_one_attempt():
    """Without steps there is no second attempt."""
    assert 1 == Schedule.parse("").max_attempts
    assert Schedule.parse(" ").wait(1, ManualClock()) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("10", "'10'"),
        ("10s*", "'10s*'"),
        ("10s,,1m", "''"),
        ("ten s", "'ten s'"),
        ("10s*0", "repeats 0 times"),
        ("10s*1000", "repeats 1000 times"),
        ("0ms", "1ms to 49d"),
        ("50d", "1ms to 49d"),
        ("-1s", "'-1s'"),
    ],
)
def test_says_which_step_is_wrong(text: str, told: str):
    """A text that is no schedule is refused, and the step that is wrong is named."""
    with pytest.raises(ConfigurationError, match=r".") as caught:
        Schedule.parse(text)
    assert told in str(caught.value)


@pytest.mark.parametrize("jitter", [-0.1, 1.0])
def test_refuses_a_jitter_that_is_no_share(jitter: float):
    """Jitter takes away a share of a wait, never all of it."""
    with pytest.raises(ConfigurationError):
        Schedule.parse("10s", jitter=jitter)


def test_waits_in_process_only_first_and_only_up_to_a_second():
    """The first step is waited for in process where it is at most a second; later short ones are rungs of their own."""
    clock = ManualClock()
    short = Schedule.parse("50ms, 100ms*2")
    assert Wait(seconds=0.05, in_process=True) == short.wait(1, clock)
    assert Wait(seconds=0.1, in_process=False) == short.wait(2, clock)
    assert short.wait(4, clock) is None
    assert (0.1,) == short.rungs()
    assert Wait(seconds=1.0, in_process=True) == Schedule.parse("1s, 10s*3").wait(1, clock)
    assert not Schedule.parse("2s", jitter=0).wait(1, clock).in_process


def test_jitter_is_a_choice_between_rungs():
    """A step of a second or more is spent in a rung between half of it and the whole, chosen by chance."""
    schedule = Schedule.parse("50ms, 10s*3, 1m")
    assert (5.0, 7.0, 10.0, 30.0, 45.0, 60.0) == schedule.rungs()
    chosen = {schedule.wait(2, ManualClock(chance=chance)).seconds for chance in (0.0, 0.4, 0.999)}
    assert {5.0, 7.0, 10.0} == chosen
    assert (10.0, 60.0) == Schedule.parse("50ms, 10s*3, 1m", jitter=0).rungs()


def test_names_a_rung_in_its_largest_whole_unit():
    """The name says how long a message stays, exactly."""
    named = {delay: rung_name(delay) for delay in (0.05, 0.1, 1, 1.5, 10, 60, 90, 3600, 86_400)}
    assert {
        0.05: "meshkit.delay.50ms",
        0.1: "meshkit.delay.100ms",
        1: "meshkit.delay.1s",
        1.5: "meshkit.delay.1500ms",
        10: "meshkit.delay.10s",
        60: "meshkit.delay.1m",
        90: "meshkit.delay.90s",
        3600: "meshkit.delay.1h",
        86_400: "meshkit.delay.1d",
    } == named


def test_finds_a_rung_that_is_not_too_short():
    """A wait of any length has a rung of the shared ladder that is at least as long."""
    assert [0.1, 0.1, 0.2, 15.0, 20.0, 86_400.0, 172_800.0] == [
        rung_at_least(delay) for delay in (0.0, 0.1, 0.11, 15.0, 15.1, 50_000.0, 90_000.0)
    ]


@pytest.mark.parametrize(("delay", "rung"), [(math.inf, 49 * 86_400.0), (1e300, 49 * 86_400.0), (math.nan, 0.1)])
def test_there_is_a_rung_for_any_delay(delay: float, rung: float):
    """What a handler asks for may be no length at all, and its message is settled nevertheless."""
    assert rung == rung_at_least(delay)
