"""The scores of attention in integers: softmax(q kᵀ · scale + mask) v with q and k quantized as it runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

import normfuse.ops  # noqa: F401 - registers the operators
from normfuse.ir.constants import Constant
from normfuse.ir.dtypes import FLOATS
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Rewriting
from normfuse.ir.views import Sdpa, Value
from normfuse.passes.quantize.shiftquant.coded import RULE
from normfuse.quant.spec import ShiftQuant
from normfuse.reports.model import LayerQuantization

__all__ = ["attentions", "attentions_into_integers"]

_BITS = 8


def attentions(graph: Graph, spec: ShiftQuant) -> list[fx.Node]:
    """The attention nodes that the specification speaks of."""
    return [n for n in graph if isinstance(graph.view(n, 1), Sdpa)] if spec.attention else []


def attentions_into_integers(work: Rewriting, spec: ShiftQuant) -> None:
    """Rewrite them."""
    graph, entries = work.graph, work.quantization
    for node in attentions(graph, spec):
        path = graph.path(node)
        try:
            arguments = _arguments(graph, node, spec)
        except Refuse as refusal:
            work.refuse(RULE, node, refusal)
            entries.append(LayerQuantization(path, "attention", kept=refusal.reason))
            continue
        if work.permits(RULE, node):
            work.done(RULE, node, f"attention with {_BITS}-bit queries and keys")
            entries.append(LayerQuantization(path, "attention", activation_bits=_BITS, activations="dynamic"))
            new = graph.call(torch.ops.normfuse.shiftquant_attention.default, arguments, node, node)
            node.replace_all_uses_with(new)
    graph.clean()


def _arguments(graph: Graph, node: fx.Node, spec: ShiftQuant) -> tuple[Any, ...]:
    """(q, k, v, mask, scale, causal, bits) of the operator."""
    op = graph.view(node, 1)
    assert isinstance(op, Sdpa)
    if (pattern := spec.kept(graph.path(node))) is not None:
        raise Refuse(f"kept in float by keep={pattern!r}")
    if not hasattr(torch.ops.normfuse, "shiftquant_attention"):
        raise Refuse("this version of normfuse has no integer operator for attention")
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or val.ndim != 4:
        raise Refuse("its inputs are not known to be (batch, heads, tokens, features)", remedy="pass example_inputs")
    if val.dtype not in FLOATS:
        raise Refuse(f"it computes in {str(val.dtype).removeprefix('torch.')}; quantized attention multiplies real floats")
    if op.dropout:
        raise Refuse("it drops values at random")
    if op.causal and _tokens(op.q) != _tokens(op.k):
        raise Refuse("it is causal with as many queries as keys unknown or different, where conventions differ")
    _check_heads(op)
    features = val.shape[-1]
    scale = op.scale if op.scale is not None else 1 / math.sqrt(features)
    mask = graph.emit_constant(op.mask, node) if isinstance(op.mask, Constant) else None if op.mask is None else op.mask.node
    return op.q.node, op.k.node, op.v.node, mask, scale, op.causal, _BITS


def _check_heads(op: Sdpa) -> None:
    """Refuse what PyTorch broadcasts, or allows, and the operator does not take."""
    q, k, v = op.q.shape, op.k.shape, op.v.shape
    if q is None or k is None or v is None or not len(q) == len(k) == len(v) == 4:
        raise Refuse("its inputs are not known to be (batch, heads, tokens, features)", remedy="pass example_inputs")
    if q[3] != v[3]:
        raise Refuse(f"its values have {v[3]} features and its keys {q[3]}; the kernel takes as many of each")
    if k[0] != q[0] or v[0] != q[0] or k[1] != v[1] or q[1] % k[1]:
        raise Refuse(
            f"batch and heads of its queries, keys and values are {tuple(q[:2])}, {tuple(k[:2])}, {tuple(v[:2])}; "
            "the kernel takes one batch, and as many heads of keys as of values, a divisor of those of the queries"
        )


def _tokens(value: Value) -> Any:
    return None if value.shape is None else value.shape[-2]
