"""What a pipeline can come to at its worst, and what in it works against itself: read from what its policies say.

Everything here works on `describe()`: a dict with the `kind` of the policy and its settings in seconds and numbers. What
is read of each kind:

| kind            | read                                                                                             |
|-----------------|--------------------------------------------------------------------------------------------------|
| retry           | `attempts` (`None`: nobody can say; infinity: nothing ends it), `seconds` (`None`: no limit), `waits` (seconds of all waits together, `None`: nobody can say), `jitter` (`False`: off), `patient`, `on` (names of error classes), `rule` (the setting that says what is retried, `None`: the edge does) |
| timeout         | `seconds` or `total`                                                                             |
| hedge           | `attempts`, `delay`                                                                              |
| bulkhead        | `limit`, `wait`                                                                                  |
| rate_limiter    | `wait`                                                                                           |
| circuit_breaker | `name`, `slow_after`, `open_for`, `open_at_most`                                                 |
| fallback        | `on` (names of error classes; empty: all); by meshkit.httpx also `last_good` (`None`: keeps nothing) |
| pipeline        | `name`, `policies`, `allow`                                                                      |
| any other       | `attempts`, where it calls more than once                                                        |

A policy of a user's own takes part by saying the same.
"""

from __future__ import annotations

import difflib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

from meshkit.errors import ConfigurationError

_log = logging.getLogger("meshkit")

# Every finding there is. An edge that has rules of its own adds its ids here, as its events stand in core/events.py.
FINDINGS: Final[dict[str, str]] = {
    "fallback-inside-retry": "a fallback hides failures from the retry around it",
    "fallback-inside-breaker": "a fallback hides failures from the circuit breaker around it",
    "fallback-never-used": "a fallback around another one that answers everything",
    "breaker-outside-retry": "a circuit breaker judges whole calls, not attempts",
    "same-breaker-name": "two circuit breakers of one name in one pipeline",
    "slow-never-seen": "a circuit breaker's slow_after is longer than a call can take",
    "bulkhead-outside-retry": "a bulkhead's place is held during the waits of a retry",
    "bulkhead-never-full": "a bulkhead inside one that lets no more through",
    "rate-limiter-outside-retry": "attempts of a retry are made past the rate limiter",
    "retry-inside-retry": "attempts of nested retries multiply",
    "retry-unbounded": "a retry that nothing ends",
    "jitter-off": "callers that failed together try again together",
    "attempts-exceed-total": "the last attempts do not fit into the time",
    "attempt-timeout-outside-retry": "a timeout for an attempt is around all of them",
    "total-inside-retry": "a total timeout bounds one attempt only",
    "timeout-never-fires": "a timeout that another one always comes before",
    "hedge-never-starts": "the call is over before its hedge would begin",
    # Of meshkit.httpx.
    "unsafe-method-retried": "a retry repeats a POST that has no idempotency key",
}

