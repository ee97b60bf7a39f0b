"""L1 layer normalization whose sums are sums of integers, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normfuse.nn._dtypes import widened
from normfuse.nn._inputs import takes
from normfuse.nn._integers import Draws, integer, stochastic, width
from normfuse.nn.l1 import GAUSSIAN, L1LayerNorm

__all__ = ["QuantizedL1LayerNorm"]


class QuantizedL1LayerNorm(L1LayerNorm):
    """y = Q(γ (q − m) / s + β),   m = round(mean q),   s = c mean|q − m| + ε / step, with q the integers of x = step q.

    `L1LayerNorm` in integers of `bits` bits: in training x is quantized by rows (step = max|x| / (2^(bits-1) − 1)), both
    sums run over integers, one reciprocal a row is left in float, and Q quantizes the output by rows again. In the backward
    ∂L/∂y is quantized with stochastic rounding and an exponent for each feature; of x only its integers are kept, one byte a
    value, and the sign of q − m is that of the statistic. Gradients pass the roundings straight through.

    In eval mode it is the `L1LayerNorm` of the same γ and β: statistics in float, what reads it quantizes, so that
    `normfuse.optimize` makes one kernel of norm and quantization.

    Source: arXiv 2411.10948 (fully quantized L1 normalization); the paper's steps are not public in full, those here are derived.

    Shape: (…, *normalized_shape) to the same, in the dtype of the input.

    Args:
        normalized_shape, eps, elementwise_affine, bias, scale_const: as in `L1LayerNorm`.
        bits: of the input and the output, 2 to 8.
        gradient_bits: of ∂L/∂y, 2 to 8; None keeps it in float.
        shift_groups: the most different exponents of ∂L/∂y, 1 to 8.
        seed: of stochastic rounding; None takes one from PyTorch's global generator.

    Raises:
        UsageError: an argument is out of range, or the input ends in another shape.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        scale_const: float = GAUSSIAN,
        *,
        bits: int = 8,
        gradient_bits: int | None = 8,
        shift_groups: int = 4,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, scale_const, device=device, dtype=dtype)
        name = type(self).__name__
        self.bits = integer(name, "bits", bits, 2, 8)
        self.gradient_bits = width(name, "gradient_bits", gradient_bits)
        self.shift_groups = integer(name, "shift_groups", shift_groups, 1, 8)
        self._draws = Draws(name, seed)

    def forward(self, x: Tensor) -> Tensor:
        return self._integers(x) if self.training else super().forward(x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the number of a draw is a state
    def _integers(self, x: Tensor) -> Tensor:
        takes(self, x, self.normalized_shape)
        rows = x.reshape(-1, math.prod(self.normalized_shape))
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        settings = (self.bits, self.gradient_bits, self.shift_groups, self.scale_const, self.eps)
        y: Tensor = _Normalize.apply(rows, weight, bias, settings, self._draws.next())
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, gradient_bits={self.gradient_bits}, shift_groups={self.shift_groups}"


class _Normalize(torch.autograd.Function):
    """Rows (M, K), γ (K,) and β (K,) to (M, K)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        settings: tuple[int, int | None, int, float, float],
        draw: int,
    ) -> Tensor:
        bits, _, _, c, eps = settings
        q, step = _by_rows(widened(x), bits)
        mean = q.mean(1, keepdim=True).round()
        deviation = q - mean
        scale = c * deviation.abs().mean(1, keepdim=True) * step + eps
        y = deviation * (step / scale)
        y = y if weight is None else y * widened(weight)
        y = y if bias is None else y + widened(bias)
        codes, out_step = _by_rows(y, bits)
        ctx.settings, ctx.draw, ctx.bias_dtype = settings, draw, None if bias is None else bias.dtype
        ctx.dtype = x.dtype
        ctx.save_for_backward(q.to(torch.int8), mean, step, scale, weight)
        return (codes * out_step).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, mean, step, scale, weight = ctx.saved_tensors
        _, bits, groups, c, _ = ctx.settings
        g = stochastic(widened(grad), bits, groups, 1, ctx.draw)
        deviation = q.to(mean.dtype) - mean
        normal = deviation * (step / scale)
        of_weight = (g * normal).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        of_bias = g.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, of_bias, None, None
        h = g if weight is None else g * widened(weight)
        sign = deviation.sign()
        centered = h - h.mean(1, keepdim=True)
        along = (h * normal).mean(1, keepdim=True)
        of_x = (centered - c * (sign - sign.mean(1, keepdim=True)) * along) / scale
        return of_x.to(ctx.dtype), of_weight, of_bias, None, None


def _by_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and a step for each row of (M, K); rows of zeros have step 1, and NaN or infinity make the row NaN."""
    most = 2 ** (bits - 1) - 1
    largest = x.abs().amax(1, keepdim=True)
    step = torch.where(largest == 0, torch.ones_like(largest), largest / most)
    return (x / step).round().clamp(-most, most), step
