"""Attention that a model spells out: MatMul, scale, mask, Softmax, MatMul."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normfuse.export.onnx.build import Build, const_of, dims, given
from normfuse.export.onnx.writer.translate import MARKER_DOMAIN, SDPA

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["mark_attention"]

_SWAPPED = (0, 1, 3, 2)


def mark_attention(model: ir.Model) -> int:
    """Replace softmax(s · q kᵀ + m) v, written out over (B, H, L, D), by the marker; returns the number of sites.

    Only where no other node reads what lies between, and where the mask is added: one that selects is left alone.
    """
    found = 0
    for softmax in [n for n in model.graph if n.op_type == "Softmax" and not n.domain]:
        found += _mark(model, softmax)
    return found


def _mark(model: ir.Model, softmax: ir.Node) -> bool:
    shape = dims(softmax.outputs[0])
    after = _only_reader(softmax.outputs[0])
    if shape is None or len(shape) != 4 or after is None or after.op_type != "MatMul" or after.inputs[0] is not softmax.outputs[0]:
        return False
    axis = softmax.attributes["axis"].value if "axis" in softmax.attributes else -1
    if axis not in (-1, 3):
        return False
    scores = _scores(given(softmax))
    if scores is None:
        return False
    product, scale, mask = scores
    (query, a), (key_t, b), value = _unscaled(given(product)), _unscaled(given(product, 1)), given(after, 1)
    scale *= a * b
    if any(v.shape is None or len(v.shape) != 4 for v in (query, key_t, value)):
        return False
    if mask is not None and (mask.shape is None or len(mask.shape) > 4 or mask.dtype != query.dtype):
        return False
    at = Build(model, after)
    marker = at.ir.node(
        SDPA, [query, _swapped(key_t, at), value, mask], {"scale": repr(scale), "is_causal": 0}, domain=MARKER_DOMAIN, num_outputs=1
    )
    marker.metadata_props.update(after.metadata_props)
    old, new = after.outputs[0], marker.outputs[0]
    new.dtype, new.shape = old.dtype, old.shape
    model.graph.insert_before(after, [marker])
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    return True


def _scores(value: ir.Value) -> tuple[ir.Node, float, ir.Value | None] | None:
    """The MatMul behind `value`, the factor on it and what is added to it."""
    node = value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Add":
        for inner, mask in (node.inputs, reversed(node.inputs)):
            scaled = _scaled(inner)
            if scaled is not None and dims(inner) == dims(value):  # the mask must not be the larger one
                return *scaled, mask
        return None
    found = _scaled(value)
    return None if found is None else (*found, None)


def _scaled(value: ir.Value | None) -> tuple[ir.Node, float] | None:
    if value is None:
        return None
    node, scale = value.producer(), 1.0
    if node is not None and not node.domain and node.op_type in ("Mul", "Div"):
        found = _factored(node, value) if _only_reader(value) is not None else None
        if found is None:
            return None
        value, scale = found
        node = value.producer()
    if node is None or node.domain or node.op_type != "MatMul" or _only_reader(value) is None:
        return None
    return node, scale


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """`value` without a number that only the scores see: (s q) kᵀ = s (q kᵀ)"""
    if _only_reader(value) is None:
        return value, 1.0
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Mul", "Div"):
        return value, 1.0
    return _factored(node, value) or (value, 1.0)


def _factored(node: ir.Node, value: ir.Value) -> tuple[ir.Value, float] | None:
    """x and s for x · s and x / (1/s), when s is one number and the shape stays."""
    for inner, factor in (node.inputs, reversed(node.inputs)) if node.op_type == "Mul" else (node.inputs,):
        number = const_of(factor)
        if number is not None and number.size == 1 and inner is not None and dims(inner) is not None and dims(inner) == dims(value):
            scale = float(number.reshape(-1)[0])
            return inner, scale if node.op_type == "Mul" else 1 / scale
    return None


def _swapped(value: ir.Value, at: Build) -> ir.Value:
    """(B, H, D, S) as (B, H, S, D); the Transpose that made it is undone, not repeated."""
    node = value.producer()
    perm: tuple[int, ...] = _SWAPPED
    if node is not None and node.op_type == "Transpose" and not node.domain and "perm" in node.attributes:
        inner = node.attributes["perm"].value
        value, perm = given(node), tuple(inner[i] for i in _SWAPPED)
        if perm == tuple(range(4)):
            return value
    sizes = dims(value)
    shape = None if sizes is None else tuple(sizes[i] for i in perm)
    return at.op("Transpose", value, perm=list(perm), dtype=value.dtype, shape=shape)


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The node that alone reads `value`; None with several, or when it is an output of the model."""
    users = list(value.uses())
    return users[0][0] if len(users) == 1 and not value.is_graph_output() else None
