"""Small mistakes, planted one at a time into a module's source: what the mutation proof has the tests find."""

from __future__ import annotations

import ast
import difflib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# What is only for the type checker or for people to read.
_FOR_READERS = frozenset({"Callable", "Literal", "ParamSpec", "TypeVar", "overload"})


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        where: qualified name of the function or class that it is in, empty for the module.
        line: in the original.
        lines: of the original; a test that runs none of them cannot notice it. `None` where it acts on import.
        was, becomes: the lines that differ, without indentation: together with `where`, its name in the list of survivors,
            which other changes of the file leave as it is.
        source: the whole module with it.
    """

    kind: str
    where: str
    line: int
    lines: range | None
    was: str
    becomes: str
    source: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.where, self.was, self.becomes


def mutants(source: str) -> list[Mutant]:
    """All mistakes that can be planted into `source`, in the order of its lines, each once."""
    found: dict[str, Mutant] = {}
    for mutant in _Planter(source).all():
        if mutant.source not in found and _runs(mutant.source):
            found[mutant.source] = mutant
    return list(found.values())


def _runs(source: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "<mutant>", "exec")
    except SyntaxError:
        return False
    return True


class _Planter:
    def __init__(self, source: str) -> None:
        self._source = source
        self._raising = False
        self._lines = source.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))

    def all(self) -> Iterator[Mutant]:
        yield from self._block(ast.parse(self._source).body, (), None)

    # -- walking ------------------------------------------------------------------------------------------------------

    def _block(self, body: list[ast.stmt], where: tuple[str, ...], inside: range | None) -> Iterator[Mutant]:
        for statement in body:
            yield from self._statement(statement, where, inside)

    def _statement(self, node: ast.stmt, where: tuple[str, ...], inside: range | None) -> Iterator[Mutant]:
        """`inside` is None outside of functions, where a statement runs on import."""
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            inner = (*where, node.name)
            if isinstance(node, ast.ClassDef) and any(
                isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases
            ):
                return
            body = range(node.body[0].lineno, node.body[-1].end_lineno + 1) if node.body[-1].end_lineno else None
            if any(isinstance(each, ast.Name) and each.id in _FOR_READERS for each in node.decorator_list):
                return
            for decorator in node.decorator_list:
                start, end = self._span(decorator)
                start = self._source.rindex("@", 0, start)
                yield self._made("removed decorator", inner, decorator, None, start, end, "")
            if isinstance(node, ast.ClassDef):
                yield from self._block(node.body, inner, None)
                return
            for default in (*node.args.defaults, *node.args.kw_defaults):
                if default is not None:
                    yield from self._expression(default, inner, body)
            yield from self._block(node.body, inner, body)
            return
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.Global | ast.Nonlocal | ast.Pass):
            return
        lines = inside and self._head(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__slots__" for target in node.targets
        ):
            return
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if inside is not None:
            yield from self._whole(node, where, lines)
        # What an error says is for people to judge.
        self._raising = isinstance(node, ast.Raise)
        for value in ast.iter_child_nodes(node):
            if isinstance(value, ast.expr) and value is not getattr(node, "annotation", None):
                yield from self._expression(value, where, lines)
            elif isinstance(value, ast.withitem):
                yield from self._expression(value.context_expr, where, lines)
        self._raising = False
        for part in ("body", "orelse", "finalbody"):
            yield from self._block(getattr(node, part, []), where, inside)
        for handler in getattr(node, "handlers", []):
            yield from self._block(handler.body, where, inside)

    def _whole(self, node: ast.stmt, where: tuple[str, ...], lines: range | None) -> Iterator[Mutant]:
        """Mistakes that take a statement as a whole."""
        start, end = self._span(node)
        if isinstance(node, ast.Return):
            if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
                yield self._made("return value", where, node, lines, start, end, "return None")
            elif node.value is None:
                yield self._made("removed statement", where, node, lines, start, end, "pass")
        elif isinstance(node, ast.AnnAssign) and node.value is None:
            return
        elif isinstance(
            node,
            ast.Expr | ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Delete | ast.Raise | ast.Break | ast.Continue,
        ):
            yield self._made("removed statement", where, node, lines, start, end, "pass")
        elif isinstance(node, ast.If | ast.While):
            start, end = self._span(node.test)
            yield self._made(
                "swapped branches", where, node.test, lines, start, end, f"not ({self._source[start:end]})"
            )

    def _expression(self, node: ast.expr, where: tuple[str, ...], lines: range | None) -> Iterator[Mutant]:
        start, end = self._span(node)

        def becomes(kind: str, new: ast.expr) -> Mutant:
            return self._made(kind, where, node, lines, start, end, f"({ast.unparse(new)})")

        if isinstance(node, ast.JoinedStr):
            return
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in _FOR_READERS:
            return
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            # What is said to people, and to type checkers.
            if name in _FOR_READERS or name.startswith("_log."):
                return
            if name == "cast":
                yield from self._expression(node.args[1], where, lines)
                return
        if isinstance(node, ast.Lambda):
            yield from self._expression(node.body, where, lines)
            return
        if isinstance(node, ast.Compare):
            for index, op in enumerate(node.ops):
                for other in _COMPARISONS[type(op)]:
                    ops = [*node.ops[:index], other(), *node.ops[index + 1 :]]
                    yield becomes("comparison", ast.Compare(node.left, ops, node.comparators))
        elif isinstance(node, ast.BoolOp):
            yield becomes("boolean", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
        elif isinstance(node, ast.UnaryOp):
            yield becomes("boolean" if isinstance(node.op, ast.Not) else "arithmetic", node.operand)
        elif isinstance(node, ast.BinOp) and not _of_types(node):
            yield becomes("arithmetic", ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right))
        elif isinstance(node, ast.IfExp):
            yield becomes("swapped branches", ast.IfExp(node.test, node.orelse, node.body))
        elif isinstance(node, ast.Constant):
            value = node.value
            if isinstance(value, bool):
                yield becomes("constant", ast.Constant(not value))
            elif isinstance(value, int | float):
                yield becomes("constant", ast.Constant(value + 1))
            elif isinstance(value, str) and not self._raising:
                yield becomes("constant", ast.Constant(f"not {value}"))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield from self._expression(child, where, lines)
            elif isinstance(child, ast.keyword):
                yield from self._expression(child.value, where, lines)
            elif isinstance(child, ast.comprehension):
                yield from self._expression(child.iter, where, lines)
                for condition in child.ifs:
                    yield from self._expression(condition, where, lines)

    # -- writing ------------------------------------------------------------------------------------------------------

    def _head(self, node: ast.stmt) -> range:
        """The lines of a statement without the blocks that it holds."""
        last = node.end_lineno or node.lineno
        blocks = [block for part in ("body", "handlers", "orelse", "finalbody") for block in getattr(node, part, [])]
        if blocks:
            last = max(node.lineno, min(block.lineno for block in blocks) - 1)
        return range(node.lineno, last + 1)

    def _span(self, node: ast.stmt | ast.expr) -> tuple[int, int]:
        return self._index(node.lineno, node.col_offset), self._index(node.end_lineno or 0, node.end_col_offset or 0)

    def _index(self, line: int, column: int) -> int:
        # The syntax tree counts bytes.
        return self._starts[line - 1] + len(self._lines[line - 1].encode()[:column].decode())

    def _made(
        self,
        kind: str,
        where: tuple[str, ...],
        node: ast.stmt | ast.expr,
        lines: range | None,
        start: int,
        end: int,
        text: str,
    ) -> Mutant:
        source = self._source[:start] + text + self._source[end:]
        changed = [
            line
            for line in difflib.unified_diff(self._source.splitlines(), source.splitlines(), lineterm="", n=0)
            if not line.startswith(("---", "+++", "@@"))
        ]
        was = " ".join(line[1:].strip() for line in changed if line.startswith("-"))
        becomes = " ".join(line[1:].strip() for line in changed if line.startswith("+"))
        return Mutant(kind, ".".join(where), node.lineno, lines, was, becomes, source)


def _of_types(node: ast.BinOp) -> bool:
    """`int | float`, as `isinstance` and annotations have it."""
    return isinstance(node.op, ast.BitOr) and all(
        isinstance(side, ast.Name | ast.BinOp | ast.Constant) for side in (node.left, node.right)
    )
