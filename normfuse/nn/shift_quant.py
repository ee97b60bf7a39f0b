"""Training in integers: linear and convolution layers that quantize weight, activation and gradient.

Every product of a layer, forward and backward, is one of integers: the operand whose channels differ in range is split along
the contraction axis into groups whose scales are powers of two, the other one has a scale for each output.

| product        | sum over            | groups of powers of two           | the other operand          |
|----------------|---------------------|-----------------------------------|----------------------------|
| Y = X̂ Ŵᵀ       | input channels      | X, nearest                        | W, one scale an output     |
| ∂X = ∂Ŷ Ŵ      | output channels     | ∂Y by output channel, stochastic  | Ŵ, as in the forward       |
| ∂W = ∂Ŷᵀ X̂     | tokens or positions | ∂Y by token, stochastic           | X̂, as in the forward       |

What is rounded passes its gradient on as if it were not. Stochastic rounding keeps both gradients free of bias: their mean
over the draws is the gradient for Ŷ = X̂ Ŵᵀ. The sums are those of float arithmetic on the integers times their scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normfuse.errors import UsageError
from normfuse.nn._dtypes import narrowed, widened
from normfuse.nn._integers import Draws, integer, stochastic, width
from normfuse.quant.shift import Shifted, shift_quantize

__all__ = ["ShiftQuantConv2d", "ShiftQuantLinear"]


class _IntegerTraining(nn.Module):
    """What the two layers share: the widths, the quantized weight and the numbering of random draws."""

    weight: Any  # nn.Linear and nn.Conv2d declare it differently
    bias: Any

    def _configure(self, bits: int, activation_bits: int | None, gradient_bits: int | None, groups: int, seed: int | None) -> None:
        name = type(self).__name__
        self.bits = integer(name, "bits", bits, 2, 8)
        self.activation_bits = width(name, "activation_bits", activation_bits)
        self.gradient_bits = width(name, "gradient_bits", gradient_bits)
        self.shift_groups = integer(name, "shift_groups", groups, 1, 8)
        self._draws = Draws(name, seed)

    def quantized_weight(self) -> Tensor:
        """Ŵ = S ⊙ C in the dtype of W: codes of `bits` bits times max|W| / (2^(bits-1) - 1) for each output."""
        return narrowed(_by_output(widened(self.weight), self.bits), self.weight)

    def _settings(self) -> str:
        return (
            f"bits={self.bits}, activation_bits={self.activation_bits}, gradient_bits={self.gradient_bits}, "
            f"shift_groups={self.shift_groups}"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a draw is a state of its own
    def _product(self, x: Tensor, rule: _Linear | _Conv) -> Tensor:
        y: Tensor = _Product.apply(x, self.weight, self, rule, self._draws.next())
        return narrowed(y, x)


class ShiftQuantLinear(_IntegerTraining, nn.Linear):
    """Y = X̂ Ŵᵀ + b,   Ŵ = S ⊙ C,   X̂ = s 2^(-e[k]) A: linear layer that trains in integers.

    X has one scale s and an exponent e[k] for each input feature, W a scale for each output, all by the largest absolute value.
    In the backward ∂Y is quantized twice with stochastic rounding: with exponents by output feature for ∂X = ∂Ŷ Ŵ, by token
    for ∂W = ∂Ŷᵀ X̂. Gradients pass the rounding straight through. What is kept for the backward is X in one byte a value. The
    parameters are those of `nn.Linear`, in float; an optimizer sees nothing of the integers.

    In eval mode the layer is F.linear(x, Ŵ, b): the weights are exactly those it was trained with, and inputs stay in float, so
    that `normfuse.optimize` sees a plain linear layer; its `quantize=` makes the integers, activations included.

    Source: arXiv 2411.10948 (ShiftQuant).

    Shape: (…, in_features) to (…, out_features), in the dtype of the input.

    Args:
        in_features, out_features, bias: as in `nn.Linear`.
        bits: of W, 2 to 8.
        activation_bits: of X, 2 to 8; None keeps it in float.
        gradient_bits: of ∂Y, 2 to 8; None keeps it in float.
        shift_groups: the most different exponents of X and of ∂Y, 1 to 8; 1 is one scale a tensor.
        seed: of stochastic rounding; None takes one from PyTorch's global generator. Ranks of `torch.distributed` draw
            differently.

    Raises:
        UsageError: a width is out of range, or the input has another number of features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 4,
        activation_bits: int | None = 8,
        gradient_bits: int | None = 8,
        shift_groups: int = 4,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._configure(bits, activation_bits, gradient_bits, shift_groups, seed)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = F.linear(x, self.quantized_weight(), self.bias)
            return plain
        if x.shape[-1] != self.in_features:
            raise UsageError(f"ShiftQuantLinear({self.in_features}, {self.out_features}): the input has shape {tuple(x.shape)}")
        y = self._product(x.reshape(-1, self.in_features), _Linear())
        biased: Tensor = y if self.bias is None else y + self.bias
        return biased.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._settings()}"


