"""`torch.ops.normfuse.l1_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse import native
from normfuse.ops._define import define
from normfuse.ops._norms import check_norm, gpu_norm, kernel_norm, normalized

__all__ = ["l1_norm"]


def l1_norm(x: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float, scale_const: float) -> Tensor:
    """y = (x − μ) / (c mean|x − μ| + ε) · gain + shift over the last axis,   c = scale_const.

    Args:
        x: [..., d]; float16 and bfloat16 are computed in float32.
        gain, shift: [d] or None.
        eps: ε, in units of x.
        scale_const: c; √(π/2) makes the denominator the standard deviation of normally distributed x.

    Returns:
        As x.

    Raises:
        UsageError: shapes do not fit.

    Source: Hoffer et al., Norm matters, NeurIPS 2018.
    """
    dtype = check_norm("l1_norm", x, gain, shift)
    return normalized(x.to(dtype), "l1", gain, shift, eps, scale_const).to(x.dtype).contiguous()


def _shapes(x: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float, scale_const: float) -> Tensor:
    check_norm("l1_norm", x, gain, shift)
    return x.new_empty(x.shape)


def _kernel(x: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float, scale_const: float) -> Tensor:
    if x.dtype is torch.float64 or not native.available():
        return l1_norm(x, gain, shift, eps, scale_const)
    check_norm("l1_norm", x, gain, shift)
    return kernel_norm(x, "l1", gain, shift, eps, scale_const)


def _gpu(x: Tensor, gain: Tensor | None, shift: Tensor | None, eps: float, scale_const: float) -> Tensor:
    check_norm("l1_norm", x, gain, shift)
    return gpu_norm(x, None, "l1", gain, shift, eps, scale_const)[0]


define(
    "l1_norm(Tensor x, Tensor? gain, Tensor? shift, float eps, float scale_const) -> Tensor", l1_norm, _shapes, _kernel, gpu=_gpu
)
