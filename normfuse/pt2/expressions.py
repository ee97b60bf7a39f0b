"""Sizes and guards: text that PyTorch evaluates as Python. It is parsed, held to arithmetic, and written anew."""

import ast
import re
from typing import Any

from normfuse.pt2.problems import Broken, Unsafe

__all__ = ["SYMBOL", "guard", "size"]

#: Name of a size that may vary.
SYMBOL = r"[a-z]{1,3}\d{1,6}"
_FUNCTIONS = frozenset(
    """
    Symbol Integer Float Rational Add Mul Pow Min Max Mod PythonMod FloorDiv CleanDiv CeilDiv CeilToInt FloorToInt RoundToInt
    TruncToInt TruncToFloat IntTrueDiv FloatTrueDiv ToFloat Where ModularIndexing PowByNatural FloatPow Identity Abs Eq Ne Lt Le
    Gt Ge Equality Unequality LessThan StrictLessThan GreaterThan StrictGreaterThan And Or Not Piecewise ExprCondPair Tuple
    """.split()
)
_CONSTANTS = frozenset(("true", "false", "oo", "int_oo"))
_IN_GUARDS = frozenset(("min", "max", "abs", "int", "float", "round", "inf"))
_METHODS = frozenset(("size", "stride", "storage_offset", "dim"))
_MATH = frozenset(("ceil", "floor", "sqrt", "trunc", "isnan", "inf"))
_OPERATORS = (ast.operator, ast.unaryop, ast.cmpop, ast.boolop, ast.Load)
_WRITTEN = re.compile(r"[\w .+\-]*")
_LONGEST = 20_000
_HIGHEST_POWER = 64  # beyond it numbers grow without bound


def size(value: Any, where: str) -> str:
    """A size as sympy writes it: `Mul(Integer(2), Symbol('s0', positive=True, integer=True))`."""
    return _rebuilt(value, where, guarding=False)


def guard(value: Any, where: str) -> str:
    """A condition on inputs: `L['x'].size()[0] == L['y'].size()[0]`."""
    return _rebuilt(value, where, guarding=True)


def _rebuilt(value: Any, where: str, *, guarding: bool) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise Broken(f"{where} is no expression of up to {_LONGEST} letters")
    try:
        tree = ast.parse(value, mode="eval").body
        harmless = _harmless(tree, guarding)
        text = ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise Unsafe(f"{where} is {value[:80]!r}, which is no arithmetic") from e
    if not harmless:
        raise Unsafe(f"{where} is {value[:80]!r}, which is more than arithmetic")
    return text


def _harmless(node: ast.AST, guarding: bool) -> bool:
    def ok(*nodes: ast.AST) -> bool:
        return all(_harmless(n, guarding) for n in nodes)

    match node:
        case ast.Call(func=ast.Name("Symbol"), args=[ast.Constant(str(name))], keywords=keywords):
            return re.fullmatch(SYMBOL, name) is not None and all(_is_flag(k) for k in keywords)
        case ast.Call(func=ast.Name("Float" | "Integer" | "Rational"), args=args, keywords=keywords):
            return all(_is_written_number(a) for a in args) and all(_is_flag(k) for k in keywords)
        case ast.Call(func=ast.Name("Pow" | "PowByNatural" | "FloatPow"), args=[base, power], keywords=[]):
            return _is_small(power) and ok(base, power)
        case ast.Call(func=ast.Name(name), args=args, keywords=keywords):
            known = name in _FUNCTIONS or (guarding and name in _IN_GUARDS)
            return known and all(_is_flag(k) for k in keywords) and ok(*args)
        case ast.Call(func=ast.Attribute(value=ast.Name("math"), attr=name), args=args, keywords=[]) if guarding:
            return name in _MATH and ok(*args)
        case ast.Call(func=ast.Attribute(value=owner, attr=name), args=args, keywords=[]) if guarding:
            return name in _METHODS and _is_input(owner) and ok(*args)
        case ast.Attribute(value=ast.Name("math"), attr="inf") if guarding:
            return True
        case ast.Subscript(value=ast.Call() as owner, slice=ast.Constant(int())) if guarding:
            return ok(owner)
        case ast.Subscript() | ast.Name("L") if guarding:
            return _is_input(node)
        case ast.Name(id=name):
            return name in _CONSTANTS or re.fullmatch(SYMBOL, name) is not None or (guarding and name in _IN_GUARDS)
        case ast.Constant(value=constant):
            return isinstance(constant, (int, float)) or (
                guarding and isinstance(constant, str) and bool(_WRITTEN.fullmatch(constant))
            )
        case ast.BinOp(op=ast.Pow() | ast.LShift() | ast.RShift(), left=left, right=right):
            return _is_small(right) and ok(left, right)
        case ast.BinOp() | ast.UnaryOp() | ast.BoolOp() | ast.Compare() | ast.Tuple():
            return ok(*(n for n in ast.iter_child_nodes(node) if not isinstance(n, _OPERATORS)))
        case _:
            return False


def _is_input(node: ast.AST) -> bool:
    """`L['x']`, `L['args'][0]`: an input, or what stands in it."""
    match node:
        case ast.Name("L"):
            return True
        case ast.Subscript(value=owner, slice=ast.Constant(value=key)):
            return _is_input(owner) and (isinstance(key, int) or (isinstance(key, str) and bool(_WRITTEN.fullmatch(key))))
        case _:
            return False


def _is_flag(argument: ast.keyword) -> bool:
    return isinstance(argument.value, ast.Constant) and isinstance(argument.value.value, (bool, int)) and argument.arg is not None


def _is_written_number(node: ast.AST) -> bool:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _is_written_number(operand)
        case ast.Constant(value=str() as text):
            return re.fullmatch(r"[+-]?[\d.]{1,400}(e[+-]?\d{1,4})?|[+-]?inf|nan", text) is not None
        case ast.Constant(value=value):
            return isinstance(value, (int, float))
        case _:
            return False


def _is_small(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name("Integer" | "Float" | "Rational"), args=args):
            return all(_is_small(a) for a in args)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _is_small(operand)
        case ast.Constant(value=str() as text):
            return re.fullmatch(r"[+-]?[\d.]{1,20}", text) is not None and abs(float(text)) <= _HIGHEST_POWER
        case ast.Constant(value=value):
            return isinstance(value, (int, float)) and abs(value) <= _HIGHEST_POWER
        case _:
            return False
