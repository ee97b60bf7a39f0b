"""What becomes of constants in half precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from normfuse.export.onnx.build import Numbers
from normfuse.export.onnx.precision.ops import CHEAP, MOVES, SELECTS
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Fit", "Range", "fit_of", "in_range", "leads_to_softmax", "range_of"]

_BIASES = {("Conv", 2), ("ConvTranspose", 2), ("Gemm", 2), ("LayerNormalization", 2), ("LSTM", 3), ("GRU", 3), ("RNN", 3)}
_SCALES = {("QuantizeLinear", 1), ("DequantizeLinear", 1)}
_STEPS = 24  # nodes between a mask and its softmax


@dataclass(frozen=True)
class Range:
    """Sizes of the numbers of a constant.

    Attributes:
        top: max |w| over finite w.
        size: number of elements.
        uniform: all elements are equal.
        negative: all elements beyond the range of the low dtype are negative.
    """

    top: float
    size: int
    uniform: bool
    negative: bool


@dataclass(frozen=True)
class Fit:
    """How a reader takes a constant in the low dtype: as it is, with numbers beyond `bound` cut to it, or not at all.

    Attributes:
        bound: numbers out of range become ± this; None: there are none.
        refused: "overflow" or "underflow" where the reader has to stay in float32.
    """

    bound: float | None = None
    refused: str | None = None


def range_of(value: ir.Value, low: ir.DataType) -> Range:
    """The range of the initializer `value`."""
    assert value.const_value is not None
    numbers = value.const_value.numpy()
    top, negative, first, uniform = 0.0, True, None, True
    limit = float(low.max)
    for piece in _pieces(numbers):
        finite = piece[np.isfinite(piece)]
        if finite.size:
            top = max(top, float(np.abs(finite).max()))
            negative = negative and not bool((finite > limit).any())
        first = piece[0] if first is None and piece.size else first
        uniform = uniform and bool((piece == first).all())
    return Range(top, int(numbers.size), uniform, negative)


def _pieces(numbers: Numbers, length: int = 1 << 22) -> Iterator[Numbers]:
    """The numbers in runs: weights of billions of numbers would need several copies at once."""
    flat = numbers.reshape(-1)
    return (flat[i : i + length] for i in range(0, len(flat), length))


def fit_of(node: ir.Node, place: int, numbers: Range, low: ir.DataType) -> Fit:
    """What `node` can do with a constant of range `numbers` as its input number `place`, were it to compute in `low`."""
    limit, normal, op = float(low.max), float(low.tiny), node.op_type
    if (op, place) in _SCALES:
        return Fit() if _exact_enough(node.inputs[place], low) else Fit(refused="underflow")
    if numbers.top > limit:
        mask = numbers.negative and leads_to_softmax(node, place)
        if op in SELECTS or (op in ("Add", "Sub") and mask) or (op == "Attention" and place == 3):
            # half of it where scores are added: the sum of two masks, or of a mask and a score, must not become −∞
            return Fit(bound=limit / 2 if mask else limit)
        return Fit(refused="overflow")
    if 0 < numbers.top < normal and (op, place) not in _BIASES:
        # a vector that is added is a bias near zero; a number that is added is an eps
        bias = op in ("Add", "Sub", "Sum") and numbers.size > 1 and not numbers.uniform
        return Fit() if bias or op in MOVES else Fit(refused="underflow")
    return Fit()


def _exact_enough(scale: ir.Value | None, low: ir.DataType) -> bool:
    """max |low(s) − s| / |s| is that of normal numbers: every code is multiplied by s."""
    if scale is None or scale.const_value is None:
        return False
    numbers = scale.const_value.numpy()
    numbers = numbers[numbers != 0]
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(numbers.astype(low.numpy()).astype(np.float32) - numbers) / np.abs(numbers)
    return not numbers.size or bool(error.max() <= float(low.eps))


def leads_to_softmax(node: ir.Node, place: int) -> bool:
    """What `node` reads at `place` reaches a softmax through ops on single numbers."""
    ends = ("Softmax", "LogSoftmax", "Exp", "Hardmax")
    found, todo = {node}, [(node, place)]
    while todo and len(found) < _STEPS:
        at, i = todo.pop(0)
        if at.op_type in ends or (at.op_type == "Attention" and i == 3):
            return True
        if at.op_type not in CHEAP and at.op_type not in MOVES:
            continue
        for user, j in (use for out in at.outputs for use in out.uses()):
            if user not in found:
                found.add(user)
                todo.append((user, j))
    return False


def in_range(numbers: Numbers, dtype: ir.DataType, bound: float | None) -> ir.TensorProtocol:
    """`numbers` as a tensor of `dtype`; finite ones beyond its range become ± `bound`."""
    ir = need("onnx_ir", extra="onnx")
    if bound is not None:
        beyond = np.isfinite(numbers) & (np.abs(numbers) > float(dtype.max))
        numbers = np.where(beyond, np.sign(numbers) * np.float32(bound), numbers)
    with np.errstate(over="ignore"):
        return ir.tensor(np.asarray(numbers).astype(dtype.numpy(), order="C"), dtype=dtype)  # type: ignore[no-any-return]
