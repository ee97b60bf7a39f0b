"""Do two results agree? Structure, dtypes, shapes, memory and values, with a bound that the original's own rounding sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["BOUNDS", "Difference", "aliases", "decibels", "deviation", "form", "tensors"]

#: relative error that is rounding whatever the model, and the floor under it where outputs are nearly zero
BOUNDS = {"float64": 1e-10, "float32": 2e-5, "float16": 2.0**-7, "bfloat16": 2.0**-4}


@dataclass(frozen=True)
class Difference:
    """What does not agree: a kind of failure, and the numbers."""

    kind: str
    detail: str


def tensors(result: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def form(expected: Any, found: Any) -> Difference | None:
    """Structure, values that are no tensors, dtypes and shapes."""
    if type(expected) is not type(found) and not (isinstance(expected, tuple) and isinstance(found, tuple)):
        return Difference("structure", f"{type(expected).__name__} became {type(found).__name__}")
    a, was = pytree.tree_flatten(expected)
    b, now = pytree.tree_flatten(found)
    if str(was) != str(now) or [type(v) for v in a] != [type(v) for v in b]:
        return Difference("structure", f"{was} {[type(v).__name__ for v in a]} became {now} {[type(v).__name__ for v in b]}")
    for x, y in zip(a, b, strict=True):
        if not isinstance(x, Tensor):
            if x != y:
                return Difference("structure", f"{x!r} became {y!r}")
        elif x.dtype != y.dtype:
            return Difference("dtype", f"{x.dtype} became {y.dtype}")
        elif x.shape != y.shape:
            return Difference("shape", f"{list(x.shape)} became {list(y.shape)}")
    return None


def deviation(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest relative error of any output; integers count as 1 where they differ, NaN and Inf in other places as infinite."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.numel() == 0:
            continue
        if a.shape != b.shape:
            return math.inf
        if not a.is_floating_point() and not a.is_complex():
            worst = max(worst, 0.0 if torch.equal(a, b.to(a.dtype)) else 1.0)
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        odd = ~torch.isfinite(a)
        if not torch.equal(odd, ~torch.isfinite(b)) or not torch.equal(torch.isnan(a), torch.isnan(b)):
            return math.inf
        if bool(odd.all()):
            continue
        difference, scale = float((a - b)[~odd].abs().max()), float(a[~odd].abs().max())
        worst = max(worst, difference / (scale + 1e-6))
    return worst


def decibels(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """SQNR over all floating-point outputs."""
    signal = noise = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.is_floating_point():
            keep = torch.isfinite(a) & torch.isfinite(b)
            signal += float(a[keep].double().square().sum())
            noise += float((a[keep].double() - b[keep].double()).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _storage(t: Any) -> int:
    return t.untyped_storage().data_ptr() if isinstance(t, Tensor) and t.numel() else 0


def aliases(module: nn.Module, inputs: Sequence[Any], result: Any) -> list[str]:
    """For each output whose memory it shares: an input, the module's own, an earlier output, or nobody's."""
    places = {_storage(t): "a weight" for t in (*module.parameters(), *module.buffers())}
    places |= {_storage(v): "an input" for v in inputs if isinstance(v, Tensor)}
    found = []
    for t in tensors(result):
        at = _storage(t)
        found.append(places.get(at, "nobody") if at else "nobody")
        places.setdefault(at, "another output")
    return found
