"""Looks up what a page names in Python: whether it exists, and takes the arguments that the page gives it."""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import types
from collections.abc import Mapping
from typing import Any


def parsed(text: str) -> ast.expr | None:
    """A code span as an expression; None for what is no Python, or holds no name: a path, a header, a value.

    `…` stands for what is left out, `@` and `await` in front and `name=` of a parameter belong to the place of use.
    """
    try:
        (statement,) = ast.parse(text.replace("…", "...").removeprefix("@").removeprefix("await ")).body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(statement, ast.Expr | ast.Assign):
        return None
    return statement.value if isinstance(statement.value, ast.Name | ast.Attribute | ast.Call) else None


def defined_in(tree: ast.Module) -> dict[str, Any]:
    """The names that a block binds; what it imports is really imported, the rest is there without a value.

    Raises:
        ImportError, AttributeError: what is imported does not exist.
    """
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                for alias in node.names:
                    module = importlib.import_module(alias.name)
                    top = importlib.import_module(alias.name.partition(".")[0])
                    names[alias.asname or top.__name__] = module if alias.asname else top
            case ast.ImportFrom():
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    names[alias.asname or alias.name] = getattr(module, alias.name)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names[node.name] = None
            case ast.arg():
                names[node.arg] = None
            case ast.ExceptHandler(name=str(name)):
                names[name] = None
            case ast.Name(ctx=ast.Store()):
                names[node.id] = None
    return names


def problems(tree: ast.AST, names: Mapping[str, Any]) -> list[str]:
    """What does not exist, and what is called with arguments that it does not take. A name without a value is let pass."""
    found: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Name(ctx=ast.Load()) if node.id not in names and not hasattr(builtins, node.id):
                found.append(f"{node.id} is not defined")
            case ast.Attribute():
                try:
                    _resolve(node, names)
                except AttributeError as error:
                    found.append(f"{ast.unparse(node)}: {error}")
            case ast.Call():
                try:
                    _bind(node, names)
                except AttributeError:
                    continue  # said of the attribute
                except TypeError as error:
                    found.append(f"{ast.unparse(node)}: {error}")
    return found


def _resolve(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """What an expression of names and dots stands for; None where that cannot be known without running it."""
    match node:
        case ast.Name():
            return names.get(node.id, getattr(builtins, node.id, None))
        case ast.Attribute():
            holder = _resolve(node.value, names)
            if holder is None:
                return None
            if isinstance(holder, types.ModuleType) and not hasattr(holder, node.attr):
                try:
                    return importlib.import_module(f"{holder.__name__}.{node.attr}")
                except ModuleNotFoundError:
                    raise AttributeError(f"module {holder.__name__} has no {node.attr}") from None
            return getattr(holder, node.attr)
        case _:
            return None


def _bind(call: ast.Call, names: Mapping[str, Any]) -> None:
    callee = _resolve(call.func, names)
    if callee is None or not (call.args or call.keywords):
        return  # `install()` in a sentence is the name of a function
    signature = inspect.signature(callee)
    # A page writes `bus.publish(…)`, and we look at the class.
    holder = _resolve(call.func.value, names) if isinstance(call.func, ast.Attribute) else None
    self_ = [None] if inspect.isclass(holder) and inspect.isfunction(callee) else []
    left_out = any(isinstance(argument, ast.Constant) and argument.value is ... for argument in call.args)
    keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    if left_out:
        signature.bind_partial(*self_, **keywords)
    else:
        signature.bind(*self_, *call.args, **keywords)
