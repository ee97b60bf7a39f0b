"""PowerNorm: a running quadratic mean over the batch behind a root mean square over groups of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normfuse.errors import UsageError
from normfuse.nn._dtypes import narrowed
from normfuse.nn._inputs import takes
from normfuse.nn._quadratic_mean import QuadraticMean
from normfuse.nn._statistics import Joint, mean_over_ranks, statistics_dtype

__all__ = ["PowerNorm"]


@dataclass(frozen=True)
class _Step:
    """What one training forward did, for its backward and for its recomputation."""

    q: Tensor  # (C,) mean(u²) of the batch
    divisor: Tensor  # (C,) √(q + ε) in the warm-up, later √(φ + ε)


class PowerNorm(QuadraticMean[_Step]):
    """y = γ u / √(φ + ε) + β,   u = x / √(mean(x² over a group of channels) + ε_g);   φ is a running mean of mean(u²).

    Args:
        num_features: C.
        eps: ε.
        alpha_fwd: the part of the old φ that is kept.
        alpha_bkw: the backward takes off 1 − alpha_bkw of the running gradient statistic ψ.
        affine: False freezes γ and β; they stay in the state dictionary, as in the authors' code.
        warmup_iters: W; up to this step the batch's own mean(u²) is used, and φ is the mean over all steps.
        group_num: the number of groups of channels, in the paper the number of heads; 0 for u = x.
        group_scaling: False for u = x, the variant that folds completely.
        group_eps: ε_g; the authors' code always takes 1e-5.

    Shape:
        (T, B, C) or (N, C) in training, any (..., C) in evaluation.

    Keys and shapes of the state dictionary are those of `MaskPowerNorm`; the group scaling has none. No gradient flows
    into φ. In the warm-up φ is updated twice a step, first as the mean over all steps and then as a running mean.

    In training the statistics are those of the rows on all ranks of `torch.distributed`, in float32 at least; all ranks must
    then run the same forwards and backwards. Every forward in training mode is a step: with k micro-batches to a step of the
    optimizer, `warmup_iters` counts micro-batches. A recomputation by `torch.utils.checkpoint` is not a step. Gradient
    statistics that are not finite (a loss scale that is too large) are left out.

    Source:
        "PowerNorm: Rethinking Batch Normalization in Transformers" (ICML 2020); group scaling and warm-up are those
        of the authors' code.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_phi: Tensor
    ema_gz: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        affine: bool = True,
        warmup_iters: int = 10000,
        group_num: int = 1,
        *,
        group_scaling: bool = True,
        group_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise UsageError(f"num_features={num_features}: expected at least 1")
        if group_num < 0 or (group_num and num_features % group_num):
            raise UsageError(f"group_num={group_num}: expected a divisor of num_features={num_features}, or 0 for no group scaling")
        if not (0 <= alpha_fwd <= 1 and 0 <= alpha_bkw <= 1):
            raise UsageError(f"alpha_fwd={alpha_fwd}, alpha_bkw={alpha_bkw}: expected numbers from 0 to 1")
        if min(eps, group_eps, warmup_iters) < 0:
            raise UsageError(f"eps={eps}, group_eps={group_eps}, warmup_iters={warmup_iters}: expected no negative number")
        self.num_features = num_features
        self.eps = eps
        self.alpha_fwd = alpha_fwd
        self.alpha_bkw = alpha_bkw
        self.affine = affine
        self.warmup_iters = warmup_iters
        self.group_num = group_num if group_scaling else 0
        self.group_eps = group_eps
        self.weight = nn.Parameter(torch.ones(num_features), requires_grad=affine)
        self.bias = nn.Parameter(torch.zeros(num_features), requires_grad=affine)
        self.register_buffer("running_phi", torch.ones(1, num_features, 1, 1))
        self.register_buffer("ema_gz", torch.zeros(1, num_features, 1, 1))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalize `x`.

        Args:
            x: (T, B, C) or (N, C).
            pad_mask: (B, T), or (N,) for (N, C), bool, True for padding, which is left out of mean(u²). Only read in training.

        Raises:
            UsageError: `x` is of integers or has another number of channels; in training, `pad_mask` has another shape, or there is
                no row on any rank.
        """
        if self.training:
            out: Tensor = self._train(x, pad_mask)
            return out
        takes(self, x, (self.num_features,))
        s = self.weight / torch.sqrt(self.running_phi.flatten() + self.eps)
        return narrowed(self.grouped(x) * s + self.bias, x)

    def grouped(self, x: Tensor) -> Tensor:
        """u = x / √(mean(x² over a group of channels) + ε_g), or x without group scaling. (..., C)"""
        if not self.group_num:
            return x
        width = self.num_features // self.group_num
        return F.rms_norm(x.unflatten(-1, (self.group_num, width)), (width,), None, self.group_eps).flatten(-2)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, alpha_fwd={self.alpha_fwd}, alpha_bkw={self.alpha_bkw}, "
            f"affine={self.affine}, warmup_iters={self.warmup_iters}, group_num={self.group_num}"
        )

    # -- training ------------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _train(self, x: Tensor, pad_mask: Tensor | None) -> Tensor:
        C = self.num_features
        if x.dim() not in (2, 3) or x.shape[-1] != C:
            raise UsageError(f"PowerNorm({C}) got {tuple(x.shape)}; expected (T, B, {C}) or (N, {C})")
        kept = None if pad_mask is None else _kept(x, pad_mask)
        u = self.grouped(x)
        out: Tensor = _Train.apply(u, self.weight, self.bias, self.take_step(u, kept), self)
        return narrowed(out, x)

    def advance(self, q: Tensor) -> _Step:
        """One step of the statistics; without a branch on values, so that nothing waits for the device."""
        phi = self.running_phi.flatten().to(q.dtype)
        t = (self.iters + 1).squeeze(0)
        divisor = torch.sqrt(torch.where(t <= self.warmup_iters, q, phi) + self.eps)
        phi = torch.where(t < self.warmup_iters, phi * (t - 1) / t + q / t, phi)
        phi = self.alpha_fwd * phi + (1 - self.alpha_fwd) * q
        self.iters.copy_(t)
        self.running_phi.copy_(phi.view_as(self.running_phi))
        return _Step(q, divisor)

    # -- statistics from data ------------------------------------------------------------------------------------------

    def calibration_rows(self, found: tuple[Joint, ...], x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """The rows that φ is the mean square of. (rows, C)"""
        u = self.grouped(x)
        return u.flatten(0, -2) if pad_mask is None else u[_kept(u, pad_mask)]

    def set_calibrated(self, found: tuple[Joint, ...], source_weight: float) -> None:
        """φ ← source_weight φ + (1 − source_weight) mean(u²)"""
        self.calibrate(self.running_phi, found, source_weight)


class _Train(torch.autograd.Function):
    """z = u / divisor, y = γ z + β; the backward divides by √(q + ε) of the batch even where the forward did not."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, step: _Step, layer: PowerNorm) -> Tensor:
        ctx.save_for_backward(u, weight)
        ctx.step, ctx.layer = step, layer
        return (u / step.divisor * weight + bias).to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, weight = ctx.saved_tensors
        step: _Step = ctx.step
        layer: PowerNorm = ctx.layer
        dtype = statistics_dtype(u, grad)
        z = u.to(dtype) / step.divisor
        go = grad.to(dtype)
        psi = layer.ema_gz.flatten().to(dtype)
        g = go * weight - (1 - layer.alpha_bkw) * psi * z
        rows = (g * z).flatten(0, -2)
        mean = mean_over_ranks(rows.sum(0), len(rows)).everywhere
        layer.ema_gz.copy_((psi + torch.where(mean.isfinite().all(), mean, 0.0)).view_as(layer.ema_gz))
        dx = g / torch.sqrt(step.q + layer.eps)
        gamma, beta = (go * z).flatten(0, -2).sum(0), go.flatten(0, -2).sum(0)
        return dx.to(u.dtype), gamma.to(weight.dtype), beta.to(weight.dtype), None, None


def _kept(x: Tensor, pad_mask: Tensor) -> Tensor:
    """(T, B) or (N,) bool, True for the rows that count."""
    expected = x.shape[:-1][::-1]
    if pad_mask.dtype != torch.bool or pad_mask.shape != expected:
        raise UsageError(
            f"pad_mask is {pad_mask.dtype} of shape {tuple(pad_mask.shape)}; expected torch.bool of shape {tuple(expected)}"
        )
    return ~(pad_mask.T if pad_mask.dim() == 2 else pad_mask)
