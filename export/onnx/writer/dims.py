"""Names of the axes whose size is not fixed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["axis_names", "exportable", "readable"]


def exportable(dynamic_shapes: Any) -> Any:
    """`dynamic_shapes` as torch.export takes them: a name alone, as torch.onnx allows, becomes a dimension found by tracing."""
    if isinstance(dynamic_shapes, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(dynamic_shapes, Mapping):
        return {k: exportable(v) for k, v in dynamic_shapes.items()}
    if isinstance(dynamic_shapes, (list, tuple)):
        return type(dynamic_shapes)(exportable(v) for v in dynamic_shapes)
    return dynamic_shapes


def axis_names(
    exported: torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    signature: inspect.Signature,
) -> dict[str, str]:
    """A name for every symbolic size of an input: the one of its `Dim`, else `<input>_<axis>`.

    Returns: names by symbol, e.g. `{"s77": "batch"}`.
    """
    given = _given(args, kwargs, dynamic_shapes, signature)
    placeholders = {n.name: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder"}
    leaves = [placeholders[name] for name in exported.graph_signature.user_inputs if isinstance(name, str)]
    explicit: dict[str, str] = {}
    derived: dict[str, str] = {}
    names = [name for name in exported.graph_signature.user_inputs if isinstance(name, str)]
    tensors = [(n, v) for n, v in zip(names, leaves, strict=True) if isinstance(v, Tensor)]
    for (name, value), spec in zip(tensors, given, strict=False):
        for axis, size in enumerate(value.shape):
            if not isinstance(size, torch.SymInt):
                continue
            symbol = str(size.node.expr)
            if not symbol.isidentifier():
                continue  # 2*s0 + 1: named through s0
            if spec.get(axis):
                explicit.setdefault(symbol, spec[axis])
            derived.setdefault(symbol, f"{name}_{axis}")
    return _unique(derived | explicit)


def readable(size: str, names: Mapping[str, str]) -> str:
    """`size`, an expression over symbols, with readable names: `2*s77` becomes `2*batch`."""
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m.group(), m.group()), size)


def _unique(names: dict[str, str]) -> dict[str, str]:
    taken: set[str] = set()
    out: dict[str, str] = {}
    for symbol, name in names.items():
        unique, n = name, 1
        while unique in taken:
            unique, n = f"{name}_{n}", n + 1
        taken.add(unique)
        out[symbol] = unique
    return out


def _given(
    args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, signature: inspect.Signature
) -> list[dict[int, str]]:
    """Per tensor input, in order: the names that the user gave to axes."""
    if isinstance(dynamic_shapes, Mapping):
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError:
            bound = {}
        positional = list(bound)[: len(args)]
        pairs = [(a, dynamic_shapes.get(n)) for n, a in zip(positional, args, strict=False)]
    else:
        pairs = list(zip(args, _pad(dynamic_shapes, len(args)), strict=False))
    by_name = dynamic_shapes if isinstance(dynamic_shapes, Mapping) else {}
    pairs += [(value, by_name.get(name)) for name, value in kwargs.items()]
    return [spec for value, shapes in pairs for spec in _walk(value, shapes)]


def _pad(shapes: Any, length: int) -> list[Any]:
    found = list(shapes) if isinstance(shapes, (list, tuple)) else []
    return found + [None] * (length - len(found))


def _walk(value: Any, shapes: Any) -> list[dict[int, str]]:
    if isinstance(value, Tensor):
        axes = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes if isinstance(shapes, Sequence) else ())
        return [{axis: _name(dim) for axis, dim in axes}]
    if isinstance(value, Mapping):
        return [s for k, v in value.items() for s in _walk(v, shapes.get(k) if isinstance(shapes, Mapping) else None)]
    if isinstance(value, (list, tuple)):
        return [s for v, inner in zip(value, _pad(shapes, len(value)), strict=False) for s in _walk(v, inner)]
    return [{} for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _name(dim: Any) -> str:
    if isinstance(dim, str):
        return dim
    # AUTO, DYNAMIC and STATIC are hints without a name
    return "" if dim is None or isinstance(dim, int) else getattr(dim, "__name__", "")
