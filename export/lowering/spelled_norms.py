"""Normalizations that are arithmetic, of kinds for which neither PyTorch nor a runtime has an operator."""

from __future__ import annotations

import torch
from torch import fx

from normfuse.ir.graph import Graph
from normfuse.ir.views import Add, Div, Mean, Mul, Value
from normfuse.passes.fuse.norm_patterns import crms_norm
from normfuse.passes.patterns.moments import number

__all__ = ["spelled_norm"]

aten = torch.ops.aten


def spelled_norm(graph: Graph, node: fx.Node) -> str:
    """What a quotient normalizes by: "CRMSNorm" or "L1Norm"; empty where `node` is no such norm.

    x / √((Σ x² + (Σ x)²) / (d + 1) + ε)        CRMSNorm
    x / (c mean|x| + ε),  x / max(c mean|x|, ε)  L1Norm, of a centered x or another
    """
    if crms_norm(graph, node) is not None:
        return "CRMSNorm"
    match graph.view(node, 1):
        case Div(Value(node=fx.Node() as x), Value(node=fx.Node() as size)) if _mean_of_sizes(graph, size) is x:
            return "L1Norm"
    return ""


def _mean_of_sizes(graph: Graph, node: fx.Node) -> fx.Node | None:
    """x of c mean|x| + ε and of max(c mean|x|, ε)."""
    match graph.view(node, 1):
        case Mean(Value(node=fx.Node() as sizes), _, True) if sizes.target is aten.abs.default:
            return sizes.all_input_nodes[0]
        case Add(Value(node=fx.Node() as x), c) | Mul(Value(node=fx.Node() as x), c) | Mul(c, Value(node=fx.Node() as x)):
            return None if number(c) is None else _mean_of_sizes(graph, x)
    floored = node.target in (aten.clamp_min.default, aten.clamp.default)
    return _mean_of_sizes(graph, node.all_input_nodes[0]) if floored else None
