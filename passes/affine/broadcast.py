"""Per-channel vectors that broadcast against a value, and how they move with it.

`s` and `t` of an affine are constants that broadcast to the value they apply to, aligned at the last axis like every
broadcast in PyTorch. Axes are therefore counted from the end: -1 is the feature axis of a transformer, -3 the channel
axis of an image. An axis on which nothing varies has size 1, so the shape itself says what an affine depends on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Refuse
from normfuse.ir.views import Movement, Op, Permute, Reshape, Value
from normfuse.passes.patterns.sizes import size_along

__all__ = [
    "axes",
    "channelwise",
    "collapse",
    "fitted",
    "image_axes",
    "is_one",
    "is_zero",
    "keeps_shape",
    "moved",
    "padded_axes",
    "per_channel",
    "pooled_axes",
    "positive",
    "replayed",
    "same_shape",
    "taken_alike",
    "unmoved",
]

UNKNOWN = "shape unknown"
PASS_INPUTS = "pass example_inputs"


def axes(*constants: Constant) -> set[int]:
    """Axes, counted from the end, along which any of the constants varies."""
    return {i - c.ndim for c in constants for i, size in enumerate(c.shape) if size > 1}


def pooled_axes(size: Any) -> set[int]:
    """The trailing axes that a pooling operator with this kernel or output size reduces."""
    return set(range(-(len(size) if isinstance(size, (list, tuple)) else 1), 0))


def padded_axes(pad: Any) -> set[int]:
    """The axes that a padding, two numbers an axis from the last one on, makes longer."""
    return {-1 - i for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1]}


def image_axes(op: Value) -> list[int]:
    """The axes behind the channels, which interpolation mixes.

    Raises:
        Refuse: the rank is unknown.
    """
    if op.rank is None:
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    return list(range(2 - op.rank, 0))


def keeps_shape(c: Constant, x: Value) -> bool:
    """Does c broadcast to x without adding an axis or enlarging one?

    Raises:
        Refuse: the sizes of x are not known.
    """
    if x.rank is None and c.ndim and all(size_along(x, a) is None for a in range(-c.ndim - 3, 1 - c.ndim)):
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    if x.rank is not None and c.ndim > x.rank:
        return False
    sizes = {a: size_along(x, a) for a in axes(c)}
    if None in sizes.values():
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    return all(str(n) == str(c.shape[a]) for a, n in sizes.items())


def is_zero(c: Constant) -> bool:
    """Is every element 0?"""
    return not bool(c.value.any())


def is_one(c: Constant) -> bool:
    """Is every element 1?"""
    return bool((c.value == 1).all())


def positive(c: Constant) -> bool:
    """Is every element above 0?"""
    return bool((c.value > 0).all())


def collapse(c: Constant) -> Constant:
    """The same values with size 1 on every axis along which they do not vary."""
    value = c.value
    for i in range(value.ndim):
        first = value.narrow(i, 0, 1) if value.shape[i] else value
        if value.shape[i] > 1 and (value.stride(i) == 0 or bool((value == first).all())):
            value = first
    return c.holding(value.clone())


def fitted(c: Constant, rank: int) -> Constant:
    """The same values for a value of another rank, where `c` varies along axes only that both have."""
    return c if c.ndim <= rank else c.reshape(*c.shape[c.ndim - rank :])


def channelwise(c: Constant, axis: int, rank: int) -> Constant:
    """A vector (or one number for all of it) laid along `axis` of a value of the given rank."""
    return c.reshape(*[-1 if i == axis % rank else 1 for i in range(rank)])


def per_channel(c: Constant, axis: int, size: int) -> Constant:
    """The vector of `size` values that `c` holds along `axis` (counted from the end), if it varies along no other."""
    if axes(c) - {axis}:
        raise Refuse("the affine varies along more than the channel axis")
    if c.numel not in (1, size):
        raise Refuse(f"the affine varies over {c.numel} values where the operator has {size}")
    return c.reshape(-1) if c.numel == size else c.reshape(1).expand(size)


def hint(size: Any) -> int:
    """A size as a number: itself, or the example's value of a symbolic one."""
    if isinstance(size, int):
        return size
    try:
        return int(size.node.hint)
    except (AttributeError, TypeError) as e:
        raise Refuse("a size is only known at run time") from e


