"""Nodes of the domain `normfuse`, and their definitions as functions beside the graph.

ONNX Runtime takes the kernel of a registered library where there is one and the function where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from normfuse.errors import ExportError
from normfuse.export.onnx.build import Build, dims
from normfuse.export.ops import DOMAIN, OPS, FunctionBody, Op

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["MIN_NATIVE_OPSET", "add_functions", "facts_of", "native_node"]

#: Bitwise ops, and lists of axes that are inputs, exist from 18 on.
MIN_NATIVE_OPSET = 18
_FACTS = "normfuse.facts."
_ZERO_IS_NONE = ("input_scale", "bits")  # left out where they are 0


def native_node(
    at: Build, name: str, inputs: Sequence[ir.Value | None], facts: dict[str, Any], *, count: int
) -> tuple[ir.Value, ...]:
    """One node of `DOMAIN` with its first `count` outputs; `facts` are its attributes and the `structure` of its op."""
    op = OPS[name]
    inputs = _without_gaps(at, op, inputs)
    last = max((i + 1 for i, v in enumerate(inputs) if v is not None), default=0)
    attributes = {k: facts[k] for k in op.attributes if facts.get(k) or k not in _ZERO_IS_NONE}
    node = at.ir.node(name, list(inputs[:last]), attributes, domain=DOMAIN, num_outputs=count)
    node.metadata_props.update(at.before.metadata_props)
    for key in op.structure:
        node.metadata_props[_FACTS + key] = str(facts[key])
    at.graph.insert_before(at.before, [node])
    return tuple(node.outputs)


def _without_gaps(at: Build, op: Op, inputs: Sequence[ir.Value | None]) -> tuple[ir.Value | None, ...]:
    """Ones and zeros for what is missing in front of what is there: tools drop inputs of a function that its body does not read,
    and then pass the wrong ones."""
    names = [n.removesuffix("?") for n in op.inputs]
    given = dict(zip(names, inputs, strict=True))
    last = max(i for i, v in enumerate(inputs) if v is not None)
    filled = dict(given)
    for name in names[:last]:
        like = given["scale"] if name == "bias" and "scale" in given else given.get("x")
        size = (dims(like) or (None,))[-1]
        if given[name] is None and name in _NEUTRAL and isinstance(size, int):
            dtype = np.float32 if name == "bias" or like is None or like.dtype is None else like.dtype.numpy()
            filled[name] = at.const(np.full(size, _NEUTRAL[name], dtype))
        elif given[name] is None and name == "residual":  # kernels take one 0 for none
            filled[name] = at.const(np.zeros(1, np.float32))
    return tuple(filled.values())


_NEUTRAL = {"gain": 1, "shift": 0, "bias": 0}


def facts_of(node: ir.Node) -> dict[str, Any]:
    """Attributes and structure of a node of `DOMAIN`."""
    op = OPS[node.op_type]
    given = {k: a.value for k, a in node.attributes.items()}
    facts: dict[str, Any] = {k: given.get(k, 0) for k in op.attributes}
    return facts | {k: int(node.metadata_props[_FACTS + k]) for k in op.structure}


def add_functions(model: ir.Model, opset: int) -> None:
    """Put the body of every node of `DOMAIN` beside the graph, one for each variant, and the words for it on the node: as its
    overload, for which `normfuse.export.onnx.writer.variants` gives it a name of its own when the file is written.

    Raises:
        ExportError: the opset is too old for the bodies.
    """
    nodes = [n for n in model.graph if n.domain == DOMAIN]
    if not nodes:
        return
    if opset < MIN_NATIVE_OPSET:
        raise ExportError(f"the native form needs opset {MIN_NATIVE_OPSET} or newer, not {opset}; use form='integer' below")
    for node in nodes:
        op, facts = OPS[node.op_type], facts_of(node)
        present = tuple(v is not None for v in (*node.inputs, *[None] * len(op.inputs))[: len(op.inputs)])
        node.overload = op.variant(facts, present, len(node.outputs))
        key = (DOMAIN, op.name, node.overload)
        if key not in model.functions:
            model.functions[key] = FunctionBody(op, present, opset).function(node.overload, facts, len(node.outputs))
    model.opset_imports[DOMAIN] = 1
