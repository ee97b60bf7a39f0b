"""The forms of attention (`normfuse.export.lowering.attention.operators`) as nodes: one translation each.

A graph that was translated holds a marker for each of these operators. Here it becomes the op of its runtime; what the op wants of
its operands (heads last, a mask of floats with all its axes) is written around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from normfuse.export.lowering.attention.operators import kernel, multi_head, projected, standard
from normfuse.export.onnx.attention.masks import Bias, bias_of, full_bias, hidden_by_infinity
from normfuse.export.onnx.build import Build, Shared, dims, given, same_size, take_over
from normfuse.export.onnx.own_nodes import native_node
from normfuse.export.onnx.writer.markers import markers_of
from normfuse.export.onnx.writer.translate import MARKER_DOMAIN, SDPA

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["attention_markers", "write_attention"]

_CONTRIB = "com.microsoft"
_HEADS_LAST = (0, 2, 1, 3)  # (B, H, L, D) <-> (B, L, H, D)
# ONNX Runtime hides a future token by adding this instead of -inf; its own default, -10000, does not hide large scores
_HIDDEN = float(np.finfo(np.float32).min) / 2
_OPERATORS = (standard, multi_head, projected, kernel)


@dataclass(frozen=True)
class Marked:
    """A marker: its inputs by name, and its facts."""

    node: ir.Node

    @property
    def inputs(self) -> tuple[ir.Value | None, ...]:
        """Queries, keys, values and mask, or what stands for them; those at the end that are None are not in the node."""
        return (*self.node.inputs, None, None, None)[:4]

    @property
    def query(self) -> ir.Value:
        """What has the batch and the tokens of the queries."""
        return given(self.node)

    @property
    def key(self) -> ir.Value:
        """What has the tokens of the keys: the queries, where the operator makes all three of one tensor."""
        key = self.inputs[1]
        return self.query if key is None or self.node.op_type == "projected" else key

    @property
    def mask(self) -> ir.Value | None:
        return self.inputs[3]

    @property
    def scale(self) -> float:
        return float(self.node.attributes["scale"].value)

    @property
    def causal(self) -> bool:
        return bool(self.fact("causal"))

    def fact(self, name: str) -> int:
        return int(self.node.attributes[name].value)

    @property
    def square(self) -> bool:
        """As many queries as keys, provably."""
        q, k = dims(self.query), dims(self.key)
        return q is not None and k is not None and same_size(q[-2], k[-2])

    @property
    def dtype(self) -> ir.DataType:
        """Of the queries, and of the result."""
        assert self.query.dtype is not None
        return self.query.dtype


def attention_markers() -> dict[Callable[..., object], Callable[..., object]]:
    """Translations of the forms' operators, each to a marker."""
    return markers_of([operator._opoverload for operator in _OPERATORS])


def write_attention(model: ir.Model) -> None:
    """Write every marker of an attention, in place."""
    shared: Shared = {}
    for node in [n for n in model.graph if n.domain == MARKER_DOMAIN and n.op_type in _WRITE]:
        at = Build(model, node, shared)
        take_over(node.outputs[0], _WRITE[node.op_type](Marked(node), at))
        model.graph.remove(node, safe=True)


def _decomposed(site: Marked, at: Build) -> ir.Value:
    """MatMul, Softmax, MatMul."""
    key, value = (_repeated(site, given(site.node, i), at) for i in (1, 2))
    rank = len(dims(site.query) or ())
    key_t = _transposed(key, (*range(rank - 2), rank - 1, rank - 2), at)
    dtype, query = site.dtype, site.query
    if site.scale != 1:
        query = at.op("Mul", query, at.const(np.asarray(site.scale, dtype.numpy())), dtype=dtype)
    scores = at.op("MatMul", query, key_t, dtype=dtype)
    bias = bias_of(site.mask, site, at, causal=site.causal)
    if bias.values is not None:
        scores = at.op("Add", scores, bias.values, dtype=dtype)
    return _masked(at.op("MatMul", at.op("Softmax", scores, axis=-1, dtype=dtype), value, dtype=dtype), bias, at)


def _standard(site: Marked, at: Build) -> ir.Value:
    # the op aligns a causal mask to the last key or to the first depending on its version: leave it out unless both agree
    causal = site.causal and site.square
    # ONNX Runtime does not broadcast the mask over queries and keys, though the standard allows it
    bias = full_bias(bias_of(site.mask, site, at, causal=site.causal and not causal), site, at)
    inputs = [*site.inputs[:3], *([bias.values] if bias.values is not None else [])]
    return _masked(at.op("Attention", *inputs, scale=site.scale, is_causal=int(causal), dtype=site.dtype), bias, at)


def _multi_head(site: Marked, at: Build) -> ir.Value:
    operands = [_heads_last(v, at) for v in site.inputs[:3]]
    bias = full_bias(bias_of(site.mask, site, at), site, at)
    # query, key, value, bias, key_padding_mask, attention_bias
    inputs = [*operands, *([None, None, bias.values] if bias.values is not None else [])]
    return _contrib("MultiHeadAttention", inputs, site, bias, at)


def _projected(site: Marked, at: Build) -> ir.Value:
    heads = site.fact("heads")
    bias = full_bias(bias_of(site.mask, site, at), site, at)
    # x, weight, bias, mask_index, past, attention_bias
    inputs = [*site.inputs[:3], *([None, None, bias.values] if bias.values is not None else [])]
    sizes = [heads * width for width in site.node.attributes["widths"].value]
    return _contrib("Attention", inputs, site, bias, at, qkv_hidden_sizes=sizes)


