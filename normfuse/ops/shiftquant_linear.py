"""`torch.ops.normfuse.shiftquant_linear`: floats in, an integer product, floats out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.gpu.run import NAMES
from normfuse.ops._epilogue import finish
from normfuse.ops._gpu_product import gpu_product, gpu_rows
from normfuse.ops._norms import dense
from normfuse.ops._prepared import Packed, gpu_weight, known_linear, linear_weight, operand_of
from normfuse.ops._product import Product, check
from normfuse.ops._shapes import float_dtype, input_scale_value
from normfuse.ops.operator import Operator
from normfuse.quant.integers import integer_matmul, quantize_rows, quantize_static

__all__ = ["SHIFTQUANT_LINEAR", "shiftquant_linear"]

_OP = "shiftquant_linear"


def shiftquant_linear(
    x: Tensor,
    weight: Tensor,
    exponents: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    bits: int,
    activation_bits: int,
    epilogue: str = "none",
    residual: Tensor | None = None,
    multipliers: Tensor | None = None,
) -> Tensor:
    """y[m, n] = act( s[m] · scale[n] · Σ_k A[m, k] · (C[n, k] << (E − e[k])) + bias[n] ) + residual[m, n].

    A and s are x quantized: by rows (all axes but the last), s[m] = max|x[m]| / qmax, A = rne(x · (qmax / max|x[m]|)); or with one
    s = input_scale, A = clamp(rne(x / s)). The sum is an exact integer, the same for every dtype of x, on every machine. A row with
    NaN or Inf gives NaN if scales are dynamic; with a static one NaN counts as 0 and Inf as the largest code.

    Args:
        x: [..., K], any float dtype, which is that of the result; float64 is computed in float64 after the sum.
        weight: C, packed (see `normfuse.quant.packing.pack`), uint8.
        exponents: e, uint8 [K].
        scale: [N], already times 2^−E.
        bias: [N] or None.
        input_scale: one positive number, or None for dynamic scales.
        bits: of C.
        activation_bits: of A.
        epilogue: "none", "relu", "gelu", "gelu_tanh" or "silu".
        residual: [..., N] in the dtype of x, or None.
        multipliers: m of blocks of input channels (see `normfuse.quant.packing.pack_multipliers`), with exponents of 0 and up to 4
            bits: C · m in the place of C << (E − e); or None.

    Returns:
        [..., N].

    Raises:
        UsageError: arguments do not belong together.
    """
    dtype = _check(Product(x, weight, exponents, scale, bias, input_scale, bits, activation_bits, epilogue, residual, multipliers))
    operand = operand_of(Packed(weight, exponents, scale, bits, multipliers))
    if input_scale is None:
        q, row_scale = quantize_rows(x, activation_bits)
    else:
        q, row_scale = quantize_static(x, input_scale_value(_OP, input_scale), activation_bits), input_scale
    return finish(integer_matmul(q, operand), row_scale, scale, bias, epilogue, residual, dtype).to(x.dtype)


def _check(g: Product) -> torch.dtype:
    check(_OP, g, g.x.shape[-1] if g.x.ndim else 0)
    r = g.residual
    if r is not None and (r.shape != (*g.x.shape[:-1], g.scale.shape[0]) or r.dtype != g.x.dtype):
        expected = f"{(*g.x.shape[:-1], g.scale.shape[0])} of {g.x.dtype}"
        raise UsageError(f"{_OP}: residual {tuple(r.shape)} of {r.dtype}; expected {expected}")
    return float_dtype(_OP, g.x)


def _shapes(g: Product) -> Tensor:
    _check(g)
    return g.x.new_empty((*g.x.shape[:-1], g.scale.shape[0]))


def _cpu(g: Product) -> Tensor:
    x, weight, exponents, scale, bias, input_scale, bits, activation_bits, epilogue, residual, multipliers = g
    packed = Packed(weight, exponents, scale, bits, multipliers, bias)
    prepared = known_linear(packed)
    # a call costs as much as a small product: what was checked before is not checked again
    checked = prepared is not None and x.ndim and x.shape[-1] == prepared.k and residual is None
    if prepared is None or not checked or not x.is_floating_point() or epilogue not in native.EPILOGUES:
        _check(g)
        prepared = linear_weight(packed)
    static = input_scale_value(_OP, input_scale)
    rows = x.float().contiguous()
    y = torch.empty((*x.shape[:-1], prepared.n), dtype=torch.float32)
    m = x.numel() // prepared.k
    native.call("nf_linear", prepared, rows, m, activation_bits, static, native.EPILOGUES[epilogue], dense(residual), y)
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def _gpu(g: Product) -> Any:
    _check(g)
    if g.multipliers is not None:
        return NotImplemented
    prepared = gpu_weight(g.weight, g.exponents, g.scale, g.bias, g.input_scale, g.bits)
    if prepared is None or g.x.dtype not in NAMES:
        return NotImplemented
    dtype = NAMES[g.x.dtype]
    q, row_scale = gpu_rows(g.x, dtype, g.activation_bits, prepared.static)
    return gpu_product(q, row_scale, prepared, g.bits, g.epilogue, None if g.residual is None else g.residual.contiguous(), dtype)


SHIFTQUANT_LINEAR = Operator(
    shiftquant_linear,
    shapes=_shapes,
    cpu=_cpu,
    gpu=_gpu,
    given=Product,
    functions=(
        native.Function(
            "nf_linear",
            native.WEIGHT,
            native.F32,
            native.LONG,
            native.INT,
            native.FLOAT,
            native.INT,
            native.F32_OR_NONE,
            native.F32,
        ),
        native.Function("nf_matmul_i32", native.WEIGHT, native.I8, native.LONG, native.I32),
    ),
)
