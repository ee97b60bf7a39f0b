"""`UN1d` of hikvision-research/Unified-Normalization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from normfuse.importers.family import Call, Family, Random, Unrecognised, attribute, expect, share, untrained
from normfuse.nn.unified import UnifiedNorm

__all__ = ["UNIFIED_NORM"]

_STATE: dict[str, tuple[int | str, ...]] = {
    "weight": ("C",),
    "bias": ("C",),
    "running_var": ("C",),
    "ema_gz": ("C",),
    "iters": (1,),
    "buffer_x2": ("M", "C"),
    "buffer_gz": ("N", "C"),
    "skip_counter": (1,),
}


def _build(module: nn.Module) -> Sequence[nn.Module]:
    sizes = expect(module, _STATE)
    eps, momentum = attribute(module, "eps", float), attribute(module, "momentum", float)
    if untrained(module.get_buffer("running_var"), 1) and untrained(module.get_buffer("iters"), 0):
        raise Unrecognised("has statistics that were never trained (running_var is 1 everywhere and iters is 0)")
    new = UnifiedNorm(sizes["C"], (sizes["M"], sizes["N"]), eps=eps, momentum=momentum)
    return (share(new, module),)


def _calls(module: nn.Module, random: Random) -> Sequence[Call]:
    channels = module.get_parameter("weight").numel()
    x = random(2, 5, channels)
    padding = torch.zeros(2, 5, dtype=torch.bool, device=x.device)
    padding[1, 3:] = True
    return Call((x,)), Call((random(3, channels) * 100 + 7,)), Call((x,), {"pad_mask": padding})


UNIFIED_NORM = Family(("UN1d",), "Unified-Normalization", _build, _calls)
