"""Outputs that the model's own dtype could not hold on its way, and that the result can."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfuse.numerics.compare import is_float

__all__ = ["in_range"]


def in_range(expected: Sequence[Tensor], found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Tensor]:
    """`expected`, with the value of float64 where the model gave NaN or Inf, the result did not, and float64 does not either.

    A pass that keeps values in the range of a half turns NaN into numbers: of them the model's own dtype says nothing.

    Args:
        expected: outputs of the model in its own dtype.
        found: those of the result.
        exact: those of the model in float64.
    """
    if len(expected) != len(found) or len(expected) != len(exact):
        return list(expected)
    return [_one(a, b, e) for a, b, e in zip(expected, found, exact, strict=True)]


def _one(a: Tensor, b: Tensor, exact: Tensor) -> Tensor:
    if not is_float(a) or a.is_complex() or a.shape != b.shape or a.shape != exact.shape or bool(a.isfinite().all()):
        return a
    lost = ~a.isfinite() & b.isfinite() & exact.isfinite()
    return torch.where(lost, exact.to(a.dtype), a)
