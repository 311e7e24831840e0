"""The wheel as a user gets it: built from the tree, installed into an empty environment, with the newest and the lowest packages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOWEST = Path(__file__).with_name("lowest.txt")
SMOKE = Path(__file__).with_name("smoke.py")
# The extras that bring tools for this repository, not libraries that a user's service runs with.
TOOLS = {"bench", "test", "check"}
TESTS = ROOT / "tests"
FEW = ["core", "cli", "worker"]
# These read the repository, or need nothing but the standard library.
AT_HOME = {"core", "docs", "ground", "house", "pack", "policies"}
# The policies that stand on a library: pybreaker and tenacity.
ON_A_LIBRARY = ["test_circuit_breaker.py", "test_breaker_hands.py", "test_retry_tenacity.py", "test_shared_state.py"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _run(*command: str | Path, cwd: Path) -> str:
    # The tree must not be reachable: neither by the folder this runs in, nor by a path of the environment.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert 0 == done.returncode, f"{' '.join(map(str, command))}\n{done.stdout}"
    return done.stdout


def _make_environment(folder: Path) -> Path:
    """An empty environment on this Python; its interpreter. With uv where there is one, as ./run does."""
    if shutil.which("uv"):
        _run("uv", "venv", "--quiet", "--python", sys.executable, folder, cwd=folder.parent)
    else:
        _run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def _install(python: Path, *words: str | Path) -> None:
    if shutil.which("uv"):
        _run("uv", "pip", "install", "--quiet", "--python", python, *words, cwd=python.parent)
    else:
        _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words, cwd=python.parent)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the backend that pyproject.toml names."""
    folder = tmp_path_factory.mktemp("wheel")
    python = _make_environment(folder / "builder")
    if shutil.which("uv"):
        _run("uv", "build", "--quiet", "--wheel", "--python", python, "--out-dir", folder, ROOT, cwd=folder)
    else:
        _run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def has_tests(folder: Path) -> bool:
    return folder.name not in AT_HOME and any(folder.glob("test_*.py"))


def _lower_bounds() -> dict[str, str]:
    """Each library that meshkit or one of its extras for users asks for, with the lowest version that it takes."""
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *(line for name, lines in extras.items() if name not in TOOLS for line in lines)]
    bounds = {}
    for line in asked:
        if line.startswith("meshkit-py["):
            continue
        parsed = re.fullmatch(r"([a-z0-9-]+)(?:\[[a-z,]+\])?>=([^,;\s]+)(?:,<[^,;\s]+)?", line)
        assert parsed is not None, f"{line!r} says no lowest version"
        bounds[parsed[1]] = parsed[2]
    return bounds


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    """tests/ground/lowest.txt pins each library to exactly the lower bound that pyproject.toml promises."""
    lines = [line for line in LOWEST.read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert _lower_bounds() == pins


def test_the_eight_packages_are_asked_for() -> None:
    """The distribution asks for the eight packages, sniffio and typer, and for nothing else."""
    assert {
        "opentelemetry-api",
        "opentelemetry-sdk",
        "opentelemetry-instrumentation-fastapi",
        "aio-pika",
        "httpx",
        "pybreaker",
        "tenacity",
        "prometheus-client",
        "sniffio",
        "typer",
    } == {re.split("[<>=]", line)[0] for line in PROJECT["dependencies"]}


@pytest.mark.once
@pytest.mark.timeout(600)
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """In the wheel is the package meshkit with its py.typed, and its metadata; no tests, no examples."""
    names = zipfile.ZipFile(wheel).namelist()
    assert "meshkit/py.typed" in names
    assert {"meshkit", wheel.name.split("-py3-")[0] + ".dist-info"} == {name.split("/")[0] for name in names}


@pytest.mark.once
@pytest.mark.timeout(900)
@pytest.mark.parametrize("versions", ["newest", "lowest"])
def test_the_wheel_works_in_an_empty_environment(wheel: Path, versions: str, tmp_path: Path) -> None:
    """Installed alone it does its work; with its extras beside it so do the tests that need no server: a few with the
    newest libraries, which all other runs have too, and with the lowest all that stand on a library."""
    folders = FEW if versions == "newest" else [folder for folder in sorted(TESTS.iterdir()) if has_tests(folder)]
    files = [] if versions == "newest" else [TESTS / "policies" / name for name in ON_A_LIBRARY]
    constraints = ("--constraint", LOWEST) if versions == "lowest" else ()
    python = _make_environment(tmp_path / "environment")
    _install(python, wheel, *constraints)
    assert "works" in _run(python, SMOKE, cwd=tmp_path)
    _install(python, f"{wheel}[test]", *constraints)
    _run(
        python,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not real and not once",
        "--rootdir",
        ROOT,
        "-c",
        ROOT / "pyproject.toml",
        *(TESTS / folder for folder in folders),
        *files,
        cwd=tmp_path,
    )
