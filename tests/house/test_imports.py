"""Who may import whom (docs/architecture.md), read from the imports themselves."""

import ast
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "meshkit"

EDGES = {"httpx", "fastapi", "worker", "rabbitmq", "redis", "sqlalchemy"}
MAY_IMPORT = {
    "errors": set(),
    "_version": set(),
    "core": {"errors"},
    "policies": {"errors", "core"},
    "messaging": {"errors", "core", "policies"},
    "telemetry": {"errors", "core", "policies", "messaging", "_version"},
    **{key: {"errors", "core", "policies", "messaging", "telemetry", "_version"} for key in EDGES},
    "embedded": set(),
    "pack": {"errors", "telemetry", "core"},
    "testing": {"errors", "core", "policies", "messaging", "telemetry", "embedded", "pack", *EDGES},
    "cli": {"errors", "core", "policies", "messaging", "telemetry", "embedded", "pack", "testing", "_version", *EDGES},
}
# A third-party library and the only places that may import it.
ONLY_IN = {
    "pybreaker": {"policies/circuit_breaker.py"},
    "tenacity": {"policies/retry.py"},
    "prometheus_client": {"telemetry/"},
    "opentelemetry": {"telemetry/", "embedded/otlp.py"},
    "google": {"embedded/otlp.py"},  # protobuf, which comes with opentelemetry-proto
    "aio_pika": {"rabbitmq/"},
    "aiormq": {"rabbitmq/"},
    "pamqp": {"rabbitmq/", "embedded/"},
    "yarl": {"rabbitmq/"},  # the URL class that aio-pika takes and gives
    "httpx": {"httpx.py"},
    "httpx2": {"httpx.py"},
    "httpcore": {"httpx.py"},
    "fastapi": {"fastapi.py"},
    "starlette": {"fastapi.py"},
    "sqlalchemy": {"sqlalchemy.py"},
    "redis": {"redis.py"},
    "typer": {"cli/"},
    "rich": {"cli/"},
}


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def package(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in the file, type-checking blocks left out."""
    tree = ast.parse(path.read_text())
    checking = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in checking:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it leads"
            assert node.module is not None
            names.add(node.module)
            if node.module == "meshkit":
                names |= {f"meshkit.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_only_downwards(path: Path) -> None:
    """A file of meshkit imports only what stands below it, and an edge never another edge."""
    own = package(path)
    if own == "__init__":
        return
    assert own in MAY_IMPORT, f"{own} is not in docs/architecture.md's drawing"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "meshkit" and len(parts) > 1 and parts[1] != own:
            assert parts[1] in MAY_IMPORT[own], f"{own} imports meshkit.{parts[1]}"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_third_party_libraries_stay_in_their_place(path: Path) -> None:
    """Each third-party library is imported in the one place that plugs into it."""
    where = str(path.relative_to(SOURCE))
    for name in imported(path):
        top = name.split(".")[0]
        if top in ("meshkit", "__future__") or top in sys.stdlib_module_names:
            continue
        assert top in ONLY_IN, f"{where} imports {top}, which has no place yet"
        assert any(where == place or (place.endswith("/") and where.startswith(place)) for place in ONLY_IN[top]), (
            f"{where} imports {top}, which belongs in {sorted(ONLY_IN[top])}"
        )


def test_the_core_is_standard_library_only() -> None:
    """core/ and errors import nothing but the standard library and each other."""
    for path in files():
        if package(path) in ("core", "errors"):
            for name in imported(path):
                assert name.split(".")[0] in {*sys.stdlib_module_names, "meshkit"}, f"{path} imports {name}"
