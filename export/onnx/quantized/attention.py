"""Masks of attention that is an operator of normfuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normfuse.export.onnx.attention.masks import hidden_by_infinity
from normfuse.export.onnx.build import Build, Shared
from normfuse.export.onnx.quantized.sites import sites

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["float_masks"]


def float_masks(model: ir.Model) -> None:
    """A mask of bools becomes 0 and -inf, as in the definition: a query that sees no key gives 0."""
    shared: Shared = {}
    for site in sites(model):
        mask = site.inputs[3] if site.op.name == "Attention" else None
        if mask is not None:
            site.node.replace_input_with(3, hidden_by_infinity(mask, Build(model, site.node, shared)))
