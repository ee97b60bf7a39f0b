"""What a weight-only file computes: the module with floats for the codes of its activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse.export.onnx.program import Program
from normfuse.ops._epilogue import activation
from normfuse.ops._prepared import conv_operands, operand_of
from normfuse.ops.attention import attention

__all__ = ["AS_WRITTEN", "weights_alone"]

#: Session entries with which ONNX Runtime computes QuantizeLinear and DequantizeLinear as they stand. Else it makes MatMulNBits of
#: DequantizeLinear and MatMul, which rounds activations to 8 bits, and multiplies int8 with int8 inexactly on an x86 without VNNI.
AS_WRITTEN = {"session.disable_quant_qdq": "1"}


def weights_alone(program: Program, kept: Collection[str] = ()) -> Program:
    """The same program, whose reference computes each layer with dequantized weights and without rounding what it reads; operators
    of `torch.ops.normfuse` whose names are in `kept` stay what they are."""
    return dataclasses.replace(program, module=_WeightsAlone(program.module, kept))


class _WeightsAlone(nn.Module):
    def __init__(self, module: nn.Module, kept: Collection[str]) -> None:
        super().__init__()
        self.module = module
        self.products = {k: f for k, f in _PRODUCTS.items() if k not in kept}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Floats(self.products):
            return self.module(*args, **kwargs)


class _Floats(TorchDispatchMode):
    """Operators that quantize activations compute their float products."""

    def __init__(self, products: Mapping[str, Callable[..., Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        product = self.products.get(name) if namespace == "normfuse" else None
        return (func if product is None else product)(*args, **(kwargs or {}))


def _linear(
    x: Tensor, weight: Tensor, exponents: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor | None, bits: int,
    activation_bits: int, epilogue: str = "none",
) -> Tensor:  # fmt: skip
    """act(Σ_k x[m, k] · scale[n] · (C[n, k] << (E − e[k])) + bias[n])"""
    w = operand_of(weight, exponents, scale.numel(), bits).to(scale.dtype) * scale[:, None]
    return activation(F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype)), epilogue)


def _conv2d(
    x: Tensor, weight: Tensor, exponents: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor | None, bits: int,
    activation_bits: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int,
    epilogue: str = "none",
) -> Tensor:  # fmt: skip
    operands = conv_operands(
        weight, exponents, scale.numel(), bits, groups, kernel[0] * kernel[1]
    )  # (groups, O / groups, taps · C)
    w = operands.reshape(scale.numel(), *kernel, -1).permute(0, 3, 1, 2).to(scale.dtype) * scale[:, None, None, None]
    top, left, bottom, right = padding if len(padding) == 4 else (*padding, *padding)
    padded = F.pad(x, (left, right, top, bottom))
    y = F.conv2d(padded, w.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, 0, dilation, groups)
    return activation(y, epilogue)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool, bits: int) -> Tensor:
    return attention(q, k, v, mask, scale, causal)


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "shiftquant_attention": _attention,
    "shiftquant_conv2d": _conv2d,
    "shiftquant_linear": _linear,
}
