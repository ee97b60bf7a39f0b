"""Operators of images that only move values, as codes are moved: channels that are taken or shuffled, pixels that are repeated."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from normfuse.ir.decode import arguments

__all__ = ["Taken", "read_taken", "read_times"]

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int, aten.flatten.using_ints)
_TRANSPOSES = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
_SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)
_NEAREST = (aten.upsample_nearest2d.vec, aten._upsample_nearest_exact2d.vec)


@dataclass(frozen=True)
class Taken:
    """Channels `first` … of x, `count` of them, dealt out between groups (`codes_take`).

    Attributes:
        through: the nodes between x and the result.
    """

    x: fx.Node
    first: int
    count: int
    groups: int
    through: tuple[fx.Node, ...]


def read_taken(node: fx.Node, known: Callable[[object], bool]) -> Taken | None:
    """What a node takes of a known image; None where it is no movement of whole channels that is seen to be one."""
    for read in (_piece, _slice, _shuffle, _shuffled_views):
        taken = read(node)
        if taken is not None and known(taken.x):
            return taken
    return None


def _piece(node: fx.Node) -> Taken | None:
    """A piece of a split."""
    if node.target is not operator.getitem:
        return None
    whole, index = node.args
    if not isinstance(whole, fx.Node) or whole.target not in _SPLITS or not isinstance(index, int):
        return None
    x = whole.args[0]
    if not _of_channels(x, arguments(whole)["dim"]):
        return None
    sizes = [v.shape[1] for v in whole.meta["val"]]
    if not all(isinstance(n, int) for n in sizes):
        return None
    index %= len(sizes)
    return Taken(x, sum(sizes[:index]), sizes[index], 1, (whole, node))


def _slice(node: fx.Node) -> Taken | None:
    """Channels beside each other."""
    if node.target not in (aten.slice.Tensor, aten.narrow.default):
        return None
    given, x = arguments(node), node.args[0]
    start = given["start"] or 0
    if not _of_channels(x, given["dim"]) or given.get("step", 1) != 1 or not isinstance(start, int):
        return None
    channels, count = x.meta["val"].shape[1], node.meta["val"].shape[1]
    if not isinstance(channels, int) or not isinstance(count, int) or not count:
        return None
    return Taken(x, min(start + channels if start < 0 else start, channels) if start >= -channels else 0, count, 1, (node,))


def _shuffle(node: fx.Node) -> Taken | None:
    if node.target is not aten.channel_shuffle.default:
        return None
    x, groups = node.args
    if not _of_channels(x, 1) or not isinstance(groups, int):
        return None
    channels = x.meta["val"].shape[1]
    return Taken(x, 0, channels, groups, (node,)) if isinstance(channels, int) else None


def _shuffled_views(node: fx.Node) -> Taken | None:
    """[b, g · n, h, w] → [b, g, n, h, w] → [b, n, g, h, w] → [b, n · g, h, w]: a shuffle as views."""
    turned = _through_copies(node.args[0]) if node.target in _VIEWS else None
    if turned is None or turned.target not in _TRANSPOSES or sorted(d % 5 for d in _axes(turned)) != [1, 2]:
        return None
    split = turned.args[0]
    if not isinstance(split, fx.Node) or split.target not in _VIEWS or not all(len(n.users) == 1 for n in (split, turned)):
        return None
    x = split.args[0]
    if not isinstance(x, fx.Node):
        return None
    before, parts, after = (tuple(n.meta["val"].shape) for n in (x, split, node))
    if len(parts) != 5 or len(before) != 4 or before != after or not all(isinstance(n, int) for n in parts[1:3]):
        return None
    if (before[0], *before[2:]) != (parts[0], *parts[3:]) or before[1] != parts[1] * parts[2]:
        return None
    return Taken(x, 0, before[1], parts[1], (split, turned, node))


def _through_copies(node: object) -> fx.Node | None:
    while isinstance(node, fx.Node) and node.target in (aten.contiguous.default, aten.clone.default) and len(node.users) == 1:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _axes(node: fx.Node) -> tuple[int, ...]:
    """The two that a transpose of five axes swaps."""
    axes = tuple(d for d in node.args[1:3] if isinstance(d, int))
    return axes if isinstance(node.args[0], fx.Node) and node.args[0].meta["val"].ndim == 5 else ()


def _of_channels(x: object, dim: object) -> TypeGuard[fx.Node]:
    """Is x a batch of images, and `dim` its channels?"""
    val = x.meta.get("val") if isinstance(x, fx.Node) else None
    return isinstance(val, Tensor) and val.ndim == 4 and dim in (1, -3)


def read_times(node: fx.Node) -> tuple[int, int] | None:
    """How often upsampling to the nearest repeats rows and columns; None where that is not seen to be so everywhere."""
    if node.target not in _NEAREST or not isinstance(node.args[0], fx.Node):
        return None
    val, out = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(val, Tensor) or not isinstance(out, Tensor):
        return None
    factors = arguments(node)["scale_factors"]
    found = []
    for axis in (2, 3):
        size, larger = val.shape[axis], out.shape[axis]
        times = factors[axis - 2] if factors else larger / size if isinstance(size, int) and isinstance(larger, int) else 0
        if not isinstance(times, (int, float)) or times < 1 or times != int(times):
            return None
        # powers of two are exact; what others come to is looked at for this size
        if int(times) & (int(times) - 1) and not _repeats(node, size, int(times)):
            return None
        found.append(int(times))
    return found[0], found[1]


def _repeats(node: fx.Node, size: Any, times: int) -> bool:
    if not isinstance(size, int):
        return False
    target: Any = node.target
    row = torch.arange(size, dtype=torch.float32)
    by = [float(times), 1.0] if arguments(node)["scale_factors"] else None
    y = target(row[None, None, :, None], None if by else [size * times, 1], by)
    return torch.equal(y.flatten(), row.repeat_interleave(times))
