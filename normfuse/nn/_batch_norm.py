"""Batch normalization that normfuse's own layers build on."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.nn._dtypes import narrowed, widened
from normfuse.nn._moments import batch_moments, recomputing

__all__ = ["SyncedBatchNorm2d"]


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over all ranks, whose running statistics see each batch once under activation checkpointing."""

    _name = "BatchNorm2d"  # what a user calls the layer that this one is part of

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.numel() == 0:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps
            )
        wide = widened(x)
        mean, var, count = batch_moments(wide, (0, 2, 3))
        if count < 2:
            raise UsageError(f"{self._name} in training needs more than one value per channel, got x {tuple(x.shape)}")
        if not recomputing():
            self._update(mean.detach(), var.detach() * (count / (count - 1)))
        y = (wide - _channels(mean)) * _channels((var + self.eps).rsqrt())
        return narrowed(y * _channels(self.weight) + _channels(self.bias) if self.affine else y, x)

    def _update(self, mean: Tensor, var: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        speed = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), speed)
        self.running_var.lerp_(var.to(self.running_var.dtype), speed)


def _channels(v: Tensor) -> Tensor:
    return v.reshape(-1, 1, 1)
