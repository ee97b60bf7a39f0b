"""A norm before a bias-free product that is normalized again does nothing but lend its ε.

    RMSNorm₂(W RMSNorm₁(x)) = RMSNorm₂(ρ W x) ≈ RMSNorm₂(W x),   ρ = 1 / √(mean x² + ε₁), one number a token

Exact for ε₂ = 0. Else the relative error is at most ½ |1 − ρ²| ε₂ / (ρ² (M + ε₂)) with M = mean (W x)², so the values must
not be tiny. Source: Graef et al., FlashNorm, arXiv 2407.09577, section on norms with a product between them.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Change, Pass
from normfuse.ir.views import (
    Identity,
    LayerNorm,
    LeakyRelu,
    MatMul,
    Movement,
    Mul,
    Permute,
    Relu,
    Reshape,
    RmsNorm,
    Value,
)  # fmt: skip
from normfuse.ir.weights import Weight
from normfuse.passes.affine.broadcast import PASS_INPUTS, UNKNOWN, hint, replayed
from normfuse.passes.streams.streams import named

__all__ = ["Cancel"]

RULE = "norm_before_norm_cancels"


class Cancel(Pass):
    """RMSNorm₂(W RMSNorm₁(x)) ≈ RMSNorm₂(W x): a norm all of whose readers are normalized again is dropped.

    Not an identity: ε of the second norm weighs differently. The norm must have no γ of its own any more (`affine` or
    `weightless` before it), every product on the way no bias, and every way must end in an RMSNorm or a LayerNorm of each
    token by itself, over all features or a head's.
    """

    name = "cancel"
    rule = RULE
    changes = "drops norms whose result is normalized again, so that the ε of the norm behind them weighs differently"

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        op = graph.view(node, 2)
        behind = _renormalized(graph, node, op) if isinstance(op, RmsNorm) else []
        if not isinstance(op, RmsNorm) or not behind:
            return None
        paths = ", ".join(dict.fromkeys(graph.path(n) for n in behind))
        note = f"normalized again by {paths}; relative error about ε / mean square"

        def drop() -> None:
            assert op.x.node is not None
            node.replace_all_uses_with(op.x.node)
            graph.fx.erase_node(node)  # a norm that nobody reads would count as a reader

        return Change(note=note, do=drop)


def _renormalized(graph: Graph, norm: fx.Node, op: RmsNorm) -> list[fx.Node]:
    """The norms that normalize what is read of `norm` again; none if nothing of it is.

    Raises:
        Refuse: some of what is read of it is normalized again, and some is not.
    """
    shape = op.x.shape
    if shape is None:
        return []
    again: list[fx.Node] = []
    blocked: Refuse | None = None
    sizes = [hint(d) for d in shape]
    tokens = torch.arange(torch.Size(sizes[:-1]).numel()).reshape([*sizes[:-1], 1]).expand(sizes)
    work = [(norm, tokens)]
    while work:
        at, rows = work.pop()
        for reader in graph.readers(at):
            try:
                further = _scale_behind(graph, reader, at, rows)
            except Refuse as refusal:
                blocked = blocked or refusal
                continue
            if further is None:
                again.append(reader)
            else:
                work.append((reader, further))
    if not again or all(n.all_input_nodes[0] is norm for n in again):
        return []  # nothing between the two norms is a product: another pass's business
    if len(op.normalized) != 1:
        raise Refuse(f"normalizes over {len(op.normalized)} axes at once")
    if op.gamma is not None:
        raise Refuse("its γ is not in the weights that read it", remedy="run weightless before cancel")
    if blocked is not None:
        raise blocked
    return again


def _scale_behind(graph: Graph, reader: fx.Node, at: fx.Node, rows: Tensor) -> Tensor | None:
    """Which token's scale ρ each element of the reader's result carries; None if the reader takes ρ away again."""
    op = graph.view(reader, 2)
    match op:
        case RmsNorm(normalized=normalized) | LayerNorm(normalized=normalized):
            flat = rows.flatten(-len(normalized))
            if not torch.equal(flat, flat[..., :1].expand(flat.shape)):
                raise Refuse(f"{named(graph, reader)} normalizes several tokens together", blocker=reader)
            return None
        case (
            Identity()
            | Relu()
            | LeakyRelu()
            | Mul(Value(), Constant() | float() | int())
            | Mul(Constant() | float() | int(), Value())
        ):
            return _same_shape(op, rows)
        case Permute(Value()) | Reshape(Value()) | Movement(Value()):
            return replayed(op, rows)
        case Value(weight=Weight(linear=True, bias=Constant())):
            raise Refuse(f"{named(graph, reader)} has a bias, which is not scaled along", blocker=reader)
        case Value(weight=Weight(linear=True)) | MatMul(Value(), Constant()) if torch.equal(rows, rows[..., :1].expand(rows.shape)):
            return _same_shape(op, rows[..., :1])
        case _:
            raise Refuse(f"{named(graph, reader)} reads it, and what it gives is not normalized again", blocker=reader)


def _same_shape(op: Value, rows: Tensor) -> Tensor:
    if op.shape is None:
        raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
    return rows.expand([hint(d) for d in op.shape])
