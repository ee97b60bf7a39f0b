"""LayerNorm Scaling: the output of a pre-norm divided by the root of its depth."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normfuse.errors import UsageError

__all__ = ["ScaledNorm", "lns_init_"]


class ScaledNorm(nn.Module):
    """y = N(x) / √depth for any normalization N, its γ and β included.

    Both pre-norms of block ℓ (before attention and before the MLP) have depth ℓ, counted from 1; the last norm of the model
    has none. The factor is a number of the model's code and in no checkpoint: the keys are those of N alone, so that
    checkpoints of models trained this way load with `strict=True`. At inference the factor goes where γ goes.

    Source: Sun et al., The Curse of Depth in Large Language Models, NeurIPS 2025. It is trained from
    `lns_init_`.

    Shape: as N.

    Args:
        norm: N, any module of one input.
        depth: ℓ, at least 1.

    Raises:
        UsageError: the depth is below 1.
    """

    def __init__(self, norm: nn.Module, depth: int) -> None:
        super().__init__()
        if depth < 1:
            raise UsageError(f"ScaledNorm: depth={depth}, expected at least 1 (the first block has depth 1)")
        self.norm = norm
        self.depth = depth

    @property
    def factor(self) -> float:
        """1 / √depth"""
        return 1 / math.sqrt(self.depth)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y * self.factor

    # the two methods by which nn.Module saves and loads: the wrapped norm takes the place of this module

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.norm.state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        for key in [k for k in state_dict if k.startswith(prefix)]:
            state_dict[f"{prefix}norm.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"depth={self.depth}"


@torch.no_grad()
def lns_init_(model: nn.Module, std: float = 0.02) -> nn.Module:
    """The initial weights that LayerNorm Scaling is trained from: W ~ N(0, std²), b = 0, the same at every depth.

    Writes all linear and embedding layers in place and leaves everything else alone. The usual factor 1/√(2L) on the layers
    that write into the residual stream is left out on purpose: with it most of the gain is lost. The row of an embedding
    that stands for padding is set to zero.

    Source: Sun et al., The Curse of Depth in Large Language Models, NeurIPS 2025, and its official training code.

    Args:
        model: the model to initialize.
        std: standard deviation of the weights.

    Returns:
        The model.
    """
    for module in model.modules():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        weight = torch.empty_like(module.weight).normal_(0.0, std)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            weight[module.padding_idx] = 0
        _assign(module, "weight", weight)
        if isinstance(module, nn.Linear) and module.bias is not None:
            _assign(module, "bias", torch.zeros_like(module.bias))
    return model


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter new values; a parametrized one through the inverse of its parametrization."""
    if parametrize.is_parametrized(module, name):
        setattr(module, name, value)
    else:
        getattr(module, name).copy_(value)
