"""An exported program as a graph for passes, and back."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph

__all__ = ["graph_of", "with_graph"]


def graph_of(program: ExportedProgram) -> Graph:
    """The program's graph, its tensors as constants; the program is not changed.

    A program takes its tensors as inputs; here each is a `get_attr` of its name, as in a module.
    """
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, values))
    for old, new in zip(program.graph.nodes, graph.nodes, strict=True):
        new.meta, new.name = dict(old.meta), old.name  # fx would give one called `input` another
    placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    constants: dict[str, Constant] = {}
    for spec in program.graph_signature.input_specs:
        tensor = _tensor(program, spec)
        if tensor is None:
            continue
        old, target = placeholders[spec.arg.name], str(spec.target)
        with graph.inserting_before(old):
            new = graph.create_node("get_attr", target, name=f"{old.name}_")
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
        constants[target] = Constant.of(tensor, target)
    return Graph(graph, constants, program.graph_module)


def with_graph(program: ExportedProgram, graph: Graph) -> ExportedProgram:
    """The program with the calls of `graph`, which came from it: its tensors are inputs again, new ones are buffers."""
    graph = graph.copy()
    graph.clean()
    state, constants = dict(program.state_dict), dict(program.constants)
    kept = {s.target: s for s in program.graph_signature.input_specs}
    users = [s for s in program.graph_signature.input_specs if _tensor(program, s) is None]
    specs: list[InputSpec] = []
    reads = [n for n in graph.fx.nodes if n.op == "get_attr" and str(n.target) in graph.constants]
    first = next(n for n in graph.fx.nodes if n not in reads)
    values: dict[str, fx.Node] = {}
    for node in reads:
        key = str(node.target)
        if key not in values:  # a constant that is read at several places is one input
            with graph.fx.inserting_before(first):
                values[key] = graph.fx.placeholder(node.name.rstrip("_"))
            values[key].meta = dict(node.meta)
            argument = TensorArgument(values[key].name)
            if key in kept:
                specs.append(InputSpec(kept[key].kind, argument, key, kept[key].persistent))
            else:
                state[key] = graph.constants[key].native
                specs.append(InputSpec(InputKind.BUFFER, argument, key, persistent=True))
        node.replace_all_uses_with(values[key])
        graph.fx.erase_node(node)
    signature = copy.copy(program.graph_signature)
    signature.input_specs = [*specs, *users]
    _give_out(signature, graph)
    module = fx.GraphModule(program.graph_module, graph.fx)
    module.meta = dict(program.graph_module.meta)
    return program._update(module, signature, state_dict=state, constants=constants)


def _tensor(program: ExportedProgram, spec: InputSpec) -> Tensor | None:
    """The parameter, buffer or constant that an input stands for; None for an input of the user."""
    name = spec.target or ""
    found = program.state_dict.get(name, program.constants.get(name))
    return found if isinstance(found, Tensor) else None


def _give_out(signature: torch.export.ExportGraphSignature, graph: Graph) -> None:
    """Outputs by the names of the nodes that compute them now."""
    given = graph.fx.output_node().args[0]
    assert isinstance(given, (tuple, list))
    specs = []
    for spec, node in zip(signature.output_specs, given, strict=True):
        new = copy.copy(spec)
        if isinstance(node, fx.Node) and isinstance(spec.arg, TensorArgument):
            new.arg = TensorArgument(node.name)
        specs.append(new)
    signature.output_specs = specs
