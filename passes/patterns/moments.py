"""Means, variances and their roots as people write them, read back from a graph.

    √(k m + ε)   with m the mean of squares or the variance over some axes

`x.pow(2)`, `x * x` and `square` are one thing, and so are `mean` and `sum / d`, `rsqrt(v)` and `1 / v ** 0.5`,
`var(unbiased=False)`, `mean((x − μ)²)` and `mean(x²) − μ²`. Casts between floating dtypes are looked through.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.ir.operators import is_cast
from normfuse.ir.views import (
    Add,
    Div,
    Identity,
    Mean,
    Movement,
    Mul,
    Pow,
    Reciprocal,
    Reshape,
    Rsqrt,
    Sqrt,
    Square,
    Sub,
    Sum,
    Value,
)  # fmt: skip

__all__ = ["Moment", "Root", "centred", "is_cast", "mean_of", "number", "plain", "root", "same"]

aten = torch.ops.aten

_DEPTH = 8  # operators down to which two values are compared


@dataclass(frozen=True, eq=False)
class Moment:
    """k times the mean of squares, or the variance, of a value over some axes.

    Attributes:
        of: the value; for a variance the one whose mean is removed.
        dims: the axes, as the model gives them.
        variance: is the mean removed?
        scale: the literal part of k.
        counted: a sum, not a mean: k holds the number of values as well.
        correction: what the number is lowered by in the denominator (1 for an unbiased variance).
    """

    of: fx.Node
    dims: tuple[int, ...]
    variance: bool
    scale: float = 1.0
    counted: bool = False
    correction: float = 0.0

    def factor(self, n: int) -> float | None:
        """k for n values; None where it is no number."""
        if n <= self.correction:
            return None
        return self.scale * (n if self.counted else 1) * n / (n - self.correction)


@dataclass(frozen=True, eq=False)
class Root:
    """(moment + eps) ** power, power = ½ or −½; `outside` is added to the root, not under it; `clamp` is its least value."""

    moment: Moment
    eps: float
    power: float
    outside: float = 0.0
    clamp: float = 0.0


def plain(graph: Graph, node: fx.Node, *, expanded: bool = True) -> fx.Node:
    """The value behind casts to a floating dtype, copies and, unless told otherwise, expansions."""
    while True:
        op = graph.view(node, 1)
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return node
        wider = expanded and isinstance(op, Movement) and op.target in (aten.expand.default, aten.expand_as.default)
        if not (isinstance(op, Identity) or wider or is_cast(node)):
            return node
        node = source


def same(graph: Graph, a: Any, b: Any, depth: int = _DEPTH) -> bool:
    """Do two arguments hold the same values: one node, or the same operators on the same values?"""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        a, b = plain(graph, a, expanded=False), plain(graph, b, expanded=False)
        if a is b:
            return True
        random = isinstance(a.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in a.target.tags
        if depth == 0 or random or a.op != "call_function" or a.target is not b.target or len(a.args) != len(b.args):
            return False
        return dict(a.kwargs) == dict(b.kwargs) and all(same(graph, x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(graph, x, y, depth) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def number(value: Any) -> float | None:
    """A literal or a constant of one value."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    return float(value.value.reshape(-1)[0]) if isinstance(value, Constant) and value.numel == 1 else None


def root(graph: Graph, node: fx.Node) -> Root | None:
    """(k m + ε) ** ±½, a standard deviation, or a Euclidean norm."""
    node = plain(graph, node)
    match graph.view(node, 1):
        case Rsqrt(Value(node=fx.Node() as v)):
            return _rooted(graph, v, -0.5)
        case Sqrt(Value(node=fx.Node() as v)):
            return _rooted(graph, v, 0.5)
        case Pow(Value(node=fx.Node() as v), exponent) if exponent in (0.5, -0.5):
            return _rooted(graph, v, exponent)
        case Reciprocal(Value(node=fx.Node() as v)) | Div(1 | 1.0, Value(node=fx.Node() as v)):
            inner = root(graph, v)
            return None if inner is None else replace(inner, power=-inner.power)
        case Add(Value(node=fx.Node() as v), c) | Add(c, Value(node=fx.Node() as v)) if (added := number(c)) is not None:
            inner = root(graph, v)
            return None if inner is None or inner.power < 0 or inner.outside else replace(inner, outside=added)
        case Div(Value(node=fx.Node() as v), c) if number(c):
            return _scaled(root(graph, v), 1.0 / number(c))  # type: ignore[operator]
        case Mul(Value(node=fx.Node() as v), c) | Mul(c, Value(node=fx.Node() as v)) if number(c) is not None:
            return _scaled(root(graph, v), number(c))  # type: ignore[arg-type]
    if node.target in (aten.clamp_min.default, aten.clamp.default) and len(node.args) == 2:
        inner = root(graph, node.args[0]) if isinstance(node.args[0], fx.Node) else None
        least = number(node.args[1])
        return None if inner is None or least is None else replace(inner, clamp=least)
    return _direct(graph, node)


