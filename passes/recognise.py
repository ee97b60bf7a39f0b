"""Normalizations and activations written by hand become the operator: one kernel, which every other pass understands.

    x · rsqrt(mean(x²) + ε)  =  RMSNorm(x),   (x − mean x) / √(var x + ε)  =  LayerNorm(x)

Gains and shifts that follow stay arithmetic on constants, which `expose` reads; GELU and SiLU are read by
`normfuse.passes.patterns.activations`. Sources: Ba et al., Layer Normalization, arXiv 1607.06450, eq. 3; Zhang and Sennrich, Root
Mean Square Layer Normalization, arXiv 1910.07467, eq. 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import isclose, prod

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.operators import is_cast
from normfuse.ir.passes import Change, Pass, under
from normfuse.ir.views import Add, GroupNorm, LayerNorm, Mul, Permute, RmsNorm, Value
from normfuse.passes.affine.broadcast import PASS_INPUTS, UNKNOWN, axes, per_channel
from normfuse.passes.patterns.activations import RULE, Activation, activation_of
from normfuse.passes.patterns.cores import RMS_NORM, Core, Gain, allowed, core_of, is_mean, shape_of_core, sizes_of
from normfuse.passes.patterns.regroup import regrouped

__all__ = ["Recognise"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Recognise(Pass):
    """Normalizations written by hand are LayerNorm, RMSNorm or GroupNorm; activations are GELU or SiLU.

    Attributes:
        channels: also over axis 1 of an image, where the operator takes a permutation before and behind it.
    """

    channels: bool = True
    name = "recognise"

    def sites(self, graph: Graph) -> Iterator[fx.Node]:
        return (n for n in graph if n.op == "call_function" and n.users)  # asked one by one: a rewrite takes readers away

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        with under(RULE):
            activation = activation_of(graph, node)
        if activation is not None:
            return Change(note=activation.name, rule=RULE, do=partial(_activate, graph, node, activation))
        with under(RMS_NORM):
            core = core_of(graph, node)
        if core is None:
            return None
        with under(core.rule):
            found = self._operator(graph, core)
        return None if found is None else Change(found[1], rule=core.rule, at=found[0])

    def _operator(self, graph: Graph, core: Core) -> tuple[fx.Node, Value] | None:
        """The last node that the operator takes in, and what to put in its place; None where it is something else."""
        moment, rank = core.root.moment, Value(node=core.x).rank
        if not core.centred and not moment.variance and not is_mean(graph, core):
            return None
        allowed(core)
        if any(d >= 0 for d in core.dims):
            raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
        if core.centred and core.dims == (-1,) and moment.correction == 0 and not moment.counted and not core.gains:
            grouped = regrouped(graph, core.node, core.x, core.root.eps / moment.scale) if moment.scale == 1 else None
            if grouped is not None:
                return grouped
        if core.node.target is aten.batch_norm.default:
            return None
        trailing = core.dims == tuple(range(-len(core.dims), 0))
        images = core.centred and trailing and rank is not None and rank > 3
        if images and len(core.dims) == rank - 1:  # type: ignore[operator]
            return _over_image(graph, core, 1)
        if images and len(core.dims) == rank - 2 and isinstance(channels := shape_of_core(core)[1], int):  # type: ignore[operator]
            return _over_image(graph, core, channels)
        sizes = sizes_of(graph, core)
        if trailing:
            return _over_features(graph, core, sizes)
        if len(core.dims) > 1 or rank is None:
            raise Refuse(f"normalizes over the axes {list(core.dims)}, which are not the last ones")
        if not self.channels:
            raise Refuse("normalizes over channels; Recognise(channels=False) leaves that as it is")
        return _over_channels(graph, core, sizes[0], rank)


def _activate(graph: Graph, node: fx.Node, activation: Activation) -> None:
    node.replace_all_uses_with(graph.call(activation.target, (activation.x,), node, node, activation.kwargs))


# -- what it becomes ---------------------------------------------------------------------------------------------------


def _epsilon(core: Core, n: int | None) -> tuple[float, float]:
    """1 / √(k m + ε)  =  c / √(m + ε / k),   c = 1 / √k: the operator's ε, and c."""
    moment = core.root.moment
    k = moment.scale if n is None and not moment.counted and not moment.correction else None if n is None else moment.factor(n)
    if k is None:
        raise Refuse("the number of values is not fixed, and its correction depends on it")
    k = 1.0 if isclose(k, 1.0, rel_tol=1e-6) else k
    return core.root.eps / k, k**-0.5


def _norm(core: Core, x: Value, sizes: list[int], eps: float, gamma: Constant | None = None, beta: Constant | None = None) -> Value:
    return LayerNorm(x, sizes, gamma, beta, eps) if core.centred else RmsNorm(x, sizes, gamma, eps)


def _times(value: Value, *gains: Gain) -> Value:
    for c in gains:
        value = value if not isinstance(c, Constant) and c == 1 else Mul(value, c)
    return value


def _over_image(graph: Graph, core: Core, groups: int) -> tuple[fx.Node, Value]:
    """(x − mean x) / √(var x + ε) over all axes behind the channels, or behind the batch:  GroupNorm(x; C) or (x; 1)"""
    moment, shape = core.root.moment, shape_of_core(core)
    sizes = [shape[d] for d in core.dims]
    n = prod(sizes) if all(isinstance(d, int) for d in sizes) else None
    eps, c = _epsilon(core, n if moment.counted or moment.correction else None)
    return core.node, _times(GroupNorm(_read(graph, core), groups, None, None, eps), c, *core.gains)


