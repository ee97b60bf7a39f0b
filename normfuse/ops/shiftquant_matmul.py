"""`torch.ops.normfuse.shiftquant_matmul` and `shiftquant_matmul_quantize`: integers in, floats or integers out."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops._define import define
from normfuse.ops._epilogue import finish
from normfuse.ops._gpu_product import gpu_product, gpu_rows
from normfuse.ops._norms import dense
from normfuse.ops._prepared import gpu_weight, linear_weight, operand_of
from normfuse.ops._shapes import check_product
from normfuse.quant import integers

__all__ = ["shiftquant_matmul", "shiftquant_matmul_quantize"]

_TO_FLOAT, _TO_INTEGER = "shiftquant_matmul", "shiftquant_matmul_quantize"


def shiftquant_matmul(
    q: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    exponents: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    epilogue: str,
) -> Tensor:
    """y[m, n] = act( row_scale[m] · scale[n] · Σ_k q[m, k] · (C[n, k] << (E − e[k])) + bias[n] ) + residual[m, n].

    Args:
        q: int8 [..., K], as `quantize_rows` or `norm_quantize` gives it.
        row_scale: [..., 1], one a row, or one number for all; its dtype, float32 or float64, is that of the result.
        weight, exponents, scale, bias, bits, epilogue: as in `shiftquant_linear`.
        residual: [..., N] or None.

    Returns:
        [..., N].

    Raises:
        UsageError: arguments do not belong together.
    """
    _check(_TO_FLOAT, q, row_scale, exponents, scale, bias, residual, bits, epilogue)
    acc = integers.integer_matmul(q, operand_of(weight, exponents, scale.numel(), bits))
    return finish(acc, _rows(q, row_scale), scale, bias, epilogue, residual, row_scale.dtype)


def shiftquant_matmul_quantize(
    q: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    exponents: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    epilogue: str,
    out_bits: int,
) -> tuple[Tensor, Tensor]:
    """quantize_rows(shiftquant_matmul(...), out_bits), without the floats ever being in memory.

    Args:
        q, row_scale, weight, exponents, scale, bias, residual, bits, epilogue: as in `shiftquant_matmul`.
        out_bits: of the codes that come out, 2 to 8.

    Returns:
        int8 [..., N] and the scale [..., 1], in the dtype of row_scale.

    Raises:
        UsageError: arguments do not belong together.
    """
    _check(_TO_INTEGER, q, row_scale, exponents, scale, bias, residual, bits, epilogue, out_bits)
    y = shiftquant_matmul(q, row_scale, weight, exponents, scale, bias, residual, bits, epilogue)
    out, out_scale = integers.quantize_rows(y, out_bits)
    return out, out_scale.to(row_scale.dtype)


def _check(
    op: str,
    q: Tensor,
    row_scale: Tensor,
    exponents: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    epilogue: str,
    out_bits: int = 8,
) -> None:
    check_product(op, q, q.shape[-1] if q.ndim else 0, exponents, scale, bias, (bits, out_bits), epilogue)
    if q.dtype is not torch.int8:
        raise UsageError(f"{op}: q is {q.dtype}; expected int8")
    if row_scale.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"{op}: row_scale is {row_scale.dtype}; expected float32 or float64")
    if row_scale.ndim and row_scale.shape != (*q.shape[:-1], 1) and row_scale.shape != (1,):
        raise UsageError(f"{op}: row_scale {tuple(row_scale.shape)}; expected one number, or {(*q.shape[:-1], 1)}")
    if residual is not None and (residual.shape != (*q.shape[:-1], scale.shape[0]) or not residual.is_floating_point()):
        raise UsageError(
            f"{op}: residual {tuple(residual.shape)} of {residual.dtype}; expected floats {(*q.shape[:-1], scale.shape[0])}"
        )


def _rows(q: Tensor, row_scale: Tensor) -> Tensor:
    """One number broadcasts to any q, which (1,) would not to a q of one axis."""
    return row_scale if row_scale.ndim == q.ndim else row_scale.reshape(())


def _float_shapes(q: Tensor, row_scale: Tensor, weight: Tensor, exponents: Tensor, scale: Tensor, *rest: object) -> Tensor:
    _check(_TO_FLOAT, q, row_scale, exponents, scale, *rest)  # type: ignore[arg-type]
    return q.new_empty((*q.shape[:-1], scale.shape[0]), dtype=row_scale.dtype)


def _integer_shapes(
    q: Tensor, row_scale: Tensor, weight: Tensor, exponents: Tensor, scale: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    _check(_TO_INTEGER, q, row_scale, exponents, scale, *rest)  # type: ignore[arg-type]
    rows = q.shape[:-1]
    return q.new_empty((*rows, scale.shape[0])), q.new_empty((*rows, 1), dtype=row_scale.dtype)


def _float_kernel(
    q: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    exponents: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    epilogue: str,
) -> Tensor:
    if row_scale.dtype is torch.float64 or not native.available():
        return shiftquant_matmul(q, row_scale, weight, exponents, scale, bias, residual, bits, epilogue)
    _check(_TO_FLOAT, q, row_scale, exponents, scale, bias, residual, bits, epilogue)
    prepared = linear_weight(weight, exponents, scale, bias, bits)
    q, row_scale = q.contiguous(), row_scale.contiguous()
    m = q.numel() // prepared.k
    y = row_scale.new_empty((*q.shape[:-1], prepared.n))
    stride = int(row_scale.numel() == m > 1)
    native.call("nf_matmul", prepared, q, row_scale, stride, m, native.EPILOGUES[epilogue], dense(residual), y)
    return y


def _integer_kernel(
    q: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    exponents: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    epilogue: str,
    out_bits: int,
) -> tuple[Tensor, Tensor]:
    if row_scale.dtype is torch.float64 or not native.available():
        return shiftquant_matmul_quantize(q, row_scale, weight, exponents, scale, bias, residual, bits, epilogue, out_bits)
    _check(_TO_INTEGER, q, row_scale, exponents, scale, bias, residual, bits, epilogue, out_bits)
    prepared = linear_weight(weight, exponents, scale, bias, bits)
    q, row_scale = q.contiguous(), row_scale.contiguous()
    m = q.numel() // prepared.k
    stride = int(row_scale.numel() == m > 1)
    out = q.new_empty((*q.shape[:-1], prepared.n))
    out_scale = row_scale.new_empty((*q.shape[:-1], 1))
    act = native.EPILOGUES[epilogue]
    if residual is None:
        native.call("nf_matmul_quantize", prepared, q, row_scale, stride, m, act, out_bits, out, out_scale)
    else:
        y = row_scale.new_empty(out.shape)
        native.call("nf_matmul", prepared, q, row_scale, stride, m, act, dense(residual), y)
        native.call("nf_quantize_rows", y, m, prepared.n, out_bits, out, out_scale)
    return out, out_scale


def _float_gpu(
    q: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    exponents: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    epilogue: str,
) -> Tensor:
    _check(_TO_FLOAT, q, row_scale, exponents, scale, bias, residual, bits, epilogue)
    prepared = None if row_scale.dtype is torch.float64 else gpu_weight(weight, exponents, scale, bias, None, bits)
    if prepared is None:
        return shiftquant_matmul(q, row_scale, weight, exponents, scale, bias, residual, bits, epilogue)
    rows = row_scale.reshape(-1).expand(q.numel() // q.shape[-1]).contiguous()
    return gpu_product(q, rows, prepared, bits, epilogue, dense(residual), "fp32")


def _integer_gpu(
    q: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    exponents: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    epilogue: str,
    out_bits: int,
) -> tuple[Tensor, Tensor]:
    _check(_TO_INTEGER, q, row_scale, exponents, scale, bias, residual, bits, epilogue, out_bits)
    if row_scale.dtype is torch.float64:
        return shiftquant_matmul_quantize(q, row_scale, weight, exponents, scale, bias, residual, bits, epilogue, out_bits)
    y = _float_gpu(q, row_scale, weight, exponents, scale, bias, residual, bits, epilogue)
    return gpu_rows(y, "fp32", out_bits, None)


_ARGUMENTS = (
    "Tensor q, Tensor row_scale, Tensor weight, Tensor exponents, Tensor scale, Tensor? bias, Tensor? residual, int bits, "
    "str epilogue"
)
define(f"{_TO_FLOAT}({_ARGUMENTS}) -> Tensor", shiftquant_matmul, _float_shapes, _float_kernel, gpu=_float_gpu)
define(
    f"{_TO_INTEGER}({_ARGUMENTS}, int out_bits) -> (Tensor, Tensor)",
    shiftquant_matmul_quantize,
    _integer_shapes,
    _integer_kernel,
    gpu=_integer_gpu,
)
