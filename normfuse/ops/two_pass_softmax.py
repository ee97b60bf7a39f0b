"""`torch.ops.normfuse.two_pass_softmax`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.gpu.run import NAMES, run
from normfuse.gpu.softmax import plan_softmax
from normfuse.ops._shapes import float_dtype
from normfuse.ops.operator import Operator

__all__ = ["TWO_PASS_SOFTMAX", "two_pass_softmax"]


def two_pass_softmax(x: Tensor) -> Tensor:
    """y = exp(x) / Σ exp(x) over the last axis.

    The kernel for CPUs reads the row twice and never looks for its maximum: exponentials are kept as mantissa and exponent; the one
    for GPUs keeps the row in registers, where a maximum costs little. A row of −Inf is NaN, as in PyTorch.

    Args:
        x: [..., d]; float16 and bfloat16 are computed in float32.

    Returns:
        As x.

    Raises:
        UsageError: x has no last axis, or no floats.

    Source: Dukhan and Ablavatski, The two-pass softmax algorithm, 2020.
    """
    dtype = _check(x)
    return torch.softmax(x, -1, dtype=dtype).to(x.dtype).contiguous()


def _check(x: Tensor) -> torch.dtype:
    if not x.ndim:
        raise UsageError("two_pass_softmax: x has no axis; expected at least one")
    return float_dtype("two_pass_softmax", x)


def _cpu(x: Tensor) -> Any:
    if not x.numel():
        return NotImplemented
    rows = x.float().contiguous()
    y = torch.empty_like(rows)
    native.call("nf_two_pass_softmax", rows, rows.numel() // x.shape[-1], x.shape[-1], y)
    return y.to(x.dtype)


def _gpu(x: Tensor) -> Tensor:
    if not x.shape[-1]:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return run(plan_softmax(x.shape[-1], NAMES[x.dtype]), {"x": x.contiguous()})[0]


TWO_PASS_SOFTMAX = Operator(
    two_pass_softmax,
    shapes=lambda x: x.new_empty(x.shape),
    check=_check,
    cpu=_cpu,
    gpu=_gpu,
    functions=(native.Function("nf_two_pass_softmax", native.F32, native.LONG, native.LONG, native.F32),),
)
