"""Values of one shape and dtype, which kernels add without broadcasting."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from normfuse.ir.graph import Graph
from normfuse.ir.views import Add

__all__ = ["addends_of", "like"]


def like(a: Any, b: Any) -> bool:
    """Provably the same shape, and the same dtype."""
    signature = _signature(a)
    return signature is not None and signature == _signature(b)


def addends_of(graph: Graph, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """a and b of a + b, where both are alike."""
    if not isinstance(graph.view(node, 1), Add):
        return None
    a, b = node.args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) and like(a, b) else None


def _signature(node: Any) -> tuple[str, ...] | None:
    """Dtype and sizes as text, because comparing symbols would fix them; None for what is no tensor of known shape."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return (str(value.dtype), *map(str, value.shape)) if isinstance(value, Tensor) else None
