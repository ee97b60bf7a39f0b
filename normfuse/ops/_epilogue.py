"""From integer sums to floats: scales, bias, activation, residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["activation", "finish"]


def finish(
    acc: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """act(float(acc) · (row_scale · scale) + bias) + residual, computed in `dtype`.

    Args:
        acc: int32 [..., N].
        row_scale: broadcasts to [..., 1].
        scale: [N].
        bias: [N] or None.
        epilogue: a name of `EPILOGUES`.
        residual: of the shape of acc, or None.
    """
    y = acc.to(dtype) * (row_scale.to(dtype) * scale.to(dtype))
    if bias is not None:
        y = y + bias.to(dtype)
    y = activation(y, epilogue)
    return y if residual is None else y + residual.to(dtype)


def activation(y: Tensor, epilogue: str) -> Tensor:
    """The activation of that name; "none" is y itself."""
    match epilogue:
        case "relu":
            return F.relu(y)
        case "gelu":
            return F.gelu(y)
        case "gelu_tanh":
            return F.gelu(y, approximate="tanh")
        case "silu":
            return F.silu(y)
        case _:
            return y
