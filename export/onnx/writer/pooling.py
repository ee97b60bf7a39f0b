"""Averages over bins of unequal size, for which ONNX has no operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from normfuse.errors import ExportError
from normfuse.extras import need

__all__ = ["adaptive_average_3d"]


def adaptive_average_3d(self: Any, output_size: Sequence[int]) -> Any:
    """The means of `output_size` bins of a volume (…, D, H, W).

    A bin is a box, so that its mean is a mean along each axis in turn: a product with one constant matrix an axis.

    Raises:
        ExportError: a size of the volume varies, so that the bins do.
    """
    op = need("onnxscript", extra="onnx").opset18
    sizes = self.shape[-3:]
    if not all(isinstance(n, int) for n in (*sizes, *output_size)):
        raise ExportError("the bins of an adaptive pooling depend on sizes that vary: fix depth, height and width")
    deep, high, wide = (_means(n, count).astype(self.dtype.numpy()) for n, count in zip(sizes, output_size, strict=True))
    lead = [0] * (len(self.shape) - 3)  # as they are
    flat = op.Reshape(self, _ints(op, [*lead, sizes[0], sizes[1] * sizes[2]]))
    means = op.Reshape(op.MatMul(_constant(op, deep), flat), _ints(op, [*lead, output_size[0], *sizes[1:]]))
    return op.MatMul(op.MatMul(_constant(op, high), means), _constant(op, wide.T))


def _means(size: int, bins: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(bins, size): row i averages what PyTorch's bin i holds, from ⌊i size / bins⌋ to ⌈(i + 1) size / bins⌉."""
    found = np.zeros((bins, size))
    for i in range(bins):
        first, last = i * size // bins, -(-(i + 1) * size // bins)
        found[i, first:last] = 1 / (last - first)
    return found


def _constant(op: Any, value: np.ndarray[Any, Any]) -> Any:
    return op.Constant(value=need("onnx_ir", extra="onnx").tensor(value))


def _ints(op: Any, values: Sequence[int]) -> Any:
    return op.Constant(value_ints=list(values))
