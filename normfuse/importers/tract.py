"""`TrActLinear` and `TrActConv2d` of Felix-Petersen/tract: plain layers with a backward of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from normfuse.importers.family import Call, Family, Random, attribute, expect, share

__all__ = ["TRACT_CONV", "TRACT_LINEAR"]


def _build_linear(module: nn.Module) -> Sequence[nn.Module]:
    sizes = expect(module, {"weight": ("O", "I"), "bias": ("O",)}, ["bias"])
    bias = module._parameters.get("bias") is not None
    return (share(nn.Linear(sizes["I"], sizes["O"], bias, device=torch.device("meta")), module),)


def _build_conv(module: nn.Module) -> Sequence[nn.Module]:
    """The official forward passes stride and padding on, and neither dilation nor groups."""
    sizes = expect(module, {"weight": ("O", "I", "H", "W"), "bias": ("O",)}, ["bias"])
    bias = module._parameters.get("bias") is not None
    stride, padding = attribute(module, "stride", tuple, int), attribute(module, "padding", tuple, int, str)
    kernel = (sizes["H"], sizes["W"])
    new = nn.Conv2d(sizes["I"], sizes["O"], kernel, stride, padding, bias=bias, device=torch.device("meta"))
    return (share(new, module),)


def _calls_linear(module: nn.Module, random: Random) -> Sequence[Call]:
    features = module.get_parameter("weight").shape[1]
    return Call((random(2, 5, features),)), Call((random(3, features) * 100 + 7,))


def _calls_conv(module: nn.Module, random: Random) -> Sequence[Call]:
    _, channels, height, width = module.get_parameter("weight").shape
    return (
        Call((random(2, channels, height + 2, width + 2),)),
        Call((random(1, channels, height + 3, width + 4) * 100 + 7,)),
    )


TRACT_LINEAR = Family(("TrActLinear",), "TrAct", _build_linear, _calls_linear)
TRACT_CONV = Family(("TrActConv2d",), "TrAct", _build_conv, _calls_conv)
