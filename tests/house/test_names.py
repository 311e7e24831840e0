"""A name is promised in one place: public names, error codes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import meshkit
from meshkit import errors

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "meshkit"


def test_what_type_checkers_see_is_what_is_loaded() -> None:
    """The imports for type checkers and the table that loads names agree, name by name and module by module."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    promised = {name: (module, name) for name, module in meshkit._PUBLIC.items()}
    promised |= {name: ("meshkit", name) for name in meshkit._MODULES}
    assert promised == seen


def test_every_public_name_loads() -> None:
    """Each public name can be had from `meshkit`, and is listed in `__all__` once."""
    assert len(set(meshkit.__all__)) == len(meshkit.__all__)
    for name in meshkit.__all__:
        assert getattr(meshkit, name) is not None


def test_importing_meshkit_loads_no_third_party_library() -> None:
    """`import meshkit` loads the standard library and meshkit, nothing else."""
    code = (
        "import sys; before = set(sys.modules); import meshkit; "
        "print(sorted({n.split('.')[0] for n in set(sys.modules) - before} - set(sys.stdlib_module_names) - {'meshkit'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[]" == done.stdout.strip()


def error_classes() -> set[type[errors.MeshkitError]]:
    for name in meshkit.__all__:
        getattr(meshkit, name)
    found: set[type[errors.MeshkitError]] = set()
    todo = [errors.MeshkitError]
    while todo:
        for child in todo.pop().__subclasses__():
            if child.__module__.startswith("meshkit") and child not in found:
                found.add(child)
                todo.append(child)
    return found


def test_every_error_code_is_listed() -> None:
    """Each code used in the source stands in errors.CODES, each listed code is used, and docs/errors.md lists them all."""
    used = {
        code
        for path in SOURCE.rglob("*.py")
        for code in re.findall(r"\bMK\d{3}\b", path.read_text().replace("MK1xx", ""))
        if path.name != "errors.py"
    }
    own = {cls.code for cls in error_classes()} | set(
        re.findall(r'code(?:: str)? ?= ?"(MK\d{3})"', (SOURCE / "errors.py").read_text())
    )
    assert set(errors.CODES) >= used | own
    assert set(errors.CODES) == used | own, "a code that nothing raises"
    page = (ROOT / "docs" / "errors.md").read_text()
    listed = dict(re.findall(r"^\| (MK\d{3}) \| ([^|]+?) \|", page, re.MULTILINE))
    assert errors.CODES == listed


def test_every_error_class_has_a_public_name() -> None:
    """An error that a user may want to catch can be imported from `meshkit`."""
    assert set() == {cls.__name__ for cls in error_classes() if not cls.__name__.startswith("_")} - set(meshkit.__all__)
