"""Which elements of which tensor a value shows, seen through operators that only move data.

    reshape(B, N, 3, H, D) . permute(2, 0, 3, 1, 4) . unbind  of a linear's output  =  head h, channel d of q, k or v
                                                                                      at column j·H·D + h·D + d

A dimension is a list of atoms; an atom is a stretch of one axis of the root. A reshape regroups atoms, a permutation reorders
them, and what takes a stretch of an axis moves the offset. Symbolic sizes stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from normfuse.ir.decode import arguments
from normfuse.ir.graph import Graph
from normfuse.ir.operators import CASTS, EXPANSIONS
from normfuse.ir.views import Identity, Movement, Op, Permute, Reshape, Value
from normfuse.passes.affine.broadcast import replayed

__all__ = ["Heads", "Size", "heads", "sizes_of"]

Size = int | str
"""A number, or the expression of a symbolic size: comparing symbols would fix them."""


@dataclass(frozen=True)
class _Atom:
    """`size` steps of `stride` elements along `axis` of the root."""

    axis: int
    size: Size
    stride: int


@dataclass(frozen=True)
class _View:
    """What a value shows of its root: one group of atoms a dimension, and where it starts on each axis of the root."""

    dims: tuple[tuple[_Atom, ...], ...]
    offset: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Heads:
    """A value (B, H, L, D) that shows columns of `root` (B, L, C).

    Attributes:
        root: the value with three axes.
        width: number of its columns.
        columns: (H, D), the column of `root` that head h shows as channel d.
    """

    root: fx.Node
    width: int
    columns: Tensor

    @property
    def stretch(self) -> tuple[int, int] | None:
        """The first column and the one behind the last, where they are one stretch in order."""
        flat = self.columns.flatten()
        first = int(flat[0])
        return (first, first + flat.numel()) if torch.equal(flat, torch.arange(first, first + flat.numel())) else None


def sizes_of(node: object) -> tuple[Size, ...] | None:
    """Of a tensor of the graph; None for anything else."""
    val = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(n if isinstance(n, int) else str(n) for n in val.shape) if isinstance(val, Tensor) else None


def heads(graph: Graph, node: fx.Node) -> Iterator[Heads]:
    """Every tensor (B, L, C) that `node` (B, H, L, D) is a view of, the nearest first."""
    chain: list[Op] = []
    root = node
    while True:
        view = _seen(root, chain)
        if view is not None and (found := _as_heads(root, view)) is not None:
            yield found
        op = _step(graph, root)
        if op is None:
            return
        chain.insert(0, op)
        root = _operand(op)


def _step(graph: Graph, node: fx.Node) -> Op | None:
    """The operator that moves data into `node`."""
    op = graph.view(node, 1)
    if isinstance(op, (Identity, Reshape, Permute, Movement)):
        return op if isinstance(op.x, Value) and op.x.node is not None else None
    source = node.args[0] if node.target in CASTS else None
    if not isinstance(source, fx.Node) or source.meta["val"].dtype != node.meta["val"].dtype:
        return None
    return Identity(Value(node=source), node=node)


def _operand(op: Op) -> fx.Node:
    assert isinstance(op, (Identity, Reshape, Permute, Movement))
    assert isinstance(op.x, Value)
    assert op.x.node is not None
    return op.x.node


def _seen(root: fx.Node, chain: list[Op]) -> _View | None:
    sizes = sizes_of(root)
    if sizes is None or 0 in sizes:  # of no values no order can be told
        return None
    view: _View | None = _View(tuple((_Atom(i, s, 1),) if s != 1 else () for i, s in enumerate(sizes)), (0,) * len(sizes))
    for op in chain:
        view = None if view is None else _moved(view, op)
    return view


def _moved(view: _View, op: Op) -> _View | None:
    match op:
        case Identity():
            return view
        case Permute(_, dims):
            return _View(tuple(view.dims[i] for i in dims), view.offset)
        case Reshape():
            return _regrouped(view, sizes_of(op.node))
        case Movement() if op.target in EXPANSIONS:
            return view if sizes_of(op.node) == sizes_of(_operand(op)) else None
        case Movement():
            return _taken(view, op)
    return None


def _as_heads(root: fx.Node, view: _View) -> Heads | None:
    sizes = sizes_of(root)
    if sizes is None or len(sizes) != 3 or len(view.dims) != 4 or not isinstance(sizes[2], int):
        return None
    batch, head, length, channel = view.dims
    if view.offset[:2] != (0, 0) or not _is_whole(batch, 0, sizes[0]) or not _is_whole(length, 1, sizes[1]):
        return None
    if any(a.axis != 2 or not isinstance(a.size, int) for a in (*head, *channel)):
        return None
    return Heads(root, sizes[2], view.offset[2] + _steps(head)[:, None] + _steps(channel))


def _is_whole(group: tuple[_Atom, ...], axis: int, size: Size) -> bool:
    """The group runs through all of `axis` in order."""
    if size == 1:
        return not group
    stride, total = 1, 1
    for atom in reversed(group):
        if atom.axis != axis or atom.stride != stride:
            return False
        if isinstance(atom.size, str):
            return len(group) == 1 and atom.size == size
        stride, total = stride * atom.size, total * atom.size
    return total == size


def _steps(group: tuple[_Atom, ...]) -> Tensor:
    out = torch.zeros(1, dtype=torch.int64)
    for atom in group:
        out = (out[:, None] + torch.arange(int(atom.size)) * atom.stride).flatten()
    return out


def _regrouped(view: _View, sizes: tuple[Size, ...] | None) -> _View | None:
    """The atoms, in order, in groups of these sizes; a symbolic one must be one atom: of what a product is made is not known."""
    if sizes is None:
        return None
    rest = [atom for group in view.dims for atom in group]
    groups: list[tuple[_Atom, ...]] = []
    for size in sizes:
        group = _filled(rest, size) if isinstance(size, int) else _one_atom(rest, size)
        if group is None:
            return None
        groups.append(group)
    return None if rest else _View(tuple(groups), view.offset)


def _one_atom(rest: list[_Atom], size: str) -> tuple[_Atom, ...] | None:
    return (rest.pop(0),) if rest and rest[0].size == size else None


def _filled(rest: list[_Atom], size: int) -> tuple[_Atom, ...] | None:
    """Atoms from the front of `rest`, the last one cut, that have `size` elements together."""
    group: list[_Atom] = []
    have = 1
    while have < size:
        if not rest or isinstance(rest[0].size, str) or size % have:
            return None
        atom, want = rest.pop(0), size // have
        assert isinstance(atom.size, int)
        if want % atom.size == 0:
            group.append(atom)
            have *= atom.size
        elif atom.size % want == 0:
            inner = atom.size // want
            group.append(_Atom(atom.axis, want, atom.stride * inner))
            rest.insert(0, _Atom(atom.axis, inner, atom.stride))
            have = size
        else:
            return None
    return tuple(group)


def _taken(view: _View, op: Movement) -> _View | None:
    """A stretch of one axis, or one place on it: which one, the operator itself says of the numbers 0, 1, 2, …"""
    assert op.node is not None
    source = op.node if op.piece is None else op.node.args[0]
    assert isinstance(source, fx.Node)
    axis, before, after = arguments(source).get("dim"), sizes_of(_operand(op)), sizes_of(op.node)
    if not isinstance(axis, int) or len(source.all_input_nodes) > 1 or before is None or after is None:
        return None
    axis %= len(before)
    n = before[axis]
    if isinstance(n, str):
        return view if before == after else None
    taken = replayed(op, torch.arange(n).reshape([n if i == axis else 1 for i in range(len(before))])).flatten()
    if not taken.numel() or not torch.equal(taken, torch.arange(int(taken[0]), int(taken[0]) + taken.numel())):
        return None
    cut = _cut(view, axis, int(taken[0]), taken.numel())
    if cut is None or len(after) == len(before):
        return cut
    return None if cut.dims[axis] else _View((*cut.dims[:axis], *cut.dims[axis + 1 :]), cut.offset)


def _cut(view: _View, axis: int, start: int, size: int) -> _View | None:
    group = view.dims[axis]
    if size == math.prod(int(a.size) for a in group):
        return view
    # part of the outermost atom; all of the atoms inside it
    outer, inner = group[0], math.prod(int(a.size) for a in group[1:])
    if start % inner or size % inner:
        return None
    count = size // inner
    cut = ((_Atom(outer.axis, count, outer.stride),) if count > 1 else ()) + group[1:]
    offset = list(view.offset)
    offset[outer.axis] += start // inner * outer.stride
    return _View((*view.dims[:axis], cut, *view.dims[axis + 1 :]), tuple(offset))
