"""One attention of a graph: what it reads, what it computes, and what is provable of its sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

import normfuse.ops  # noqa: F401 - registers the operators
from normfuse.ir.decode import arguments
from normfuse.passes.attention.heads import Size, sizes_of

__all__ = ["Site", "site_of"]

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_OURS = (torch.ops.normfuse.attention.default, torch.ops.normfuse.shiftquant_attention.default)


@dataclass(frozen=True, eq=False)
class Site:
    """softmax(scale q kᵀ + mask) v.

    Attributes:
        node: the call.
        query, key, value: (B, H, L, D), (B, Hk, S, D), (B, Hk, S, E).
        mask: None, bools or floats.
        scale: factor on the scores.
        causal: query i sees keys 0 … i.
        bits: of queries and keys, where the scores are sums of integers; 0: floats.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float
    causal: bool
    bits: int = 0

    @property
    def operands(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        return self.query, self.key, self.value

    @property
    def four(self) -> bool:
        """All operands have four axes with known heads and channels."""
        sizes = map(sizes_of, self.operands)
        return all(s is not None and len(s) == 4 and isinstance(s[1], int) and isinstance(s[3], int) for s in sizes)

    @property
    def square(self) -> bool:
        """As many queries as keys, provably."""
        q, k = sizes_of(self.query), sizes_of(self.key)
        return q is not None and k is not None and q[-2] == k[-2]

    @property
    def heads(self) -> int:
        """Of queries, where `four` holds."""
        return self._known(self.query, 1)

    @property
    def kv_heads(self) -> int:
        """Of keys, where `four` holds."""
        return self._known(self.key, 1)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of a query, a key and a value, where `four` holds."""
        q, k, v = (self._known(x, 3) for x in self.operands)
        return q, k, v

    @property
    def one_batch(self) -> bool:
        """Queries, keys and values are provably of one batch."""
        return len({self._size(x, 0) for x in self.operands}) == 1

    @property
    def one_head_count(self) -> bool:
        """Keys and values have the heads and the batch of the queries: neither grouped nor broadcast."""
        return self.one_batch and len({self._size(x, 1) for x in self.operands}) == 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the queries, and of the result."""
        found: torch.dtype = self.query.meta["val"].dtype
        return found

    @staticmethod
    def _size(node: fx.Node, axis: int) -> Size:
        sizes = sizes_of(node)
        assert sizes is not None
        return sizes[axis]

    def _known(self, node: fx.Node, axis: int) -> int:
        size = self._size(node, axis)
        assert isinstance(size, int)
        return size


def site_of(node: fx.Node) -> Site | None:
    """The attention that `node` is, PyTorch's operator or ours; None for one that drops values, or whose scale is not known."""
    if node.op != "call_function" or (node.target is not _SDPA and node.target not in _OURS):
        return None
    a = arguments(node)
    if node.target in _OURS:
        return Site(node, a["q"], a["k"], a["v"], a["mask"], a["scale"], a["causal"], a.get("bits", 0))
    width = (sizes_of(a["query"]) or ("",))[-1]
    if a["dropout_p"] or (a["scale"] is None and not isinstance(width, int)):
        return None
    scale = 1 / math.sqrt(int(width)) if a["scale"] is None else float(a["scale"])
    return Site(node, a["query"], a["key"], a["value"], a["attn_mask"], scale, bool(a["is_causal"]))
