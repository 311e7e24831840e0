"""Benches and proofs have the form that `./run` promises, and the targets stand in one place only as long as both sides agree."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
from benchmarks.__main__ import names as bench_names
from proofs.__main__ import claim, source
from proofs.__main__ import names as proof_names

ROOT = Path(__file__).parents[2]


def _declared() -> set[tuple[str, str, str, float]]:
    return {
        (name, row.what, row.against, float(row.target))
        for name in bench_names()
        for row in importlib.import_module(f"benchmarks.{name}").ROWS
        if row.target is not None
    }


def _documented() -> set[tuple[str, str, str, float]]:
    text = (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \| ([^|]+) \| ([0-9.]+) \|$", text, flags=re.MULTILINE)
    return {(name, what, against, float(target)) for name, what, against, target in rows}


def _proof(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "proofs", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_targets_are_those_of_the_documentation() -> None:
    """Each target in docs/performance.md is declared by its bench, and each that a bench declares is in the page."""
    assert _documented() == _declared()


@pytest.mark.parametrize("name", bench_names())
def test_a_bench_says_what_it_measures(name: str) -> None:
    """A bench has a docstring, rows that name no pair twice, and a way to its contenders."""
    bench = importlib.import_module(f"benchmarks.{name}")
    assert bench.__doc__
    pairs = [(row.what, row.against) for row in bench.ROWS]
    assert len(set(pairs)) == len(pairs)
    assert callable(bench.contenders)


def test_a_row_is_the_median_of_pairs_of_one_round() -> None:
    """The ratio is the median of the rounds' ratios, with the lowest and highest beside it; a warm-up round is left out."""
    ours, theirs = iter([9.0, 1.0, 2.0, 6.0]), iter([9.0, 1.0, 1.0, 2.0])
    rows = [benchmarks.Row(what="ours", against="theirs", target=1.5)]
    (row,) = benchmarks.compare(rows, {"ours": lambda: next(ours), "theirs": lambda: next(theirs)}, rounds=3)
    assert {"what": "ours", "against": "theirs", "ratio": 2.0, "low": 1.0, "high": 3.0, "target": 1.5} == row


@pytest.mark.parametrize(("ratio", "target", "expected"), [(1.65, 1.5, True), (1.66, 1.5, False), (99.0, None, True)])
def test_a_target_is_met_up_to_a_tenth_above_it(ratio: float, target: float | None, expected: bool) -> None:
    """A median up to a tenth above the target meets it; a peer's row has nothing to meet."""
    assert expected == benchmarks.met({"ratio": ratio, "target": target})


@pytest.mark.once
def test_a_bench_prints_only_json_on_stdout_when_asked() -> None:
    """With --json stdout is one JSON object with all the rows of the bench; wrong usage is one line and exit code 2."""
    command = [sys.executable, "-m", "benchmarks"]
    done = subprocess.run(
        [*command, "pipeline", "--json", "--rounds", "1"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout)["rows"]
    assert [row.what for row in importlib.import_module("benchmarks.pipeline").ROWS] == [row["what"] for row in rows]
    assert all({"what", "against", "ratio", "low", "high", "target"} == row.keys() for row in rows)
    for words in (["nothing"], ["--json"]):
        wrong = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (2, "", 1) == (wrong.returncode, wrong.stdout, wrong.stderr.count("\n"))


@pytest.mark.parametrize("name", proof_names())
def test_a_proof_can_be_run_and_listed(name: str) -> None:
    """A proof's docstring opens with a sentence, and it has a main that runs when the file does."""
    assert claim(name).endswith(".")
    body = source(name).body
    assert "main" in [node.name for node in body if isinstance(node, ast.FunctionDef)]
    assert "__name__ == '__main__'" in [ast.unparse(node.test) for node in body if isinstance(node, ast.If)]


@pytest.mark.parametrize("name", proof_names())
def test_a_proof_tells_its_usage(name: str) -> None:
    """`--help` ends with 0 and says nothing on stderr: it is no proof that has shown nothing."""
    told = subprocess.run(
        [sys.executable, "-m", "proofs", name, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (0, "") == (told.returncode, told.stderr)
    assert told.stdout.startswith("usage: ")


def test_a_proof_ends_with_its_summary(tmp_path: Path) -> None:
    """The exit code is the proof's own, but 0 without a summary in the last line is 1; an unknown proof is one line and 2."""
    folder = tmp_path / "proofs"
    folder.mkdir()
    for file in ("__init__.py", "__main__.py"):
        (folder / file).write_text((ROOT / "proofs" / file).read_text())
    (folder / "fine.py").write_text('"""It holds."""\nprint("going on")\nprint(\'{"seen": 3}\')\n')
    (folder / "bad_one.py").write_text('"""It does not hold."""\nprint(\'{"lost": 1}\')\nraise SystemExit(1)\n')
    (folder / "silent.py").write_text('"""It says nothing."""\nprint("all well")\n')
    fine, bad, silent, unknown, listed = (
        _proof(tmp_path, *words) for words in (["fine"], ["bad-one"], ["silent"], ["nothing"], [])
    )
    assert (0, {"seen": 3}) == (fine.returncode, json.loads(fine.stdout.splitlines()[-1]))
    assert (1, {"lost": 1}) == (bad.returncode, json.loads(bad.stdout.splitlines()[-1]))
    assert 1 == silent.returncode
    assert (2, 1) == (unknown.returncode, unknown.stderr.count("\n"))
    assert ["bad_one", "fine", "silent"] == [line.split()[0] for line in listed.stdout.splitlines()]
