"""From a node to its view, through the operator's schema with defaults filled in.

Decoding is total or opaque: an argument that the view does not model (`alpha=`, a weight that is computed, a keyword of
a newer release) makes the value a plain `Value`, into which no rule looks.
"""

from __future__ import annotations

import dataclasses
import operator
from functools import cache
from typing import Any

import torch
from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.operators import EXPANSIONS, MOVEMENTS, PERMUTES, RESHAPES, RESIZES, SPLITS, TAKES
from normfuse.ir.views import VIEWS, Affine, Identity, Movement, Op, Pad, Permute, Reshape, Resize, Take, Value, affine

__all__ = ["arguments", "decode", "objection", "pieces"]

aten = torch.ops.aten


def pieces(node: fx.Node) -> bool:
    """Does the node give several pieces of its input, each read by `getitem`?"""
    return node.op == "call_function" and node.target in SPLITS


@cache
def _schema(target: Any) -> tuple[tuple[str, Any, bool], ...]:
    return tuple((a.name, a.default_value, a.has_default_value()) for a in target._schema.arguments)


_FIELDS = {
    view: tuple((f.name, str(f.type)) for f in dataclasses.fields(view) if f.name not in ("node", "target"))
    for view in set(VIEWS.values())
}


def _bind(node: fx.Node) -> list[Any] | None:
    """The arguments of an operator call in schema order, defaults filled in; None if they do not bind."""
    names = _schema(node.target)
    if len(node.args) > len(names):
        return None
    given = dict(zip((n for n, _, _ in names), node.args, strict=False)) | dict(node.kwargs)
    bound = [given.pop(name) if name in given else (default if has else _MISSING) for name, default, has in names]
    return None if given or any(v is _MISSING for v in bound) else bound


