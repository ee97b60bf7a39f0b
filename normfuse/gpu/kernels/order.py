"""Which part of a product a program computes."""
# Parameters are addresses and numbers of another language, for which Python has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

__all__ = ["place"]


@triton.jit
def place(program, rows, BLOCK_ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr):
    """(block of rows, block of outputs) of a program.

    TOGETHER blocks of rows are taken at a time, each with the first outputs, then each with the next ones. The programs that run at
    the same moment then share few weights, which stay in the cache for all of those rows; row by row they would read all weights of
    the layer each.
    """
    if TOGETHER == 1:
        above = program // COLUMNS
        across = program % COLUMNS
    else:
        first = program // (TOGETHER * COLUMNS) * TOGETHER
        inside = program % (TOGETHER * COLUMNS)
        height = tl.minimum(tl.cdiv(rows, BLOCK_ROWS) - first, TOGETHER)
        above = first + inside % height
        across = inside // height
    return above, across
