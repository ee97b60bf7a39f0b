"""A norm of one layout used in another: channels in front, more axes than it takes, an activation behind it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Activated", "BatchNormAnyRank", "ChannelsLast", "Rows"]


class _Around(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm


class ChannelsLast(_Around):
    """y[:, :, p] = N(x[:, :, p]) at each position p: a norm over the last axis, applied to axis 1.

    Shape: (N, C, ...) to the same. N is given (rows, C), one row a position.

    Args:
        norm: N, a module that takes (rows, C).
    """

    def forward(self, x: Tensor) -> Tensor:
        moved = x.movedim(1, -1)  # (N, ..., C)
        y: Tensor = self.norm(moved.flatten(0, -2)).reshape_as(moved)
        return y.movedim(-1, 1)


class Rows(_Around):
    """y[..., :] = N(x[..., :]): a norm that takes (rows, C), applied to any number of axes in front.

    Shape: (..., C) to the same, two axes at least. `Rows(nn.BatchNorm1d(C))` is batch normalization over tokens.

    Args:
        norm: N, a module that takes (rows, C).
    """

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.flatten(0, -2)).reshape_as(x)
        return y


class BatchNormAnyRank(_BatchNorm):
    """Batch normalization over axis 1 of an input with any number of axes; arguments and keys of `nn.BatchNorm2d`.

    Shape: (N, C) or (N, C, ...) to the same.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """PyTorch's check of the rank; F.batch_norm itself says what is wrong."""


class Activated(nn.Sequential):
    """y = act(drop(N(x))): a norm and what a fused class did behind it; children `norm`, `drop`, `act`."""
