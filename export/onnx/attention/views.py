"""Which elements of which tensor a value shows, seen through ops that only move data.

    reshape(B, N, 3, H, D) . permute(2, 0, 3, 1, 4) . unbind  of a linear's output  =  head h, channel d of q, k or v
                                                                                      at column j·H·D + h·D + d

A dimension is a list of atoms; an atom is a stretch of one axis of the root. Reshape regroups atoms, Transpose reorders
them, Slice, Split and Gather of one index move the offset. Symbolic sizes stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from normfuse.export.onnx.build import Size, const_of, dims, given

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Heads", "View", "heads"]


@dataclass(frozen=True)
class Atom:
    """`size` steps of `stride` elements along `axis` of the root."""

    axis: int
    size: Size
    stride: int


@dataclass(frozen=True)
class View:
    """What a value shows of its root: one group of atoms a dimension, and where it starts on each axis of the root."""

    dims: tuple[tuple[Atom, ...], ...]
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """A value (B, H, L, D) that shows columns of `root` (B, L, C).

    Attributes:
        root: the value with three axes.
        columns: (H, D), the column of `root` that head h shows as channel d.
    """

    root: ir.Value
    columns: np.ndarray[Any, np.dtype[np.int64]]

    @property
    def contiguous(self) -> bool:
        """The columns are one stretch in order."""
        flat = self.columns.reshape(-1)
        return bool(np.array_equal(flat, np.arange(flat[0], flat[0] + flat.size)))


def heads(value: ir.Value) -> Iterator[Heads]:
    """Every tensor (B, L, C) that `value` (B, H, L, D) is a view of, the nearest first."""
    chain: list[tuple[ir.Node, ir.Value]] = []
    root = value
    while True:
        view = _forward(root, chain)
        if view is not None and (found := _as_heads(root, view)) is not None:
            yield found
        node = root.producer()
        if node is None or node.op_type not in _STEPS or node.domain:
            return
        chain.insert(0, (node, root))
        root = given(node)


def _forward(root: ir.Value, chain: list[tuple[ir.Node, ir.Value]]) -> View | None:
    sizes = dims(root)
    if sizes is None or any(s is None or s == 0 for s in sizes):  # of no values no order can be told
        return None
    view: View | None = View(
        tuple((Atom(i, s, 1),) if s != 1 else () for i, s in enumerate(sizes) if s is not None), (0,) * len(sizes)
    )
    for node, output in chain:
        if view is None:
            return None
        view = _STEPS[node.op_type](view, node, output)
    return view


def _as_heads(root: ir.Value, view: View) -> Heads | None:
    sizes = dims(root)
    if sizes is None or len(sizes) != 3 or len(view.dims) != 4 or not isinstance(sizes[2], int):
        return None
    batch, head, length, channel = view.dims
    if view.offset[:2] != (0, 0) or not _whole(batch, 0, sizes[0]) or not _whole(length, 1, sizes[1]):
        return None
    if any(a.axis != 2 or not isinstance(a.size, int) for a in (*head, *channel)):
        return None
    columns = view.offset[2] + np.add.outer(_steps(head), _steps(channel))
    return Heads(root, columns)


def _whole(group: tuple[Atom, ...], axis: int, size: Size | None) -> bool:
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
    return bool(total == size)


def _steps(group: tuple[Atom, ...]) -> np.ndarray[Any, np.dtype[np.int64]]:
    out = np.zeros(1, dtype=np.int64)
    for atom in group:
        out = np.add.outer(out, np.arange(int(atom.size), dtype=np.int64) * atom.stride).reshape(-1)
    return out


def _reshape(view: View, node: ir.Node, output: ir.Value) -> View | None:
    sizes = dims(output)
    if sizes is None:
        return None
    rest = [atom for group in view.dims for atom in group]
    groups: list[tuple[Atom, ...]] = []
    for size in sizes:
        group: list[Atom] = []
        if isinstance(size, int):
            have = 1
            while have < size:
                if not rest or isinstance(rest[0].size, str):
                    return None
                atom = rest.pop(0)
                assert isinstance(atom.size, int)
                want = size // have
                if size % have == 0 and want % atom.size == 0:
                    group.append(atom)
                    have *= atom.size
                elif size % have == 0 and atom.size % want == 0:
                    inner = atom.size // want
                    group.append(Atom(atom.axis, want, atom.stride * inner))
                    rest.insert(0, Atom(atom.axis, inner, atom.stride))
                    have = size
                else:
                    return None
        elif size is None or not rest or rest[0].size != size:
            return None  # a symbolic size must be one atom: what a product was made of is not known
        else:
            group.append(rest.pop(0))
        groups.append(tuple(group))
    return View(tuple(groups), view.offset) if not rest else None


def _transpose(view: View, node: ir.Node, output: ir.Value) -> View | None:
    perm = node.attributes.get("perm")
    order = tuple(perm.value) if perm is not None else tuple(reversed(range(len(view.dims))))
    return View(tuple(view.dims[i] for i in order), view.offset)


def _slice(view: View, node: ir.Node, output: ir.Value) -> View | None:
    starts, ends, axes, steps = (const_of(v) for v in (*node.inputs[1:], None, None)[:4])
    if starts is None or ends is None or (len(node.inputs) > 2 and axes is None) or (len(node.inputs) > 4 and steps is None):
        return None
    if steps is not None and any(int(s) != 1 for s in steps.reshape(-1)):
        return None
    where = axes.reshape(-1) if axes is not None else np.arange(starts.size)
    out: View | None = view
    for start, end, axis in zip(starts.reshape(-1), ends.reshape(-1), where, strict=True):
        if out is not None:
            out = _cut(out, int(axis), int(start), int(end))
    return out


def _cut(view: View, axis: int, start: int, end: int) -> View | None:
    axis %= len(view.dims)
    group = view.dims[axis]
    if any(isinstance(a.size, str) for a in group):
        return view if start == 0 and end >= 2**31 - 1 else None
    size = math.prod(int(a.size) for a in group)
    start, end = (max(0, min(size, i + size if i < 0 else i)) for i in (start, end))
    if (start, end) == (0, size):
        return view
    # part of the outermost atom; all of the atoms inside it
    outer, inner = group[0], math.prod(int(a.size) for a in group[1:])
    if start % inner or end % inner or end <= start:
        return None
    count = (end - start) // inner
    cut = ((Atom(outer.axis, count, outer.stride),) if count > 1 else ()) + group[1:]
    offset = list(view.offset)
    offset[outer.axis] += start // inner * outer.stride
    return View((*view.dims[:axis], cut, *view.dims[axis + 1 :]), tuple(offset))


def _squeeze(view: View, node: ir.Node, output: ir.Value) -> View | None:
    axes = const_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None:
        return None
    drop = {int(a) % len(view.dims) for a in axes.reshape(-1)}
    if any(view.dims[a] for a in drop):
        return None
    return View(tuple(g for i, g in enumerate(view.dims) if i not in drop), view.offset)


def _unsqueeze(view: View, node: ir.Node, output: ir.Value) -> View | None:
    axes = const_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None:
        return None
    rank = len(view.dims) + axes.size
    new = {int(a) % rank for a in axes.reshape(-1)}
    old = iter(view.dims)
    return View(tuple(() if i in new else next(old) for i in range(rank)), view.offset)


def _split(view: View, node: ir.Node, output: ir.Value) -> View | None:
    axis = node.attributes["axis"].value if "axis" in node.attributes else 0
    sizes = const_of(node.inputs[1]) if len(node.inputs) > 1 else None
    index = list(node.outputs).index(output)
    if sizes is None:
        group = view.dims[axis % len(view.dims)]
        if any(isinstance(a.size, str) for a in group):
            return None
        total, n = math.prod(int(a.size) for a in group), len(node.outputs)
        each = -(-total // n)
        return _cut(view, axis, index * each, min(total, (index + 1) * each))
    start = int(sizes.reshape(-1)[:index].sum())
    return _cut(view, axis, start, start + int(sizes.reshape(-1)[index]))


def _gather(view: View, node: ir.Node, output: ir.Value) -> View | None:
    index = const_of(node.inputs[1])
    axis = (node.attributes["axis"].value if "axis" in node.attributes else 0) % len(view.dims)
    if index is None or index.ndim:
        return None
    i = int(index)
    cut = _cut(view, axis, i, i + 1 if i != -1 else 2**31 - 1)
    if cut is None or cut.dims[axis]:
        return None
    return View((*cut.dims[:axis], *cut.dims[axis + 1 :]), cut.offset)


def _identity(view: View, node: ir.Node, output: ir.Value) -> View | None:
    return view


_STEPS = {
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Split": _split,
    "Gather": _gather,
    "Identity": _identity,
}
