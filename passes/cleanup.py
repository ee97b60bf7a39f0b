"""What computes nothing goes: dropout, copies, casts and reshapes to what is there, arithmetic on constants.

A copy stays where an output would share memory with an input, a weight or another output without it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from normfuse.ir.aliases import copy_is_needed
from normfuse.ir.operators import CASTS, CHECKS
from normfuse.ir.passes import Pass, Rewriting
from normfuse.ir.views import Cat, Identity, Movement, Op, Pad, Reshape, Value
from normfuse.passes.affine.folding import fold
from normfuse.passes.affine.slices import slice_of_concatenation
from normfuse.passes.once import norms_once

__all__ = ["Cleanup"]

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default)


def identity(op: Op) -> Value | None:
    """dropout₀(x) = x,   copies and aliases of x = x"""
    match op:
        case Identity(x):
            return x
        case _:
            return None


def movement_to_the_same_place(op: Op) -> Value | None:
    """A reshape to the same shape, a padding by nothing, an expansion to the same size, a concatenation of one: x"""
    match op:
        case Reshape(Value() as x) if _same_sizes(op, x):
            return x
        case Movement(Value() as x) if op.target is aten.expand.default and _same_sizes(op, x):
            return x
        case Movement(Value() as x, (_, 0 | None, end, *_), piece=None) if (
            op.target is aten.slice.Tensor and (end is None or end >= 2**62) and _same_sizes(op, x)
        ):
            return x
        case Pad(x, pad) if not any(pad):
            return x
        case Cat([Value() as x]):
            return x
        case _:
            return None


class Cleanup(Pass):
    """Dropout, copies, and casts, reshapes, paddings that change nothing go; arithmetic on constants is done once."""

    name = "cleanup"
    leaves_affines = False
    rules = (identity, movement_to_the_same_place)
    depth = 2

    def rewrite(self, work: Rewriting) -> None:
        graph = work.graph
        for node in graph:
            if node.target in CHECKS:
                graph.fx.erase_node(node)
        fold(work)
        for node in graph:
            if node.op == "call_function" and not copy_is_needed(node) and not _cast_to_itself(work, node):
                self._simplified(work, node)
        graph.clean()
        norms_once(work)

    def _simplified(self, work: Rewriting, node: fx.Node) -> None:
        if node.target in _VIEWS:  # a view demands a layout that removed copies no longer give
            node.target = aten.reshape.default
        if node.target is aten.pad.default and not any(node.args[1]) and isinstance(node.args[0], fx.Node):  # type: ignore[arg-type]
            node.replace_all_uses_with(node.args[0])
            work.done("movement_to_the_same_place", node)
            return
        part = slice_of_concatenation(work, node)
        if part is not None:
            node.replace_all_uses_with(part)
            work.done(slice_of_concatenation.__name__, node)
            return
        work.attempt(self.rule, node, lambda: self.change(work.graph, node))


def _cast_to_itself(work: Rewriting, node: fx.Node) -> bool:
    """A cast to the dtype and device that the value has: x"""
    if node.target not in CASTS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if before.dtype != after.dtype or before.device != after.device or before.layout != after.layout:
        return False
    node.replace_all_uses_with(node.args[0])
    work.done("cast_to_itself", node)
    return True


def _same_sizes(op: Op, x: Value) -> bool:
    return op.shape is not None and x.shape is not None and [str(d) for d in op.shape] == [str(d) for d in x.shape]
