"""Node and value names that say where in the model a node comes from."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import TYPE_CHECKING

from normfuse.export.onnx.writer.dims import readable

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["name_graph"]

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_graph(model: ir.Model, inputs: tuple[str, ...], outputs: tuple[str, ...], axes: Mapping[str, str]) -> None:
    """Name everything by module path: node `/blocks/3/norm1/RMSNormalization`, its value `…/RMSNormalization_output_0`.

    Weights keep their parameter names, graph inputs and outputs get the given names, symbolic axes those of `axes`.
    Names depend on the model alone, so that two exports can be compared. The exporter's own notes on nodes are dropped:
    they hold stack traces with the paths of the machine.
    """
    graph = model.graph
    paths = _paths(graph)
    for value in _values(graph):
        if value.shape is not None:
            value.shape = _named(value.shape, axes)
        value.metadata_props.clear()
    taken = {*inputs, *outputs}
    # a weight may be called like an output
    weights = {v: _unlike(v.name, taken) for v in graph.initializers.values() if v.name in taken}
    for node in graph:
        label = f"{paths[node]}/{node.op_type}"
        name, n = label, 1
        while name in taken:
            name, n = f"{label}_{n}", n + 1
        taken.add(name)
        node.name = name
        node.metadata_props.clear()
        node.doc_string = None
    # in two steps: a new name may be the old name of another value
    wanted = weights | dict(zip(graph.inputs, inputs, strict=True)) | dict(zip(graph.outputs, outputs, strict=True))
    for node in graph:
        for i, out in enumerate(node.outputs):
            wanted.setdefault(out, f"{node.name}_output_{i}")
        for i, read in enumerate(node.inputs):
            if read is not None and read.is_initializer() and _anonymous(read.name):
                wanted.setdefault(read, f"{node.name}_const_{i}")
    for i, value in enumerate(wanted):
        value.name = f"normfuse.renaming.{i}"
    for value, name in wanted.items():
        value.name = name
    graph.metadata_props.clear()
    model.metadata_props.clear()


def _unlike(name: str, taken: set[str]) -> str:
    n = 1
    while f"{name}_{n}" in taken:
        n += 1
    taken.add(f"{name}_{n}")
    return f"{name}_{n}"


def _paths(graph: ir.Graph) -> dict[ir.Node, str]:
    """Module path of each node; one without its own takes that of what it reads, else of what reads it."""
    paths: dict[ir.Node, str] = {}
    for node in graph:
        scopes = node.metadata_props.get(_SCOPES)
        if scopes:
            # torch puts a name of its own where a node stands in no module
            modules = [m for m in ast.literal_eval(scopes)[:-1] if not m.startswith("_empty_nn_module_stack")]
            paths[node] = "/" + modules[-1].replace(".", "/") if modules and modules[-1] else ""
    for node in graph:
        if node not in paths:
            makers = [v.producer() for v in node.inputs if v is not None]
            before = [maker for maker in makers if maker is not None and maker in paths]
            after = [u for out in node.outputs for u, _ in out.uses() if u in paths]
            paths[node] = paths[(before or after)[0]] if before or after else ""
    return paths


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]


def _anonymous(name: str | None) -> bool:
    """Not a parameter: a constant that the exporter or a rewrite made up."""
    return name is None or name.startswith(("val_", "const_", "_tensor_constant", "lifted_tensor_"))


def _named(shape: ir.Shape, axes: Mapping[str, str]) -> ir.Shape:
    return type(shape)([d if isinstance(d, int) else (None if d.value is None else readable(d.value, axes)) for d in shape.dims])
