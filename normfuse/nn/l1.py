"""Normalization by the mean absolute deviation in place of the standard deviation: no square, no root."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normfuse.errors import UsageError
from normfuse.nn._channel_affine import channel_affine
from normfuse.nn._dtypes import narrowed, widened
from normfuse.nn._inputs import takes
from normfuse.nn._moments import should_update
from normfuse.ranks import several_ranks

__all__ = ["L1BatchNorm", "L1LayerNorm", "from_norm_matters"]

#: c for which c mean|x − μ| is the standard deviation of normally distributed x
GAUSSIAN = math.sqrt(math.pi / 2)


class L1LayerNorm(nn.Module):
    """y = γ (x − μ) / s + β,   μ = mean x,   s = c mean|x − μ| + ε, over the trailing axes `normalized_shape`.

    The gradient, with h = γ ∂L/∂y and x̂ = (x − μ) / s, and sgn 0 = 0:
    ∂L/∂x = (h − mean h − c (sgn x̂ − mean sgn x̂) mean(h x̂)) / s. In training one tensor of the size of x is kept for it, x
    itself; the chain of ATen calls would keep two in float32. The layer can be differentiated once in training mode, and any
    number of times in eval mode.

    Source: Hoffer et al., Norm matters, NeurIPS 2018 (the statistic); ShiftQuant and L1 normalization,
    arXiv 2411.10948 (for layer normalization).

    Shape: (…, *normalized_shape) to the same, in the dtype of the input; float16 and bfloat16 have statistics in float32.

    Args:
        normalized_shape: the trailing axes.
        eps: ε, in units of x; a row of equal values gives β when it is positive.
        elementwise_affine: γ (`weight`) and, with `bias`, β (`bias`) of shape `normalized_shape`.
        bias: β is there.
        scale_const: c. The default makes s the standard deviation of normally distributed x; networks that are trained from
            scratch with γ do as well with 1.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        scale_const: float = GAUSSIAN,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps = eps
        self.scale_const = _positive(scale_const, type(self).__name__)

        def affine(wanted: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype)) if wanted else None

        self.register_parameter("weight", affine(elementwise_affine))
        self.register_parameter("bias", affine(elementwise_affine and bias))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _reset_affine(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        takes(self, x, self.normalized_shape)
        dims = tuple(range(-len(self.normalized_shape), 0))
        if self.training:
            y: Tensor = _L1Normalize.apply(x, self.weight, self.bias, dims, self.scale_const, self.eps, None)[0]
            return y
        wide = widened(x)
        centered = wide - wide.mean(dims, keepdim=True)
        y = centered / (self.scale_const * centered.abs().mean(dims, keepdim=True) + self.eps)
        if self.weight is not None:
            y = narrowed(y, self.weight) * self.weight
        if self.bias is not None:
            y = y + self.bias
        return narrowed(y, x)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}, "
            f"bias={self.bias is not None}, scale_const={self.scale_const:.6g}"
        )


