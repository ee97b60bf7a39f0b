"""The arguments of products that quantize what they read."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from normfuse.ops._shapes import check_multipliers, check_product

__all__ = ["Product", "check"]


class Product(NamedTuple):
    """As of `shiftquant_linear`, in its order."""

    x: Tensor
    weight: Tensor
    exponents: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    bits: int
    activation_bits: int
    epilogue: str = "none"
    residual: Tensor | None = None
    multipliers: Tensor | None = None


def check(op: str, p: Product, inputs: int) -> None:
    """See `check_product`."""
    check_product(op, p.x, inputs, p.exponents, p.scale, p.bias, (p.bits, p.activation_bits), p.epilogue)
    check_multipliers(op, p.multipliers, p.scale.shape[0], p.exponents.shape[0], p.bits)
