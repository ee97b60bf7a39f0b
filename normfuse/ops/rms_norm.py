"""`torch.ops.normfuse.rms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse import native
from normfuse.ops._define import define
from normfuse.ops._norms import check_norm, gpu_norm, kernel_norm, normalized

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """y = x / √(mean x² + ε) · gain over the last axis.

    Args:
        x: [..., d]; float16 and bfloat16 are computed in float32.
        gain: [d] or None.
        eps: ε, in units of x².

    Returns:
        As x.

    Raises:
        UsageError: shapes do not fit.

    Source: Zhang and Sennrich, Root mean square layer normalization, NeurIPS 2019.
    """
    dtype = check_norm("rms_norm", x, gain, None)
    return normalized(x.to(dtype), "rms", gain, None, eps, 1.0).to(x.dtype).contiguous()


def _shapes(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    check_norm("rms_norm", x, gain, None)
    return x.new_empty(x.shape)


def _kernel(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if x.dtype is torch.float64 or not native.available():
        return rms_norm(x, gain, eps)
    check_norm("rms_norm", x, gain, None)
    return kernel_norm(x, "rms", gain, None, eps, 1.0)


def _gpu(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    check_norm("rms_norm", x, gain, None)
    return gpu_norm(x, None, "rms", gain, None, eps, 1.0)[0]


define("rms_norm(Tensor x, Tensor? gain, float eps) -> Tensor", rms_norm, _shapes, _kernel, gpu=_gpu)
