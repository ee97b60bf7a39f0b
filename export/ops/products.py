"""Integer products in standard ops, and what comes behind them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from normfuse.export.ops.activations import ZERO
from normfuse.export.ops.emitter import Emitter
from normfuse.export.ops.weights import Operand

__all__ = ["activated", "finished", "named", "outer", "shifted", "sums"]


def sums(at: Emitter, codes: Any, operands: tuple[Operand, ...]) -> Any:
    """Σ_k A[m, k] · operand[k, n] as int32.

    The pairs of types are those that ONNX Runtime multiplies exactly: uint8 · uint8 always, uint8 · int8 up to `SAFE`. Its
    kernels for signed activations are exact too, and seven times slower on AVX2.

    Args:
        codes: uint8 with zero point 128.
        operands: the parts of the weight.
    """
    total = None
    for part in operands:
        read = codes if part.columns is None else at.op("Gather", codes, at.const(part.columns), axis=-1)
        zero = at.const(np.uint8(part.zero) if part.zero else np.int8(0))
        acc = shifted(at, at.op("MatMulInteger", read, part.value, at.const(ZERO), zero), part.shift)
        total = acc if total is None else at.op("Add", total, acc)
    return total


def shifted(at: Emitter, acc: Any, shift: int) -> Any:
    """acc << shift"""
    return acc if shift == 0 else at.op("Mul", acc, at.const(np.int32(1 << shift)))


def outer(at: Emitter, row_scale: Any, scale: Any) -> Any:
    """row_scale[m] · scale[n] for row_scale [..., 1] and scale [N].

    As a matrix product: ONNX Runtime 1.32 merges MatMulInteger, Cast, and Mul by a Mul of two scales into MatMulIntegerToFloat
    without asking whether the first is one number, and takes the scale of the first row for all.
    """
    return at.op("MatMul", row_scale, at.op("Unsqueeze", scale, at.const(np.array([0], np.int64))))


def finished(at: Emitter, acc: Any, factor: Any, bias: Any, epilogue: str, residual: Any = None, *, double: bool = False) -> Any:
    """act(float(acc) · factor + bias) + residual; float is float64 where `double`."""
    y = at.op("Mul", at.op("Cast", acc, to=11 if double else 1), factor)
    if bias is not None:
        y = at.op("Add", y, at.op("Cast", bias, to=11) if double else bias)
    y = activated(at, y, epilogue)
    return y if residual is None else at.op("Add", y, residual)


def activated(at: Emitter, y: Any, epilogue: str) -> Any:
    """The activation of that name; "none" is y itself."""
    match epilogue:
        case "relu":
            return at.op("Relu", y)
        case "gelu":
            return at.op("Gelu", y) if at.opset >= _GELU else _gelu(at, y)
        case "gelu_tanh":
            return at.op("Gelu", y, approximate="tanh") if at.opset >= _GELU else _gelu_tanh(at, y)
        case "silu":
            return at.op("Mul", y, at.op("Sigmoid", y))
        case _:
            return y


_GELU = 20  # the first opset that has it


def _gelu(at: Emitter, y: Any) -> Any:
    """y/2 · (1 + erf(y / √2))"""
    half, one, root = (at.op("CastLike", at.const(np.float32(v)), y) for v in (0.5, 1, math.sqrt(2)))
    return at.op("Mul", at.op("Mul", y, half), at.op("Add", one, at.op("Erf", at.op("Div", y, root))))


def _gelu_tanh(at: Emitter, y: Any) -> Any:
    """y/2 · (1 + tanh(√(2/π) · (y + 0.044715 y³)))"""
    half, one, root, cubic = (at.op("CastLike", at.const(np.float32(v)), y) for v in (0.5, 1, math.sqrt(2 / math.pi), 0.044715))
    inner = at.op("Add", y, at.op("Mul", cubic, at.op("Mul", y, at.op("Mul", y, y))))
    return at.op("Mul", at.op("Mul", y, half), at.op("Add", one, at.op("Tanh", at.op("Mul", root, inner))))


def named(epilogue: str) -> str:
    """The word for an epilogue in the name of a variant."""
    return "" if epilogue == "none" else epilogue
