"""`L1BatchNorm2d` of eladhoffer/norm_matters, whose `running_var` holds the reciprocal of the scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normfuse.importers.family import Call, Family, Random, Unrecognised, expect, share, untrained
from normfuse.nn._channel_affine import channel_affine

__all__ = ["L1_BATCH_NORM"]


class _ReciprocalBatchNorm2d(nn.Module):
    """y = γ (x − μ) r + β, with γ = `scale`, β = `mean`, and the running mean of reciprocal scales r = `running_var`.

    `normfuse.nn.L1BatchNorm` keeps the scale itself; 1 / r − ε would have to be rounded to the dtype of r.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.mean = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.dim() == 4, "L1BatchNorm2d takes (N, C, H, W)")
        gain = self.scale * self.running_var
        return channel_affine(x, self.running_mean, gain, self.mean)


def _build(module: nn.Module) -> Sequence[nn.Module]:
    channels = expect(module, {"mean": ("C",), "scale": ("C",), "running_mean": ("C",), "running_var": ("C",)})["C"]
    if untrained(module.get_buffer("running_var"), 0):
        raise Unrecognised("has statistics that were never trained (running_var, the reciprocal scale, is 0 everywhere)")
    return (share(_ReciprocalBatchNorm2d(channels), module),)


def _calls(module: nn.Module, random: Random) -> Sequence[Call]:
    channels = module.get_parameter("scale").numel()
    return Call((random(2, channels, 3, 4),)), Call((random(1, channels, 5, 2) * 100 + 7,))


L1_BATCH_NORM = Family(("L1BatchNorm2d",), "norm_matters", _build, _calls)
