"""Operators of ours as nodes of a translated graph that stand for them until they are written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from normfuse.export.onnx.writer.translate import MARKER_DOMAIN
from normfuse.extras import need
from normfuse.ops import OPERATORS

__all__ = ["marker", "markers", "markers_of"]

_KINDS = {"int": "INT", "float": "FLOAT", "bool": "INT", "str": "STRING", "List[int]": "INTS"}


def markers() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of the operators of `torch.ops.normfuse`."""
    return markers_of(getattr(torch.ops.normfuse, name).default for name in OPERATORS)


def markers_of(overloads: Iterable[Any]) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations of operators: each becomes one node of `MARKER_DOMAIN` of the same name."""
    return {overload: marker(overload) for overload in overloads}


def marker(overload: Any) -> Callable[..., Any]:
    """The translation of an operator: one node of `MARKER_DOMAIN`.

    Tensors are its inputs, in order, what is missing left empty; numbers, words and lists are attributes.
    """
    values = need("onnxscript", extra="onnx").values
    name, arguments = overload._schema.name.rpartition("::")[2], overload._schema.arguments
    tensors = [a for a in arguments if "Tensor" in str(a.type)]
    rest = {a.name: _KINDS[str(a.type)] for a in arguments if "Tensor" not in str(a.type)}
    node = values.Op(values.Opset(MARKER_DOMAIN, 1), name, _schema(name, tensors, rest, len(overload._schema.returns)))
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    signature = inspect.Signature(
        [inspect.Parameter(a.name, kind, default=a.default_value if a.has_default_value() else empty) for a in arguments]
    )

    def translate(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        return node(*(given[a.name] for a in tensors), **{k: int(given[k]) if rest[k] == "INT" else given[k] for k in rest})

    translate.__signature__ = signature  # type: ignore[attr-defined]
    translate.__name__ = name
    return translate


def _schema(name: str, tensors: Sequence[Any], rest: Mapping[str, str], results: int) -> Any:
    schema_of = need("onnx", extra="onnx").defs.OpSchema
    parameter, option = schema_of.FormalParameter, schema_of.FormalParameterOption
    every = sorted(schema_of.all_tensor_types()) if hasattr(schema_of, "all_tensor_types") else _TYPES
    return schema_of(
        name,
        MARKER_DOMAIN,
        1,
        inputs=[
            parameter(a.name, f"T{i}", param_option=option.Optional if "Optional" in str(a.type) else option.Single)
            for i, a in enumerate(tensors)
        ],
        outputs=[parameter(f"y{i}", f"R{i}") for i in range(results)],
        type_constraints=[(f"{k}{i}", every, "") for k, n in (("T", len(tensors)), ("R", results)) for i in range(n)],
        attributes=[schema_of.Attribute(k, getattr(schema_of.AttrType, v), "") for k, v in rest.items()],
    )


_TYPES = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "double", "bool", "int8", "uint8", "int32", "int64")]
