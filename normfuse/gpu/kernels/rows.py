"""Floats to integers, one scale a row. The same bits as `normfuse.quant.integers`."""
# Parameters are addresses and numbers of another language, for which Python has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

__all__ = ["quantize", "quantize_long"]


@triton.jit
def _coded(value, TOP: tl.constexpr):
    """clamp(rne(value), ±TOP) as int8; NaN gives 0.

    Adding 1.5 · 2^23 leaves no bits for a fraction, so the addition rounds, half to even. Clamping goes first: it does not change
    the result, ±TOP being integers, and it stands between the product and the addition, which a compiler would make one FMA,
    rounded once instead of twice.
    """
    value = tl.where(value == value, value, 0.0)
    value = tl.minimum(tl.maximum(value, -TOP * 1.0), TOP * 1.0)
    return ((value + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _finite_size(value):
    """|value|, and Inf for NaN: maxima of NaN differ from device to device."""
    size = tl.abs(value)
    return tl.where(size < float("inf"), size, float("inf"))


@triton.jit
def _scale_of(largest, TOP: tl.constexpr):
    """a / qmax; 1 for a row of zeros, NaN for one that is not finite. Triton 3.5 makes quotients below 2^-126 0."""
    scale = tl.where(largest > 0.0, tl.math.div_rn(largest, TOP * 1.0), 1.0)
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit(do_not_specialize=["rows"])
def quantize(x, q, scale, rows, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, TOP: tl.constexpr, STATIC: tl.constexpr):
    """q = clamp(rne(x · (qmax / a)), ±qmax),   scale = a / qmax,   a = max|x| of a row; with STATIC q = clamp(rne(x / STATIC))."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row[:, None] < rows) & (column < D)
    at = row[:, None] * D + column
    s = tl.load(x + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if STATIC is None:
        largest = tl.max(_finite_size(s), axis=1)
        # 1 in rows that are not there: their 0 would be divided by
        inverse = tl.math.div_rn(TOP * 1.0, tl.where(row < rows, largest, 1.0))
        code = s * inverse[:, None]
        tl.store(scale + row, _scale_of(largest, TOP), mask=row < rows)
    else:
        code = tl.math.div_rn(s, tl.full([ROWS, BLOCK], STATIC, tl.float32))
        tl.store(scale + row, tl.full([ROWS], STATIC, tl.float32), mask=row < rows)
    tl.store(q + at, _coded(code, TOP), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def quantize_long(x, q, scale, rows, D: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, STATIC: tl.constexpr):
    """The same for one row that is too long for registers: a pass for the largest value where it is needed, one to write."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    if STATIC is None:
        sizes = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, BLOCK):
            inside = start + lane < D
            s = tl.load(x + row * D + start + lane, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
            sizes = tl.maximum(sizes, _finite_size(s))
        largest = tl.max(sizes, axis=0)
        inverse = tl.math.div_rn(TOP * 1.0, largest)
        tl.store(scale + row, _scale_of(largest, TOP))
    else:
        tl.store(scale + row, STATIC)
    for start in range(0, D, BLOCK):
        inside = start + lane < D
        s = tl.load(x + row * D + start + lane, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        code = s * inverse if STATIC is None else tl.math.div_rn(s, tl.full([BLOCK], STATIC, tl.float32))
        tl.store(q + row * D + start + lane, _coded(code, TOP), mask=inside)
