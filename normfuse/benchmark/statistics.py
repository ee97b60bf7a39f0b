"""Medians and how sure they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "median_interval"]

_RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A value and the range that holds it with the stated confidence."""

    low: float
    value: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median_interval(samples: Sequence[float], *, confidence: float, seed: int) -> Interval:
    """The median of `samples` with a percentile bootstrap interval (Efron, Ann. Statist. 7, 1979).

    The same samples and seed always give the same interval. One sample gives an interval of width zero.
    """
    values = np.asarray(samples, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, values.size, (_RESAMPLES, values.size))
    medians = np.median(values[picks], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, (tail, 1 - tail))
    return Interval(float(low), float(np.median(values)), float(high), confidence)
