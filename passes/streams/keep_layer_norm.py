"""An RMSNorm that its module cannot be is a LayerNorm again: of values without a mean both are the same.

    RMSNorm(x) = LN(x)   where the mean of x is zero

For graphs that are written back into modules: the class of the module may do more than normalize, and `nn.RMSNorm` has no shift.
"""

from __future__ import annotations

from collections import Counter

from torch import fx

from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Pass, Rewriting
from normfuse.ir.views import Affine, LayerNorm, RmsNorm
from normfuse.passes.affine.broadcast import is_zero

__all__ = ["KeepLayerNorm"]

RULE = "layer_norm_stays"


class KeepLayerNorm(Pass):
    """What `mean_free` made an RMSNorm and its module cannot compute is a LayerNorm again, on the centered values."""

    name = "keep_layer_norm"
    leaves_affines = False

    def rewrite(self, work: Rewriting) -> None:
        graph = work.graph
        for node in graph:
            op = graph.view(node, 2)
            if not isinstance(op, RmsNorm) or (why := _why(graph, node)) is None:
                continue
            new = graph.replace(node, LayerNorm(op.x, op.normalized, op.gamma, None, op.eps if op.eps is not None else 0.0))
            new.meta |= {k: v for k, v in node.meta.items() if k == "origin"}
            work.refuse(RULE, node, Refuse(why))


def _why(graph: Graph, node: fx.Node) -> str | None:
    """Why the module of a norm, which was a LayerNorm, cannot be an RMSNorm; None if it can, or was one all along."""
    path = graph.path(node)
    if graph.tree is None or not graph.tree.own.get(path, Counter())[LayerNorm]:
        return None
    shifted = any(isinstance(op, Affine) and not is_zero(op.t) for op in (graph.view(user, 1) for user in node.users))
    return graph.tree.why_no_rms_norm(path) or ("its β has no place to go, and nn.RMSNorm has none" if shifted else None)
