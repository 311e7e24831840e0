"""What the pages say exists: links, files, commands with their options, Python names with their parameters."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from named import defined_in, parsed, problems
from pages import PAGES, ROOT, anchors, blocks, commands, links, spans

import meshkit
from meshkit.cli.app import app
from meshkit.rabbitmq import RabbitBus
from meshkit.sqlalchemy import SqlInbox, SqlOutbox

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

# Words that stand for something of the reader's.
PLACEHOLDER = re.compile(r"…|\.\.\.|[A-Z]+(\.\w+)?|\[.*")


def names() -> dict[str, Any]:
    """What a code span may speak of without an import: meshkit, its public names, and the usual variables."""
    public = {name: getattr(meshkit, name) for name in meshkit.__all__ if name[0].isupper()}
    ours = {"RabbitBus": RabbitBus, "SqlInbox": SqlInbox, "SqlOutbox": SqlOutbox}
    variables = {"bus": RabbitBus, "inbox": SqlInbox, "outbox": SqlOutbox, "call": meshkit.Call}
    return {"meshkit": meshkit, **public, **ours, **variables}


# --- Python ----------------------------------------------------------------------------------------------------------


@every_page
def test_every_python_block_holds_together(page: Path) -> None:
    """Each block compiles, what it imports exists, no name in it is undefined, and each call fits what it calls."""
    for block in blocks(page, "python"):
        tree = ast.parse(block.text)
        compile(tree, str(page), "exec")
        assert [] == problems(tree, defined_in(tree))


@every_page
def test_every_name_in_a_code_span_exists(page: Path) -> None:
    """What a sentence or a table calls by a name of meshkit's exists, and takes the arguments written there."""
    known = names()
    wrong = []
    for span in spans(page):
        expression = parsed(span)
        if expression is None:
            continue
        roots = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
        first = re.match(r"\w+", ast.unparse(expression))
        assert first is not None
        is_class = re.fullmatch(r"(?:[A-Z][a-z]+)+", first[0]) is not None
        if is_class or first[0] in known:
            # Arguments such as `app` and `handler` are the reader's own.
            given = dict.fromkeys((root for root in roots if root.islower()), None)
            wrong += [f"`{span}`: {problem}" for problem in problems(expression, {**given, **known})]
    assert [] == wrong


def test_the_checks_can_tell() -> None:
    """A wrong name, a wrong keyword, a missing argument and an unknown class are each found."""
    known = {**names(), "app": None}
    for text, fine in {
        "meshkit.fastapi.install(app, service=…)": True,
        "@Pipeline('prices', Retry(attempts=3))": True,
        "await bus.publish(…)": True,
        "bus.publish(…, urgent=True)": False,
        "meshkit.fastapi.install(service=…)": False,
        "meshkit.fastapi.instal(app)": False,
        "meshkit.fastpi": False,
        "Retry(atempts=3)": False,
        "Retri": False,
    }.items():
        expression = parsed(text)
        assert expression is not None
        assert fine is not bool(problems(expression, known)), text


# --- links and files -------------------------------------------------------------------------------------------------


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    """A relative link leads to a file or folder of the repository, and its anchor to a heading there."""
    broken = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert [] == broken


@every_page
def test_every_file_that_is_named_exists(page: Path) -> None:
    """What looks like a file or a folder in a code span is one: from the page, the root, or the package."""
    bases = (page.parent, ROOT, ROOT / "src", ROOT / "src/meshkit", ROOT / "examples/learning_hub")
    missing = []
    for span in spans(page):
        if not re.fullmatch(r"[\w.-][\w./-]*(\.(py|md|ya?ml|json|toml|sh)|/)", span) or "NAME" in span:
            continue
        by_itself = "/" not in span and any(
            any((ROOT / folder).rglob(span)) for folder in ("src", "examples", "proofs", "tests")
        )
        if not by_itself and not any((base / span).exists() for base in bases):
            missing.append(span)
    assert [] == missing


def test_the_house_is_drawn_as_it_stands() -> None:
    """Every folder and file in the drawing of the package is there, and every folder of the package is in it."""
    (drawing,) = (
        block.text for block in blocks(ROOT / "docs/architecture.md") if block.text.startswith("src/meshkit/\n")
    )
    drawn = {word for line in drawing.splitlines()[1:] for word in re.findall(r"^(?:  \S+)+", line)}
    drawn = {word for words in drawn for word in words.split() if word.endswith((".py", "/"))}
    package = ROOT / "src/meshkit"
    assert set() == {name for name in drawn if not (package / name).exists()}
    there = {f"{path.parent.name}/" for path in package.glob("*/*.py")}
    assert set() == there - drawn


