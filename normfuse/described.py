"""Values, dtypes and errors in the words of a message."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["described", "dtype_name", "first_line"]

_LONGEST = 300  # letters of somebody else's message


def described(value: Any) -> str:
    """`float32[2, 8]` for a tensor, the class of anything else."""
    return f"{dtype_name(value.dtype)}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`."""
    return str(dtype).removeprefix("torch.")


def first_line(error: BaseException) -> str:
    """The first line of a message that says something, cut to a readable length; the class of an error without one."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