def _scaled(inner: Root | None, factor: float) -> Root | None:
    """c (k m + ε) ** p  =  (c ** (1/p) k m + c ** (1/p) ε) ** p"""
    if inner is None or factor <= 0 or inner.outside or inner.clamp:
        return None
    k = factor ** (1 / inner.power)
    return replace(inner, moment=replace(inner.moment, scale=inner.moment.scale * k), eps=inner.eps * k)


def _rooted(graph: Graph, node: fx.Node, power: float) -> Root | None:
    node = plain(graph, node)
    match graph.view(node, 1):
        case Add(Value(node=fx.Node() as v), c) | Add(c, Value(node=fx.Node() as v)):
            eps = number(c)
            found = None if eps is None else _moment(graph, v)
            return None if found is None or eps is None else Root(found, eps, power)
    found = _moment(graph, node)
    return None if found is None else Root(found, 0.0, power)


def _direct(graph: Graph, node: fx.Node) -> Root | None:
    """`std` and Euclidean norms, which hold their root."""
    found = _deviation(graph, node, "std")
    if found is not None:
        return Root(found, 0.0, 0.5)
    node, kept = _kept(graph, node)
    if node.target is not aten.linalg_vector_norm.default or not isinstance(node.args[0], fx.Node):
        return None
    given = dict(zip(("ord", "dim", "keepdim"), node.args[1:], strict=False)) | dict(node.kwargs)
    dims = _dims(given.get("dim"))
    if given.get("ord", 2) != 2 or dims is None or not (given.get("keepdim", False) or kept == dims):
        return None
    return Root(Moment(node.args[0], dims, False, counted=True), 0.0, 0.5)


def _moment(graph: Graph, node: fx.Node) -> Moment | None:
    node = plain(graph, node)
    found = _deviation(graph, node, "var")
    if found is not None:
        return found
    reduced = _reduction(graph, node)
    if reduced is not None:
        x, dims, counted = reduced
        of = _squared(graph, x)
        return None if of is None else Moment(of, dims, False, counted=counted)
    match graph.view(node, 1):
        case Div(Value(node=fx.Node() as v), c) if number(c):
            return _times(_moment(graph, v), 1.0 / number(c))  # type: ignore[operator]
        case Mul(Value(node=fx.Node() as v), c) | Mul(c, Value(node=fx.Node() as v)) if number(c):
            return _times(_moment(graph, v), number(c))  # type: ignore[arg-type]
        case Sub(Value(node=fx.Node() as v), Value(node=fx.Node() as w)):  # mean(x²) − mean(x)²
            raw, square = _moment(graph, v), _squared(graph, w)
            mean = None if square is None else mean_of(graph, square)
            if raw is None or mean is None or raw.variance or raw.counted or raw.scale != 1:
                return None
            return replace(raw, variance=True) if same(graph, mean[0], raw.of) and mean[1] == raw.dims else None
    of = _squared(graph, node)  # norm(x)² is a sum of squares
    inner = None if of is None else root(graph, of)
    if inner is None or inner.power < 0 or inner.outside or inner.clamp or inner.eps:
        return None
    return inner.moment


def _times(found: Moment | None, factor: float) -> Moment | None:
    return None if found is None or factor <= 0 else replace(found, scale=found.scale * factor)


def _squared(graph: Graph, node: fx.Node) -> fx.Node | None:
    """x, if the node is x²."""
    node = plain(graph, node)
    match graph.view(node, 1):
        case Square(Value(node=fx.Node() as x)) | Pow(Value(node=fx.Node() as x), 2 | 2.0):
            return x
        case Mul(Value(node=fx.Node() as x), Value(node=fx.Node() as y)) if same(graph, x, y):
            return x
        case _:
            return _squared_in_python(node)