def moved(op: Movement | Permute | Reshape, c: Constant) -> Constant:
    """What `c`, an affine on the operand of a movement, is on its result."""
    if not axes(c):
        return c
    shape, result = op.x.shape, op.shape
    if shape is None or result is None or op.node is None:
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    out = replayed(op, c.value.expand([hint(d) for d in shape]))
    return _static(collapse(c.holding(out)), result)


def unmoved(op: Movement | Permute | Reshape, c: Constant, rest: float) -> Constant:
    """The affine on the operand of a movement that gives `c` on its result; elements that are not moved get `rest`."""
    whole = not isinstance(op, Movement)
    if whole and not axes(c):
        return c.reshape(1)
    shape, result = op.x.shape, op.shape
    if shape is None or result is None:
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    sizes = [hint(d) for d in shape]
    if whole:
        laid = c.value.expand([hint(d) for d in result])
        back = laid.permute(_inverse(op.dims)) if isinstance(op, Permute) else laid.reshape(sizes)
        return _static(collapse(c.holding(back)), shape)
    index = replayed(op, torch.arange(torch.Size(sizes).numel(), dtype=torch.float64).reshape(sizes)).long()
    full = torch.full((torch.Size(sizes).numel(),), rest, dtype=torch.float64)
    full[index] = c.value.expand(index.shape)
    if not torch.equal(full[index], c.value.expand(index.shape)):
        raise Refuse("elements are repeated, with another affine each time")
    return _static(collapse(c.holding(full.reshape(sizes))), shape)


def _inverse(dims: tuple[int, ...]) -> list[int]:
    return sorted(range(len(dims)), key=dims.__getitem__)


def replayed(op: Op, x: Tensor) -> Tensor:
    """The movement of `op` itself, on other data of the same size."""
    assert op.node is not None
    node = op.node.args[0] if isinstance(op, Movement) and op.piece is not None else op.node
    assert isinstance(node, fx.Node)
    literals: Any = fx.node.map_arg((node.args[1:], dict(node.kwargs)), _literal)
    args, kwargs = literals
    # the expanded constant has strides of zero, which a view would object to
    function: Any = torch.ops.aten.reshape.default if node.target is torch.ops.aten.view.default else node.target
    out: Any = function(x, *args, **kwargs)
    moved: Tensor = out[op.piece] if isinstance(op, Movement) and op.piece is not None else out
    return moved


def _literal(node: fx.Node) -> Any:
    val = node.meta.get("val")
    if isinstance(val, Tensor):  # reshape_as: only the shape of the other operand matters
        return torch.empty([hint(d) for d in val.shape])
    if val is None:
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    return hint(val)


def _static(c: Constant, shape: tuple[Any, ...]) -> Constant:
    for axis in axes(c):
        if not isinstance(shape[axis], int):
            raise Refuse("channels are mixed with an axis of varying size")
    return c


def same_shape(a: Value, b: Value) -> bool:
    """Have both values one shape, symbol for symbol?"""
    return a.shape is not None and b.shape is not None and [str(d) for d in a.shape] == [str(d) for d in b.shape]


def taken_alike(op: Value, x: Value, varies: set[int], mixed: frozenset[int]) -> bool:
    """Does every element that is taken from x keep its place along the axes `varies`?"""
    shape, source = op.shape, x.shape
    if shape is None or source is None or varies & mixed:
        return False
    return all(-a <= len(shape) and str(shape[a]) == str(source[a]) for a in varies)
