"""Normalizations over the last axis as launches."""

from __future__ import annotations

import functools

from normfuse.errors import UsageError
from normfuse.gpu.launch import Launch, Operand, Result
from normfuse.gpu.tile import FLOATS, check_row, tile
from normfuse.words import KINDS

__all__ = ["plan_norm"]


@functools.lru_cache(maxsize=1024)
def plan_norm(
    kind: str,
    d: int,
    dtype: str,
    *,
    gain: str | None,
    shift: str | None,
    residual: bool,
    eps: float,
    scale_const: float = 1.0,
) -> Launch:
    """sum = x + residual, rounded to dtype;   y = norm(sum) · gain + shift over the last axis, in float32.

    layer: (s − μ) / √(mean (s − μ)² + ε);   rms: s / √(mean s² + ε);   crms: s / √((Σ s² + (Σ s)²) / (d + 1) + ε);
    l1: (s − μ) / (c mean|s − μ| + ε), c = scale_const.

    Args:
        kind: "layer", "rms", "crms" or "l1".
        d: features.
        dtype: of x, residual, y and sum: "fp16", "bf16" or "fp32".
        gain, shift: dtype of that vector, or None where there is none.
        residual: whether there is one; without it there is no sum.
        eps: ε.
        scale_const: c.

    Returns:
        Inputs x[, residual][, gain][, shift]; outputs y[, sum].

    Raises:
        UsageError: the kind, d or a dtype is not one of those.
    """
    if kind not in KINDS:
        raise UsageError(f"norm kernel: kind={kind!r}; expected one of {', '.join(KINDS)}")
    check_row("norm kernel", d, dtype)
    for name, given in (("gain", gain), ("shift", shift)):
        if given is not None and given not in FLOATS:
            raise UsageError(f"norm kernel: {name} of {given!r}; expected one of {', '.join(FLOATS)}")
    there = {"x": dtype, "residual": dtype if residual else None, "gain": gain, "shift": shift}
    missing = {name: None for name, given in there.items() if given is None} | ({} if residual else {"sum": None})
    shape = tile(d)
    sizes = {"D": d, "BLOCK": shape.block} | ({} if shape.long else {"ROWS": shape.rows})
    return Launch(
        kernel="norm.normalize_long" if shape.long else "norm.normalize",
        inputs=tuple(Operand(name, given) for name, given in there.items() if given is not None),
        outputs=(Result("y", dtype, d), *([Result("sum", dtype, d)] if residual else [])),
        constants=missing | sizes | {"KIND": kind, "EPS": float(eps), "SCALE": float(scale_const)},
        rows_each=shape.rows,
        warps=shape.warps,
    )
