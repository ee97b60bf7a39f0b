"""What a mask of transformers hides, found out by evaluating it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normfuse.extras import need

__all__ = ["sees_all", "window_of"]

_ROWS = 64  # queries that are looked at together


def window_of(function: Callable[..., Any], use_vmap: bool, length: int) -> int | None:
    """What a mask is, by its values: 0 for causal, the tokens of a window, None for anything else.

    Args:
        function: of positions, as transformers has it.
        use_vmap: it takes one position at a time.
        length: up to which position the model works.
    """
    masking = need("transformers.masking_utils", extra="hf")

    def values(first: int, rows: int) -> Tensor:
        out: Tensor = masking.sdpa_mask(
            batch_size=1, q_length=rows, kv_length=first + rows, q_offset=first, mask_function=function, attention_mask=None,
            allow_is_causal_skip=False, use_vmap=use_vmap,
        )  # fmt: skip
        return out[0, 0].expand(rows, first + rows)

    last = max(length, _ROWS) - 1
    window = int(values(last, 1).sum())
    window = 0 if window == last + 1 else window
    for first in {0, max(window - 32, 0), last // 2, last + 1 - _ROWS}:
        rows = torch.arange(first, first + _ROWS)[:, None]
        at = torch.arange(first + _ROWS)
        wanted = (at <= rows) & ((at > rows - window) if window else torch.ones_like(at, dtype=torch.bool))
        if not torch.equal(values(first, _ROWS), wanted):
            return None
    return window


def sees_all(function: Callable[..., Any], use_vmap: bool) -> bool:
    """A mask hides nothing, by its values; see `window_of`."""
    masking = need("transformers.masking_utils", extra="hf")
    seen: Tensor = masking.sdpa_mask(
        batch_size=1, q_length=_ROWS, kv_length=3 * _ROWS, q_offset=_ROWS, mask_function=function, attention_mask=None,
        allow_is_causal_skip=False, use_vmap=use_vmap,
    )  # fmt: skip
    return bool(seen.all())
