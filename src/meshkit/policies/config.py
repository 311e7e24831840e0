"""Pipelines by name, from a TOML file, a mapping, or the environment.

    policies = Policies.from_toml("policies.toml")
    users = meshkit.httpx.client("user-service", base_url=…, pipeline=policies.pipeline("user-service"))

```toml
[defaults]                             # for every client that says nothing else
attempt_timeout = "2s"                 # lengths of time: seconds, or a text with a unit (ms, s, m, h, d)
breaker = {open_for = "30s"}

[clients.user-service]                 # a client is known by having a table, if an empty one
total = "5s"
retry = {attempts = 2, on = ["ConnectionError", "httpx.TransportError"], backoff = {first = "50ms"}}
bulkhead = false                       # without this part; `true` is the part as the preset has it

[clients.mailer]
preset = "messaging"                   # `presets.messaging` in place of `presets.standard`
allow = {"breaker-outside-retry" = "why that is wanted here"}
```

A variable is the same path, in capitals, with two underscores between the parts and one for whatever else is no letter
and no digit: `MESHKIT_POLICIES__USER_SERVICE__RETRY__ATTEMPTS=5`, `MESHKIT_POLICIES__USER_SERVICE__BULKHEAD=false`,
`MESHKIT_POLICIES__DEFAULTS__TOTAL=8s`; a list has commas between.

What is said of a client goes before what is said of all (`defaults`); of each, an argument (`overrides=`) before the
environment, the environment before the file, the file before the preset. A part's keywords are joined, so that an
override names only what differs. Values of `defaults` are checked also where no client is made from them.
"""

from __future__ import annotations

import builtins
import copy
import difflib
import functools
import importlib
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self, cast

from meshkit.core.clock import SYSTEM_CLOCK, Clock, check_clock
from meshkit.core.explain import Explanation, nearest
from meshkit.core.pipeline import Pipeline
from meshkit.core.settings import seconds
from meshkit.errors import ConfigurationError
from meshkit.policies import presets
from meshkit.policies.bulkhead import Bulkhead
from meshkit.policies.circuit_breaker import CircuitBreaker
from meshkit.policies.fallback import Fallback
from meshkit.policies.hedge import Hedge
from meshkit.policies.rate_limiter import RateLimiter
from meshkit.policies.retry import Backoff, Retry
from meshkit.policies.retry_budget import RetryBudget

PREFIX: Final = "MESHKIT_POLICIES__"
DEFAULTS: Final = "defaults"

# -- one value --------------------------------------------------------------------------------------------------------
#
# Each takes what stands in a file, or a text from the environment, and raises ValueError with what would be right.

Parse = Callable[[object, bool], Any]


# No policy counts further, and Python itself writes and converts no number of any length.
_DIGITS: Final = 18


def _whole(value: object, text: bool) -> int:
    if text and (digits := re.fullmatch(r"([+-]?)0*(\d+)", str(value))):
        # One digit more than there may be says as much as all of them.
        value = int(digits[1] + digits[2][: _DIGITS + 1])
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("it is a whole number: 3")
    if abs(value) >= 10**_DIGITS:
        raise ValueError(f"it is a whole number of up to {_DIGITS} digits")
    return value


def _number(value: object, text: bool) -> float:
    if text:
        try:
            return float(str(value))
        except ValueError:
            pass
    elif isinstance(value, int | float) and not isinstance(value, bool):
        return _float(value)
    raise ValueError("it is a number: 0.5")


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        # A whole number of hundreds of digits.
        raise ValueError("it is a number that no clock and no policy counts to") from None


