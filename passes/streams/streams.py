"""Where the mean over features flows: which operators commute with P = I − 11ᵀ/d, and which values can be centered.

A *stream* is what a LayerNorm reads, traced upwards through operators that commute with P. Its values carry a feature
axis (counted from the end: -1 for tokens, -2 after a transposition), because layouts change along the way.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.operators import is_cast
from normfuse.ir.views import (
    Add,
    Affine,
    AvgPool,
    Cat,
    Div,
    GlobalAvgPool,
    Identity,
    LayerNorm,
    MatMul,
    Mean,
    Movement,
    Mul,
    Neg,
    Op,
    Pad,
    Permute,
    Reshape,
    Resize,
    Sub,
    Take,
    Value,
    affine,
)  # fmt: skip
from normfuse.ir.wording import operator_name
from normfuse.passes.affine.broadcast import axes, channelwise, moved

__all__ = ["centered_writer", "named", "operands", "width", "writes"]

aten = torch.ops.aten

Place = tuple[fx.Node, int]


def named(graph: Graph, node: fx.Node) -> str:
    """A place and what stands there; the place of an operator without a module says so itself."""
    path, kind = graph.path(node), _kind(node)
    return path if path.startswith(kind) else f"{path} ({kind})"


def _kind(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return "input" if node.op == "placeholder" else "output"
    return "the gain of a norm" if node.target is affine else operator_name(node)


def width(node: fx.Node, axis: int) -> int | None:
    """The number of features, if it is known and fixed."""
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or -axis > val.ndim or not isinstance(val.shape[axis], int):
        return None
    return int(val.shape[axis])


def operands(graph: Graph, node: fx.Node, axis: int) -> list[Place] | None:
    """P f(x, …) = f(P x, …): the operands that carry the stream and their feature axes; None if f does not commute with P."""
    d = width(node, axis)
    if d is None or node.op != "call_function":
        return None
    if is_cast(node) and isinstance(node.args[0], fx.Node) and width(node.args[0], axis) == d:
        return [(node.args[0], axis)]
    found: list[tuple[Value | Constant | float, int]]
    match graph.view(node, 2):
        case Identity(x) | Neg(x):
            found = [(x, axis)]
        case Permute(x) | Reshape(x) | Movement(x) as op:
            source = _axis_before(op, axis, d)
            found = [(x, source)] if source is not None else []
        case Add(x, y) | Sub(x, y):
            found = [(v, axis) for v in (x, y)]
        case Mul(Value() as x, Value() as y) | Div(Value() as x, Value() as y) if _size(y, axis) == 1:
            found = [(x, axis)]
        case Mul(Value() as y, Value() as x) if _size(y, axis) == 1:
            found = [(x, axis)]
        case Mul(Value() as x, float() | int()) | Mul(float() | int(), Value() as x) | Div(Value() as x, float() | int()):
            found = [(x, axis)]
        case Affine(x, s) if axis not in axes(s):
            found = [(x, axis)]
        case Cat(xs, dim) as op if op.rank is not None and dim % op.rank - op.rank != axis:
            found = [(v, axis) for v in xs]
        case Pad(x, pad, 0) if -axis > len(pad) // 2 or not any(pad[2 * (-axis - 1) : 2 * (-axis)]):
            found = [(x, axis)]
        case Mean(x, dim, keepdim, None) if x.rank is not None:
            source = _axis_before_mean(x.rank, [n % x.rank for n in dim], keepdim, axis)
            found = [(x, source)] if source is not None else []
        case AvgPool(x, kernel) | GlobalAvgPool(x, kernel) if -axis > (len(kernel) if isinstance(kernel, (list, tuple)) else 1):
            found = [(x, axis)]
        case Resize(x) if x.rank is not None and -axis > x.rank - 2:
            found = [(x, axis)]
        case Take(x, mixed) if axis not in mixed:
            found = [(x, axis)]
        case MatMul(Value() as y, Value() as x) if axis == -1 and x.node is not y.node:
            found = [(x, axis)]
        case _:
            return None
    places = [(_node(graph, node, v), a) for v, a in found]
    if not places or any(n is None or width(n, a) != d for n, a in places):
        return None
    return [(n, a) for n, a in places if n is not None]


def centered_writer(graph: Graph, op: Value, axis: int) -> Op | None:
    """P (W x + b) = (P W) x + P b: the writer with its mean over output features removed; None if it has no weights of its own.

    An operator whose output is mean-free already is returned as it is.
    """
    if isinstance(op, LayerNorm) and op.gamma is None and op.beta is None and axis == -1 and len(op.normalized) == 1:
        return op
    dims = writes(op, axis)
    if dims is None or not isinstance(op, Op):
        return None
    return dataclasses.replace(op, node=None, **{name: centered(getattr(op, name), dim) for name, dim in dims.items()})


def writes(op: Value, axis: int) -> dict[str, int] | None:
    """The constants of an operator that write its features along `axis`, by field, each with its own feature dimension.

    None for an operator that has no weights of its own there: D (W x + b) = (D W) x + D b needs them for any linear D.
    """
    w = op.weight
    if w is None or axis != w.axis or w.groups > 1:
        return None
    return {w.field: w.out} | ({w.bias_field: 0} if w.bias is not None else {})


def centered(c: Constant, dim: int) -> Constant:
    """P c along `dim`: c minus its mean; zero where c does not vary along that axis at all."""
    return c - c.mean(dim, keepdim=True)


def _node(graph: Graph, user: fx.Node, value: Value | Constant | float) -> fx.Node | None:
    if isinstance(value, Value):
        return value.node
    return next((n for n in user.all_input_nodes if graph.constant(n) is value), None)


def _size(value: Value, axis: int) -> object:
    shape = value.shape
    return 1 if shape is not None and -axis > len(shape) else shape[axis] if shape is not None else None


def _axis_before(op: Permute | Reshape | Movement, axis: int, d: int) -> int | None:
    """The axis of the operand that a movement takes whole, in order, to `axis` of its result."""
    shape = op.x.shape
    if shape is None:
        return None
    if isinstance(op, Permute):
        return op.dims[axis] - len(shape)
    probe = Constant.of(torch.arange(d, dtype=torch.float64))
    for i in range(-1, -len(shape) - 1, -1):
        if not isinstance(shape[i], int) or shape[i] != d:
            continue
        try:
            out = moved(op, channelwise(probe, i, len(shape)))
        except Refuse:
            continue
        if axes(out) == {axis} and torch.equal(out.value.reshape(-1), probe.value):
            return i
    return None


def _axis_before_mean(rank: int, dims: list[int], keepdim: bool, axis: int) -> int | None:
    if keepdim:
        return axis if axis % rank not in dims else None
    kept = [i for i in range(rank) if i not in dims]
    return kept[axis] - rank if -axis <= len(kept) else None