def _over_features(graph: Graph, core: Core, sizes: list[int]) -> tuple[fx.Node, Value]:
    """γ N(x) + β over the last axes; casts to a wider dtype and back around N are what the operator does inside"""
    eps, c = _epsilon(core, prod(sizes))
    narrow = _cast_back(graph, core)
    if narrow is None:
        x, last, gains = _read(graph, core), core.node, core.gains
    else:
        x, last, gains = Value(node=narrow[0]), narrow[1], (*core.gains, *narrow[2])
    dtype = _dtype(x)
    if narrow is not None and dtype is not None:
        gains = tuple(g.cast(dtype) if isinstance(g, Constant) else g for g in gains)
    if len(sizes) > 1 or not _settled(x):
        return last, _times(_norm(core, x, sizes, eps), c, *gains)
    last, gamma, beta, outside = _gain_and_shift(graph, core, last, gains, dtype)
    return last, _times(_with(core, x, sizes[0], eps, c, gamma, beta), *outside)


def _over_channels(graph: Graph, core: Core, size: int, rank: int) -> tuple[fx.Node, Value]:
    """γ N(x) + β over one inner axis  =  permute, γ N + β over the last axis, permute back"""
    axis = core.dims[0]
    order = [*(i for i in range(rank) if i != rank + axis), rank + axis]
    back = sorted(range(rank), key=order.__getitem__)
    eps, c = _epsilon(core, size)
    x = _read(graph, core)
    last, gamma, beta, outside = _gain_and_shift(graph, core, core.node, core.gains, _dtype(x))
    inside = _with(core, Permute(x, tuple(order), target=aten.permute.default), size, eps, c, gamma, beta)
    return last, _times(Permute(inside, tuple(back), target=aten.permute.default), *outside)


def _with(core: Core, x: Value, size: int, eps: float, c: float, gamma: Constant | None, beta: Constant | None) -> Value:
    """The operator over one axis with its γ and β, which c is multiplied into."""
    if gamma is None:
        return _times(_norm(core, x, [size], eps), c)
    vectors = [None if v is None else per_channel(v if v.numel > 1 else v.reshape(1), _axis(v), size) for v in (gamma, beta)]
    assert vectors[0] is not None
    return _norm(core, x, [size], eps, vectors[0] if c == 1 else vectors[0] * c, vectors[1])


def _axis(c: Constant) -> int:
    return min(axes(c), default=-1)


def _gain_and_shift(
    graph: Graph, core: Core, last: fx.Node, gains: tuple[Gain, ...], dtype: torch.dtype | None
) -> tuple[fx.Node, Constant | None, Constant | None, tuple[Gain, ...]]:
    """The last operator that γ and β take in, if nobody else reads what lies between; and the gains that they do not hold."""
    axis, rank = core.dims[0], Value(node=core.x).rank

    def fits(c: Gain) -> bool:
        varies = isinstance(c, Constant) and not axes(c) - {axis} and c.ndim <= (1 if rank is None else rank)
        return varies and (dtype is None or c.dtype == dtype)  # type: ignore[union-attr]

    gamma: Constant | None = None
    beta: Constant | None = None
    for g in gains:
        if fits(g):
            gamma = g if gamma is None else gamma * g  # type: ignore[assignment]
    outside = tuple(g for g in gains if not fits(g))
    while len(last.users) == 1 and beta is None and not outside:
        user = next(iter(last.users))
        match graph.view(user, 1):
            case Mul(Value(), Constant() as c) | Mul(Constant() as c, Value()) if fits(c):
                gamma = c if gamma is None else gamma * c
            case Add(Value(), Constant() as c) | Add(Constant() as c, Value()) if fits(c) and core.centred and gamma is not None:
                beta = c
            case _:
                break
        last = user
    return last, gamma, beta, outside


def _dtype(x: Value) -> torch.dtype | None:
    val = None if x.node is None else x.node.meta.get("val")
    return val.dtype if isinstance(val, Tensor) else None


def _settled(x: Value) -> bool:
    """Is the dtype of the value that of the weights around it? Where a cast makes it, nobody knows without shapes."""
    return _dtype(x) is not None or x.node is None or not is_cast(x.node)


def _read(graph: Graph, core: Core) -> Value:
    """What is normalized, in the dtype of the quotient."""
    out = _dtype(Value(node=core.node))
    for node in (core.x, core.twin):
        if _dtype(Value(node=node)) in (out, None) or out is None:
            return Value(node=node)
    return Value(node=graph.call(aten.to.dtype, (core.x, out), core.node, core.node))


def _cast_back(graph: Graph, core: Core) -> tuple[fx.Node, fx.Node, list[Constant]] | None:
    """x before a cast, the cast back to its dtype behind the quotient, and the constants that multiply it in between."""
    sources = [n for n in (core.x, core.twin) if is_cast(n) and isinstance(n.args[0], fx.Node)]
    if not sources:
        return None
    source, last = sources[0].args[0], core.node
    assert isinstance(source, fx.Node)
    val = source.meta.get("val")
    if isinstance(val, Tensor) and not val.dtype.is_floating_point:
        return None
    gains: list[Constant] = []
    while len(last.users) == 1:
        user = next(iter(last.users))
        match graph.view(user, 1):
            case Mul(Value(), Constant() as c) | Mul(Constant() as c, Value()):
                gains.append(c)
            case _ if user.args[0] is last and is_cast(user) and _restores(user, source):
                return source, user, gains
            case _:
                return None
        last = user
    return None


def _restores(cast: fx.Node, source: fx.Node) -> bool:
    """Does the cast give the dtype of `source`?"""
    before, after = source.meta.get("val"), cast.meta.get("val")
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.dtype == after.dtype
    wanted = cast.args[1] if len(cast.args) > 1 else None
    if isinstance(wanted, fx.Node) and wanted.target is getattr:
        return wanted.args == (source, "dtype")
    return wanted is source
