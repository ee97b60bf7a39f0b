"""Integer tensors that depend on nothing but their indices: positions, comparisons of positions, and what follows.

    arange(S)[None, None, None, :] <= arange(L)[None, None, :, None]      is      i_2 − i_3 ≥ 0

A value is an affine form in its indices, or the statement that one is not negative. What is neither is unknown. Nothing is
evaluated on an example: a result holds for every size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Affine", "AtLeastZero", "Indexed", "index_values"]


@dataclass(frozen=True)
class Affine:
    """sum over k of coefficients[k] · i_k + constant; a truth value is the constant 0 or 1."""

    coefficients: tuple[int, ...]
    constant: int

    @property
    def fixed(self) -> bool:
        """The same everywhere."""
        return not any(self.coefficients)

    def at_rank(self, rank: int) -> Affine:
        """With leading axes, as broadcasting adds them."""
        return Affine((0,) * (rank - len(self.coefficients)) + self.coefficients, self.constant)


@dataclass(frozen=True)
class AtLeastZero:
    """The truth value form ≥ 0."""

    form: Affine


Indexed = Affine | AtLeastZero


def index_values(graph: fx.Graph, constants: Callable[[str], Any]) -> dict[fx.Node, Indexed]:
    """The nodes of `graph` that depend on their indices alone.

    Args:
        graph: ATen calls.
        constants: the tensor behind the name of a placeholder or attribute, None for an input of the user.
    """
    known: dict[fx.Node, Indexed] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            tensor = constants(node.name if node.op == "placeholder" else str(node.target))
            if isinstance(tensor, Tensor) and tensor.ndim == 0 and not tensor.is_floating_point() and not tensor.is_complex():
                known[node] = Affine((), int(tensor))
        elif node.op == "call_function":
            rule = _RULES.get(node.target)
            if rule is not None and (value := rule(node, known)) is not None:
                known[node] = _decided(value)
    return known


def _decided(value: Indexed) -> Indexed:
    """A statement that holds for all indices, or for none, as a constant: indices are never negative."""
    if isinstance(value, AtLeastZero):
        rank = (0,) * len(value.form.coefficients)
        if value.form.constant >= 0 and all(c >= 0 for c in value.form.coefficients):
            return Affine(rank, 1)
        if value.form.constant < 0 and all(c <= 0 for c in value.form.coefficients):
            return Affine(rank, 0)
    return value


def _rank(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, Tensor) else None


def _arguments(node: fx.Node, *defaults: Any) -> list[Any]:
    """Positional arguments, those left out by their defaults."""
    return [*node.args, *defaults[len(node.args) :]]


def _affine(arg: Any, known: dict[fx.Node, Indexed]) -> Affine | None:
    """An operand as an affine form: a known node or an integer."""
    if isinstance(arg, bool) or (isinstance(arg, int) and not isinstance(arg, torch.SymInt)):
        return Affine((), int(arg))
    found = known.get(arg) if isinstance(arg, fx.Node) else None
    return found if isinstance(found, Affine) else None


def _arange(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
    start, step = {1: (0, 1), 2: (node.args[0], 1), 3: (node.args[0], node.args[-1])}[len(node.args)]
    value = node.meta.get("val")
    if not isinstance(start, int) or not isinstance(step, int) or not isinstance(value, Tensor) or value.is_floating_point():
        return None
    return Affine((step,), start)


def _filled(constant: int) -> Callable[[fx.Node, dict[fx.Node, Indexed]], Indexed | None]:
    def rule(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
        value = node.meta.get("val")
        return None if not isinstance(value, Tensor) or value.is_floating_point() else Affine((0,) * value.ndim, constant)

    return rule


def _full(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
    fill = node.args[-1]
    return _filled(int(fill))(node, known) if isinstance(fill, (bool, int)) else None


def _same(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
    """Casts and copies; to bool only what is a truth value already."""
    found = known.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    value = node.meta.get("val")
    if found is None or not isinstance(value, Tensor) or value.is_floating_point():
        return None
    if value.dtype == torch.bool and isinstance(found, Affine):
        return Affine(found.coefficients, int(found.constant != 0)) if found.fixed else None
    # a statement as a number is no affine form, and a narrow integer may overflow
    return found if value.dtype in (torch.bool, torch.int64) and (isinstance(found, Affine) or value.dtype == torch.bool) else None


def _reindexed(change: Callable[[fx.Node, Affine], Affine | None]) -> Callable[[fx.Node, dict[fx.Node, Indexed]], Indexed | None]:
    """A rule that changes indices, for both kinds of value."""

    def rule(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
        found = known.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if found is None:
            return None
        form = change(node, found.form if isinstance(found, AtLeastZero) else found)
        if form is None:
            return None
        return AtLeastZero(form) if isinstance(found, AtLeastZero) else form

    return rule


def _unsqueeze(node: fx.Node, form: Affine) -> Affine | None:
    rank = len(form.coefficients) + 1
    axis = int(node.args[1]) % rank  # type: ignore[arg-type]
    return Affine((*form.coefficients[:axis], 0, *form.coefficients[axis:]), form.constant)


def _expand(node: fx.Node, form: Affine) -> Affine | None:
    source, rank = node.args[0], _rank(node)
    if not isinstance(source, fx.Node) or rank is None:
        return None
    # an axis of size 1 has no index but 0, whatever its coefficient says
    sizes = source.meta["val"].shape
    kept = tuple(0 if isinstance(n, int) and n == 1 else c for c, n in zip(form.coefficients, sizes, strict=True))
    return Affine(kept, form.constant).at_rank(rank)


def _slice(node: fx.Node, form: Affine) -> Affine | None:
    _, axis, start, _, step = _arguments(node, None, 0, None, None, 1)
    if not isinstance(axis, int) or not (start is None or isinstance(start, int)) or not isinstance(step, int):
        return None
    axis %= len(form.coefficients)
    c = form.coefficients[axis]
    if c and (start or 0) < 0:
        return None  # counted from an end that is not known
    return Affine((*form.coefficients[:axis], c * step, *form.coefficients[axis + 1 :]), form.constant + c * (start or 0))


def _select(node: fx.Node, form: Affine) -> Affine | None:
    axis, index = node.args[1], node.args[2]
    if not isinstance(axis, int) or not isinstance(index, int):
        return None
    axis %= len(form.coefficients)
    c = form.coefficients[axis]
    if c and index < 0:
        return None
    return Affine((*form.coefficients[:axis], *form.coefficients[axis + 1 :]), form.constant + c * index)


def _linear(sign: int) -> Callable[[fx.Node, dict[fx.Node, Indexed]], Indexed | None]:
    """a + sign · b"""

    def rule(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
        a, b = (_affine(x, known) for x in node.args[:2])
        if a is None or b is None or node.kwargs.get("alpha", 1) != 1 or _is_bool(node):
            return None
        return _combined(a, b, sign)

    return rule


def _is_bool(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (value.dtype == torch.bool or value.is_floating_point())


def _combined(a: Affine, b: Affine, sign: int) -> Affine:
    rank = max(len(a.coefficients), len(b.coefficients))
    a, b = a.at_rank(rank), b.at_rank(rank)
    return Affine(tuple(x + sign * y for x, y in zip(a.coefficients, b.coefficients, strict=True)), a.constant + sign * b.constant)


def _ordered(sign: int, strict: bool) -> Callable[[fx.Node, dict[fx.Node, Indexed]], Indexed | None]:
    """sign · (a − b) ≥ 0, or > 0"""

    def rule(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
        a, b = (_affine(x, known) for x in node.args[:2])
        if a is None or b is None:
            return None
        gap = _combined(a, b, -1)
        return AtLeastZero(Affine(tuple(sign * c for c in gap.coefficients), sign * gap.constant - int(strict)))

    return rule


def _equal(wanted: bool) -> Callable[[fx.Node, dict[fx.Node, Indexed]], Indexed | None]:
    def rule(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
        a, b = (_affine(x, known) for x in node.args[:2])
        if a is None or b is None:
            return None
        gap = _combined(a, b, -1)
        return Affine(gap.coefficients, int((gap.constant == 0) == wanted)) if gap.fixed else None

    return rule


def _and(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
    rank, value = _rank(node), node.meta.get("val")
    if rank is None or value is None or value.dtype != torch.bool:
        return None
    a, b = (known.get(x) if isinstance(x, fx.Node) else None for x in node.args[:2])
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Affine) and one.fixed:
            if not one.constant:
                return Affine((0,) * rank, 0)
            if isinstance(other, AtLeastZero):
                return AtLeastZero(other.form.at_rank(rank))
            return None if other is None else other.at_rank(rank)
    return None


def _not(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
    found = known.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    value = node.meta.get("val")
    if found is None or value is None or value.dtype != torch.bool:
        return None
    if isinstance(found, AtLeastZero):
        return AtLeastZero(Affine(tuple(-c for c in found.form.coefficients), -found.form.constant - 1))
    return Affine(found.coefficients, int(not found.constant)) if found.fixed else None


def _cumsum(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
    """Of a constant c: c · (i + 1)."""
    found, axis = known.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None, node.args[1]
    if not isinstance(found, Affine) or not found.fixed or not isinstance(axis, int) or not found.coefficients:
        return None
    axis %= len(found.coefficients)
    return Affine(tuple(found.constant if i == axis else 0 for i in range(len(found.coefficients))), found.constant)


def _diff(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
    """x[i] − x[i − 1] along an axis: its coefficient, also at the seam where one value was put in front."""
    source, n, axis, before, after = _arguments(node, None, 1, -1, None, None)
    form = _affine(source, known)
    if form is None or n != 1 or not isinstance(axis, int) or after is not None or not form.coefficients:
        return None
    axis %= len(form.coefficients)
    step = form.coefficients[axis]
    if before is not None:
        first = _affine(before, known)
        if first is None or not isinstance(before, fx.Node) or before.meta["val"].shape[axis] != 1:
            return None
        gap = _combined(form, first, -1)
        if any(c for i, c in enumerate(gap.coefficients) if i != axis) or gap.constant != step:
            return None
    return Affine((0,) * len(form.coefficients), step)


def _index(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
    """x[i, j]: the form of x with the forms of i and j in the place of its indices."""
    source, indices, rank = node.args[0], node.args[1], _rank(node)
    found = known.get(source) if isinstance(source, fx.Node) else None
    if found is None or rank is None or not isinstance(indices, (list, tuple)):
        return None
    form = found.form if isinstance(found, AtLeastZero) else found
    if form.fixed:
        out = Affine((0,) * rank, form.constant)
    else:
        if len(indices) != len(form.coefficients):
            return None
        out = Affine((0,) * rank, form.constant)
        for c, index in zip(form.coefficients, indices, strict=True):
            if not c:
                continue
            at = _affine(index, known)
            if at is None or at.constant < 0 or any(k < 0 for k in at.coefficients):
                return None  # an index that may be negative counts from the end
            out = _combined(out, Affine(tuple(c * k for k in at.coefficients), c * at.constant), 1)
    return AtLeastZero(out) if isinstance(found, AtLeastZero) else out


def _cat(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
    """Of equal constants."""
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)):
        return None
    found = [_affine(p, known) for p in parts]
    first = found[0]
    return first if first is not None and first.fixed and all(f == first for f in found) else None


def _pad(node: fx.Node, known: dict[fx.Node, Indexed]) -> Indexed | None:
    """Of a constant, with the same constant."""
    found = _affine(node.args[0], known)
    fill = node.args[2] if len(node.args) > 2 else 0
    return found if found is not None and found.fixed and fill == found.constant else None


_aten = torch.ops.aten
_RULES: dict[Any, Callable[[fx.Node, dict[fx.Node, Indexed]], Indexed | None]] = {
    **dict.fromkeys((_aten.arange.default, _aten.arange.start, _aten.arange.start_step), _arange),
    **dict.fromkeys((_aten.new_ones.default, _aten.ones.default, _aten.ones_like.default), _filled(1)),
    **dict.fromkeys((_aten.new_zeros.default, _aten.zeros.default, _aten.zeros_like.default), _filled(0)),
    **dict.fromkeys((_aten.full.default, _aten.new_full.default, _aten.full_like.default), _full),
    **dict.fromkeys(
        (
            _aten.to.dtype,
            _aten.to.device,
            _aten.to.dtype_layout,
            _aten._to_copy.default,
            _aten.clone.default,
            _aten.contiguous.default,
            _aten.alias.default,
            _aten.detach.default,
            _aten.lift_fresh_copy.default,
        ),
        _same,
    ),
    _aten.unsqueeze.default: _reindexed(_unsqueeze),
    _aten.expand.default: _reindexed(_expand),
    _aten.slice.Tensor: _reindexed(_slice),
    _aten.select.int: _reindexed(_select),
    **dict.fromkeys((_aten.add.Tensor, _aten.add.Scalar), _linear(1)),
    **dict.fromkeys((_aten.sub.Tensor, _aten.sub.Scalar), _linear(-1)),
    **dict.fromkeys((_aten.ge.Scalar, _aten.ge.Tensor), _ordered(1, strict=False)),
    **dict.fromkeys((_aten.gt.Scalar, _aten.gt.Tensor), _ordered(1, strict=True)),
    **dict.fromkeys((_aten.le.Scalar, _aten.le.Tensor), _ordered(-1, strict=False)),
    **dict.fromkeys((_aten.lt.Scalar, _aten.lt.Tensor), _ordered(-1, strict=True)),
    **dict.fromkeys((_aten.eq.Scalar, _aten.eq.Tensor), _equal(True)),
    **dict.fromkeys((_aten.ne.Scalar, _aten.ne.Tensor), _equal(False)),
    **dict.fromkeys((_aten.__and__.Tensor, _aten.bitwise_and.Tensor, _aten.logical_and.default), _and),
    **dict.fromkeys((_aten.bitwise_not.default, _aten.logical_not.default), _not),
    _aten.cumsum.default: _cumsum,
    _aten.diff.default: _diff,
    _aten.index.Tensor: _index,
    _aten.cat.default: _cat,
    **dict.fromkeys((_aten.constant_pad_nd.default, _aten.pad.default), _pad),
}
