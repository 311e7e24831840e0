"""The tests of the circuit breaker and of retries notice 95 of 100 small mistakes that are planted into the code.

    ./run proof mutation [--only FILE] [--sample N] [--seed S] [--workers N] [--json]

A mutant is one of the modules below with one small mistake in it (`_mutants.py`): a comparison turned, a statement removed,
a number one too high. The unit tests of its policy must fail with it. A mutant that survives because it is no mistake at
all stands in `mutation_survivors.toml` with the reason why; the others that survive may be 5 % of all. The exit code is 3
where they are more, or where one of that list is noticed after all.

Everything is imported once and each mutant runs in a fork, in a copy of the tree, with the tests that run its lines,
those first that have noticed a mutant of the same function before.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import random
import re
import selectors
import shutil
import signal
import sys
import tempfile
import threading
import time
import tomllib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, cast

from proofs._mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]
_OUR_OWN = 70
KNOWN = Path(__file__).with_name("mutation_survivors.toml")
LEAST = 0.95

# A module, and its policy's unit tests.
_BREAKER = ("test_circuit_breaker.py", "test_breaker_*.py", "test_window.py")
_RETRY = ("test_retry*.py",)
TARGETS = {
    "circuit_breaker": _BREAKER,
    "window": _BREAKER,
    "retry": _RETRY,
    "retry_budget": _RETRY,
}


def _module(target: str) -> str:
    return f"meshkit.policies.{target}"


def _file(target: str) -> str:
    return f"src/meshkit/policies/{target}.py"


# -- in a fork --------------------------------------------------------------------------------------------------------


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads other code than the file has."""

    def __init__(self, module: str, path: str, source: str) -> None:
        super().__init__(module, path)
        self._instead = source

    def get_code(self, fullname: str) -> CodeType:
        return _compiled(self._instead, self.path)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, path: str, source: str) -> None:
        self._module, self._loader = module, _Loader(module, path, source)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self._loader) if fullname == self._module else None


def _compiled(source: str, path: str) -> CodeType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compile(source, path, "exec", dont_inherit=True)


