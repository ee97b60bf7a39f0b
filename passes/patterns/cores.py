"""The quotient at the heart of a normalization that is written by hand, and what it is the quotient of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isclose, prod
from typing import Any

import torch
from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.operators import is_cast
from normfuse.ir.views import BatchNorm, Div, Mul, Value, shape_of
from normfuse.passes.affine.broadcast import PASS_INPUTS, UNKNOWN
from normfuse.passes.patterns.moments import Moment, Root, centred, number, root, same
from normfuse.passes.patterns.sizes import feature_size

__all__ = ["LAYER_NORM", "RMS_NORM", "Core", "Gain", "allowed", "core_of", "is_mean", "shape_of_core", "sizes_of"]

aten = torch.ops.aten

LAYER_NORM, RMS_NORM = "layer_norm_by_hand", "rms_norm_by_hand"

Gain = Constant | float


@dataclass(frozen=True, eq=False)
class Core:
    """(x − mean x) / √(k var x + ε), or x / √(k mean x² + ε), as it stands in a graph.

    Attributes:
        node: the quotient.
        x: what is normalized, as the numerator reads it.
        twin: the same values as the statistics read them; a cast may lie between both.
        root: the denominator.
        centred: does the numerator remove the mean?
        dims: the axes, counted from the end.
        gains: what the numerator or the reciprocal root was multiplied with before.
    """

    node: fx.Node
    x: fx.Node
    twin: fx.Node
    root: Root
    centred: bool
    dims: tuple[int, ...]
    gains: tuple[Gain, ...] = ()

    @property
    def rule(self) -> str:
        return LAYER_NORM if self.centred or self.root.moment.variance else RMS_NORM

    @property
    def name(self) -> str:
        return "a LayerNorm" if self.rule == LAYER_NORM else "an RMSNorm"


def core_of(graph: Graph, node: fx.Node) -> Core | None:
    """The quotient that ends at a node; None if it is none, or of something else."""
    pairs: tuple[tuple[fx.Node, fx.Node], ...]
    match graph.view(node, 1):
        case Mul(Value(node=fx.Node() as a), Value(node=fx.Node() as b)):
            pairs, power = ((a, b), (b, a)), -0.5
        case Div(Value(node=fx.Node() as a), Value(node=fx.Node() as b)):
            pairs, power = ((a, b),), 0.5
        case BatchNorm(Value(node=fx.Node() as x), None, None, None, None, True, eps=eps):
            # of one image whose channels are rows: each row by its own statistics
            rows = shape_of(x)
            if rows is None or len(rows) != 3 or rows[0] != 1:
                return None
            return Core(node, x, x, Root(Moment(x, (-1,), True), eps, 0.5), True, (-1,))
        case _:
            return None
    for top, bottom in pairs:
        for below, divisor in _factors(graph, bottom):
            found = root(graph, below)
            if found is None or found.power != power:
                continue
            for above, gains in _factors(graph, top):
                core = _matched(graph, node, above, found, (*divisor, *gains))
                if core is not None and (power < 0 or not divisor):
                    return core
    return None


def _factors(graph: Graph, node: fx.Node) -> Iterator[tuple[fx.Node, tuple[Gain, ...]]]:
    """The value itself, and without a constant that it was multiplied with."""
    yield node, ()
    match graph.view(node, 1):
        case Mul(Value(node=fx.Node() as x), Constant() | float() | int() as c) | Mul(
            Constant() | float() | int() as c, Value(node=fx.Node() as x)
        ):
            yield x, (c,)


def _matched(graph: Graph, node: fx.Node, numerator: fx.Node, found: Root, gains: tuple[Gain, ...]) -> Core | None:
    moment = found.moment
    without = centred(graph, numerator)
    source = without if moment.variance else centred(graph, moment.of)
    if without is not None and source is not None:
        z, inner = (moment.of, without[1]) if moment.variance else source
        if same(graph, z, without[0]):
            dims = _negative(z, moment.dims)
            removed = {_negative(z, inner), _negative(z, without[1])}
            return Core(node, without[0], z, found, True, dims, gains) if removed == {dims} else None
    if same(graph, numerator, moment.of):
        return Core(node, numerator, moment.of, found, False, _negative(moment.of, moment.dims), gains)
    return None


def _negative(node: fx.Node, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Axes counted from the end; as they are where nobody knows the rank."""
    rank = Value(node=node).rank
    if rank is None:
        return dims
    return tuple(sorted(d % rank - rank for d in dims))


def is_mean(graph: Graph, core: Core) -> bool:
    """Is the root one of the mean of squares? That of a sum belongs to a vector of length one, unless √d follows."""
    moment = core.root.moment
    if not moment.counted:
        return isclose(moment.scale, 1.0, rel_tol=1e-6)
    if core.root.clamp:
        shape = shape_of(core.x)
        sizes = [shape[d] for d in core.dims] if shape is not None else [None]
        readers = [graph.view(n, 1) for n in core.node.users]
        scales = [number(c) for r in readers if isinstance(r, Mul) for c in (r.x, r.y) if not isinstance(c, Value)]
        fixed = [n for n in sizes if isinstance(n, int)]
        return len(fixed) == len(sizes) and any(c is not None and isclose(c * c, prod(fixed), rel_tol=1e-6) for c in scales)
    if isclose(moment.scale, 1.0, rel_tol=1e-6):
        return False
    k = moment.factor(prod(sizes_of(graph, core)))
    return k is not None and isclose(k, 1.0, rel_tol=1e-6)


def allowed(core: Core) -> None:
    """Refuse a core whose statistics are those of no operator: its root, its epsilon or its clamp."""
    found, moment = core.root, core.root.moment
    deviation = "unbiased standard deviation" if moment.correction else "standard deviation"
    if moment.variance and not core.centred:
        raise Refuse(f"divides by the {deviation} of a value whose mean is not removed; neither a LayerNorm nor an RMSNorm")
    if found.outside:
        what = f"{deviation} with ε outside the root" if moment.correction else "ε outside the root"
        raise Refuse(f"{what}; not {core.name}")
    if found.clamp:
        raise Refuse(f"the root has a least value in place of ε; not {core.name}")


def shape_of_core(core: Core) -> tuple[Any, ...]:
    """The shape of what the core normalizes; refused where it is unknown."""
    shape = shape_of(core.x)
    if shape is None:
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    return shape


def sizes_of(graph: Graph, core: Core) -> list[int]:
    """The sizes of the normalized axes; without shapes, from the weights around."""
    if shape_of(core.x) is None and core.dims == (-1,):
        size = feature_size(graph, core.x) or _size_of_gain(graph, core)
        sizes: list[Any] = [size]
    else:
        sizes = [shape_of_core(core)[d] for d in core.dims]
    if None in sizes:
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    if not all(isinstance(n, int) for n in sizes):
        raise Refuse("normalizes over an axis of varying size")
    return sizes


def _size_of_gain(graph: Graph, core: Core) -> int | None:
    """The length of γ behind the quotient, or before it."""
    found = [c for c in core.gains if isinstance(c, Constant)]
    work = [core.node]
    while work:
        node = work.pop()
        for user in node.users:
            op = graph.view(user, 1)
            if is_cast(user):
                work.append(user)
            elif isinstance(op, Mul):
                found += [c for c in (op.x, op.y) if isinstance(c, Constant)]
    return next((c.numel for c in found if c.ndim == 1 and c.numel > 1), None)
