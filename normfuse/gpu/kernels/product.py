"""Products of integer codes with packed weights."""
# Parameters are addresses and numbers of another language, for which Python has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from normfuse.gpu.kernels.decode import decoded, fits, width
from normfuse.gpu.kernels.epilogue import activated
from normfuse.gpu.kernels.order import place

__all__ = ["product"]


@triton.jit
def _piece(base, at, inside, WHOLE: tl.constexpr):
    """Bytes of a plane."""
    if WHOLE:
        return tl.load(base + at)
    return tl.load(base + at, mask=inside, other=0)


@triton.jit
def _shifts(shifts, channel, start, K: tl.constexpr, INNER: tl.constexpr, TURNS: tl.constexpr):
    """Shifts of the channels from `start` on, one tensor for each turn; 0 behind the last channel."""
    found = ()
    for turn in tl.static_range(TURNS):
        k = start + turn * INNER + channel
        found = found + (tl.load(shifts + k, mask=k < K, other=0),)  # noqa: RUF005 (Triton has no stars)
    return found


@triton.jit
def _along_last(v):
    """[.., c] as [.., 1, c]"""
    return tl.expand_dims(v, -2)


@triton.jit
def _along_rows(v):
    """[.., c] as [.., c, 1]"""
    return tl.expand_dims(v, -1)


@triton.jit
def _zeros(SUMS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """As many sums that nothing has been added to."""
    found = ()
    for _ in tl.static_range(SUMS):
        if SPLIT == 1:
            found = found + (tl.zeros([BLOCK, BLOCK_ROWS], tl.int32),)  # noqa: RUF005
        else:
            found = found + (tl.zeros([SPLIT, BLOCK, BLOCK_ROWS], tl.int32),)  # noqa: RUF005
    return found


@triton.jit
def _total(sums, SUMS: tl.constexpr):
    found = sums[0]
    for i in tl.static_range(1, SUMS):
        found += sums[i]
    return found


@triton.jit(do_not_specialize=["rows"])
def product(
    q,
    row_scale,
    planes,
    shifts,
    scale,
    bias,
    residual,
    y,
    rows,
    K: tl.constexpr,
    N: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    INNER: tl.constexpr,
    TURNS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOGETHER: tl.constexpr,
    SPLIT: tl.constexpr,
    SEPARATE: tl.constexpr,
    AHEAD: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """y[m, n] = act(row_scale[m] · scale[n] · Σ_k q[m, k] · (C[n, k] << shifts[k]) + bias[n]) + residual[m, n], the sum exact.

    Weights are the left operand: the tensor cores take it from registers, where it is decoded, and few rows waste little of them,
    because the right operand is as narrow as 8. With AHEAD, shifts are loaded one turn of the loop before they are needed: Triton
    leaves loads of less than four bytes a thread out of its pipeline, and to wait for them would cost more than all the rest.

    With SPLIT parts, a turn takes as many tiles of K at once, one for each warp: few rows make few programs, and with one warp each
    they would keep neither memory nor arithmetic busy. The parts are sums of integers, so their order changes nothing.

    With SEPARATE each product of a turn has a sum of its own. Sums in tensor memory are then written by one product a turn and stay
    there; a sum that the next product of the same turn reads goes through registers in between.
    """
    TILE: tl.constexpr = INNER * TURNS
    PLANE: tl.constexpr = N * INNER
    WHOLE: tl.constexpr = N % BLOCK == 0
    FIRST_1: tl.constexpr = TURNS * width(BITS, 0) // 8
    FIRST_2: tl.constexpr = FIRST_1 + TURNS * width(BITS, 1) // 8
    SUMS: tl.constexpr = TURNS if SEPARATE else 1
    above, across = place(tl.program_id(0), rows, BLOCK_ROWS, COLUMNS, TOGETHER)
    row = above.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = across * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, INNER)
    here, there = (row < rows)[None, :], (out < N)[:, None]
    if SPLIT == 1:
        channel = lane
        at_row = row[None, :] * K + lane[:, None]
        at = out[:, None] * INNER + lane[None, :]
    else:
        part = tl.arange(0, SPLIT)[:, None]
        channel = part * TILE + lane[None, :]
        at_row = row[None, None, :] * K + channel[:, :, None]
        at = (part * (PIECES * PLANE))[:, :, None] + out[None, :, None] * INNER + lane[None, None, :]
    lows = _zeros(SUMS, SPLIT, BLOCK, BLOCK_ROWS)
    highs = _zeros(SUMS, SPLIT, BLOCK, BLOCK_ROWS)
    base = planes
    if AHEAD:
        ahead = _shifts(shifts, channel, 0, K, INNER, TURNS)
    for step in range(tl.cdiv(K, TILE * SPLIT)):
        p1 = None
        p2 = None
        s = None
        low = lows[0]
        high = highs[0]
        next_lows = ()
        next_highs = ()
        if AHEAD:
            now = ahead
            ahead = _shifts(shifts, channel, (step + 1) * TILE * SPLIT, K, INNER, TURNS)
        for turn in tl.static_range(TURNS):
            k = step * TILE * SPLIT + turn * INNER
            if turn * width(BITS, 0) % 8 == 0:
                p0 = _piece(base + turn * width(BITS, 0) // 8 * PLANE, at, there, WHOLE)
            if width(BITS, 1) > 0 and turn * width(BITS, 1) % 8 == 0:
                p1 = _piece(base + (FIRST_1 + turn * width(BITS, 1) // 8) * PLANE, at, there, WHOLE)
            if width(BITS, 2) > 0 and turn * width(BITS, 2) % 8 == 0:
                p2 = _piece(base + (FIRST_2 + turn * width(BITS, 2) // 8) * PLANE, at, there, WHOLE)
            if K % TILE == 0:
                code = tl.load(q + (at_row + k), mask=here, other=0)
            else:
                code = tl.load(q + (at_row + k), mask=here & _along_rows(k + channel < K), other=0)
            if AHEAD:
                s = _along_last(now[turn])
            elif GROUPS > 1:
                if K % TILE == 0:
                    s = _along_last(tl.load(shifts + (k + channel)))
                else:
                    s = _along_last(tl.load(shifts + (k + channel), mask=k + channel < K, other=0))
            v, w = decoded(p0, p1, p2, s, BITS, GROUPS, turn)
            low = tl.dot(v, code, lows[turn] if SEPARATE else low, out_dtype=tl.int32)
            if not fits(BITS, GROUPS):
                high = tl.dot(w, code, highs[turn] if SEPARATE else high, out_dtype=tl.int32)
            if SEPARATE or turn == TURNS - 1:
                next_lows = next_lows + (low,)  # noqa: RUF005
                next_highs = next_highs + (high,)  # noqa: RUF005
        lows = next_lows
        highs = next_highs
        base += SPLIT * PIECES * PLANE
    low = _total(lows, SUMS)
    if not fits(BITS, GROUPS):
        low += _total(highs, SUMS) << 7
    if SPLIT > 1:
        low = tl.sum(low, axis=0)
    factor = tl.load(row_scale + row, mask=row < rows, other=0.0)[None, :] * tl.load(scale + out, mask=out < N, other=0.0)[:, None]
    value = low.to(tl.float32) * factor
    if bias is not None:
        value += tl.load(bias + out, mask=out < N, other=0.0)[:, None]
    value = activated(value, EPILOGUE)
    target = row[None, :] * N + out[:, None]
    if residual is not None:
        value += tl.load(residual + target, mask=here & there, other=0.0).to(tl.float32)
    tl.store(y + target, value.to(y.dtype.element_ty), mask=here & there)
