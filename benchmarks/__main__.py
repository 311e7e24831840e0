"""`./run bench NAME [--json] [--rounds N]`; without NAME, the list."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

import benchmarks


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench: {message}\n")


def names() -> list[str]:
    """Every bench: each file of this folder but this one."""
    return sorted(
        module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.name.startswith("_")
    )


def main() -> int:
    parser = _Parser(prog="./run bench", description="What meshkit costs, as CPU ratios; lower is better.")
    parser.add_argument("name", nargs="?", help="a bench, or all")
    parser.add_argument("--json", action="store_true", help="print only the rows, as JSON")
    parser.add_argument("--rounds", type=int, default=15, help="how often each contender is measured (15)")
    options = parser.parse_args()
    if options.name is None:
        if options.json:
            parser.error("--json prints what was measured, so it needs a bench, or all")
        for name in names():
            print(f"{name:12} {(importlib.import_module(f'benchmarks.{name}').__doc__ or '').splitlines()[0]}")
        return 0
    wanted = names() if options.name == "all" else [options.name]
    if not set(wanted) <= set(names()):
        parser.error(f"there is no bench {options.name!r}; there are {', '.join(names())}")
    if options.rounds < 1:
        parser.error(f"--rounds is how often each contender is measured, so 1 or above, not {options.rounds}")
    answers: list[dict[str, object]] = []
    tables: dict[str, list[dict[str, object]]] = {}
    for name in wanted:
        print(f"bench: {name}, {options.rounds} rounds", file=sys.stderr)
        bench = importlib.import_module(f"benchmarks.{name}")
        with bench.contenders() as contenders:
            rows = benchmarks.present(bench.ROWS, contenders)
            answers += benchmarks.compare(rows, contenders, rounds=options.rounds)
        if hasattr(bench, "behaviour"):
            tables |= bench.behaviour()
    if options.json:
        print(json.dumps({"rows": answers, **({"behaviour": tables} if tables else {})}))
        return 0
    for answer in answers:
        target = (
            ""
            if answer["target"] is None
            else f"target {answer['target']:g}, {'met' if benchmarks.met(answer) else 'MISSED'}"
        )
        ratio = f"{answer['ratio']:8.3f} ({answer['low']:.3f}–{answer['high']:.3f})"
        print(f"{answer['what']} ÷ {answer['against']}\n  {ratio}  {target}")
    for table in tables.values():
        print(f"\n{_drawn(table)}")
    return 0


def _drawn(table: Sequence[Mapping[str, object]]) -> str:
    """A table in columns: what the rows call their values stands on top."""
    lines = [[*table[0]], *([str(value) for value in row.values()] for row in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
