"""Names of floating dtypes, as people write them."""

from __future__ import annotations

import torch

from normfuse.errors import UsageError, did_you_mean

__all__ = ["DTYPES", "TORCH", "spelled_dtype"]

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
"""Torch's dtype for each name that is used here."""

#: What a graph can compute in.
DTYPES = tuple(TORCH)

_OTHERS = {
    "float32": "fp32", "float": "fp32", "single": "fp32", "f32": "fp32", "float16": "fp16", "half": "fp16", "f16": "fp16",
    "bfloat16": "bf16", "float64": "fp64", "double": "fp64", "f64": "fp64",
}  # fmt: skip


def spelled_dtype(dtype: str | torch.dtype, *, known: tuple[str, ...] = DTYPES) -> str:
    """The name among `known` of a dtype that is spelt in any usual way: `fp16`, `float16`, `half`, `torch.float16`.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    text = str(dtype).lower().removeprefix("torch.")
    name = _OTHERS.get(text, text)
    if name in known:
        return name
    hint = did_you_mean(text, (*known, *(k for k, v in _OTHERS.items() if v in known)))
    full = {v: k for k, v in reversed(_OTHERS.items())}
    raise UsageError(f"unknown dtype {str(dtype)!r}: expected one of {', '.join(f'{k} ({full[k]})' for k in known)}{hint}")
