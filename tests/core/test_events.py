import asyncio
import json
import logging

import pytest

from meshkit import CircuitOpenError, ConfigurationError
from meshkit.core import events
from meshkit.core.events import CircuitRejected, Event, RetryEnded, emit, error_type, heard, listen


def rejected(source="payments"):
    return CircuitRejected(source=source, retry_after=None)


def test_a_listener_hears_its_kind_until_it_stops():
    """Only events of the kind are heard, subclasses included, and none after the stop."""
    own, every = [], []
    stop_own, stop_every = listen(own.append, kind=CircuitRejected), listen(every.append, kind=Event)
    emit(rejected())
    emit(RetryEnded(source="x", attempts=1, reason="attempts", error_type=""))
    stop_own()
    stop_own()
    emit(rejected())
    stop_every()
    emit(rejected())
    assert (1, 3) == (len(own), len(every))


def test_a_listener_s_error_goes_no_further(caplog):
    """The other listeners still hear, the emitter sees nothing, and the log says so."""
    seen = []

    def fails(event):
        raise RuntimeError("listener")

    stops = [listen(fails, kind=CircuitRejected), listen(seen.append, kind=CircuitRejected)]
    with caplog.at_level(logging.WARNING, "meshkit"):
        emit(rejected())
    for stop in stops:
        stop()
    assert 1 == len(seen)
    assert ["a listener of CircuitRejected failed; the call goes on"] == [record.message for record in caplog.records]


def test_the_same_function_twice_is_two_listeners():
    """Each registration ends by its own stop."""
    seen = []
    first, second = (listen(seen.append, kind=CircuitRejected) for _ in range(2))
    first()
    emit(rejected())
    second()
    assert 1 == len(seen)


def test_nobody_listening_is_known():
    """A hot path can leave out an event that nobody would hear."""
    assert not heard(CircuitRejected)
    stop = listen(lambda event: None, kind=Event)
    assert heard(CircuitRejected)
    stop()
    assert not heard(CircuitRejected)


def test_a_listener_cancels_no_call(caplog):
    """A CancelledError that a listener raises is its own defect, and goes no further."""

    def cancelled(event):
        raise asyncio.CancelledError

    stop = listen(cancelled, kind=CircuitRejected)
    emit(rejected())
    stop()
    assert "a listener of CircuitRejected failed" in caplog.text


def test_a_coroutine_function_is_no_listener():
    """It would never be awaited, so it is refused."""

    async def listener(event): ...

    with pytest.raises(ConfigurationError, match="coroutine function"):
        listen(listener, kind=Event)


class Local(Exception): ...


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (TimeoutError(), "TimeoutError"),
        (CircuitOpenError(policy="x", retry_after=None), "meshkit.CircuitOpenError"),
        (ConfigurationError(), "meshkit.ConfigurationError"),
        (json.JSONDecodeError("", "", 0), "json.decoder.JSONDecodeError"),
        (Local(), f"{__name__}.Local"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_is_named_in_one_way(error, name):
    """Built-in errors without a module, meshkit's own by their public name, others in full."""
    assert name == error_type(error)


def test_a_destructor_may_stop_listening_while_somebody_begins_to():
    """The collector may run a destructor under the lock of `listen`, in the same thread, and that may call a stop."""
    stop = events.listen(lambda event: None, kind=Event)
    with events._lock:
        stop()
    assert not events.heard(Event)
