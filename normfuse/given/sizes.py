"""Inputs of other sizes: what may vary when a model is used, and whether a captured program may vary as its module does."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

__all__ = ["Arguments", "probes", "resized", "variations"]

log = logging.getLogger(__name__)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""

_TRIED = (1, 2, 3, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 100, 128, 129, 224, 256, 257, 512, 513, 1024)


def variations(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Arguments]:
    """Inputs that differ in what may differ in use: number of images, batch, height and width, length of sequences.

    A model need not take all of them.
    """

    def lists(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: lists(x) for k, x in v.items()}
        if isinstance(v, tuple):
            return tuple(map(lists, v))
        return (v[:-1] if len(v) > 1 else v * 2) if isinstance(v, list) else v

    def every(change: Any) -> Arguments:
        return pytree.tree_map_only(Tensor, change, (args, kwargs))  # type: ignore[no-any-return]

    def batch(x: Tensor) -> Tensor:
        return resized(x, {0: x.shape[0] + 1}) if x.ndim > 1 else x

    def one(x: Tensor) -> Tensor:
        return resized(x, {0: 1}) if x.ndim > 1 and x.shape[0] > 1 else x

    def smaller(x: Tensor) -> Tensor:
        return resized(x, {x.ndim - 2: _fraction(x.shape[-2], 3), x.ndim - 1: _fraction(x.shape[-1], 2)}) if _image(x) else x

    def odd(x: Tensor) -> Tensor:
        return resized(x, {x.ndim - 2: x.shape[-2] + 1, x.ndim - 1: x.shape[-1] + 3}) if _image(x) else x

    def shorter(x: Tensor) -> Tensor:
        text = (x.ndim == 2 and not x.is_floating_point()) or x.ndim == 3
        return resized(x, {1: max(1, x.shape[1] * 3 // 4)}) if text else x

    found = [lists((args, kwargs)), every(batch), every(smaller), every(odd), every(shorter), every(one)]
    return [run for run in found if _shapes(run) != _shapes((args, kwargs))]


def _shapes(run: Arguments) -> list[Any]:
    return [tuple(v.shape) if isinstance(v, Tensor) else None for v in pytree.tree_leaves(run)]


def _image(x: Tensor) -> bool:
    return x.is_floating_point() and x.ndim >= 3


def _fraction(size: int, quarters: int) -> int:
    """That many quarters of a size; a multiple of 32 if the size is one."""
    new = size * quarters // 4
    return max(1, new // 32 * 32 if size % 32 == 0 and new >= 32 else new)


def resized(x: Tensor, sizes: dict[int, int]) -> Tensor:
    """The tensor with other sizes of some dimensions: its own values again, zeros if it has none."""
    for dim, size in sizes.items():
        if x.shape[dim] == 0:
            x = x.new_zeros([size if d == dim else n for d, n in enumerate(x.shape)])
        else:
            x = x.index_select(dim, torch.arange(size, device=x.device) % x.shape[dim])
    return x


def probes(
    program: ExportedProgram, example: tuple[Tensor, ...], linked: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[tuple[Tensor, ...]]:
    """Inputs of sizes at which the program would break a guard of its own: whether its module takes them decides if that matters.

    Args:
        program: captured from a function of `*tensors`.
        example: what it was captured with.
        linked: dimensions (tensor, dimension) that vary, those together that vary alike.
    """
    if not linked:  # nothing varies
        return
    guards = [compile(code, "<guard>", "eval") for code in getattr(program, "_guards_code", None) or ()]
    changes = [[(group, size)] for group in linked for size in _TRIED] + [[(group, size) for group in linked] for size in _TRIED]
    most = 4 * sum(t.numel() for t in example) + (1 << 16)
    broken: set[int] = set()
    for change in changes:
        sizes = [list(t.shape) for t in example]
        for group, size in change:
            for tensor, dim in group:
                sizes[tensor][dim] = size
        if sum(torch.Size(s).numel() for s in sizes) > most:
            continue
        found = _first_broken(guards, sizes)
        if (found is not None and found not in broken) or change[0][1] in (1, 3):
            broken |= set() if found is None else {found}
            yield tuple(resized(t, dict(enumerate(s))) for t, s in zip(example, sizes, strict=True))


def _first_broken(guards: Sequence[Any], sizes: Sequence[Sequence[int]]) -> int | None:
    tensors = tuple(torch.empty(s, device="meta") for s in sizes)
    for i, guard in enumerate(guards):
        try:
            if not eval(guard, {"torch": torch, "L": {"tensors": tensors}}):
                return i
        except Exception as e:  # a guard may read what only torch knows
            log.debug("a guard cannot be evaluated: %s", e)
    return None
