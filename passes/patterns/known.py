"""What is known of the values of a graph, for rules that see one operator at a time."""

from __future__ import annotations

import torch
from torch import fx

from normfuse.ir import dtypes
from normfuse.ir.graph import Graph
from normfuse.ir.views import Value
from normfuse.passes.patterns.sizes import infer_sizes

__all__ = ["dtype_of", "infer", "inherit", "is_floating", "may_be_floating"]


def infer(graph: Graph) -> None:
    """Note dtypes and fixed sizes on the nodes that have no example value."""
    for node in graph:
        if "val" not in node.meta and "dtypes" not in node.meta:
            constant = graph.constant(node)
            node.meta["dtypes"] = dtypes.possible(node) if constant is None else frozenset({constant.dtype})
    infer_sizes(graph)


def inherit(new: fx.Node, old: fx.Node) -> None:
    """A node that takes the place of another has its dtype and sizes."""
    new.meta |= {k: old.meta[k] for k in ("dtypes", "sizes", "takes") if k in old.meta and k not in new.meta}


def dtype_of(value: Value) -> torch.dtype | None:
    """The dtype of a value; None where several are possible."""
    return None if value.node is None else dtypes.dtype_of(value.node)


def is_floating(value: Value) -> bool:
    """Is it known to be real and floating?"""
    return value.node is not None and dtypes.floating(value.node) is True


def may_be_floating(value: Value) -> bool:
    """Is it not known to be anything else?"""
    return value.node is None or dtypes.floating(value.node) is not False