# Errors that a retry does not try again anyway: a fallback for these alone hides nothing from it.
_REFUSALS: Final = frozenset(
    {"RejectedError", "CircuitOpenError", "BulkheadFullError", "RateLimitedError", "DeadlineTooCloseError"}
)
# Kinds that take no time of their own and call once.
_TIMELESS: Final = frozenset({"circuit_breaker", "timeout"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something in a pipeline that works against itself.

    Attributes:
        id: which rule, one of `FINDINGS`: what `Pipeline(allow=…)` silences it by.
        what: what is the matter, one sentence.
        remedy: what to do about it, one sentence.
        steps: positions of the policies it is about, from 1 for the outermost.
        allowed: the reason why it is wanted so, empty where nobody gave one.
    """

    id: str
    what: str
    remedy: str
    steps: tuple[int, ...] = ()
    allowed: str = ""

    def __str__(self) -> str:
        return f"{self.id}: {self.what} {self.remedy}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One policy of a pipeline that has been laid out flat, nested pipelines included.

    Attributes:
        position: 1 for the outermost.
        path: names of the nested pipelines it is in, the outer one left out.
        nested: which of the pipelines directly in the outer one it is in, from 1; 0 for none.
        kind: what it is.
        settings: all else that it says of itself.
        allow: findings about it that are wanted, with the reason.
    """

    position: int
    path: tuple[str, ...]
    nested: int = 0
    kind: str
    settings: Mapping[str, Any]
    allow: Mapping[str, str] = field(default_factory=dict[str, str])

    def number(self, key: str) -> float | None:
        """A setting that is a number; `None` where it is not said."""
        value = self.settings.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# What an edge adds: given the steps, the findings that need its protocol.
Rule = Callable[[Sequence[Step]], Iterable[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A pipeline, said in order, with the worst that it can come to. `print` it, or take `as_dict()`.

    Attributes:
        name: the pipeline's.
        steps: its policies, outermost first.
        attempts: calls that one call can become, `None` where nothing bounds them.
        seconds: how long one call can take, `None` where nothing bounds it. A function that answers for a fallback
            outside of every timeout takes its own time on top.
        findings: what works against itself; those that are wanted so have a reason in `allowed`.
    """

    name: str
    steps: tuple[Step, ...]
    attempts: int | None
    seconds: float | None
    findings: tuple[Finding, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same in plain types, for `json.dumps`."""
        return {
            "name": self.name,
            "policies": [
                {
                    "position": step.position,
                    "pipeline": list(step.path),
                    "kind": step.kind,
                    **{key: _plain(value) for key, value in step.settings.items()},
                }
                for step in self.steps
            ],
            "worst_case": {"attempts": self.attempts, "seconds": self.seconds},
            "findings": [
                {
                    "id": finding.id,
                    "what": finding.what,
                    "remedy": finding.remedy,
                    "policies": list(finding.steps),
                    "allowed": finding.allowed or None,
                }
                for finding in self.findings
            ],
        }

    def __str__(self) -> str:
        lines = [f"pipeline {self.name!r}, outermost first"]
        for step in self.steps:
            settings = ", ".join(
                f"{key} {_shown(value)}" for key, value in step.settings.items() if value not in (None, (), [], {})
            )
            where = f"  (in {' / '.join(step.path)})" if step.path else ""
            lines.append(f"  {step.position}. {step.kind.replace('_', ' '):<16} {settings}{where}".rstrip())
        if not self.steps:
            lines.append("  no policies")
        attempts = "unbounded attempts" if self.attempts is None else _counted(self.attempts, "attempt")
        seconds = "unbounded time" if self.seconds is None else f"{self.seconds:.4g} s"
        lines.append(f"worst case: {attempts}, {seconds}")
        lines.extend(f"finding {finding}" for finding in self.findings if not finding.allowed)
        lines.extend(
            f"allowed {finding.id}: {finding.what} Wanted: {finding.allowed}"
            for finding in self.findings
            if finding.allowed
        )
        return "\n".join(lines)


def explain(described: Mapping[str, object], *rules: Rule) -> Explanation:
    """Lay out a pipeline, and judge it.

    Args:
        described: what `Pipeline.describe()` gives.
        rules: further rules, of an edge that knows its protocol.
    """
    steps = tuple(_steps(described))
    worst = _Worst(steps)
    findings = [*_findings(steps, worst), *(finding for rule in rules for finding in rule(steps))]
    attempts, seconds = worst.of(0)
    return Explanation(
        name=str(described.get("name", "")),
        steps=steps,
        attempts=None if math.isinf(attempts) else round(attempts),
        seconds=None if math.isinf(seconds) else round(seconds, 6),
        findings=tuple(_judged(finding, steps) for finding in findings),
    )


def checked_allow(allow: Mapping[str, str]) -> dict[str, str]:
    """What a user silences, if it can be silenced.

    Raises:
        ConfigurationError: an id that is none, or no reason.
    """
    if not isinstance(cast("object", allow), Mapping):
        raise ConfigurationError(
            f"allow tells for each finding why it is wanted, and {allow!r} does not.",
            'Write allow={"breaker-outside-retry": "one vote a request"}.',
        )
    for key, reason in allow.items():
        if key not in FINDINGS:
            raise ConfigurationError(f"allow names {key!r}, and there is no such finding.", nearest(str(key), FINDINGS))
        if not isinstance(cast("object", reason), str) or not reason.strip():
            raise ConfigurationError(f"allow says of {key!r} why it is wanted, not {reason!r}.")
    return dict(allow)


def nearest(wrong: str, right: Iterable[str]) -> str:
    """A sentence that names what somebody may have meant, or all there is."""
    known = sorted(right)
    near = difflib.get_close_matches(wrong, known, cutoff=0.8) or difflib.get_close_matches(wrong, known, n=1)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"There is {', '.join(known)}." if known else "There is none."


def warn(explanation: Explanation) -> None:
    """Log what was found and is not wanted: one line a pipeline, and the same line once a process, because a client
    makes a pipeline for each host."""
    said = [
        finding
        for finding in explanation.findings
        # What is all in one nested pipeline, that has said itself when it was built.
        if not finding.allowed and not _within_one(explanation.steps, finding)
    ]
    if said:
        _say_once(f"pipeline {explanation.name!r}: {' / '.join(map(str, said))}")


def _within_one(steps: Sequence[Step], finding: Finding) -> bool:
    nested = {steps[position - 1].nested for position in finding.steps}
    return len(nested) == 1 and nested != {0}


@functools.lru_cache(maxsize=256)
def _say_once(text: str) -> None:
    _log.warning("%s", text)


# -- laying it out ----------------------------------------------------------------------------------------------------


def _steps(described: Mapping[str, object]) -> Iterator[Step]:
    position = nested = 0

    def walk(policy: Mapping[str, Any], path: tuple[str, ...], allow: Mapping[str, str]) -> Iterator[Step]:
        nonlocal position, nested
        inner = policy.get("policies")
        holds = isinstance(inner, Iterable) and not isinstance(inner, str)
        if holds:
            allow = {**allow, **policy.get("allow", {})}
        if not holds or policy.get("kind") != "pipeline":
            position += 1
            yield Step(
                position=position,
                path=path,
                nested=nested if path else 0,
                kind=str(policy.get("kind", "policy")),
                settings={key: value for key, value in policy.items() if key not in ("kind", "policies", "allow")},
                allow=allow,
            )
        if holds:
            outermost = policy is described
            for one in cast("Iterable[Mapping[str, Any]]", inner):
                nested += outermost
                yield from walk(
                    one, () if outermost else (*path, str(policy.get("name", policy.get("kind", "")))), allow
                )

    yield from walk(described, (), {})


def _judged(finding: Finding, steps: Sequence[Step]) -> Finding:
    for position in finding.steps:
        reason = steps[position - 1].allow.get(finding.id, "")
        if reason:
            return Finding(id=finding.id, what=finding.what, remedy=finding.remedy, steps=finding.steps, allowed=reason)
    return finding


# -- the worst it can come to -----------------------------------------------------------------------------------------


class _Worst:
    """Attempts and seconds of everything from a position inwards; infinity where nothing bounds it."""

    def __init__(self, steps: Sequence[Step]) -> None:
        # Of what is called itself, nobody knows how long it takes.
        attempts, seconds = 1.0, math.inf
        self._all = [(attempts, seconds)]
        self._opens = 0.0
        for step in reversed(steps):
            attempts, seconds = self._around(step, attempts, seconds)
            self._all.insert(0, (attempts, seconds))

    def of(self, index: int) -> tuple[float, float]:
        """For the step at `index` (from 0) and all inside of it."""
        return self._all[index]

    def inside(self, step: Step) -> float:
        """Seconds that one call of what is inside of `step` can take."""
        return self._all[step.position][1]

    def needed(self, step: Step) -> float:
        """Seconds that all attempts and waits of a retry can take, if nothing stops them."""
        return _times(attempts_of(step), self.inside(step)) + self._waits(step)

    def _waits(self, step: Step) -> float:
        attempts, waits = attempts_of(step), step.number("waits")
        if attempts <= 1:
            return 0.0
        if waits is None:
            waits = math.inf
        if step.settings.get("patient"):
            # For the breaker inside, with the tenth by which callers are spread.
            waits = max(waits, _times(attempts - 1, self._opens * 1.1))
        return waits

    def _around(self, step: Step, attempts: float, seconds: float) -> tuple[float, float]:
        if step.kind == "timeout":
            return attempts, min(seconds, limit_of(step))
        if step.kind == "circuit_breaker":
            self._opens = max(self._opens, step.number("open_at_most") or step.number("open_for") or 0.0)
            return attempts, seconds
        if step.kind in ("bulkhead", "rate_limiter"):
            return attempts, seconds + (step.number("wait") or 0.0)
        tries = attempts_of(step)
        if step.kind == "retry":
            within = step.number("seconds")
            # No wait begins that would end later than `within`, but an attempt that has begun may end later.
            bound = math.inf if within is None else within + seconds
            return attempts * tries, min(_times(tries, seconds) + self._waits(step), bound)
        if step.kind == "hedge":
            # Where a call is over before the delay is, no further attempt begins.
            delay = step.number("delay") or 0.0
            return attempts * tries, seconds + (_times(tries - 1, delay) if delay <= seconds else 0.0)
        return attempts * tries, seconds if tries == 1 else _times(tries, seconds)


def _times(count: float, seconds: float) -> float:
    return count * seconds if count and seconds else 0.0


def attempts_of(step: Step) -> float:
    """How often a policy calls what is inside of it, at the most."""
    if "attempts" not in step.settings:
        return math.inf if step.kind == "retry" else 1.0
    attempts = step.number("attempts")
    return math.inf if attempts is None else max(1.0, attempts)


def limit_of(step: Step) -> float:
    """Seconds of a timeout, of either kind."""
    return min((value for key in ("seconds", "total") if (value := step.number(key)) is not None), default=math.inf)


# -- the rules --------------------------------------------------------------------------------------------------------


def _findings(steps: Sequence[Step], worst: _Worst) -> Iterator[Finding]:
    for index, step in enumerate(steps):
        outer, inner = steps[:index], steps[index + 1 :]
        if step.kind == "retry":
            yield from _about_retry(step, outer, inner, worst)
        elif step.kind == "timeout":
            yield from _about_timeout(step, outer, inner)
        elif step.kind == "fallback":
            yield from _about_fallback(step, outer)
        elif step.kind == "circuit_breaker":
            yield from _about_breaker(step, outer, worst)
        elif step.kind == "bulkhead":
            yield from _about_bulkhead(step, outer)
        elif step.kind == "hedge":
            yield from _about_hedge(step, outer, worst)


def _repeats(step: Step) -> bool:
    return step.kind == "retry" and attempts_of(step) > 1


def _about_retry(step: Step, outer: Sequence[Step], inner: Sequence[Step], worst: _Worst) -> Iterator[Finding]:
    if not _repeats(step):
        return
    attempts = attempts_of(step)
    for around in outer:
        if _repeats(around):
            total = attempts * attempts_of(around)
            yield Finding(
                id="retry-inside-retry",
                what=f"A retry ({step.position}) is inside another one ({around.position})"
                + (f", which makes {total:.0f} attempts of one call." if math.isfinite(total) else "."),
                remedy="Keep the inner one, which knows the failure best.",
                steps=(around.position, step.position),
            )
        elif around.kind == "circuit_breaker":
            yield Finding(
                id="breaker-outside-retry",
                what=f"Circuit breaker ({around.position}) is outside of the retry ({step.position}): it sees one"
                " failure where there were several, and a retry goes on against what is down.",
                remedy="Put the breaker inside the retry.",
                steps=(around.position, step.position),
            )
        elif around.kind == "bulkhead":
            yield Finding(
                id="bulkhead-outside-retry",
                what=f"The bulkhead ({around.position}) is outside of the retry ({step.position}): a call holds its"
                " place while it only waits for its next attempt.",
                remedy="Put the bulkhead inside the retry.",
                steps=(around.position, step.position),
            )
        elif around.kind == "rate_limiter":
            yield Finding(
                id="rate-limiter-outside-retry",
                what=f"The rate limiter ({around.position}) is outside of the retry ({step.position}): only first"
                " attempts are counted.",
                remedy="Put the rate limiter inside the retry.",
                steps=(around.position, step.position),
            )
        elif around.kind == "timeout" and around.number("total") is None:
            yield Finding(
                id="attempt-timeout-outside-retry",
                what=f"The timeout of {limit_of(around):g} s ({around.position}) is for one attempt and is outside of"
                f" the retry ({step.position}), which does not hear of it and waits for attempts it cuts off.",
                remedy=f"Write Timeout(total={limit_of(around):g}).",
                steps=(around.position, step.position),
            )
    totals = [(limit_of(around), around) for around in outer if around.kind == "timeout"]
    within = step.number("seconds")
    if math.isinf(attempts):
        # Where a strategy of the user's decides, it may well end.
        if step.number("attempts") == math.inf and not totals and within is None:
            yield Finding(
                id="retry-unbounded",
                what=f"Nothing says when the retry ({step.position}) ends.",
                remedy="Give it attempts= or within=, or put Timeout(total=…) around it.",
                steps=(step.position,),
            )
    elif not any(within.kind == "timeout" and within.number("total") is not None for within in inner):
        # A total one inside says nothing of how long an attempt may take: see `total-inside-retry`.
        needed, one = worst.needed(step), worst.inside(step)
        if math.isfinite(needed):
            limit, around = min(totals, key=lambda pair: pair[0], default=(math.inf, step))
            # Under `within` the last attempt is only to begin in time.
            if within is not None and needed - one >= within and within < limit:
                yield _too_long(step, step, needed - one, within, one)
            elif needed > limit:
                yield _too_long(step, around, needed, limit, one)
    if step.settings.get("jitter") is False:
        yield Finding(
            id="jitter-off",
            what=f"The retry ({step.position}) waits equally long everywhere: callers that failed together come back"
            " together.",
            remedy="Leave jitter out for full jitter, or take a tenacity wait that is random.",
            steps=(step.position,),
        )


def _too_long(step: Step, around: Step, needed: float, limit: float, one: float) -> Finding:
    attempts = attempts_of(step)
    return Finding(
        id="attempts-exceed-total",
        what=f"{attempts:.0f} attempts of {one:.4g} s and their waits ({step.position}) can take {needed:.4g} s, and"
        f" there are {limit:.4g} s"
        + (f" ({around.position}): the last of them are never made." if around is not step else " (within)."),
        remedy="Make the attempts fewer or shorter, or the time longer.",
        steps=(around.position, step.position) if around is not step else (step.position,),
    )


def _about_timeout(step: Step, outer: Sequence[Step], inner: Sequence[Step]) -> Iterator[Finding]:
    limit = limit_of(step)
    if step.number("total") is not None:
        around = next((around for around in outer if _repeats(around)), None)
        if around is not None:
            yield Finding(
                id="total-inside-retry",
                what=f"Timeout(total={limit:g}) ({step.position}) is inside the retry ({around.position}), so it"
                " begins anew with each attempt.",
                remedy=f"Put it outside of the retry, or write Timeout({limit:g}) for one attempt.",
                steps=(around.position, step.position),
            )
    longer = [around for around in outer if around.kind == "timeout" and limit_of(around) <= limit]
    if longer:
        around = min(longer, key=limit_of)
        yield Finding(
            id="timeout-never-fires",
            what=f"The timeout of {limit:g} s ({step.position}) is inside one of {limit_of(around):g} s"
            f" ({around.position}), which always comes first.",
            remedy="Make the inner one shorter, or leave it out.",
            steps=(around.position, step.position),
        )
    for within in inner:
        # A total one has another use: it is the deadline that travels with the call.
        if within.kind == "timeout" and limit_of(within) < limit and step.number("total") is None:
            yield Finding(
                id="timeout-never-fires",
                what=f"The timeout of {limit:g} s ({step.position}) has nothing inside that could take longer than"
                f" the {limit_of(within):g} s of the one at {within.position}.",
                remedy="Leave one of them out.",
                steps=(step.position, within.position),
            )
        if within.kind not in _TIMELESS:
            # Waits, attempts, answers: there the outer one has its use.
            break


def _about_fallback(step: Step, outer: Sequence[Step]) -> Iterator[Finding]:
    on = step.settings.get("on") or ()
    named = [str(name).rpartition(".")[2] for name in ([on] if isinstance(on, str) else cast("Iterable[object]", on))]
    for around in outer:
        if _repeats(around) and not (named and _REFUSALS.issuperset(named)):
            yield Finding(
                id="fallback-inside-retry",
                what=f"The fallback ({step.position}) is inside the retry ({around.position}), which takes its answer"
                " for success and tries nothing again.",
                remedy="Put the fallback outside of the retry.",
                steps=(around.position, step.position),
            )
        elif around.kind == "circuit_breaker" and not named:
            yield Finding(
                id="fallback-inside-breaker",
                what=f"The fallback ({step.position}) is inside circuit breaker ({around.position}), which takes its"
                " answer for success and never opens.",
                remedy="Put the fallback outside of the breaker.",
                steps=(around.position, step.position),
            )
    if outer and outer[-1].kind == "fallback" and not named:
        yield Finding(
            id="fallback-never-used",
            what=f"The fallback ({outer[-1].position}) is around one that answers every failure ({step.position}).",
            remedy="Give the inner one on=, or leave one of them out.",
            steps=(outer[-1].position, step.position),
        )


def _about_breaker(step: Step, outer: Sequence[Step], worst: _Worst) -> Iterator[Finding]:
    for around in outer:
        if around.kind == "circuit_breaker" and around.settings.get("name") == step.settings.get("name"):
            yield Finding(
                id="same-breaker-name",
                what=f"Circuit breakers ({around.position}) and ({step.position}) are both named"
                f" {step.settings.get('name')!r}: metrics and events cannot tell them apart.",
                remedy="Leave one of them out, or name what each guards.",
                steps=(around.position, step.position),
            )
    slow, longest = step.number("slow_after"), worst.inside(step)
    if slow is not None and slow > longest:
        yield Finding(
            id="slow-never-seen",
            what=f"Circuit breaker ({step.position}) counts calls of more than {slow:g} s as slow, and none takes"
            f" longer than {longest:g} s.",
            remedy="Make slow_after shorter than the timeout inside.",
            steps=(step.position,),
        )


def _about_bulkhead(step: Step, outer: Sequence[Step]) -> Iterator[Finding]:
    limit = step.number("limit")
    if limit is None:
        return
    # Of several, the narrowest around it; a hedge in between makes more of one call.
    since = max((index + 1 for index, around in enumerate(outer) if around.kind == "hedge"), default=0)
    for around in outer[since:]:
        allowed = around.number("limit") if around.kind == "bulkhead" else None
        if allowed is not None and allowed <= limit:
            yield Finding(
                id="bulkhead-never-full",
                what=f"The bulkhead of {limit:.0f} ({step.position}) is inside one that lets {allowed:.0f} through"
                f" ({around.position}), so it is never full.",
                remedy="Leave one of them out.",
                steps=(around.position, step.position),
            )


def _about_hedge(step: Step, outer: Sequence[Step], worst: _Worst) -> Iterator[Finding]:
    delay = step.number("delay")
    if delay is None or math.isinf(delay) or attempts_of(step) <= 1:
        # Infinity is how one switches it off.
        return
    longest = min([worst.inside(step), *(limit_of(around) for around in outer if around.kind == "timeout")])
    if longest <= delay:
        yield Finding(
            id="hedge-never-starts",
            what=f"The hedge ({step.position}) begins after {delay:g} s, and a call is over after {longest:g} s.",
            remedy="Make its delay shorter than the timeout.",
            steps=(step.position,),
        )


# -- saying it --------------------------------------------------------------------------------------------------------


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        # JSON has no infinity.
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in cast("Mapping[object, object]", value).items()}
    if isinstance(value, Iterable):
        return [_plain(one) for one in cast("Iterable[object]", value)]
    return str(value)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        pairs = cast("Mapping[object, object]", value).items()
        return "(" + ", ".join(f"{key} {_shown(one)}" for key, one in pairs if one is not None) + ")"
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, Iterable):
        return ", ".join(str(one) for one in cast("Iterable[object]", value))
    return str(value)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
