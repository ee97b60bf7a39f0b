"""`torch.ops.normfuse.norm_quantize`: a norm whose result is only ever an integer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops._norms import NATIVE, check_norm, dense, normalized
from normfuse.ops._shapes import check_bits, float_dtype
from normfuse.ops.operator import Operator
from normfuse.quant import integers
from normfuse.words import KINDS

__all__ = ["NORM_QUANTIZE", "norm_quantize"]

_OP = "norm_quantize"


def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    kind: str,
    eps: float,
    scale_const: float,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum = x + residual;   q, scale = quantize_rows(norm(sum) · gain + shift).

    The norm is over the last axis, d features long: "layer" (s − μ) / √(mean (s − μ)² + ε), "rms" s / √(mean s² + ε), "crms"
    s / √((Σ s² + (Σ s)²) / (d + 1) + ε), "l1" (s − μ) / (c mean|s − μ| + ε).

    Args:
        x: [..., d].
        residual: as x, or None.
        gain, shift: [d] or None.
        kind: "layer", "rms", "crms" or "l1".
        eps: ε.
        scale_const: c of "l1".
        bits: of a code, 2 to 8.

    Returns:
        q, int8 [..., d]; scale [..., 1], float32 (float64 for float64); the sum, as x, or a tensor of shape [0] without a
        residual: it would be x.

    Raises:
        UsageError: shapes do not fit, or the kind is not known.
    """
    dtype = _check(x, residual, gain, shift, kind, eps, scale_const, bits)
    total = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    q, scale = integers.quantize_rows(normalized(total, kind, gain, shift, eps, scale_const), bits)
    return q.contiguous(), scale.to(dtype).contiguous(), x.new_empty(0) if residual is None else total.to(x.dtype).contiguous()


def _check(
    x: Tensor, residual: Tensor | None, gain: Tensor | None, shift: Tensor | None, kind: str, *numbers: float
) -> torch.dtype:
    if kind not in KINDS:
        raise UsageError(f"{_OP}: kind={kind!r}; expected one of {', '.join(KINDS)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise UsageError(
            f"{_OP}: residual {tuple(residual.shape)} of {residual.dtype}; expected {tuple(x.shape)} of {x.dtype}, as x"
        )
    check_bits(_OP, int(numbers[-1]))
    return check_norm(_OP, x, gain, shift)


def _shapes(x: Tensor, residual: Tensor | None, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.new_empty((*x.shape[:-1], 1), dtype=float_dtype(_OP, x))
    return x.new_empty(x.shape, dtype=torch.int8), scale, x.new_empty(0 if residual is None else x.shape)


def _cpu(
    x: Tensor, residual: Tensor | None, gain: Tensor | None, shift: Tensor | None, kind: str, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor]:
    eps, scale_const, bits = numbers
    s, more = x.float().contiguous(), dense(residual)
    d = x.shape[-1]
    q, scale = s.new_empty(x.shape, dtype=torch.int8), s.new_empty((*x.shape[:-1], 1))
    total = s.new_empty(0) if more is None else s.new_empty(x.shape)
    native.call(
        "nf_norm_quantize", native.KINDS[kind], s, more, s.numel() // d, d, dense(gain), dense(shift), eps, scale_const, bits,
        None if more is None else total, q, scale,
    )  # fmt: skip
    return q, scale, total.to(x.dtype)


NORM_QUANTIZE = Operator(
    norm_quantize,
    shapes=_shapes,
    check=_check,
    cpu=_cpu,
    functions=(native.Function("nf_norm_quantize", *NATIVE.arguments[:9], native.INT, native.F32_OR_NONE, native.I8, native.F32),),
)
