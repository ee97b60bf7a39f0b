"""`torch.ops.normfuse.add_rms_norm` and `add_crms_norm`: a residual addition and the norm that reads its sum, in one kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops._norms import NATIVE, check_norm, dense, gpu_norm, kernel_norm, normalized
from normfuse.ops.operator import Operator

__all__ = ["ADD_CRMS_NORM", "ADD_RMS_NORM", "add_crms_norm", "add_rms_norm"]


def add_rms_norm(x: Tensor, residual: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """sum = x + residual;   y = sum / √(mean sum² + ε) · gain over the last axis.

    The sum is rounded to the dtype of x and the rounded one is normalized, as an addition and `rms_norm` one after the other do.

    Args:
        x: [..., d]; the norm of float16 and bfloat16 is computed in float32.
        residual: of the shape and dtype of x.
        gain: [d] or None.
        eps: ε, in units of x².

    Returns:
        y and sum, both as x.

    Raises:
        UsageError: shapes do not fit.
    """
    return _added("rms", x, residual, gain, eps)


def add_crms_norm(x: Tensor, residual: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """sum = x + residual;   y = sum / √((Σ sum² + (Σ sum)²) / (d + 1) + ε) · gain over the last axis, d features long.

    Arguments, results and errors as of `add_rms_norm`; for the norm see `crms_norm`.
    """
    return _added("crms", x, residual, gain, eps)


def _added(kind: str, x: Tensor, residual: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    dtype = _check(kind, x, residual, gain)
    total = (x + residual).contiguous()
    return normalized(total.to(dtype), kind, gain, None, eps, 1.0).to(x.dtype).contiguous(), total


def _check(kind: str, x: Tensor, residual: Tensor, gain: Tensor | None) -> torch.dtype:
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise UsageError(
            f"add_{kind}_norm: residual {tuple(residual.shape)} of {residual.dtype}; expected {tuple(x.shape)} of {x.dtype}, as x"
        )
    return check_norm(f"add_{kind}_norm", x, gain, None)


def _shapes(x: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _operator(definition: Callable[..., tuple[Tensor, Tensor]], kind: str) -> Operator:
    def check(x: Tensor, residual: Tensor, gain: Tensor | None, eps: float) -> None:
        _check(kind, x, residual, gain)

    def cpu(x: Tensor, residual: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        if x.dtype is not torch.float32:  # the kernel would normalize the sum before it is rounded
            total = (x + residual).contiguous()
            return kernel_norm(total, kind, gain, None, eps, 1.0), total
        rows, more, d = x.contiguous(), residual.contiguous(), x.shape[-1]
        y, total = torch.empty_like(rows), torch.empty_like(rows)
        native.call("nf_norm", native.KINDS[kind], rows, more, rows.numel() // d, d, dense(gain), None, eps, 1.0, total, y)
        return y, total

    def gpu(x: Tensor, residual: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
        y, total = gpu_norm(x, residual, kind, gain, None, eps, 1.0)
        return y, total

    return Operator(definition, shapes=_shapes, check=check, cpu=cpu, gpu=gpu, functions=(NATIVE,))


ADD_RMS_NORM, ADD_CRMS_NORM = _operator(add_rms_norm, "rms"), _operator(add_crms_norm, "crms")
