"""`Attention`: softmax(scale q kᵀ + mask) v, in the layouts that projections leave; with `bits`, scores are sums of integers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from normfuse.export.ops.activations import ZERO, dynamic_codes
from normfuse.export.ops.emitter import Emitter, Op, number

__all__ = ["ATTENTION"]


def _expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y[i] = softmax(scale · Σ_d q[i, d] k[j, d] + mask[i, j]) v[j],   or, with `bits`,

    y[i] = softmax((scale · s[i] · t[j]) · Σ_d A[i, d] C[j, d] + mask[i, j]) v[j];   A, s and C, t are q and k by rows.

    `layout` "bhtd": q (B, H, L, D), k and v (B, KV, S, D). "bthd": (B, L, H·D), (B, S, KV·D). "packed": (B, L, (H + 2 KV)·D),
    which k and v may name again.
    The result is laid out as q, without the columns of k and v.
    """
    q, k, v, mask = inputs
    heads, kv_heads, layout = number(at, facts["heads"]), number(at, facts["kv_heads"]), facts["layout"]
    if layout == "packed":
        ends = [at.op("Add", heads, at.op("Mul", kv_heads, at.const(np.int64(n)))) for n in (1, 2)]
        cuts = (at.const(np.int64(0)), heads, *ends)
        every = _heads_first(at, q, ends[1])
        each_of = (every, *(every if x is None else _heads_first(at, x, ends[1]) for x in (k, v)))
        q, k, v = (_some_heads(at, x, low, high) for x, (low, high) in zip(each_of, itertools.pairwise(cuts), strict=True))
    elif layout == "bthd":
        q, k, v = _heads_first(at, q, heads), _heads_first(at, k, kv_heads), _heads_first(at, v, kv_heads)
    shared = facts["shared"]  # head h reads the keys h // (heads / kv_heads)
    each = at.op("Div", heads, kv_heads) if shared else None
    v = _unsqueezed(at, v) if shared else v
    scores = _sums(at, q, k, facts, kv_heads, each) if facts["codes"] else _products(at, q, k, facts, kv_heads, each)
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


def _products(at: Emitter, q: Any, k: Any, facts: Mapping[str, Any], kv_heads: Any, each: Any | None) -> Any:
    """scale · q kᵀ, (B, H, L, S); with `each` queries a key (B, KV, each, L, S)."""
    if each is not None:
        q, k = _grouped(at, q, kv_heads, each), _unsqueezed(at, k)
    return at.op("Mul", at.op("MatMul", q, _transposed(at, k, each)), facts["scale"])


def _sums(at: Emitter, q: Any, k: Any, facts: Mapping[str, Any], kv_heads: Any, each: Any | None) -> Any:
    """The same from the codes of q and k."""
    (a, s), (c, t) = dynamic_codes(at, q, facts["bits"]), dynamic_codes(at, k, facts["bits"])
    s = at.op("Mul", s, facts["scale"])
    if each is not None:
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


def _heads_first(at: Emitter, x: Any, heads: Any) -> Any:
    """(B, T, H · D) as (B, H, T, D)."""
    four = at.op("Reshape", x, _shape(at, np.array([0, 0]), heads, np.array([-1])))
    return at.op("Transpose", four, perm=[0, 2, 1, 3])


def _some_heads(at: Emitter, x: Any, low: Any, high: Any) -> Any:
    first = at.const(np.array([1], np.int64))  # axis
    return at.op("Slice", x, _shape(at, low), _shape(at, high), first)


def _shape(at: Emitter, *sizes: Any) -> Any:
    """Single sizes and lists of sizes as one list."""
    last = at.const(np.array([0], np.int64))
    lists = [at.const(s.astype(np.int64)) if isinstance(s, np.ndarray) else at.op("Unsqueeze", s, last) for s in sizes]
    return at.op("Concat", *lists, axis=0) if len(lists) > 1 else lists[0]


def _transposed(at: Emitter, x: Any, each: Any | None) -> Any:
    return at.op("Transpose", x, perm=[0, 1, 3, 2] if each is None else [0, 1, 2, 4, 3])


def _unsqueezed(at: Emitter, x: Any) -> Any:
    """(B, KV, ...) as (B, KV, 1, ...)."""
    return at.op("Unsqueeze", x, at.const(np.array([2], np.int64)))


def _grouped(at: Emitter, x: Any, kv_heads: Any, each: Any | None) -> Any:
    """(B, H, ...) as (B, KV, H / KV, ...)."""
    return at.op("Reshape", x, at.op("Concat", _shape(at, np.array([0]), kv_heads, each), at.op("Shape", x, start=2), axis=0))


def _joined(at: Emitter, x: Any, heads: Any) -> Any:
    """(B, KV, H / KV, ...) as (B, H, ...)."""
    return at.op("Reshape", x, at.op("Concat", _shape(at, np.array([0]), heads), at.op("Shape", x, start=3), axis=0))


ATTENTION = Op(
    "Attention",
    ("attention", "shiftquant_attention"),
    ("q", "k?", "v?", "mask?"),
    ("y",),
    {"scale": "FLOAT", "causal": "INT", "heads": "INT", "kv_heads": "INT", "layout": "STRING", "bits": "INT"},
    _expand,
    facts={
        "heads": lambda call: call.size("q", 1),
        "kv_heads": lambda call: call.size("k", 1),
        "layout": lambda call: "bhtd",  # heads first, as torch has them
        "bits": lambda call: call.attributes.get("bits", 0),
    },
    words=lambda facts: (facts["layout"], *(word for word in ("causal", "shared", "codes") if facts[word])),
    told=("causal", "layout"),
    derived={"shared": lambda facts: facts["heads"] != facts["kv_heads"], "codes": lambda facts: bool(facts["bits"])},
)
