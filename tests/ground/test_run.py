"""The script `run`: the environment it makes, and what it says where it cannot."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# All that the script may call besides Python, uv and what it names in a line of advice.
TOOLS = ("sh", "date", "dirname", "cksum", "cat", "grep", "mkdir", "rm", "touch", "printf")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with the script and a distribution that needs nothing, so that an install is a matter of seconds."""
    tree = tmp_path / "a tree"
    (tree / "src" / "meshkit").mkdir(parents=True)
    (tree / "src" / "meshkit" / "__init__.py").touch()
    shutil.copy(ROOT / "run", tree / "run")
    shutil.copytree(ROOT / "proofs", tree / "proofs", ignore=lambda folder, names: [n for n in names if n[:2] != "__"])
    (tree / "pyproject.toml").write_text(
        """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "meshkit-py"
version = "1"
[project.optional-dependencies]
test = []
[tool.hatch.build.targets.wheel]
packages = ["src/meshkit"]
"""
    )
    return tree


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder for PATH with no Python in it, only the tools that every system has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        if found:
            (folder / tool).symlink_to(found)
    return folder


def _fake(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def _start(tree: Path, *words: str, path: Path | None = None) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "HOME": str(tree.parent),
        "PATH": str(path) if path else f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    return subprocess.Popen(
        [tree / "run", *words],
        # From any folder.
        cwd="/",
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _run(tree: Path, *words: str, path: Path | None = None) -> tuple[int, str, str]:
    process = _start(tree, *words, path=path)
    out, err = process.communicate()
    return process.returncode, out, err


def _refused(result: tuple[int, str, str]) -> str:
    """The one line that a refusal says."""
    code, out, err = result
    assert (2, "", 1) == (code, out, err.count("\n")), err
    return err


def test_help_names_every_command(tree: Path, bare: Path) -> None:
    """Help lists what there is and needs no Python; an unknown command is one line."""
    code, out, err = _run(tree, "help", path=bare)
    assert (0, "") == (code, err)
    assert ["demo", "test", "check", "bench", "proof", "servers", "help"] == re.findall(
        r"^\./run (\w+)", out, re.MULTILINE
    )
    assert 'unknown command "tset"' in _refused(_run(tree, "tset", path=bare))


def test_without_python_it_says_what_installs_one(tree: Path, bare: Path) -> None:
    """No Python at all: one line, with a line to install it."""
    line = _refused(_run(tree, "proof", path=bare))
    assert (
        "meshkit needs Python 3.11 or newer, and none is here. Install one:  curl -LsSf https://astral.sh/uv/" in line
    )


def test_a_python_too_old_is_named(tree: Path, bare: Path) -> None:
    """Only an old Python: one line that says which version is here."""
    _fake(bare, "python3", 'case "$2" in *exit*) exit 1 ;; esac; echo 3.9')
    assert "only Python 3.9 is here" in _refused(_run(tree, "proof", path=bare))


def test_a_python_without_venv_says_what_installs_it(tree: Path, bare: Path) -> None:
    """A Python without its venv module, as Debian ships it: one line with the package's name."""
    _fake(bare, "python3.11", 'case "$2" in *ensurepip*) exit 1 ;; esac; echo 3.11')
    _fake(bare, "apt-get", "exit 1")
    line = _refused(_run(tree, "proof", path=bare))
    assert "Python 3.11 is here, its venv module is not. Install it:  sudo apt-get install -y python3.11-venv" in line


@pytest.mark.once
@pytest.mark.timeout(300)
def test_the_environment_is_made_once_and_heals(tree: Path) -> None:
    """It is made at the first command, left alone at the next, renewed with pyproject.toml, and made anew after a broken-off install
    and in a tree that was moved."""
    stamp = tree / ".venv" / ".installed"
    code, first_list, err = _run(tree, "proof")
    assert 0 == code, err
    assert "run: installed in" in err
    assert (0, first_list, "") == _run(tree, "proof")

    with open(tree / "pyproject.toml", "a") as project:
        project.write("# changed\n")
    assert "run: installed in" in _run(tree, "proof")[2]

    # What an install that was broken off leaves: its mark, and a package that is only half there.
    (tree / ".venv" / ".installing").touch()
    (tree / ".venv" / "half-a-package").touch()
    code, _, err = _run(tree, "proof")
    assert 0 == code, err
    assert stamp.exists()
    assert not (tree / ".venv" / "half-a-package").exists()
    assert (0, first_list, "") == _run(tree, "proof")

    # A tree that was moved: the environment's scripts lead to where it was.
    moved = tree.rename(tree.with_name("moved"))
    code, moved_list, err = _run(moved, "proof")
    assert (0, first_list) == (code, moved_list), err
    assert "run: making .venv" in err


@pytest.mark.once
@pytest.mark.timeout(300)
def test_ctrl_c_during_the_install_and_two_runs_at_once(tree: Path) -> None:
    """An install broken off by Ctrl-C is made good by the next run, and two runs at once end with one whole environment."""
    broken_off = _start(tree, "proof")
    assert broken_off.stderr is not None
    while "installing" not in broken_off.stderr.readline():
        pass
    time.sleep(0.2)
    os.killpg(broken_off.pid, signal.SIGINT)
    broken_off.communicate()
    assert 0 != broken_off.returncode
    assert not (tree / ".venv" / ".installed").exists()

    both = [_start(tree, "proof"), _start(tree, "proof")]
    said = [process.communicate()[1] for process in both]
    assert [0, 0] == [process.returncode for process in both], said
    assert 1 == "".join(said).count("run: installed in")
