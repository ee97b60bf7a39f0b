"""`torch.ops.normfuse.codes_add` and `codes_gate`: sums of two tensors of codes, and channels times a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops.codes._codes import check_codes, check_range, coded, single
from normfuse.ops.operator import Operator

__all__ = ["CODES_ADD", "CODES_GATE", "codes_add", "codes_gate"]

_MOST = 1e6  # of scales and biases, in codes: what is rounded stays within 32 bits


def codes_add(a: Tensor, b: Tensor, a_scale: float, b_scale: float, bias: float, low: int, high: int) -> Tensor:
    """clamp(rne(float(a) · a_scale + float(b) · b_scale + bias), low, high).

    Args:
        a, b: uint8 [B, H, W, C].
        a_scale, b_scale: of a code, in codes of the result.
        bias: all zero points, in codes of the result.
        low, high: bounds of the result: low is its zero point behind a ReLU.

    Returns:
        uint8 [B, H, W, C].

    Raises:
        UsageError: shapes differ, or a number is out of range.
    """
    _check_add(a, b, a_scale, b_scale, bias, low, high)
    x = a.float() * single(a_scale).to(a.device)
    return coded(x + b.float() * single(b_scale).to(a.device) + single(bias).to(a.device), low, high)


def _check_add(a: Tensor, b: Tensor, a_scale: float, b_scale: float, bias: float, low: int, high: int) -> None:
    check_codes("codes_add", a, "a")
    check_codes("codes_add", b, "b")
    if a.shape != b.shape:
        raise UsageError(f"codes_add: a {tuple(a.shape)} and b {tuple(b.shape)}; expected one shape")
    _check_numbers("codes_add", a_scale, b_scale, bias)
    check_range("codes_add", low, high)


def _check_numbers(op: str, *values: float) -> None:
    for value in values:
        if not abs(value) <= _MOST:
            raise UsageError(f"{op}: {value}; expected scales and biases within ±{_MOST:g} codes")


def _cpu_add(a: Tensor, b: Tensor, a_scale: float, b_scale: float, bias: float, low: int, high: int) -> Any:
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty(a.shape, dtype=torch.uint8)
    native.call("nf_codes_add", a, b, a.numel(), float(a_scale), float(b_scale), float(bias), low, high, y)
    return y


def codes_gate(x: Tensor, gate: Tensor, scale: float, zero: int, bias: float, low: int, high: int) -> Tensor:
    """clamp(rne(float(x − zero) · (gate[b, c] · scale) + bias), low, high); NaN gives the largest code.

    Args:
        x: uint8 [B, H, W, C].
        gate: floats [B, C, 1, 1].
        scale: of a code of x, in codes of the result.
        zero: the code of 0 in x.
        bias: the code of 0 in the result.
        low, high: bounds of the result.

    Returns:
        uint8 [B, H, W, C].

    Raises:
        UsageError: arguments do not belong together.
    """
    _check_gate(x, gate, scale, zero, bias, low, high)
    factor = gate.float() * single(scale).to(x.device)
    y = (x.to(torch.int32) - zero).float() * factor.reshape(x.shape[0], 1, 1, x.shape[3]) + single(bias).to(x.device)
    return coded(y, low, high)


def _check_gate(x: Tensor, gate: Tensor, scale: float, zero: int, bias: float, low: int, high: int) -> None:
    check_codes("codes_gate", x)
    if gate.ndim != 4 or not gate.is_floating_point() or gate.shape[1] != x.shape[3] or tuple(gate.shape[2:]) != (1, 1):
        raise UsageError(f"codes_gate: gate {tuple(gate.shape)} of {gate.dtype}; expected floats [batch, {x.shape[3]}, 1, 1]")
    _check_numbers("codes_gate", scale, bias)
    check_range("codes_gate", low, high, zero)


def _cpu_gate(x: Tensor, gate: Tensor, scale: float, zero: int, bias: float, low: int, high: int) -> Any:
    b, h, w, c = x.shape
    y = torch.empty(x.shape, dtype=torch.uint8)
    if y.numel():
        factors = gate.float().contiguous()
        native.call("nf_codes_gate", x.contiguous(), factors, b, c, h * w, float(scale), zero, float(bias), low, high, y)
    return y


CODES_ADD = Operator(
    codes_add,
    shapes=lambda a, b, a_scale, b_scale, bias, low, high: a.new_empty(a.shape),
    check=_check_add,
    cpu=_cpu_add,
    functions=(
        native.Function(
            "nf_codes_add", native.U8, native.U8, native.LONG, native.FLOAT, native.FLOAT, native.FLOAT, native.INT, native.INT,
            native.U8,
        ),
    ),
)  # fmt: skip
CODES_GATE = Operator(
    codes_gate,
    shapes=lambda x, gate, scale, zero, bias, low, high: x.new_empty(x.shape),
    check=_check_gate,
    cpu=_cpu_gate,
    functions=(
        native.Function(
            "nf_codes_gate", native.U8, native.F32, native.LONG, native.LONG, native.LONG, native.FLOAT, native.INT, native.FLOAT,
            native.INT, native.INT, native.U8,
        ),
    ),
)  # fmt: skip
