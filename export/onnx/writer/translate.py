"""How ATen ops become ONNX nodes where torch's own translation is not good enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from normfuse.errors import ExportError
from normfuse.export.onnx.writer.pooling import adaptive_average_3d
from normfuse.extras import need

__all__ = ["MARKER_DOMAIN", "SDPA", "table"]

#: Nodes of this domain stand for a whole operation until it is lowered; none is left in a file.
MARKER_DOMAIN = "normfuse.marker"
SDPA = "ScaledDotProductAttention"


def table(opset: int, *, contrib: bool = False) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations for `torch.onnx.export(custom_translation_table=...)`; `contrib` allows ops of ONNX Runtime."""
    aten = torch.ops.aten
    found: dict[Callable[..., Any], Callable[..., Any]] = {
        aten.rms_norm.default: _rms_norm_23 if opset >= 23 else _rms_norm_18,
        aten.scaled_dot_product_attention.default: _sdpa_marker(),
        aten.scalar_tensor.default: _scalar_tensor,
        aten._adaptive_avg_pool3d.default: adaptive_average_3d,
    }
    if contrib and opset < 20:
        found[aten.gelu.default] = _contrib_gelu()
    return found


def _scalar_tensor(s: Any, dtype: int = -1, layout: str = "", device: str = "", pin_memory: bool = False) -> Any:
    """A number in the dtype that is asked for; torch's own translation goes through float32, which cuts a float64."""
    ir, op = need("onnx_ir", extra="onnx"), need("onnxscript", extra="onnx").opset18
    wanted = ir.DataType.FLOAT if dtype == -1 else ir.DataType(dtype)
    if isinstance(s, (bool, int, float)):
        return op.Constant(value=ir.tensor(s, dtype=wanted))
    return op.Cast(s, to=wanted)


def _eps(x: Any, eps: float | None) -> float:
    """`eps`; without one, the machine epsilon of the dtype that torch computes in, which for half precision is float32."""
    ir = need("onnx_ir", extra="onnx")
    if eps is not None:
        return eps
    return torch.finfo(torch.float64 if x.dtype == ir.DataType.DOUBLE else torch.float32).eps


def _ones(x: Any, shape: Sequence[Any]) -> Any:
    ir, op = need("onnx_ir", extra="onnx"), need("onnxscript", extra="onnx").opset18
    if all(isinstance(size, int) for size in shape):
        return op.Constant(value=ir.tensor(np.ones(tuple(shape), x.dtype.numpy())))
    return op.ConstantOfShape(op.Shape(x, start=-len(shape)), value=ir.tensor([1], dtype=x.dtype))


def _rms_norm_23(input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """x / sqrt(mean(x²) + eps) * weight over the last `len(normalized_shape)` axes."""
    op = need("onnxscript", extra="onnx").opset23
    scale = _ones(input, normalized_shape) if weight is None else weight
    return op.RMSNormalization(input, scale, axis=-len(normalized_shape), epsilon=_eps(input, eps))


def _rms_norm_18(input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """x / sqrt(mean(x²) + eps) * weight in the shape that ONNX Runtime fuses to one kernel."""
    ir, op = need("onnx_ir", extra="onnx"), need("onnxscript", extra="onnx").opset18
    half = input.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    dtype = ir.DataType.FLOAT if half else input.dtype
    x = op.Cast(input, to=dtype) if half else input  # the square of a half overflows at 256
    axes = op.Constant(value_ints=list(range(-len(normalized_shape), 0)))
    square = op.Pow(x, op.Constant(value=ir.tensor(2.0, dtype=dtype)))
    mean = op.ReduceMean(square, axes, keepdims=1)
    y = op.Div(x, op.Sqrt(op.Add(mean, op.Constant(value=ir.tensor(_eps(input, eps), dtype=dtype)))))
    if weight is not None:
        y = op.Mul(y, op.Cast(weight, to=dtype) if half else weight)
    return op.Cast(y, to=input.dtype) if half else y


def _contrib_gelu() -> Callable[..., Any]:
    """GELU as one op of ONNX Runtime: below opset 20 there is no other, and the runtime does not fuse what torch writes."""
    exact, fast = (_op("com.microsoft", name, inputs=("X",)) for name in ("Gelu", "FastGelu"))

    def translate(self: Any, approximate: str = "none") -> Any:
        return (fast if approximate == "tanh" else exact)(self)

    return translate


def _op(
    domain: str, name: str, *, inputs: tuple[str, ...], optional: tuple[str, ...] = (), attributes: Mapping[str, str] | None = None
) -> Any:
    """An op that the exporter takes as it is; all inputs share a dtype, apart from the optional ones."""
    onnx = need("onnx", extra="onnx")
    values = need("onnxscript", extra="onnx").values
    schema_of, parameter = onnx.defs.OpSchema, onnx.defs.OpSchema.FormalParameter
    floats = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double")]
    schema = schema_of(
        name,
        domain,
        1,
        inputs=[
            *(parameter(i, "T") for i in inputs),
            *(parameter(i, "M", param_option=schema_of.FormalParameterOption.Optional) for i in optional),
        ],
        outputs=[parameter("output", "T")],
        type_constraints=[("T", floats, ""), *([("M", [*floats, "tensor(bool)"], "")] if optional else [])],
        attributes=[schema_of.Attribute(k, getattr(schema_of.AttrType, v), "") for k, v in (attributes or {}).items()],
    )
    return values.Op(values.Opset(domain, 1), name, schema)


def _sdpa_marker() -> Callable[..., Any]:
    """softmax(scale q kᵀ + mask) v, kept as one node until the form of attention is chosen."""
    marker = _op(
        MARKER_DOMAIN,
        SDPA,
        inputs=("query", "key", "value"),
        optional=("mask",),
        attributes={"scale": "STRING", "causal": "INT"},
    )

    def translate(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if dropout_p:
            raise ExportError(
                f"scaled_dot_product_attention has dropout_p={dropout_p}: its result is random; put the model in eval mode"
            )
        if scale is None:
            width = query.shape[-1]
            if not isinstance(width, int):
                raise ExportError("scaled_dot_product_attention over a head of unknown width; pass scale=")
            scale = 1 / math.sqrt(width)
        # a string: an ONNX float attribute would cut a float64 scale to float32
        return marker(query, key, value, attn_mask, scale=repr(float(scale)), causal=int(is_causal))

    return translate
