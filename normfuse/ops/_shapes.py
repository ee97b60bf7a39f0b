"""What arguments must be; asked with real and with symbolic sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.weight import BLOCK_BITS, block_of
from normfuse.words import EPILOGUES

__all__ = ["check_bits", "check_epilogue", "check_multipliers", "check_product", "check_vector", "float_dtype", "input_scale_value"]


def check_product(
    op: str, x: Tensor, inputs: int, exponents: Tensor, scale: Tensor, bias: Tensor | None, bits: tuple[int, ...], epilogue: str
) -> None:
    """x has `inputs` features (or channels) to multiply; the rest belongs together.

    Raises:
        UsageError: it does not.
    """
    if exponents.dtype is not torch.uint8 or exponents.ndim != 1 or not exponents.shape[0]:
        raise UsageError(f"{op}: exponents {tuple(exponents.shape)} of {exponents.dtype}; expected uint8, one an input channel")
    if exponents.shape[0] != inputs:
        raise UsageError(f"{op}: x has shape {tuple(x.shape)}, of which {inputs} inputs; the weight has {exponents.shape[0]}")
    if scale.ndim != 1 or not scale.is_floating_point() or not scale.shape[0]:
        raise UsageError(f"{op}: scale {tuple(scale.shape)} of {scale.dtype}; expected floats, one an output")
    if bias is not None:
        check_vector(op, "bias", bias, scale.shape[0])
    check_bits(op, *bits)
    check_epilogue(op, epilogue)


def check_multipliers(op: str, multipliers: Tensor | None, outputs: int, inputs: int, bits: int) -> None:
    """Of blocks of a weight, as `pack_multipliers` lays them out, or None; what they hold is looked at where they are prepared."""
    if multipliers is None:
        return
    m = multipliers
    if m.dtype is not torch.int8 or m.ndim != 3 or m.shape[0] != -(-outputs // 16) or m.shape[2] != 16:
        raise UsageError(
            f"{op}: multipliers {tuple(m.shape)} of {m.dtype}; expected int8 [{-(-outputs // 16)}, blocks, 16] for {outputs} "
            "outputs"
        )
    if bits > BLOCK_BITS:
        raise UsageError(f"{op}: multipliers with codes of {bits} bits; they are for up to {BLOCK_BITS}")
    block_of(inputs, m.shape[1])


def check_bits(op: str, *bits: int) -> None:
    """Widths of codes."""
    for width in bits:
        if not 2 <= width <= 8:
            raise UsageError(f"{op}: {width} bits; expected 2 to 8")


def check_epilogue(op: str, epilogue: str) -> None:
    """A name of `EPILOGUES`."""
    if epilogue not in EPILOGUES:
        raise UsageError(f"{op}: epilogue={epilogue!r}; expected one of {', '.join(EPILOGUES)}")


def check_vector(op: str, name: str, value: Tensor, size: int) -> None:
    """A float vector of `size`."""
    if value.ndim != 1 or value.shape[0] != size or not value.is_floating_point():
        raise UsageError(f"{op}: {name} {tuple(value.shape)} of {value.dtype}; expected {size} floats")


def float_dtype(op: str, x: Tensor) -> torch.dtype:
    """The dtype that x is computed in: float32, or float64 if it is float64."""
    if not x.is_floating_point():
        raise UsageError(f"{op}: x is {x.dtype}; expected floats")
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def input_scale_value(op: str, input_scale: Tensor | None) -> float:
    """The static scale, or 0 for none."""
    if input_scale is None:
        return 0.0
    value = float(input_scale) if input_scale.numel() == 1 else 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{op}: input_scale={input_scale}; expected one positive number")
    return value
