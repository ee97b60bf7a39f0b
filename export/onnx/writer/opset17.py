"""Opset 18 models in opset 17.

torch translates to opset 18 at the oldest. Few ops changed between the two; ONNX's own converter gives up on models with
ops of another domain, or with weights above 2 GiB, so the changes are undone here one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from normfuse.errors import ExportError
from normfuse.export.onnx.build import Build, const_of, dims
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["to_opset_17"]


def to_opset_17(model: ir.Model) -> None:
    """Rewrite `model` from opset 18 to 17, in place.

    Raises:
        ExportError: an op has no form in opset 17; the message names the node.
    """
    schema_of = need("onnx", extra="onnx").defs
    for node in list(model.graph):
        if node.domain:
            continue
        if any(a.type.name in ("GRAPH", "GRAPHS") for a in node.attributes.values()):
            raise ExportError(f"{_label(node)} holds a subgraph, which cannot be converted to opset 17; use opset 18")
        try:
            same = (
                schema_of.get_schema(node.op_type, 17, "").since_version == schema_of.get_schema(node.op_type, 18, "").since_version
            )
        except schema_of.SchemaError:
            same = False
        if same:
            continue
        change = _CHANGES.get(node.op_type, _axes_to_attribute if node.op_type.startswith("Reduce") else _refuse)
        change(model, node)
        node.version = None
    model.opset_imports[""] = 17


def _axes_to_attribute(model: ir.Model, node: ir.Node) -> None:
    """Reduce*: the axes were an attribute."""
    ir = need("onnx_ir", extra="onnx")
    keep_all = node.attributes.pop("noop_with_empty_axes", None)
    if len(node.inputs) < 2 or node.inputs[1] is None:
        if keep_all is not None and keep_all.value:
            _refuse(model, node)
        return
    axes = const_of(node.inputs[1])
    if axes is None:
        _refuse(model, node)
    node.resize_inputs(1)
    node.attributes["axes"] = ir.AttrInt64s("axes", [int(a) for a in axes.reshape(-1)])


def _split(model: ir.Model, node: ir.Node) -> None:
    """Split: a number of equal parts was not yet an attribute."""
    parts = node.attributes.pop("num_outputs", None)
    if parts is None:
        return
    sizes = [dims(out) for out in node.outputs]
    axis = node.attributes["axis"].value if "axis" in node.attributes else 0
    lengths = [s[axis] if s is not None else None for s in sizes]
    if not all(isinstance(n, int) for n in lengths):
        _refuse(model, node)
    value = Build(model, node).const(np.array(lengths, np.int64))
    node.resize_inputs(2)
    node.replace_input_with(1, value)


def _pad(model: ir.Model, node: ir.Node) -> None:
    """Pad: there was no list of axes."""
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        _refuse(model, node)
    if len(node.inputs) > 3:
        node.resize_inputs(3)


def _resize(model: ir.Model, node: ir.Node) -> None:
    """Resize: no antialiasing, all axes."""
    for name, plain in (("antialias", 0), ("keep_aspect_ratio_policy", "stretch")):
        given = node.attributes.pop(name, None)
        if given is not None and given.value != plain:
            _refuse(model, node)
    if "axes" in node.attributes:
        _refuse(model, node)


def _scatter(model: ir.Model, node: ir.Node) -> None:
    """Scatter*: no reduction by minimum and maximum."""
    given = node.attributes.get("reduction")
    if given is not None and given.value in ("min", "max"):
        _refuse(model, node)


def _refuse(model: ir.Model, node: ir.Node) -> NoReturn:
    raise ExportError(f"{_label(node)} has no form in opset 17; use opset 18")


def _label(node: ir.Node) -> str:
    return f"{node.op_type} ({node.name})"


_CHANGES: dict[str, Callable[[ir.Model, ir.Node], None]] = {
    "Split": _split,
    "Pad": _pad,
    "Resize": _resize,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
}
