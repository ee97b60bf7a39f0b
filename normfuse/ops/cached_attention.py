"""`cached_attention`: new tokens put into a cache of keys and values, and their attention to all that is in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops._shapes import float_dtype
from normfuse.ops.operator import Operator

__all__ = ["CACHED_ATTENTION"]

_OP = "cached_attention"


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, attention_mask: Tensor,
    cosines: Tensor | None, sines: Tensor | None, scale: float, window: int, softcap: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y = softmax(cap(scale · q kᵀ) + mask) v over the past and the T new tokens, causal,   cap(s) = c · tanh(s / c).

    A row's cache has slots. Where its new tokens go follows from its mask alone, never from the size of the past, which may be a
    buffer with room to spare: a row padded on the left (its mask begins with 0) fills all slots and its padding is never seen; any
    other row fills as many slots as its past has valid tokens. A token that sees no key gives 0.

    Args:
        query: [B, T, H·D], floats.
        key, value: [B, T, KV·D], where KV divides H.
        past_key, past_value: [B, KV, P, D]; P may be 0, or more than what is filled.
        attention_mask: [B, S], int64, 1 for valid tokens, the new ones included.
        cosines, sines: [S or more, n], by which the first 2n features of queries and keys are turned in pairs at their slot; None
            for as they are. Rotations are relative, so that the padding in front of a row does not matter.
        scale: of the scores.
        window: tokens that a token sees, itself included; 0 for all before it.
        softcap: c; 0 for no cap.
        interleaved: the features of a pair are 2i and 2i + 1, and not i and i + n.

    Returns:
        y [B, T, H·D], and keys and values [B, KV, max(P, S), D]; slots that nothing is in hold what the past held, or 0.

    Raises:
        UsageError: arguments do not belong together.

    Source: Dao, Haziza, Massa and Sizov, Flash-Decoding for long-context inference, 2023 (the kernel's parts).
    """
    dtype = _check(
        _Call(query, key, value, past_key, past_value, attention_mask, cosines, sines, scale, window, softcap, interleaved)
    )
    width, total = past_key.shape[3], attention_mask.shape[1]
    q, k, v = (x.unflatten(2, (-1, width)).transpose(1, 2).to(dtype) for x in (query, key, value))
    slots = _slots(attention_mask, q.shape[2])
    if cosines is not None and sines is not None:
        q, k = (_turned(x, cosines[slots][:, None].to(dtype), sines[slots][:, None].to(dtype), interleaved) for x in (q, k))
    present_key, present_value = (_written(p, x, slots, total) for p, x in ((past_key, k), (past_value, v)))
    keys, values = (p[:, :, :total].to(dtype).repeat_interleave(q.shape[1] // k.shape[1], 1) for p in (present_key, present_value))
    scores = q @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = _seen(attention_mask, slots, window)[:, None]
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    y = weights @ values.masked_fill(~seen.any(2)[..., None], 0.0)  # what nobody sees may be NaN
    return y.transpose(1, 2).flatten(2).to(query.dtype), present_key, present_value


def _slots(mask: Tensor, new: int) -> Tensor:
    """Slot of each new token, [B, T]."""
    before = mask.shape[1] - new
    start = mask[:, :before].sum(1, dtype=torch.int64).where(mask[:, 0] != 0, before) if mask.shape[1] else mask.sum(1)
    return start[:, None] + torch.arange(new, device=mask.device)


def _seen(mask: Tensor, slots: Tensor, window: int) -> Tensor:
    """[B, T, S]: the new token sees the slot."""
    at = torch.arange(mask.shape[1], device=mask.device)
    seen = at <= slots[:, :, None]
    if window:
        seen = seen & (at > slots[:, :, None] - window)
    return seen & ~((mask[:, :1] == 0) & (mask == 0))[:, None]


def _turned(x: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
    """The first 2n features of `x`, each pair turned; the tables hold n of them."""
    turned, rest = x[..., : 2 * cosines.shape[-1]], x[..., 2 * cosines.shape[-1] :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (a * cosines - b * sines, a * sines + b * cosines)
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)


def _written(past: Tensor, new: Tensor, slots: Tensor, total: int) -> Tensor:
    """`past` with room for `total` slots, and `new` in its slots."""
    missing = max(total - past.shape[2], 0)
    room = torch.cat([past, past.new_zeros(*past.shape[:2], missing, past.shape[3])], 2)
    return room.scatter(2, slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]), new.to(past.dtype))


class _Call(NamedTuple):
    """The arguments of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    past_key: Tensor
    past_value: Tensor
    attention_mask: Tensor
    cosines: Tensor | None
    sines: Tensor | None
    scale: float
    window: int
    softcap: float
    interleaved: bool


def _check(x: _Call) -> torch.dtype:
    """What is computed in."""
    mask, cosines = x.attention_mask, x.cosines
    dtype = float_dtype(_OP, x.query)
    if x.past_key.ndim != 4 or x.past_value.shape != x.past_key.shape:
        raise UsageError(f"{_OP}: past_key {_size(x.past_key)}, past_value {_size(x.past_value)}; expected twice [B, KV, P, D]")
    batch, kv, _, width = x.past_key.shape
    if x.query.ndim != 3 or x.query.shape[0] != batch or x.query.shape[2] % (kv * width):
        raise UsageError(f"{_OP}: query {_size(x.query)}; expected [{batch}, T, H·{width}] with heads that {kv} divides")
    rows = (batch, x.query.shape[1], kv * width)
    if x.key.shape != rows or x.value.shape != rows:
        raise UsageError(f"{_OP}: key {_size(x.key)}, value {_size(x.value)}; expected twice {rows}")
    if mask.ndim != 2 or mask.shape[0] != batch or mask.dtype is not torch.int64:
        raise UsageError(f"{_OP}: attention_mask {_size(mask)} of {mask.dtype}; expected [{batch}, S] of int64")
    if (cosines is None) != (x.sines is None):
        raise UsageError(f"{_OP}: {'cosines' if x.sines is None else 'sines'} without the other table")
    if cosines is not None and (cosines.ndim != 2 or 2 * cosines.shape[1] > width):
        raise UsageError(f"{_OP}: cosines {_size(cosines)}; expected [positions, at most {width // 2}]")
    if x.window < 0 or x.softcap < 0:
        raise UsageError(f"{_OP}: window={x.window}, softcap={x.softcap}; expected 0 or more")
    return dtype


def _size(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _shapes(x: _Call) -> Any:
    slots = torch.sym_max(x.past_key.shape[2], x.attention_mask.shape[1])
    present = [p.new_empty((*p.shape[:2], slots, p.shape[3])) for p in (x.past_key, x.past_value)]
    return x.query.new_empty(x.query.shape), *present


def _cpu(x: _Call) -> Any:
    q, k, v, pk, pv = (t.float().contiguous() for t in x[:5])
    turn = [None if t is None else t.float().contiguous() for t in (x.cosines, x.sines)]
    (batch, kv, past, width), total = pk.shape, x.attention_mask.shape[1]
    slots = max(past, total)
    positions, pairs = (0, 0) if turn[0] is None else turn[0].shape
    shape = native.Cache(
        batch, q.shape[1], q.shape[2] // width, kv, width, past, slots, total, q.shape[2], k.shape[2], v.shape[2], pairs, positions,
        x.window, x.scale, x.softcap, x.interleaved,
    )  # fmt: skip
    y, present = torch.empty_like(q), [pk.new_empty(batch, kv, slots, width) for _ in range(2)]
    native.call("nf_attend_cached", shape, q, k, v, pk, pv, x.attention_mask.contiguous(), *turn, *present, y)
    return y.to(x.query.dtype), present[0].to(x.past_key.dtype), present[1].to(x.past_value.dtype)


CACHED_ATTENTION = Operator(
    cached_attention,
    shapes=_shapes,
    check=_check,
    cpu=_cpu,
    given=_Call,
    functions=(
        native.Function(
            "nf_attend_cached", native.CACHE, *[native.F32] * 5, native.I64, *[native.F32_OR_NONE] * 2, *[native.F32] * 3
        ),
    ),
)