_MISSING = object()


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator call by name, defaults filled in.

    Raises:
        TypeError: they do not bind to the schema.
    """
    bound = _bind(node)
    if bound is None:
        raise TypeError(f"{node.format_node()}: the arguments do not fit the schema of {node.target}")
    return dict(zip((name for name, _, _ in _schema(node.target)), bound, strict=True))


def decode(node: fx.Node, operand: Any) -> Op | None:
    """The view of a node, or None if it is not fully understood.

    Args:
        node: a node of the graph.
        operand: function that reads an argument: a `Value`, a `Constant`, or the literal itself.
    """
    if node.op != "call_function":
        return None
    target = node.target
    if target is operator.getitem and isinstance(node.args[0], fx.Node) and pieces(node.args[0]):
        whole = node.args[0]
        x = operand(whole.args[0])
        if not isinstance(x, (Value, Constant)) or not isinstance(node.args[1], int):
            return None
        return Movement(x, whole.args[1:], tuple(whole.kwargs.items()), node.args[1], node=node, target=whole.target)
    if target is affine:
        x, s, t = (operand(a) for a in node.args)
        return Affine(x, s, t, node=node, target=target)
    if not isinstance(target, torch._ops.OpOverload):
        return None
    if target in RESHAPES or target in PERMUTES or target in MOVEMENTS:
        return _movement(node, operand)
    if target is aten.pad.default or target is aten.im2col.default or target in RESIZES:
        return _around(node, operand)
    if target in TAKES:
        return _take(node, operand(node.args[0]))
    view = VIEWS.get(target)
    bound = _bind(node) if view is not None or target is aten.dropout.default else None
    if bound is None:
        return None
    if target is aten.dropout.default:
        return Identity(operand(bound[0]), node=node) if bound[2] is False else None
    assert view is not None
    return _fill(view, node, bound, operand)


def _movement(node: fx.Node, operand: Any) -> Op | None:
    x = operand(node.args[0])
    if not isinstance(x, (Value, Constant)):
        return None
    if node.target in RESHAPES:
        return Reshape(x, node.args[1:], node=node, target=node.target)
    if node.target in PERMUTES:
        dims = _dims(node, x.ndim if isinstance(x, Constant) else x.rank)
        return None if dims is None else Permute(x, dims, node=node, target=node.target)
    if len(node.all_input_nodes) > 1 and node.target not in EXPANSIONS:
        return None  # an offset that is only known at run time
    return Movement(x, node.args[1:], tuple(node.kwargs.items()), None, node=node, target=node.target)


def _around(node: fx.Node, operand: Any) -> Op | None:
    """Operators of which it depends on the arguments, or on nothing but the axis, whether they only copy values."""
    x, bound = operand(node.args[0]), _bind(node)
    if not isinstance(x, Value) or bound is None:
        return None
    if node.target in RESIZES:
        return Resize(x, node.args[1:], node=node, target=node.target)
    if node.target is aten.pad.default and bound[2] == "constant":
        return Pad(x, bound[1], 0.0 if bound[3] is None else bound[3], node=node)
    if len(node.all_input_nodes) > 1 or (node.target is aten.im2col.default and any(bound[3])):
        return None  # a size that is only known at run time; zeros at the border
    return Movement(x, node.args[1:], tuple(node.kwargs.items()), None, node=node, target=node.target)


def _take(node: fx.Node, x: Any) -> Take | None:
    if not isinstance(x, Value) or x.rank is None or len(node.args) < 2:
        return None
    if node.target is not aten.index.Tensor:
        dim = node.args[2] if node.target is aten.take_along_dim.default and len(node.args) > 2 else node.args[1]
        return Take(x, frozenset({dim % x.rank - x.rank}), node=node, target=node.target) if isinstance(dim, int) else None
    indices: Any = node.args[1]
    vals = [i.meta.get("val") for i in indices if i is not None]
    if any(not isinstance(v, torch.Tensor) or v.dtype in (torch.bool, torch.uint8) for v in vals):
        return None  # a mask takes as many axes as it has
    places = [i - x.rank for i, index in enumerate(indices) if index is not None]
    # several indices, or one of several axes, move the axes in front of them
    mixed = places if len(places) == 1 and vals[0].ndim == 1 else range(-x.rank, places[-1] + 1)
    return Take(x, frozenset(mixed), node=node, target=node.target)


def _dims(node: fx.Node, rank: int | None) -> tuple[int, ...] | None:
    if rank is None:
        return None
    index = torch.empty(tuple(range(2, 2 + rank)), device="meta")  # distinct sizes name the axes
    moved = node.target(index, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return tuple(size - 2 for size in moved.shape)


def objection(node: fx.Node, operand: Any) -> str:
    """Why an operator that has a view is not understood here, as a clause; empty where there is nothing to say."""
    view = VIEWS.get(node.target)
    bound = _bind(node) if view is not None and node.target is not affine else None
    if view is None or bound is None:
        return ""
    for (name, kind), arg in zip(_FIELDS[view], bound, strict=False):
        if "Constant" in kind and "Value" not in kind and isinstance(operand(arg), Value):
            return f"its {_WORDS.get(name, name)} is computed"
    op = _filled(view, node, bound, operand)
    return "" if op is None else op.unusual


_WORDS = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias", "mean": "running mean", "var": "running variance"}


def _fill(view: type[Op], node: fx.Node, bound: list[Any], operand: Any) -> Op | None:
    op = _filled(view, node, bound, operand)
    return None if op is None or op.unusual else op


def _filled(view: type[Op], node: fx.Node, bound: list[Any], operand: Any) -> Op | None:
    fields = _FIELDS[view]
    values: dict[str, Any] = {}
    for (name, kind), arg in zip(fields, bound, strict=False):
        value = [operand(a) for a in arg] if isinstance(arg, (list, tuple)) and "Value" in kind else operand(arg)
        if not _fits(kind, value):
            return None
        values[name] = value
    names = _schema(node.target)
    for (_, default, has), arg in zip(names[len(fields) :], bound[len(fields) :], strict=True):
        if not has or arg != default:  # an argument that the view does not model
            return None
    return view(**values, node=node, target=node.target)


def _fits(kind: str, value: Any) -> bool:
    if "Value" not in kind and "Constant" not in kind:
        return not isinstance(value, (Value, Constant))
    if isinstance(value, list):
        return kind.startswith("Sequence") and all(isinstance(v, (Value, Constant)) for v in value)
    if isinstance(value, Constant):
        return "Constant" in kind
    if isinstance(value, Value):
        return "Value" in kind
    if value is None:
        return "None" in kind
    return "float" in kind and isinstance(value, (int, float))
