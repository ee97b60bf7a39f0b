"""`torch.ops.normfuse.crms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse import native
from normfuse.ops._define import define
from normfuse.ops._norms import check_norm, gpu_norm, kernel_norm, normalized

__all__ = ["crms_norm"]


def crms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """y = x / √((Σ x² + (Σ x)²) / (d + 1) + ε) · gain over the last axis, d features long.

    x is a vector of d + 1 coordinates whose sum is zero, without its last one.

    Args:
        x: [..., d]; float16 and bfloat16 are computed in float32.
        gain: [d] or None.
        eps: ε, in units of x².

    Returns:
        As x.

    Raises:
        UsageError: shapes do not fit.

    Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers, NeurIPS 2023.
    """
    dtype = check_norm("crms_norm", x, gain, None)
    return normalized(x.to(dtype), "crms", gain, None, eps, 1.0).to(x.dtype).contiguous()


def _shapes(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    check_norm("crms_norm", x, gain, None)
    return x.new_empty(x.shape)


def _kernel(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if x.dtype is torch.float64 or not native.available():
        return crms_norm(x, gain, eps)
    check_norm("crms_norm", x, gain, None)
    return kernel_norm(x, "crms", gain, None, eps, 1.0)


def _gpu(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    check_norm("crms_norm", x, gain, None)
    return gpu_norm(x, None, "crms", gain, None, eps, 1.0)[0]


define("crms_norm(Tensor x, Tensor? gain, float eps) -> Tensor", crms_norm, _shapes, _kernel, gpu=_gpu)
