"""`EvoNorm2d*` of timm, whose code unpacks shapes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from normfuse.importers.family import Call, Family, Random, Unrecognised, attribute, expect, share
from normfuse.nn.evonorm import KINDS

__all__ = ["EVONORM"]

_PREFIX = "EvoNorm2d"


def _build(module: nn.Module) -> Sequence[nn.Module]:
    kind = type(module).__name__.removeprefix(_PREFIX)
    batch = kind[0] == "B"
    apply_act, eps = attribute(module, "apply_act", bool), attribute(module, "eps", float)
    state: dict[str, tuple[int | str, ...]] = {"weight": ("C",), "bias": ("C",)}
    state |= {"v": ("C",)} if apply_act and kind[1] == "0" else {}
    state |= {"running_var": ("C",)} if batch else {}
    channels = expect(module, state)["C"]
    if batch:
        return (share(KINDS[kind](channels, apply_act=apply_act, eps=eps), module),)
    groups = attribute(module, "groups", int)
    if groups < 1 or channels % groups:
        raise Unrecognised(f"has {groups} groups for {channels} channels")
    new = share(KINDS[kind](channels, groups=groups, apply_act=apply_act, eps=eps), module)
    if kind[1] != "0":
        new.act = attribute(module, "act", nn.Module)
    return (new,)


def _calls(module: nn.Module, random: Random) -> Sequence[Call]:
    channels = module.get_parameter("weight").numel()
    return Call((random(2, channels, 3, 4),)), Call((random(1, channels, 5, 2) * 100 + 7,))


EVONORM = Family(tuple(f"{_PREFIX}{kind}" for kind in KINDS), "timm", _build, _calls)
