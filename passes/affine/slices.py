"""A slice of a concatenation that lies in one operand is read from that operand.

    [x | y][a : b]  =  x[a : b]   where x reaches at least to b;   x itself where it is all of x

Class attention joins the class token and the others only to take them apart again; what reads one part then seems to read both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ir.aliases import is_returned
from normfuse.ir.passes import Rewriting
from normfuse.ir.views import Cat, Movement

__all__ = ["RULE", "slice_of_concatenation"]

RULE = "slice_of_concatenation"

aten = torch.ops.aten

# where each operator has its axis, behind the value
_DIMS = {
    **dict.fromkeys((aten.slice.Tensor, aten.narrow.default, aten.select.int, aten.unbind.int), 0),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default), 1),
}
_END = 2**62  # a slice to the end, as torch writes it


@dataclass(frozen=True)
class _Places:
    """Places a : b of an axis; b is None for all to the end. With `one` the axis itself goes."""

    dim: int
    a: int
    b: int | None
    step: int = 1
    one: bool = False


def slice_of_concatenation(work: Rewriting, node: fx.Node) -> fx.Node | None:
    """[x | y][a : b] = x[a : b]: a node that reads one operand only; None where several are read, or sizes do not tell.

    What the model returns stays as it is: the operand may be an input, with whose memory the caller would be left.
    """
    graph = work.graph
    op = graph.view(node, 2)
    if not isinstance(op, Movement) or not isinstance(op.x, Cat) or op.x.node is None or op.x.shape is None or is_returned(node):
        return None
    axis = op.x.dim % len(op.x.shape)
    taken = _places(op, op.x.shape, axis)
    operands: Any = op.x.node.args[0]
    found = None if taken is None else _operand([(n, _size(n, op.x, axis)) for n in operands], taken)
    if taken is None or found is None or not work.permits(RULE, node):
        return None
    x, size, start = found
    a, b = taken.a - start, None if taken.b is None else taken.b - start
    if taken.one:
        return graph.call(aten.select.int, (x, axis, a), node, node)
    if a == 0 and b in (None, size) and taken.step == 1:
        return x
    return graph.call(aten.slice.Tensor, (x, axis, a, _END if b is None else b, taken.step), node, node)


def _size(operand: fx.Node, whole: Cat, axis: int) -> Any:
    """The size of an operand along the axis; None where it is not one of the rank and dtype of the whole."""
    val, of = operand.meta.get("val"), None if whole.node is None else whole.node.meta.get("val")
    if not isinstance(val, Tensor) or not isinstance(of, Tensor) or val.ndim != of.ndim or val.dtype != of.dtype:
        return None
    return val.shape[axis]


def _operand(operands: list[tuple[fx.Node, Any]], taken: _Places) -> tuple[fx.Node, Any, int] | None:
    """The operand that holds all places, its size along the axis, and where it starts."""
    start = 0
    for i, (node, size) in enumerate(operands):
        last = i == len(operands) - 1
        fixed = isinstance(size, int)
        if size is not None and taken.a >= start and (last if taken.b is None else fixed and taken.b <= start + size):
            return node, size, start
        if not fixed or taken.a < start + size:
            return None
        start += size
    return None


def _places(op: Movement, shape: tuple[Any, ...], axis: int) -> _Places | None:
    """The places that an operator takes of that axis, if they are literals and it takes nothing else."""
    if op.target not in _DIMS:
        return None
    whole, rest = shape[axis], dict(enumerate(op.rest)) | dict(op.kwargs)
    if rest.get("dim", rest.get(_DIMS[op.target], 0)) % len(shape) != axis:
        return None
    match op.target, op.piece:
        case aten.slice.Tensor, _:
            a, b, step = (rest.get(i, default) for i, default in ((1, 0), (2, None), (3, 1)))
            return _counted(whole, axis, 0 if a is None else a, b, step)
        case aten.narrow.default, _ if isinstance(rest[1], int) and isinstance(rest[2], int):
            return _counted(whole, axis, rest[1], rest[1] + rest[2] if rest[1] >= 0 else None)
        case (aten.select.int, _):
            return _counted(whole, axis, rest[1], rest[1] + 1 if rest[1] != -1 else None, one=True)
        case aten.unbind.int, int(piece):
            return _counted(whole, axis, piece, piece + 1, one=True)
        case aten.split.Tensor, int(piece) if isinstance(whole, int):
            return _counted(whole, axis, piece * rest[0], (piece + 1) * rest[0])
        case ((aten.split_with_sizes.default | aten.split.sizes), int(piece)):
            start = sum(rest[0][:piece])
            return _counted(whole, axis, start, start + rest[0][piece])
        case aten.chunk.default, int(piece) if isinstance(whole, int):
            size = -(-whole // rest[0])
            return _counted(whole, axis, piece * size, (piece + 1) * size)
        case _:
            return None


def _counted(whole: Any, axis: int, a: Any, b: Any, step: Any = 1, *, one: bool = False) -> _Places | None:
    """Places counted from the front, the end left open where it is the end of the axis."""
    if not all(isinstance(v, int) for v in (a, step, 0 if b is None else b)):
        return None
    b = None if b is not None and (b >= _END or (isinstance(whole, int) and b >= whole)) else b
    if isinstance(whole, int):
        a, b = (a + whole if a < 0 else a), (b + whole if b is not None and b < 0 else b)
    if a < 0 or (b is not None and b <= a):
        return None
    return _Places(axis, a, b, step, one)
