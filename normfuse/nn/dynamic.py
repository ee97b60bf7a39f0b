"""Elementwise functions that take the place of a normalization: no statistics, nothing to reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.nn._dtypes import narrowed
from normfuse.nn._inputs import takes

__all__ = ["DynamicErf", "DynamicTanh"]


class _Dynamic(nn.Module):
    """γ ⊙ f(α x + s) + β."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha_init: float,
        elementwise_affine: bool,
        bias: bool,
        channels_last: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if not channels_last and len(self.normalized_shape) != 1:
            raise UsageError(
                f"{type(self).__name__}: normalized_shape={self.normalized_shape} with channels_last=False; "
                "expected one number, the channels on the third axis from the end"
            )
        self.alpha_init = alpha_init
        self.channels_last = channels_last
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))

        def affine(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype)) if wanted else None

        self.register_parameter("weight", affine(elementwise_affine))
        self.register_parameter("bias", affine(elementwise_affine and bias))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.alpha_init)
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _takes(self, x: Tensor) -> None:
        takes(self, x, self.normalized_shape, behind=0 if self.channels_last else 2)

    def _affine(self, y: Tensor, x: Tensor) -> Tensor:
        """γ y + β in the dtype of the input x."""
        if self.weight is not None:
            y = y * self._along_features(self.weight)
        if self.bias is not None:
            y = y + self._along_features(self.bias)
        return narrowed(y, x)

    def _along_features(self, parameter: Tensor) -> Tensor:
        return parameter if self.channels_last else parameter[:, None, None]

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, alpha_init={self.alpha_init}, elementwise_affine={self.weight is not None}, "
            f"bias={self.bias is not None}, channels_last={self.channels_last}"
        )


class DynamicTanh(_Dynamic):
    """y = γ ⊙ tanh(α x) + β, with one number α for the layer.

    Keys: `alpha` (1,), `weight`, `bias`, as in the official code. At inference γ and β go into the layers that read y.

    Source: Zhu et al., Transformers without Normalization, CVPR 2025, section 4.

    Shape: (…, *normalized_shape), or (…, channels, height, width) when `channels_last` is off; output alike, in the dtype of
    the input.

    Args:
        normalized_shape: the trailing axes that γ and β vary along, or the number of channels.
        alpha_init: α at the start. The authors take 0.5, and for language models 0.8 before attention and 0.2 elsewhere
            at 7B parameters, less in larger ones.
        elementwise_affine: γ and β are there at all (the authors' diffusion models have none).
        bias: β is there (the authors' language models have none).
        channels_last: the features are the last axis; else the third from the end, for convolutional networks.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha_init: float = 0.5,
        *,
        elementwise_affine: bool = True,
        bias: bool = True,
        channels_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, alpha_init, elementwise_affine, bias, channels_last, device, dtype)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        self._takes(x)
        return self._affine(torch.tanh(self.alpha * x), x)


class DynamicErf(_Dynamic):
    """y = γ ⊙ erf(α x + s) + β, with one number α and one shift s for the layer.

    Keys: `alpha` (1,), `shift` (1,), `weight`, `bias`, as in the official code. At inference γ and β go into the layers
    that read y.

    Source: Chen et al., Stronger Normalization-Free Transformers, arXiv 2512.10938.

    Shape: (…, *normalized_shape), or (…, channels, height, width) when `channels_last` is off; output alike, in the dtype of
    the input.

    Args:
        normalized_shape: the trailing axes that γ and β vary along, or the number of channels.
        alpha_init, shift_init: α and s at the start.
        elementwise_affine: γ and β are there at all.
        bias: β is there.
        channels_last: the features are the last axis; else the third from the end, for convolutional networks.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        alpha_init: float = 0.5,
        shift_init: float = 0.0,
        *,
        elementwise_affine: bool = True,
        bias: bool = True,
        channels_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, alpha_init, elementwise_affine, bias, channels_last, device, dtype)
        self.shift_init = shift_init
        self.shift = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.shift, self.shift_init)

    def forward(self, x: Tensor) -> Tensor:
        self._takes(x)
        return self._affine(torch.erf(self.alpha * x + self.shift), x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shift_init={self.shift_init}"
