"""Normalizations over the last axis."""
# Parameters are addresses and numbers of another language, for which Python has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

__all__ = ["normalize", "normalize_long"]


@triton.jit
def _inverse(square, total, deviation, D: tl.constexpr, KIND: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr):
    """1 / (the denominator of the norm), from Σ s², Σ s and Σ|s|; exactly rounded behind the means: once a row costs nothing."""
    if KIND == "l1":
        denominator = SCALE * (deviation / D) + EPS
    elif KIND == "crms":
        denominator = tl.math.sqrt_rn((square + total * total) / (D + 1) + EPS)
    else:
        denominator = tl.math.sqrt_rn(square / D + EPS)
    return tl.math.div_rn(1.0, denominator)


@triton.jit(do_not_specialize=["rows"])
def normalize(
    x,
    residual,
    gain,
    shift,
    y,
    sum,
    rows,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KIND: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """sum = x + residual;   y = norm(sum) · gain + shift, with ROWS rows at a time, each of them in registers as a whole."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < D)
    at = row * D + column
    # x and residual are dead once their sum is written; without a residual x is usually read again, by an addition later on
    s = tl.load(x + at, mask=inside, other=0.0, eviction_policy="" if residual is None else "evict_first").to(tl.float32)
    if residual is not None:
        s += tl.load(residual + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        rounded = s.to(sum.dtype.element_ty)
        tl.store(sum + at, rounded, mask=inside)
        s = rounded.to(tl.float32)
    total = tl.sum(s, axis=1)[:, None]
    if KIND == "layer" or KIND == "l1":
        s = tl.where(inside, s - total / D, 0.0)
    inverse = _inverse(tl.sum(s * s, axis=1)[:, None], total, tl.sum(tl.abs(s), axis=1)[:, None], D, KIND, EPS, SCALE)
    out = s * inverse
    if gain is not None:
        out *= tl.load(gain + column, mask=column < D, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if shift is not None:
        out += tl.load(shift + column, mask=column < D, other=0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _part(x, residual, sum, at, inside, LAST: tl.constexpr):
    """A part of one row of the sum, rounded as it is stored. Read in every pass: what other passes left is in the L2 cache."""
    s = tl.load(x + at, mask=inside, other=0.0, eviction_policy="evict_first" if LAST else "evict_last").to(tl.float32)
    if residual is not None:
        s += tl.load(residual + at, mask=inside, other=0.0, eviction_policy="evict_first" if LAST else "evict_last").to(tl.float32)
        rounded = s.to(sum.dtype.element_ty)
        if LAST:
            tl.store(sum + at, rounded, mask=inside)
        s = rounded.to(tl.float32)
    return s


@triton.jit(do_not_specialize=["rows"])
def normalize_long(
    x,
    residual,
    gain,
    shift,
    y,
    sum,
    rows,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """The same for one row that is too long for registers: a pass for the mean, if any, one for the size, one to write."""
    base = tl.program_id(0).to(tl.int64) * D
    lane = tl.arange(0, BLOCK)
    mean = 0.0
    if KIND == "layer" or KIND == "l1":
        first = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, BLOCK):
            first += _part(x, residual, sum, base + start + lane, start + lane < D, False)
        mean = tl.sum(first, axis=0) / D
    totals, squares, deviations = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        inside = start + lane < D
        s = tl.where(inside, _part(x, residual, sum, base + start + lane, inside, False) - mean, 0.0)
        totals += s
        squares += s * s
        deviations += tl.abs(s)
    inverse = _inverse(tl.sum(squares, axis=0), tl.sum(totals, axis=0), tl.sum(deviations, axis=0), D, KIND, EPS, SCALE)
    for start in range(0, D, BLOCK):
        inside = start + lane < D
        out = (_part(x, residual, sum, base + start + lane, inside, True) - mean) * inverse
        if gain is not None:
            out *= tl.load(gain + start + lane, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if shift is not None:
            out += tl.load(shift + start + lane, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        tl.store(y + base + start + lane, out.to(y.dtype.element_ty), mask=inside)
