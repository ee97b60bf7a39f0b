"""Linear layers behind a normalization as launches."""

from __future__ import annotations

import functools

from normfuse.errors import UsageError
from normfuse.gpu.blocks import block_for, rounded_hint, together
from normfuse.gpu.launch import DTYPES, Launch, Operand, Result
from normfuse.gpu.tile import FLOATS
from normfuse.words import EPILOGUES

__all__ = ["KINDS", "plan_norm_linear"]

KINDS = ("rms", "crms")

_TILE_BYTES = 128  # of a row of x or W: one line of the cache
_MOST_ROWS_FP32 = 128  # whose products are no work of tensor cores: larger blocks only take registers


def plan_norm_linear(kind: str, k: int, n: int, dtype: str, *, bias: bool, eps: float, epilogue: str, rows_hint: int) -> Launch:
    """y = act((W x) / ρ + b), ρ from the row's own statistics, which are taken from x as it passes.

    rms: ρ = √(mean x² + ε);   crms: ρ = √((Σ x² + (Σ x)²) / (K + 1) + ε). A gain of the norm is folded into W before.

    Args:
        kind: "rms" or "crms".
        k, n: inputs and outputs.
        dtype: of x, W, b and y: "fp16", "bf16" or "fp32"; sums are float32 (of fp32 products exactly as wide, no TF32).
        bias: whether there is one.
        eps: ε.
        epilogue: "none", "relu", "gelu", "gelu_tanh" or "silu".
        rows_hint: how many rows are expected. Any number of rows gives the same result.

    Returns:
        Inputs x, weight ([N, K])[, bias]; output y.

    Raises:
        UsageError: the kind, a size, the dtype or the epilogue is not one of those.

    Source: FlashNorm, arXiv 2407.09577.
    """
    return _plan(kind, k, n, dtype, bias, float(eps), epilogue, rounded_hint(rows_hint))


@functools.lru_cache(maxsize=1024)
def _plan(kind: str, k: int, n: int, dtype: str, bias: bool, eps: float, epilogue: str, hint: int) -> Launch:
    if kind not in KINDS or dtype not in FLOATS or epilogue not in EPILOGUES:
        raise UsageError(
            f"norm and linear kernel: kind {kind!r}, dtype {dtype!r}, epilogue {epilogue!r}; expected one of {', '.join(KINDS)}, "
            f"of {', '.join(FLOATS)}, and of {', '.join(EPILOGUES)}"
        )
    if k < 1 or n < 1:
        raise UsageError(f"norm and linear kernel: [{n}, {k}]; expected at least one input and one output")
    size = DTYPES[dtype][1]
    tile = _TILE_BYTES // size
    block = block_for(n, min(hint, _MOST_ROWS_FP32) if size == 4 else hint, lambda b: tile * size * (b.rows + b.outputs))
    columns = -(-n // block.outputs)
    return Launch(
        kernel="norm_linear.norm_linear",
        inputs=(Operand("x", dtype), Operand("weight", dtype), *([Operand("bias", dtype)] if bias else [])),
        outputs=(Result("y", dtype, n),),
        constants=({} if bias else {"bias": None})
        | {"K": k, "N": n, "TILE": tile, "BLOCK_ROWS": block.rows, "BLOCK": block.outputs, "COLUMNS": columns}
        | {"TOGETHER": together(hint, block), "KIND": kind, "EPS": eps, "EPILOGUE": epilogue},
        rows_each=block.rows,
        columns=columns,
        warps=block.warps,
        stages=block.stages,
    )
