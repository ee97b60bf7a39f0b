"""A float32 ONNX graph as a strongly typed one of mixed precision: products in half, statistics in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from normfuse.errors import UsageError
from normfuse.export.onnx.build import given
from normfuse.export.onnx.precision.islands import plan
from normfuse.export.onnx.precision.ops import COMMON_DOMAINS, infer_dtypes
from normfuse.export.onnx.precision.rewrite import Rewrite
from normfuse.export.onnx.precision.spelling import DTYPES, spelled_dtype
from normfuse.export.options import IO_DTYPES
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DTYPES", "IO_DTYPES", "to_precision"]

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def to_precision(model: ir.Model, dtype: str, *, io_dtype: str = "fp32", own_in_fp32: bool = False) -> tuple[str, ...]:
    """Change the float32 `onnx_ir.Model`, in place, to compute in `dtype` wherever that keeps its results.

    Weights, products, activations and the data of normalizations become half. What half cannot hold stays float32, between
    casts: statistics of norms that are spelt out, powers, exponentials and logarithms, running sums, tables of positions and what
    they are computed from, numbers of the model beyond the range of half or below it. LayerNormalization, RMSNormalization and
    Softmax get half data; their inside is float32 by their standard. All float inputs of a node have one dtype, as a strongly
    typed TensorRT network asks for.

    Args:
        model: a finished model, with its names.
        dtype: `fp16`, `bf16`; `fp32` and `fp64` change nothing. A model that is half already stays as it is.
        io_dtype: dtype of the float inputs and outputs of the graph: `fp32`, or `low` for that of the products.
        own_in_fp32: ops of normfuse stay in float32, which is what our kernels on the CPU take; those of plugins take half.

    Returns: what the user should know: weights that stay in float32.

    Raises:
        UsageError: an argument is unknown, or the model has float64 values or another half dtype than the one asked for.
    """
    ir = need("onnx_ir", extra="onnx")
    need("onnx_ir.passes.common", extra="onnx")
    dtype = spelled_dtype(dtype)
    if io_dtype not in IO_DTYPES:
        raise UsageError(f"unknown io_dtype {io_dtype!r}: expected one of {', '.join(IO_DTYPES)}")
    if dtype in ("fp32", "fp64"):
        return ()
    low = ir.DataType.FLOAT16 if dtype == "fp16" else ir.DataType.BFLOAT16
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    nodes = list(_nodes(model.graph))
    _plain_casts(nodes)
    infer_dtypes(nodes, model.graph.opset_imports[""])
    _refuse_double(model, nodes)
    half = _half(nodes)
    if half is not None and half != low:
        raise UsageError(
            f"the model computes in {half.name.lower()} already, not in float32: ask for that dtype, or export the model in float32"
        )
    if half is not None:
        return (f"the model computes in {half.name.lower()} already and stays as it is",)
    made = plan(model, nodes, low, own_in_fp32=own_in_fp32)
    Rewrite(model, nodes, made).run(low_io=io_dtype == "low")
    ir.passes.common.RemoveUnusedFunctionsPass()(model)
    return tuple(made.notes)


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """All nodes; those of a subgraph before the node that it belongs to."""
    ir = need("onnx_ir", extra="onnx")
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _nodes(attribute.value)
            elif attribute.type == ir.AttributeType.GRAPHS:
                for inner in attribute.value:
                    yield from _nodes(inner)
        yield node


def _plain_casts(nodes: list[ir.Node]) -> None:
    """CastLike as Cast: what it is like may get another dtype."""
    ir = need("onnx_ir", extra="onnx")
    for node in nodes:
        if node.op_type == "CastLike" and node.domain in COMMON_DOMAINS and node.outputs[0].dtype is not None:
            node.op_type = "Cast"
            node.attributes["to"] = ir.AttrInt64("to", int(node.outputs[0].dtype))
            node.resize_inputs(1)


def _refuse_double(model: ir.Model, nodes: list[ir.Node]) -> None:
    ir = need("onnx_ir", extra="onnx")
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(out for node in nodes for out in node.outputs)]
    double = next((v for v in values if v.dtype == ir.DataType.DOUBLE), None)
    if double is not None:
        raise UsageError(
            f"{double.name} is float64: half precision is for float32 models; convert the model with model.float(), its inputs "
            "with tensor.float(), and make the constants of its code float32"
        )


def _half(nodes: list[ir.Node]) -> ir.DataType | None:
    """The half dtype that products of the model compute in; None for a float32 model."""
    ir = need("onnx_ir", extra="onnx")
    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    found = [given(n, 1).dtype for n in nodes if n.op_type in _WEIGHTED and n.domain in COMMON_DOMAINS]
    if ir.DataType.FLOAT in found:
        return None
    return next((dtype for dtype in found if dtype in half), None)
