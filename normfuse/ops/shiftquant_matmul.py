"""`torch.ops.normfuse.shiftquant_matmul` and `shiftquant_matmul_quantize`: integers in, floats or integers out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops._epilogue import finish
from normfuse.ops._gpu_product import gpu_product, gpu_rows
from normfuse.ops._norms import dense
from normfuse.ops._prepared import Packed, gpu_weight, linear_weight, operand_of
from normfuse.ops._shapes import check_multipliers, check_product
from normfuse.ops.operator import Operator
from normfuse.quant import integers

__all__ = ["SHIFTQUANT_MATMUL", "SHIFTQUANT_MATMUL_QUANTIZE", "shiftquant_matmul", "shiftquant_matmul_quantize"]

_TO_FLOAT, _TO_INTEGER = "shiftquant_matmul", "shiftquant_matmul_quantize"


def shiftquant_matmul(
    q: Tensor, row_scale: Tensor, weight: Tensor, exponents: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, bits: int, epilogue: str, multipliers: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y[m, n] = act( row_scale[m] · scale[n] · Σ_k q[m, k] · (C[n, k] << (E − e[k])) + bias[n] ) + residual[m, n].

    Args:
        q: int8 [..., K], as `quantize_rows` or `norm_quantize` gives it.
        row_scale: [..., 1], one a row, or one number for all; its dtype, float32 or float64, is that of the result.
        weight, exponents, scale, bias, bits, epilogue, multipliers: as in `shiftquant_linear`.
        residual: [..., N] or None.

    Returns:
        [..., N].

    Raises:
        UsageError: arguments do not belong together.
    """
    _check(_Given(q, row_scale, weight, exponents, scale, bias, residual, bits, epilogue, multipliers=multipliers))
    acc = integers.integer_matmul(q, operand_of(Packed(weight, exponents, scale, bits, multipliers)))
    return finish(acc, _rows(q, row_scale), scale, bias, epilogue, residual, row_scale.dtype)


def shiftquant_matmul_quantize(
    q: Tensor, row_scale: Tensor, weight: Tensor, exponents: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, bits: int, epilogue: str, out_bits: int, multipliers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """quantize_rows(shiftquant_matmul(...), out_bits), without the floats ever being in memory.

    Args:
        q, row_scale, weight, exponents, scale, bias, residual, bits, epilogue, multipliers: as in `shiftquant_matmul`.
        out_bits: of the codes that come out, 2 to 8.

    Returns:
        int8 [..., N] and the scale [..., 1], in the dtype of row_scale.

    Raises:
        UsageError: arguments do not belong together.
    """
    _check(_Given(q, row_scale, weight, exponents, scale, bias, residual, bits, epilogue, out_bits, multipliers))
    y = shiftquant_matmul(q, row_scale, weight, exponents, scale, bias, residual, bits, epilogue, multipliers)
    out, out_scale = integers.quantize_rows(y, out_bits)
    return out, out_scale.to(row_scale.dtype)


class _Given(NamedTuple):
    """The arguments of `shiftquant_matmul_quantize`, in their order; those of `shiftquant_matmul` are the same but `out_bits`."""

    q: Tensor
    row_scale: Tensor
    weight: Tensor
    exponents: Tensor
    scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
    bits: int
    epilogue: str
    out_bits: int | None = None  # None: floats
    multipliers: Tensor | None = None


def _float_given(*args: Any) -> _Given:
    """Of the arguments of `shiftquant_matmul`; the last one may be left out."""
    *first, multipliers = (*args, None)[:10]
    return _Given._make((*first, None, multipliers))


def _check(g: _Given) -> None:
    q, row_scale, residual = g.q, g.row_scale, g.residual
    op, bits = (_TO_FLOAT, (g.bits,)) if g.out_bits is None else (_TO_INTEGER, (g.bits, g.out_bits))
    check_product(op, q, q.shape[-1] if q.ndim else 0, g.exponents, g.scale, g.bias, bits, g.epilogue)
    check_multipliers(op, g.multipliers, g.scale.shape[0], g.exponents.shape[0], g.bits)
    if q.dtype is not torch.int8:
        raise UsageError(f"{op}: q is {q.dtype}; expected int8")
    if row_scale.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"{op}: row_scale is {row_scale.dtype}; expected float32 or float64")
    if row_scale.ndim and row_scale.shape != (*q.shape[:-1], 1) and row_scale.shape != (1,):
        raise UsageError(f"{op}: row_scale {tuple(row_scale.shape)}; expected one number, or {(*q.shape[:-1], 1)}")
    if residual is not None and (residual.shape != (*q.shape[:-1], g.scale.shape[0]) or not residual.is_floating_point()):
        raise UsageError(
            f"{op}: residual {tuple(residual.shape)} of {residual.dtype}; expected floats {(*q.shape[:-1], g.scale.shape[0])}"
        )


