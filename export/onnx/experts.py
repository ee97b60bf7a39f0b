"""Products of tokens that are sorted by expert, as mixtures of experts compute them.

    y[s] = x[s] W[e]   for offs[e − 1] ≤ s < offs[e]

In ONNX: rows are cut out at the offsets, each part is multiplied with its own weight, and the parts are joined. No row is
multiplied with the weight of another expert, and no weight is copied for a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from normfuse.errors import ExportError
from normfuse.extras import need

__all__ = ["FALLBACK", "GROUPED", "fallback", "grouped_products"]

GROUPED = torch.ops.aten._grouped_mm.default if hasattr(torch.ops.aten, "_grouped_mm") else None
"""PyTorch's operator, on a CPU for bfloat16 alone."""
FALLBACK = "grouped_mm_fallback"
"""The operator of transformers for other dtypes."""


def fallback() -> Any:
    """The operator of transformers; None where the library has not registered it."""
    packet = getattr(torch.ops.transformers, FALLBACK, None)
    return None if packet is None else packet.default


def grouped_products(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of the operators that are registered."""
    op = getattr(need("onnxscript", extra="onnx"), f"opset{opset}")

    def translate(x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
        count = weight.shape[0] if weight.shape is not None else None
        if offs is None or bias is not None or not isinstance(count, int) or len(x.shape) != 2 or len(weight.shape) != 3:
            raise ExportError("products of experts need rows (tokens, features), one weight for each expert, and their offsets")
        zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
        start, parts = zero, []
        for e in range(count):
            at = op.Constant(value_ints=[e])
            end = op.Slice(op.Cast(offs, to=7), at, op.Constant(value_ints=[e + 1]))
            each = op.Squeeze(op.Slice(weight, at, op.Constant(value_ints=[e + 1]), zero), zero)
            parts.append(op.MatMul(op.Slice(x, start, end, zero, one), each))
            start = end
        return op.Concat(*parts, axis=0)

    return {found: translate for found in (GROUPED, fallback()) if found is not None}
