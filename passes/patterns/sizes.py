"""How many features or channels a value has, also where a graph has no shapes: weights know it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.ir.operators import SAME_SHAPE, is_cast, name
from normfuse.ir.views import (
    Add,
    Affine,
    AvgPool,
    BatchNorm,
    GlobalAvgPool,
    GroupNorm,
    Identity,
    LayerNorm,
    MatMul,
    MaxPool,
    Mul,
    Neg,
    Op,
    Permute,
    Relu,
    Reshape,
    RmsNorm,
    Sub,
    Value,
    shape_of,
)  # fmt: skip
from normfuse.ir.weights import Weight

__all__ = ["feature_size", "infer_sizes", "size_along"]

aten = torch.ops.aten

_NAMED = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int}

_FAR = 64  # operators to look back through: the residual stream of a deep network ends at an embedding


def infer_sizes(graph: Graph) -> None:
    """Fill in `node.meta["sizes"]`: the sizes that weights fix, or layers that say what they take, by axis counted from the end."""
    for node in graph:
        if "val" in node.meta:
            continue
        constant, found = graph.constant(node), {}
        if constant is not None:
            found = {i - constant.ndim: n for i, n in enumerate(constant.shape)}
        elif node.op == "call_function":
            found = _like_operands(node) or _fixed(graph.view(node, 1))
        node.meta["sizes"] = node.meta.get("takes", {}) | found


def size_along(value: Value, axis: int) -> Any:
    """The size of an axis counted from the end (a symbol where it varies); 1 beyond the first axis, None if it is unknown."""
    if value.shape is not None:
        return value.shape[axis] if -axis <= len(value.shape) else 1
    return None if value.node is None else value.node.meta.get("sizes", {}).get(axis)


def _like_operands(node: fx.Node) -> dict[int, int]:
    """Of a function of elements: a size above one is the size of the result, and every size if there is one operand only."""
    target, first = node.target, node.args[0] if node.args else None
    if not isinstance(target, torch._ops.OpOverload):
        return {}
    if name(target) in SAME_SHAPE and isinstance(first, fx.Node):
        return dict(first.meta.get("sizes", {}))
    if torch.Tag.pointwise not in target.tags:
        return {}
    held = [x.meta.get("sizes", {}) for x in node.all_input_nodes if x.meta.get("kind") not in ("number", "size", "dtype")]
    return {a: n for sizes in held for a, n in sizes.items() if n > 1 or len(held) == 1}


def _fixed(op: Value) -> dict[int, int]:
    match op:
        case Value(weight=Weight() as w):
            return {w.axis: w.outputs}
        case MatMul(y=Constant() as W):
            return {-1: W.shape[-1]}
        case LayerNorm(normalized=shape) | RmsNorm(normalized=shape):
            return {i - len(shape): n for i, n in enumerate(shape)} | _held(op.x)
        case BatchNorm(x, mean=Constant() as c) | GroupNorm(x, gamma=Constant() as c) if x.rank is not None:
            return _held(x) | {1 - x.rank: c.numel}
        case Affine(x) | Identity(x):
            return _held(x)
        case MaxPool(x) | AvgPool(x) | GlobalAvgPool(x):
            return {a: n for a, n in _held(x).items() if a < -_pooled(op)}
        case Permute(x, dims):
            return {i - len(dims): n for i, d in enumerate(dims) if (n := _held(x).get(d - len(dims))) is not None}
        case Reshape(Value() as x):
            return _reshaped(op, _held(x), x.rank)
        case _:
            cast = op.node is not None and is_cast(op.node)
            return dict(op.node.args[0].meta.get("sizes", {})) if cast else {}  # type: ignore[union-attr]


def _reshaped(op: Reshape, held: dict[int, int], rank: int | None) -> dict[int, int]:
    """Axes that are named, split up or joined; those in front of them move along."""
    match op.target, op.rest:
        case ((aten.view.default | aten.reshape.default | aten._unsafe_view.default), (list() | tuple() as shape,)):
            return {i - len(shape): n for i, n in enumerate(shape) if isinstance(n, int) and n > 0}
        case aten.unflatten.int, (int() as dim, list() | tuple() as parts) if (at := _behind(dim, rank)) is not None:
            more = len(parts) - 1
            made = {at - more + i: n for i, n in enumerate(parts) if isinstance(n, int) and n > 0}
            return made | {a if a > at else a - more: n for a, n in held.items() if a != at}
        case aten.flatten.using_ints, (int() as start, *rest):
            first, last = _behind(start, rank), _behind(rest[0] if rest else -1, rank)
            if first is None or last is None:
                return {}
            joined = [held.get(a) for a in range(first, last + 1)]
            kept = {a if a > last else a + last - first: n for a, n in held.items() if not first <= a <= last}
            return kept if None in joined else kept | {last: math.prod(n for n in joined if n is not None)}
        case _:
            return {}


def _behind(axis: int, rank: int | None) -> int | None:
    """The axis counted from the end, if that can be told."""
    return axis if axis < 0 else axis - rank if rank else None


def _pooled(op: Op) -> int:
    return int(op.operator._schema.name[-2])  # max_pool2d


def _held(value: object) -> dict[int, int]:
    if isinstance(value, Constant):
        return {i - value.ndim: n for i, n in enumerate(value.shape)}
    return value.node.meta.get("sizes", {}) if isinstance(value, Value) and value.node is not None else {}


def feature_size(graph: Graph, node: fx.Node, far: int = _FAR) -> int | None:
    """The size of the last axis; None where it varies or does not follow from any weight."""
    shape = shape_of(node)
    if shape is not None:
        return shape[-1] if shape and isinstance(shape[-1], int) else None
    if far == 0:
        return None
    constant = graph.constant(node)
    if constant is not None:
        return constant.shape[-1] if constant.ndim else None
    if is_cast(node) and isinstance(node.args[0], fx.Node):
        return feature_size(graph, node.args[0], far - 1)
    return _of_operator(graph, graph.view(node, 1), far)


def _of_operator(graph: Graph, op: Value, far: int) -> int | None:
    match op:
        case Value(weight=Weight(axis=-1) as w):
            return w.outputs
        case MatMul(y=Constant() as W):
            return W.shape[-1]
        case LayerNorm(normalized=shape) | RmsNorm(normalized=shape):
            return int(shape[-1])
        case Add(x, y) | Sub(x, y) | Mul(x, y):
            # broadcasting: a size above one is the size of the result
            sizes = [_of(graph, v, far - 1) for v in (x, y)]
            return next((n for n in sizes if n is not None and n > 1), None)
        case Affine(x) | Identity(x) | Neg(x) | Relu(x):
            return _of(graph, x, far - 1)
        case Reshape() as r:
            return _of_reshape(r)
        case _:
            return None


def _of(graph: Graph, value: object, far: int) -> int | None:
    if isinstance(value, Constant):
        return value.shape[-1] if value.ndim else None
    return feature_size(graph, value.node, far) if isinstance(value, Value) and value.node is not None else None


def _of_reshape(op: Op) -> int | None:
    """A literal size at the end: `view(b, t, 64)`, `unflatten(-1, (8, 64))`."""
    rest: tuple[Any, ...] = getattr(op, "rest", ())
    if op.target not in _NAMED or (op.target is aten.unflatten.int and rest[0] != -1):
        return None
    last = rest[-1][-1] if rest and isinstance(rest[-1], (list, tuple)) and rest[-1] else None
    return last if isinstance(last, int) and last > 0 else None
