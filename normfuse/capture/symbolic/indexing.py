"""`x[...]` as ATen calls: select, slice, unsqueeze, index."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from normfuse.capture.symbolic.overloads import KindOf

__all__ = ["lower_index"]

aten = torch.ops.aten
Emit = Callable[..., fx.Node]


def lower_index(emit: Emit, x: fx.Node, index: Any, kind: KindOf) -> fx.Node | None:
    """The value of `x[index]` as a chain of ATen calls in the order that torch applies them; None for an index unknown here.

    Behind an ellipsis the dimensions are counted from the end (negative), since the rank is not known.
    """
    if isinstance(index, slice) and index == slice(None):
        return emit(aten.slice.Tensor, x, 0, 0, sys.maxsize)
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(_known(item, kind) for item in items) or sum(item is ... for item in items) > 1:
        return None
    tensors = [i for i, item in enumerate(items) if _is_tensor(item, kind)]
    if tensors and (... in items[: tensors[0]] or tensors != [len(items) - 1]):
        # a mask takes as many dimensions as it has, so what stands behind a tensor has no known place
        return None
    start = x
    for dim, item in _places(items):
        x = _apply(emit, x, dim, item, kind)
    return emit(aten.alias.default, x) if x is start else x


def _is_tensor(item: Any, kind: KindOf) -> bool:
    return isinstance(item, fx.Node) and kind(item) == "tensor"


def _known(item: Any, kind: KindOf) -> bool:
    if isinstance(item, fx.Node):
        return kind(item) in ("number", "tensor")
    if isinstance(item, slice):
        return all(
            v is None or isinstance(v, int) or (isinstance(v, fx.Node) and kind(v) == "number")
            for v in (item.start, item.stop, item.step)
        )
    return item is None or item is ... or (isinstance(item, int) and not isinstance(item, bool))


def _places(items: list[Any]) -> Iterator[tuple[int, Any]]:
    """Each item with the dimension that it acts on once the items before it are done."""
    split = next((i for i, item in enumerate(items) if item is ...), len(items))
    dim = 0
    for item in items[:split]:
        yield dim, item
        dim += item is None or isinstance(item, slice)
    right = items[split + 1 :]
    for i, item in enumerate(right):
        yield -1 - sum(later is not None for later in right[i + 1 :]), item


def _apply(emit: Emit, x: fx.Node, dim: int, item: Any, kind: KindOf) -> fx.Node:
    if item is None:
        return emit(aten.unsqueeze.default, x, dim)
    if _is_tensor(item, kind):
        return emit(aten.index.Tensor, x, [*[None] * dim, item])
    if not isinstance(item, slice):
        return emit(aten.select.int, x, dim, item)
    if item == slice(None):
        return x
    start, stop = 0 if item.start is None else item.start, sys.maxsize if item.stop is None else item.stop
    return emit(aten.slice.Tensor, x, dim, start, stop, *(() if item.step in (None, 1) else (item.step,)))
