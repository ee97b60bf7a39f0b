"""Weight standardization: convolutions whose filters are standardized each time they are used.

    Ŵ = (W − mean W) / den,   mean and den over the n taps of one output channel

Four conventions are in use, and a checkpoint does not say which one it was trained with:

| convention     | den               | default ε | source                                                              |
|----------------|-------------------|-----------|---------------------------------------------------------------------|
| `"torch"`      | σ_unbiased + ε    | 1e-5      | WeightStandardization README, PyTorch version                       |
| `"tensorflow"` | σ_biased + ε      | 1e-5      | the same README, TensorFlow version                                 |
| `"bcn"`        | √(σ²_unbiased + ε) | 1e-5      | Batch-Channel Normalization, `layers.Conv2d`                        |
| `"timm"`       | √(σ²_biased + ε)   | 1e-6      | timm `StdConv2d` (BiT uses 1e-8)                                    |

Qiao et al., *Micro-Batch Training with Batch-Channel Normalization and Weight Standardization*, arXiv 1903.10520, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.nn._dtypes import narrowed, widened

__all__ = [
    "CONVENTIONS",
    "Convention",
    "WeightStandardizedConv1d",
    "WeightStandardizedConv2d",
    "WeightStandardizedConv3d",
    "standardize",
]


@dataclass(frozen=True)
class Convention:
    """How a filter is divided: by its standard deviation or variance, unbiased or not, with ε outside or inside the root.

    Attributes:
        correction: 1 divides the sum of squares by n − 1, 0 by n.
        eps_inside: √(σ² + ε) if true, σ + ε if not.
        eps: ε of the source.
    """

    correction: int
    eps_inside: bool
    eps: float


ConventionName = Literal["torch", "tensorflow", "bcn", "timm"]

CONVENTIONS: dict[str, Convention] = {
    "torch": Convention(correction=1, eps_inside=False, eps=1e-5),
    "tensorflow": Convention(correction=0, eps_inside=False, eps=1e-5),
    "bcn": Convention(correction=1, eps_inside=True, eps=1e-5),
    "timm": Convention(correction=0, eps_inside=True, eps=1e-6),
}


def standardize(weight: Tensor, convention: ConventionName = "torch", eps: float | None = None) -> Tensor:
    """Ŵ = (W − mean W) / den, for each output channel.

    Args:
        weight: (out_channels, in_channels / groups, *kernel).
        convention: one of `CONVENTIONS`.
        eps: ε; None for that of the convention.

    Returns:
        Ŵ in the shape and dtype of `weight`; computed in float32 at least.

    Raises:
        UsageError: the convention is unknown, or it is unbiased and a filter has a single tap.
    """
    rule = _convention(convention)
    if rule.correction and weight.ndim > 1 and weight[0].numel() == 1:
        raise UsageError(
            f"convention={convention!r} divides by n - 1, and a filter of shape {tuple(weight.shape[1:])} has n = 1; "
            "use 'tensorflow' or 'timm'"
        )
    return _standardized(weight, rule, rule.eps if eps is None else eps)


def _standardized(weight: Tensor, rule: Convention, eps: float) -> Tensor:
    dims = tuple(range(1, weight.ndim))
    w = widened(weight)
    w = w - w.mean(dims, keepdim=True)
    if rule.eps_inside:
        den = (w.var(dims, correction=rule.correction, keepdim=True) + eps).sqrt()
    else:
        den = w.std(dims, correction=rule.correction, keepdim=True) + eps
    return narrowed(w / den, weight)


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise UsageError(f"convention={name!r}: expected one of {', '.join(map(repr, CONVENTIONS))}")
    return CONVENTIONS[name]


class _WeightStandardized(nn.modules.conv._ConvNd):
    """What the three layers share; comes before nn.ConvNd among the bases."""

    def __init__(self, *args: Any, convention: ConventionName = "torch", eps: float | None = None, **kwargs: Any) -> None:
        rule = _convention(convention)
        super().__init__(*args, **kwargs)
        self.convention = convention
        self.eps = rule.eps if eps is None else eps
        taps = self.in_channels // self.groups
        for size in self.kernel_size:
            taps *= size
        if rule.correction and taps == 1:
            raise UsageError(
                f"convention={convention!r} divides by n - 1, and a filter of {self.in_channels // self.groups} channel and kernel "
                f"{self.kernel_size} has n = 1; use 'tensorflow' or 'timm'"
            )

    def standardized_weight(self) -> Tensor:
        """Ŵ, the weight that the convolution uses."""
        return _standardized(self.weight, CONVENTIONS[self.convention], self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized_weight(), self.bias)

    def extra_repr(self) -> str:
        conv: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{conv}, convention={self.convention!r}, eps={self.eps}"


class WeightStandardizedConv1d(_WeightStandardized, nn.Conv1d):
    """conv1d(x, Ŵ, b) with Ŵ = (W − mean W) / den for each output channel.

    x (N, C_in, L) → (N, C_out, L'). Arguments, parameter names and initialization of `nn.Conv1d`, and:

    Args:
        convention: the denominator, one of `CONVENTIONS`.
        eps: ε; None for that of the convention.

    Raises:
        UsageError: the convention is unknown, or it is unbiased and a filter has a single tap.

    Source: arXiv 1903.10520, section 3.
    """


class WeightStandardizedConv2d(_WeightStandardized, nn.Conv2d):
    """conv2d(x, Ŵ, b) with Ŵ = (W − mean W) / den for each output channel.

    x (N, C_in, H, W) → (N, C_out, H', W'). Arguments, parameter names and initialization of `nn.Conv2d`, and:

    Args:
        convention: the denominator, one of `CONVENTIONS`.
        eps: ε; None for that of the convention.

    Raises:
        UsageError: the convention is unknown, or it is unbiased and a filter has a single tap.

    Source: arXiv 1903.10520, section 3.
    """


class WeightStandardizedConv3d(_WeightStandardized, nn.Conv3d):
    """conv3d(x, Ŵ, b) with Ŵ = (W − mean W) / den for each output channel.

    x (N, C_in, D, H, W) → (N, C_out, D', H', W'). Arguments, parameter names and initialization of `nn.Conv3d`, and:

    Args:
        convention: the denominator, one of `CONVENTIONS`.
        eps: ε; None for that of the convention.

    Raises:
        UsageError: the convention is unknown, or it is unbiased and a filter has a single tap.

    Source: arXiv 1903.10520, section 3.
    """
