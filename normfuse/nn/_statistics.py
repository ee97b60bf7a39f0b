"""What the layers with running statistics share: sums over ranks, statistics in float32, forwards that run a second time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.nn._moments import recomputing
from normfuse.ranks import several_ranks

__all__ = [
    "Joint",
    "Mean",
    "RunningStatistics",
    "Step",
    "mean_over_ranks",
    "mean_square",
    "statistics_dtype",
]

Step = TypeVar("Step")
Layer = TypeVar("Layer", bound="RunningStatistics[Any]")

_KEPT = 32  # forwards that may lie between a forward and its recomputation: a shared layer, several micro-batches

_SAME = 1e-3  # relative distance up to which two inputs are one input: kernels may add in another order the second time


@dataclass(frozen=True)
class Joint:
    """Number, mean and biased variance of the rows of a data set, feature by feature, in float64.

    Attributes:
        count: the number of rows.
        mean, var: (C,).
    """

    count: int
    mean: Tensor
    var: Tensor

    def merge(self, other: Joint) -> Joint:
        """n = n₁ + n₂,  μ = μ₁ + δ n₂/n,  n v = n₁ v₁ + n₂ v₂ + δ² n₁ n₂ / n,  δ = μ₂ − μ₁   (Chan et al. 1979)"""
        if not self.count or not other.count:
            return self if self.count else other
        count, delta = self.count + other.count, other.mean - self.mean
        part = other.count / count
        var = (1 - part) * self.var + part * other.var + delta.square() * part * (1 - part)
        return Joint(count, self.mean + delta * part, var)


@dataclass(frozen=True)
class Mean:
    """A mean over the rows of all ranks, and the one over the rows of this rank."""

    everywhere: Tensor
    here: Tensor


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest of the dtypes, at least float32: squares of float16 values above 255 overflow."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def mean_square(x: Tensor, kept: Tensor | None = None) -> Mean:
    """mean over the rows of x², for each of the features on the last axis.

    Args:
        x: (..., C).
        kept: (...) bool, True for the rows that count; None for all.

    Raises:
        UsageError: there is no row on any rank.
    """
    squares = x.to(statistics_dtype(x)).square().flatten(0, -2)  # (rows, C)
    if kept is None:
        return mean_over_ranks(squares.sum(0), squares.shape[0])
    rows = kept.flatten().unsqueeze(-1)
    return mean_over_ranks(torch.where(rows, squares, 0.0).sum(0), rows.sum())


def mean_over_ranks(sums: Tensor, count: int | Tensor) -> Mean:
    """Σ sums / Σ count, the outer sums over the ranks of the default process group if there are several.

    Args:
        sums: (C,) sums over the rows of this rank.
        count: the number of these rows, of shape () if it is a tensor.

    Raises:
        UsageError: there is no row on any rank.
    """
    here, everywhere = sums / (count if isinstance(count, Tensor) else max(count, 1)), count
    if several_ranks():
        total = torch.cat((sums, torch.as_tensor(count, dtype=sums.dtype, device=sums.device).reshape(1)))
        dist.all_reduce(total)
        sums, everywhere = total[:-1], total[-1]
    # where a row is sure to be there nobody asks, because that would wait for the device
    unsure = isinstance(count, Tensor) or count == 0
    if unsure and not torch.compiler.is_exporting() and int(everywhere) == 0:
        raise UsageError(
            "no row to take statistics of: the batch is empty or all of it is padding; "
            "skip such a batch in training, or call .eval() first"
        )
    return Mean(sums / everywhere, here)


# -- forwards that run a second time -----------------------------------------------------------------------------------


@dataclass
class _Kept(Generic[Step]):
    key: Tensor
    step: Step
    uses: int = 0


class RunningStatistics(nn.Module, Generic[Step]):
    """A layer whose training forward changes its own statistics, once for each batch.

    Activation checkpointing runs a forward again inside the backward pass. The statistics have moved on by then, so that
    the step is looked up instead of taken again. Its key is a statistic of the input, since neither the order nor the
    number of recomputations is known: a layer may be shared, and several batches may wait for their backward. The last 32
    steps are kept; an input that none of them had is a new step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps: deque[_Kept[Step]] = deque(maxlen=_KEPT)

    def keep_step(self, key: Tensor, step: Step) -> None:
        """Keep what the forward of an input with this key did, for its recomputation."""
        if not torch.compiler.is_compiling():  # tensors without values
            self._steps.append(_Kept(key.detach(), step))

    def recomputed_step(self, key: Tensor) -> Step | None:
        """What the first forward of this input did; None if this is the first one."""
        if not recomputing() or not self._steps:
            return None
        far = torch.stack([(kept.key - key).norm() for kept in self._steps]).tolist()
        # of equal inputs the one that was recomputed least, of these the last: backward goes from the last to the first
        at = min(range(len(far)), key=lambda i: (far[i], self._steps[i].uses, -i))
        kept = self._steps[at]
        if not far[at] <= _SAME * float(key.norm()):
            return None
        kept.uses += 1
        return kept.step

    def train(self: Layer, mode: bool = True) -> Layer:
        self._steps.clear()
        return super().train(mode)

    def _apply(self: Layer, *args: Any, **kwargs: Any) -> Layer:
        self._steps.clear()  # they would stay on the old device
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_steps": deque(maxlen=_KEPT)}  # copies and pickles wait for no backward
