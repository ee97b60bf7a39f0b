"""Attention as runtimes have it: operators that stand for the nodes of a file, each *defined* here by plain PyTorch.

Operands are (B, H, L, D), heads first, or (B, L, H · D) as projections leave them; a writer copies the first where its runtime
takes the second alone. A result is heads first or, where nobody needs that, (B, L, H · E). A mask is None, floats that are added to
the scores, or bools, true where a key is seen; a query that sees no key gives 0. `causal`: query i sees keys 0 … i.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from normfuse.ir.decode import arguments

__all__ = ["NAMESPACE", "is_of_codes", "kernel", "multi_head", "projected", "standard"]

NAMESPACE = "normfuse_attention"


@torch.library.custom_op(f"{NAMESPACE}::standard", mutates_args=())
def standard(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """`Attention` of opset 23: (B, H, L, D), (B, Hk, S, D), (B, Hk, S, E) to (B, H, L, E); Hk divides H."""
    return _attended(query, key, value, mask, scale, causal)


@torch.library.custom_op(f"{NAMESPACE}::multi_head", mutates_args=())
def multi_head(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool, heads: int, heads_first: bool
) -> Tensor:
    """`MultiHeadAttention` of ONNX Runtime."""
    y = _attended(_heads_first(query, heads), _heads_first(key, heads), _heads_first(value, heads), mask, scale, causal)
    return _laid_out(y, heads_first)


@torch.library.custom_op(f"{NAMESPACE}::projected", mutates_args=())
def projected(
    x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, scale: float, causal: bool, heads: int, widths: list[int],
    heads_first: bool,
) -> Tensor:  # fmt: skip
    """`Attention` of ONNX Runtime: x (B, L, C), of which the columns of `weight` (C, N) and `bias` (N,) make queries, keys and
    values, of `widths` features a head."""
    parts = (x @ weight + bias).split([heads * width for width in widths], -1)
    q, k, v = (_heads_first(part, heads) for part in parts)
    return _laid_out(_attended(q, k, v, mask, scale, causal), heads_first)


@torch.library.custom_op(f"{NAMESPACE}::kernel", mutates_args=())
def kernel(
    query: Tensor, key: Tensor | None, value: Tensor | None, mask: Tensor | None, scale: float, causal: bool, heads: int,
    kv_heads: int, bits: int, heads_first: bool,
) -> Tensor:  # fmt: skip
    """Attention of normfuse's kernels. Without keys and values `query` holds all three, one behind the other; with `bits` the
    scores are sums of integers: `torch.ops.normfuse.shiftquant_attention`."""
    if key is None or value is None:
        every = _heads_first(query, heads + 2 * kv_heads)
        q, k, v = every.split([heads, kv_heads, kv_heads], 1)
    else:
        q, k, v = _heads_first(query, heads), _heads_first(key, kv_heads), _heads_first(value, kv_heads)
    if bits:
        return _laid_out(torch.ops.normfuse.shiftquant_attention(q, k, v, mask, scale, causal, bits), heads_first)
    return _laid_out(_attended(q, k, v, mask, scale, causal), heads_first)


@standard.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


@multi_head.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool, heads: int, heads_first: bool
) -> Tensor:
    return _empty(query, heads, value.shape[3] if value.ndim == 4 else value.shape[2] // heads, heads_first)


@projected.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, scale: float, causal: bool, heads: int, widths: list[int],
    heads_first: bool,
) -> Tensor:  # fmt: skip
    return _empty(x, heads, widths[2], heads_first)


@kernel.register_fake
def _(
    query: Tensor, key: Tensor | None, value: Tensor | None, mask: Tensor | None, scale: float, causal: bool, heads: int,
    kv_heads: int, bits: int, heads_first: bool,
) -> Tensor:  # fmt: skip
    every = heads if key is not None else heads + 2 * kv_heads
    return _empty(query, heads, query.shape[3] if query.ndim == 4 else query.shape[2] // every, heads_first)


def is_of_codes(node: fx.Node) -> bool:
    """A `kernel` whose scores are sums of integers."""
    return node.target is kernel._opoverload and arguments(node)["bits"] > 0


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=shared).contiguous()


def _heads_first(x: Tensor, heads: int) -> Tensor:
    return x if x.ndim == 4 else x.unflatten(2, (heads, -1)).transpose(1, 2)


def _laid_out(y: Tensor, heads_first: bool) -> Tensor:
    return y.contiguous() if heads_first else y.transpose(1, 2).flatten(2)


def _empty(query: Tensor, heads: int, width: int, heads_first: bool) -> Tensor:
    batch, tokens = query.shape[0], query.shape[-2]
    return query.new_empty((batch, heads, tokens, width) if heads_first else (batch, tokens, heads * width))
