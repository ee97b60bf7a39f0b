"""The bias of the keys is invisible to softmax attention.

    softmax(q (k + t)ᵀ) = softmax(q kᵀ + (q tᵀ) 1ᵀ) = softmax(q kᵀ)

for a shift t that all keys share: it adds one number to all scores of a query. Where the keys of a model have a bias of
their own (Whisper leaves it out, most models do not), or where the β of a norm became one, it costs an addition for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.operators import is_cast
from normfuse.ir.passes import Change, Pass
from normfuse.ir.views import (
    Add,
    Affine,
    Div,
    Identity,
    MatMul,
    Movement,
    Mul,
    Op,
    Permute,
    Reshape,
    Sdpa,
    Softmax,
    Value,
)  # fmt: skip
from normfuse.passes.affine.broadcast import PASS_INPUTS, UNKNOWN, axes, is_zero, moved
from normfuse.passes.streams.streams import named, operands

__all__ = ["KeyBias"]

RULE = "key_bias_is_invisible"

aten = torch.ops.aten

_FILLED = -6e4  # a fill value at or below it gives a weight of zero whatever is added to the scores (finfo(float16).min)
_FAR = 24  # operators looked at above a key that is not a plain projection


@dataclass(frozen=True)
class KeyBias(Pass):
    """softmax(q (k + t)ᵀ) = softmax(q kᵀ): the bias of a projection that is read as keys only is dropped.

    Keys that are rotated, normalized, or concatenated with others keep it: then t is not one shift for all of them.
    A fused projection keeps it too, unless its queries and values have none.

    Attributes:
        own: also the biases that the model has itself. By default only those go that a shift was folded into: a model in which
            nothing was folded stays the same bit for bit.
    """

    own: bool = False
    name = "key_bias"
    rule = RULE
    leaves_affines = False

    def sites(self, graph: Graph) -> list[fx.Node]:
        return _projections(graph)

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        op = graph.view(node, 2)
        w = op.weight
        if not isinstance(op, Op) or w is None or w.bias is None or is_zero(w.bias) or not (self.own or w.bias.tensor is None):
            return None
        seen = _keys_only(graph, node, w.bias)
        if seen is None:
            return None
        return Change(op.with_weight(w.value), f"read as keys by {', '.join(dict.fromkeys(seen))}")


def _projections(graph: Graph) -> list[fx.Node]:
    """The products with weights that keys come from, in execution order."""
    found: set[fx.Node] = set()
    for node in graph:
        op = graph.view(node, 2)
        keys = op.k.node if isinstance(op, Sdpa) else op.y.node if isinstance(op, MatMul) and isinstance(op.y, Value) else None
        if keys is None or (isinstance(op, MatMul) and _softmax_hides(graph, node) is not None):
            continue
        work, looked = [keys], 0
        while work and looked < _FAR:
            at, looked = work.pop(), looked + 1
            w = graph.view(at, 1).weight
            if w is not None and w.linear and w.bias_field:
                found.add(at)
            elif at.op == "call_function":
                work += at.all_input_nodes
    return [n for n in graph if n in found]


def _keys_only(graph: Graph, node: fx.Node, bias: Constant) -> list[str] | None:
    """The attentions that read the value as keys, if nobody else sees its bias; None if somebody does.

    Raises:
        Refuse: it is read as keys only, but something between makes its bias visible.
    """
    seen: list[str] = []
    blocked: Refuse | None = None
    work = [(node, bias)]
    while work:
        at, t = work.pop()
        for reader in graph.readers(at):
            try:
                further = _shift_behind(graph, reader, at, t)
            except Refuse as refusal:
                blocked = blocked or refusal
                continue
            if isinstance(further, Constant):
                work += [] if is_zero(further) else [(reader, further)]
            elif further:
                seen.append(graph.path(reader))
            else:
                return None
    if blocked is not None:
        raise blocked
    return seen


def _shift_behind(graph: Graph, reader: fx.Node, at: fx.Node, t: Constant) -> Constant | bool:
    """The shift of the reader's result when `at` is shifted by t; True where softmax hides it, False where others see it."""
    op = graph.view(reader, 2)
    match op:
        case Sdpa(q, k, v) if at in (q.node, k.node, v.node):
            return at is not q.node and at is not v.node and -2 not in axes(t)
        case Identity():
            return t
        case Permute(Value()) | Reshape(Value()) | Movement(Value()):
            return moved(op, t)
        case Mul(Value(), (float() | int()) as c) | Mul((float() | int()) as c, Value()):
            return t * c
        case Div(Value(), (float() | int()) as c):
            return t / c
        case Affine(_, s, _):
            return t * s
        case MatMul(Value() as x, Value() as y) if y.node is at and x.node is not at and -1 not in axes(t):
            why = _softmax_hides(graph, reader)
            if why is not None:
                raise why
            return True
        case MatMul():
            return False
        case _ if op.rank is None:
            raise Refuse(UNKNOWN, remedy=PASS_INPUTS)
        case _:
            raise Refuse(f"{named(graph, reader)} changes the keys, so that they do not all share their bias", blocker=reader)


def _softmax_hides(graph: Graph, scores: fx.Node) -> Refuse | None:
    """Do all readers of the scores come to a softmax over the keys, through what keeps a shift per query a shift per query?"""
    work = [scores]
    while work:
        at = work.pop()
        for reader in graph.readers(at):
            match graph.view(reader, 2):
                case Softmax(x, dim) if dim == -1 or dim + 1 == x.rank:
                    continue
                case (
                    Add()
                    | Identity()
                    | Mul(Value(), float() | int())
                    | Mul(float() | int(), Value())
                    | Div(Value(), float() | int())
                ):
                    work.append(reader)
                case Affine(_, s, _) if -1 not in axes(s):
                    work.append(reader)
                case Reshape() | Permute() | Movement() if operands(graph, reader, -1) == [(at, -1)]:
                    work.append(reader)
                case _ if _filled(graph, reader, at) or is_cast(reader):
                    work.append(reader)
                case _:
                    return Refuse(f"{named(graph, reader)} reads the scores and is no softmax over the keys", blocker=reader)
    return None


def _filled(graph: Graph, reader: fx.Node, at: fx.Node) -> bool:
    """Does it replace scores by a value so low that softmax gives them nothing? A row of such values only is uniform either way."""
    value: Any = None
    if reader.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and reader.args[0] is at:
        value = reader.args[2]
    elif reader.target is aten.where.self and at in reader.args[1:]:
        value = reader.args[1] if reader.args[2] is at else reader.args[2]
    constant = graph.constant(value) if isinstance(value, fx.Node) else None
    if constant is not None and constant.numel == 1:
        value = float(constant.value.reshape(-1)[0])
    return isinstance(value, (int, float)) and value <= _FILLED
