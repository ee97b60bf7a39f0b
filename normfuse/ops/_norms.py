"""The four normalizations over the last axis, in plain PyTorch, and the kernel that runs each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops._shapes import check_vector, float_dtype

__all__ = ["KINDS", "check_norm", "kernel_norm", "normalized"]

KINDS = ("layer", "rms", "crms", "l1")


def normalized(s: Tensor, kind: str, gain: Tensor | None, shift: Tensor | None, eps: float, scale_const: float) -> Tensor:
    """norm(s) · gain + shift over the last axis, d features long, in the dtype of s.

    layer: (s − μ) / √(mean (s − μ)² + ε);   rms: s / √(mean s² + ε);   crms: s / √((Σ s² + (Σ s)²) / (d + 1) + ε);
    l1: (s − μ) / (c mean|s − μ| + ε), c = scale_const.
    """
    if kind in ("layer", "l1"):
        s = s - s.mean(-1, keepdim=True)
    if kind == "l1":
        y = s / (scale_const * s.abs().mean(-1, keepdim=True) + eps)
    elif kind == "crms":
        square = s.square().sum(-1, keepdim=True) + s.sum(-1, keepdim=True).square()
        y = s / (square / (s.shape[-1] + 1) + eps).sqrt()
    else:
        y = s / (s.square().mean(-1, keepdim=True) + eps).sqrt()
    if gain is not None:
        y = y * gain.to(y.dtype)
    return y if shift is None else y + shift.to(y.dtype)


def check_norm(op: str, x: Tensor, gain: Tensor | None, shift: Tensor | None) -> torch.dtype:
    """The dtype to compute in.

    Raises:
        UsageError: x has no features, or gain and shift are no vectors of as many.
    """
    if not x.ndim or not x.shape[-1]:
        raise UsageError(f"{op}: x {tuple(x.shape)}; expected at least one feature on the last axis")
    for name, value in (("gain", gain), ("shift", shift)):
        if value is not None:
            check_vector(op, name, value, x.shape[-1])
    return float_dtype(op, x)


def kernel_norm(x: Tensor, kind: str, gain: Tensor | None, shift: Tensor | None, eps: float, scale_const: float) -> Tensor:
    """`normalized` by the native kernel, in float32, given back in the dtype of x."""
    rows = x.float().contiguous()
    d = x.shape[-1]
    y = torch.empty_like(rows)
    native.call(
        "nf_norm", native.KINDS[kind], rows, None, rows.numel() // d, d, dense(gain), dense(shift), eps, scale_const, None, y
    )  # fmt: skip
    return y.to(x.dtype)


def dense(value: Tensor | None) -> Tensor | None:
    """Contiguous float32, which for most constants is the constant itself."""
    return None if value is None else value.float().contiguous()
