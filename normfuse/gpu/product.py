"""Integer products with packed weights as launches."""

from __future__ import annotations

import functools

from normfuse.errors import UsageError
from normfuse.gpu.blocks import FEW_ROWS, Block, block_for, rounded_hint, together
from normfuse.gpu.launch import Launch, Operand, Result
from normfuse.gpu.planes import GROUPS, LARGEST_K, layout
from normfuse.gpu.tile import FLOATS
from normfuse.words import EPILOGUES

__all__ = ["plan_product"]

_SPLITS = (4, 2, 1)  # parts of K that a program works on at once, where there are few rows


def plan_product(
    k: int, n: int, dtype: str, bits: int, groups: int, *, bias: bool, residual: bool, epilogue: str, rows_hint: int
) -> Launch:
    """y[m, n] = act(row_scale[m] · scale[n] · Σ_k q[m, k] · (C[n, k] << shifts[k]) + bias[n]) + residual[m, n].

    The sum is exact in 32 bits for every width and number of groups, within `normfuse.quant.accumulator.check_accumulator`.

    Args:
        k, n: inputs and outputs.
        dtype: of y and the residual: "fp16", "bf16" or "fp32".
        bits: of C, 2 to 8.
        groups: the largest shift and one, up to `GROUPS`.
        bias, residual: whether there is one.
        epilogue: "none", "relu", "gelu", "gelu_tanh" or "silu".
        rows_hint: how many rows are expected. Any number of rows gives the same result.

    Returns:
        Inputs q (i8 [rows, K]), row_scale (fp32 [rows]), planes and shifts (u8, see `normfuse.gpu.planes`), scale (fp32 [N])
        [, bias (fp32 [N])][, residual (dtype [rows, N])]; output y (dtype [rows, N]).

    Raises:
        UsageError: a size, the width, the dtype or the epilogue is not one of those.
    """
    return _plan(k, n, dtype, bits, groups, bias, residual, epilogue, rounded_hint(rows_hint))


@functools.lru_cache(maxsize=1024)
def _plan(k: int, n: int, dtype: str, bits: int, groups: int, bias: bool, residual: bool, epilogue: str, hint: int) -> Launch:
    if not 1 <= k <= LARGEST_K or n < 1:
        raise UsageError(f"product kernel: [{n}, {k}]; expected at least one output and 1 to {LARGEST_K} inputs")
    if not 2 <= bits <= 8 or not 1 <= groups <= GROUPS:
        raise UsageError(f"product kernel: {bits} bits in {groups} groups; expected 2 to 8 and 1 to {GROUPS}")
    if dtype not in FLOATS or epilogue not in EPILOGUES:
        raise UsageError(
            f"product kernel: dtype {dtype!r}, epilogue {epilogue!r}; expected one of {', '.join(FLOATS)}, and of "
            f"{', '.join(EPILOGUES)}"
        )
    shape = layout(bits)
    sums = 1 if bits + groups <= 9 else 2
    tiles = -(-k // shape.tile)
    split = next(parts for parts in _SPLITS if tiles % parts == 0) if hint <= FEW_ROWS else 1

    def stage_bytes(b: Block) -> int:
        return split * shape.inner * (shape.pieces * b.outputs + shape.turns * b.rows)

    block = block_for(n, hint, stage_bytes, dots=sums * shape.turns, sums=sums)
    return Launch(
        kernel="product.product",
        inputs=(
            Operand("q", "i8"),
            Operand("row_scale", "fp32"),
            Operand("planes", "u8"),
            Operand("shifts", "u8"),
            Operand("scale", "fp32"),
            *([Operand("bias", "fp32")] if bias else []),
            *([Operand("residual", dtype)] if residual else []),
        ),
        outputs=(Result("y", dtype, n),),
        constants=({} if bias else {"bias": None})
        | ({} if residual else {"residual": None})
        | {"K": k, "N": n, "BITS": bits, "GROUPS": groups, "INNER": shape.inner, "TURNS": shape.turns, "PIECES": shape.pieces}
        | {"BLOCK_ROWS": block.rows, "BLOCK": block.outputs, "COLUMNS": -(-n // block.outputs)}
        # a warp or two have less than four bytes of shifts for each thread; more of them share bytes and load as many as they need
        | {
            "TOGETHER": together(hint, block),
            "SPLIT": split,
            "SEPARATE": False,
            "AHEAD": groups > 1 and shape.inner >= 32 * block.warps,
        }
        | {"EPILOGUE": epilogue},
        rows_each=block.rows,
        columns=-(-n // block.outputs),
        warps=block.warps * split,
        stages=block.stages,
    )