class L1BatchNorm(nn.Module):
    """y = γ (x − μ) / (s + ε) + β,   μ = mean x,   s = c mean|x − μ|, over the batch and all positions of each channel.

    In training μ and s are those of the batch, of the batches of all ranks if `torch.distributed` runs; `running_mean` and
    `running_scale` follow them as in `nn.BatchNorm2d` (momentum is the weight of the new value, None for the mean of all
    batches) and take their place in eval mode, where the layer is affine and folds into a convolution before or after it. A
    forward that activation checkpointing repeats does not count twice.

    Checkpoints of the official `L1BatchNorm2d` load with `strict=True`; see `from_norm_matters`. Its momentum is the weight of
    the old value: its 0.1 is 0.9 here.

    Source: Hoffer et al., Norm matters, NeurIPS 2018; its official code is the repository eladhoffer/norm_matters.

    Shape: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W) to the same, in the dtype of the input; statistics of float16 and
    bfloat16 in float32.

    Args:
        num_features: C.
        eps: ε, in units of x.
        momentum: weight of the batch in the running statistics.
        affine: γ (`weight`) and β (`bias`) of shape (C,).
        scale_const: c; the default makes s the standard deviation of normally distributed x.

    Raises:
        UsageError: in training, an input of another rank or number of channels, or with fewer than two values a channel.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_scale: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        scale_const: float = GAUSSIAN,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.scale_const = _positive(scale_const, type(self).__name__)
        for name in ("weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if affine else None)
        for name in ("running_mean", "running_scale"):
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.empty((), device=device, dtype=torch.long))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        self.running_mean.zero_()
        self.running_scale.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        _reset_affine(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self._over_batch(x) if self.training else self._affine(x)

    def _affine(self, x: Tensor) -> Tensor:
        """Unit variance and γ / (s + ε) for a weight: (s + ε)² in place of a variance would be zero in float16."""
        scale = widened(self.running_scale)
        gain = (scale + self.eps).reciprocal() if self.weight is None else widened(self.weight) / (scale + self.eps)
        bias = None if self.bias is None else widened(self.bias)
        return channel_affine(x, widened(self.running_mean), gain, bias)

    def _over_batch(self, x: Tensor) -> Tensor:
        if not 2 <= x.ndim <= 5 or x.shape[1] != self.num_features:
            raise UsageError(
                f"L1BatchNorm({self.num_features}): the input has shape {tuple(x.shape)}; expected (N, {self.num_features}) "
                "and up to three more axes"
            )
        count = _count(x)
        if count < 2:
            found = "an empty batch" if count == 0 else "one value a channel"
            raise UsageError(
                f"L1BatchNorm: {found} in training, input {tuple(x.shape)}; expected at least two values, or call eval() first"
            )
        over_ranks = count if several_ranks() else None
        dims = (0, *range(2, x.ndim))
        weight, bias = (None if p is None else p.reshape(-1, *[1] * (x.ndim - 2)) for p in (self.weight, self.bias))
        y: Tensor
        y, mean, scale = _L1Normalize.apply(x, weight, bias, dims, self.scale_const, self.eps, over_ranks)
        if should_update(count):
            self._follow(mean.reshape(-1), scale.reshape(-1))
        return y

    @torch.no_grad()
    def _follow(self, mean: Tensor, scale: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        for running, new in ((self.running_mean, mean), (self.running_scale, scale)):
            rate = self.num_batches_tracked.to(running.dtype).reciprocal() if self.momentum is None else self.momentum
            running.lerp_(new.to(running.dtype), rate)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}running_var" in state_dict and f"{prefix}scale" in state_dict:
            converted = from_norm_matters(state_dict, prefix, self.eps)
            state_dict.clear()
            state_dict.update(converted)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.weight is not None}, "
            f"scale_const={self.scale_const:.6g}"
        )


def from_norm_matters(state: Mapping[str, Tensor], prefix: str = "", eps: float = 1e-5) -> dict[str, Tensor]:
    """A state with the keys of `L1BatchNorm` from one of the official `L1BatchNorm2d` (repository eladhoffer/norm_matters).

    There `scale` is γ, `mean` is β, and `running_var` is a running mean of 1 / (s + ε), so that s = 1 / running_var − ε gives
    the same function. The number of batches is not known there; it is set to 0.

    Args:
        state: keys {prefix}running_mean, {prefix}running_var, {prefix}scale and {prefix}mean, and any others.
        prefix: path of the layer with a dot at the end, or "".
        eps: ε of the layer that is to be loaded.

    Returns:
        A new state; keys of other layers are as they were.

    Raises:
        UsageError: a key is missing, or the statistics were never trained (`running_var` starts at 0).
    """
    official = ("running_mean", "running_var", "scale", "mean")
    missing = [prefix + name for name in official if prefix + name not in state]
    if missing:
        raise UsageError(f"from_norm_matters: no {', '.join(missing)}; expected the keys of L1BatchNorm2d under {prefix!r}")
    rest = {k: v for k, v in state.items() if k not in {prefix + name for name in official}}
    mean, reciprocal, gamma, beta = (state[prefix + name] for name in official)
    if not bool((reciprocal > 0).all()):
        raise UsageError(f"from_norm_matters: {prefix}running_var holds values that are not positive: the layer was never trained")
    scale = (reciprocal.double().reciprocal() - eps).clamp(min=0).to(reciprocal.dtype)
    own = {"weight": gamma, "bias": beta, "running_mean": mean, "running_scale": scale, "num_batches_tracked": torch.tensor(0)}
    return rest | {prefix + name: value for name, value in own.items()}


class _L1Normalize(torch.autograd.Function):
    """γ (x − μ) / (s + ε) + β with μ and s = c mean|x − μ| over `dims`; gives y, μ and s.

    `over_ranks` is the number of values over all ranks, or None to stay on this one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        dims: tuple[int, ...],
        c: float,
        eps: float,
        over_ranks: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = widened(x)
        (mean,) = _means((wide,), dims, over_ranks)
        centered = wide - mean
        scale = c * _means((centered.abs(),), dims, over_ranks)[0]
        y = centered / (scale + eps)
        y = y if weight is None else y * widened(weight)
        y = y if bias is None else y + widened(bias)
        return y.to(x.dtype), mean, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, ctx.dims, ctx.c, ctx.eps, ctx.over_ranks = inputs
        _, mean, scale = output
        ctx.mark_non_differentiable(mean, scale)
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.save_for_backward(x, weight, mean, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        g = widened(grad)
        s = scale + ctx.eps
        normal = (widened(x) - mean) / s
        rest: tuple[None, ...] = (None,) * 4
        of_weight = (g * normal).sum_to_size(weight.shape).to(weight.dtype) if ctx.needs_input_grad[1] else None
        of_bias = g.sum_to_size(ctx.bias[0]).to(ctx.bias[1]) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, of_bias, *rest
        h = g if weight is None else g * widened(weight)
        sign = normal.sign()
        mean_h, mean_hx, mean_sign = _means((h, h * normal, sign), ctx.dims, ctx.over_ranks)
        of_x = (h - mean_h - ctx.c * (sign - mean_sign) * mean_hx) / s
        return of_x.to(x.dtype), of_weight, of_bias, *rest


def _means(values: tuple[Tensor, ...], dims: tuple[int, ...], over_ranks: int | None) -> tuple[Tensor, ...]:
    """The mean of each value over `dims`, which are kept; over all ranks if their number of values is given."""
    if over_ranks is None:
        return tuple(v.mean(dims, keepdim=True) for v in values)
    sums = torch.stack([v.sum(dims, keepdim=True) for v in values])
    dist.all_reduce(sums)
    return tuple(sums / over_ranks)


def _count(x: Tensor) -> int:
    """Number of values a channel, on all ranks."""
    here = x.shape[0] * math.prod(x.shape[2:])
    if not several_ranks():
        return here
    total = torch.tensor(here, device=x.device)
    dist.all_reduce(total)
    return int(total)


def _positive(scale_const: float, name: str) -> float:
    if not 0 < scale_const < math.inf:
        raise UsageError(f"{name}: scale_const={scale_const}, expected a positive number")
    return scale_const


def _reset_affine(weight: Tensor | None, bias: Tensor | None) -> None:
    if weight is not None:
        nn.init.ones_(weight)
    if bias is not None:
        nn.init.zeros_(bias)
