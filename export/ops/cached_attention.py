"""`CachedAttention`: new keys and values behind those of the past, and attention to all that are there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from normfuse.export.ops.emitter import Emitter, Op

__all__ = ["CACHED_ATTENTION"]

_LAST = np.iinfo(np.int64).max


def _expand(at: Emitter, inputs: tuple[Any, ...], facts: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """y = softmax(cap(scale · q kᵀ) + mask) v, where q and k are turned at their slots.

    query (B, T, H·D), key and value (B, T, KV·D); `packed`: query is (B, T, (H + 2 KV)·D) and holds all three, and key and value
    name it again. The caches are (B, KV, slots, D), the mask (B, S) says which tokens are valid, and y is (B, T, H·D).
    """
    query, key, value, past_key, past_value, mask, cosines, sines = inputs
    kv, width = _size(at, past_key, 1), _size(at, past_key, 3)
    q, k, v = _parts(at, (query, key, value), kv, width) if facts["packed"] else (_heads(at, x, width) for x in (query, key, value))
    new, total = _size(at, q, 2), _size(at, mask, 1)
    slots = _slots(at, mask, new, total)
    if cosines is not None:
        q, k = (_turned(at, x, cosines, sines, slots, bool(facts["interleaved"])) for x in (q, k))
    present_key, present_value = (_written(at, p, x, slots, total) for p, x in ((past_key, k), (past_value, v)))
    keys, values = (at.op("Slice", p, _ints(at, 0), total, _ints(at, 2)) for p in (present_key, present_value))
    rows = at.op("Reshape", q, at.op("Concat", _ints(at, 0), kv, _ints(at, -1), width, axis=0))  # of a group, one after the other
    scores = at.op("Mul", at.op("MatMul", rows, at.op("Transpose", keys, perm=[0, 1, 3, 2])), facts["scale"])
    if facts["softcap"] is not None:
        scores = at.op("Mul", at.op("Tanh", at.op("Div", scores, facts["softcap"])), facts["softcap"])
    apart = at.op("Reshape", scores, at.op("Concat", _ints(at, 0), kv, _ints(at, -1), new, total, axis=0))
    seen = at.op("Unsqueeze", _seen(at, mask, slots, total, facts), _ints(at, 1, 2))
    weights = at.op("Softmax", at.op("Where", seen, apart, at.const(np.float32(-np.inf))), axis=-1)
    weights = at.op("Where", seen, weights, at.const(np.float32(0)))  # of a token that sees nothing they are NaN
    y = at.op("MatMul", at.op("Reshape", weights, at.op("Concat", _ints(at, 0), kv, _ints(at, -1), total, axis=0)), values)
    by_head = at.op("Reshape", y, at.op("Concat", _ints(at, 0, -1), new, width, axis=0))
    joined = at.op("Reshape", at.op("Transpose", by_head, perm=[0, 2, 1, 3]), _ints(at, 0, 0, -1))
    return joined, present_key, present_value


def _ints(at: Emitter, *values: int) -> Any:
    return at.const(np.array(values, np.int64))


def _size(at: Emitter, x: Any, axis: int) -> Any:
    """[1]"""
    return at.op("Shape", x, start=axis, end=axis + 1)


def _heads(at: Emitter, x: Any, width: Any) -> Any:
    """(B, T, H·D) as (B, H, T, D)."""
    return at.op("Transpose", at.op("Reshape", x, at.op("Concat", _ints(at, 0, 0, -1), width, axis=0)), perm=[0, 2, 1, 3])


def _parts(at: Emitter, packed: tuple[Any, Any, Any], kv: Any, width: Any) -> tuple[Any, ...]:
    """(B, T, (H + 2 KV)·D), named three times, as (B, H, T, D) and twice (B, KV, T, D)."""
    q, k, v = (_heads(at, x, width) for x in packed)
    before_k, before_v = at.op("Neg", at.op("Add", kv, kv)), at.op("Neg", kv)
    first, last, axis = _ints(at, 0), _ints(at, _LAST), _ints(at, 1)
    cuts = ((q, first, before_k), (k, before_k, before_v), (v, before_v, last))
    return tuple(at.op("Slice", x, low, high, axis) for x, low, high in cuts)


def _slots(at: Emitter, mask: Any, new: Any, total: Any) -> Any:
    """(B, T): where each new token goes."""
    before = at.op("Sub", total, new)
    valid = at.op("ReduceSum", at.op("Slice", mask, _ints(at, 0), before, _ints(at, 1)), _ints(at, 1), keepdims=1)
    start = at.op("Where", _left(at, mask), before, valid)
    zero, one = at.const(np.int64(0)), at.const(np.int64(1))
    return at.op("Add", start, at.op("Range", zero, at.op("Squeeze", new, _ints(at, 0)), one))


def _left(at: Emitter, mask: Any) -> Any:
    """(B, 1): the row is padded on the left."""
    return at.op("Equal", at.op("Slice", mask, _ints(at, 0), _ints(at, 1), _ints(at, 1)), at.const(np.int64(0)))


def _seen(at: Emitter, mask: Any, slots: Any, total: Any, facts: Mapping[str, Any]) -> Any:
    """(B, T, S): the new token sees the slot."""
    zero, one = at.const(np.int64(0)), at.const(np.int64(1))
    places = at.op("Range", zero, at.op("Squeeze", total, _ints(at, 0)), one)
    own = at.op("Unsqueeze", slots, _ints(at, 2))
    hidden = at.op("Greater", places, own)
    if facts["within"]:
        hidden = at.op("Or", hidden, at.op("LessOrEqual", places, at.op("Sub", own, facts["window"])))
    padded = at.op("And", _left(at, mask), at.op("Equal", mask, zero))
    return at.op("Not", at.op("Or", hidden, at.op("Unsqueeze", padded, _ints(at, 1))))


def _turned(at: Emitter, x: Any, cosines: Any, sines: Any, slots: Any, interleaved: bool) -> Any:
    """(B, H, T, D): features in pairs, each turned by the angle of its slot."""
    cos, sin = (at.op("Unsqueeze", at.op("Gather", table, slots), _ints(at, 1)) for table in (cosines, sines))
    pairs = _size(at, cosines, 1)
    end = at.op("Add", pairs, pairs)

    def cut(first: Any, last: Any, step: int = 1) -> Any:
        return at.op("Slice", x, first, last, _ints(at, 3), _ints(at, step))

    zero, one = _ints(at, 0), _ints(at, 1)
    a, b = (cut(zero, end, 2), cut(one, end, 2)) if interleaved else (cut(zero, pairs), cut(pairs, end))
    first = at.op("Sub", at.op("Mul", a, cos), at.op("Mul", b, sin))
    second = at.op("Add", at.op("Mul", a, sin), at.op("Mul", b, cos))
    if interleaved:
        both = at.op("Concat", *(at.op("Unsqueeze", part, _ints(at, 4)) for part in (first, second)), axis=4)
        joined = at.op("Reshape", both, at.op("Concat", _ints(at, 0, 0, 0), end, axis=0))
    else:
        joined = at.op("Concat", first, second, axis=3)
    return at.op("Concat", joined, cut(end, _ints(at, _LAST)), axis=3)


def _written(at: Emitter, past: Any, new: Any, slots: Any, total: Any) -> Any:
    """`past` with room for all slots, and `new` in its slots."""
    missing = at.op("Max", at.op("Sub", total, _size(at, past, 2)), _ints(at, 0))
    shape = at.op("Concat", at.op("Shape", past, start=0, end=2), missing, _size(at, past, 3), axis=0)
    whole = at.op("Concat", past, at.op("Expand", at.const(np.float32(0)), shape), axis=2)
    index = at.op("Expand", at.op("Unsqueeze", slots, _ints(at, 1, 3)), at.op("Shape", new))
    return at.op("ScatterElements", whole, index, new, axis=2)


CACHED_ATTENTION = Op(
    "CachedAttention",
    ("cached_attention",),
    ("query", "key", "value", "past_key", "past_value", "attention_mask", "cosines?", "sines?"),
    ("y", "present_key", "present_value"),
    {"scale": "FLOAT", "window": "INT", "softcap": "FLOAT", "interleaved": "INT", "packed": "INT"},
    _expand,
    facts={"packed": lambda call: 0},
    words=lambda facts: (
        *(word for word in ("interleaved", "packed") if facts[word]), "within" if facts["within"] else "",
        "capped" if facts["softcap"] else "",
    ),
    told=("interleaved", "packed", "softcap"),
    derived={"within": lambda facts: bool(facts["window"])},
)  # fmt: skip
