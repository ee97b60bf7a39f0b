"""`RN_B` and `RN_L` of geekyutao/RN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from normfuse.importers.family import Call, Family, Random, attribute, expect, share
from normfuse.nn.region import RegionNormB, RegionNormL

__all__ = ["REGION_NORM_B", "REGION_NORM_L"]


def _eps(module: nn.Module) -> float:
    inner = attribute(attribute(module, "rn", nn.Module), "bn_norm", nn.Module)
    return float(attribute(inner, "eps", float))


def _channels(module: nn.Module) -> int:
    inner = attribute(attribute(module, "rn", nn.Module), "bn_norm", nn.Module)
    return int(attribute(inner, "num_features", int))


def _build_b(module: nn.Module) -> Sequence[nn.Module]:
    names = ("foreground_gamma", "foreground_beta", "background_gamma", "background_beta")
    channels = expect(module, dict.fromkeys(names, ("C",)))["C"]
    return (share(RegionNormB(channels, _eps(module)), module),)


def _build_l(module: nn.Module) -> Sequence[nn.Module]:
    state: dict[str, tuple[int | str, ...]] = {
        "sa.conv1.weight": (1, 2, "K", "K"),
        "sa.gamma_conv.weight": (1, 1, "K", "K"),
        "sa.gamma_conv.bias": (1,),
        "sa.beta_conv.weight": (1, 1, "K", "K"),
        "sa.beta_conv.bias": (1,),
    }
    expect(module, state)
    new = RegionNormL(_channels(module), attribute(module, "threshold", float), _eps(module))
    for name in ("conv1", "gamma_conv", "beta_conv"):
        setattr(new.sa, name, attribute(module.get_submodule("sa"), name, nn.Conv2d))
    return (new,)


def _calls_b(module: nn.Module, random: Random) -> Sequence[Call]:
    channels = module.get_parameter("foreground_gamma").numel()
    x = random(2, channels, 6, 4)
    mask = (random(2, 1, 6, 4) > 0).to(x.dtype)
    coarse = (random(1, 1, 3, 2) > 0).to(x.dtype)
    return (
        Call((x, mask)),
        Call((random(1, channels, 6, 4) * 100 + 7, coarse)),
        Call((x, torch.ones_like(mask))),  # the background is empty
    )


def _calls_l(module: nn.Module, random: Random) -> Sequence[Call]:
    channels = _channels(module)
    return Call((random(2, channels, 9, 8),)), Call((random(1, channels, 8, 10) * 100 + 7,))


REGION_NORM_B = Family(("RN_B",), "RN", _build_b, _calls_b)
REGION_NORM_L = Family(("RN_L",), "RN", _build_l, _calls_l)
