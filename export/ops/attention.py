"""`Attention`: softmax(scale q kᵀ + mask) v, in the layouts that projections leave."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from normfuse.export.ops.emitter import Emitter, Op

__all__ = ["ATTENTION"]


def _expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any]:
    """y = softmax(scale q kᵀ + mask) v

    `layout` "bhtd": q (B, H, L, D), k and v (B, KV, S, D). "bthd": (B, L, H·D), (B, S, KV·D). "packed": (B, L, (H + 2 KV)·D).
    The result is laid out as q, without the columns of k and v.
    """
    q, k, v, mask = inputs
    heads, kv_heads, layout = facts["heads"], facts["kv_heads"], facts["layout"]
    if layout == "packed":
        all_heads = _heads_first(at, q, heads + 2 * kv_heads)
        cuts = (0, heads, heads + kv_heads, heads + 2 * kv_heads)
        q, k, v = (_slice(at, all_heads, low, high, 1) for low, high in itertools.pairwise(cuts))
    elif layout == "bthd":
        q, k, v = _heads_first(at, q, heads), _heads_first(at, k, kv_heads), _heads_first(at, v, kv_heads)
    size = at.op("Shape", q)
    if heads != kv_heads:  # head j serves the queries j · g … j · g + g − 1
        group = at.const(np.array([0, kv_heads, heads // kv_heads], np.int64))
        q = at.op("Reshape", q, at.op("Concat", group, at.op("Shape", q, start=2), axis=0))
        two = at.const(np.array([2], np.int64))
        k, v = at.op("Unsqueeze", k, two), at.op("Unsqueeze", v, two)
    perm = [0, 1, 3, 2] if heads == kv_heads else [0, 1, 2, 4, 3]
    scores = at.op("Mul", at.op("MatMul", q, at.op("Transpose", k, perm=perm)), facts["scale"])
    if heads != kv_heads:
        scores = at.op("Reshape", scores, at.op("Concat", at.op("Shape", q, end=1), at.const(np.array([heads], np.int64)),
                                                at.op("Shape", scores, start=3), axis=0))  # fmt: skip
    if mask is not None:
        scores = at.op("Add", scores, mask)
    if facts["causal"]:
        scores = _causal(at, scores)
    p = at.op("Softmax", scores, axis=-1)
    if heads != kv_heads:
        p = at.op("Reshape", p, at.op("Concat", group, at.op("Shape", p, start=2), axis=0))
    y = at.op("MatMul", p, v)
    y = y if heads == kv_heads else at.op("Reshape", y, size)
    if layout == "bhtd":
        return (y,)
    return (at.op("Reshape", at.op("Transpose", y, perm=[0, 2, 1, 3]), at.const(np.array([0, 0, -1], np.int64))),)


def _heads_first(at: Emitter, x: Any, heads: int) -> Any:
    four = at.op("Reshape", x, at.const(np.array([0, 0, heads, -1], np.int64)))
    return at.op("Transpose", four, perm=[0, 2, 1, 3])


def _slice(at: Emitter, x: Any, low: int, high: int, axis: int) -> Any:
    return at.op("Slice", x, *(at.const(np.array([i], np.int64)) for i in (low, high, axis)))


def _causal(at: Emitter, scores: Any) -> Any:
    """Query i sees the keys j <= i + (keys − queries)."""
    zero, one = at.const(np.int64(0)), at.const(np.int64(1))
    queries, keys = (
        at.op("Squeeze", at.op("Shape", scores, start=start, **end)) for start, end in ((-2, {"end": -1}), (-1, dict[str, int]()))
    )
    last = at.op("Add", at.op("Range", zero, queries, one), at.op("Sub", keys, queries))
    seen = at.op("LessOrEqual", at.op("Range", zero, keys, one), at.op("Unsqueeze", last, at.const(np.array([1], np.int64))))
    return at.op("Where", seen, scores, at.const(np.float32(-np.inf)))


ATTENTION = Op(
    "Attention",
    ("q", "k?", "v?", "mask?"),
    ("y",),
    {"scale": "FLOAT", "causal": "INT", "heads": "INT", "kv_heads": "INT", "layout": "STRING"},
    _expand,
)
