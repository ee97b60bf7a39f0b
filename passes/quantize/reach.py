"""From where to where values inside a graph reach on the calibration data: one observer for all who ask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from normfuse.ir.graph import Graph
from normfuse.ir.passes import Samples
from normfuse.passes.quantize.probe import accumulate

__all__ = ["Reach", "reaches"]

_NEVER = -math.inf  # what any maximum replaces


@dataclass(frozen=True)
class Reach:
    """Of a value over the calibration data of all ranks.

    Attributes:
        low: its least number; above `high` where it had none.
        high: its largest.
        finite: none of it was NaN or infinite; `low` and `high` say nothing otherwise.
    """

    low: float
    high: float
    finite: bool = True

    @property
    def known(self) -> bool:
        """There were numbers, and nothing but numbers."""
        return self.finite and self.low <= self.high


def reaches(graph: Graph, samples: Samples, nodes: Sequence[fx.Node]) -> dict[fx.Node, Reach]:
    """How far the values of nodes reach; empty without calibration data.

    Args:
        graph: in float; it is not changed.
        samples: the batches of this rank.
        nodes: each makes one tensor of floats.
    """
    found = accumulate(graph, samples, [(n, _ends) for n in nodes], torch.maximum, label="ranges")
    ends = (t.tolist() for t in found)
    return {n: Reach(-low, high, not bad) for n, (low, high, bad) in zip(nodes, ends, strict=bool(found))}


def _ends(x: Tensor) -> Tensor:
    """−least, largest, and whether one is not finite: three maxima."""
    if not x.numel():
        return torch.tensor([_NEVER, _NEVER, 0.0], dtype=torch.float64)
    low, high = (float(v) for v in torch.aminmax(x))
    finite = math.isfinite(low) and math.isfinite(high)
    return torch.tensor([-low, high, 0.0] if finite else [_NEVER, _NEVER, 1.0], dtype=torch.float64)