def _length(value: object, text: bool) -> float:
    if isinstance(value, str):
        return seconds(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _float(value)
    raise ValueError('it is a length of time: a number of seconds, "10s", "250ms"')


def _some_time(value: object, text: bool) -> float:
    length = _length(value, text)
    # Said so that NaN is refused too.
    if not 0 < length < math.inf:
        raise ValueError("it is how long a call may take, so above 0, or false for no limit")
    return length


def _switch(value: object, text: bool) -> bool:
    if text:
        value = {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
        }.get(str(value).lower())
    if isinstance(value, bool):
        return value
    raise ValueError("it is true or false")


def _off(value: object, text: bool) -> bool:
    return value is False or (text and str(value).lower() in ("false", "off", "no"))


def _or_off(parse: Parse, value: object, text: bool) -> Any:
    return None if _off(value, text) else parse(value, text)


def _word(words: tuple[str, ...], value: object, text: bool) -> str:
    if value in words:
        return str(value)
    near = f". {nearest(value, words)}" if isinstance(value, str) and difflib.get_close_matches(value, words) else ""
    raise ValueError(f"it is {' or '.join(map(repr, words))}{near}")


def _text(value: object, text: bool) -> str:
    if isinstance(value, str):
        return value
    raise ValueError('it is a text: "last-known-price"')


def _answer(value: object, text: bool) -> Any:
    # Everybody who is answered gets a list or a table of their own.
    return (lambda outcome: copy.deepcopy(value)) if isinstance(value, list | dict) else value


def _errors(value: object, text: bool) -> tuple[type[Exception], ...]:
    names: object = (
        [name.strip() for name in str(value).split(",")] if text else [value] if isinstance(value, str) else value
    )
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) for name in cast("list[object]", names))
    ):
        raise ValueError('it lists exception classes by name: ["ConnectionError", "httpx.TransportError"]')
    return tuple(_error(name) for name in cast("list[str]", names))


