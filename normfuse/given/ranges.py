"""Samples whose values lie elsewhere than those of the example: images of 0 … 255 for a model that takes normalized ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["out_of_range"]

_TIMES = 10.0  # larger or smaller than the example


def out_of_range(names: Sequence[str], example: Sequence[Any] | None, batches: Sequence[Sequence[Any]]) -> str:
    """What is unlike the example in the first batches, in words; empty where all is alike.

    Args:
        names: of the inputs.
        example: one value for each of them; None if there is none.
        batches: the same for each batch.
    """
    for i, name in enumerate(names if example is not None else ()):
        like = example[i]  # type: ignore[index]
        if not isinstance(like, Tensor) or not like.is_floating_point() or not like.numel():
            continue
        seen = [b[i] for b in batches[:8] if isinstance(b[i], Tensor) and b[i].numel()]
        most, usual = max((float(v.abs().max()) for v in seen), default=0.0), float(like.abs().max())
        if most > _TIMES * usual > 0 or 0 < most < usual / _TIMES:
            low, high = min(float(v.min()) for v in seen), max(float(v.max()) for v in seen)
            return (
                f"its values of {name} go from {low:.3g} to {high:.3g}, those of the example from {float(like.min()):.3g} to "
                f"{float(like.max()):.3g}: are they prepared as the model wants them?"
            )
    return ""
