"""What a weight-only file computes: the module with floats for the codes of its activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normfuse.export.onnx.program import Program
from normfuse.ops._epilogue import activation
from normfuse.ops._prepared import Packed, conv_operands, operand_of
from normfuse.ops.attention import attention

__all__ = ["AS_WRITTEN", "PRODUCTS", "weights_alone"]

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
        self.products = {k: f for k, f in PRODUCTS.items() if k not in kept}

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
        if product is None:
            return func(*args, **(kwargs or {}))
        arguments = func._schema.arguments
        given = {a.name: a.default_value for a in arguments} | {a.name: v for a, v in zip(arguments, args, strict=False)}
        return product(SimpleNamespace(**given | (kwargs or {})))


def _linear(a: SimpleNamespace) -> Tensor:
    """act(Σ_k x[m, k] · scale[n] · (C[n, k] << (E − e[k])) + bias[n])"""
    w = _weight(a, operand_of(Packed(a.weight, a.exponents, a.scale, a.bits, a.multipliers)))
    y = activation(F.linear(a.x, w.to(a.x.dtype), _bias(a)), a.epilogue)
    return y if a.residual is None else y + a.residual


def _conv2d(a: SimpleNamespace) -> Tensor:
    outputs = a.scale.numel()
    # (groups, O / groups, taps · C)
    operands = conv_operands(a.weight, a.exponents, outputs, a.bits, a.groups, a.kernel[0] * a.kernel[1])
    w = _weight(a, operands.reshape(outputs, -1)).reshape(outputs, *a.kernel, -1).permute(0, 3, 1, 2)
    top, left, bottom, right = a.padding if len(a.padding) == 4 else (*a.padding, *a.padding)
    padded = F.pad(a.x, (left, right, top, bottom))
    y = F.conv2d(padded, w.to(a.x.dtype), _bias(a), a.stride, 0, a.dilation, a.groups)
    return activation(y, a.epilogue)


def _weight(a: SimpleNamespace, operand: Tensor) -> Tensor:
    """The shifted codes [N, K] as floats, as the layer's own or as what `a.weights` makes of them."""
    w: Tensor = a.weights(operand) if hasattr(a, "weights") else operand.to(a.scale.dtype) * a.scale[:, None]
    return w


def _bias(a: SimpleNamespace) -> Tensor | None:
    return None if a.bias is None else a.bias.to(a.x.dtype)


def _attention(a: SimpleNamespace) -> Tensor:
    return attention(a.q, a.k, a.v, a.mask, a.scale, a.causal)


#: Operators that quantize what they read, by name: the same with floats, of an object with their arguments.
PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "shiftquant_attention": _attention,
    "shiftquant_conv2d": _conv2d,
    "shiftquant_linear": _linear,
}
