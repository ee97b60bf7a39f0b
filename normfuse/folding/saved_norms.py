"""State dicts of an RMSNorm that stands where a LayerNorm stood, for models that are rebuilt with a LayerNorm when they are loaded.

`save_pretrained` of Hugging Face saves a state dict, and `from_pretrained` makes the classes of the configuration again. What
reaches such a norm has no mean, because the weights that write it have none, so that the LayerNorm of the rebuilt model, with this
gain and without a shift, computes what the RMSNorm did.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["save_as_layer_norm"]


def save_as_layer_norm(norm: nn.RMSNorm, old: nn.LayerNorm) -> None:
    """Let the norm be saved, and loaded, as a LayerNorm: with a weight and a bias where the old one has them, in place."""
    of = functools.partial
    norm._register_state_dict_hook(of(_say, weight=_dtype(old.weight), bias=_dtype(old.bias)))
    norm.register_load_state_dict_pre_hook(_hear)


def _dtype(old: Tensor | None) -> torch.dtype | None:
    return None if old is None else old.dtype


def _say(
    norm: nn.RMSNorm, state: dict[str, Any], prefix: str, metadata: Any, *, weight: torch.dtype | None, bias: torch.dtype | None
) -> None:
    gain: Tensor | None = norm.weight
    if gain is None and weight is not None:
        gain = state[f"{prefix}weight"] = torch.ones(norm.normalized_shape, dtype=weight)
    if bias is not None:
        like = torch.ones(norm.normalized_shape, dtype=bias) if gain is None else gain.detach()
        state[f"{prefix}bias"] = torch.zeros_like(like)


def _hear(norm: nn.RMSNorm, state: dict[str, Any], prefix: str, *told: Any) -> None:
    errors: list[str] = told[-1]
    bias = state.pop(f"{prefix}bias", None)
    weight = state.pop(f"{prefix}weight", None) if norm.weight is None else None
    if (bias is not None and bool(bias.any())) or (weight is not None and bool((weight != 1).any())):
        errors.append(
            f"{prefix.removesuffix('.')} is folded and takes no gain and shift: load the state dict into the model before fold"
        )
