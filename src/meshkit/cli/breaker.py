"""`meshkit breaker …`: what an operator says to the circuit breakers of a whole fleet, through the store that it shares."""

from __future__ import annotations

import dataclasses
import difflib
import getpass
import os
import re
import socket
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from meshkit.cli.terminal import Stopped, printable, run_to_end, say, show, show_json
from meshkit.errors import ConfigurationError

if TYPE_CHECKING:
    from meshkit.policies.shared_state import SharedState, Switch
    from meshkit.redis import BreakerStore

breaker = typer.Typer(
    help="Look at a fleet's circuit breakers, and force them open.", no_args_is_help=True, rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(help="The breaker, as it is called in metrics and logs.")]
Redis = Annotated[str, typer.Option("--redis", envvar="MESHKIT_REDIS_URL", help="The Redis that the fleet shares.")]
Prefix = Annotated[
    str, typer.Option("--prefix", envvar="MESHKIT_BREAKER_PREFIX", help="What the fleet's keys begin with.")
]
Reason = Annotated[str, typer.Option("--reason", help="Why, for whoever asks: an incident's number.")]
By = Annotated[str, typer.Option("--by", help="Who says so; this user on this machine where left out.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and change nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
DEFAULT_URL = "redis://localhost:6379/0"
DEFAULT_PREFIX = "meshkit"

_LENGTH = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# A year. What is meant to last longer has no known end, and a slip of the keyboard is no date.
_LONGEST = 365 * 86400.0


@breaker.command("list")
def breaker_list(redis: Redis = DEFAULT_URL, prefix: Prefix = DEFAULT_PREFIX, as_json: Json = False) -> None:
    """Show what the store says of each breaker, and which are forced open. Exit code 3 where one is."""
    from meshkit.redis import BreakerStore

    rows = BreakerStore(redis, prefix=prefix).look()
    now = time.time()
    on = [row.switch is not None and row.switch.left(now) > 0 for row in rows]
    if as_json:
        show_json([{**dataclasses.asdict(row), "forced_open": forced} for row, forced in zip(rows, on, strict=True)])
    else:
        width = max([len(row.name) for row in rows], default=7)
        show(f"{'breaker':<{width}}  {'state':<10}  {'failures':>8}  {'opened':<20}  switch")
        for row, forced in zip(rows, on, strict=True):
            opened = "" if row.opened_at is None or row.state == "closed" else _date(row.opened_at)
            failures = "" if row.failures is None else row.failures
            switch = "" if row.switch is None else _told(row.switch, now) if forced else _ended(row.switch)
            said = "; ".join(filter(None, (switch, row.problem)))
            show(f"{row.name:<{width}}  {row.state:<10}  {failures:>8}  {opened:<20}  {said}".rstrip())
    if any(on):
        raise Stopped(3)


@breaker.command("force-open")
def breaker_force_open(
    name: Name,
    length: Annotated[
        str,
        typer.Option(
            "--for", help="For so long (90s, 10m, 1h30m; 365d at most), then they probe; until `release` if left out."
        ),
    ] = "",
    redis: Redis = DEFAULT_URL,
    prefix: Prefix = DEFAULT_PREFIX,
    reason: Reason = "",
    by: By = "",
    anyway: Annotated[bool, typer.Option("--anyway", help="Although no process has such a breaker yet.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Have every process reject the calls that this breaker guards."""
    from meshkit.policies.shared_state import SharedState

    seconds = _seconds(length) if length else None
    store = _store(redis, prefix, name, anyway=anyway, as_json=as_json)
    switches = SharedState(store)
    lasts = "until it is released" if seconds is None else f"for {length}"
    if dry_run:
        _planned(switches, name, f"{name!r} would be forced open {lasts}", as_json=as_json)
        return
    said = by or _myself()
    word = run_to_end(switches.force_open(name, seconds=seconds, reason=reason, by=said))
    _done(name, word, f"{name!r} is forced open {lasts}", ours=word.on and word.by == said, as_json=as_json)


@breaker.command("release")
def breaker_release(
    name: Name,
    redis: Redis = DEFAULT_URL,
    prefix: Prefix = DEFAULT_PREFIX,
    reason: Reason = "",
    by: By = "",
    anyway: Annotated[bool, typer.Option("--anyway", help="Although the store knows no such breaker.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Take a force-open back: the breakers of that name close. Also for a process whose switch the store has lost."""
    from meshkit.policies.shared_state import SharedState

    store = _store(redis, prefix, name, anyway=anyway, as_json=as_json)
    switches = SharedState(store)
    if dry_run:
        _planned(switches, name, f"{name!r} would be released", as_json=as_json)
        return
    said = by or _myself()
    word = run_to_end(switches.release(name, reason=reason, by=said))
    _done(name, word, f"{name!r} is released", ours=not word.on and word.by == said, as_json=as_json)


def _store(redis: str, prefix: str, name: str, *, anyway: bool, as_json: bool) -> BreakerStore:
    from meshkit.redis import BreakerStore

    store = BreakerStore(redis, prefix=prefix)
    names = store.names()
    if name not in names and not anyway:
        # In an outage, a misspelt name that is taken would look like a switch that does not work.
        near = difflib.get_close_matches(name, names, 3, 0.5)
        if as_json:
            show_json({"breaker": name, "switch": None, "written": False, "known": False, "near": near})
        known = "1 other" if len(names) == 1 else f"{len(names) or 'no'} others"
        other = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it knows {known}."
        say(
            f"meshkit: no process that shares {prefix!r} has a breaker {name!r}: {other} --anyway says it all the same."
        )
        raise Stopped(4)
    return store


def _planned(switches: SharedState, name: str, plan: str, *, as_json: bool) -> None:
    before = run_to_end(switches.switch(name))
    if as_json:
        show_json({"breaker": name, "switch": None if before is None else dataclasses.asdict(before), "written": False})
        return
    stands = "nothing was said yet" if before is None else _told(before, time.time())
    say(f"plan: {plan}; as it stands: {stands}")


def _done(name: str, word: Switch, done: str, *, ours: bool, as_json: bool) -> None:
    if as_json:
        show_json({"breaker": name, "switch": dataclasses.asdict(word), "written": ours})
    elif ours:
        show(f"{done}. Processes that follow this store do it within seconds.")
    if not ours:
        say(f"meshkit: somebody else was faster; {name!r} stands as: {_told(word, time.time())}")
        raise Stopped(3)


def _told(word: Switch, now: float) -> str:
    left = word.left(now)
    if not left:
        what = _ended(word)
    elif word.until is None:
        what = "forced open until released"
    else:
        what = f"forced open until {_date(word.until)}, {_rest(left)} left"
    return printable(", ".join(filter(None, (what, f"by {word.by}" if word.by else "", word.reason))))


def _ended(word: Switch) -> str:
    """How a switch that rejects nothing any more came to its end: by its time, or by an operator."""
    return "expired" if word.on else "released"


def _date(when: float) -> str:
    try:
        return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        # The store may hold any number.
        return "after the year 9999" if when > 0 else "before the year 1"


def _rest(seconds: float) -> str:
    if seconds >= 1000 * _LONGEST:
        return "over 1000 years"
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def _seconds(text: str) -> float:
    parts = _LENGTH.findall(text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not seconds:
        raise ConfigurationError(f"--for is a length of time such as 90s, 10m or 1h30m, not {text!r}.")
    if seconds > _LONGEST:
        raise ConfigurationError(
            f"--for is a year (365d) at most, not {text:.40}.",
            "Without it a breaker stays forced open until `release`.",
        )
    return seconds


def _myself() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        # A container's user may have no name.
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
