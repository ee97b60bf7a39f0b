"""How wide a sum of products can get, asked before anything is built."""

from __future__ import annotations

from torch import Tensor

from normfuse.errors import UsageError
from normfuse.quant.integers import top_code
from normfuse.quant.weight import QuantizedWeight

__all__ = ["accumulator_bits", "check_accumulator"]

_CHUNK = 1 << 20  # values of the weight at a time


def accumulator_bits(weight: QuantizedWeight, activation_bits: int) -> int:
    """Bits of a signed integer that holds max_n Σ_k |operand[n, k]| · (2^(activation_bits−1) − 1).

    The exact worst case of these codes, not of their width: no activations can give more, in any order of summation.
    """
    n, k = weight.codes.shape
    if not n or not k:
        return 1
    units = weight.units().long()
    step = max(1, _CHUNK // k)
    largest = max(int((weight.codes[i : i + step].long() * _rows(units, i, step)).abs().sum(1).max()) for i in range(0, n, step))
    return (largest * top_code(activation_bits)).bit_length() + 1


def _rows(units: Tensor, start: int, count: int) -> Tensor:
    """Those of some outputs; one row is that of all."""
    return units if len(units) == 1 else units[start : start + count]


def check_accumulator(weight: QuantizedWeight, activation_bits: int, layer: str) -> int:
    """`accumulator_bits`, if 32 are enough.

    Raises:
        UsageError: they are not; the message names the layer, the bits and what to change.
    """
    bits = accumulator_bits(weight, activation_bits)
    if bits > 32:
        n, k = weight.codes.shape
        groups = weight.groups - (bits - 32)
        remedy = f"groups={groups}, or " if groups >= 1 else ""
        raise UsageError(
            f"{layer}: sums of [{n}, {k}] weights of {weight.bits} bits in {weight.groups} groups times activations of "
            f"{activation_bits} bits need {bits} bits; the accumulator has 32. Use {remedy}{bits - 32} bits less for weights or "
            f"activations, by ShiftQuant(overrides={{{layer!r}: …}}), or keep the layer in float (keep={layer!r})"
        )
    return bits
