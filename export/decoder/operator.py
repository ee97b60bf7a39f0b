"""The cached attention of one layer as an operator, that to an encoder's states as another, and positions that a mask gives tokens.

They are *defined* here by plain PyTorch: captured graphs hold them as nodes, passes leave them alone, and an export writes each as
the node of a runtime or in standard operators.

A row's cache has slots. New tokens of a row go to the slots behind those that are filled, and where that is follows from the
mask alone,
never from the shape of the past, which may be a buffer with room to spare:

* a row padded on the left (`mask[b, 0] == 0`) fills all slots; its padding is hidden for good,
* any other row fills as many slots as it has valid tokens; new tokens that are padding land behind and are overwritten later.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NAMESPACE", "cached_attention", "cross_attention", "newest", "positions", "rotated", "unpadded"]

NAMESPACE = "normfuse_decoder"
_HIDDEN = -1e9  # added to a score: finite, so that a row of padding alone has numbers and no NaN


@torch.library.custom_op(f"{NAMESPACE}::positions", mutates_args=())
def positions(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """Place of each new token among the valid tokens of its row, from 0; padding in front has 0.

    Args:
        attention_mask: [batch, total], 1 for valid tokens.
        input_ids: [batch, new], for its shape.

    Returns: [batch, new], int64.
    """
    new = input_ids.shape[1]
    places = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return places[:, places.shape[1] - new :].clone()


@positions.register_fake
def _(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    return input_ids.new_empty(input_ids.shape, dtype=torch.int64)


@torch.library.custom_op(f"{NAMESPACE}::newest", mutates_args=())
def newest(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The features [batch, 1, width] of each row's newest valid token, out of those of all new ones, [batch, new, width]."""
    new = hidden.shape[1]
    last = _ends(attention_mask) - (attention_mask.shape[1] - new)
    at = last.clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, at)


@newest.register_fake
def _(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], 1, hidden.shape[2])


@torch.library.custom_op(f"{NAMESPACE}::unpadded", mutates_args=())
def unpadded(past_length: Tensor, input_ids: Tensor, past_key: Tensor) -> Tensor:
    """The mask [batch, past + new] of rows without padding, where a number says how many slots are filled.

    Args:
        past_length: [1], slots that are filled before the new tokens; those of `past_key` may be more.
        input_ids: [batch, new], for its shape.
        past_key: [batch, heads, past, width], for what a cache that grows has filled.
    """
    return input_ids.new_ones(input_ids.shape[0], int(past_length) + input_ids.shape[1])


@unpadded.register_fake
def _(past_length: Tensor, input_ids: Tensor, past_key: Tensor) -> Tensor:
    return input_ids.new_empty(input_ids.shape[0], past_key.shape[2] + input_ids.shape[1])


@torch.library.custom_op(f"{NAMESPACE}::cached_attention", mutates_args=())
def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, attention_mask: Tensor,
    cosines: Tensor | None, sines: Tensor | None, scale: float, window: int, softcap: float, interleaved: bool,
    distances: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """softmax(cap(scale q kᵀ) + mask) v over the past and the new tokens, causal.

    Args:
        query: [batch, heads, new, width].
        key, value: [batch, kv heads, new, width].
        past_key, past_value: [batch, kv heads, past, width]; `past` may be 0, or more than what is filled.
        attention_mask: [batch, total], 1 for valid tokens, the new ones included.
        cosines, sines: [slots, half of what is rotated], tables by which new queries and keys are rotated at their slot; None
            for as they are. Rotations are relative, so that the padding in front of a row does not matter.
        scale: factor on the scores.
        window: tokens that a token sees, itself included; 0 for all before it.
        softcap: c in c tanh(scores / c); 0 for none.
        interleaved: pairs that are rotated stand beside each other, and not half of the rotated width apart.
        distances: [heads, slots], added to the score of a token that is so many slots back; None for nothing.

    Returns: [batch, new, heads, width], and keys and values [batch, kv heads, max(past, total), width].
    """
    new, total = query.shape[2], attention_mask.shape[1]
    slots = _slots(attention_mask, new)
    if cosines is not None and sines is not None:
        query, key = (rotated(x, cosines[slots][:, None], sines[slots][:, None], interleaved) for x in (query, key))
    present_key, present_value = (_written(p, x, slots, total) for p, x in ((past_key, key), (past_value, value)))
    groups = query.shape[1] // key.shape[1]
    keys, values = (p[:, :, :total].repeat_interleave(groups, 1) for p in (present_key, present_value))
    scores = query @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(total, device=query.device)
    if distances is not None:
        back = (slots[:, :, None] - at).clamp(0, distances.shape[1] - 1)
        scores = scores + distances[:, back].transpose(0, 1)
    seen = at <= slots[:, :, None]
    if window:
        seen = seen & (at > slots[:, :, None] - window)
    padded = (attention_mask[:, :1] == 0) & (attention_mask == 0)
    seen = seen & ~padded[:, None]
    weights = torch.softmax(scores.masked_fill(~seen[:, None], _HIDDEN), -1)
    return (weights @ values).transpose(1, 2).contiguous(), present_key, present_value


