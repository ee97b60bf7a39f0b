"""Residual streams that are mean-free already: who writes them, what passes them on, who reads them.

A value x with 1ᵀx = 0 has one coordinate too many: x = E D x, where D (d − 1, d) drops coordinate k and E (d, d − 1)
puts −Σ x̂ back in its place. A stream is *closed* when D can go into everything that writes it and E into everything
that reads it; this file finds that out and changes nothing.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.fakes import on_fakes
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.views import Add, Affine, LayerNorm, Mean, RmsNorm, Sub, Value, affine
from normfuse.ir.weights import Weight
from normfuse.passes.affine.broadcast import PASS_INPUTS, UNKNOWN, axes, is_zero
from normfuse.passes.streams.streams import Place, named, operands, width, writes

__all__ = ["Gain", "Residual", "gain", "reads", "residual", "resized"]

aten = torch.ops.aten

_ROUNDING = 1e-12  # a mean relative to the largest value: float64 rounding of a subtraction of means, far below float32's
_ROUNDED = 1e-2  # a mean that rounding to half precision can leave; above it, nobody has centered the weight

_RESIZED = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default}
_SIZE_OF_OTHERS = {aten.view_as.default, aten.reshape_as.default, aten.expand_as.default}


@dataclass(frozen=True)
class Gain:
    """s N(x) + t: a norm with what is left of its affine behind it.

    Attributes:
        norm: node of the normalization itself.
        last: node of the whole value: the norm, or the sum or affine that follows it.
        s, t: scale and shift along the last axis; None where there is none.
    """

    norm: fx.Node
    last: fx.Node
    s: Constant | None
    t: Constant | None

    @property
    def bare(self) -> bool:
        return self.s is None and self.t is None


@dataclass
class Residual:
    """One closed set of values that could all lose a coordinate.

    Attributes:
        width: number of features d.
        axis: the values, each with its feature axis counted from the end.
        norms: RMSNorms inside, with their gains.
        writers: operators whose weights write it.
        constants: tables and tokens that it reads as they are.
        cuts: values that something else makes mean-free (an explicit centering); a coordinate is dropped behind them.
        through: operators that pass it on.
        readers: operators with weights that read it, by node; the field and dimension of the weight that sees the features.
        problem: why it may not lose a coordinate; None if it may.
    """

    width: int = 0
    axis: dict[fx.Node, int] = field(default_factory=dict)
    norms: list[Gain] = field(default_factory=list)
    writers: list[fx.Node] = field(default_factory=list)
    constants: list[fx.Node] = field(default_factory=list)
    cuts: list[fx.Node] = field(default_factory=list)
    through: list[fx.Node] = field(default_factory=list)
    readers: dict[fx.Node, tuple[str, int]] = field(default_factory=dict)
    problem: Refuse | None = None


def residual(graph: Graph, norm: fx.Node) -> Residual:
    """The values connected to the input of an RMSNorm, upwards to what writes them and downwards to what reads them."""
    found = Residual()
    work: list[Place] = []
    try:
        work.append((_input(graph, norm), -1))
        found.width = width(*work[0]) or 0
        if not found.width:
            raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    except Refuse as refusal:
        found.norms.append(gain(graph, norm))
        found.problem = refusal
        return found
    while work:
        node, axis = work.pop()
        if node in found.axis:
            if found.axis[node] != axis:
                _object(found, Refuse(f"{named(graph, node)} is read along two feature axes", blocker=node))
            continue
        found.axis[node] = axis
        try:
            work += _above(graph, found, node, axis)
            if node.op != "get_attr":  # a table may have readers of its own; the stream takes a copy
                work += _below(graph, found, node, axis)
        except Refuse as refusal:
            _object(found, refusal)
    if found.problem is None:
        try:
            _mean_free(graph, found)
            _resizable(graph, found)
        except Refuse as refusal:
            found.problem = refusal
    return found


def gain(graph: Graph, norm: fx.Node) -> Gain:
    """The norm with its γ, and a β or an affine right behind it if nobody else reads the norm."""
    op = graph.view(norm, 1)
    assert isinstance(op, (RmsNorm, LayerNorm))
    s, t = op.gamma, op.beta if isinstance(op, LayerNorm) else None
    users = list(norm.users)
    if len(users) == 1:
        match graph.view(users[0], 2):
            case Add(Value(node=n), Constant() as c) | Add(Constant() as c, Value(node=n)) if n is norm and _per_feature(c, op):
                return Gain(norm, users[0], s, c if t is None else t + c)
            case Affine(Value(node=n), a, b) if n is norm and axes(a, b) <= {-1}:
                return Gain(norm, users[0], a if s is None else s * a, b if t is None else t * a + b)
    return Gain(norm, norm, s, t)


def reads(op: Value, node: fx.Node, axis: int) -> tuple[str, int] | None:
    """The weight that an operator multiplies the features of `node` with: its field and the dimension of those features."""
    match op:
        case Value(weight=Weight(into=int(into), groups=1) as w, x=Value(node=n)) if axis == w.axis and n is node:  # type: ignore[misc]
            return w.field, into
        case _:
            return None


# -- the walk ----------------------------------------------------------------------------------------------------------


def _above(graph: Graph, found: Residual, node: fx.Node, axis: int) -> list[Place]:
    """What makes the value: the places it comes from, or none at a writer."""
    if graph.constant(node) is not None:
        found.constants.append(node)
        return []
    core = _normalized(graph, node)
    if core is not None and axis == -1:
        return [(_input(graph, core.norm), -1)]  # the norm is entered by the walk down from its input
    places = operands(graph, node, axis)
    if places is not None:
        found.through.append(node)
        return places
    op = graph.view(node, 3)
    if writes(op, axis) is not None:
        found.writers.append(node)
    elif _centered(op, axis):
        found.cuts.append(node)
    else:
        raise Refuse(f"{named(graph, node)} gives it a mean", blocker=node, remedy="run mean_free before compress")
    return []


def _below(graph: Graph, found: Residual, node: fx.Node, axis: int) -> list[Place]:
    """Who reads the value: the places where it goes on."""
    for user in node.users:
        if user not in graph.consumers(node) and not _looks_at_another_size(user, axis, node):
            raise Refuse(f"{named(graph, user)} reads its width", blocker=user)
    places: list[Place] = []
    for reader in graph.readers(node):
        if reader.op == "output":
            raise _returned(graph, node, reader)
        op = graph.view(reader, 3)
        seen = reads(op, node, axis)
        further = _passed_on(graph, reader, node, axis)
        if seen is not None:
            found.readers[reader] = seen
        elif isinstance(op, RmsNorm) and op.x.node is node and axis == -1 and len(op.normalized) == 1:
            core = gain(graph, reader)
            if core not in found.norms:
                found.norms.append(core)
                places.append((core.last, -1))
        elif further is not None:
            places.append((reader, further))
        else:
            raise Refuse(f"{named(graph, reader)} reads all of its features", blocker=reader)
    return places


def _returned(graph: Graph, node: fx.Node, output: fx.Node) -> Refuse:
    norm = _normalized(graph, node)
    if norm is not None:
        return Refuse(f"the result of {graph.path(norm.norm)} is an output of the model, with all its features", blocker=output)
    return Refuse(
        "the stream is an output of the model", blocker=output, remedy="return the normalized value instead of the raw stream"
    )


def _passed_on(graph: Graph, reader: fx.Node, node: fx.Node, axis: int) -> int | None:
    """The feature axis of the reader's result, if it commutes with D on this operand."""
    val = reader.meta.get("val")
    if not isinstance(val, Tensor):
        return None
    for a in range(-1, -val.ndim - 1, -1):
        places = operands(graph, reader, a)
        if places is not None and (node, axis) in places:
            return a
    return None


