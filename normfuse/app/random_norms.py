"""Norms of a freshly built model that look trained."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["randomise_norms"]

_RANGES = {"running_mean": (-0.2, 0.2), "running_var": (0.6, 1.6), "weight": (0.7, 1.4), "bias": (-0.2, 0.2)}


def randomise_norms(model: "nn.Module", *, seed: int) -> "nn.Module":
    """Give the norms of a freshly built model statistics and affines that look trained, in place; returns `model`.

    Args:
        model: vectors called weight, bias, running_mean and running_var of classes with `norm` in their name are drawn.
        seed: of a generator of its own; the global one is left alone.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if "norm" not in type(module).__name__.lower():
                continue
            for name, (low, high) in _RANGES.items():
                tensor = getattr(module, name, None)
                if isinstance(tensor, torch.Tensor) and tensor.ndim == 1 and tensor.is_floating_point():
                    tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return model
