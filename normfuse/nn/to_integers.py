"""Linear and convolution layers of a model become layers that train in integers: `convert(model, "shiftquant")`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from normfuse.nn.reading import hooks_of
from normfuse.nn.shift_quant import ShiftQuantConv2d, ShiftQuantLinear

__all__ = ["candidates", "in_integers"]


def candidates(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Linear layers and 2-d convolutions with their first paths, subclasses included."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def in_integers(old: nn.Module, options: Mapping[str, Any]) -> nn.Module | str:
    """The layer with the very parameters of `old`, or the reason why there is none."""
    if isinstance(old, (ShiftQuantLinear, ShiftQuantConv2d)):
        return "is of that kind already"
    if type(old) not in (nn.Linear, nn.Conv2d) or parametrize.is_parametrized(old):
        return "is no plain nn.Linear or nn.Conv2d"
    if isinstance(old.weight, nn.parameter.UninitializedParameter):
        return "has no weight yet"
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = ShiftQuantLinear(old.in_features, old.out_features, old.bias is not None, device="meta", **options)
    else:
        assert isinstance(old, nn.Conv2d)
        new = ShiftQuantConv2d(
            old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, old.groups,
            old.bias is not None, old.padding_mode, device="meta", **options,
        )  # fmt: skip
    for name in ("weight", "bias"):
        new.register_parameter(name, getattr(old, name))
    for name, key, hook in hooks_of(old):
        getattr(new, name)[key] = hook
    return new.train(old.training)