def _input(graph: Graph, norm: fx.Node) -> fx.Node:
    op = graph.view(norm, 2)
    assert isinstance(op, (RmsNorm, LayerNorm))
    if len(op.normalized) != 1:
        raise Refuse(f"normalizes over {len(op.normalized)} axes at once; only one feature axis can lose a coordinate")
    if op.x.shape is None:
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    assert op.x.node is not None
    return op.x.node


def _normalized(graph: Graph, node: fx.Node) -> Gain | None:
    """The RMSNorm that the value is the whole result of."""
    op = graph.view(node, 2)
    inner = [v.node for v in (getattr(op, "x", None), getattr(op, "y", None)) if isinstance(v, RmsNorm) and v.node is not None]
    for core in (node, *inner):
        if isinstance(graph.view(core, 1), RmsNorm) and (found := gain(graph, core)).last is node:
            return found
    return None


def _centered(op: Value, axis: int) -> bool:
    """x − mean(x), or a LayerNorm without affine."""
    match op:
        case Sub(Value(node=a), Mean(Value(node=b), dim, True, None) as mean) if a is b and mean.rank is not None:
            return [n % mean.rank - mean.rank for n in dim] == [axis]
        case LayerNorm(normalized=shape, gamma=None, beta=None):
            return axis == -1 and len(shape) == 1
        case _:
            return False


