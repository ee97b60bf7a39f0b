"""The guards of a source file, and the file with one of them disabled.

A guard is what keeps a rule from rewriting: `raise Refuse(…)` with its condition, `if …: return None`, the `if` of a case or a
comprehension, a literal inside a pattern, and each operand of `and` and `or`. Disabled, the rule takes more than it may.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = ["Guard", "disable", "guards"]


@dataclass(frozen=True)
class Guard:
    """One guard of a file.

    Attributes:
        function: qualified name of the function around it.
        line, last: its first and last line.
        kind: `condition`, `case`, `operand`, `filter`, `literal` or `raise`.
        text: its source, in one line.
        number: which one of those that are alike in kind, function and text.
    """

    function: str
    line: int
    last: int
    kind: str
    text: str
    number: int = 0

    @property
    def key(self) -> str:
        """What names it while lines around it move."""
        return f"{self.function} | {self.kind} | {self.text} | {self.number}"


def guards(source: str) -> list[Guard]:
    """The guards of a source, in order."""
    return [guard for guard, _ in _found(ast.parse(source))]


def disable(module: ModuleType, source: str, guard: Guard) -> None:
    """Give the function of a loaded module the code that it would have without the guard; whoever holds the function sees it.

    Raises:
        LookupError: the source has no such guard.
    """
    tree = ast.parse(source)
    edit = next((edit for found, edit in _found(tree) if found == guard), None)
    if edit is None:
        raise LookupError(guard.key)
    edit()
    name = str(module.__file__)
    codes = dict(_codes(compile(ast.fix_missing_locations(tree), name, "exec"), ""))
    _function(module, guard.function).__code__ = codes[guard.function]


def _codes(code: CodeType, prefix: str) -> Iterator[tuple[str, CodeType]]:
    """The functions of a module and of its classes, by qualified name."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            name = f"{prefix}{inner.co_name}"
            yield name, inner
            yield from _codes(inner, f"{name}.")


def _function(module: ModuleType, name: str) -> FunctionType:
    found: Any = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    while not isinstance(found, FunctionType):  # a property, a class method, a cached function
        found = next(inner for a in ("fget", "__func__", "__wrapped__") if (inner := getattr(found, a, None)) is not None)
    return found


# -- what counts as a guard ----------------------------------------------------------------------------------------------


def _found(tree: ast.Module) -> Iterator[tuple[Guard, Callable[[], None]]]:
    """Every guard, and what disables it in the tree."""
    seen: dict[str, int] = {}
    for function, node in _functions(tree, ""):
        for kind, part, edit in _inside(node):
            pattern = part.pattern if isinstance(part, ast.match_case) else part
            text = " ".join(ast.unparse(part.pattern if isinstance(part, ast.match_case) else part).split())
            guard = Guard(function, pattern.lineno, pattern.end_lineno or pattern.lineno, kind, text)
            number = seen[guard.key] = seen.get(guard.key, -1) + 1
            yield Guard(function, guard.line, guard.last, kind, text, number), edit


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.FunctionDef):
            yield f"{prefix}{inner.name}", inner
        elif isinstance(inner, ast.ClassDef):
            yield from _functions(inner, f"{prefix}{inner.name}.")


def _inside(function: ast.FunctionDef) -> Iterator[tuple[str, Any, Callable[[], None]]]:
    conditions = set(_conditions(function))
    for node in ast.walk(function):
        match node:
            case ast.If() if _leaves(node.body):
                yield "condition", node.test, _set(node, "test", node.test, value=False)
            case ast.IfExp() if _nothing(node.body) or _nothing(node.orelse):
                yield "condition", node.test, _set(node, "test", node.test, value=not _nothing(node.body))
            case ast.match_case(guard=None) if isinstance(node.body[0], ast.Raise):
                yield "case", node, _set(node, "guard", ast.Constant(value=False), value=False)
            case ast.match_case(guard=ast.expr() as guard):
                yield "case", guard, _set(node, "guard", guard, value=not _leaves(node.body))
            case ast.BoolOp(op=op) if isinstance(op, ast.And) or node in conditions:
                for i, operand in enumerate(node.values):
                    if not _narrows(operand):
                        yield "operand", operand, _set(node.values, i, operand, value=isinstance(node.op, ast.And))
            case ast.comprehension():
                for i, condition in enumerate(node.ifs):
                    yield "filter", condition, _set(node.ifs, i, condition, value=True)
            case ast.MatchClass():
                for patterns in (node.patterns, node.kwd_patterns):
                    for i, pattern in enumerate(patterns):
                        if isinstance(pattern, (ast.MatchValue, ast.MatchSingleton)):
                            yield "literal", pattern, _put(patterns, i, ast.MatchAs())
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if not isinstance(body, list) or isinstance(node, ast.match_case) or (isinstance(node, ast.If) and name == "body"):
                continue  # those are disabled with their condition
            for i, statement in enumerate(body):
                if isinstance(statement, ast.Raise) and statement.exc is not None:
                    yield "raise", statement, _put(body, i, ast.Pass())


def _conditions(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """Expressions that are asked for their truth; `x or default` is not one of them."""
    work: list[ast.expr | None] = []
    for node in ast.walk(function):
        match node:
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) | ast.match_case(guard=test):
                work.append(test)
            case ast.comprehension(ifs=tests):
                work += tests
            case ast.Call(func=ast.Name(id="any" | "all"), args=[ast.GeneratorExp(elt=element)]):
                work.append(element)
            case ast.FunctionDef(returns=ast.Name(id="bool"), body=body):
                work += [n.value for statement in body for n in ast.walk(statement) if isinstance(n, ast.Return)]
    while work:
        match work.pop():
            case ast.BoolOp(values=values) as whole:
                yield whole
                work += values
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                work.append(operand)


def _leaves(body: list[ast.stmt]) -> bool:
    """Does a block end in giving up?"""
    last = body[-1]
    return isinstance(last, (ast.Raise, ast.Continue, ast.Break)) or (
        isinstance(last, ast.Return) and (last.value is None or _nothing(last.value))
    )


def _nothing(value: ast.expr) -> bool:
    """None, False, an empty list or tuple: what a rule returns that does nothing."""
    match value:
        case ast.Constant(value=None | False):
            return True
        case ast.List(elts=[]) | ast.Tuple(elts=[]):
            return True
        case _:
            return False


def _narrows(operand: ast.expr) -> bool:
    """`isinstance(x, fx.Node)` and the like, which tell the type checker what every graph has at that place."""
    match operand:
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return _narrows(inner)
        case ast.Call(func=ast.Name(id="isinstance"), args=[_, kind]):
            return ast.unparse(kind) in ("fx.Node", "Tensor", "Op", "torch._ops.OpOverload")
        case _:
            return False


def _set(owner: Any, place: Any, condition: ast.expr, *, value: bool) -> Callable[[], None]:
    """A condition that is evaluated, for the names that it binds, and counts as `value` whatever comes out."""
    op = ast.Or() if value else ast.And()
    return _put(owner, place, ast.BoolOp(op=op, values=[condition, ast.Constant(value=value)]))


def _put(owner: Any, place: Any, new: ast.AST) -> Callable[[], None]:
    def edit() -> None:
        if isinstance(owner, list):
            owner[place] = new
        else:
            setattr(owner, place, new)

    return edit
