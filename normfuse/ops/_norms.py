"""The four normalizations over the last axis, in plain PyTorch, and the kernels that run each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.gpu.norm import plan_norm
from normfuse.gpu.run import NAMES, run
from normfuse.ops._shapes import check_vector, float_dtype

__all__ = ["NATIVE", "check_norm", "dense", "gpu_norm", "kernel_norm", "normalized"]

#: The kind, x, the residual, rows, features, gain, shift, ε, c; the sum, y.
NATIVE = native.Function(
    "nf_norm", native.INT, native.F32, native.F32_OR_NONE, native.LONG, native.LONG, native.F32_OR_NONE, native.F32_OR_NONE,
    native.FLOAT, native.FLOAT, native.F32_OR_NONE, native.F32,
)  # fmt: skip


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


def gpu_norm(
    x: Tensor, residual: Tensor | None, kind: str, gain: Tensor | None, shift: Tensor | None, eps: float, scale_const: float
) -> tuple[Tensor, ...]:
    """`normalized` of x + residual, rounded to the dtype of x, by the GPU kernel; behind it the sum, where there is a residual."""
    given = {"x": x, "residual": residual, "gain": gain, "shift": shift}
    # a gain of float64 is the one that the kernel cannot read
    inputs = {k: (v if v.dtype in NAMES else v.float()).contiguous() for k, v in given.items() if v is not None}
    names = {k: NAMES[v.dtype] for k, v in inputs.items()}
    gain_name, shift_name, d = names.get("gain"), names.get("shift"), x.shape[-1]
    launch = plan_norm(
        kind, d, names["x"], gain=gain_name, shift=shift_name, residual=residual is not None, eps=eps, scale_const=scale_const
    )
    return run(launch, inputs)


def dense(value: Tensor | None) -> Tensor | None:
    """Contiguous float32, which for most constants is the constant itself."""
    return None if value is None else value.float().contiguous()