def _error(name: str) -> type[Exception]:
    module, dot, last = name.rpartition(".")
    if name.startswith("."):
        raise ValueError(f'{name!r} is no name from the top: "httpx.TransportError"')
    try:
        found: object = getattr(importlib.import_module(module) if dot else builtins, last, None)
    except ImportError as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from error
    except Exception as error:
        # A module runs when it is imported, and may fail with anything.
        raise ValueError(f"{name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Exception)):
        raise ValueError(f'{name!r} is no exception class; it is named as it is imported: "httpx.TransportError"')
    return found


# -- what can be said of a client -------------------------------------------------------------------------------------

Keys = Mapping[str, Any]
_or_off_length: Final = functools.partial(_or_off, _length)

# Each part's keywords; what cannot stand in a file (functions, tenacity's and pybreaker's objects, clocks) is given in
# Python. A test holds this against the signatures.
PARTS: Final[Mapping[str, Mapping[str, Parse | Mapping[str, Parse]]]] = {
    "fallback": {"answer": _answer, "name": _text, "on": _errors},
    "retry": {
        "attempts": _whole,
        "on": _errors,
        "within": _or_off_length,
        "patient": _switch,
        "backoff": {
            "first": _length,
            "factor": _number,
            "most": _length,
            "jitter": functools.partial(_word, ("full", "equal", "decorrelated", "none")),
        },
    },
    "budget": {"ratio": _number, "window": _length, "at_least": _whole},
    "hedge": {"delay": _length, "attempts": _whole},
    "breaker": {
        "failure_rate": _number,
        "min_calls": _whole,
        "window": _whole,
        "window_for": _length,
        "slow_after": _or_off_length,
        "slow_rate": _number,
        "open_for": _length,
        "open_backoff": _number,
        "open_at_most": _length,
        "heed_retry_after": _switch,
        "probes": _whole,
        "concurrent_probes": _whole,
        "probe_for": _length,
        "half_open_by_timer": _switch,
        "ignore": _errors,
        "shadow": _switch,
    },
    "rate_limiter": {"permits": _whole, "per": _length, "burst": _whole, "wait": _or_off_length},
    "bulkhead": {"limit": _whole, "queue": _whole, "wait": _or_off_length},
}
_LENGTHS: Final = ("total", "attempt_timeout")
_PRESETS: Final = ("standard", "messaging")
_KEYS: Final = ("preset", *_LENGTHS, *PARTS, "allow")
# Of these, what a client says takes the place of what `defaults` say: a breaker has one window.
_INSTEAD: Final[Mapping[tuple[str, ...], tuple[str, ...]]] = {
    ("breaker", "window"): ("breaker", "window_for"),
    ("breaker", "window_for"): ("breaker", "window"),
}
# What the messaging preset leaves out on purpose is not brought back by what is said of all clients.
_LEFT_OUT: Final[Mapping[str, frozenset[str]]] = {
    "standard": frozenset(),
    "messaging": frozenset({"total", "retry", "budget", "hedge", "bulkhead"}),
}
# What a part, or a value of it, cannot be without: for looking at the rest of it where no client says that.
_NEEDED: Final[Mapping[str, Mapping[str, Any]]] = {
    "fallback": {"answer": None},
    "breaker": {"slow_after": 1.0},
    "hedge": {"delay": 0.0},
    "rate_limiter": {"permits": 1},
}
# No value is shown at greater length, in characters.
_SHOWN: Final = 200
# A name is taken for a misspelt one when it is so much like one that is known.
_ALIKE: Final = 0.8


@dataclass(frozen=True, slots=True)
class _Given:
    """A value that somebody gave, and where."""

    value: Any
    where: str


@dataclass(slots=True)
class _Layer:
    """All that one source says, by client (`defaults` apart) and path; and what in it is wrong."""

    defaults: dict[tuple[str, ...], _Given] = field(default_factory=dict[tuple[str, ...], _Given])
    clients: dict[str, dict[tuple[str, ...], _Given]] = field(default_factory=dict[str, dict[tuple[str, ...], _Given]])


class Policies:
    """Pipelines by name. Each is made once, so that all who ask for it share its breaker, its budget and its places.

    Make it with `from_toml`, `from_mapping` or `from_env`; everything that is wrong in any of the sources is said in one
    `ConfigurationError`, each with its path and with what would be right.
    """

    __slots__ = ("_pipelines",)

    def __init__(self, pipelines: Mapping[str, Pipeline]) -> None:
        self._pipelines = dict(pipelines)

    def __repr__(self) -> str:
        return f"Policies({', '.join(self.names)})"

    @classmethod
    def from_toml(
        cls,
        path: str | os.PathLike[str],
        *,
        overrides: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> Self:
        """Read a file.

        Args:
            path: a TOML file with `[defaults]` and `[clients.<name>]`.
            overrides: what goes before everything else, in the form of the file. A client that the file does not name is
                added, unless its name is so near to one of those that it looks misspelt.
            environ: the environment; that of the process where left out.
            clock: where all policies have time and chance from.

        Raises:
            ConfigurationError: the file cannot be read, or something in it cannot work.
        """
        if not isinstance(cast("object", path), str | os.PathLike):
            raise ConfigurationError(
                f"policies are read from a file by its path, not from {path!r}.",
                "from_mapping takes what it would hold.",
            )
        try:
            with Path(path).open("rb") as file:
                read = tomllib.load(file)
        except OSError as error:
            raise ConfigurationError(f"policies cannot be read from {os.fspath(path)!r}: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            # Not only a TOMLDecodeError: bytes that are no text, a number of thousands of digits, tables without end.
            raise ConfigurationError(f"{os.fspath(path)} is no TOML: {error}.") from error
        return cls._made([(f"{os.fspath(path)}: ", read)], (), overrides, environ, clock)

    @classmethod
    def from_mapping(
        cls,
        mapping: Mapping[str, object],
        *,
        overrides: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> Self:
        """Take what a file would hold from a mapping, of a settings library, say.

        Args:
            mapping: `{"defaults": {…}, "clients": {"user-service": {…}}}`.
            overrides, environ, clock: as `from_toml` takes them.

        Raises:
            ConfigurationError: something in it cannot work.
        """
        return cls._made([("", mapping)], (), overrides, environ, clock)

    @classmethod
    def from_env(
        cls,
        *names: str,
        overrides: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> Self:
        """Take everything from the environment.

        Args:
            names: the clients there are. Where left out, those that variables name: `USER_SERVICE` is `user-service`.
            overrides, environ, clock: as `from_toml` takes them.

        Raises:
            ConfigurationError: a variable that cannot work.
        """
        return cls._made([], names, overrides, environ, clock)

    @classmethod
    def _made(
        cls,
        files: list[tuple[str, Mapping[str, object]]],
        names: tuple[str, ...],
        overrides: Mapping[str, object] | None,
        environ: Mapping[str, str] | None,
        clock: Clock,
    ) -> Self:
        check_clock(clock)
        problems: list[str] = []
        problems.extend(
            f'{name!r} names no client: each name is a text of its own, from_env("users", "mail").'
            for name in names
            if not _is_name(name)
        )
        names = tuple(filter(_is_name, names))
        variables: object = os.environ if environ is None else environ
        if not isinstance(variables, Mapping):
            problems.append(f"environ is {_shown(variables)}: it is the variables by name, as os.environ is.")
            variables = {}
        low = [_read(mapping, where, problems) for where, mapping in files]
        high = [] if overrides is None else [_read(overrides, "overrides: ", problems)]
        known = dict.fromkeys((*names, *(name for layer in low for name in layer.clients)))
        for layer in high:
            _check_known(layer, known, problems)
        clients = dict.fromkeys((*known, *(name for layer in high for name in layer.clients)))
        from_env = _read_variables(cast("Mapping[str, str]", variables), tuple(clients), not (files or names), problems)
        clients.update(dict.fromkeys(from_env.clients))
        layers = [*low, from_env, *high]
        pipelines: dict[str, Pipeline] = {}
        used: set[int] = set()
        for name in clients:
            made = _pipeline(name, layers, clock, problems, used)
            if made is not None:
                pipelines[name] = made
        _check_unused(layers, clock, problems, used)
        # Defaults are wrong once, not once a client.
        problems = list(dict.fromkeys(problems))
        if len(problems) == 1:
            raise ConfigurationError(problems[0])
        if problems:
            lines = "\n  ".join(problems)
            raise ConfigurationError(f"{len(problems)} settings of policies cannot work:\n  {lines}")
        return cls(pipelines)

    @property
    def names(self) -> tuple[str, ...]:
        """The clients there are, in the order they were named."""
        return tuple(self._pipelines)

    def pipeline(self, name: str) -> Pipeline:
        """The pipeline of a client: the same object each time.

        Raises:
            ConfigurationError: nobody has named such a client.
        """
        found = self._pipelines.get(name)
        if found is None:
            raise ConfigurationError(
                f"there are no policies for {name!r}.",
                f"{nearest(name, self._pipelines)} A client is known by its table: [clients.{name}].",
            )
        return found

    def explain(self) -> dict[str, Explanation]:
        """What each pipeline can come to, by client."""
        return {name: pipeline.explain() for name, pipeline in self._pipelines.items()}


# -- reading a source -------------------------------------------------------------------------------------------------


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name)


def _read(mapping: object, where: str, problems: list[str]) -> _Layer:
    """What a file says. All that is wrong goes to `problems`, and reading goes on."""
    layer = _Layer()
    for key, value in _table(mapping, where.removesuffix(": ") or "the mapping", problems).items():
        if key == DEFAULTS:
            table = _table(value, f"{where}{DEFAULTS}", problems)
            layer.defaults = dict(_client(table, f"{where}{DEFAULTS}", problems))
        elif key == "clients":
            for name, said in _table(value, f"{where}clients", problems).items():
                path = f"{where}clients.{name}"
                if not _is_name(name):
                    problems.append(f"{where}clients has a table {name!r}, and a client's name is a text.")
                    continue
                layer.clients[name] = dict(_client(_table(said, path, problems), path, problems))
        else:
            problems.append(f"{where}{key} is nothing there is. {nearest(str(key), (DEFAULTS, 'clients'))}")
    return layer


def _check_known(layer: _Layer, known: Mapping[str, None], problems: list[str]) -> None:
    """Take out of overrides what is about a client that is there by nearly that name: what it was to change would stay
    as it is, and nobody would notice."""
    for name in [name for name in layer.clients if name not in known]:
        if difflib.get_close_matches(name, known, cutoff=_ALIKE):
            del layer.clients[name]
            problems.append(
                f"overrides: clients.{name} is about no client. {nearest(name, known)} A further one with a name so much"
                " alike is named where those are."
            )


def _table(value: object, where: str, problems: list[str]) -> Mapping[str, object]:
    if isinstance(value, Mapping):
        return cast("Mapping[str, object]", value)
    problems.append(f"{where} is {_shown(value)}: it is a table.")
    return {}


def _client(table: Mapping[str, object], where: str, problems: list[str]) -> Iterator[tuple[tuple[str, ...], _Given]]:
    for key, value in table.items():
        path = f"{where}.{key}"
        if key in PARTS and isinstance(value, Mapping):
            yield from _part((key,), PARTS[key], cast("Mapping[str, object]", value), path, problems)
            # A table switches its part on, if an empty one.
            yield (key,), _Given(True, path)
        elif key == "allow":
            for finding, reason in _table(value, path, problems).items():
                yield ("allow", finding), _Given(reason, f"{path}.{finding}")
        else:
            yield from _one((key,), value, path, False, problems)


def _part(
    path: tuple[str, ...],
    keys: Mapping[str, Parse | Mapping[str, Parse]],
    table: Mapping[str, object],
    where: str,
    problems: list[str],
) -> Iterator[tuple[tuple[str, ...], _Given]]:
    for key, value in table.items():
        inner = keys.get(key)
        if isinstance(inner, Mapping):
            yield from _part((*path, key), inner, _table(value, f"{where}.{key}", problems), f"{where}.{key}", problems)
        else:
            yield from _one((*path, key), value, f"{where}.{key}", False, problems)


def _one(
    path: tuple[str, ...], value: object, where: str, text: bool, problems: list[str]
) -> Iterator[tuple[tuple[str, ...], _Given]]:
    parse = _parser(path)
    if isinstance(parse, str):
        problems.append(f"{where} is nothing there is. {parse}".rstrip())
        return
    try:
        yield path, _Given(parse(value, text), where)
    except ValueError as error:
        problems.append(f"{where} is {_shown(value)}: {_sentence(str(error))}")


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:
        # A number of thousands of digits, for one.
        return f"an object of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


def _parser(path: tuple[str, ...]) -> Parse | str:
    """How the value at `path` is read; or, where there is nothing, what there is instead."""
    if len(path) == 1:
        if path[0] in _LENGTHS:
            return functools.partial(_or_off, _some_time)
        if path[0] == "preset":
            return functools.partial(_word, _PRESETS)
        return _part_switch if path[0] in PARTS else nearest(str(path[0]), _KEYS)
    keys: Parse | Mapping[str, Any] = PARTS
    known: Mapping[str, Any] = dict.fromkeys(_KEYS)
    if path[0] in known and path[0] not in PARTS:
        return f"{path[0]} is one value."
    for key in path:
        if not isinstance(keys, Mapping):
            return ""
        if key not in keys:
            return nearest(str(key), known)
        keys = cast("Parse | Mapping[str, Any]", keys[key])
        known = cast("Mapping[str, Any]", keys)
    return _only_table if isinstance(keys, Mapping) else keys


def _only_table(value: object, text: bool) -> bool:
    raise ValueError("it is a table")


def _part_switch(value: object, text: bool) -> bool:
    try:
        return _switch(value, text)
    except ValueError:
        raise ValueError("it is a table, or false to go without, or true for the preset's own") from None


def _variable(name: str) -> str:
    return re.sub(r"[^A-Z0-9]+", "_", name.upper())


def _read_variables(environ: Mapping[str, str], names: tuple[str, ...], any_name: bool, problems: list[str]) -> _Layer:
    layer = _Layer()
    known = {DEFAULTS.upper(): layer.defaults}
    for name in names:
        if _variable(name) in known:
            problems.append(f"client {name!r} and another one (or defaults) are both {_variable(name)} in variables.")
        known[_variable(name)] = layer.clients.setdefault(name, {})
    for variable in sorted(name for name in environ if isinstance(cast("object", name), str)):
        given: object = environ[variable]
        if not isinstance(given, str):
            if variable.startswith(PREFIX):
                problems.append(f"{variable} is {_shown(given)}: a variable is a text.")
            continue
        text = given.strip()
        # An empty variable counts as not set, as everywhere in meshkit.
        if not variable.startswith(PREFIX) or not text:
            continue
        client, *keys = variable.removeprefix(PREFIX).split("__")
        said = known.get(client)
        if said is None:
            if not client:
                problems.append(f"{variable} names no client. It begins like {PREFIX}USER_SERVICE__TOTAL.")
                continue
            # Not as a client: nobody has given a name to any, and its settings would hold for none there is.
            if any_name and difflib.get_close_matches(client, [DEFAULTS.upper()], cutoff=_ALIKE):
                problems.append(f"{variable} is about no client. Did you mean {DEFAULTS.upper()}?")
                continue
            if not any_name:
                problems.append(f"{variable} is about no client. {nearest(client, known)}")
                continue
            said = known[client] = layer.clients.setdefault(client.lower().replace("_", "-"), {})
        path = tuple(key.lower() for key in keys)
        if not path:
            problems.append(f"{variable} names no setting. It ends like {PREFIX}{client}__RETRY__ATTEMPTS.")
        elif path[0] == "allow" and len(path) != 2:
            problems.append(
                f"{variable} names no finding. It ends like {PREFIX}{client}__ALLOW__JITTER_OFF, and holds the reason."
            )
        elif path[0] == "allow":
            said["allow", path[1].replace("_", "-")] = _Given(text, variable)
        else:
            found = list(_one(path, text, variable, True, problems))
            if len(path) > 1 and found:
                # As a table in a file does; a switch of its own, which sorts before it, is kept.
                said.setdefault(path[:1], _Given(True, variable))
            said.update(found)
    return layer


# -- making a pipeline ------------------------------------------------------------------------------------------------


def _pipeline(name: str, layers: list[_Layer], clock: Clock, problems: list[str], used: set[int]) -> Pipeline | None:
    """One client's pipeline; `None` where something is wrong. What it is made from goes to `used`, by its id."""
    own = [layer.clients.get(name, {}) for layer in layers]
    preset: Literal["standard", "messaging"] = "standard"
    for said in (*(layer.defaults for layer in layers), *own):
        if ("preset",) in said:
            preset = said["preset",].value
    given: dict[tuple[str, ...], _Given] = {}
    for layer in layers:
        left_out = _LEFT_OUT[preset]
        _lay(given, {path: one for path, one in layer.defaults.items() if len(path) != 1 or path[0] not in left_out})
    for said in own:
        _lay(given, said)
    making = _Making(name, preset, given, clock, problems)
    # What defaults say of a budget is for whoever has a use for it; what a client says is meant.
    budget = next((said["budget",] for said in reversed(own) if ("budget",) in said), None)
    if budget is not None and budget.value and not (making.has("retry") or making.has("hedge")):
        problems.append(f"{budget.where} bounds retries and hedges, and client {name!r} has neither: leave it out.")
    made = making.pipeline()
    used.update(making.used)
    return made


def _check_unused(layers: list[_Layer], clock: Clock, problems: list[str], used: set[int]) -> None:
    """Say what is wrong with those defaults that no client is made from."""
    given: dict[tuple[str, ...], _Given] = {}
    for layer in layers:
        _lay(given, layer.defaults)
    _Making(DEFAULTS, "standard", given, clock, problems).check(used)


def _lay(given: dict[tuple[str, ...], _Given], said: Mapping[tuple[str, ...], _Given]) -> None:
    """Put what one source says over what those below it say."""
    for path in said:
        instead = _INSTEAD.get(path)
        # Both of them in one source contradict each other, and the policy says so.
        if instead is not None and instead not in said:
            given.pop(instead, None)
    given.update(said)


class _Making:
    """One client's pipeline, from what was given in all."""

    def __init__(
        self,
        name: str,
        preset: Literal["standard", "messaging"],
        given: dict[tuple[str, ...], _Given],
        clock: Clock,
        problems: list[str],
    ) -> None:
        self._name = name
        self._preset = preset
        self._given = given
        self._clock = clock
        self._problems = problems
        # Ids of the values that parts were made with.
        self.used: set[int] = set()

    def has(self, part: str) -> bool:
        """Whether there is a retry, say, in what is made."""
        switch = self._given.get((part,))
        return self._preset == "standard" and part == "retry" if switch is None else bool(switch.value)

    def pipeline(self) -> Pipeline | None:
        before = len(self._problems)
        options: dict[str, Any] = {
            key: given.value for key in _LENGTHS if (given := self._given.get((key,))) is not None
        }
        for part in PARTS:
            if part not in ("budget", "retry", "hedge"):
                self._add(options, part)
        # Retries and hedges draw on one budget.
        self._add(options, "budget")
        if "budget" in options:
            budget = cast("RetryBudget | None", options.pop("budget"))
        else:
            budget = presets.budget_of(self._name, self._clock)
        self._add(options, "retry", budget)
        self._add(options, "hedge", budget)
        if self._preset == "standard" and ("retry",) not in self._given:
            options["retry"] = self._retry(dict(presets.KEYWORDS["retry"]), budget)
        allow = {path[1]: given.value for path, given in self._given.items() if path[0] == "allow"}
        if len(self._problems) > before:
            return None
        make_all = presets.standard if self._preset == "standard" else presets.messaging
        try:
            return make_all(self._name, **options, allow=allow, clock=self._clock)
        except ConfigurationError as error:
            self._wrong(error, "allow" if "allow" in error.cause else "")
            return None

    def check(self, used: set[int]) -> None:
        """Make each part that has values which are in no client's, and say what is wrong with those."""
        for part in PARTS:
            values = [given for path, given in self._given.items() if path[0] == part and len(path) > 1]
            if all(id(given) in used for given in values):
                continue
            try:
                self._make(part, {**_NEEDED.get(part, {}), **self._keys(part)}, None)
            except ConfigurationError as error:
                # What a client is made from, it makes sense of together with its own.
                if not any(id(given) in used for given in self._named(error, part) or values):
                    self._wrong(error, part)

    def _add(self, options: dict[str, Any], part: str, budget: RetryBudget | None = None) -> None:
        """Make a part, where anything is said of it."""
        switch = self._given.get((part,))
        if switch is None:
            return
        if not switch.value:
            options[part] = None
            return
        self.used.update(id(given) for path, given in self._given.items() if path[0] == part)
        try:
            options[part] = self._make(part, self._keys(part), budget)
        except ConfigurationError as error:
            self._wrong(error, part)
        except TypeError as error:
            # A keyword that has no default of its own was not given.
            missing = re.findall(r"'(\w+)'", str(error))
            if not missing:
                raise
            self._problems.append(f"{switch.where} needs {' and '.join(missing)}.")

    def _keys(self, part: str) -> dict[str, Any]:
        """The keywords of a part."""
        given = {path[1]: one.value for path, one in self._given.items() if path[0] == part and len(path) == 2}
        return {**presets.KEYWORDS.get(part, {}), **given}

    def _make(self, part: str, keys: dict[str, Any], budget: RetryBudget | None) -> object:
        match part:
            case "fallback":
                return Fallback(**keys)
            case "budget":
                return RetryBudget(self._name, **keys, clock=self._clock)
            case "retry":
                return self._retry(keys, budget)
            case "hedge":
                return Hedge(**keys, budget=budget, clock=self._clock)
            case "breaker":
                return CircuitBreaker(self._name, **keys, clock=self._clock)
            case "rate_limiter":
                return RateLimiter(self._name, **keys, clock=self._clock)
            case _:
                return Bulkhead(self._name, **keys, clock=self._clock)

    def _retry(self, keys: dict[str, Any], budget: RetryBudget | None) -> Retry:
        waits = {path[2]: given.value for path, given in self._given.items() if path[:2] == ("retry", "backoff")}
        if waits:
            keys["backoff"] = Backoff(**waits)
        return Retry(**keys, budget=budget, clock=self._clock)

    def _named(self, error: ConfigurationError, part: str) -> list[_Given]:
        """The values that a policy's own complaint is about."""
        words = set(re.findall(r"\w+", error.cause.partition(",")[0]))
        return [given for path, given in self._given.items() if path[0] == part and len(path) > 1 and path[-1] in words]

    def _wrong(self, error: ConfigurationError, part: str) -> None:
        """Say of a policy's own complaint where the value stands that it is about."""
        switch = self._given.get((part,))
        where = " and ".join(given.where for given in self._named(error, part)) or (
            switch.where if switch is not None else f"client {self._name!r}"
        )
        self._problems.append(f"{where}: {error.cause} {error.remedy}".rstrip())
