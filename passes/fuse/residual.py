"""A residual is added where the product in front of it is written.

linear(x) + r  =  linear(x, residual=r)
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx

from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Change
from normfuse.ir.views import Add
from normfuse.passes.fuse.alike import like
from normfuse.passes.fuse.fusion import Fusion, take_place
from normfuse.passes.fuse.product import Product, product, readers

__all__ = ["Residual"]


class Residual(Fusion):
    """A sum of a quantized linear layer and of what has its shape."""

    name = "residual"

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        """linear(x) + r  =  linear(x, residual=r)

        Raises:
            Refuse: the layer is read elsewhere too, or r broadcasts.
        """
        if not isinstance(graph.view(node, 1), Add):
            return None
        refusal: Refuse | None = None
        for y, r in (node.args[:2], node.args[1::-1]):
            found = product(y)
            if found is None or found.residual is not None or y is r:
                continue
            refusal = refusal or _objection(found, r, node)
            if _objection(found, r, node) is None:
                return Change(note=f"into {graph.path(found.node)}", do=partial(_add, graph, found, r, node))
        if refusal is not None:
            raise refusal
        return None


def _objection(found: Product, r: Any, add: fx.Node) -> Refuse | None:
    other = next((user for user in readers(found.node) if user is not add), None)
    if other is not None:
        return Refuse("what the layer gives is read elsewhere, too", blocker=other)
    if not like(found.node, r):
        return Refuse("what is added has not the shape and dtype of the layer's result")
    return None


def _add(graph: Graph, found: Product, r: Any, add: fx.Node) -> None:
    fused = replace(found, residual=r).emit(graph, add)
    take_place(graph, add, fused)
    take_place(graph, found.node, fused)  # for those that read its sizes
