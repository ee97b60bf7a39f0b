"""`DynamicTanh` of jiachenzhu/DyT and `Dynamic_erf` of zlab-princeton/Derf."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from normfuse.importers.family import Call, Family, Random, expect, share
from normfuse.nn.dynamic import DynamicErf, DynamicTanh

__all__ = ["DYNAMIC_ERF", "DYNAMIC_TANH"]

_AFFINE: dict[str, tuple[int | str, ...]] = {"alpha": (1,), "weight": ("C",), "bias": ("C",)}


def _build_tanh(module: nn.Module) -> Sequence[nn.Module]:
    return _build(module, DynamicTanh, _AFFINE)


def _build_erf(module: nn.Module) -> Sequence[nn.Module]:
    return _build(module, DynamicErf, _AFFINE | {"shift": (1,)})


def _build(
    module: nn.Module, kind: type[DynamicTanh] | type[DynamicErf], state: dict[str, tuple[int | str, ...]]
) -> Sequence[nn.Module]:
    channels = expect(module, state, ["weight", "bias"]).get("C", 1)
    held = {name for name, _ in module.named_parameters()}
    new = kind(channels, elementwise_affine="weight" in held, bias="bias" in held, channels_last=_channels_last(module))
    return (share(new, module),)


def _channels_last(module: nn.Module) -> bool:
    """Only the authors' vision models have a layer that normalizes the third axis from the end."""
    return bool(getattr(module, "channels_last", True))


def _calls(module: nn.Module, random: Random) -> Sequence[Call]:
    weight = module._parameters.get("weight")
    channels = 4 if weight is None else weight.numel()
    if _channels_last(module):
        return Call((random(2, 5, channels),)), Call((random(3, channels) * 10 + 1,))
    return Call((random(2, channels, 3, 4),)), Call((random(1, channels, 5, 2) * 10 + 1,))


DYNAMIC_TANH = Family(("DynamicTanh",), "DyT", _build_tanh, _calls)
DYNAMIC_ERF = Family(("Dynamic_erf",), "Derf", _build_erf, _calls)
