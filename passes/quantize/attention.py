"""The two products of attention in integers: softmax(q kᵀ · scale + mask) v with q, k and v quantized when it runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

import normfuse.ops  # noqa: F401 - registers the operators
from normfuse.constants import Constant
from normfuse.graph import Graph, Refuse
from normfuse.passes.quantize.sites import RULE
from normfuse.quant.spec import ShiftQuant
from normfuse.report import LayerQuantization, Site
from normfuse.views import Sdpa, Value

__all__ = ["attentions", "attentions_into_integers"]

_BITS = 8


def attentions(graph: Graph, spec: ShiftQuant) -> list[fx.Node]:
    """The attention nodes that the specification speaks of."""
    return [n for n in graph if isinstance(graph.view(n, 1), Sdpa)] if spec.attention else []


def attentions_into_integers(graph: Graph, spec: ShiftQuant) -> tuple[list[Site], list[Site], list[LayerQuantization]]:
    """Rewrite them: sites applied, sites refused, entries for the report."""
    applied: list[Site] = []
    refused: list[Site] = []
    entries: list[LayerQuantization] = []
    for node in attentions(graph, spec):
        path = graph.path(node)
        try:
            arguments = _arguments(graph, node, spec)
        except Refuse as refusal:
            refused.append(graph.site(RULE, node, refusal))
            entries.append(LayerQuantization(path, "attention", kept=refusal.reason))
            continue
        if graph.permit(RULE, path):
            applied.append(graph.site(RULE, node, note=f"attention with {_BITS}-bit queries, keys and values"))
            entries.append(LayerQuantization(path, "attention", activation_bits=_BITS, activations="dynamic"))
            new = graph.call(torch.ops.normfuse.shiftquant_attention.default, arguments, node, node)
            node.replace_all_uses_with(new)
    graph.clean()
    return applied, refused, entries


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
    if val.dtype is not torch.float32:
        name = str(val.dtype).removeprefix("torch.")
        raise Refuse(f"it computes in {name}; quantized layers compute in float32", remedy="convert it: model.float()")
    if op.dropout:
        raise Refuse("it drops values at random")
    if op.causal and _tokens(op.q) != _tokens(op.k):
        raise Refuse("it is causal with as many queries as keys unknown or different, where conventions differ")
    features = val.shape[-1]
    scale = op.scale if op.scale is not None else 1 / math.sqrt(features)
    mask = graph.emit_constant(op.mask, node) if isinstance(op.mask, Constant) else None if op.mask is None else op.mask.node
    return op.q.node, op.k.node, op.v.node, mask, scale, op.causal, _BITS


def _tokens(value: Value) -> Any:
    return None if value.shape is None else value.shape[-2]
