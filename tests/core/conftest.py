import pytest

from meshkit.testing.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()