@cached_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, attention_mask: Tensor,
    cosines: Tensor | None, sines: Tensor | None, scale: float, window: int, softcap: float, interleaved: bool,
    distances: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, new, width = query.shape
    kv = past_key.shape[1]
    room = past_key.shape[2] + new  # of a growing cache, which is what is captured
    present = [query.new_empty(batch, kv, room, p.shape[3], dtype=p.dtype) for p in (past_key, past_value)]
    return query.new_empty(batch, new, heads, width), present[0], present[1]


@torch.library.custom_op(f"{NAMESPACE}::cross_attention", mutates_args=())
def cross_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor | None, past_value: Tensor | None, use_past: Tensor | None,
    source_mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """softmax(scale q kᵀ + mask) v over the states of an encoder.

    Args:
        query: [batch, heads, new, width].
        key, value: [batch, heads, source, width], made of the encoder's states.
        past_key, past_value: the same from an earlier step; None where there is only one of them.
        use_past: [1], those of the earlier step are taken, and `key` and `value` are not looked at.
        source_mask: [batch, source], 1 for valid states; None where all are.
        scale: factor on the scores.

    Returns: [batch, new, heads, width], and the keys and values for later steps: with `use_past` none, [batch, heads, 0, width],
    as a reader keeps those that it has.
    """
    if past_key is not None and past_value is not None and use_past is not None and bool(use_past):
        key, value = past_key, past_value
        kept = key[:, :, :0].clone(), value[:, :, :0].clone()
    else:
        kept = key.clone(), value.clone()
    scores = query @ key.transpose(-1, -2) * scale
    if source_mask is not None:
        scores = scores.masked_fill(source_mask[:, None, None] == 0, _HIDDEN)
    return (torch.softmax(scores, -1) @ value).transpose(1, 2).contiguous(), *kept


@cross_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor | None, past_value: Tensor | None, use_past: Tensor | None,
    source_mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, new, width = query.shape
    return query.new_empty(batch, new, heads, width), torch.empty_like(key), torch.empty_like(value)


def rotated(x: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
    """The first 2 n features of `x` in pairs, each turned by an angle; the tables hold n of them, and broadcast."""
    turned, rest = x[..., : 2 * cosines.shape[-1]], x[..., 2 * cosines.shape[-1] :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (a * cosines - b * sines, a * sines + b * cosines)
    joined = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([joined, rest], -1)


def _ends(mask: Tensor) -> Tensor:
    """Slot of each row's newest token, [batch]."""
    return torch.where(mask[:, 0] == 0, mask.shape[1], mask.sum(1, dtype=torch.int64)) - 1


def _slots(mask: Tensor, new: int) -> Tensor:
    """Slot of each new token, [batch, new]."""
    total = mask.shape[1]
    before = mask[:, : total - new].sum(1, dtype=torch.int64)
    start = torch.where(mask[:, 0] == 0, total - new, before)
    return start[:, None] + torch.arange(new, device=mask.device)


def _written(past: Tensor, new: Tensor, slots: Tensor, total: int) -> Tensor:
    """`past` with room for `total` slots, and `new` in its slots."""
    missing = max(total - past.shape[2], 0)
    room = torch.cat([past, past.new_zeros(*past.shape[:2], missing, past.shape[3])], 2)
    index = slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return room.scatter(2, index, new.to(past.dtype))