def _looks_at_another_size(user: fx.Node, axis: int, node: fx.Node) -> bool:
    rank = len(node.meta["val"].shape)
    if user.target in _SIZE_OF_OTHERS:
        return True  # it goes along if it belongs to the stream; `_resizable` tells
    dim = user.args[1] if user.target is aten.sym_size.int else None
    return isinstance(dim, int) and dim % rank - rank != axis


def _per_feature(c: Constant, op: RmsNorm | LayerNorm) -> bool:
    return axes(c) <= {-1} and c.dtype.is_floating_point and len(op.normalized) == 1 and c.numel in (1, op.normalized[0])


def _object(found: Residual, refusal: Refuse) -> None:
    found.problem = found.problem or refusal


# -- is the mean zero, and can the width change? -----------------------------------------------------------------------


def _mean_free(graph: Graph, found: Residual) -> None:
    """Raise unless every writer's output has a mean of zero, up to rounding in float64."""
    for node in found.constants:
        c = graph.constant(node)
        assert c is not None
        _without_mean(graph, node, c, c.ndim + found.axis[node])
    for node in found.writers:
        op, dims = graph.view(node, 2), writes(graph.view(node, 2), found.axis[node])
        assert dims is not None
        for name, dim in dims.items():
            c = getattr(op, name)
            _without_mean(graph, node, c, dim)
            others = [n for n in graph.readers_of(c) if n not in found.writers]
            if others and name != "b":
                raise Refuse(
                    f"{c.name} is shared with {named(graph, others[0])}, which is outside of the stream", blocker=others[0]
                )
    for node in found.through:
        op = graph.view(node, 2)
        if isinstance(op, Affine) and not is_zero(op.t):
            if found.axis[node] not in axes(op.t):
                raise Refuse(f"{named(graph, node)} gives it a mean", blocker=node, remedy="run mean_free before compress")
            _without_mean(graph, node, op.t, op.t.ndim + found.axis[node])


def _without_mean(graph: Graph, node: fx.Node, c: Constant, dim: int) -> None:
    value = c.value
    mean, most = value.mean(dim).abs().max(), value.abs().max()
    if mean > _ROUNDING * most:
        raise Refuse(
            f"{c.name or named(graph, node)} has a mean over its features ({float(mean / most):.1e} of its largest value)",
            blocker=node,
            remedy="run mean_free and compress in one call, before weights are rounded" if mean < _ROUNDED * most else "",
        )


def _resizable(graph: Graph, found: Residual) -> None:
    """Raise unless every operator that passes the stream on does so with one feature fewer."""
    mode = graph.fake_mode
    if mode is None:
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    narrow: dict[fx.Node, Any] = {}
    through = set(found.through)
    with on_fakes(mode):
        for node in graph:
            source = node.args[0] if node.args else None
            whole = isinstance(source, fx.Node) and node.target is not operator.getitem and source in found.axis
            if node not in found.axis and not (whole and any(u in found.axis and u.target is operator.getitem for u in node.users)):
                continue
            val, axis = node.meta["val"], found.axis.get(node, -1)
            if node in found.axis and (node not in through or node.target is affine):
                shape = [d - 1 if i == val.ndim + axis else d for i, d in enumerate(val.shape)]
                narrow[node] = torch.empty(shape, dtype=val.dtype, device=val.device)
                continue
            args, kwargs = fx.node.map_arg(
                (resized(node, axis, found.width), node.kwargs), lambda n: narrow[n] if n in narrow else n.meta["val"]
            )
            try:
                narrow[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            except RuntimeError as e:
                raise Refuse(f"{named(graph, node)} has the width {found.width} in its arguments", blocker=node) from e
            expected = [d - 1 if i == val.ndim + axis else d for i, d in enumerate(val.shape)] if node in found.axis else None
            if expected is not None and [str(d) for d in narrow[node].shape] != [str(d) for d in expected]:
                raise Refuse(f"{named(graph, node)} has the width {found.width} in its arguments", blocker=node)


def resized(node: fx.Node, axis: int, d: int) -> tuple[Any, ...]:
    """The arguments of a movement with its literal width d replaced by d − 1."""
    val = node.meta["val"]
    sizes: list[Any]
    if node.target in _RESIZED and len(node.args) > 1 and isinstance(node.args[1], (list, tuple)):
        sizes = list(node.args[1])
        sizes[axis] = d - 1 if sizes[axis] == d else sizes[axis]
        return (node.args[0], sizes, *node.args[2:])
    if node.target is aten.unflatten.int:
        x, dim, given = node.args
        assert isinstance(dim, int)
        assert isinstance(given, (list, tuple))
        place = val.ndim + axis - dim % (val.ndim - len(given) + 1)
        return (x, dim, [d - 1 if i == place and n == d else n for i, n in enumerate(given)])
    return node.args
