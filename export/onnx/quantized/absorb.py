"""A positive factor for each channel of a value, moved into the constants of what computes it.

    f ⊙ norm(x, g, b) = norm(x, f ⊙ g, f ⊙ b)        f ⊙ (x W) = x (W ⊙ f)        f ⊙ relu(x) = relu(f ⊙ x)

With powers of two for factors nothing is rounded, and no node is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from normfuse.export.onnx.build import Build, Numbers, const_of, dims

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["absorbed"]

_NORMS = ("LayerNormalization", "RMSNormalization")
_HOMOGENEOUS = ("Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
#: A constant to replace: the node that reads it, which of its inputs it is, and the new numbers.
Edit = tuple["ir.Node", int, Numbers]


def absorbed(model: ir.Model, value: ir.Value, factor: Numbers, axis: int) -> bool:
    """Multiply `value` by `factor` along `axis` by changing constants in front of it; False, and nothing changes, where that would
    need a node, or where something else reads what would change.

    Args:
        model: the graph.
        value: it has one reader.
        factor: [channels], positive.
        axis: of the channels, counted from the end: -1 for features, -3 for the channels of an image.
    """
    edits = _edits(value, factor, axis)
    if edits is None:
        return False
    for node, i, numbers in edits:
        node.replace_input_with(i, Build(model, node).const(numbers))
    return True


def _edits(value: ir.Value | None, factor: Numbers, axis: int) -> list[Edit] | None:
    node = None if value is None else value.producer()
    if value is None or node is None or node.domain or value.is_graph_output() or len(list(value.uses())) != 1:
        return None
    if node.op_type in _NORMS:
        return _norm(node, factor) if axis == -1 else None
    if node.op_type in _HOMOGENEOUS:
        return _edits(node.inputs[0], factor, axis) if node.op_type == "Relu" or axis == -3 else None
    rule = _RULES.get(node.op_type)
    return None if rule is None else rule(node, factor, axis)


def _norm(node: ir.Node, factor: Numbers) -> list[Edit] | None:
    """f ⊙ norm(x, g, b) = norm(x, f ⊙ g, f ⊙ b), over the last axis."""
    last = node.attributes["axis"].value if "axis" in node.attributes else -1
    rank = dims(node.inputs[0])
    if last != -1 and (rank is None or last != len(rank) - 1):
        return None
    found = [(i, v) for i, v in enumerate(node.inputs[1:], 1) if v is not None]
    return _scaled(node, found, factor)


def _scaled(node: ir.Node, found: Sequence[tuple[int, ir.Value | None]], factor: Numbers) -> list[Edit] | None:
    """The constants `found` of `node`, each times `factor`."""
    edits: list[Edit] = []
    for i, v in found:
        numbers = const_of(v)
        if numbers is None:
            return None
        edits.append((node, i, _times(numbers, factor)))
    return edits


def _times(numbers: Numbers, factor: Numbers) -> Numbers:
    return np.asarray(numbers * factor.astype(numbers.dtype), numbers.dtype)


def _product(node: ir.Node, factor: Numbers, axis: int) -> list[Edit] | None:
    """f ⊙ (a · b) = (f ⊙ a) · b"""
    shaped, rank = _shaped(factor, axis), dims(node.outputs[0])
    for i, v in enumerate(node.inputs):
        numbers = const_of(v)
        if numbers is None or rank is None:
            continue
        if numbers.ndim <= len(rank):
            return [(node, i, _times(numbers, shaped))]
    for v in node.inputs:
        # an operand that is broadcast along the channels cannot take a factor for each
        if const_of(v) is None and _has_channels(v, factor.size, axis) and (edits := _edits(v, factor, axis)) is not None:
            return edits
    return None


def _sum(node: ir.Node, factor: Numbers, axis: int) -> list[Edit] | None:
    """f ⊙ (a + b) = f ⊙ a + f ⊙ b"""
    every: list[Edit] = []
    for i, v in enumerate(node.inputs):
        numbers = const_of(v)
        if numbers is not None:
            every.append((node, i, _times(numbers, _shaped(factor, axis))))
            continue
        edits = _edits(v, factor, axis) if _has_channels(v, factor.size, axis) else None
        if edits is None:
            return None
        every += edits
    return every


def _matmul(node: ir.Node, factor: Numbers, axis: int) -> list[Edit] | None:
    """f ⊙ (x W) = x (W ⊙ f), W [K, N]"""
    weight = node.inputs[1]
    size = dims(weight)
    if axis != -1 or size is None or len(size) != 2 or size[1] != factor.size:
        return None
    if const_of(weight) is not None:
        return _scaled(node, [(1, weight)], factor)
    maker = _dequantize(weight)
    if maker is None or not ("block_size" in maker.attributes or maker.attributes["axis"].value == 1):
        return None
    return _scaled(maker, [(1, maker.inputs[1])], factor)  # [N] or [blocks, N]


def _conv(node: ir.Node, factor: Numbers, axis: int) -> list[Edit] | None:
    """f ⊙ conv(x, W, b) = conv(x, f ⊙ W, f ⊙ b), one f for each output channel"""
    weight = node.inputs[1]
    if axis != -3 or len(dims(weight) or ()) != 4:
        return None
    bias = [(i, v) for i, v in enumerate(node.inputs) if i == 2 and v is not None]
    rest = _scaled(node, bias, factor)
    if rest is None:
        return None
    if const_of(weight) is not None:
        mine = _scaled(node, [(1, weight)], factor.reshape(-1, 1, 1, 1))
    else:
        maker = _dequantize(weight)
        if maker is None or "block_size" in maker.attributes or maker.attributes["axis"].value != 0:
            return None
        mine = _scaled(maker, [(1, maker.inputs[1])], factor)
    return None if mine is None else mine + rest


def _dequantize(weight: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes `weight` for one reader, with a scale for each output."""
    node = None if weight is None else weight.producer()
    if weight is None or node is None or node.op_type != "DequantizeLinear" or node.domain or len(list(weight.uses())) != 1:
        return None
    scale = const_of(node.inputs[1])
    return node if scale is not None and scale.ndim and "axis" in node.attributes else None


def _has_channels(value: ir.Value | None, size: int, axis: int) -> bool:
    shape = dims(value)
    return shape is not None and len(shape) >= -axis and shape[axis] == size


def _shaped(factor: Numbers, axis: int) -> Numbers:
    return factor.reshape(-1, *[1] * (-axis - 1))


_RULES: dict[str, Callable[[ir.Node, Numbers, int], list[Edit] | None]] = {
    "Add": _sum,
    "Conv": _conv,
    "MatMul": _matmul,
    "Mul": _product,
    "Sum": _sum,
}
