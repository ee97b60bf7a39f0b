"""Does what a rewrite stores fit into its dtype? Half precision ends at 65504 and thins out below 6e-5."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Refuse
from normfuse.ir.views import Op, Value

__all__ = ["in_range", "is_in_range"]

_CHECKED = 1 << 16  # values; larger constants are looked at only in a dtype whose range is short
_ADDED = {"b", "beta", "t", "mean"}  # what is added need not be precise where it is small


def in_range(old: Value, new: Value) -> None:
    """Raise Refuse if a constant of `new` that `old` has not loses more by being stored than its dtype rounds off."""
    for name, c in _constants(new):
        if not any(c is kept for _, kept in _constants(old)):
            problem = _problem(c, precise=name not in _ADDED)
            if problem:
                raise Refuse(f"{c.name or name} would {problem}", blocker=old.node, remedy="keep this layer in float32 or bfloat16")


def is_in_range(old: Value, new: Value) -> bool:
    """Does `in_range` let the new value pass?"""
    try:
        in_range(old, new)
    except Refuse:
        return False
    return True


def _constants(op: Value) -> list[tuple[str, Constant]]:
    if not isinstance(op, Op):
        return []
    held = [(f.name, getattr(op, f.name)) for f in dataclasses.fields(op) if f.name not in ("node", "target")]
    return [(name, v) for name, v in held if isinstance(v, Constant) and v.tensor is None and v.dtype.is_floating_point]


def _problem(c: Constant, *, precise: bool) -> str:
    if c.dtype != torch.float16 and c.numel > _CHECKED:
        return ""
    value, dtype = c.value, str(c.dtype).removeprefix("torch.")
    stored = value.to(c.dtype).double()
    if not bool((stored.isfinite() | ~value.isfinite()).all()):
        return f"overflow {dtype}: {float(value[value.isfinite()].abs().max()):.3g}"
    if precise and value.numel() and bool(value.isfinite().all()) and _fades(value, stored, torch.finfo(c.dtype)):
        return f"lose precision in {dtype}: its values go down to {float(value[value != 0].abs().min()):.3g}"
    return ""


def _fades(value: Tensor, stored: Tensor, info: torch.finfo) -> bool:
    """Is a row, or a column, stored less precisely than the dtype rounds? One far below all others does not matter."""
    error, whole = (value - stored).abs(), value.abs().max()
    if bool(error.max() <= info.eps * info.eps * whole):
        return False
    for dim in range(min(value.ndim, 2)):
        others = [i for i in range(value.ndim) if i != dim]
        rows, errors = (v.amax(others) if others else v for v in (value.abs(), error))
        if bool((errors > info.eps * rows.clamp_min(info.eps * whole)).any()):
            return True
    return False
