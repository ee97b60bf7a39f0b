"""Softmax over the last axis."""
# Parameters are addresses and numbers of another language, for which Python has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

__all__ = ["softmax", "softmax_long"]


@triton.jit(do_not_specialize=["rows"])
def softmax(x, y, rows, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """y = exp(x - max x) / Σ exp(x - max x), with ROWS rows at a time, each of them in registers as a whole."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < D)
    # lanes behind the last feature are -Inf and add nothing; whole rows behind the last one are 0, not NaN, and are not written
    outside = tl.where(row < rows, float("-inf"), 0.0)
    s = tl.load(x + row * D + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    s = tl.where(inside, s, outside)
    e = tl.exp(s - tl.max(s, axis=1)[:, None])
    out = e * tl.math.div_rn(1.0, tl.sum(e, axis=1)[:, None])
    tl.store(y + row * D + column, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def softmax_long(x, y, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    """The same for one row that is too long for registers: one pass finds maximum and sum together, the other one writes.

    Each lane has a maximum m and a sum e = Σ exp(x - m) of its own until the end, so that the passes have no barrier.
    """
    base = tl.program_id(0).to(tl.int64) * D
    lane = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    e = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        inside = start + lane < D
        s = tl.load(x + base + start + lane, mask=inside, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        higher = tl.maximum(m, s)
        # -Inf less -Inf is NaN: a lane that has seen nothing else keeps e = 0, and NaN in x still becomes NaN in e
        e *= tl.where(m == float("-inf"), 0.0, tl.exp(m - higher))
        e += tl.where(s == float("-inf"), 0.0, tl.exp(s - higher))
        m = higher
    largest = tl.max(m, axis=0)
    total = tl.sum(e * tl.where(m == float("-inf"), 1.0, tl.exp(m - largest)), axis=0)
    inverse = tl.math.div_rn(1.0, total)
    for start in range(0, D, BLOCK):
        inside = start + lane < D
        s = tl.load(x + base + start + lane, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(y + base + start + lane, (tl.exp(s - largest) * inverse).to(y.dtype.element_ty), mask=inside)
