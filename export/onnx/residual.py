"""Residual additions that ONNX Runtime must not merge into the LayerNormalization behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normfuse.export.onnx.build import given

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["keep_layer_norm_apart"]


def keep_layer_norm_apart(model: ir.Model) -> int:
    """Write `Add -> LayerNormalization` as `Sum -> LayerNormalization`; returns the number of additions.

    ONNX Runtime's SkipLayerNormFusion merges the pair into SkipLayerNormalization, whose CPU kernel takes about 8 times
    as long as the two. It looks for Add by name; Sum of two tensors is the same function at the same speed.
    `disabled_optimizers=["SkipLayerNormFusion"]` of the session does the same for a file that cannot be changed.
    """
    found = 0
    for node in model.graph:
        if node.op_type != "LayerNormalization" or node.domain:
            continue
        x = given(node)
        add = x.producer()
        if add is not None and add.op_type == "Add" and not add.domain and x.dtype is not None:
            # Sum takes floating point alone; LayerNormalization does so too
            add.op_type = "Sum"
            found += 1
    return found
