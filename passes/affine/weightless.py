"""A norm without weights: γ and β go into whoever reads it, and its scale ρ may wait until behind the product.

    W (γ ⊙ N(x) + β) + b = (W diag(γ)) N(x) + (W β + b)
    W RMSNorm(x) + b = ρ (W x) + b,   ρ = 1 / √(mean x² + ε), one number a token

Source: Graef et al., FlashNorm, arXiv 2407.09577, sections 2 and 3.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.dtypes import default_eps
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Change, Pass, Rewriting
from normfuse.ir.views import (
    Add,
    Identity,
    LayerNorm,
    Movement,
    Mul,
    Op,
    Permute,
    Reshape,
    RmsNorm,
    Value,
)  # fmt: skip
from normfuse.passes.affine.affine import Plan, commit, downward, into
from normfuse.passes.affine.broadcast import PASS_INPUTS, UNKNOWN
from normfuse.passes.streams.residual import Gain, gain, reads
from normfuse.passes.streams.streams import named, operands

__all__ = ["Weightless", "absorbed", "fold"]

GAIN, DEFERRED = "norm_gain_into_readers", "norm_scale_behind_product"

aten = torch.ops.aten


@dataclass(frozen=True)
class Weightless(Pass):
    """γ and β of every LayerNorm and RMSNorm go into its readers, also where that stores a shared weight twice.

    Args:
        defer: also move the scale of an RMSNorm behind the products that read it. Exact, and off by default: it trades one
            product a token and feature for one a token and output, which pays only in a kernel that fuses both
            (`python -m benchmarks.deferral` measures it on ONNX Runtime).
        clone_tied: give a reader whose weight is shared (a head tied to the embedding) a matrix of its own.
    """

    defer: bool = False
    clone_tied: bool = True
    name = "weightless"

    def rewrite(self, work: Rewriting) -> None:
        graph = work.graph
        for norm in _norms(graph, LayerNorm, RmsNorm):
            work.attempt(GAIN, norm, partial(_without_gain, graph, norm, self.clone_tied))
        for norm in _norms(graph, RmsNorm) if self.defer else ():
            work.attempt(DEFERRED, norm, partial(_deferred, graph, norm))


def _norms(graph: Graph, *kinds: type) -> list[fx.Node]:
    return [n for n in graph if isinstance(graph.view(n, 1), kinds) and n.users]


# -- γ and β -----------------------------------------------------------------------------------------------------------


def absorbed(graph: Graph, g: Gain, *, untie: bool) -> Plan:
    """How the readers of a norm take its γ and β; raises Refuse when one of them cannot."""
    one, zero = (Constant.of(torch.full((1,), v, dtype=torch.float64)).cast(_dtype(g)) for v in (1.0, 0.0))
    return downward(graph, g.last, one if g.s is None else g.s, zero if g.t is None else g.t, untie=untie)


def fold(graph: Graph, g: Gain, plan: Plan) -> fx.Node:
    """Carry out such a plan; the norm that is left, without γ and β."""
    op = graph.view(g.norm, 2)
    bare = RmsNorm(op.x, op.normalized, None, op.eps) if isinstance(op, RmsNorm) else None
    if isinstance(op, LayerNorm):
        bare = dataclasses.replace(op, gamma=None, beta=None, node=None)  # type: ignore[assignment]
    core: fx.Node = graph.emit(bare, g.norm, g.norm)
    commit(graph, g.last, core, plan)
    if g.norm is not g.last and not g.norm.users:
        graph.fx.erase_node(g.norm)
    return core


def _without_gain(graph: Graph, norm: fx.Node, untie: bool) -> Change | None:
    """The norm without γ and β."""
    g = gain(graph, norm)
    if g.bare:
        return None
    plan = absorbed(graph, g, untie=untie)

    def carry_out() -> None:
        fold(graph, g, plan)

    return Change(note=_note(graph, plan), do=carry_out)


def _note(graph: Graph, plan: Plan) -> str:
    twice = 0
    for node, new in plan.items():
        old = graph.view(node, 1)
        if old.weight is None or new.weight is None:
            continue
        before, after = old.weight.value, new.weight.value
        if before is not after and graph.shared(before):
            twice += after.numel * after.dtype.itemsize
    return into(graph, plan) + (f"; {twice} bytes more for weights that are shared" if twice else "")


def _dtype(g: Gain) -> torch.dtype:
    some = g.s if g.s is not None else g.t
    assert some is not None
    return some.dtype


# -- ρ -----------------------------------------------------------------------------------------------------------------


def _deferred(graph: Graph, norm: fx.Node) -> Change | None:
    """W RMSNorm(x) + b = ρ (W x) + b, for all readers or for none."""
    op = graph.view(norm, 2)
    assert isinstance(op, RmsNorm)
    if not gain(graph, norm).bare:
        return None
    readers, between = _products(graph, norm, op)
    behind = "behind " + ", ".join(dict.fromkeys(graph.path(n) for n in readers))
    return Change(note=behind, do=partial(_defer, graph, norm, readers, between))


def _defer(graph: Graph, norm: fx.Node, readers: list[fx.Node], between: list[fx.Node]) -> None:
    op = graph.view(norm, 2)
    assert isinstance(op, RmsNorm)
    source = op.x.node
    assert source is not None
    norm.replace_all_uses_with(source)
    for node in between:
        if node.target is aten.view.default:  # a view demands the layout that the norm gave
            node.target = aten.reshape.default
    scales: dict[fx.Node, fx.Node] = {}
    for reader in readers:
        view = graph.view(reader, 2)
        assert isinstance(view, Op)
        x: fx.Node = view.x.node  # type: ignore[attr-defined]
        if x not in scales:
            scales[x] = _scale(graph, x, op, reader, norm)
        graph.replace(reader, _scaled(view, Value(node=scales[x])))
        graph.fx.erase_node(reader)


def _products(graph: Graph, norm: fx.Node, op: RmsNorm) -> tuple[list[fx.Node], list[fx.Node]]:
    """The products that read the norm, in order, and the movements between."""
    val = norm.meta.get("val")
    if not isinstance(val, Tensor):
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    if len(op.normalized) != 1:
        raise Refuse(f"normalizes over {len(op.normalized)} axes at once; a product sums over one")
    if val.dtype == torch.float16:
        raise Refuse("a product with values that are not normalized may overflow float16")
    readers: list[fx.Node] = []
    between: list[fx.Node] = []
    work = [norm]
    while work:
        node = work.pop()
        for reader in graph.readers(node):
            view = graph.view(reader, 2)
            if reads(view, node, -1) is not None:
                readers.append(reader)
            elif _moves_rows(graph, reader, node):
                between.append(reader)
                work.append(reader)
            else:
                raise Refuse(f"{named(graph, reader)} reads it and is no product with a weight", blocker=reader)
    order = {n: i for i, n in enumerate(graph)}
    return sorted(dict.fromkeys(readers), key=order.__getitem__), sorted(dict.fromkeys(between), key=order.__getitem__)


def _moves_rows(graph: Graph, reader: fx.Node, node: fx.Node) -> bool:
    """Does it move whole feature vectors, whatever is in them? Then it commutes with the norm."""
    if not isinstance(graph.view(reader, 2), (Identity, Permute, Reshape, Movement)):
        return False
    return operands(graph, reader, -1) == [(node, -1)]


def _scale(graph: Graph, x: fx.Node, op: RmsNorm, before: fx.Node, like: fx.Node) -> fx.Node:
    """ρ = 1 / √(mean x² + ε), one number a token"""
    val = x.meta["val"]
    eps = default_eps(val.dtype) if op.eps is None else op.eps
    wide = graph.call(aten.to.dtype, (x, torch.float32), before, like) if val.dtype == torch.bfloat16 else x
    square = graph.call(aten.mul.Tensor, (wide, wide), before, like)
    mean = graph.call(aten.mean.dim, (square, [-1], True), before, like)
    rho = graph.call(aten.rsqrt.default, (graph.call(aten.add.Tensor, (mean, eps), before, like),), before, like)
    return rho if wide is x else graph.call(aten.to.dtype, (rho, val.dtype), before, like)


def _scaled(layer: Op, rho: Value) -> Op:
    """ρ (W x) + b"""
    w = layer.weight
    assert w is not None
    product = Mul(layer.with_weight(w.value), rho)
    return product if w.bias is None else Add(product, w.bias)
