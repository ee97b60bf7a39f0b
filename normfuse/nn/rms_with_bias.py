"""RMSNorm with the β of the LayerNorm that it takes the place of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RMSNormWithBias"]


class RMSNormWithBias(nn.RMSNorm):
    """y = γ x / √(mean x² + ε) + β: an `nn.RMSNorm` with a shift.

    Has the parameters of `nn.LayerNorm`, and equals it for every x whose mean over the features is zero.

    Shape: (…, *normalized_shape) to the same. `weight` and `bias` have the shape `normalized_shape`.

    Args:
        normalized_shape: trailing sizes that are normalized together, or one number for the last.
        eps: ε; None for the machine epsilon of the dtype, as in `nn.RMSNorm`.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
        eps: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine=True, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias
