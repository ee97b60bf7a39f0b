"""`Attention`: softmax(scale q kᵀ + mask) v, in the layouts that projections leave; with `bits`, scores are sums of integers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from normfuse.export.ops.activations import ZERO, dynamic_codes
from normfuse.export.ops.emitter import Emitter, Op

__all__ = ["ATTENTION"]


def _expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y[i] = softmax(scale · Σ_d q[i, d] k[j, d] + mask[i, j]) v[j],   or, with `bits`,

    y[i] = softmax((scale · s[i] · t[j]) · Σ_d A[i, d] C[j, d] + mask[i, j]) v[j];   A, s and C, t are q and k by rows.

    `layout` "bhtd": q (B, H, L, D), k and v (B, KV, S, D). "bthd": (B, L, H·D), (B, S, KV·D). "packed": (B, L, (H + 2 KV)·D).
    The result is laid out as q, without the columns of k and v.
    """
    q, k, v, mask = inputs
    heads, kv_heads, layout = facts["heads"], facts["kv_heads"], facts["layout"]
    if layout == "packed":
        cuts = (0, heads, heads + kv_heads, heads + 2 * kv_heads)
        every = _heads_first(at, q, heads + 2 * kv_heads)
        q, k, v = (_some_heads(at, every, low, high) for low, high in itertools.pairwise(cuts))
    elif layout == "bthd":
        q, k, v = _heads_first(at, q, heads), _heads_first(at, k, kv_heads), _heads_first(at, v, kv_heads)
    shared = heads != kv_heads  # head h reads the keys h // (heads / kv_heads)
    each = heads // kv_heads if shared else 0
    v = _unsqueezed(at, v) if shared else v
    scores = _sums(at, q, k, facts, kv_heads, each) if facts.get("bits") else _products(at, q, k, facts, kv_heads, each)
    scores = _joined(at, scores, heads) if shared else scores
    if mask is not None:
        scores = at.op("Add", scores, mask)
    if facts["causal"]:
        scores = _causal(at, scores)
    p = _weights(at, scores, hides=mask is not None or bool(facts["causal"]))
    y = _joined(at, at.op("MatMul", _grouped(at, p, kv_heads, each), v), heads) if shared else at.op("MatMul", p, v)
    if layout == "bhtd":
        return (y,)
    return (at.op("Reshape", at.op("Transpose", y, perm=[0, 2, 1, 3]), at.const(np.array([0, 0, -1], np.int64))),)


def _products(at: Emitter, q: Any, k: Any, facts: Mapping[str, Any], kv_heads: int, each: int) -> Any:
    """scale · q kᵀ, (B, H, L, S); with `each` queries a key (B, KV, each, L, S)."""
    if each:
        q, k = _grouped(at, q, kv_heads, each), _unsqueezed(at, k)
    return at.op("Mul", at.op("MatMul", q, _transposed(at, k, each)), facts["scale"])


def _sums(at: Emitter, q: Any, k: Any, facts: Mapping[str, Any], kv_heads: int, each: int) -> Any:
    """The same from the codes of q and k."""
    (a, s), (c, t) = dynamic_codes(at, q, facts["bits"]), dynamic_codes(at, k, facts["bits"])
    s = at.op("Mul", s, facts["scale"])
    if each:
        a, s = (_grouped(at, x, kv_heads, each) for x in (a, s))
        c, t = _unsqueezed(at, c), _unsqueezed(at, t)
    sums = at.op("MatMulInteger", a, _transposed(at, c, each), at.const(ZERO), at.const(ZERO))
    # no Mul of two scales: see `outer`
    return at.op("Mul", at.op("Cast", sums, to=1), at.op("MatMul", s, _transposed(at, t, each)))


def _weights(at: Emitter, scores: Any, *, hides: bool) -> Any:
    """Softmax over the last axis; 0, not NaN, for a query whose scores are all -inf, which only masks make (`hides`)."""
    p = at.op("Softmax", scores, axis=-1)
    if not hides:
        return p
    hidden = at.op("Cast", at.op("Equal", scores, at.const(np.float32(-np.inf))), to=1)
    none_seen = at.op("Cast", at.op("ReduceMin", hidden, at.const(np.array([-1], np.int64)), keepdims=1), to=9)
    return at.op("Where", none_seen, at.const(np.float32(0)), p)


def _causal(at: Emitter, scores: Any) -> Any:
    """Query i sees the keys j <= i + (keys − queries)."""
    zero, one = at.const(np.int64(0)), at.const(np.int64(1))
    queries = at.op("Squeeze", at.op("Shape", scores, start=2, end=3))
    keys = at.op("Squeeze", at.op("Shape", scores, start=3))
    last = at.op("Add", at.op("Range", zero, queries, one), at.op("Sub", keys, queries))
    seen = at.op("LessOrEqual", at.op("Range", zero, keys, one), at.op("Unsqueeze", last, at.const(np.array([1], np.int64))))
    return at.op("Where", seen, scores, at.const(np.float32(-np.inf)))


# -- axes --------------------------------------------------------------------------------------------------------------


def _heads_first(at: Emitter, x: Any, heads: int) -> Any:
    """(B, T, H · D) as (B, H, T, D)."""
    four = at.op("Reshape", x, at.const(np.array([0, 0, heads, -1], np.int64)))
    return at.op("Transpose", four, perm=[0, 2, 1, 3])


def _some_heads(at: Emitter, x: Any, low: int, high: int) -> Any:
    return at.op("Slice", x, *(at.const(np.array([i], np.int64)) for i in (low, high, 1)))


def _transposed(at: Emitter, x: Any, each: int) -> Any:
    return at.op("Transpose", x, perm=[0, 1, 2, 4, 3] if each else [0, 1, 3, 2])


def _unsqueezed(at: Emitter, x: Any) -> Any:
    """(B, KV, ...) as (B, KV, 1, ...)."""
    return at.op("Unsqueeze", x, at.const(np.array([2], np.int64)))


def _grouped(at: Emitter, x: Any, kv_heads: int, each: int) -> Any:
    """(B, H, ...) as (B, KV, H / KV, ...)."""
    return at.op("Reshape", x, at.op("Concat", at.const(np.array([0, kv_heads, each])), at.op("Shape", x, start=2), axis=0))


def _joined(at: Emitter, x: Any, heads: int) -> Any:
    """(B, KV, H / KV, ...) as (B, H, ...)."""
    return at.op("Reshape", x, at.op("Concat", at.const(np.array([0, heads])), at.op("Shape", x, start=3), axis=0))


ATTENTION = Op(
    "Attention",
    ("q", "k?", "v?", "mask?"),
    ("y",),
    {"scale": "FLOAT", "causal": "INT", "heads": "INT", "kv_heads": "INT", "layout": "STRING", "bits": "INT"},
    _expand,
)
