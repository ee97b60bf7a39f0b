"""Exponents and scales of a weight: from ranges, and by minimizing the error of the product.

    J(e, S) = Σ_k m[k] Σ_n (W[n, k] − Ŵ[n, k])²,   Ŵ[n, k] = S[n] 2^(−e[k]) clamp(rne(W[n, k] 2^e[k] / S[n]), ±qmax)

m[k] is the mean square of what channel k is multiplied with: where those are uncorrelated, J is the expected square of the
error of the product. Given S the channels are independent of each other, given e the rows are; so both are searched in turn,
each exhaustively over its candidates, and J never rises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normfuse.quant.shift import range_exponents

__all__ = ["Problem", "by_range", "by_search"]

_CHUNK = 1 << 16  # values at a time: several copies of them fit into the cache
_RATIOS = tuple(0.9**i for i in range(20))  # of the scale that clips nothing; the last is 0.135
_STARTS = (0.5, 0.7, 1.4, 2.0)
_TURNS = 4
_POLISH = 3
_FEW, _SOME = 256, 1024  # rows: to compare starts, and to descend from the best of them


@dataclass(frozen=True, eq=False)
class Problem:
    """One weight to be quantized.

    Attributes:
        weight: [N, K], finite, any float dtype.
        bits: of a code.
        groups: how many exponents there may be.
        slots: int64 [K]: columns of one slot share their exponent; 0 … slots.max().
        moments: m, float64 [K], positive.
        whole: one scale for the whole weight, not one a row.
    """

    weight: Tensor
    bits: int
    groups: int
    slots: Tensor
    moments: Tensor
    whole: bool

    @property
    def top(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def sample(self, rows: int) -> Problem:
        """About so many of its rows, evenly spread."""
        stride = self.weight.shape[0] // rows
        return dataclasses.replace(self, weight=self.weight[::stride]) if stride > 1 else self

    def blocks(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor]]:
        """The weight, some rows at a time: float32 is precise enough to compare candidates."""
        n, k = self.weight.shape
        step = max(1, _CHUNK // max(1, k))
        for i in range(0, n, step):
            rows = slice(i, min(n, i + step))
            yield rows, self.weight[rows].to(dtype, copy=True)  # readers write into it


def by_range(problem: Problem) -> tuple[Tensor, Tensor]:
    """e = clamp(⌊log2(r0 / r[k])⌋, 0, groups − 1) and the smallest scales that clip nothing.

    r[k] is the largest |W[n, k]|, relative to the largest of its row where rows have scales of their own, so that a row of
    small numbers counts like any other.

    Returns:
        e, int64 [K], and S, float64 [N].
    """
    k = problem.weight.shape[1]
    ranges = torch.zeros(k, dtype=torch.float64)
    for _, block in problem.blocks():
        size = block.abs()
        if not problem.whole:
            largest = size.amax(1, keepdim=True)
            size = torch.where(largest > 0, size / largest, 0.0)
        ranges = torch.maximum(ranges, size.amax(0))
    shared = torch.zeros(int(problem.slots.max()) + 1, dtype=torch.float64).scatter_reduce(0, problem.slots, ranges, "amax")
    # a slot of zeros has nothing to lose, and with exponent 0 it makes no group of its own
    e = torch.where(shared > 0, range_exponents(shared, problem.groups).long(), 0)[problem.slots]
    return e, unclipped(problem, e)


def by_search(problem: Problem) -> tuple[Tensor, Tensor]:
    """The e and S of the least J that was found.

    The descent ends in different valleys, depending on where it starts: with the exponents of `by_range`, and with scales
    some way below and above theirs. Exponents sum over the rows, so that samples of the rows decide: few on the start, more on
    the end.

    Returns:
        e, int64 [K], and S, float64 [N].
    """
    few, some = problem.sample(_FEW), problem.sample(_SOME)
    e, scale = by_range(few)
    starts = [e, *(_best_exponents(few, scale * ratio) for ratio in _STARTS)]
    e, scale, _ = min((_descent(few, e, scale) for e in starts), key=lambda found: found[2])
    if some is not few:
        e, scale, _ = _descent(some, e, unclipped(some, e))
    scale, _ = _best_scales(problem, e, scale if some is problem else unclipped(problem, e), _RATIOS)
    return e, _polished(problem, e, scale)


def _descent(problem: Problem, e: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, float]:
    scale, cost = _best_scales(problem, e, scale, _RATIOS[::2])
    for _ in range(_TURNS):
        new = _best_exponents(problem, scale)
        if torch.equal(new, e):
            break
        new_scale, new_cost = _best_scales(problem, new, scale, _RATIOS[::2])
        if not new_cost < cost:
            break
        e, scale, cost = new, new_scale, new_cost
    return e, scale, cost


def unclipped(problem: Problem, e: Tensor) -> Tensor:
    """S[n] = max_k |W[n, k]| 2^e[k] / qmax, positive."""
    scale = torch.empty(problem.weight.shape[0], dtype=torch.float64)
    for rows, block in problem.blocks():
        scale[rows] = (block.abs() * torch.exp2(e.double())).amax(1) / problem.top
    return _positive(scale.amax().expand_as(scale).clone() if problem.whole else scale)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _best_exponents(problem: Problem, scale: Tensor) -> Tensor:
    """For each slot the exponent with the least Σ m (W − Ŵ)²."""
    cost = torch.zeros((problem.groups, problem.weight.shape[1]), dtype=torch.float64)
    for rows, block in problem.blocks(torch.float32):
        s = scale[rows].float()
        y = block / s[:, None]
        for i in range(problem.groups):
            error = y.round().clamp_(-problem.top, problem.top).sub_(y).square_()
            cost[i] += (s * s * 0.25**i) @ error
            y.mul_(2.0)
    cost *= problem.moments
    shared = torch.zeros((problem.groups, int(problem.slots.max()) + 1), dtype=torch.float64).index_add_(1, problem.slots, cost)
    return shared.argmin(0)[problem.slots]


def _best_scales(problem: Problem, e: Tensor, current: Tensor, ratios: Sequence[float]) -> tuple[Tensor, float]:
    """The best of these fractions of the unclipped scale, and of the scale that there is; and its J."""
    base = unclipped(problem, e)
    factor, weights = torch.exp2(e.double()), problem.moments * torch.exp2(-2.0 * e.double())
    candidates = torch.stack([current, *(base * ratio for ratio in ratios)])  # (candidate, row)
    cost = torch.empty_like(candidates)
    for rows, block in problem.blocks(torch.float32):
        block *= factor.float()
        for i, s in enumerate(candidates[:, rows].float()):
            cost[i, rows] = _row_costs(block, s, weights.float(), problem.top).double()
    if problem.whole:
        cost = cost.sum(1, keepdim=True)
        least = cost[:, 0].argmin()
        return candidates[least].clone(), float(cost[least, 0])
    least = cost.argmin(0, keepdim=True)
    return candidates.gather(0, least)[0], float(cost.gather(0, least).sum())


def _row_costs(y: Tensor, scale: Tensor, weights: Tensor, top: int) -> Tensor:
    """Σ_k weights (y − scale · code)² of each row, y already times 2^e."""
    t = y / scale[:, None]
    error = t.round().clamp_(-top, top).sub_(t).square_()
    return (error @ weights).mul_(scale * scale)


def _polished(problem: Problem, e: Tensor, scale: Tensor) -> Tensor:
    """Scales of least squares for the codes that they give, S = Σ w y c / Σ w c², a few times; J never rises."""
    factor, weights = torch.exp2(e.double()), problem.moments * torch.exp2(-2.0 * e.double())
    for _ in range(_POLISH):
        above, below = torch.zeros_like(scale), torch.zeros_like(scale)
        for rows, block in problem.blocks():
            block *= factor
            codes = (block / scale[rows, None]).round_().clamp_(-problem.top, problem.top)
            above[rows], below[rows] = (block * codes) @ weights, codes.square_() @ weights
        if problem.whole:
            above, below = above.sum().expand_as(scale), below.sum().expand_as(scale)
        scale = torch.where((below > 0) & (above > 0), above / below, scale)
    return scale
