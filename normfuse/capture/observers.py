"""Quantization-aware layers whose observers are off: they round as they were taught to, and write nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["without_idle_observers"]

aten = torch.ops.aten


def without_idle_observers(gm: fx.GraphModule) -> None:
    """Where a buffer says that an observer is off, only the fake quantization is left of it, or nothing; in place."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.fused_moving_avg_obs_fake_quant.default):
        names = [a.name for a in aten.fused_moving_avg_obs_fake_quant.default._schema.arguments]
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if _flag(gm, given["observer_on"]) is not False:
            continue
        rounds = _flag(gm, given["fake_quant_on"])
        if rounds is None:
            continue
        with gm.graph.inserting_before(node):
            new = _rounded(gm.graph, given) if rounds else given["self"]
        if rounds:
            new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _rounded(graph: fx.Graph, given: dict[str, Any]) -> fx.Node:
    x, scale, zero, low, high = (given[k] for k in ("self", "scale", "zero_point", "quant_min", "quant_max"))
    if given.get("per_row_fake_quant"):
        return graph.call_function(aten.fake_quantize_per_channel_affine.default, (x, scale, zero, given["ch_axis"], low, high))
    return graph.call_function(aten.fake_quantize_per_tensor_affine.tensor_qparams, (x, scale, zero, low, high))


def _flag(gm: fx.GraphModule, node: Any) -> bool | None:
    """The value of a buffer with one element; None for anything that is not known."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return bool(value.item()) if isinstance(value, Tensor) and value.numel() == 1 else None