class ShiftQuantConv2d(_IntegerTraining, nn.Conv2d):
    """Y = X̂ ∗ Ŵ + b,   Ŵ = S ⊙ C,   X̂ = s 2^(-e[k]) A: convolution that trains in integers.

    As `ShiftQuantLinear`, with an exponent for each input channel, the same for all its taps, in the forward; one for each
    output channel in ∂X, and one for each position of each image in ∂W.

    In eval mode the layer is the convolution with Ŵ, inputs in float.

    Source: arXiv 2411.10948 (ShiftQuant).

    Shape: (N, in_channels, H, W) to (N, out_channels, H', W'), or both without N, in the dtype of the input.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in `nn.Conv2d`.
        bits: of W, 2 to 8.
        activation_bits: of X, 2 to 8; None keeps it in float.
        gradient_bits: of ∂Y, 2 to 8; None keeps it in float.
        shift_groups: the most different exponents of X and of ∂Y, 1 to 8.
        seed: of stochastic rounding; None takes one from PyTorch's global generator.

    Raises:
        UsageError: a width is out of range, or the input is no image of so many channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        bits: int = 4,
        activation_bits: int | None = 8,
        gradient_bits: int | None = 8,
        shift_groups: int = 4,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        start: Any = super().__init__  # which takes sizes as pairs only, says its annotation
        start(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self._configure(bits, activation_bits, gradient_bits, shift_groups, seed)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = self._conv_forward(x, self.quantized_weight(), self.bias)
            return plain
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise UsageError(
                f"ShiftQuantConv2d({self.in_channels}, {self.out_channels}): the input has shape {tuple(x.shape)}; "
                f"expected (N, {self.in_channels}, H, W)"
            )
        images = x if x.ndim == 4 else x.unsqueeze(0)
        padding = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            images, padding = F.pad(images, self._reversed_padding_repeated_twice, mode), (0, 0)
        y = self._product(images, _Conv(self.stride, padding, self.dilation, self.groups))
        biased: Tensor = y if self.bias is None else y + self.bias.view(-1, 1, 1)
        return biased if x.ndim == 4 else biased.squeeze(0)

    def extra_repr(self) -> str:
        plain: Any = super().extra_repr
        return f"{plain()}, {self._settings()}"


# -- the three products --------------------------------------------------------------------------------------------------


class _Linear:
    """X Wᵀ for X (M, K), and its gradients."""

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w)

    def of_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return g @ w

    def of_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return g.T @ x

    def by_token(self, quantize: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
        return quantize(g)


@dataclass(frozen=True)
class _Conv:
    """X ∗ W for X (N, C, H, W) that is padded already or is padded with zeros, and its gradients."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def product(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, self.stride, self.padding, self.dilation, self.groups)

    def of_input(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._backward(g, x, w, [True, False, False])[0]

    def of_weight(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return self._backward(g, x, w, [False, True, False])[1]

    def by_token(self, quantize: Callable[[Tensor], Tensor], g: Tensor) -> Tensor:
        n, c, h, w = g.shape
        rows = g.permute(0, 2, 3, 1).reshape(-1, c)
        return quantize(rows).reshape(n, h, w, c).permute(0, 3, 1, 2)

    def _backward(self, g: Tensor, x: Tensor, w: Tensor, wanted: list[bool]) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            g, x, w, None, self.stride, self.padding, self.dilation, False, [0, 0], self.groups, wanted
        )
        return found


class _Product(torch.autograd.Function):
    """X̂ times Ŵ; the gradients are those of the quantized operands with ∂Y quantized too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: _IntegerTraining, rule: _Linear | _Conv, draw: int) -> Tensor:
        ctx.rule, ctx.draw, ctx.dtype = rule, draw, x.dtype
        ctx.bits, ctx.gradient_bits, ctx.groups = layer.bits, layer.gradient_bits, layer.shift_groups
        w_hat = _by_output(widened(weight), ctx.bits)
        if layer.activation_bits is None:
            ctx.save_for_backward(x, None, None, weight)
            return rule.product(widened(x), w_hat)
        x_hat = shift_quantize(x, layer.activation_bits, ctx.groups, 1)
        ctx.save_for_backward(x_hat.codes, x_hat.exponents, x_hat.scale, weight)
        return rule.product(x_hat.dequantized(), w_hat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, exponents, scale, weight = ctx.saved_tensors
        w_hat = _by_output(widened(weight), ctx.bits)
        g, rule = grad.to(w_hat.dtype), ctx.rule
        x_hat = (widened(x) if scale is None else Shifted(x, exponents, scale, 1).dequantized()).to(g.dtype)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = rule.of_input(stochastic(g, ctx.gradient_bits, ctx.groups, 1, 2 * ctx.draw), x_hat, w_hat).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            g_hat = rule.by_token(lambda rows: stochastic(rows, ctx.gradient_bits, ctx.groups, 0, 2 * ctx.draw + 1), g)
            of_weight = rule.of_weight(g_hat, x_hat, w_hat).to(weight.dtype)
        return of_x, of_weight, None, None, None


def _by_output(weight: Tensor, bits: int) -> Tensor:
    """Ŵ with one scale an output, nearest; outputs of zeros stay zero."""
    most = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / most
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight / safe).round().clamp(-most, most) * safe
