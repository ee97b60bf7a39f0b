"""How many normalizations a graph computes, by kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx
from torch.utils import _pytree as pytree

from normfuse.ir.graph import Graph, path_of
from normfuse.ir.views import (
    VIEWS,
    BatchNorm,
    GroupNorm,
    Identity,
    InstanceNorm,
    LayerNorm,
    Movement,
    Op,
    Permute,
    Reshape,
    RmsNorm,
)  # fmt: skip

__all__ = ["NORMS", "census", "placed", "regions"]

_KINDS: dict[type[Op], str] = {
    BatchNorm: "batch_norm",
    InstanceNorm: "instance_norm",
    LayerNorm: "layer_norm",
    RmsNorm: "rms_norm",
    GroupNorm: "group_norm",
}
NORMS = tuple(_KINDS)
"""Views of PyTorch's own normalizations."""

_MOVES = (Identity, Movement, Permute, Reshape)
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_LAYER = re.compile(r"normfuse\.nn\.\w+\.(\w*Norm\w*|Dynamic\w+)")


def census(graph: Graph) -> Counter[str]:
    """Normalizations by kind, see `placed`."""
    return Counter(kind for _, kind in placed(graph))


def placed(graph: Graph) -> list[tuple[str, str]]:
    """Module path and kind of each normalization: PyTorch's operators, and layers of `normfuse.nn` that compute more than those.

    A layer is counted under its own name (`unified_norm`) as long as arithmetic of it is left; once only an operator of
    PyTorch is left of it, that operator is counted, and once nothing is left, nothing. Norms inside of regions (`torch.cond`,
    autocast) are counted where they stand.
    """
    operators: list[tuple[str, str, tuple[str, str] | None]] = []
    layers: dict[tuple[str, str], None] = {}
    for node in _computed(graph):
        view = graph.view(node, 1)
        # a norm whose weight is computed or cast is opaque to rules, and a norm all the same
        kind = _KINDS.get(type(view) if isinstance(view, Op) else VIEWS.get(node.target)) or _kernel(node)  # type: ignore[arg-type]
        layer = _layer(node)
        if kind is not None:
            operators.append((path_of(node), kind, layer))
        elif layer is not None and not isinstance(view, _MOVES):
            layers[layer] = None
    found = [(path, name) for name, path in layers] + [(path, kind) for path, kind, layer in operators if layer not in layers]
    return [*found, *(norm for _, body in regions(graph) for norm in placed(body))]


def _kernel(node: fx.Node) -> str | None:
    """Of an operator of `torch.ops.normfuse` that has one of PyTorch's normalizations inside."""
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    if name == "normfuse::norm_quantize":
        return {"layer": "layer_norm", "rms": "rms_norm"}.get(str(node.args[4]))
    return "rms_norm" if name in ("normfuse::rms_norm", "normfuse::add_rms_norm", "normfuse::rms_norm_linear") else None


def regions(graph: Graph) -> Iterator[tuple[fx.Node, Graph]]:
    """The graphs inside of a graph, each with the operator that runs it."""
    for node in graph.fx.find_nodes(op="get_attr"):
        held = graph.owned(str(node.target))
        if isinstance(held, fx.GraphModule):
            for user in node.users:
                yield user, _with_constants(Graph.of(held), graph, user)


def _with_constants(body: Graph, outer: Graph, user: fx.Node) -> Graph:
    """The graph of a region, reading as constants what the operator around it hands in as such."""
    inputs = list(body.fx.find_nodes(op="placeholder"))
    operands = [
        a
        for a in pytree.tree_leaves(user.args)
        if not (isinstance(a, fx.Node) and isinstance(outer.owned(str(a.target)), fx.GraphModule))
    ]
    for node, operand in zip(inputs, operands[len(operands) - len(inputs) :], strict=True):
        constant = outer.constant(operand) if isinstance(operand, fx.Node) else None
        if constant is not None:
            node.replace_all_uses_with(body.emit_constant(constant, inputs[-1].next))
    return body


def _computed(graph: Graph) -> Iterator[fx.Node]:
    """The operators that depend on an input of the model."""
    known: set[fx.Node] = set()
    for node in graph:
        if node.op == "get_attr" or (node.op == "call_function" and known.issuperset(node.all_input_nodes)):
            known.add(node)
        elif node.op == "call_function":
            yield node


def _layer(node: fx.Node) -> tuple[str, str] | None:
    """Kind and place of the layer of `normfuse.nn` that the node belongs to, the outermost one if they are nested."""
    for path, owner in (node.meta.get("nn_module_stack") or {}).values():
        name = owner if isinstance(owner, str) else f"{owner.__module__}.{owner.__qualname__}"
        found = _LAYER.fullmatch(name)
        if found is not None:
            return _WORDS.sub("_", found[1]).lower(), path or path_of(node)
    return None
