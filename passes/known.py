"""What is known of the values of a graph without shapes, for rules that see one operator at a time."""

from __future__ import annotations

from torch import fx

from normfuse.dtypes import infer_dtypes
from normfuse.graph import Graph
from normfuse.passes.sizes import infer_sizes

__all__ = ["infer", "inherit"]


def infer(graph: Graph) -> None:
    """Note dtypes and fixed sizes on the nodes that have no example value."""
    infer_dtypes(graph)
    infer_sizes(graph)


def inherit(new: fx.Node, old: fx.Node) -> None:
    """A node that takes the place of another has its dtype and sizes."""
    new.meta |= {k: old.meta[k] for k in ("dtype", "floating", "sizes") if k in old.meta and k not in new.meta}
