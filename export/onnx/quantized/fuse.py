"""Neighbouring nodes of the native form in one pass over memory.

    Add(linear(x), r)                  ->  linear(x, residual=r)
    norm(a + b) read by linears only   ->  q, scale, sum = NormQuantize(a, b);   each linear: ShiftQuantMatMul(q, scale)
    linear read by linears only        ->  q, scale = ShiftQuantMatMulQuantize(...);   each reader: ShiftQuantMatMul(q, scale)
    several linears on one x           ->  q, scale = QuantizeRows(x);   each: ShiftQuantMatMul(q, scale)

The first and the last two leave every integer as it was. A norm in a kernel of its own rounds its float result differently
by an ulp or two, so that a code that lies on a tie may be its neighbour: the form without fusing is the bit-exact one.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from normfuse.export.onnx.build import Build, const_of, dims, take_over
from normfuse.export.onnx.own_nodes import facts_of, native_node
from normfuse.export.ops import DOMAIN, OPS

__all__ = ["fuse"]

log = logging.getLogger(__name__)

_LINEARS = ("ShiftQuantLinear", "ShiftQuantMatMul")
_OWN_NORMS = {"RmsNorm": "rms", "CrmsNorm": "crms", "L1Norm": "l1"}


def fuse(model: Any) -> dict[str, int]:
    """Fuse nodes of the domain `normfuse`, in place; returns how often by name of what came out."""
    found: dict[str, int] = {}
    for name, step in (
        ("residual", _residual),
        ("NormQuantize", _norm),
        ("ShiftQuantMatMulQuantize", _chain),
        ("QuantizeRows", _shared),
    ):
        for node in list(model.graph):
            if node.graph is not None and step(model, node):
                found[name] = found.get(name, 0) + 1
    log.debug("fused: %s", found)
    return found


def _residual(model: Any, add: Any) -> bool:
    """linear(x) + r, nothing else reading the linear"""
    if not _is_sum(add):
        return False
    for y, residual in (tuple(add.inputs), tuple(reversed(add.inputs))):
        node = y.producer()
        if not _is(node, *_LINEARS) or not _single(y) or _present(node)["residual"] is not None or not _same_shape(y, residual):
            continue
        if residual is y or residual.dtype != y.dtype:
            continue
        inputs = _present(node) | {"residual": residual}
        _replace(model, node, add, node.op_type, inputs, facts_of(node), (add.outputs[0],))
        model.graph.remove(add, safe=True)
        return True
    return False


def _norm(model: Any, norm: Any) -> bool:
    """norm(a + b) whose result is only ever quantized by rows"""
    form = _norm_of(norm)
    if form is None or any(v.uses() or v.is_graph_output() for v in norm.outputs[1:]):
        return False
    kind, gain, shift, eps, scale_const = form
    bits = _quantized_by_all(norm.outputs[0])
    x = norm.inputs[0]
    sizes = dims(x)
    if bits is None or x.dtype is None or x.dtype.name != "FLOAT" or sizes is None or not isinstance(sizes[-1], int):
        return False
    if any(v is not None and dims(v) != (sizes[-1],) for v in (gain, shift)):
        return False
    add = x.producer()
    joined = _is_sum(add) and _same_shape(*add.inputs)
    a, b = tuple(add.inputs) if joined else (x, None)
    at = Build(model, add if joined else norm)  # before every reader of the sum
    facts = {"kind": kind, "eps": eps, "scale_const": scale_const, "bits": bits}
    q, scale, *total = native_node(at, "NormQuantize", (a, gain, shift, b), facts, count=3 if joined else 2)
    _typed(at, norm.outputs[0], q, scale)
    if joined:
        take_over(x, total[0])
        model.graph.remove(add, safe=True)
    for reader, _ in list(norm.outputs[0].uses()):
        _read_codes(model, reader, q, scale)
    model.graph.remove(norm, safe=True)
    return True


def _chain(model: Any, node: Any) -> bool:
    """act(linear(x)) whose result is only ever quantized by rows"""
    if not _is(node, *_LINEARS) or facts_of(node).get("input_scale"):
        return False
    inputs, facts = _present(node), facts_of(node)
    bits = _quantized_by_all(node.outputs[0])
    if bits is None or inputs["residual"] is not None:
        return False
    at = Build(model, node)
    if node.op_type == "ShiftQuantLinear":
        inputs["q"], inputs["row_scale"] = _rows(at, inputs["x"], facts["activation_bits"])
    op = OPS["ShiftQuantMatMulQuantize"]
    values = tuple(inputs[name.removesuffix("?")] for name in op.inputs)
    q, scale = native_node(at, op.name, values, facts | {"out_bits": bits}, count=2)
    _typed(at, node.outputs[0], q, scale)
    for reader, _ in list(node.outputs[0].uses()):
        _read_codes(model, reader, q, scale)
    model.graph.remove(node, safe=True)
    return True


def _shared(model: Any, node: Any) -> bool:
    """One quantization for all linears that read the same x with the same bits"""
    if not _is(node, "ShiftQuantLinear") or facts_of(node).get("input_scale"):
        return False
    x, bits = node.inputs[0], facts_of(node)["activation_bits"]
    readers = [u for u, i in x.uses() if i == 0 and _quantizes(u) == bits]
    if len(readers) < 2:
        return False
    order = {n: i for i, n in enumerate(model.graph)}
    readers.sort(key=order.__getitem__)
    q, scale = _rows(Build(model, readers[0]), x, bits)
    for reader in readers:
        _read_codes(model, reader, q, scale)
    return True


def _rows(at: Build, x: Any, bits: int) -> tuple[Any, Any]:
    q, scale = native_node(at, "QuantizeRows", (x,), {"bits": bits}, count=2)
    _typed(at, x, q, scale)
    return q, scale


def _read_codes(model: Any, reader: Any, q: Any, scale: Any) -> None:
    """A ShiftQuantLinear on floats as a ShiftQuantMatMul on their codes."""
    inputs = _present(reader) | {"q": q, "row_scale": scale}
    _replace(model, reader, reader, "ShiftQuantMatMul", inputs, facts_of(reader), (reader.outputs[0],))


def _replace(
    model: Any, old: Any, before: Any, name: str, inputs: dict[str, Any], facts: dict[str, Any], outputs: tuple[Any, ...]
) -> None:
    """A node `name` in front of `before` whose outputs take the places of `outputs`; `old` goes away."""
    values = tuple(inputs[n.removesuffix("?")] for n in OPS[name].inputs)
    at = Build(model, before)
    for place, new in zip(outputs, native_node(at, name, values, facts, count=len(outputs)), strict=True):
        take_over(place, new)
    if old is not before:
        before.replace_input_with(list(before.inputs).index(old.outputs[0]), values[0])  # it goes away next
    model.graph.remove(old, safe=True)


def _quantized_by_all(value: Any) -> int | None:
    """The bits to which every reader of `value` quantizes it by rows; None if some node does anything else with it."""
    bits = {_quantizes(u) if i == 0 else None for u, i in value.uses()}
    if value.is_graph_output() or len(bits) != 1:
        return None
    return bits.pop()


def _quantizes(node: Any) -> int | None:
    facts = facts_of(node) if _is(node, "ShiftQuantLinear") else {"input_scale": 1.0}
    return None if facts.get("input_scale") else int(facts["activation_bits"])


def _norm_of(node: Any) -> tuple[str, Any, Any, float, float] | None:
    """Kind, gain, shift, eps and constant of a norm over the last axis."""
    inputs = (*node.inputs, None, None)
    attributes = {k: a.value for k, a in node.attributes.items()}
    if node.domain == DOMAIN and node.op_type in _OWN_NORMS:
        gain, shift = inputs[1], inputs[2] if node.op_type == "L1Norm" else None
        if _present(node)["residual"] is not None:
            return None
        return _OWN_NORMS[node.op_type], gain, shift, attributes["eps"], attributes.get("scale_const", 1.0)
    if node.domain or node.op_type not in ("LayerNormalization", "RMSNormalization"):
        return None
    rank = dims(node.inputs[0])
    if rank is None or attributes.get("axis", -1) not in (-1, len(rank) - 1) or attributes.get("stash_type", 1) != 1:
        return None
    gain = inputs[1]
    ones = const_of(gain)
    if ones is not None and np.array_equal(ones, np.ones_like(ones)):
        gain = None
    layer = node.op_type == "LayerNormalization"
    return ("layer" if layer else "rms"), gain, inputs[2] if layer else None, attributes.get("epsilon", 1e-5), 1.0


def _present(node: Any) -> dict[str, Any]:
    """Inputs by name, None where one is missing."""
    names = [n.removesuffix("?") for n in OPS[node.op_type].inputs]
    return dict(zip(names, (*node.inputs, *[None] * len(names)), strict=False))


def _typed(at: Build, like: Any, q: Any, scale: Any) -> None:
    q.dtype, q.shape, scale.dtype = at.ir.DataType.INT8, like.shape, at.ir.DataType.FLOAT
    sizes = dims(like)
    scale.shape = None if sizes is None else at.ir.Shape((*sizes[:-1], 1))


def _is(node: Any, *names: str) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type in names


def _is_sum(node: Any) -> bool:
    return node is not None and not node.domain and node.op_type in ("Add", "Sum") and len(node.inputs) == 2


def _single(value: Any) -> bool:
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _same_shape(a: Any, b: Any) -> bool:
    sizes = dims(a)
    return sizes is not None and None not in sizes and sizes == dims(b)
