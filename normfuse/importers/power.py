"""`MaskPowerNorm` of sIncerass/powernorm, and the variant of it that has no group scaling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normfuse.importers.family import Call, Family, Random, Unrecognised, attribute, expect, share, untrained
from normfuse.nn.power import PowerNorm

__all__ = ["POWER_NORM"]

_STATE: dict[str, tuple[int | str, ...]] = {
    "weight": ("C",),
    "bias": ("C",),
    "running_phi": (1, "C", 1, 1),
    "ema_gz": (1, "C", 1, 1),
    "iters": (1,),
}


class _PowerNorm(PowerNorm):
    """`PowerNorm` that is called as the official layer is; in eval mode the other arguments have no effect."""

    def forward(self, input: Tensor, pad_mask: Tensor | None = None, is_encoder: bool = False) -> Tensor:
        return super().forward(input, pad_mask)


class _PowerNormOfX(PowerNorm):
    """The same for the copies of the official layer that call their input x."""

    def forward(self, x: Tensor, pad_mask: Tensor | None = None, is_encoder: bool = False) -> Tensor:
        return super().forward(x, pad_mask)


def _build(module: nn.Module) -> Sequence[nn.Module]:
    channels = expect(module, _STATE)["C"]
    eps = attribute(module, "eps", float)
    if untrained(module.get_buffer("running_phi"), 1) and untrained(module.get_buffer("iters"), 0):
        raise Unrecognised("has statistics that were never trained (running_phi is 1 everywhere and iters is 0)")
    groups, group_eps = 0, 1e-5
    if hasattr(module, "gp"):
        scaling = attribute(module, "gp", nn.Module)
        groups, group_eps = attribute(scaling, "group_num", int), attribute(scaling, "eps", float)
        if groups < 1 or channels % groups:
            raise Unrecognised(f"has {groups} groups for {channels} channels")
    return tuple(share(kind(channels, eps, group_num=groups, group_eps=group_eps), module) for kind in (_PowerNorm, _PowerNormOfX))


def _calls(module: nn.Module, random: Random) -> Sequence[Call]:
    channels = module.get_parameter("weight").numel()
    x = random(5, 2, channels)  # (T, B, C)
    padding = torch.zeros(2, 5, dtype=torch.bool, device=x.device)  # (B, T)
    padding[1, 3:] = True
    return Call((x,)), Call((random(3, channels) * 100 + 7,)), Call((x,), {"pad_mask": padding})


POWER_NORM = Family(("MaskPowerNorm",), "powernorm", _build, _calls)
