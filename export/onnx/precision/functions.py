"""Ops of normfuse on half data: their definitions compute in float32 between casts, as their kernels do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normfuse.export.ops import DOMAIN
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["as_low"]


def as_low(model: ir.Model, node: ir.Node, places: tuple[frozenset[int], frozenset[int]], low: ir.DataType) -> None:
    """Give `node`, whose inputs and outputs at `places` are of dtype `low`, a body that casts them: an overload of its own."""
    ir = need("onnx_ir", extra="onnx")
    body = model.functions.get((DOMAIN, node.op_type, node.overload))
    if body is None:
        return
    overload = "_".join(filter(None, [node.overload, low.name.lower()]))
    node.overload = overload
    key = (DOMAIN, node.op_type, overload)
    if key in model.functions:
        return
    made = body.clone()
    graph = made.graph
    for i in sorted(places[0]):
        formal = made.inputs[i]
        cast = ir.node("Cast", [formal], {"to": int(ir.DataType.FLOAT)}, num_outputs=1)
        cast.outputs[0].name = f"{formal.name}_float"
        formal.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, formal)
        graph.insert_before(graph[0], cast)
    for i in sorted(places[1]):
        result = made.outputs[i]
        cast = ir.node("Cast", [result], {"to": int(low)}, num_outputs=1)
        cast.outputs[0].name = f"{result.name}_{low.name.lower()}"
        graph.append(cast)
        graph.outputs[i] = cast.outputs[0]
    model.functions[key] = ir.Function(DOMAIN, node.op_type, overload, graph=graph, attributes=list(made.attributes.values()))
