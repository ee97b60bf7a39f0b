"""`AlphaBatchNorm` of bethgelab/robustness: a batch norm around another one, mixing the statistics of both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.importers.family import Call, Family, Random, Unrecognised, attribute, expect
from normfuse.nn.alpha import AlphaBatchNorm

__all__ = ["ALPHA_BATCH_NORM"]

_NORM: dict[str, tuple[int | str, ...]] = {"running_mean": ("C",), "running_var": ("C",), "num_batches_tracked": ()}


class _Frozen(nn.Module):
    """Batch normalization with μ = (1 − α) μ_source + α μ_target and the same for the variance; all of them are constants."""

    def __init__(self, layer: nn.BatchNorm2d, norm: nn.BatchNorm2d, alpha: float) -> None:
        super().__init__()
        self.layer = layer
        self.norm = norm
        self.alpha = alpha

    def forward(self, input: Tensor) -> Tensor:
        torch._assert(input.dim() == 4, "AlphaBatchNorm takes (N, C, H, W)")
        mean, var = (
            (1 - self.alpha) * getattr(self.layer, name) + self.alpha * getattr(self.norm, name)
            for name in ("running_mean", "running_var")
        )
        return F.batch_norm(input, mean, var, self.layer.weight, self.layer.bias, False, 0.0, self.layer.eps)


def _build(module: nn.Module) -> Sequence[nn.Module]:
    state: dict[str, tuple[int | str, ...]] = {"layer.weight": ("C",), "layer.bias": ("C",)}
    for part in ("layer", "norm"):
        state |= {f"{part}.{name}": shape for name, shape in _NORM.items()}
    expect(module, state, ["layer.weight", "layer.bias"])
    layer, norm = attribute(module, "layer", nn.BatchNorm2d), attribute(module, "norm", nn.BatchNorm2d)
    alpha = attribute(module, "alpha", float, int)
    if not 0 <= alpha <= 1:
        raise Unrecognised(f"has alpha = {alpha}; expected a number from 0 to 1")
    if _live(module):
        return (AlphaBatchNorm.of(layer, 1 - alpha).eval(),)
    if alpha > 0 and int(norm.num_batches_tracked) == 0:
        raise Unrecognised("has target statistics that were never taken (norm.num_batches_tracked is 0)")
    return (_Frozen(layer, norm, alpha),)


def _live(module: nn.Module) -> bool:
    """Does it take the statistics of each batch in eval mode? The inner norm then is in training mode; eval() would freeze it."""
    inner = getattr(module, "norm", None)
    return not module.training and isinstance(inner, nn.Module) and inner.training and getattr(module, "alpha", 0) > 0


def _calls(module: nn.Module, random: Random) -> Sequence[Call]:
    channels = module.get_buffer("layer.running_mean").numel()
    return Call((random(3, channels, 3, 4),)), Call((random(2, channels, 5, 2) * 100 + 7,))


ALPHA_BATCH_NORM = Family(("AlphaBatchNorm",), "robustness", _build, _calls, live=_live)
