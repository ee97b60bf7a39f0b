"""A linear layer behind a normalization, whose scale is applied to the product."""
# Parameters are addresses and numbers of another language, for which Python has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from normfuse.gpu.kernels.decode import PLAIN
from normfuse.gpu.kernels.epilogue import activated
from normfuse.gpu.kernels.order import place

__all__ = ["norm_linear"]


@triton.jit(do_not_specialize=["rows"])
def norm_linear(
    x,
    weight,
    bias,
    y,
    rows,
    K: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOGETHER: tl.constexpr,
    KIND: tl.constexpr,
    EPS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """y[m, n] = act((Σ_k W[n, k] x[m, k]) / ρ[m] + b[n]), ρ from the tiles of x that the product reads anyway.

    W is the left operand, as in `product`: few rows then fill the narrow side of the tensor cores.
    """
    above, across = place(tl.program_id(0), rows, BLOCK_ROWS, COLUMNS, TOGETHER)
    row = above.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = across * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, TILE)
    here, there = (row < rows)[None, :], (out < N)[:, None]
    at_row = row[None, :] * K + lane[:, None]
    at_out = out.to(tl.int64)[:, None] * K + lane[None, :]
    product = tl.zeros([BLOCK, BLOCK_ROWS], tl.float32)
    squares = tl.zeros([TILE, BLOCK_ROWS], tl.float32)
    totals = tl.zeros([TILE, BLOCK_ROWS], tl.float32)
    for start in range(0, K, TILE):
        if K % TILE == 0:
            a = tl.load(x + (at_row + start), mask=here, other=0.0)
            w = tl.load(weight + (at_out + start), mask=there, other=0.0)
        else:
            a = tl.load(x + (at_row + start), mask=here & (start + lane < K)[:, None], other=0.0)
            w = tl.load(weight + (at_out + start), mask=there & (start + lane < K)[None, :], other=0.0)
        s = a.to(tl.float32)
        squares += s * s
        if KIND == "crms":
            totals += s
        if PLAIN:  # the interpreter multiplies bfloat16 wrongly
            product = tl.dot(w.to(tl.float32), s, product, input_precision="ieee")
        else:
            product = tl.dot(w, a, product, input_precision="ieee")
    square = tl.sum(squares, axis=0)
    if KIND == "crms":
        total = tl.sum(totals, axis=0)
        mean = (square + total * total) / (K + 1)
    else:
        mean = square / K
    value = product / tl.math.sqrt_rn(mean + EPS)[None, :]
    if bias is not None:
        value += tl.load(bias + out, mask=out < N, other=0.0).to(tl.float32)[:, None]
    value = activated(value, EPILOGUE)
    tl.store(y + (row[None, :] * N + out[:, None]), value.to(y.dtype.element_ty), mask=here & there)
