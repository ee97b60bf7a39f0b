"""Masks of attention as something to add to the scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from normfuse.export.onnx.build import Build, Size, const_of, dims, same_size

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Bias", "bias_of", "full_bias", "hidden_by_infinity"]


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


def bias_of(mask: ir.Value | None, site: Scored, at: Build, *, causal: bool = False) -> Bias:
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


def full_bias(bias: Bias, site: Scored, at: Build) -> Bias:
    """The mask with four axes, the last two not broadcast."""
    if bias.values is None:
        return bias
    have, q, k = dims(bias.values), dims(site.query), dims(site.key)
    known = have is not None and len(have) == 4 and q is not None and k is not None
    if known and same_size(have[2], q[-2]) and same_size(have[3], k[-2]):  # type: ignore[index]
        return bias
    key = ("full", id(bias.values), q and q[-2], k and k[-2])
    if key not in at.shared:
        two = at.const(np.array([1, 1], np.int64))
        length = at.op("Concat", two, _tokens(site.query, at), _tokens(site.key, at), axis=0)
        at.shared[key] = at.op("Expand", bias.values, length, dtype=bias.values.dtype)
    return Bias(at.shared[key], bias.alive)


def hidden_by_infinity(mask: ir.Value, at: Build) -> ir.Value:
    """0 where a mask of bools is true and -inf elsewhere, as operators of ours take it; floats stay. Shared masks stay shared."""
    if mask.dtype != at.ir.DataType.BOOL:
        return mask
    key = ("float mask", id(mask))
    if key not in at.shared:
        seen = const_of(mask)
        if seen is not None:
            at.shared[key] = at.const(np.where(seen, 0, -np.inf).astype(np.float32))
        else:
            zero, hidden = at.const(np.float32(0)), at.const(np.float32(-np.inf))
            at.shared[key] = at.op("Where", mask, zero, hidden, dtype=at.ir.DataType.FLOAT, shape=dims(mask))
    found: ir.Value = at.shared[key]
    return found


def _tokens(value: ir.Value, at: Build) -> ir.Value:
    """The size of the last but one axis, [1]."""
    rank = len(dims(value) or (0, 0, 0, 0))
    return at.op("Shape", value, start=rank - 2, end=rank - 1)


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
    dtype = site.dtype
    hidden = np.asarray(_lowest(dtype), dtype.numpy())
    if isinstance(length, int) and isinstance(keys, int):
        seen = np.tril(np.ones((length, keys), bool))
        return at.const(np.where(seen, np.zeros((), hidden.dtype), hidden).astype(hidden.dtype))
    sizes = at.op("Concat", _tokens(site.query, at), _tokens(site.key, at), axis=0)
    all_hidden = at.op("Expand", at.const(hidden), sizes, dtype=dtype)
    # Trilu keeps what lies above the diagonal and writes 0 on and below it
    return at.op("Trilu", all_hidden, at.const(np.asarray(1, np.int64)), upper=1, dtype=dtype)
