"""`quantize_weight`: a float matrix into codes, exponents and scales."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.blocks import by_blocks
from normfuse.quant.gptq import gptq_codes
from normfuse.quant.search import Problem, by_range, by_search
from normfuse.quant.shift import rounded
from normfuse.quant.spec import ShiftQuant
from normfuse.quant.weight import BLOCK_BITS, QuantizedWeight

__all__ = ["quantize_weight", "weighted_error"]

_FLOOR = 1e-4  # of the mean moment: what the calibration data never excites is still worth something
_LIMIT = float(torch.finfo(torch.float32).max)
_TINY = float(torch.finfo(torch.float32).tiny)


def quantize_weight(
    weight: Tensor,
    spec: ShiftQuant,
    *,
    moments: Tensor | None = None,
    hessian: Tensor | None = None,
    channel_groups: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> QuantizedWeight:
    """Ŵ[n, k] = S[n] · 2^(−e[k]) · C[n, k] near W, or S[n] · m[n, ⌊k / block⌋] · C[n, k] where `spec` has blocks and up to 4 bits.

    `spec.exponents` "range" takes e from the largest weight of each channel (arXiv 2411.10948); "search" minimizes
    Σ_k m[k] Σ_n (W − Ŵ)² over e and S and is never worse than "range" by that measure. Rounding is to the nearest, stochastic, or
    GPTQ with e and S given. Multipliers of blocks are those of `normfuse.quant.blocks`, and there are no exponents then.

    All arithmetic is in float64, a few rows at a time; the scale is rounded to float32 before codes are taken. Scales are
    at least 2^-126, so that weights far below that become 0.

    Args:
        weight: W, [N, K], any float dtype.
        spec: weight_bits, groups, group_size, block, granularity, exponents and rounding are used.
        moments: m[k] = E[x_k²] over the calibration data, [K]; without them the diagonal of `hessian`, or 1.
        hessian: E[x xᵀ], [K, K], needed for rounding="gptq"; "auto" rounds to the nearest without it.
        channel_groups: integers [K], the input channel that column k reads, where several (the taps of a convolution) read the
            same and share its exponent; without it each column is a channel. `group_size` neighbouring channels go together.
        generator: of stochastic rounding; by default one seeded with `spec.seed`.

    Raises:
        UsageError: shapes do not fit, W or the moments hold NaN or Inf, W is beyond float32, or gptq has no hessian.
    """
    weight, whole, k = _checked(weight), spec.granularity == "per_tensor", weight.shape[1]
    slots, m = _slots(k, spec.group_size, channel_groups), _moments(k, moments, hessian)
    problem = Problem(weight, spec.weight_bits, spec.groups, slots, m, whole)
    if spec.rounding == "gptq" and hessian is None:
        raise UsageError("rounding='gptq' without second moments of the inputs; give calibration data, or rounding='nearest'")
    if spec.block and spec.weight_bits <= BLOCK_BITS and channel_groups is None:
        found = _in_blocks(problem, spec.block)
    else:
        found = _nearest(problem, *_scaled(problem, spec))
    if spec.rounding == "nearest" or (spec.rounding == "auto" and hessian is None):
        return found
    step = found.scale.double()[:, None] * found.units().double()
    if hessian is None or spec.rounding == "stochastic":
        codes = _stochastic(
            problem, step, found.code_range, torch.Generator().manual_seed(spec.seed) if generator is None else generator
        )
    else:
        codes = gptq_codes(problem.weight, step, hessian.detach().cpu(), *found.code_range)
    return dataclasses.replace(found, codes=codes)


def _in_blocks(problem: Problem, block: int) -> QuantizedWeight:
    """With multipliers, rounded to the nearest."""
    scale, multipliers = by_blocks(problem, block)
    scales = scale.clamp(min=_TINY).float()
    n, k = problem.weight.shape
    none = torch.zeros(k, dtype=torch.uint8)
    found = QuantizedWeight(torch.zeros((n, k), dtype=torch.int8), none, scales, problem.bits, multipliers, block)
    units = found.units()
    for rows, part in problem.blocks():
        y = part.div_(scales[rows, None].double() * units[rows])
        found.codes[rows] = y.round_().clamp_(*found.code_range).to(torch.int8)
    return found


def _scaled(problem: Problem, spec: ShiftQuant) -> tuple[Tensor, Tensor]:
    """Exponents and scales."""
    found = by_range(problem)
    if spec.exponents != "search":
        return found
    # by its own measure a search is never worse; but scales are rounded to float32 last, and that could cost more than it won
    candidates = (found, by_search(problem))
    errors = [weighted_error(problem.weight, _nearest(problem, *candidate), problem.moments) for candidate in candidates]
    return candidates[errors[1] <= errors[0]]


def _stochastic(problem: Problem, step: Tensor, code_range: tuple[int, int], generator: torch.Generator) -> Tensor:
    codes = torch.empty(problem.weight.shape, dtype=torch.int8)
    for rows, block in problem.blocks():
        codes[rows] = rounded(block / step[rows].expand_as(block), "stochastic", generator).clamp_(*code_range).to(torch.int8)
    return codes


def weighted_error(weight: Tensor, quantized: QuantizedWeight, moments: Tensor | None = None) -> float:
    """Σ_k m[k] Σ_n (W[n, k] − Ŵ[n, k])², m = 1 without moments."""
    m = torch.ones(weight.shape[1], dtype=torch.float64) if moments is None else moments.double()
    total = 0.0
    step = max(1, (1 << 18) // max(1, weight.shape[1]))
    units = quantized.units().expand(weight.shape)
    for i in range(0, weight.shape[0], step):
        rows = slice(i, i + step)
        approximation = quantized.codes[rows].double() * units[rows] * quantized.scale[rows].double()[:, None]
        total += float(((weight[rows].double() - approximation).square_() @ m).sum())
    return total


def _nearest(problem: Problem, e: Tensor, scale: Tensor) -> QuantizedWeight:
    e, stored = _stored(e, scale)
    codes = torch.empty(problem.weight.shape, dtype=torch.int8)
    factor = torch.exp2(e.double() - float(e.max()))
    for rows, block in problem.blocks():
        y = block.mul_(factor).div_(stored[rows, None].double())
        codes[rows] = y.round_().clamp_(-problem.top, problem.top).to(torch.int8)
    return QuantizedWeight(codes, e.to(torch.uint8), stored, problem.bits)


def _stored(e: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents from 0 on, and S · 2^−E in float32: a normal number, so that S · 2^−e is exact."""
    return e - e.min(), (scale * torch.exp2(-e.max().double())).clamp(min=_TINY).float()


