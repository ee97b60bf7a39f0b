"""`Conv2d` of joe-siyuan-qiao/WeightStandardization and /Batch-Channel-Normalization: its name is that of the plain layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from normfuse.importers.family import Call, Family, Random, Unrecognised, expect, share
from normfuse.nn.weight_standardization import CONVENTIONS, WeightStandardizedConv2d

__all__ = ["WEIGHT_STANDARDIZED_CONV"]

_CONVENTIONS = ("bcn", "torch", "timm", "tensorflow")
"""The likeliest first: each costs two convolutions."""


def _candidate(module: nn.Module) -> bool:
    """A `Conv2d` with a forward of its own and no layers inside."""
    own = isinstance(module, nn.Conv2d) and type(module).forward is not nn.Conv2d.forward
    return own and next(module.children(), None) is None


def _plain(module: nn.Module) -> nn.Module:
    assert isinstance(module, nn.Conv2d)
    return _like(module, nn.Conv2d)


def _build(module: nn.Module) -> Sequence[nn.Module]:
    assert isinstance(module, nn.Conv2d)
    expect(module, {"weight": ("O", "I", "H", "W"), "bias": ("O",)}, ["bias"])
    taps = module.weight[0].numel()
    eps = module.eps if isinstance(getattr(module, "eps", None), float) else None
    found = [
        _like(module, WeightStandardizedConv2d, convention=name, eps=eps)
        for name in _CONVENTIONS
        if taps > 1 or not CONVENTIONS[name].correction
    ]
    if not found:
        raise Unrecognised("has one tap in each filter")
    return found


def _like(module: nn.Conv2d, kind: type[nn.Conv2d], **kwargs: object) -> nn.Module:
    new = kind(
        module.in_channels,
        module.out_channels,
        module.kernel_size,  # type: ignore[arg-type]
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.dilation,  # type: ignore[arg-type]
        module.groups,
        module.bias is not None,
        module.padding_mode,
        device=torch.device("meta"),
        **kwargs,
    )
    return share(new, module)


def _calls(module: nn.Module, random: Random) -> Sequence[Call]:
    assert isinstance(module, nn.Conv2d)
    height, width = (d * (k - 1) + 3 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return (
        Call((random(2, module.in_channels, height, width),)),
        Call((random(1, module.in_channels, height + 1, width + 2) * 100 + 7,)),
    )


WEIGHT_STANDARDIZED_CONV = Family(("Conv2d",), "WeightStandardization", _build, _calls, _candidate, _plain)
