"""The operators of `normfuse.ops.codes` in standard ops."""

from __future__ import annotations

from normfuse.export.ops.codes.conv2d import CODES_CONV2D
from normfuse.export.ops.codes.others import (
    CODES_ADD,
    CODES_GATE,
    CODES_MAX_POOL2D,
    CODES_MEAN,
    CODES_TAKE,
    CODES_UPSAMPLE,
    DEQUANTIZE_CODES,
    QUANTIZE_CODES,
)

__all__ = [
    "CODES_ADD", "CODES_CONV2D", "CODES_GATE", "CODES_MAX_POOL2D", "CODES_MEAN", "CODES_TAKE", "CODES_UPSAMPLE",
    "DEQUANTIZE_CODES", "QUANTIZE_CODES",
]  # fmt: skip
