"""Scales of blocks: a small integer for some neighbouring input channels of an output, times the float scale of the output.

    Ŵ[n, k] = S[n] · m[n, ⌊k / block⌋] · C[n, k],   C in −2^(bits−1) … 2^(bits−1) − 1,   1 ≤ |m| ≤ 127 // 2^(bits−1)

C · m is an integer of 8 bits, so that a product stays one exact integer sum. A negative m puts the code that has no counterpart on
the other side of 0: it is there for the largest weight of a block. Scales lower J = Σ_k μ[k] Σ_n (W − Ŵ)², μ as in
`normfuse.quant.search`: first each block by itself with a float scale, then S such that small integers come near all of them, then
S by least squares and each m by trying its neighbours. In the last two steps J never rises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from normfuse.quant.search import Problem
from normfuse.quant.weight import largest_multiplier

__all__ = ["by_blocks"]

_RATIOS = (1.0, 0.93, 0.86, 0.8, 0.73)  # of the scale of a block that clips nothing
_PARTS = (1.0, 0.92, 0.84, 0.76)  # of the largest multiplier: what the largest scale of an output becomes
_TURNS = 2
_CHUNK = 1 << 16  # values at a time: several copies of them fit into the cache


def by_blocks(problem: Problem, block: int) -> tuple[Tensor, Tensor]:
    """S, float64 [N] and positive, and m, int8 [N, ⌈K / block⌉]."""
    n, k = problem.weight.shape
    scale = torch.empty(n, dtype=torch.float64)
    multipliers = torch.empty((n, -(-k // block)), dtype=torch.int8)
    moments = F.pad(problem.moments, (0, -k % block)).view(-1, block).float()
    for rows, w in _blocks(problem.weight, block):
        part = _Rows(w, moments, problem.top, largest_multiplier(problem.bits))
        scale[rows], multipliers[rows] = part.scales()
    return scale, multipliers


def _blocks(weight: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time as float32 [rows, blocks, block], the last block padded with zeros."""
    n, k = weight.shape
    step = max(1, _CHUNK // k)
    for i in range(0, n, step):
        rows = slice(i, min(n, i + step))
        yield rows, F.pad(weight[rows].float(), (0, -k % block)).unflatten(1, (-1, block))


class _Rows:
    """Some outputs: their weights [rows, blocks, block], μ [blocks, block], the largest code and the largest multiplier."""

    def __init__(self, w: Tensor, moments: Tensor, top: int, most: int) -> None:
        self.w, self.moments, self.top, self.most = w, moments, top, most

    def scales(self) -> tuple[Tensor, Tensor]:
        """S, float64 [rows], and m, [rows, blocks]."""
        each = self._of_blocks()
        largest = each.abs().amax(1)
        largest = torch.where(largest > 0, largest, 1.0)
        candidates = torch.stack([largest / (part * self.most) for part in _PARTS])
        found = [self._around(each / s[:, None], s) for s in candidates]
        best = torch.stack([cost.sum(1) for _, cost in found]).argmin(0)
        scale, rows = candidates[best, torch.arange(len(best))], torch.arange(len(best))
        m = torch.stack([m for m, _ in found])[best, rows]
        for _ in range(_TURNS):
            scale = self._least_squares(scale, m)
            m, _ = self._least(scale, [self._sized(m.sign(), m.abs() + d) for d in (-1, 0, 1)])
        return self._least_squares(scale, m).double(), m.to(torch.int8)

    def _of_blocks(self) -> Tensor:
        """The best fraction of the two scales of each block that clip nothing, one of them negative; 0 for blocks of zeros."""
        above, below = self.w.amax(2).clamp(min=0), self.w.amin(2).clamp(max=0).abs()
        positive = torch.maximum(above / self.top, below / (self.top + 1))
        negative = -torch.maximum(below / self.top, above / (self.top + 1))
        candidates = torch.stack([base * ratio for base in (positive, negative) for ratio in _RATIOS])
        costs = torch.stack([self._costs(torch.where(s == 0, 1.0, s)) for s in candidates])
        return candidates.gather(0, costs.argmin(0, keepdim=True))[0]

    def _sized(self, sign: Tensor, size: Tensor) -> Tensor:
        return torch.where(sign < 0, -1.0, 1.0) * size.clamp(1, self.most)

    def _codes(self, y: Tensor) -> Tensor:
        return y.round().clamp_(-self.top - 1, self.top)

    def _costs(self, scale: Tensor) -> Tensor:
        """J of each block, [rows, blocks], with the scale of each block."""
        y = self.w / scale.unsqueeze(2)
        error = self._codes(y).sub_(y).square_()
        return torch.einsum("rbi,bi->rb", error, self.moments).mul_(scale.square())

    def _around(self, m: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The better one of the two integers around each multiplier, and its J."""
        below = m.abs().floor()
        return self._least(scale, [self._sized(m, below), self._sized(m, below + 1)])

    def _least(self, scale: Tensor, candidates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        cost, best = torch.stack([self._costs(scale[:, None] * m) for m in candidates]).min(0)
        return torch.stack(list(candidates)).gather(0, best[None])[0], cost

    def _least_squares(self, scale: Tensor, m: Tensor) -> Tensor:
        """S = Σ μ w v / Σ μ v² for the integers v = m · C that there are."""
        v = self._codes(self.w / (scale[:, None] * m).unsqueeze(2)) * m.unsqueeze(2)
        above, below = torch.einsum("rbi,rbi,bi->r", self.w, v, self.moments), torch.einsum("rbi,rbi,bi->r", v, v, self.moments)
        return torch.where((below > 0) & (above > 0), above / below, scale)
