"""`torch.ops.normfuse.attention`, and `shiftquant_attention`, whose scores are integers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import UsageError
from normfuse.ops._shapes import float_dtype
from normfuse.ops.operator import Operator
from normfuse.quant.integers import quantize_rows, top_code

__all__ = ["ATTENTION", "SHIFTQUANT_ATTENTION", "attention", "shiftquant_attention"]

_OP = "attention"
_QUANTIZED = "shiftquant_attention"


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """y = softmax(scale · q kᵀ + mask) v, where query i sees keys j ≤ i + (S − T) if `causal`.

    A query that sees no key, or only scores of −Inf, gives 0, as in PyTorch; a NaN among its scores gives NaN, masked or not.
    Heads may share keys and values: head h reads kv head h // (H / KV).

    Args:
        q: [B, H, T, D] of any strides; the kernel reads it where it lies if features are neighbours in memory.
        k, v: [B, KV, S, D], where KV divides H.
        mask: None; floats, added to the scores; or bool, True where a key is seen. It broadcasts to [B, H, T, S].
        scale: of the scores.
        causal: whether later keys are hidden.

    Returns:
        [B, H, T, D] in the dtype of q, laid out in memory as [B, T, H, D], so that joining the heads copies nothing.

    Raises:
        UsageError: arguments do not belong together.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Rabe and Staats, 2021 (the kernel's tiles).
    """
    dtype = _check(_OP, q, k, v, mask)
    scores = q.to(dtype) @ _shared(k.to(dtype), q).transpose(-1, -2) * scale
    return _mixed(scores, q, k, v, mask, causal)


def shiftquant_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, bits: int) -> Tensor:
    """y = softmax( (scale · s[i] · t[j]) · Σ_d A[i, d] · C[j, d] + mask[i, j] ) v[j].

    A, s and C, t are q and k quantized by rows (a head's features of one token), see `normfuse.ops.quantize_rows`; the sum is an
    exact integer. The weights and v stay floats: they are half of the products, but quantizing them costs more than it saves. A
    query or a key with NaN or Inf makes NaN of all that see it.

    Args:
        q, k, v, mask, scale, causal: as in `attention`.
        bits: of A and C, 2 to 8.

    Returns:
        [B, H, T, D], as `attention` gives it.

    Raises:
        UsageError: arguments do not belong together.
    """
    dtype = _check(_QUANTIZED, q, k, v, mask, bits)
    (a, s), (c, t) = quantize_rows(q, bits), quantize_rows(_shared(k, q), bits)
    sums = a.double() @ c.double().transpose(-1, -2)
    return _mixed(sums.to(dtype) * (s.to(dtype) * scale * t.to(dtype).transpose(-1, -2)), q, k, v, mask, causal)


def _shared(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values for every head of q."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _mixed(scores: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if mask is not None:
        scores = scores + _additive(mask, scores.dtype)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.softmax(scores, -1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0.0)
    y = weights @ _shared(v.to(scores.dtype), q)
    return y.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bits: int | None = None) -> torch.dtype:
    dtype = float_dtype(op, q)
    found = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape:
        raise UsageError(f"{op}: {found}; expected [B, H, T, D] and twice [B, KV, S, D]")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise UsageError(f"{op}: {found}; expected the same B and D, and KV heads that divide the H heads of q")
    if k.dtype is not q.dtype or v.dtype is not q.dtype:
        raise UsageError(f"{op}: q is {q.dtype}, k {k.dtype}, v {v.dtype}; expected one dtype")
    if mask is not None:
        full = (*q.shape[:3], k.shape[2])
        fits = mask.ndim <= 4 and all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False))
        if not fits or not (mask.dtype is torch.bool or mask.is_floating_point()):
            raise UsageError(f"{op}: mask {tuple(mask.shape)} of {mask.dtype}; expected floats or bools that broadcast to {full}")
    if bits is not None:
        top_code(bits)
    return dtype


def _empty(q: Tensor) -> Tensor:
    b, h, t, d = q.shape
    return q.new_empty((b, t, h, d)).transpose(1, 2)


def _shapes(q: Tensor, *rest: object) -> Tensor:
    return _empty(q)


def _cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, bits: int = 0) -> Any:
    return _native(q, k, v, mask, scale, causal, bits) if q.numel() and k.numel() else NotImplemented


def _native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, bits: int) -> Tensor:
    b, h, t, d = q.shape
    keys, dtype = k.shape[2], q.dtype
    q, k, v = (_features_together(x.float()) for x in (q, k, v))
    y = _empty(q)
    given = None if mask is None else _features_together(_additive(mask, torch.float32).expand(b, h, t, keys))
    strides = [_strides(x) for x in (q, k, v, y)]
    shape = native.Attention(
        b, h, k.shape[1], t, keys, d, *strides, (0, 0, 0) if given is None else _strides(given), scale, causal, bits
    )
    native.call("nf_attend", shape, q, k, v, given, y)
    return y.to(dtype)


def _features_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    b, h, t, _ = x.stride()
    return b, h, t


_FUNCTIONS = (
    native.Function(
        "nf_attend", native.ATTENTION, native.STRIDED, native.STRIDED, native.STRIDED, native.STRIDED_OR_NONE, native.STRIDED
    ),
)
ATTENTION = Operator(
    attention,
    shapes=_shapes,
    check=lambda q, k, v, mask, scale, causal: _check(_OP, q, k, v, mask),
    cpu=_cpu,
    functions=_FUNCTIONS,
)
SHIFTQUANT_ATTENTION = Operator(
    shiftquant_attention,
    shapes=_shapes,
    check=lambda q, k, v, mask, scale, causal, bits: _check(_QUANTIZED, q, k, v, mask, bits),
    cpu=_cpu,
    functions=_FUNCTIONS,
)
