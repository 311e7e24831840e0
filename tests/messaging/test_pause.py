"""The pause: flowing, paused, probing."""

import math

import pytest

from meshkit.messaging.consumer import Pause


def test_a_rejection_pauses_for_as_long_as_was_said():
    """Nothing is taken until the time is over."""
    pause = Pause()
    assert pause.rejected(15.0, now=100.0)
    assert ("paused", 15.0, 5.0, 0.0) == (pause.state, pause.left(100.0), pause.left(110.0), pause.left(120.0))


def test_further_rejections_only_prolong():
    """What was in hand when the pause began may say that it takes longer, never that it takes less."""
    pause = Pause()
    pause.rejected(15.0, now=100.0)
    assert not pause.rejected(2.0, now=101.0)
    assert 14.0 == pause.left(101.0)
    assert not pause.rejected(20.0, now=101.0)
    assert 20.0 == pause.left(101.0)


def test_a_probe_that_passes_resumes():
    """One message that was not rejected is enough, and the whole length of the pause is told once."""
    pause = Pause()
    pause.rejected(15.0, now=100.0)
    pause.probe()
    assert ("probing", 0.0) == (pause.state, pause.left(115.0))
    assert 16.0 == pause.passed(116.0)
    assert "flowing" == pause.state
    assert pause.passed(117.0) is None


def test_a_probe_that_is_rejected_pauses_again():
    """The pause goes on, and is told as one from its beginning."""
    pause = Pause()
    pause.rejected(15.0, now=100.0)
    pause.probe()
    assert pause.rejected(15.0, now=116.0)
    assert 15.0 == pause.left(116.0)
    pause.probe()
    assert 31.5 == pause.passed(131.5)


def test_where_nobody_says_how_long_each_pause_is_longer():
    """One second, then two, four, up to thirty; a good end begins anew."""
    pause = Pause()
    lengths = []
    for _ in range(7):
        pause.rejected(-1.0, now=0.0)
        lengths.append(pause.left(0.0))
        pause.probe()
    assert [1, 2, 4, 8, 16, 30, 30] == lengths
    pause.passed(0.0)
    pause.rejected(-1.0, now=0.0)
    assert 1.0 == pause.left(0.0)


def test_a_pause_is_never_without_length():
    """A rejection that says "at once" would otherwise be a loop."""
    pause = Pause()
    pause.rejected(0.0, now=0.0)
    assert pause.left(0.0) > 0


@pytest.mark.parametrize(
    ("retry_after", "left"), [(0.0, 0.05), (1e12, 86_400.0), (math.inf, 86_400.0), (math.nan, 0.05)]
)
def test_a_pause_is_no_shorter_and_no_longer_than_makes_sense(retry_after: float, left: float):
    """What a rejection says about the time is kept within bounds: it is neither a loop nor for ever."""
    pause = Pause()
    pause.rejected(retry_after, 0.0)
    assert left == pause.left(0.0)
