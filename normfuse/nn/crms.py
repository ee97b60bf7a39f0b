"""CRMSNorm: RMSNorm of a vector with zero mean of which one coordinate is not stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.nn._dtypes import narrowed, widened
from normfuse.nn._inputs import takes

__all__ = ["CRMSNorm"]


class CRMSNorm(nn.Module):
    """y = x / √((Σ x² + (Σ x)²) / d + ε),   d = width + 1.

    x holds d − 1 coordinates of a vector whose d coordinates sum to zero. The one that is left out is −Σ x, so that the
    denominator is the root mean square of the whole vector, with the same ε.

    Source: Jiang et al., Pre-RMSNorm and Pre-CRMSNorm Transformers, NeurIPS 2023.

    Shape: (…, width) to (…, width), in the dtype of the input; float16 and bfloat16 are summed in float32.

    Args:
        width: d − 1, the number of features in and out.
        eps: ε, in units of x²; a row of zeros gives zeros when it is positive.
        elementwise_affine: multiply by a `weight` of shape (width,). The paper has none.

    Raises:
        UsageError: the last axis of the input is not `width` long.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        elementwise_affine: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width < 1:
            raise UsageError(f"CRMSNorm: width={width}, expected at least 1 (the number of stored features, d - 1)")
        self.width = width
        self.eps = eps
        weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        takes(self, x, (self.width,))  # the width of the stream without its dropped coordinate
        wide = widened(x)
        total = wide.sum(-1, keepdim=True)
        square = wide.square().sum(-1, keepdim=True) + total.square()
        y = wide / (square / (self.width + 1) + self.eps).sqrt()
        if self.weight is not None:
            y = narrowed(y, self.weight) * self.weight
        return narrowed(y, x)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}, elementwise_affine={self.weight is not None}"
