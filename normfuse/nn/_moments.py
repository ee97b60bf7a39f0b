"""Mean and variance of a batch, over all ranks, and whether a running statistic may take them up."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from normfuse.ranks import several_ranks

__all__ = ["batch_moments", "recomputing", "should_update"]


def batch_moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    """Mean, biased variance and number of values of x over `dims` and over all ranks of the default process group.

    Gradients flow through both moments, and over the ranks as well. Of an empty batch they are 0 and 1, and the number is 0.
    """
    kept = [i for i in range(x.ndim) if i not in dims]
    shape = [x.shape[i] for i in kept]
    count = 1
    for i in dims:
        count *= x.shape[i]
    if not several_ranks():
        if count == 0:
            return x.new_zeros(shape), x.new_ones(shape), 0
        var, mean = torch.var_mean(x, dims, correction=0)
        return mean, var, count
    from torch.distributed.nn.functional import all_reduce  # differentiable

    total = torch.tensor(float(count), dtype=torch.float64, device=x.device)
    dist.all_reduce(total)
    everything = int(total.item())
    if everything == 0:
        return x.new_zeros(shape), x.new_ones(shape), 0
    mean = all_reduce(x.sum(dims) / everything)
    wide = mean.reshape([x.shape[i] if i in kept else 1 for i in range(x.ndim)])
    var = all_reduce((x - wide).square().sum(dims) / everything)
    return mean, var, everything


def should_update(count: int) -> bool:
    """Not for an empty batch, and not when activation checkpointing runs the forward again inside the backward."""
    return count > 0 and not recomputing()


def recomputing() -> bool:
    """Is this forward run again inside a backward, as activation checkpointing does?"""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
