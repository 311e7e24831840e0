"""What `./run bench policies` says of meshkit's own policies, and that a library which is not there is left out."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import benchmarks
from benchmarks import policies
from benchmarks.__main__ import _drawn

ROOT = Path(__file__).parents[2]
OURS = ("meshkit breaker", "meshkit retry")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no other library is installed."""
    for table in ("BREAKERS", "RETRIES", "REGISTRIES"):
        ours = {name: made for name, made in getattr(policies, table).items() if name in OURS}
        monkeypatch.setattr(policies, table, ours)


@pytest.mark.once
@pytest.mark.usefixtures("alone")
def test_the_behaviour_beside_the_speed_is_what_the_pages_promise() -> None:
    """One of 20 callers probes, a cancelled call counts as nothing and stays cancelled, 3 attempts are 3, the last error is
    the error itself, 10,000 rejections leave nothing behind, and of 10,000 keys the bound is kept, an open one among them.
    """
    told = policies.behaviour()
    assert [
        {
            "breaker": "meshkit breaker",
            "opens after": 10,
            "of 20 at half-open": 1,
            "a cancelled call": "counts as nothing",
            "the caller sees": "CancelledError",
            "traceback grows by": 0,
            "memory grows by KiB": 0,
        }
    ] == told["breakers"]
    assert [
        {
            "retry": "meshkit retry",
            "attempts of 3": 3,
            "raises": "the error itself",
            "attempts of a cancelled call": 1,
            "its caller sees": "CancelledError",
        }
    ] == told["retries"]
    assert [{"a breaker a key": "meshkit breaker", "kept of 10,000": 1000, "an open one is": "kept"}] == told[
        "registries"
    ]


def test_a_library_that_is_not_there_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are not measured, its behaviour is not asked for, and the table of versions names it."""
    away = policies.Peer(distribution="no-such-library", guard=policies.BREAKERS["hyx"].guard, guard_sync=None)
    monkeypatch.setattr(policies, "BREAKERS", {"meshkit breaker": policies.BREAKERS["meshkit breaker"], "away": away})
    assert ["meshkit breaker"] == [*policies._installed(policies.BREAKERS)]
    assert {"library": "no-such-library", "version": "not installed, left out"} in policies._versions()
    rows = [benchmarks.Row(what="away, closed", against="there", target=None)]
    assert [] == benchmarks.present(rows, {"there": lambda: 1.0})


def test_a_row_with_a_target_is_never_left_out() -> None:
    """Where a target cannot be measured, the bench fails instead of saying nothing."""
    row = benchmarks.Row(what="away, closed", against="there", target=1.0)
    with pytest.raises(KeyError):
        benchmarks.compare(benchmarks.present([row], {"there": lambda: 1.0}), {"there": lambda: 1.0}, rounds=1)


def test_every_row_names_contenders_that_there_are() -> None:
    """No row without a target is lost to a misspelt name: with all libraries installed, each of them is measured."""
    named = {name for row in policies.ROWS for name in (row.what, row.against)}
    states = {
        *(f"{name}, {state}" for name in policies.BREAKERS for state in ("closed", "open")),
        *(f"{name}, {state}, sync" for name in policies.BREAKERS for state in ("closed", "open")),
        *(f"{name}, {state}" for name in policies.RETRIES for state in ("nothing fails", "two failures")),
        *(f"{name}, nothing fails, sync" for name in policies.RETRIES),
    }
    traced = {f"{name}, traced" for name in states if name.startswith(OURS)}
    assert set() == named - states - traced - {"bare call", "bare raise", "bare raise, sync"}


def test_every_library_can_be_installed_by_an_extra() -> None:
    """What is measured beside meshkit is a dependency, of the tests or of the bench: `./run bench policies` installs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {re.split(r"[\[<>=]", each)[0] for each in [*project["dependencies"], *extras["test"], *extras["bench"]]}
    peers = {peer.distribution for peer in [*policies.BREAKERS.values(), *policies.RETRIES.values()]}
    assert set() == peers - wanted - {"", "meshkit-py"}


def test_a_table_is_drawn_in_columns() -> None:
    """What the rows call their values stands on top, each value below it."""
    assert "name  count\na     1\nlong  20" == _drawn([{"name": "a", "count": 1}, {"name": "long", "count": 20}])
