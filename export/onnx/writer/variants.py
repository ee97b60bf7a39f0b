"""Bodies of one op of normfuse: told apart by `overload` in memory, by the name of the op in a file.

    ShiftQuantLinear, overload "b4_g2_gelu_bias"   ->   ShiftQuantLinear_1
    ShiftQuantLinear, overload "b4_g3_bias"        ->   ShiftQuantLinear_2     counted in the order of the graph

`overload` came with version 10 of the file format; up to 1.26 ONNX Runtime takes the first body of a name, whatever its overload,
and so do tools. The kernel library registers the numbers (native/ort/names.cpp). Numbers and not words: a runtime takes time for
each name that is registered, and there are thousands of words. The words stand in the function's documentation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from normfuse.export.ops import DOMAIN
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["base_name", "load_model", "one_name_each"]

#: Behind the overload of a body for half data, which no kernel of the library takes: it keeps a name of its own.
HALVES = ("float16", "bfloat16")


def base_name(op_type: str) -> str:
    """The name of the op without the number of its variant; names of ops have no underscore of their own."""
    return op_type.partition("_")[0]


@contextlib.contextmanager
def one_name_each(model: ir.Model) -> Iterator[None]:
    """Within: nodes and functions of `model` bear the names that stand in files."""
    nodes = [node for graph in model.graphs() for node in graph if node.domain == DOMAIN]
    before = [(node.op_type, node.overload) for node in nodes]
    names = _names(before)
    functions = [f for f in model.functions.values() if f.identifier()[1:] in names and f.domain == DOMAIN]
    kept = [(f.name, f.overload, f.doc_string) for f in functions]
    for f, (_, overload, _) in zip(functions, kept, strict=True):
        _rename(model, f, names[f.name, f.overload], "", overload.replace("_", " ") or None)
    for node, key in zip(nodes, before, strict=True):
        node.op_type, node.overload = names[key], ""
    try:
        yield
    finally:
        for node, (name, overload) in zip(nodes, before, strict=True):
            node.op_type, node.overload = name, overload
        for f, (name, overload, words) in zip(functions, kept, strict=True):
            _rename(model, f, name, overload, words)


def _names(found: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    names: dict[tuple[str, str], str] = {}
    count: dict[str, int] = {}
    for op, overload in found:
        if (op, overload) in names:
            continue
        words = overload.split("_")
        if not overload:
            names[op, overload] = op
            continue
        half = [words.pop()] if words[-1] in HALVES else []
        count[op] = count.get(op, 0) + 1
        names[op, overload] = "_".join([op, str(count[op]), *half])
    return names


def load_model(path: str | Path) -> ir.Model:
    """The `onnx_ir.Model` of a file that normfuse wrote, with overloads as passes expect them."""
    model: ir.Model = need("onnx_ir", extra="onnx").load(path)
    for graph in model.graphs():
        for node in graph:
            if node.domain == DOMAIN:
                node.op_type, node.overload = _apart(node.op_type, node.overload)
    for f in [f for f in model.functions.values() if f.domain == DOMAIN]:
        _rename(model, f, *_apart(f.name, f.overload), f.doc_string)
    return model


def _apart(name: str, overload: str) -> tuple[str, str]:
    return base_name(name), overload or name.partition("_")[2]


def _rename(model: ir.Model, function: ir.Function, name: str, overload: str, words: str | None) -> None:
    del model.functions[function.identifier()]
    function.name, function.overload, function.doc_string = name, overload, words
    model.functions[function.identifier()] = function
