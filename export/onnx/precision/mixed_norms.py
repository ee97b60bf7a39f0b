"""Norms whose weights have another dtype than their input, as casts and a norm of one dtype.

PyTorch computes such a norm in the wider dtype and returns that of the input, as in a half stream with float32 norms. ONNX has no
operator of two dtypes: N(x; γ) = cast(N(cast(x); γ), dtype of x).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

__all__ = ["one_dtype_norms"]

_ATEN = torch.ops.aten
#: Where the tensors beside the input stand.
_WEIGHTS: dict[Any, tuple[int | str, ...]] = {
    _ATEN.layer_norm.default: (2, 3, "weight", "bias"),
    _ATEN.rms_norm.default: (2, "weight"),
    _ATEN.group_norm.default: (2, 3, "weight", "bias"),
    _ATEN.batch_norm.default: (1, 2, 3, 4, "weight", "bias", "running_mean", "running_var"),
    _ATEN.instance_norm.default: (1, 2, 3, 4, "weight", "bias", "running_mean", "running_var"),
}


def one_dtype_norms(exported: torch.export.ExportedProgram) -> int:
    """Give every norm one dtype, in place; returns the number of norms that had two."""
    graph = exported.graph_module.graph
    changed = 0
    for node in list(graph.nodes):
        if node.target not in _WEIGHTS or not isinstance(x := node.args[0], fx.Node):
            continue
        weights = [w for at in _WEIGHTS[node.target] if isinstance(w := _argument(node, at), fx.Node)]
        own = x.meta["val"].dtype
        wide = functools.reduce(torch.promote_types, (w.meta["val"].dtype for w in weights), own)
        if all(t.meta["val"].dtype == wide for t in (x, *weights)):
            continue
        with graph.inserting_before(node):
            for t in dict.fromkeys((x, *weights)):
                if t.meta["val"].dtype != wide:
                    node.replace_input_with(t, _cast(graph, t, wide))
        with graph.inserting_after(node):
            back = _cast(graph, node, own)
        node.meta["val"] = node.meta["val"].to(wide)
        node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
        changed += 1
    if changed:
        exported.graph_module.recompile()
    return changed


def _argument(node: fx.Node, at: int | str) -> Any:
    if isinstance(at, str):
        return node.kwargs.get(at)
    return node.args[at] if at < len(node.args) else None


def _cast(graph: fx.Graph, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    cast = graph.call_function(_ATEN.to.dtype, (x, dtype))
    cast.meta = {**x.meta, "val": x.meta["val"].to(dtype)}
    return cast