def _checked(weight: Tensor) -> Tensor:
    weight = weight.detach().cpu()
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point():
        raise UsageError(f"weight of shape {tuple(weight.shape)} and {weight.dtype}: expected floats [outputs, inputs], not empty")
    largest = float(weight.abs().amax())  # NaN if there is one
    if not largest < _LIMIT:
        count = int((~weight.isfinite()).sum())
        found = f"{count} of {weight.numel()} values are NaN or Inf" if count else f"a value of {largest:g} is beyond float32"
        raise UsageError(
            f"weight {tuple(weight.shape)}: {found}; a quantized weight has none. Mend the checkpoint, or keep the layer"
        )
    return weight


def _slots(k: int, group_size: int, channels: Tensor | None) -> Tensor:
    """The slot of each column: columns of a slot share their exponent."""
    if channels is None:
        return torch.arange(k) // group_size
    if tuple(channels.shape) != (k,) or channels.is_floating_point() or int(channels.min()) < 0:
        raise UsageError(f"channel_groups {tuple(channels.shape)} of {channels.dtype}: expected {k} integers, not negative")
    slots: Tensor = torch.unique(channels.cpu().long() // group_size, return_inverse=True)[1]
    return slots


def _moments(k: int, moments: Tensor | None, hessian: Tensor | None) -> Tensor:
    if hessian is not None and (tuple(hessian.shape) != (k, k) or not bool(hessian.isfinite().all())):
        raise UsageError(f"hessian {tuple(hessian.shape)}: expected finite numbers [{k}, {k}]")
    if moments is None and hessian is not None:
        moments = hessian.diagonal()
    if moments is None:
        return torch.ones(k, dtype=torch.float64)
    m = moments.detach().cpu().double()
    if tuple(m.shape) != (k,) or not bool((m >= 0).all() & m.isfinite().all()):
        raise UsageError(f"moments {tuple(m.shape)}: expected {k} finite numbers, not negative (the mean squares of the inputs)")
    mean = float(m.mean())
    return m / mean + _FLOOR if mean > 0 else torch.ones_like(m)
