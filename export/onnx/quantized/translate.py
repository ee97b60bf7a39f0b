"""Operators of `torch.ops.normfuse` as nodes that stand for them until a form is chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from normfuse.export.onnx.writer.translate import MARKER_DOMAIN
from normfuse.extras import need

__all__ = ["marker", "markers"]

_KINDS = {"int": "INT", "float": "FLOAT", "bool": "INT", "str": "STRING", "List[int]": "INTS"}
#: Everything that a graph may hold; names as in `normfuse.ops`.
NAMES = (
    "add_crms_norm", "add_rms_norm", "attention", "crms_norm", "l1_norm", "norm_quantize", "quantize_rows", "rms_norm",
    "rms_norm_linear", "shiftquant_attention", "shiftquant_conv2d", "shiftquant_embedding", "shiftquant_linear",
    "shiftquant_matmul", "shiftquant_matmul_quantize", "two_pass_softmax",
)  # fmt: skip


def markers() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of the operators that are registered: each becomes one node of `MARKER_DOMAIN` of the same name."""
    known = torch.ops.normfuse
    return {getattr(known, name).default: marker(getattr(known, name).default) for name in NAMES if hasattr(known, name)}


def marker(overload: Any) -> Callable[..., Any]:
    """The translation of an operator: one node of `MARKER_DOMAIN`.

    Tensors are its inputs, in order, what is missing left empty; numbers, words and lists are attributes.
    """
    onnx = need("onnx", extra="onnx")
    values = need("onnxscript", extra="onnx").values
    schema_of = onnx.defs.OpSchema
    parameter, option = schema_of.FormalParameter, schema_of.FormalParameterOption
    name, arguments = overload._schema.name.rpartition("::")[2], overload._schema.arguments
    tensors = [a for a in arguments if "Tensor" in str(a.type)]
    rest = {a.name: _KINDS[str(a.type)] for a in arguments if "Tensor" not in str(a.type)}
    every = sorted(schema_of.all_tensor_types()) if hasattr(schema_of, "all_tensor_types") else _TYPES
    results = [f"y{i}" for i in range(len(overload._schema.returns))]
    schema = schema_of(
        name,
        MARKER_DOMAIN,
        1,
        inputs=[
            parameter(a.name, f"T{i}", param_option=option.Optional if "Optional" in str(a.type) else option.Single)
            for i, a in enumerate(tensors)
        ],
        outputs=[parameter(r, f"R{i}") for i, r in enumerate(results)],
        type_constraints=[(f"{k}{i}", every, "") for k, n in (("T", len(tensors)), ("R", len(results))) for i in range(n)],
        attributes=[schema_of.Attribute(k, getattr(schema_of.AttrType, v), "") for k, v in rest.items()],
    )
    node = values.Op(values.Opset(MARKER_DOMAIN, 1), name, schema)
    signature = inspect.Signature(
        [
            inspect.Parameter(
                a.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
            )
            for a in arguments
        ]
    )

    def translate(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        return node(*(given[a.name] for a in tensors), **{k: int(given[k]) if rest[k] == "INT" else given[k] for k in rest})

    translate.__signature__ = signature  # type: ignore[attr-defined]
    translate.__name__ = name
    return translate


_TYPES = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double", "bool", "int8", "uint8", "int32", "int64")]
