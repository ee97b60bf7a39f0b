"""Weight compander: trained weights are kept small and away from zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normfuse.errors import UsageError

__all__ = ["WeightCompander"]


class WeightCompander(nn.Module):
    """w = Ψ(v) = a arctan(v / b),   a > b > 0: a parametrization of weights.

        parametrize.register_parametrization(linear, "weight", WeightCompander.fitted(linear.weight))

    Ψ is odd, its slope a / b at zero is above 1 (weights are pushed away from zero) and it saturates at ± a π / 2 (their
    magnitude is limited). Registering it keeps the weight as it is. `normfuse.optimize` evaluates it once.

    Source: Weight Compander: A Simple Weight Reparameterization for Regularization, arXiv 2306.16993. The abstract states the
    three properties; there is no public code, and the arctan is our reading of it.

    Shape: any to the same.

    Args:
        a: half-width of the range in units of π / 2: |w| < a π / 2.
        b: a over the slope at zero.
        learnable: a and b are parameters that are trained with the weights; else buffers. Both have shape ().

    Raises:
        UsageError: not a > b > 0.
    """

    a: Tensor
    b: Tensor

    def __init__(self, a: float = 1.0, b: float = 0.5, *, learnable: bool = False) -> None:
        super().__init__()
        if not 0 < b < a < math.inf:
            raise UsageError(f"WeightCompander: a={a}, b={b}; expected a > b > 0, a slope a / b above 1 at zero")
        for name, value in (("a", torch.tensor(float(a))), ("b", torch.tensor(float(b)))):
            if learnable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @classmethod
    def fitted(cls, weight: Tensor, slope: float = 2.0, *, learnable: bool = False) -> WeightCompander:
        """A compander with room for `weight`: it saturates at twice the largest magnitude, and has `slope` at zero.

        Raises:
            UsageError: the weight is empty, zero or not finite, or the slope is not above 1.
        """
        largest = float(weight.detach().abs().max()) if weight.numel() else 0.0
        if not 0 < largest < math.inf:
            raise UsageError(
                f"WeightCompander.fitted: the largest magnitude of the weight is {largest}, expected a positive number"
            )
        a = 4 * largest / math.pi
        return cls(a, a / slope if slope > 0 else 0.0, learnable=learnable)

    def forward(self, v: Tensor) -> Tensor:
        return self.a * torch.atan(v / self.b)

    def right_inverse(self, w: Tensor) -> Tensor:
        """v = b tan(w / a), with Ψ(v) = w.

        Raises:
            UsageError: a weight lies outside the range of Ψ.
        """
        limit = float(self.a.detach()) * math.pi / 2
        largest = float(w.detach().abs().max()) if w.numel() else 0.0
        if not largest < limit:
            raise UsageError(
                f"WeightCompander: the largest magnitude of the weight is {largest:.4g}, expected less than a π / 2 = {limit:.4g}; "
                "choose a larger a, or WeightCompander.fitted(weight)"
            )
        return self.b * torch.tan(w / self.a)

    def extra_repr(self) -> str:
        return f"learnable={isinstance(self.a, nn.Parameter)}"
