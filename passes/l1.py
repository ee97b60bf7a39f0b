"""The L2 statistic of a trained norm becomes a calibrated L1 statistic: no squares, no square root.

    x̂ = (x − μ) / max(c · mean|x − μ|, √ε),   c = Σ σ / Σ mean|x − μ|  over the tokens of the calibration data

An approximation: σ / mean|x − μ| is 1.25 for a Gaussian token, 1.15 for a uniform one, 1.41 for a Laplacian. One c a norm
is right on average, and what is left is reported as SQNR. The maximum keeps both limits of √(σ² + ε): σ and √ε.
Sources: ShiftQuant and L1 normalization, arXiv 2411.10948; the constant after Wu et al., L1-Norm Batch Normalization (2018)
and Hoffer et al., Norm matters, NeurIPS 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Change, Pass, Rewriting, Samples
from normfuse.ir.views import Add, Div, LayerNorm, Mean, Mul, RmsNorm, Sub, Value
from normfuse.numerics.compare import sqnr
from normfuse.numerics.observe import observe

__all__ = ["L1"]

RULE = "l2_statistic_is_l1"

aten = torch.ops.aten

Norm = LayerNorm | RmsNorm


@dataclass(frozen=True)
class Fit:
    """What the calibration data say about one norm.

    Attributes:
        c: the constant with c · mean|x − μ| ≈ σ.
        sqnr: of the normalized values before γ and β, in dB.
    """

    c: float
    sqnr: float


@dataclass(frozen=True)
class L1(Pass):
    """√(mean (x − μ)²) → c · mean|x − μ| in LayerNorm, √(mean x²) → c · mean|x| in RMSNorm, c from `Run.samples`.

    Args:
        rms: also replace RMSNorms, such as those that `mean_free` makes of LayerNorms.
    """

    name = "l1"
    rule = RULE
    changes = "replaces the standard deviation in norms by a calibrated mean absolute value"
    leaves_affines = False
    writes = "l1_norm"

    rms: bool = True

    def rewrite(self, work: Rewriting) -> None:
        graph = work.graph
        kinds = (LayerNorm, RmsNorm) if self.rms else (LayerNorm,)
        norms = [n for n in graph if isinstance(graph.view(n, 1), kinds)]
        fits = _fits(graph, norms, work.run.samples)
        for norm in norms:
            work.attempt(RULE, norm, partial(_by_absolute_values, graph, norm, fits.get(norm)))


def _by_absolute_values(graph: Graph, norm: fx.Node, found: Fit | None) -> Change:
    fit = _usable(found)
    note = f"c = {fit.c:.4f}, SQNR {fit.sqnr:.1f} dB"
    return Change(note=note, do=partial(_replace, graph, norm, fit.c))


def _usable(fit: Fit | None) -> Fit:
    if fit is None:
        raise Refuse("needs calibration data", remedy="pass example_inputs or calibration=")
    if not math.isfinite(fit.c) or fit.c <= 0:
        raise Refuse("its input does not vary, or is not finite, in the calibration data", remedy="pass other data: calibration=")
    return fit


# -- calibration -------------------------------------------------------------------------------------------------------


def _fits(graph: Graph, norms: list[fx.Node], samples: Samples) -> dict[fx.Node, Fit]:
    """The fit of each norm; what it reads is reduced to two numbers a token as soon as it is there."""
    kinds: dict[tuple[int, bool], list[fx.Node]] = {}
    for norm in norms:
        op = _norm(graph, norm)
        kinds.setdefault((len(op.normalized), isinstance(op, LayerNorm)), []).append(norm)
    found: dict[fx.Node, list[Tensor]] = {n: [] for n in norms}
    for (axes, centered), group in kinds.items():
        inputs = {n: n.all_input_nodes[0] for n in group}
        for values in samples:
            seen = observe(graph, inputs.values(), values, reduce=partial(_moments, axes=axes, centered=centered))
            for norm, source in inputs.items():
                found[norm].append(seen[source])
    return {n: _fit(torch.cat(tokens, dim=1), _eps(_norm(graph, n))) for n, tokens in found.items() if tokens}


def _moments(x: Tensor, axes: int, centered: bool) -> Tensor:
    """√(mean x²) and mean|x| of each token, in float64, of x − mean(x) if centered."""
    x = x.double().flatten(x.ndim - axes).flatten(0, -2)  # (tokens, features)
    if centered:
        x = x - x.mean(-1, keepdim=True)
    return torch.stack([x.square().mean(-1).sqrt(), x.abs().mean(-1)])


def _fit(moments: Tensor, eps: float) -> Fit:
    """c and SQNR: x̂ is x − μ times 1/s with either s, and Σ (x − μ)² = d σ²."""
    sigma, absolute = moments[:, moments.isfinite().all(0)]
    c = float(sigma.sum() / absolute.sum())
    exact, found = (sigma.square() + eps).rsqrt(), (c * absolute).clamp_min(math.sqrt(eps)).reciprocal()
    signal, noise = (float((sigma * v).square().sum()) for v in (exact, exact - found))
    return Fit(c, sqnr(signal, noise))


# -- rewrite -----------------------------------------------------------------------------------------------------------


def _replace(graph: Graph, norm: fx.Node, c: float) -> None:
    """γ x̂ + β; where there is a γ it takes 1/c: γ (x − μ) / max(c m, √ε) = (γ/c) (x − μ) / max(m, √ε/c)"""
    op = _norm(graph, norm)
    dims, floor = list(range(-len(op.normalized), 0)), math.sqrt(_eps(op))
    x: Value = op.x if isinstance(op, RmsNorm) else Sub(op.x, Mean(op.x, dims, True))
    x = Value(node=graph.emit(x, norm))
    size: Value = Mean(Value(node=graph.call(aten.abs.default, (x.node,), norm, norm)), dims, True)
    if op.gamma is None:
        size = Mul(size, c)
    else:
        floor /= c
    divisor = graph.call(aten.clamp_min.default, (graph.emit(size, norm), floor), norm, norm)
    y: Value = Div(x, Value(node=divisor))
    if op.gamma is not None:
        y = Mul(y, op.gamma * (1 / c))
    if isinstance(op, LayerNorm) and op.beta is not None:
        y = Add(y, op.beta)
    graph.replace(norm, y)


def _norm(graph: Graph, node: fx.Node) -> Norm:
    op = graph.view(node, 2)
    assert isinstance(op, (LayerNorm, RmsNorm))
    return op


def _eps(op: Norm) -> float:
    """ε of the norm; RMSNorm without one uses the machine epsilon of its dtype."""
    if op.eps is not None:
        return op.eps
    val = op.node.meta.get("val") if op.node is not None else None
    return torch.finfo(val.dtype if isinstance(val, Tensor) else torch.get_default_dtype()).eps
