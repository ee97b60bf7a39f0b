"""Operators whose result may jump where a rounding differs: floor, comparisons, signs, places, bits.

Of constants these are computed in the dtypes of the model, step by step; float64 would be more precise and decide otherwise.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["jumps"]

_JUMPS = {
    # to whole numbers
    *("floor", "ceil", "round", "trunc", "fix", "frac", "fmod", "remainder", "floor_divide", "frexp"),
    # by sign, threshold or branch
    *("sign", "sgn", "signbit", "copysign", "heaviside", "hardshrink", "threshold", "angle", "atan2", "arctan2", "nextafter"),
    # comparisons
    *("eq", "ne", "lt", "le", "gt", "ge", "isclose", "allclose", "equal", "isinf", "isnan", "isfinite", "isposinf", "isneginf"),
    *("isreal", "isin", "logical_and", "logical_or", "logical_xor", "logical_not", "any", "all", "nan_to_num"),
    *("greater", "greater_equal", "less", "less_equal", "not_equal"),
    # places and counts
    *("argmax", "argmin", "argsort", "sort", "msort", "topk", "kthvalue", "mode", "median", "nanmedian", "cummax", "cummin"),
    *("searchsorted", "bucketize", "nonzero", "count_nonzero", "histc", "histogram", "bincount", "unique_dim", "_unique2"),
    *("unique_consecutive", "_unique", "grid_sampler", "grid_sampler_2d", "grid_sampler_3d"),
    # decompositions that are unique up to signs or order
    *("linalg_qr", "linalg_svd", "_linalg_svd", "linalg_eigh", "_linalg_eigh", "linalg_eig", "linalg_lu", "qr", "svd", "geqrf"),
}


def jumps(target: Any) -> bool:
    """Does the operator decide something by a rounding? Operators that are not PyTorch's own may."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    space, _, name = target._schema.name.partition("::")
    if space != "aten" or target is torch.ops.aten.view.dtype:  # the bits of a value
        return True
    return name in _JUMPS or "mode" in target._overloadname or "quantize" in name
