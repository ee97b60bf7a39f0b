"""How far apart two runs of the same function are: largest deviation, SQNR, bounds; and inputs like others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from normfuse.described import dtype_name
from normfuse.errors import RewriteError
from normfuse.reports.model import Error

__all__ = [
    "EXACT_BOUND", "TOLERANCE", "decibels", "distance", "is_float", "like", "magnitude", "measure", "nothing_in", "resembling",
    "sqnr", "tolerance_of",
]  # fmt: skip

EXACT_BOUND = 1e-9
"""Relative error in float64 above which a rewrite is not an identity: 2⁻⁵² times 10⁶ for a deep network's conditioning."""

#: Bound on max |difference| / max |expected| of two runs that round at other places, by dtype; the mantissa width beside it.
#: About a thousand roundings in float32 and float64, twenty in the half formats.
TOLERANCE = {
    torch.float64: 1e-9,  # 52 bits
    torch.float32: 1e-4,  # 23 bits
    torch.float16: 2e-2,  # 10 bits
    torch.bfloat16: 1e-1,  # 7 bits
}


def tolerance_of(dtype: str) -> float:
    """The bound for a dtype by its name, e.g. `float16`; that of float32 for others."""
    return next((bound for d, bound in TOLERANCE.items() if dtype_name(d) == dtype), TOLERANCE[torch.float32])


def measure(expected: Sequence[Tensor], found: Sequence[Tensor], dtype: str, floors: Sequence[float] | None = None) -> Error:
    """The largest deviation over all outputs; integers and booleans must agree exactly, NaN and infinity stand at the same places.

    Args:
        expected, found: outputs of two runs.
        dtype: that both ran in, for the report.
        floors: for each output, the least scale that its deviation is divided by; see `floors`. None divides by max |expected|.

    Raises:
        RewriteError: the number or the shapes of the outputs differ.
    """
    if [tuple(t.shape) for t in expected] != [tuple(t.shape) for t in found]:
        raise RewriteError(f"outputs changed shape: {[tuple(t.shape) for t in expected]} became {[tuple(t.shape) for t in found]}")
    worst = Error(0.0, 0.0, dtype)
    for a, b, floor in zip(expected, found, floors or [0.0] * len(expected), strict=True):
        worst = worst | _deviation(a, b, dtype, floor)
    return worst


def _deviation(a: Tensor, b: Tensor, dtype: str, floor: float) -> Error:
    difference, scale = distance(a, b), max(magnitude(a), floor)
    if difference == 0.0:
        return Error(0.0, 0.0, dtype)
    if math.isinf(floor):
        return Error(difference, 0.0, dtype)
    return Error(difference, difference / scale if scale > 0 else math.inf, dtype)


def distance(a: Tensor, b: Tensor) -> float:
    """max |a − b|; 1 for integers and booleans that differ, infinite where only one is NaN or infinite."""
    if a.numel() == 0:
        return 0.0
    if not is_float(a) or not is_float(b):
        return 0.0 if torch.equal(a, b) else 1.0
    a, b = _reals(a), _reals(b)
    odd = ~a.isfinite()
    if not torch.equal(a[odd].nan_to_num(7.0), b[odd].nan_to_num(7.0)) or not bool(b[~odd].isfinite().all()):
        return math.inf
    return 0.0 if bool(odd.all()) else float((a[~odd] - b[~odd]).abs().max())


def magnitude(a: Tensor) -> float:
    """max |a| of the finite values; 1 for integers and booleans."""
    if not is_float(a):
        return 1.0
    values = _reals(a)
    values = values[values.isfinite()]
    return float(values.abs().max()) if values.numel() else 0.0


def is_float(t: Tensor) -> bool:
    """Real or complex floating point?"""
    return t.is_floating_point() or t.is_complex()


def _reals(t: Tensor) -> Tensor:
    """In float64; a complex number as two."""
    t = t.to_dense() if t.layout is not torch.strided else t
    return torch.view_as_real(t.to(torch.complex128).resolve_conj()) if t.is_complex() else t.double()


def decibels(pairs: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> float:
    """SQNR of found against expected floating-point outputs, 10 log₁₀ (Σ y² / Σ (y − ŷ)²); infinite if they are equal."""
    signal = noise = 0.0
    for expected, found in pairs:
        for a, b in zip(expected, found, strict=True):
            if is_float(a):
                x, y = _reals(a), _reals(b)
                finite = x.isfinite()
                signal += float(x[finite].square().sum())
                noise += float((x[finite] - y[finite]).square().sum())
    return sqnr(signal, noise)


def sqnr(signal: float, noise: float) -> float:
    """10 log₁₀ (signal / noise), for sums of squares; infinite for no noise."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and noise < math.inf else -math.inf


def nothing_in(runs: Sequence[Sequence[Tensor]]) -> str:
    """Why a comparison with these outputs tells nothing: `nothing was compared: all outputs are zero`; empty when it does.

    Args:
        runs: the outputs of one call or of several, with other inputs.
    """
    if not runs[0]:
        return "nothing was compared: the model returns no tensor"
    silent = [_silence([outputs[i] for outputs in runs]) for i in range(len(runs[0]))]
    if not all(silent):
        return ""
    which = "the output is" if len(silent) == 1 else "all outputs are"
    return f"nothing was compared: {which} {' or '.join(dict.fromkeys(silent))}"


def _silence(runs: Sequence[Tensor]) -> str:
    """Why an output tells nothing of the model: `NaN`, `zero`, `constant`; empty when it does."""
    first = runs[0]
    if first.numel() == 0:
        return "empty"
    if is_float(first) and not bool(first.isfinite().any()):
        return "NaN or infinite"
    if not bool(first.ne(0).any()):
        return "zero"
    flat = first.reshape(-1)
    if first.numel() > 1 and bool((flat == flat[0]).all()):
        return "constant"
    if len(runs) > 1 and first.shape == runs[1].shape and bool(torch.equal(first, runs[1])):
        return "constant"
    return ""


def like(inputs: Sequence[Any], seed: int) -> list[Any]:
    """Random inputs of the same shapes and dtypes; see `resembling`. What is no tensor stays."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return [resembling(v, generator) if isinstance(v, Tensor) else v for v in inputs]


def resembling(value: Tensor, generator: torch.Generator, shape: Sequence[int] | None = None) -> Tensor:
    """Random values of the same dtype, of the same or another `shape`: normal with the mean and the spread of the finite ones of
    `value`; integers and booleans are its own in another order, so that indices stay in range."""
    sizes = tuple(value.shape if shape is None else shape)
    if value.numel() == 0:
        return value if shape is None else value.new_zeros(sizes)
    if value.is_complex():
        return torch.complex(resembling(value.real, generator, shape), resembling(value.imag, generator, shape))
    if value.is_floating_point():
        x = torch.randn(sizes, generator=generator, dtype=torch.float32, device="cpu").to(value.device)
        finite = value[value.isfinite()].double()
        spread = float(finite.std()) if finite.numel() > 1 else 1.0
        centre = float(finite.mean()) if finite.numel() else 0.0
        return (x * (spread or 1.0) + centre).to(value.dtype)
    if shape is None:
        order = torch.randperm(value.numel(), generator=generator, device="cpu")
    else:
        order = torch.randint(0, value.numel(), (math.prod(sizes),), generator=generator, device="cpu")
    return value.reshape(-1)[order.to(value.device)].reshape(sizes)
