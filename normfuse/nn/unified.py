"""Unified Normalization: a quadratic mean over the batch, smoothed over a window of steps, that folds away at inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normfuse.errors import UsageError
from normfuse.nn._dtypes import narrowed
from normfuse.nn._inputs import takes
from normfuse.nn._quadratic_mean import QuadraticMean
from normfuse.nn._statistics import Joint, mean_over_ranks, statistics_dtype

__all__ = ["UnifiedNorm"]

_PLAIN_GRADIENT = 1000  # steps before the gradient is compensated, however short the warm-up


@dataclass(frozen=True)
class _Step:
    """What one training forward did, for its backward and for its recomputation."""

    v: Tensor  # (C,) what x² was divided by
    r: Tensor  # (C,) √((v + ε) / (φ + ε)), or 1
    skip: Tensor  # () bool
    windowed: Tensor  # () bool: the backward takes the mean over its window
    slot: Tensor  # () int64: the row of the backward window


class UnifiedNorm(QuadraticMean[_Step]):
    """y = γ x / √(φ + ε) + β;   φ is a running mean of the geometric mean of mean(x²) over the last M steps.

    Args:
        channels: C.
        window_size: M, the number of steps that the means are taken over; a pair for forward and backward.
        warmup_iters: W; before this step the batch's own mean(x²) is used.
        outlier_filtration: leave a batch out of the window if with it the arithmetic and the geometric mean of any
            channel differ by more than M times the variance of √window. Recommended for images, not for text.
        eps: ε.
        momentum: the part of the old running value that is kept, the opposite of `nn.BatchNorm`.
        per_channel_threshold: take that variance channel by channel, not over all channels together.

    Shape:
        (B, N, C) or (N, C) in training, any (..., C) in evaluation.

    There is no mean subtraction: `running_var` holds a second moment φ. Keys and shapes of the state dictionary are those
    of `UN1d`; a checkpoint with another window size loads, and the windows start from φ and from the running gradient
    statistic. No gradient flows into a statistic; the backward replaces mean(g z) by its own running mean.

    In training the statistics are those of the rows on all ranks of `torch.distributed`, in float32 at least; all ranks must
    then run the same forwards and backwards. Every forward in training mode is a step: with k micro-batches to a step of the
    optimizer, `window_size` and `warmup_iters` count micro-batches. A recomputation by `torch.utils.checkpoint` is not a
    step. Gradient statistics that are not finite (a loss scale that is too large) are left out.

    Source:
        "Unified Normalization for Accelerating and Stabilizing Transformers" (ACM MM 2022); the order of the
        operations is that of the authors' code.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_var: Tensor
    ema_gz: Tensor
    buffer_x2: Tensor
    buffer_gz: Tensor
    skip_counter: Tensor

    def __init__(
        self,
        channels: int,
        window_size: int | Sequence[int] = 4,
        warmup_iters: int = 4000,
        outlier_filtration: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.9,
        *,
        per_channel_threshold: bool = False,
    ) -> None:
        super().__init__()
        forward_window, backward_window = _windows(window_size)
        if channels < 1:
            raise UsageError(f"channels={channels}: expected at least 1")
        if not 0 <= momentum <= 1:
            raise UsageError(f"momentum={momentum}: expected a number from 0 (keep nothing) to 1 (keep everything)")
        if eps < 0 or warmup_iters < 0:
            raise UsageError(f"eps={eps}, warmup_iters={warmup_iters}: expected no negative number")
        if outlier_filtration and warmup_iters < forward_window:
            raise UsageError(
                f"warmup_iters={warmup_iters} with a window of {forward_window} and outlier_filtration=True: the window is not "
                f"full when the filter starts, and every batch would be an outlier; set warmup_iters to {forward_window} or more"
            )
        self.channels = channels
        self.window_size = (forward_window, backward_window)
        self.warmup_iters = warmup_iters
        self.outlier_filtration = outlier_filtration
        self.eps = eps
        self.momentum = momentum
        self.per_channel_threshold = per_channel_threshold
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("ema_gz", torch.zeros(channels))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("buffer_x2", torch.zeros(forward_window, channels))
        self.register_buffer("buffer_gz", torch.zeros(backward_window, channels))
        self.register_buffer("skip_counter", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """Normalize `x`.

        Args:
            x: (B, N, C) or (N, C).
            pad_mask: (B, N) or (N,) bool, True for padding, which is left out of mean(x²). Only read in training.

        Raises:
            UsageError: `x` is of integers or has another number of channels; in training, `pad_mask` has another shape, or there is
                no row on any rank.
        """
        if self.training:
            out: Tensor = self._train(x, pad_mask)
            return out
        takes(self, x, (self.channels,))
        s = self.weight / torch.sqrt(self.running_var + self.eps)
        return narrowed(x * s + self.bias, x)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, window_size={self.window_size}, warmup_iters={self.warmup_iters}, "
            f"outlier_filtration={self.outlier_filtration}, eps={self.eps}, momentum={self.momentum}"
        )

    # -- training ------------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _train(self, x: Tensor, pad_mask: Tensor | None) -> Tensor:
        if x.dim() not in (2, 3) or x.shape[-1] != self.channels:
            raise UsageError(
                f"UnifiedNorm({self.channels}) got {tuple(x.shape)}; expected (B, N, {self.channels}) or (N, {self.channels})"
            )
        if pad_mask is not None and (pad_mask.shape != x.shape[:-1] or pad_mask.dtype != torch.bool):
            raise UsageError(
                f"pad_mask is {pad_mask.dtype} of shape {tuple(pad_mask.shape)}; expected torch.bool of shape {tuple(x.shape[:-1])}"
            )
        step = self.take_step(x, None if pad_mask is None else ~pad_mask)
        out: Tensor = _Train.apply(x, self.weight, self.bias, step, self)
        return out

    def advance(self, q: Tensor) -> _Step:
        """One step of the statistics; without a branch on values, so that nothing waits for the device."""
        window, (size, backward_size) = self.buffer_x2, self.window_size
        phi = self.running_var.to(q.dtype)
        t = (self.iters + 1).squeeze(0)
        warm = t >= self.warmup_iters
        row = (torch.arange(size, device=q.device) == t % size).unsqueeze(-1)  # (M, 1)

        spread = window.to(q.dtype).sqrt()  # of the window before this step
        rows = torch.where(row, q, window.to(q.dtype))
        skip = torch.full((), size <= 1, device=q.device)
        if self.outlier_filtration and size > 1:
            variance = spread.var(0) if self.per_channel_threshold else spread.var()
            outlier = warm & (rows.mean(0) - _geometric_mean(rows) > size * variance).any()
            rows = torch.where(row & outlier, phi, rows)
            skip = skip | outlier
            self.skip_counter += outlier
        v = torch.where((t <= size) | ~warm | skip, q, _geometric_mean(rows))
        ratio = ((v + self.eps) / (phi + self.eps)).sqrt().clamp(1 / 5, 5)
        r = torch.where((t <= max(_PLAIN_GRADIENT, self.warmup_iters)) | skip, 1.0, ratio)

        self.iters.copy_(t)
        window.copy_(rows)
        self.running_var.copy_(self.momentum * phi + (1 - self.momentum) * v)
        return _Step(v, r, skip, (t > backward_size) & warm & ~skip, t % backward_size)

    # -- statistics from data, and from checkpoints --------------------------------------------------------------------

    def calibration_rows(self, found: tuple[Joint, ...], x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """The rows that φ is the mean square of. (rows, C)"""
        return x.flatten(0, -2) if pad_mask is None else x[~pad_mask]

    def set_calibrated(self, found: tuple[Joint, ...], source_weight: float) -> None:
        """φ ← source_weight φ + (1 − source_weight) mean(x²)"""
        self.calibrate(self.running_var, found, source_weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for window, running in (("buffer_x2", "running_var"), ("buffer_gz", "ema_gz")):
            stored, fill = state_dict.get(prefix + window), state_dict.get(prefix + running)
            own = getattr(self, window)
            if not (isinstance(stored, Tensor) and isinstance(fill, Tensor)) or stored.shape == own.shape:
                continue
            if stored.dim() == 2 and stored.shape[1:] == own.shape[1:] == fill.shape:
                state_dict[prefix + window] = fill.expand(own.shape).clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Train(torch.autograd.Function):
    """z = x / √(v + ε), y = γ z + β; the backward smooths mean(g z) as the forward smooths mean(x²)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, step: _Step, layer: UnifiedNorm) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.step, ctx.layer = step, layer
        z = x / torch.sqrt(step.v + layer.eps)
        return (z * weight + bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        step: _Step = ctx.step
        layer: UnifiedNorm = ctx.layer
        dtype = statistics_dtype(x, grad)
        divisor = torch.sqrt(step.v + layer.eps)
        z = x.to(dtype) / divisor
        go = (grad.to(dtype) * step.r).flatten(0, -2)  # (rows, C)
        gamma = (go * z.flatten(0, -2)).sum(0)
        gz = mean_over_ranks(gamma * weight, len(go)).everywhere
        kappa = _smoothed(gz, step, layer)
        dx = (go.view_as(z) * weight - kappa * z) / divisor
        beta = grad.to(dtype).flatten(0, -2).sum(0)
        return dx.to(x.dtype), gamma.to(weight.dtype), beta.to(weight.dtype), None, None


def _smoothed(gz: Tensor, step: _Step, layer: UnifiedNorm) -> Tensor:
    """Put gz into the window and the running mean; what mean(g z) is replaced by. (C,)"""
    ema_gz, buffer_gz, momentum = layer.ema_gz, layer.buffer_gz, layer.momentum
    psi = ema_gz.to(gz.dtype)
    finite = gz.isfinite().all()
    row = (torch.arange(len(buffer_gz), device=gz.device) == step.slot).unsqueeze(-1)
    rows = torch.where(row, torch.where(step.skip | ~finite, psi, gz), buffer_gz.to(gz.dtype))
    m = torch.where(step.windowed, rows.mean(0), torch.where(finite, gz, psi))
    psi = momentum * psi + (1 - momentum) * m
    buffer_gz.copy_(rows)
    ema_gz.copy_(psi)
    return torch.where(step.skip, m, psi)


def _geometric_mean(rows: Tensor) -> Tensor:
    return rows.log().mean(0).exp()


def _windows(size: int | Sequence[int]) -> tuple[int, int]:
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if len(sizes) != 2 or any(not isinstance(s, int) or s < 1 for s in sizes):
        raise UsageError(f"window_size={size!r}: expected a positive number, or a pair of them for forward and backward")
    return sizes[0], sizes[1]