class _Watch:
    """A pytest plugin: which test has failed first, how long each took, and an end to those that take far too long."""

    def __init__(self, seconds: dict[str, float] | None = None, order: list[str] | None = None) -> None:
        self._seconds = seconds
        self._place = None if order is None else {test: place for place, test in enumerate(order)}
        self.failed = ""
        self.took: dict[str, float] = {}
        if seconds is not None:
            # To be loaded and collected is the first thing that may never end.
            _end_in(60.0)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        place = self._place
        if place is not None:
            items[:] = sorted(
                (item for item in items if _name(item.nodeid) in place), key=lambda item: place[_name(item.nodeid)]
            )

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self._seconds is not None:
            _end_in(5.0 + 5.0 * self._seconds.get(_name(nodeid), 1.0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = _name(report.nodeid)
        self.took[name] = self.took.get(name, 0.0) + report.duration
        if report.failed and not self.failed:
            self.failed = name


def _name(nodeid: str) -> str:
    """A test's name in every process: some show an object's address."""
    return re.sub("0x[0-9a-f]+", "0x", nodeid)


def _end_in(seconds: float) -> None:
    """End this process after so long, whatever it does: the signal is left to the system."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


class _Lines:
    """A pytest plugin: which lines of some files each test runs."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = frozenset(files)
        self._now: set[tuple[str, int]] = set()
        self.of: dict[str, set[tuple[str, int]]] = {}

    def _call(self, frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        self._now.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._now = self.of.setdefault(_name(nodeid), set())
        sys.settrace(self._call)
        threading.settrace(self._call)

    def pytest_runtest_logfinish(self) -> None:
        sys.settrace(None)
        threading.settrace(cast("Any", None))


def _pytest(files: Sequence[str], plugins: Sequence[object], *options: str) -> int:
    import pytest
    from hypothesis import Phase, settings

    # A failing example is not made smaller, and it is the same ones each time.
    settings.register_profile(
        "mutation", phases=[Phase.explicit, Phase.generate], derandomize=True, database=None, deadline=None
    )
    settings.load_profile("mutation")
    # What is imported once for all is none of the modules whose assertions pytest rewrites; time limits are ours.
    quiet = ["-q", "-s", "--no-header", "-o", "timeout=0", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*files, *quiet, *options], plugins=plugins))


def _forked(run: Callable[[], object]) -> tuple[int, int]:
    """Run it in a child; its id, and where its answer can be read as JSON."""
    answer, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, answer
    code = 1
    try:
        os.close(answer)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        said = json.dumps(run()).encode()
        with os.fdopen(write, "wb") as pipe:
            pipe.write(said)
        code = 0
    except (KeyboardInterrupt, SystemExit):
        # What the mutant has made of it.
        pass
    except BaseException:
        code = _OUR_OWN
    finally:
        os._exit(code)


def _read(child: int, answer: int) -> Any:
    with os.fdopen(answer, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == _OUR_OWN:
        raise SystemExit("mutation: a fork has failed by itself, which would pass for a mistake that was noticed")
    return json.loads(said) if said else None


# -- the tests as they are --------------------------------------------------------------------------------------------


@dataclass
class Tests:
    """The tests of a policy, and what is known of them.

    Attributes:
        files: that they stand in.
        seconds: that each took.
        lines: of each, which lines it runs, by file.
        killers: by function, which tests have noticed how many mutants.
    """

    files: list[str]
    seconds: dict[str, float]
    lines: dict[str, dict[str, set[int]]]
    killers: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def of(self, target: str, file: str, mutant: Mutant) -> list[str]:
        """Those that can notice it, the likeliest first."""
        lines = mutant.lines
        found = (
            list(self.seconds)
            if lines is None
            else [test for test in self.seconds if not self.lines.get(test, {}).get(file, set()).isdisjoint(lines)]
        )
        killers = self.killers[f"{target} {mutant.where}"]
        return sorted(found, key=lambda test: (-killers[test], self.seconds[test]))


def _traced(files: list[str], sources: list[str]) -> Any:
    lines = _Lines(sources)
    _pytest(files, [lines])
    return {test: sorted(seen) for test, seen in lines.of.items()}


def _untraced(files: list[str]) -> Any:
    watch = _Watch()
    code = _pytest(files, [watch])
    return {
        "code": code,
        "failed": watch.failed,
        "seconds": watch.took,
        "modules": [name for name in sys.modules if not name.startswith(("meshkit", "test", "conftest", "__"))],
    }


def _tests(tree: Path, patterns: tuple[str, ...]) -> Tests:
    folder = tree / "tests" / "policies"
    files = [str(file) for pattern in patterns for file in sorted(folder.glob(pattern))]
    sources = [str(tree / _file(target)) for target, tests in TARGETS.items() if tests == patterns]
    # Once as they are, and once for the lines alone: a tracer lets threads change places inside of what is otherwise one
    # step, so that a test of exactly that may fail under it.
    seen = _read(*_forked(lambda: _untraced(files)))
    if not seen or seen["code"] != 0:
        raise SystemExit(f"mutation: the tests fail without any mistake: {seen and seen['failed']}")
    for name in seen["modules"]:
        # What they import from others is imported once for all.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    lines: dict[str, dict[str, set[int]]] = {}
    for test, places in _read(*_forked(lambda: _traced(files, sources))).items():
        by_file: dict[str, set[int]] = defaultdict(set)
        for file, line in places:
            by_file[file].add(line)
        lines[test] = by_file
    return Tests(files, seen["seconds"], lines)


# -- one mutant after another -----------------------------------------------------------------------------------------


@dataclass
class Trial:
    """A mutant, and what became of it: `killer` is the test that noticed it, empty where it survived."""

    target: str
    mutant: Mutant
    killer: str | None = None


Done = Callable[[Trial], object]


class Laboratory:
    """Tries mutants, so many at a time.

    Most mistakes change what functions do, and nothing else. For them the tests are collected once, and a fork of that
    process gives the functions their other code. Those that act on import begin anew in a fork that has imported
    nothing of ours.
    """

    def __init__(self, tree: Path, tests: dict[str, Tests], workers: int, done: Done) -> None:
        self._tree = tree
        self._tests = tests
        self._workers = workers
        self._done = done

    def run(self, trials: list[Trial]) -> None:
        swapped: dict[int, list[tuple[Trial, list[tuple[CodeType, CodeType]]]]] = defaultdict(list)
        anew: list[Trial] = []
        originals = {
            target: _compiled(Path(self._path(target)).read_text(), self._path(target)) for target in self._tests
        }
        for trial in trials:
            pairs = (
                None
                if trial.mutant.lines is None
                else _changed(originals[trial.target], _compiled(trial.mutant.source, self._path(trial.target)))
            )
            if pairs:
                swapped[id(self._tests[trial.target])].append((trial, pairs))
            else:
                anew.append(trial)
        self._all((trial, partial(self._anew, trial)) for trial in anew)
        for mine in swapped.values():
            collected = _Collected(partial(self._swapped, mine))
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                _pytest(self._tests[mine[0][0].target].files, [collected])

    def _path(self, target: str) -> str:
        return str(self._tree / _file(target))

    def _anew(self, trial: Trial, tests: list[str]) -> str:
        sys.meta_path.insert(0, _Finder(_module(trial.target), self._path(trial.target), trial.mutant.source))
        watch = _Watch(self._tests[trial.target].seconds, tests)
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
        code = _pytest(files, [watch], "-x")
        return watch.failed or ("" if code == 0 else f"pytest, which ended with {code}")

    def _swapped(self, trials: list[tuple[Trial, list[tuple[CodeType, CodeType]]]], items: dict[str, Any]) -> None:
        functions: dict[CodeType, list[FunctionType]] = defaultdict(list)
        ours = {self._path(target) for target in self._tests}
        for each in gc.get_objects():
            if isinstance(each, FunctionType) and each.__code__.co_filename in ours:
                functions[each.__code__].append(each)

        def begin(trial: Trial, pairs: list[tuple[CodeType, CodeType]], tests: list[str]) -> str:
            for code, other in pairs:
                for function in functions[code]:
                    function.__code__ = other
            watch = _Watch(self._tests[trial.target].seconds)
            chosen = [items[test] for test in tests if test in items]
            if chosen:
                chosen[0].config.pluginmanager.register(watch)
            for item, following in zip(chosen, [*chosen[1:], None], strict=False):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if watch.failed:
                    break
            return watch.failed

        self._all((trial, partial(begin, trial, pairs)) for trial, pairs in trials)

    def _all(self, trials: Iterable[tuple[Trial, Callable[[list[str]], str]]]) -> None:
        running: dict[int, tuple[Trial, int]] = {}
        with selectors.DefaultSelector() as selector:

            def wait() -> None:
                for key, _ in selector.select():
                    answer = key.fd
                    selector.unregister(answer)
                    trial, child = running.pop(answer)
                    said = _read(child, answer)
                    trial.killer = "the end of the process" if said is None else said
                    if trial.killer:
                        self._tests[trial.target].killers[f"{trial.target} {trial.mutant.where}"][trial.killer] += 1
                    self._done(trial)

            for trial, begin in trials:
                tests = self._tests[trial.target].of(trial.target, self._path(trial.target), trial.mutant)
                if not tests:
                    trial.killer = ""
                    self._done(trial)
                    continue
                while len(running) >= self._workers:
                    wait()
                child, answer = _forked(partial(begin, tests))
                selector.register(answer, selectors.EVENT_READ)
                running[answer] = (trial, child)
            while running:
                wait()


class _Collected:
    """A pytest plugin: hands over the tests where pytest would run them."""

    def __init__(self, then: Callable[[dict[str, Any]], object]) -> None:
        self._then = then

    def pytest_runtestloop(self, session: Any) -> bool:
        self._then({_name(item.nodeid): item for item in session.items})
        return True


def _changed(code: CodeType, other: CodeType) -> list[tuple[CodeType, CodeType]] | None:
    """The functions of a module whose code is another one; `None` where that does not say it all."""
    inner, others = _inner(code), _inner(other)
    if [each.co_qualname for each in inner] != [each.co_qualname for each in others]:
        return None
    pairs: list[tuple[CodeType, CodeType]] = []
    for mine, theirs in zip(inner, others, strict=True):
        if _is_function(mine):
            if mine.co_freevars != theirs.co_freevars:
                return None
            if mine != theirs:
                pairs.append((mine, theirs))
        inside = _changed(mine, theirs)
        if inside is None:
            return None
        pairs += inside
    return pairs


def _inner(code: CodeType) -> list[CodeType]:
    return [each for each in code.co_consts if isinstance(each, CodeType)]


def _is_function(code: CodeType) -> bool:
    return bool(code.co_flags & inspect.CO_OPTIMIZED)


def _known() -> dict[tuple[str, str, str, str], str]:
    """By file, function and the line before and after: why a mutant is no mistake."""
    entries = tomllib.loads(KNOWN.read_text())["survivor"]
    return {(entry["file"], entry["where"], entry["was"], entry["becomes"]): entry["reason"] for entry in entries}


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run proof mutation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=sorted(TARGETS), action="append", help="this module; may be given again")
    parser.add_argument("--sample", type=int, metavar="N", help="only so many mutants, by chance")
    parser.add_argument("--seed", type=int, default=1, help="of that chance (default 1)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 2, metavar="N", help="at once (default: all cores)"
    )
    parser.add_argument("--json", action="store_true", help="print the summary only")
    options = parser.parse_args()
    out = sys.stdout
    tell: Callable[[str], object] = partial(print, file=out, flush=True)
    if options.json:
        tell = str
    began = time.monotonic()
    known = _known()
    targets = [target for target in TARGETS if not options.only or target in options.only]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        for part in ("src", "tests/policies", "tests/conftest.py", "pyproject.toml"):
            (tree / part).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, tree / part)
        os.chdir(tree)
        sys.path.insert(0, str(tree / "src"))
        by_patterns = {patterns: _tests(tree, patterns) for patterns in dict.fromkeys(TARGETS[t] for t in targets)}
        tests = {target: by_patterns[TARGETS[target]] for target in targets}
        trials = [Trial(target, mutant) for target in targets for mutant in mutants((tree / _file(target)).read_text())]
        there = Counter((_file(trial.target), *trial.mutant.key) for trial in trials)
        if options.sample is not None:
            trials = random.Random(options.seed).sample(trials, min(options.sample, len(trials)))
        tell(f"{len(trials)} mutants, {sum(len(each.seconds) for each in by_patterns.values())} tests")
        unknown: list[Trial] = []
        killed: Counter[str] = Counter()
        equivalent: Counter[str] = Counter()

        def done(trial: Trial) -> None:
            listed = (_file(trial.target), *trial.mutant.key) in known
            place = f"{_file(trial.target)}:{trial.mutant.line}"
            if trial.killer:
                killed[trial.target] += 1
            elif listed:
                equivalent[trial.target] += 1
            else:
                unknown.append(trial)
                tell(f"survived: {place} in {trial.mutant.where or 'the module'} ({trial.mutant.kind})")
                tell(f"    - {trial.mutant.was}\n    + {trial.mutant.becomes}")
            number = killed.total() + equivalent.total() + len(unknown)
            if number % 50 == 0:
                tell(f"{number} of {len(trials)}: {killed.total()} killed, {time.monotonic() - began:.0f} s")

        Laboratory(tree, tests, options.workers, done).run(trials)
        if any(trial.killer is None for trial in trials):
            raise SystemExit("mutation: some were not tried, because pytest did not come to its tests")
        os.chdir(ROOT)
    # One that the code no longer has is as stale as one that is noticed. A line may stand twice in a function: then one of
    # the two must survive.
    noticed = Counter((_file(trial.target), *trial.mutant.key) for trial in trials if trial.killer)
    stale = [key for key in known if key[0] in map(_file, targets) and noticed[key] == there[key]]
    for file, where, was, becomes in stale:
        tell(f"listed as no mistake, and noticed or not there: {file} in {where}\n    - {was}\n    + {becomes}")
    mistakes = len(trials) - equivalent.total()
    rate = killed.total() / mistakes if mistakes else 1.0
    summary = {
        "mutants": len(trials),
        "killed": killed.total(),
        "equivalent": equivalent.total(),
        "survived": len(unknown),
        "rate": round(rate, 4),
        "by_file": {
            _file(target): {
                "mutants": sum(trial.target == target for trial in trials),
                "killed": killed[target],
                "equivalent": equivalent[target],
            }
            for target in targets
        },
        "survivors": [
            {
                "file": _file(trial.target),
                "line": trial.mutant.line,
                "where": trial.mutant.where,
                "kind": trial.mutant.kind,
                "was": trial.mutant.was,
                "becomes": trial.mutant.becomes,
            }
            for trial in unknown
        ],
        "stale": len(stale),
        "seed": options.seed,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(summary, ensure_ascii=False))
    return 0 if rate >= LEAST and not stale else 3


if __name__ == "__main__":
    sys.exit(main())
