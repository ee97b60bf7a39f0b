"""What PowerNorm and UnifiedNorm share: a running mean of squares, one step of it for each batch, warm-up, calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.nn._statistics import Joint, RunningStatistics, Step, mean_square

__all__ = ["QuadraticMean"]


class QuadraticMean(RunningStatistics[Step]):
    """A layer with a running mean of x² over the rows of all ranks. A subclass says what one step does."""

    calibration_stages = 1

    iters: Tensor

    def advance(self, q: Tensor) -> Step:
        """One step of the statistics with mean(x²) of the batch, (C,); what the backward needs of it."""
        raise NotImplementedError

    @torch.no_grad()
    def take_step(self, x: Tensor, kept: Tensor | None) -> Step:
        """The step of this batch, which a forward that runs again in the backward does not take again.

        Args:
            x: (..., C).
            kept: (...) bool, the rows that count; None for all.
        """
        q = mean_square(x, kept)
        step = self.recomputed_step(q.here)
        if step is None:
            step = self.advance(q.everywhere)
            self.keep_step(q.here, step)
        return step

    def reset_warmup(self) -> None:
        """Start the warm-up again: `iters` becomes 0. Call it after loading a checkpoint that is to be fine-tuned."""
        self.iters.zero_()

    @staticmethod
    def calibrate(phi: Tensor, found: tuple[Joint, ...], source_weight: float) -> None:
        """φ ← source_weight φ + (1 − source_weight) mean(x²)"""
        q = (found[-1].var + found[-1].mean.square()).view_as(phi).to(phi)
        phi.copy_(source_weight * phi + (1 - source_weight) * q)