def _rows(q: Tensor, row_scale: Tensor) -> Tensor:
    """One number broadcasts to any q, which (1,) would not to a q of one axis."""
    return row_scale if row_scale.ndim == q.ndim else row_scale.reshape(())


def _float_shapes(g: _Given) -> Tensor:
    return g.q.new_empty((*g.q.shape[:-1], g.scale.shape[0]), dtype=g.row_scale.dtype)


def _integer_shapes(g: _Given) -> tuple[Tensor, Tensor]:
    rows = g.q.shape[:-1]
    return g.q.new_empty((*rows, g.scale.shape[0])), g.q.new_empty((*rows, 1), dtype=g.row_scale.dtype)


def _prepared(g: _Given) -> tuple[native.Weight, Tensor, Tensor, int, int]:
    """What the kernels read: the weight, q, its scales, their stride, and the number of rows."""
    prepared = linear_weight(Packed(g.weight, g.exponents, g.scale, g.bits, g.multipliers, g.bias))
    m = g.q.numel() // prepared.k
    return prepared, g.q.contiguous(), g.row_scale.contiguous(), int(g.row_scale.numel() == m > 1), m


def _float_cpu(g: _Given) -> Tensor:
    prepared, *rows = _prepared(g)
    y = g.row_scale.new_empty((*g.q.shape[:-1], prepared.n))
    native.call("nf_matmul", prepared, *rows, native.EPILOGUES[g.epilogue], dense(g.residual), y)
    return y


def _integer_cpu(g: _Given) -> tuple[Tensor, Tensor]:
    prepared, *rows = _prepared(g)
    out = g.q.new_empty((*g.q.shape[:-1], prepared.n))
    out_scale = g.row_scale.new_empty((*g.q.shape[:-1], 1))
    act = native.EPILOGUES[g.epilogue]
    if g.residual is None:
        native.call("nf_matmul_quantize", prepared, *rows, act, g.out_bits, out, out_scale)
    else:
        y = g.row_scale.new_empty(out.shape)
        native.call("nf_matmul", prepared, *rows, act, dense(g.residual), y)
        native.call("nf_quantize_rows", y, rows[-1], prepared.n, g.out_bits, out, out_scale)
    return out, out_scale


def _float_gpu(g: _Given) -> Any:
    if g.multipliers is not None:
        return NotImplemented
    prepared = gpu_weight(g.weight, g.exponents, g.scale, g.bias, None, g.bits)
    if prepared is None:
        return NotImplemented
    rows = g.row_scale.reshape(-1).expand(g.q.numel() // g.q.shape[-1]).contiguous()
    return gpu_product(g.q, rows, prepared, g.bits, g.epilogue, dense(g.residual), "fp32")


def _integer_gpu(g: _Given) -> Any:
    y = _float_gpu(g)
    if y is NotImplemented:
        return y
    assert g.out_bits is not None
    return gpu_rows(y, "fp32", g.out_bits, None)


_ROWS = (native.WEIGHT, native.I8, native.F32, native.LONG, native.LONG, native.INT)
_MATMUL = native.Function("nf_matmul", *_ROWS, native.F32_OR_NONE, native.F32)
SHIFTQUANT_MATMUL = Operator(
    shiftquant_matmul,
    shapes=_float_shapes,
    check=_check,
    cpu=_float_cpu,
    gpu=_float_gpu,
    given=_float_given,
    like=1,
    functions=(_MATMUL,),
)
SHIFTQUANT_MATMUL_QUANTIZE = Operator(
    shiftquant_matmul_quantize,
    shapes=_integer_shapes,
    check=_check,
    cpu=_integer_cpu,
    gpu=_integer_gpu,
    given=_Given,
    like=1,
    functions=(_MATMUL, native.Function("nf_matmul_quantize", *_ROWS, native.INT, native.I8, native.F32)),
)
