"""A norm whose ε dwarfs every variance does not normalize: it is an affine map.

    γ (x − μ) / √(σ² + ε) + β  =  γ / √ε · (x − μ) + β,   relative error σ² / 2ε

Checkpoints whose LayerNorms were removed by fine-tuning are distributed in this form, with ε = 10¹² and γ = 10⁶, so that
stock code loads them. Source: Baroni et al., Transformers Don't Need LayerNorm at Inference Time, arXiv 2507.02559.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Change, Pass, Rewriting, Samples
from normfuse.ir.views import (
    Affine,
    GroupNorm,
    Identity,
    LayerNorm,
    Mean,
    Op,
    Reshape,
    RmsNorm,
    Sub,
    Value,
)  # fmt: skip
from normfuse.ir.weights import Weight
from normfuse.numerics.observe import observe
from normfuse.passes.affine.broadcast import PASS_INPUTS, UNKNOWN, channelwise, is_zero, same_shape
from normfuse.passes.affine.into_producer import bias
from normfuse.passes.affine.shared import holds_back
from normfuse.passes.streams.streams import centered

__all__ = ["HugeEps"]

RULE = "huge_eps_is_affine"

_LOOKED_AT = 1.0  # a smaller ε belongs to a norm that normalizes
_UNSEEN = 1e9  # ε that no variance comes near, where there is no data to measure one


@dataclass(frozen=True, eq=False)
class Norm:
    """γ (x − μ) / √(σ² + ε) + β over `dims`; `centred` is False for RMSNorm, which has no μ."""

    node: fx.Node
    x: Value
    eps: float
    s: Constant
    t: Constant
    dims: tuple[int, ...]
    centred: bool


@dataclass(frozen=True)
class HugeEps(Pass):
    """γ (x − μ) / √(σ² + ε) + β = γ / √ε (x − μ) + β for ε ≫ σ², into the weights that read it.

    Attributes:
        ratio: how many times ε must exceed the largest variance measured on `Run.samples`; without samples, ε must be
            10⁹ at least.
    """

    ratio: float = 1e6
    name = "huge_eps"
    rule = RULE
    changes = "takes a norm whose ε is far above every variance as an affine map"

    def rewrite(self, work: Rewriting) -> None:
        graph = work.graph
        norms = [n for node in graph if (n := work.found(RULE, node, partial(_norm, graph, node))) is not None]
        largest = _measured(graph, norms, work.run.samples)
        for norm in norms:
            work.attempt(RULE, norm.node, partial(self._affine, graph, norm, largest.get(norm.node)))

    def _affine(self, graph: Graph, norm: Norm, variance: float | None) -> Change:
        self._dwarfs(norm, variance)
        return Change(do=partial(_rewritten, graph, norm))

    def _dwarfs(self, norm: Norm, variance: float | None) -> None:
        if variance:
            if not norm.eps >= self.ratio * variance:
                raise Refuse(f"ε = {norm.eps:g} is {norm.eps / variance:.2g} times the variance, less than {self.ratio:g}")
        elif norm.eps < _UNSEEN:
            raise Refuse(f"ε = {norm.eps:g}, and no data to compare it with", remedy=PASS_INPUTS)


def _norm(graph: Graph, node: fx.Node) -> Norm | None:
    op = graph.view(node, 1)
    match op:
        case LayerNorm(x, shape, gamma, beta, eps) if eps >= _LOOKED_AT:
            return Norm(node, x, eps, *_gains(graph, gamma, beta, eps), tuple(range(-len(shape), 0)), True)
        case RmsNorm(x, shape, gamma, float() | int() as eps) if eps >= _LOOKED_AT:
            return Norm(node, x, eps, *_gains(graph, gamma, None, eps), tuple(range(-len(shape), 0)), False)
        case GroupNorm(x, groups, gamma, beta, eps) if eps >= _LOOKED_AT:
            if x.rank is None:
                raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
            if groups != 1:
                raise Refuse(f"the means of {groups} groups would cost what the norm costs")
            rank = x.rank
            s, t = (channelwise(c, 1, rank) for c in _gains(graph, gamma, beta, eps))
            return Norm(node, x, eps, s, t, tuple(range(1 - rank, 0)), True)
        case _:
            return None


def _gains(graph: Graph, gamma: Constant | None, beta: Constant | None, eps: float) -> tuple[Constant, Constant]:
    """γ / √ε and β."""
    some = gamma if gamma is not None else beta
    like = next((c.dtype for c in graph.constants.values() if c.dtype.is_floating_point), torch.get_default_dtype())
    dtype = like if some is None else some.dtype
    one, zero = (Constant.of(torch.tensor([v], dtype=torch.float64)).cast(dtype) for v in (1 / sqrt(eps), 0.0))
    return one if gamma is None else gamma * (1 / sqrt(eps)), zero if beta is None else beta


def _measured(graph: Graph, norms: list[Norm], samples: Samples) -> dict[fx.Node, float]:
    """The largest variance (mean square for RMSNorm) that each norm divides by on the samples."""
    largest: dict[fx.Node, float] = {}
    for key in {(n.dims, n.centred) for n in norms}:
        alike = [n for n in norms if (n.dims, n.centred) == key and n.x.node is not None]
        for values in samples:
            seen = observe(graph, [n.x.node for n in alike if n.x.node is not None], values, reduce=_largest(*key))
            for n in alike:
                assert n.x.node is not None
                largest[n.node] = max(largest.get(n.node, 0.0), float(seen[n.x.node]))
    return largest


def _largest(dims: tuple[int, ...], centred: bool) -> Callable[[Tensor], Tensor]:
    def reduced(x: Tensor) -> Tensor:
        x = x.double()
        spread = x.var(dims, correction=0) if centred else x.square().mean(dims)
        return spread.max() if spread.numel() else spread.new_zeros(())

    return reduced


# -- rewrite -----------------------------------------------------------------------------------------------------------


def _rewritten(graph: Graph, norm: Norm) -> str:
    """W (s P x + t) + b  =  (W s P) x + (W t + b), P = I − 11ᵀ/d, for all readers; else s (x − mean x) + t as it is."""
    assert norm.x.node is not None
    readers = _linear_readers(graph, norm) if norm.dims == (-1,) else None
    if readers is None:
        x = Sub(norm.x, Mean(norm.x, list(norm.dims), True)) if norm.centred else norm.x
        graph.replace(norm.node, Affine(x, norm.s, norm.t))
        return f"ε = {norm.eps:g}; an affine map" + (" of x − mean(x)" if norm.centred else "")
    for reader in readers:
        layer = graph.view(reader, 1)
        assert isinstance(layer, Op)
        graph.replace(reader, _absorbed(layer, norm))
    norm.node.replace_all_uses_with(norm.x.node)
    into = ", ".join(dict.fromkeys(graph.path(n) for n in readers))
    return f"ε = {norm.eps:g}; into {into}"


def _linear_readers(graph: Graph, norm: Norm) -> list[fx.Node] | None:
    """The linear operators that read the norm, through copies and reshapes of tokens; None if anything else does."""
    found: list[fx.Node] = []
    work = [norm.node]
    while work:
        node = work.pop()
        for user in graph.consumers(node):
            op = graph.view(user, 1)
            match op:
                case Identity(x) | Reshape(Value() as x) if same_shape(op, x) or (isinstance(op, Reshape) and _tokens(op, x)):
                    work.append(user)
                case Value(weight=Weight(linear=True) as w) if holds_back(graph, w.value, user) is None:
                    found.append(user)
                case _:
                    return None
    return list(dict.fromkeys(found)) or None


def _tokens(op: Reshape, x: Value) -> bool:
    """Does the reshape leave the feature axis alone?"""
    return bool(op.shape and x.shape) and isinstance(op.shape[-1], int) and op.shape[-1] == x.shape[-1]  # type: ignore[index]


def _absorbed(layer: Op, norm: Norm) -> Op:
    """The layer on what the norm reads: (W s P) x + (W t + b)"""
    w = layer.weight
    assert w is not None
    assert w.into is not None
    scaled = w.value * (norm.s if norm.s.numel == 1 else w.beside(norm.s, w.into))
    shifted = w.bias
    if not is_zero(norm.t):
        one = Constant.of(torch.ones(1, dtype=torch.float64))
        shifted = bias(w, one, w.total(norm.t if norm.t.numel > 1 else norm.t.reshape(1).expand(w.inputs)))
    return layer.with_weight(centered(scaled, w.into) if norm.centred else scaled, shifted)