def _squared_in_python(node: fx.Node) -> fx.Node | None:
    """x, if the node is x² of an input that a graph without shapes does not know for a tensor; its mean is taken, so it is one."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    x, *rest = node.args or (None,)
    if not isinstance(x, fx.Node) or (node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)):
        return None
    return x if (name, *rest) in {("pow", 2), ("square",)} or (name == "mul" and rest == [x]) else None


def mean_of(graph: Graph, node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
    """The value and the axes of a mean that keeps them; of `var_mean` the second result."""
    node = plain(graph, node)
    if node.target is operator.getitem and node.args[1] == 1:
        found = _deviation_of(node.args[0], ("var_mean", "std_mean"))
        return None if found is None else (found.of, found.dims)
    match graph.view(node, 1):
        case Div(Value(node=fx.Node() as v), c) if number(c):
            summed = _reduction(graph, v)
            if summed is not None and summed[2] and _count(summed[0], summed[1]) == number(c):
                return summed[0], summed[1]
    reduced = _reduction(graph, node)
    return None if reduced is None or reduced[2] else (reduced[0], reduced[1])


def centred(graph: Graph, node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
    """x and the axes, if the node is x − mean(x)."""
    node = plain(graph, node)
    match graph.view(node, 1):
        case Sub(Value(node=fx.Node() as x), Value(node=fx.Node() as mu)):
            mean = mean_of(graph, mu)
            return (x, mean[1]) if mean is not None and same(graph, mean[0], x) else None
        case _:
            return None


def _count(node: fx.Node, dims: tuple[int, ...]) -> int | None:
    shape = Value(node=node).shape
    sizes = [shape[d] for d in dims] if shape is not None else [None]
    total = 1
    for n in sizes:
        if not isinstance(n, int):
            return None
        total *= n
    return total


def _reduction(graph: Graph, node: fx.Node) -> tuple[fx.Node, tuple[int, ...], bool] | None:
    """Operand and axes of a mean (False) or a sum (True) that keeps its axes."""
    node, kept = _kept(graph, plain(graph, node))
    op = graph.view(node, 1)
    if not isinstance(op, (Mean, Sum)) or op.x.node is None or (op.dtype is not None and not op.dtype.is_floating_point):
        return None
    dims = _dims(op.dim)
    return (op.x.node, dims, isinstance(op, Sum)) if dims is not None and (op.keepdim or kept == dims) else None


def _kept(graph: Graph, node: fx.Node) -> tuple[fx.Node, tuple[int, ...] | None]:
    """What stands before an `unsqueeze`, and the axis that it puts back."""
    op = graph.view(node, 1)
    if isinstance(op, Reshape) and op.target is aten.unsqueeze.default and isinstance(op.x, Value) and op.x.node is not None:
        return op.x.node, _dims(op.rest[0])
    return node, None


def _dims(dims: Any) -> tuple[int, ...] | None:
    dims = (dims,) if isinstance(dims, int) else dims
    return tuple(sorted(dims)) if isinstance(dims, (list, tuple)) and dims and all(isinstance(d, int) for d in dims) else None


def _deviation(graph: Graph, node: fx.Node, kind: str) -> Moment | None:
    """`var` or `std`, or the first result of `var_mean`, `std_mean`."""
    if node.target is operator.getitem and node.args[1] == 0:
        return _deviation_of(node.args[0], (f"{kind}_mean",))
    call, kept = _kept(graph, node)
    return _deviation_of(call, (kind,), kept)


def _deviation_of(call: Any, kinds: tuple[str, ...], kept: tuple[int, ...] | None = None) -> Moment | None:
    if not isinstance(call, fx.Node) or not isinstance(call.target, torch._ops.OpOverload):
        return None
    name, overload = call.target._schema.name.removeprefix("aten::"), call.target._overloadname
    if name not in kinds or overload not in ("dim", "correction") or not isinstance(call.args[0], fx.Node):
        return None
    names = ("dim", "unbiased", "keepdim") if overload == "dim" else ("dim",)
    given: dict[str, Any] = dict(zip(names, call.args[1:], strict=False)) | dict(call.kwargs)
    correction = float(given.get("unbiased", True)) if overload == "dim" else given.get("correction")
    dims = _dims(given.get("dim"))
    if dims is None or not (given.get("keepdim", False) or kept == dims):
        return None
    return Moment(call.args[0], dims, True, correction=1.0 if correction is None else float(correction))
