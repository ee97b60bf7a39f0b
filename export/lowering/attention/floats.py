"""Attention with quantized queries and keys as attention in float, for files in which activations stay floats."""

from __future__ import annotations

import torch
from torch import fx

from normfuse.export.lowering.attention.site import site_of
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Change, Pass
from normfuse.ir.views import Sdpa, Value

__all__ = ["FloatAttention"]


class FloatAttention(Pass):
    """Attention that is an operator of normfuse becomes PyTorch's own."""

    name = "float_attention"
    leaves_affines = False

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        """attention(q, k, v, mask, scale)  =  sdpa(q, k, v, mask, scale=scale)

        Raises:
            Refuse: it is causal with other numbers of queries and of keys, which PyTorch aligns at the other end.
        """
        site = site_of(node)
        if site is None or node.target is torch.ops.aten.scaled_dot_product_attention.default:
            return None
        if site.causal and not site.square:
            raise Refuse("it is causal, and there are not provably as many keys as queries")
        q, k, v = (Value(node=x) for x in site.operands)
        mask = None if site.mask is None else Value(node=site.mask)
        shared = site.four and site.heads != site.kv_heads
        return Change(Sdpa(q, k, v, mask, 0.0, site.causal, site.scale, shared))
