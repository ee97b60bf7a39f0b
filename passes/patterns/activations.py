"""Activations written as arithmetic, read back from a graph.

    GELU(x) = x ½ (1 + erf(x / √2)),   or with tanh(√(2/π) (x + 0.044715 x³)) in place of erf;   SiLU(x) = x / (1 + e^-x)

The factors may stand in any order, and what is inside erf and tanh is any spelling of that polynomial. Constants must be those of
the operator. Sources: Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415, §2.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose, pi, sqrt
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.views import Add, Div, Mul, Neg, Pow, Square, Sub, Value

__all__ = ["RULE", "Activation", "activation_of"]

RULE = "activation_by_hand"

aten = torch.ops.aten

_EQUAL = 1e-10  # relative: the outputs behind many activations must agree to 1e-9
_NEAR = 0.02  # a constant this near to that of the operator was meant to be it
_DEPTH = 12  # operators down to which an expression is read
_SLOPE, _CUBIC = sqrt(2 / pi), 0.044715
_INSIDE: dict[Any, dict[int, float]] = {
    aten.erf.default: {1: sqrt(0.5)},
    aten.tanh.default: {1: _SLOPE, 3: _SLOPE * _CUBIC},
}  # coefficients by power of x


@dataclass(frozen=True, eq=False)
class Activation:
    """An operator and what it is a function of."""

    x: fx.Node
    name: str
    target: Any
    kwargs: dict[str, Any]


def activation_of(graph: Graph, node: fx.Node) -> Activation | None:
    """The activation whose last multiplication is `node`; None if it is none.

    Raises:
        Refuse: it is one but for its constants, or its dtype is not known.
    """
    if not isinstance(graph.view(node, 1), (Mul, Div)):
        return None
    factor, parts = _product(graph, node, _DEPTH)
    if len(parts) != 2:
        return None
    for x, gate in (parts, parts[::-1]):
        found = _gated(graph, x, gate, factor)
        if found is not None:
            _check_dtype(node, x)
            return found
    return None


def _gated(graph: Graph, x: fx.Node, gate: fx.Node, factor: float) -> Activation | None:
    """factor · x · gate, if that is an activation of x."""
    if gate.target in (aten.sigmoid.default, aten.special_expit.default):
        return Activation(x, "SiLU", aten.silu.default, {}) if factor == 1 and gate.args[0] is x else None
    match graph.view(gate, 1):
        case Add(Value(node=fx.Node() as v), c) | Add(c, Value(node=fx.Node() as v)) if (one := _number(c)) is not None:
            slope, functions = _product(graph, v, _DEPTH)  # one + slope · erf(inside)
        case _:
            return None
    if len(functions) != 1 or functions[0].target not in (aten.erf.default, aten.tanh.default):
        return None
    (function,) = functions
    inside = _polynomial(graph, function.args[0], x, _DEPTH)
    wanted = _INSIDE[function.target]
    if inside is None or inside.keys() != wanted.keys():
        return None
    pairs = [(factor * one, 0.5), (factor * slope, 0.5), (inside[1], wanted[1])]
    if 3 in wanted:
        pairs.append((inside[3] / inside[1], _CUBIC))
    if not all(isclose(a, b, rel_tol=_NEAR) for a, b in pairs):
        return None
    for a, b in pairs:
        if not isclose(a, b, rel_tol=_EQUAL):
            raise Refuse(f"looks like GELU with {a:.10g} in the place of {b:.10g}", remedy="write torch.nn.functional.gelu")
    approximate = {} if function.target is aten.erf.default else {"approximate": "tanh"}
    return Activation(x, "GELU", aten.gelu.default, approximate)


def _check_dtype(node: fx.Node, x: fx.Node) -> None:
    """The operators take floats only and keep their shape, where arithmetic also takes integers."""
    before, after = x.meta.get("val"), node.meta.get("val")
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        if not before.dtype.is_floating_point or before.dtype != after.dtype:
            raise Refuse(f"is an activation of {str(before.dtype).removeprefix('torch.')}, for which there is no operator")
    elif x.op == "placeholder":
        raise Refuse("the dtype of what it reads is not known", remedy="pass example_inputs")


# -- reading an expression ---------------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """A literal, or a constant without axes: any other might broadcast or change the dtype."""
    if isinstance(value, Constant):
        return float(value.value) if value.ndim == 0 else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _product(graph: Graph, node: fx.Node, depth: int) -> tuple[float, list[fx.Node]]:
    """The node as a number times some nodes."""
    if depth:
        match graph.view(node, 1):
            case Mul(Value(node=fx.Node() as a), Value(node=fx.Node() as b)):
                left, some = _product(graph, a, depth - 1)
                right, more = _product(graph, b, depth - 1)
                return left * right, some + more
            case Mul(Value(node=fx.Node() as a), c) | Mul(c, Value(node=fx.Node() as a)) if (times := _number(c)) is not None:
                inner, some = _product(graph, a, depth - 1)
                return inner * times, some
            case Div(Value(node=fx.Node() as a), c) if by := _number(c):
                inner, some = _product(graph, a, depth - 1)
                return inner / by, some
    return 1.0, [node]


def _polynomial(graph: Graph, value: Any, x: fx.Node, depth: int) -> dict[int, float] | None:
    """Coefficients by power of x, powers 0 to 3; None for anything else."""
    if value is x:
        return {1: 1.0}
    if not isinstance(value, fx.Node):
        c = _number(value)
        return None if c is None else {0: c}
    if depth == 0:
        return None

    def of(operand: Any) -> dict[int, float] | None:
        inner = operand.node if isinstance(operand, Value) else operand
        return _polynomial(graph, inner, x, depth - 1)

    match graph.view(value, 1):
        case Add(a, b):
            return _sum(of(a), of(b), 1.0)
        case Sub(a, b):
            return _sum(of(a), of(b), -1.0)
        case Mul(a, b):
            return _times(of(a), of(b))
        case Div(a, b) if by := _number(b):
            return _times(of(a), {0: 1 / by})
        case Neg(a):
            return _times(of(a), {0: -1.0})
        case Square(a) | Pow(a, 2 | 2.0):
            return _times(of(a), of(a))
        case Pow(a, 3 | 3.0):
            inner = of(a)
            return _times(inner, _times(inner, inner))
        case _:
            return None


def _sum(a: dict[int, float] | None, b: dict[int, float] | None, sign: float) -> dict[int, float] | None:
    if a is None or b is None:
        return None
    return {p: a.get(p, 0.0) + sign * b.get(p, 0.0) for p in {*a, *b}}


def _times(a: dict[int, float] | None, b: dict[int, float] | None) -> dict[int, float] | None:
    if a is None or b is None:
        return None
    found: dict[int, float] = {}
    for p, u in a.items():
        for q, v in b.items():
            found[p + q] = found.get(p + q, 0.0) + u * v
    return found if max(found) <= 3 else None
