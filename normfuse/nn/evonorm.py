"""EvoNorm: normalization and activation in one layer, found by search.

With σ the biased standard deviation √(var + ε), rms the root mean square √(mean x² + ε), `hw` over the positions of one channel
and `g` over one group of channels and its positions, R the running variance and act = SiLU:

| kind | with activation                                   | `apply_act=False` |
|------|---------------------------------------------------|-------------------|
| B0   | x / max(√(R + ε), v ⊙ x + σ_hw(x)) ⊙ γ + β        | x ⊙ γ + β         |
| B1   | x / max(√(R + ε), (x + 1) rms_hw(x)) ⊙ γ + β      | x ⊙ γ + β         |
| B2   | x / max(√(R + ε), rms_hw(x) − x) ⊙ γ + β          | x ⊙ γ + β         |
| S0   | x sigmoid(v ⊙ x) / σ_g(x) ⊙ γ + β                 | x ⊙ γ + β         |
| S0a  | the same                                          | x / σ_g(x) ⊙ γ + β |
| S1   | act(x) / σ_g(x) ⊙ γ + β                           | x ⊙ γ + β         |
| S1a  | the same                                          | x / σ_g(x) ⊙ γ + β |
| S2   | act(x) / rms_g(x) ⊙ γ + β                         | x ⊙ γ + β         |
| S2a  | the same                                          | x / rms_g(x) ⊙ γ + β |

Parameters, buffers and defaults are those of timm's `EvoNorm2d*`. Statistics are computed in float32 at least; the result has the
dtype of x.

Liu et al., *Evolving Normalization-Activation Layers*, arXiv 2004.02967; the S*a kinds and B1, B2, S1, S2 as in timm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normfuse.errors import UsageError
from normfuse.nn._channel_affine import channel_affine
from normfuse.nn._dtypes import narrowed, sizes_known, widened
from normfuse.nn._moments import batch_moments, should_update

__all__ = [
    "KINDS",
    "EvoNorm",
    "EvoNorm2dB0",
    "EvoNorm2dB1",
    "EvoNorm2dB2",
    "EvoNorm2dS0",
    "EvoNorm2dS0a",
    "EvoNorm2dS1",
    "EvoNorm2dS1a",
    "EvoNorm2dS2",
    "EvoNorm2dS2a",
]


class _EvoNorm(nn.Module):
    """γ, β and what all kinds share. x (N, C, H, W) → (N, C, H, W)."""

    def __init__(self, num_features: int, apply_act: bool, eps: float, device: Any, dtype: Any) -> None:
        super().__init__()
        self.num_features = num_features
        self.apply_act = apply_act
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def _affine(self, x: Tensor) -> Tensor:
        """x ⊙ γ + β, spelled as the one operator that a graph without shapes takes for an affine of the channels."""
        gamma, beta = widened(self.weight), widened(self.bias)
        return channel_affine(x, torch.zeros_like(gamma), gamma, beta)

    def _check(self, x: Tensor) -> None:
        torch._assert(x.dim() == 4, f"{type(self).__name__} takes (N, C, H, W)")

    def extra_repr(self) -> str:
        return f"{self.num_features}, apply_act={self.apply_act}, eps={self.eps}"


def _empty(x: Tensor) -> bool:
    """An empty batch has no variance, of which torch would warn; a traced value counts as filled."""
    return sizes_known(x) and x.numel() == 0


# -- the B kinds: a running variance -----------------------------------------------------------------------------------


class _Batch(_EvoNorm):
    def __init__(
        self, num_features: int, apply_act: bool, momentum: float, eps: float, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(num_features, apply_act, eps, device, dtype)
        self.momentum = momentum
        self.running_var: Tensor
        self.register_buffer("running_var", torch.ones(num_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        y = x
        if self.apply_act and not _empty(x):
            wide = widened(x)
            var = self._batch_variance(wide) if self.training else widened(self.running_var)
            floor = narrowed((var + self.eps).sqrt(), self.running_var).view(1, -1, 1, 1)
            y = wide / torch.maximum(floor, self._instance_term(wide))
        return narrowed(self._affine(y), x)

    def _instance_term(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _batch_variance(self, x: Tensor) -> Tensor:
        """The biased variance of the batch, over all ranks; its unbiased form goes into the running variance."""
        _, var, count = batch_moments(x, (0, 2, 3))
        if should_update(count):
            if count < 2:
                raise UsageError(f"{type(self).__name__} in training needs more than one value per channel, got x {tuple(x.shape)}")
            with torch.no_grad():
                unbiased = (var * (count / (count - 1))).to(self.running_var.dtype)
                self.running_var.lerp_(unbiased, self.momentum)
        return var


class EvoNorm2dB0(_Batch):
    """y = x / max(√(R + ε), v ⊙ x + σ_hw(x)) ⊙ γ + β; y = x ⊙ γ + β with `apply_act=False`.

    x (N, C, H, W). Parameters `weight` γ, `bias` β, `v` (C,), buffer `running_var` R (C,); without activation there is no `v`.

    Args:
        num_features: C.
        apply_act: False leaves the affine only.
        momentum: weight of the batch's unbiased variance in R ← (1 − m) R + m var.
        eps: ε.

    Source: arXiv 2004.02967, table 2.
    """

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, apply_act, momentum, eps, device, dtype)
        self.v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if apply_act else None

    def _instance_term(self, x: Tensor) -> Tensor:
        assert self.v is not None
        return x * self.v.view(1, -1, 1, 1) + (x.var((2, 3), correction=0, keepdim=True) + self.eps).sqrt()


class EvoNorm2dB1(_Batch):
    """y = x / max(√(R + ε), (x + 1) rms_hw(x)) ⊙ γ + β; y = x ⊙ γ + β with `apply_act=False`.

    x (N, C, H, W). Parameters `weight` γ, `bias` β (C,), buffer `running_var` R (C,). Arguments as for `EvoNorm2dB0`.

    Source: arXiv 2004.02967, appendix; timm.
    """

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, apply_act, momentum, eps, device, dtype)

    def _instance_term(self, x: Tensor) -> Tensor:
        return (x + 1) * _instance_rms(x, self.eps)


class EvoNorm2dB2(_Batch):
    """y = x / max(√(R + ε), rms_hw(x) − x) ⊙ γ + β; y = x ⊙ γ + β with `apply_act=False`.

    x (N, C, H, W). Parameters `weight` γ, `bias` β (C,), buffer `running_var` R (C,). Arguments as for `EvoNorm2dB0`.

    Source: arXiv 2004.02967, appendix; timm.
    """

    def __init__(
        self,
        num_features: int,
        apply_act: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, apply_act, momentum, eps, device, dtype)

    def _instance_term(self, x: Tensor) -> Tensor:
        return _instance_rms(x, self.eps) - x


def _instance_rms(x: Tensor, eps: float) -> Tensor:
    return (x.square().mean((2, 3), keepdim=True) + eps).sqrt()


# -- the S kinds: the statistics of each sample ------------------------------------------------------------------------


class _Sample(_EvoNorm):
    """x / den_g(x) for groups of channels; `always` divides without activation too."""

    always = False

    def __init__(
        self,
        num_features: int,
        groups: int,
        group_size: int | None,
        apply_act: bool,
        eps: float,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, apply_act, eps, device, dtype)
        if group_size is not None:
            if group_size < 1 or num_features % group_size:
                raise UsageError(f"{type(self).__name__}: {num_features} channels do not split into groups of {group_size}")
            groups = num_features // group_size
        if groups < 1 or num_features % groups:
            raise UsageError(f"{type(self).__name__}: {num_features} channels do not split into {groups} groups")
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        y = x
        if (self.apply_act or self.always) and not _empty(x):
            split = (self.groups, self.num_features // self.groups)
            den = self._denominator(widened(x).unflatten(1, split))  # (N, G, 1, 1, 1)
            y = (self._activation(x).unflatten(1, split) / den).flatten(1, 2)
        return narrowed(self._affine(y), x)

    def _activation(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _denominator(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.num_features}, groups={self.groups}, apply_act={self.apply_act}, eps={self.eps}"


class EvoNorm2dS0(_Sample):
    """y = x sigmoid(v ⊙ x) / σ_g(x) ⊙ γ + β; y = x ⊙ γ + β with `apply_act=False`.

    x (N, C, H, W). Parameters `weight` γ, `bias` β, `v` (C,); without activation there is no `v`.

    Args:
        num_features: C.
        groups: G, a divisor of C.
        group_size: C / G; takes the place of `groups`.
        apply_act: False leaves the affine only.
        eps: ε.

    Raises:
        UsageError: the channels do not split into such groups.

    Source: arXiv 2004.02967, table 2.
    """

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, groups, group_size, apply_act, eps, device, dtype)
        self.v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if apply_act else None

    def _activation(self, x: Tensor) -> Tensor:
        return x if self.v is None else x * (x * self.v.view(1, -1, 1, 1)).sigmoid()

    def _denominator(self, x: Tensor) -> Tensor:
        return _group_std(x, self.eps)


class EvoNorm2dS0a(EvoNorm2dS0):
    """y = x sigmoid(v ⊙ x) / σ_g(x) ⊙ γ + β; y = x / σ_g(x) ⊙ γ + β with `apply_act=False`.

    Arguments and parameters of `EvoNorm2dS0`; ε is 1e-3 unless said otherwise. Source: timm.
    """

    always = True

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        eps: float = 1e-3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, groups, group_size, apply_act, eps, device, dtype)


class EvoNorm2dS1(_Sample):
    """y = act(x) / σ_g(x) ⊙ γ + β; y = x ⊙ γ + β with `apply_act=False`.

    x (N, C, H, W). Parameters `weight` γ, `bias` β (C,). Arguments of `EvoNorm2dS0`, and:

    Args:
        act_layer: makes the activation; None for SiLU.

    Source: arXiv 2004.02967, appendix; timm.
    """

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        act_layer: Callable[[], nn.Module] | None = None,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, groups, group_size, apply_act, eps, device, dtype)
        self.act = (act_layer or nn.SiLU)() if apply_act else nn.Identity()

    def _activation(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(x)
        return out

    def _denominator(self, x: Tensor) -> Tensor:
        return _group_std(x, self.eps)


class EvoNorm2dS1a(EvoNorm2dS1):
    """y = act(x) / σ_g(x) ⊙ γ + β; y = x / σ_g(x) ⊙ γ + β with `apply_act=False`.

    Arguments and parameters of `EvoNorm2dS1`; ε is 1e-3 unless said otherwise. Source: timm.
    """

    always = True

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        act_layer: Callable[[], nn.Module] | None = None,
        eps: float = 1e-3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, groups, group_size, apply_act, act_layer, eps, device, dtype)


class EvoNorm2dS2(EvoNorm2dS1):
    """y = act(x) / rms_g(x) ⊙ γ + β; y = x ⊙ γ + β with `apply_act=False`.

    Arguments and parameters of `EvoNorm2dS1`. Source: arXiv 2004.02967, appendix; timm.
    """

    def _denominator(self, x: Tensor) -> Tensor:
        return (x.square().mean((2, 3, 4), keepdim=True) + self.eps).sqrt()


class EvoNorm2dS2a(EvoNorm2dS2):
    """y = act(x) / rms_g(x) ⊙ γ + β; y = x / rms_g(x) ⊙ γ + β with `apply_act=False`.

    Arguments and parameters of `EvoNorm2dS1`; ε is 1e-3 unless said otherwise. Source: timm.
    """

    always = True

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        group_size: int | None = None,
        apply_act: bool = True,
        act_layer: Callable[[], nn.Module] | None = None,
        eps: float = 1e-3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, groups, group_size, apply_act, act_layer, eps, device, dtype)


def _group_std(x: Tensor, eps: float) -> Tensor:
    return (x.var((2, 3, 4), correction=0, keepdim=True) + eps).sqrt()


KINDS: dict[str, Callable[..., _EvoNorm]] = {
    "B0": EvoNorm2dB0,
    "B1": EvoNorm2dB1,
    "B2": EvoNorm2dB2,
    "S0": EvoNorm2dS0,
    "S0a": EvoNorm2dS0a,
    "S1": EvoNorm2dS1,
    "S1a": EvoNorm2dS1a,
    "S2": EvoNorm2dS2,
    "S2a": EvoNorm2dS2a,
}


def EvoNorm(kind: str, num_features: int, **kwargs: Any) -> nn.Module:  # noqa: N802 - reads as the class that it returns
    """The EvoNorm layer of that kind.

    Args:
        kind: one of `KINDS`: "B0", "B1", "B2", "S0", "S0a", "S1", "S1a", "S2", "S2a".
        num_features: C.
        kwargs: arguments of that layer.

    Raises:
        UsageError: there is no such kind.
    """
    if kind not in KINDS:
        raise UsageError(f"EvoNorm kind {kind!r}: expected one of {', '.join(KINDS)}")
    return KINDS[kind](num_features, **kwargs)