def _contrib(name: str, inputs: list[ir.Value | None], site: Marked, bias: Bias, at: Build, **sizes: Any) -> ir.Value:
    y = at.op(
        name, *inputs, domain=_CONTRIB, num_heads=site.fact("heads"), scale=site.scale, unidirectional=int(site.causal),
        mask_filter_value=_HIDDEN, dtype=site.dtype, **sizes,
    )  # fmt: skip
    return _result(site, y, bias, at)


def _kernel(site: Marked, at: Build) -> ir.Value:
    query, key, value = site.inputs[:3]
    bias = full_bias(Bias(None if site.mask is None else hidden_by_infinity(site.mask, at)), site, at)
    packed = key is None
    if packed:  # no gap in front of a mask: see `native_node`
        operands = (query, *[None if bias.values is None else query] * 2)
    else:
        operands = tuple(_heads_last(v, at) for v in (query, key, value))
    facts: dict[str, Any] = {name: site.fact(name) for name in ("causal", "heads", "kv_heads", "bits")}
    facts |= {"scale": site.scale, "layout": "packed" if packed else "bthd"}
    (y,) = native_node(at, "Attention", (*operands, bias.values), facts, count=1)
    y.dtype = site.dtype
    return _result(site, y, bias, at)


_WRITE: dict[str, Callable[[Marked, Build], ir.Value]] = {
    SDPA: _decomposed,
    "standard": _standard,
    "multi_head": _multi_head,
    "projected": _projected,
    "kernel": _kernel,
}


# -- operands --------------------------------------------------------------------------------------------------------------


def _heads_last(value: ir.Value | None, at: Build) -> ir.Value:
    """(B, H, L, D) as a transposed copy (B, L, H·D); what is that already stays."""
    assert value is not None
    size = dims(value)
    assert size is not None
    if len(size) == 3:
        return value
    flat = at.op("Transpose", value, perm=list(_HEADS_LAST), dtype=value.dtype)
    shape = at.const(np.array([0, 0, int(size[1] or 0) * int(size[3] or 0)], np.int64))
    return at.op("Reshape", flat, shape, dtype=value.dtype)


def _repeated(site: Marked, value: ir.Value, at: Build) -> ir.Value:
    """Keys or values with as many heads as the queries: head j serves the queries j·g … j·g + g − 1."""
    q, k = dims(site.query), dims(value)
    if q is None or k is None or len(q) != 4 or same_size(q[1], k[1]) or not (isinstance(q[1], int) and isinstance(k[1], int)):
        return value
    if k[1] == 1:
        return value  # MatMul broadcasts one head
    group = q[1] // k[1]
    wide = at.op("Unsqueeze", value, at.const(np.array([2], np.int64)), dtype=value.dtype)
    wide = at.op("Expand", wide, at.const(np.array([1, 1, group, 1, 1], np.int64)), dtype=value.dtype)
    return at.op("Reshape", wide, at.const(np.array([0, q[1], -1, k[3]], np.int64)), dtype=value.dtype)


def _transposed(value: ir.Value, perm: tuple[int, ...], at: Build) -> ir.Value:
    """`value` transposed; through a Transpose that made it, so that there is one and not two."""
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and not node.domain and "perm" in node.attributes:
        inner = node.attributes["perm"].value
        value, perm = given(node), tuple(inner[i] for i in perm)
    return at.op("Transpose", value, perm=list(perm), dtype=value.dtype)


# -- results ---------------------------------------------------------------------------------------------------------------


def _masked(out: ir.Value, bias: Bias, at: Build) -> ir.Value:
    """A query that may see no key at all gives zero, as in torch."""
    return out if bias.alive is None else at.op("Mul", out, bias.alive, dtype=out.dtype)


def _result(site: Marked, out: ir.Value, bias: Bias, at: Build) -> ir.Value:
    """`out` (B, L, H·E) as the marker gives it."""
    q, heads, y = dims(site.query), site.fact("heads"), dims(site.node.outputs[0])
    assert y is not None
    heads_first = bool(site.fact("heads_first"))
    width = int(y[-1] or 0) // (1 if heads_first else heads)
    out.shape = at.ir.Shape((q[0] if q is not None else None, q[-2] if q is not None else None, heads * width))
    if bias.alive is not None:
        out = _alive_tokens(out, bias, heads, width, at)
    if not heads_first:
        return out
    four = at.op("Reshape", out, at.const(np.array([0, 0, heads, width], np.int64)), dtype=out.dtype)
    return at.op("Transpose", four, perm=list(_HEADS_LAST), dtype=out.dtype)


def _alive_tokens(out: ir.Value, bias: Bias, heads: int, width: int, at: Build) -> ir.Value:
    four = at.op("Reshape", out, at.const(np.array([0, 0, heads, width], np.int64)), dtype=out.dtype)
    alive = at.op("Transpose", bias.alive, perm=list(_HEADS_LAST), dtype=out.dtype)
    shape = at.const(np.array([0, 0, heads * width], np.int64))
    return at.op("Reshape", at.op("Mul", four, alive, dtype=out.dtype), shape, dtype=out.dtype, shape=dims(out))
