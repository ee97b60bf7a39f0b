"""Region normalization: the known and the missing part of an image have statistics of their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.nn._dtypes import narrowed, sizes_known, widened

__all__ = ["RegionNormB", "RegionNormL"]


class RegionNormB(nn.Module):
    """y = R(x, m) (m (1 + γ₁) + (1 − m) (1 + γ₀)) + β₁ + β₀ for a mask m of two regions, 1 foreground and 0 background.

    R normalizes each region by its own mean and variance in each channel, R = (x − μᵣ) / √(σᵣ² + ε / share of the region in
    the batch). Both β are added everywhere, as in the official code. There are no running statistics: an output depends on
    the batch in eval mode too, and nothing but the constants 1 + γ and β₁ + β₀ is done before inference.

    Source: Yu et al., Region Normalization for Image Inpainting, AAAI 2020; official class RN_B.

    Shape: x (N, C, H, W) and mask (N, 1, h, w), resized to (H, W) by the nearest value; output as x, in its dtype. Statistics
    of float16 and bfloat16 are taken in float32. A region that is empty gives nothing.

    Args:
        channels: C; `foreground_gamma`, `foreground_beta`, `background_gamma` and `background_beta` have shape (C,) and start
            at 0.
        eps: ε, in units of x².

    Raises:
        UsageError: an input of another rank or number of channels; in training, an empty batch.
    """

    def __init__(
        self, channels: int, eps: float = 1e-5, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps

        def zeros() -> nn.Parameter:
            return nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

        self.foreground_gamma, self.foreground_beta = zeros(), zeros()
        self.background_gamma, self.background_beta = zeros(), zeros()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        _check(x, self)
        wide = widened(x)
        mask = F.interpolate(mask.to(wide.dtype), size=x.shape[2:], mode="nearest")
        foreground, background = _over_images(self.foreground_gamma), _over_images(self.background_gamma)
        beta = _over_images(self.foreground_beta) + _over_images(self.background_beta)
        # m (1 + γ₁) + (1 − m) (1 + γ₀), with both constants known before inference
        gain = mask * (foreground - background) + (1 + background)
        return narrowed(_by_region(wide, mask, self.eps) * gain + beta, x)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


class RegionNormL(nn.Module):
    """y = R(x, m) (1 + γ(p)) + β(p),   p = sigmoid(K ∗ [mean x, max x]),   m = [p ≥ threshold].

    The layer finds the regions itself: p is a map of importance from the mean and the maximum over the channels, and γ and β
    are convolutions of it. R is that of `RegionNormB`; no gradient goes through m.

    Source: Yu et al., Region Normalization for Image Inpainting, AAAI 2020; official class RN_L.

    Shape: (N, C, H, W) to the same, in its dtype. Statistics of float16 and bfloat16 are taken in float32.

    Args:
        channels: C. No parameter depends on it: `sa.conv1.weight` is (1, 2, 7, 7), `sa.gamma_conv` and `sa.beta_conv` have
            weight (1, 1, 7, 7) and bias (1,).
        threshold: importance from which on a position is foreground.
        eps: ε, in units of x².

    Raises:
        UsageError: an input of another rank or number of channels; in training, an empty batch.
    """

    def __init__(
        self,
        channels: int,
        threshold: float = 0.8,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.threshold = threshold
        self.eps = eps
        self.sa = _SelfAware(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        _check(x, self)
        importance, gamma, beta = self.sa(x)
        wide = widened(x)
        mask = (importance.detach() >= self.threshold).to(wide.dtype)
        return narrowed(_by_region(wide, mask, self.eps) * (gamma + 1) + beta, x)

    def extra_repr(self) -> str:
        return f"{self.channels}, threshold={self.threshold}, eps={self.eps}"


class _SelfAware(nn.Module):
    """The map of importance, and γ and β of each position, (N, 1, H, W) each."""

    def __init__(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False, device=device, dtype=dtype)
        self.gamma_conv = nn.Conv2d(1, 1, 7, padding=3, device=device, dtype=dtype)
        self.beta_conv = nn.Conv2d(1, 1, 7, padding=3, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled = torch.cat((x.mean(1, keepdim=True), torch.max(x, 1, keepdim=True)[0]), 1)
        importance = torch.sigmoid(self.conv1(pooled))
        return importance, self.gamma_conv(importance), self.beta_conv(importance)


def _by_region(x: Tensor, mask: Tensor, eps: float) -> Tensor:
    """R(x, m): both regions normalized, each on its own; x (N, C, H, W), m (N, 1, H, W)."""
    mask = mask.detach()
    return _region(x, mask, eps) + _region(x, 1 - mask, eps)


def _region(x: Tensor, mask: Tensor, eps: float) -> Tensor:
    """d √(share / (mean d² + ε)),   d = m (x − μ),   μ = mean(m x) / share,   share = mean m.

    Outside the region the official code fills in μ and divides by the standard deviation of the whole; that is mean d². An
    empty region has d = 0, whatever its mean is divided by.
    """
    dims = (0, 2, 3)
    share = mask.mean(dims, keepdim=True)
    d = mask * (x - (mask * x).mean(dims, keepdim=True) / torch.where(share == 0, 1.0, share))
    # not the root of the quotient: its derivative at an empty region would be infinite
    return d * (share.sqrt() / (d.square().mean(dims, keepdim=True) + eps).sqrt())


def _over_images(parameter: Tensor) -> Tensor:
    return widened(parameter)[:, None, None]


def _check(x: Tensor, layer: RegionNormB | RegionNormL) -> None:
    if not sizes_known(x):
        return
    name = f"{type(layer).__name__}({layer.channels})"
    if x.ndim != 4 or x.shape[1] != layer.channels:
        raise UsageError(f"{name}: the input has shape {tuple(x.shape)}; expected (N, {layer.channels}, H, W)")
    if layer.training and x.shape[0] == 0:
        raise UsageError(f"{name}: an empty batch in training; expected at least one image, or call eval() first")
