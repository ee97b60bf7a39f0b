"""Batch-channel normalization: a batch norm, then a group norm whose gain and bias belong to the groups.

Qiao et al., *Rethinking Normalization and Elimination Singularity in Neural Networks*, arXiv 1911.09738.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.nn._batch_norm import SyncedBatchNorm2d
from normfuse.nn._dtypes import widened
from normfuse.nn._moments import batch_moments, should_update

__all__ = ["BatchChannelNorm", "EstimatedBatchNorm2d"]


class EstimatedBatchNorm2d(nn.Module):
    """y = γ ⊙ (x − R_μ) / √(R_σ² + ε) + β with running statistics, in training as well (EstBN).

    In training, before they are used: R_μ ← (1 − s) R_μ + s mean(x), R_σ² ← (1 − s) R_σ² + s mean((x − R_μ)²) with the old R_μ,
    where the speed s is the buffer `estbn_moving_speed`. No gradient flows into the statistics.

    x (N, C, H, W). Keys: `weight`, `bias`, `running_mean`, `running_var` (C,), `num_batches_tracked`, `estbn_moving_speed` (1,).

    Args:
        num_features: C.
        eps: ε.
        moving_speed: initial s; the official code starts at 0 and leaves raising it to the training script.

    Source: arXiv 1911.09738, section 4.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, moving_speed: float = 0.1, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.num_batches_tracked: Tensor
        self.estbn_moving_speed: Tensor
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))
        self.register_buffer("estbn_moving_speed", torch.full((1,), moving_speed, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.dim() == 4, "EstimatedBatchNorm2d takes (N, C, H, W)")
        mean, var = self.running_mean, self.running_var
        if self.training:
            self._update(x)
            # the next forward may come before this one's backward, which still needs the statistics of now
            mean, var = mean.clone(), var.clone()
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        wide = widened(x)
        mean, var, count = batch_moments(wide, (0, 2, 3))
        if should_update(count):
            around_running = var + (mean - self.running_mean).square()
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.estbn_moving_speed)
            self.running_var.lerp_(around_running.to(self.running_var.dtype), self.estbn_moving_speed)
            self.num_batches_tracked.add_(1)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class BatchChannelNorm(nn.Module):
    """y = γ_g ⊙ N_g(BN(x)) + β_g: a batch norm, then each (sample, group) to mean 0 and variance 1, then one γ, β a group.

    x (N, C, H, W). Keys of the official ImageNet code: `weight`, `bias` (1, G, 1), and `pbn.{weight, bias, running_mean,
    running_var, num_batches_tracked}`, with `estimate=True` also `pbn.estbn_moving_speed`; `bn.*`, as in the README, loads too.
    In training the statistics of the batch norm are those of all ranks. For inference the batch norm folds into the
    convolution before it, and one `group_norm` stays.

    Args:
        channels: C.
        groups: G, a divisor of C.
        eps: ε of both norms.
        estimate: normalize with running statistics in training too (`EstimatedBatchNorm2d`), for micro-batches.
        momentum: weight of a batch in the running statistics; with `estimate`, the initial moving speed.

    Raises:
        UsageError: the channels do not split into the groups.

    Source: arXiv 1911.09738, section 4.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 32,
        eps: float = 1e-5,
        estimate: bool = False,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise UsageError(f"BatchChannelNorm: {channels} channels do not split into {groups} groups")
        self.channels = channels
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(1, groups, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, groups, 1, device=device, dtype=dtype))
        self.pbn: nn.Module
        if estimate:
            self.pbn = EstimatedBatchNorm2d(channels, eps, momentum, device=device, dtype=dtype)
        else:
            self.pbn = SyncedBatchNorm2d(channels, eps, momentum, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.dim() == 4, "BatchChannelNorm takes (N, C, H, W)")
        return F.group_norm(self.pbn(x), self.groups, self._of_channels(self.weight), self._of_channels(self.bias), self.eps)

    def _of_channels(self, of_groups: Tensor) -> Tensor:
        """(1, G, 1) → (C,)"""
        return of_groups.expand(1, self.groups, self.channels // self.groups).flatten()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in [k for k in state_dict if k.startswith(f"{prefix}bn.")]:
            state_dict[f"{prefix}pbn.{key[len(prefix) + 3 :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{self.channels}, groups={self.groups}, eps={self.eps}"
