"""Masks of attention as something to add to the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from normfuse.export.onnx.build import Build, Size, const_of, dims

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Bias", "bias_of"]


class Scored(Protocol):
    """What a mask is added to."""

    @property
    def node(self) -> ir.Node: ...

    @property
    def query(self) -> ir.Value: ...

    @property
    def key(self) -> ir.Value: ...

    @property
    def dtype(self) -> ir.DataType: ...


@dataclass(frozen=True)
class Bias:
    """What a mask does.

    Attributes:
        values: added to the scores; None when nothing is hidden.
        alive: 1 for a query that sees some key and 0 for one that sees none, (…, L, 1); None when every query sees one.
    """

    values: ir.Value | None = None
    alive: ir.Value | None = None


def bias_of(mask: ir.Value | None, site: Scored, at: Build, *, causal: bool) -> Bias:
    """The mask of a site; the same mask at many sites is built once.

    A boolean mask becomes 0 and half of the lowest number, not -inf: softmax gives 0 for it all the same, and a query that
    sees no key gives no NaN. Its output is set to zero through `alive`, as torch does.
    """
    if mask is None:
        return Bias(_causal(site, at)) if causal else Bias()
    if mask.dtype != at.ir.DataType.BOOL:
        return Bias(mask)
    dtype = site.dtype
    key = ("mask", id(mask), dtype)
    if key not in at.shared:
        constant = const_of(mask)
        hidden = np.asarray(_lowest(dtype), dtype.numpy())
        if constant is not None:
            values = at.const(np.where(constant, np.zeros((), hidden.dtype), hidden).astype(hidden.dtype))
        else:
            values = at.op("Where", mask, at.const(np.zeros((), hidden.dtype)), at.const(hidden), dtype=dtype, shape=dims(mask))
        alive = None
        if constant is None or not constant.any(-1).all():
            seen = at.op("Cast", mask, to=int(dtype), dtype=dtype)
            alive = at.op("ReduceMax", seen, at.const(np.array([-1], np.int64)), keepdims=1, dtype=dtype)
        at.shared[key] = Bias(values, alive)
    found: Bias = at.shared[key]
    return found


def _lowest(dtype: ir.DataType) -> float:
    # half of it: a score may be added without reaching -inf
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype.numpy()).min) / 2  # type: ignore[no-untyped-call]


def _causal(site: Scored, at: Build) -> ir.Value:
    """0 where key j ≤ query i, else the lowest number; from the sizes at run time when they vary."""
    q, k, dtype = dims(site.query), dims(site.key), site.dtype
    length, keys = (q[-2] if q else None), (k[-2] if k else None)
    key = ("causal", length, keys, dtype, None if length is not None and keys is not None else id(site.node))
    if key not in at.shared:
        at.shared[key] = _triangle(site, at, length, keys)
    made: ir.Value = at.shared[key]
    return made


def _triangle(site: Scored, at: Build, length: Size | None, keys: Size | None) -> ir.Value:
    q, dtype = dims(site.query), site.dtype
    hidden = np.asarray(_lowest(dtype), dtype.numpy())
    if isinstance(length, int) and isinstance(keys, int):
        seen = np.tril(np.ones((length, keys), bool))
        return at.const(np.where(seen, np.zeros((), hidden.dtype), hidden).astype(hidden.dtype))
    rank = len(q) if q else 4
    rows = at.op("Shape", site.query, start=rank - 2, end=rank - 1)
    columns = at.op("Shape", site.key, start=rank - 2, end=rank - 1)
    all_hidden = at.op("Expand", at.const(hidden), at.op("Concat", rows, columns, axis=0), dtype=dtype)
    # Trilu keeps what lies above the diagonal and writes 0 on and below it
    return at.op("Trilu", all_hidden, at.const(np.asarray(1, np.int64)), upper=1, dtype=dtype)
