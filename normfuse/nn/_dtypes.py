"""Statistics of half-precision values in float32, where the dtype is known.

A model that is traced without example inputs has values of unknown dtype. They stay as they are: a cast to float32 would
take the digits of a float64 model away. Parameters and buffers keep their dtype while they are traced.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["narrowed", "sizes_known", "widened"]

_HALVES = (torch.float16, torch.bfloat16)


def widened(x: Tensor) -> Tensor:
    """x in float32 if it is float16 or bfloat16, else x itself."""
    return x.float() if _known(x) and x.dtype in _HALVES else x


def narrowed(y: Tensor, x: Tensor) -> Tensor:
    """y in the dtype of x."""
    if not _known(x) or (y.dtype == x.dtype if _known(y) else x.dtype not in _HALVES):
        return y
    return y.to(x.dtype)


def sizes_known(x: Tensor) -> bool:
    """Is x a tensor, and no value that is traced without a shape?"""
    return isinstance(x, Tensor)


def _known(x: Tensor) -> bool:
    return isinstance(x.dtype, torch.dtype)
