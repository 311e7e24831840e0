"""Whoever watches is told of each circuit breaker as it is made, so that what holds for its name holds from its first call on."""

from __future__ import annotations

import gc
import threading
import uuid
import weakref
from typing import Any

from meshkit import CircuitBreaker, CircuitBreakers
from meshkit.policies.circuit_breaker import breakers, watch


class Watching:
    """Notes what is made under one name: what it was then, whether it was listed, and in which thread."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self.told: list[tuple[Any, bool, threading.Thread]] = []
        watch(self)

    def made(self, breaker: Any) -> None:
        if breaker.name == self.name:
            state = breaker.state if isinstance(breaker, CircuitBreaker) else type(breaker)
            self.told.append((state, breaker in breakers(), threading.current_thread()))


def test_each_is_told_of_a_breaker_that_is_made() -> None:
    """A breaker is whole and listed when those who watch are told of it, in the thread that makes it."""
    watching = [Watching(), Watching()]
    made = [CircuitBreaker(each.name) for each in watching]
    assert [[("closed", True, threading.main_thread())]] * 2 == [each.told for each in watching]
    thread = threading.Thread(target=lambda: made.append(CircuitBreaker(watching[0].name)))
    thread.start()
    thread.join()
    assert ("closed", True, thread) == watching[0].told[1]
    assert 1 == len(watching[1].told)


def test_per_key_breakers_are_told_of_too() -> None:
    """Per-key breakers are told of once they are whole, and then each breaker of theirs."""
    watching = Watching()
    family = CircuitBreakers(watching.name, key=lambda tenant: tenant)
    assert CircuitBreakers == watching.told[-1][0]
    before = len(watching.told)
    family.get("a")
    family.get("a")
    assert ["closed"] == [state for state, *_ in watching.told[before:]]


def test_a_watcher_that_nobody_holds_is_gone() -> None:
    """To watch keeps nothing alive."""
    watching = Watching()
    alive = weakref.ref(watching)
    del watching
    gc.collect()
    assert alive() is None
    CircuitBreaker("prices")