# --- commands --------------------------------------------------------------------------------------------------------


@every_page
def test_every_meshkit_command_exists(page: Path) -> None:
    """Each `meshkit …` line is a command of the command line, with options and as many arguments as that takes."""
    wrong = [f"{line}: {problem}" for line in commands(page, "meshkit") for problem in misfits(line)]
    assert [] == wrong


def misfits(line: str) -> list[str]:
    """What in a `meshkit …` line the command line does not know. `list | show` means either."""
    first, *others = line.split(" | ")
    words = shlex.split(first)[1:]
    found = _misfits(words)
    for other in others:
        found += _misfits([*words[:-1], *shlex.split(other)])
    return found


def _misfits(words: list[str]) -> list[str]:
    # Any, because typer's commands are click's, by whatever name it carries them.
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name, *words = words
        if name == "…":
            return []
        if name not in command.commands:
            return [f"no command {name!r}"]
        command = command.commands[name]
    options = {name: parameter for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    most = sum(10 if parameter.nargs == -1 else 1 for parameter in command.params if parameter.opts[0][0] != "-")
    wrong, arguments = [], 0
    while words:
        word, *words = words
        if word.startswith("-") and word not in ("--help", "-h"):
            if word not in options:
                wrong.append(f"no option {word}")
            elif not options[word].is_flag:
                words = words[1:]
        elif not word.startswith("-"):
            arguments += 1
    return [*wrong, *([f"takes {most} arguments"] if arguments > most else [])]


def test_the_command_check_can_tell() -> None:
    """An unknown command, option or argument is found."""
    assert [] == misfits("meshkit dlq list | show | replay")
    assert [] == misfits("meshkit dlq replay QUEUE.dlq --limit 1 --url URL")
    for line in ("meshkit dlq purge", "meshkit dlq list | shows", "meshkit dlq show QUEUE --all", "meshkit export A B"):
        assert misfits(line), line


@every_page
def test_every_command_of_run_exists(page: Path) -> None:
    """Each `./run …` line names a command of `./run help`, and what comes after it is known there."""
    wrong = []
    for line in commands(page, "./run"):
        words = [word for word in shlex.split(line)[1:] if not PLACEHOLDER.fullmatch(word)]
        if not words:
            continue
        command, *rest = words
        if command not in run_commands():
            wrong.append(f"{line}: no command {command}")
        wrong += [f"{line}: {word}?" for word in rest if not _known_to_run(command, word)]
    assert [] == wrong


@cache
def run_commands() -> frozenset[str]:
    page = subprocess.run([ROOT / "run", "help"], capture_output=True, text=True, check=True).stdout
    return frozenset(re.findall(r"^\./run (\w+)", page, re.MULTILINE))


def _known_to_run(command: str, word: str) -> bool:
    if "/" in word:
        return (ROOT / word).exists()
    match command:
        case "demo":
            return word in help_of("learning_hub.demo")
        case "bench" if not word.startswith("-"):
            return word == "all" or (ROOT / "benchmarks" / f"{word}.py").exists()
        case "proof" if not word.startswith("-"):
            return any((ROOT / "proofs" / name).exists() for name in (f"{word}.py", f"{word}/__main__.py"))
        case "bench":
            return word == "--json"
        case _:
            return True  # pytest's


@cache
def help_of(module: str) -> str:
    line = [sys.executable, "-m", module, "--help"]
    environment = {"PYTHONPATH": str(ROOT / "examples")}
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout


@every_page
def test_every_module_to_run_exists(page: Path) -> None:
    """What a page says to run with `python -m` is there."""
    modules = [line.split()[2] for line in commands(page, "python") if line.startswith("python -m ")]
    assert [] == [module for module in modules if importlib.util.find_spec(module) is None]


@every_page
def test_every_install_line_names_extras_that_there_are(page: Path) -> None:
    """`pip install "meshkit-py[…]"` is quoted and asks for extras of the distribution."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in commands(page, "pip"):
        for wanted, extras in re.findall(r"(meshkit[\w-]*)(?:\[([\w,]*)\])?", line):
            assert project["name"] == wanted
            if extras:
                assert f'"{wanted}[{extras}]"' in line
                assert set(extras.split(",")) <= set(project["optional-dependencies"])
