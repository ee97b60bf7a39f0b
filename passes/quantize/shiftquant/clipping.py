"""One static scale for what a layer reads: from the largest value, a percentile, or the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.passes.quantize.statistics import Statistics, bin_tops
from normfuse.quant.spec import ShiftQuant

__all__ = ["static_scale"]


def static_scale(found: Statistics, spec: ShiftQuant) -> float:
    """s of q = clamp(rne(x / s), ±qmax); 1 for values that are all zero.

    "minmax": s = max|x| / qmax. "percentile": the given percentile of |x| in place of the maximum. "mse": the clipping point
    c = s · qmax with the least Σ (x − x̂)², where a value above c errs by |x| − c, one below s / 2 by |x|, others by s² / 12
    on average.
    """
    top: int = (1 << (spec.activation_bits - 1)) - 1
    largest = float(found.absmax.max()) if found.absmax.numel() else 0.0
    if largest == 0.0:
        return 1.0
    if spec.observer == "minmax":
        return largest / top
    tops = bin_tops()
    if spec.observer == "percentile":
        below = found.histogram.cumsum(0) / found.histogram.sum()
        edge = int((below < spec.percentile / 100).sum())
        return min(float(tops[min(edge, len(tops) - 1)]), largest) / top
    candidates = torch.cat([tops[tops < largest], torch.tensor([largest], dtype=torch.float64)])
    candidates = candidates[candidates > largest / 256]  # clipping away eight octaves is never best
    errors = torch.stack([_error(found.histogram, tops, float(c), top) for c in candidates])
    return float(candidates[int(errors.argmin())]) / top


def _error(histogram: Tensor, tops: Tensor, clip: float, top: int) -> Tensor:
    step = clip / top
    inside = torch.where(tops < step / 2, tops.square(), torch.tensor(step * step / 12, dtype=torch.float64))
    return (histogram * torch.where(tops > clip, (tops - clip).square(), inside)).sum()
