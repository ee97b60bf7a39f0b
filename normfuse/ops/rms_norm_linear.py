"""`torch.ops.normfuse.rms_norm_linear`: a linear layer behind an RMSNorm, whose scale is applied to the product."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.gpu.norm_linear import plan_norm_linear
from normfuse.gpu.run import NAMES, run
from normfuse.ops._epilogue import activation
from normfuse.ops._shapes import check_epilogue, check_vector, float_dtype
from normfuse.ops.operator import Operator

__all__ = ["RMS_NORM_LINEAR", "rms_norm_linear"]

_OP = "rms_norm_linear"


def rms_norm_linear(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, epilogue: str = "none") -> Tensor:
    """y = act( W (x / ρ) + b ) = act( (W x) / ρ + b ),   ρ = √(mean x² + ε).

    Args:
        x: [..., K]; float16 and bfloat16 are computed in float32.
        weight: W, [N, K] in the dtype of x. A gain γ of the norm belongs into it: W diag(γ).
        bias: b, [N] or None.
        eps: ε, in units of x².
        epilogue: "none", "relu", "gelu", "gelu_tanh" or "silu".

    Returns:
        [..., N], in the dtype of x.

    Raises:
        UsageError: arguments do not belong together.

    Source: FlashNorm, arXiv 2407.09577.
    """
    dtype = _check(x, weight, bias, eps, epilogue)
    wide = x.to(dtype)
    y = wide @ weight.to(dtype).T / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    if bias is not None:
        y = y + bias.to(dtype)
    return activation(y, epilogue).to(x.dtype).contiguous()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, epilogue: str = "none") -> torch.dtype:
    dtype = float_dtype(_OP, x)
    if not x.ndim or not x.shape[-1]:
        raise UsageError(f"{_OP}: x {tuple(x.shape)}; expected at least one feature on the last axis")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype or not weight.shape[0]:
        raise UsageError(f"{_OP}: weight {tuple(weight.shape)} of {weight.dtype}; expected [N, {x.shape[-1]}] of {x.dtype}, as x")
    if bias is not None:
        check_vector(_OP, "bias", bias, weight.shape[0])
    check_epilogue(_OP, epilogue)
    return dtype


def _gpu(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, epilogue: str = "none") -> Tensor:
    (n, k), dtype = weight.shape, NAMES[x.dtype]
    rows = x.numel() // k
    launch = plan_norm_linear("rms", k, n, dtype, bias=bias is not None, eps=eps, epilogue=epilogue, rows_hint=rows)
    inputs = {"x": x.contiguous(), "weight": weight.contiguous()}
    if bias is not None:
        inputs["bias"] = bias.to(x.dtype).contiguous()
    (y,) = run(launch, inputs)
    return y


RMS_NORM_LINEAR = Operator(
    rms_norm_linear,
    shapes=lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])),
    check=_check,
    gpu=_gpu,
)
