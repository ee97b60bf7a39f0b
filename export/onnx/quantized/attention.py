"""Attention that torch graphs hold as an operator of normfuse: its mask as floats, and where its operands lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from normfuse.export.onnx.attention.attention import Site as AttentionSite
from normfuse.export.onnx.attention.attention import in_kernel
from normfuse.export.onnx.build import Build, Shared, const_of, dims
from normfuse.export.onnx.quantized.sites import sites

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["float_masks", "place_attention"]


def float_masks(model: ir.Model) -> None:
    """A mask of bools becomes 0 and -inf, as in the definition: a query that sees no key gives 0. Shared masks stay shared."""
    shared: Shared = {}
    for site in sites(model):
        mask = site.inputs[3] if site.op.name == "Attention" else None
        if mask is None:
            continue
        at = Build(model, site.node, shared)
        if mask.dtype == at.ir.DataType.BOOL:
            key = ("float mask", id(mask))
            if key not in shared:
                seen = const_of(mask)
                if seen is not None:
                    shared[key] = at.const(np.where(seen, 0, -np.inf).astype(np.float32))
                else:
                    zero, hidden = at.const(np.float32(0)), at.const(np.float32(-np.inf))
                    shared[key] = at.op("Where", mask, zero, hidden, dtype=at.ir.DataType.FLOAT, shape=dims(mask))
            site.node.replace_input_with(3, shared[key])


def place_attention(model: ir.Model) -> int:
    """Sites whose operands are views of projections as a node that reads these, without copies; returns their number. The others
    stay markers."""
    shared: Shared = {}
    count = 0
    for site in sites(model):
        if site.op.name != "Attention":
            continue
        (query, key, value, mask), facts = site.inputs, site.facts
        assert query is not None
        assert key is not None
        assert value is not None
        found = AttentionSite(site.node, query, key, value, mask, float(facts["scale"]), bool(facts["causal"]), facts["bits"])
        if in_kernel(found, Build(model, site.node, shared)):
            model.graph.remove(site.node, safe=True)
            count += 1
    return count
