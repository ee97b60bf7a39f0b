"""The native form: one node of the domain `normfuse` each, with its definition as a function beside the graph.

ONNX Runtime takes the kernel of a registered library where there is one and the function where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from normfuse.errors import ExportError
from normfuse.export.onnx.build import Build, dims
from normfuse.export.onnx.quantized.integer import expand, take_over
from normfuse.export.onnx.quantized.sites import Site, sites
from normfuse.export.ops import DOMAIN, OPS, FunctionBody, Op
from normfuse.extras import need

__all__ = ["MIN_NATIVE_OPSET", "add_functions", "facts_of", "keep_nodes", "lower_native", "native_node"]

#: Bitwise ops, and lists of axes that are inputs, exist from 18 on.
MIN_NATIVE_OPSET = 18
_FACTS = "normfuse.facts."
_ZERO_IS_NONE = ("input_scale", "bits")  # left out where they are 0


def lower_native(model: Any) -> int:
    """Write every marker as a node of `DOMAIN`, in place; returns their number. What the kernels cannot take (float64, groups of
    channels with exponents of their own) becomes standard ops."""
    count = 0
    shared: dict[Any, Any] = {}
    for site in sites(model):
        if _takes(site):
            _place(model, site, shared)
        else:
            expand(model, site, shared)
        count += 1
    return count


def keep_nodes(model: Any, names: Sequence[str]) -> int:
    """Write the markers of `torch.ops.normfuse.<name>` for these names as nodes of `DOMAIN` in the dtype that they have, in place;
    returns their number. What a kernel of another runtime is to take; see `normfuse.export.tensorrt.plugins`."""
    count = 0
    for site in sites(model):  # one by one: a marker may read what stood in the place of the one before it
        if site.node.op_type not in names:
            continue
        at = Build(model, site.node)
        outputs = native_node(at, site.op.name, site.inputs, site.facts, count=site.count)
        for old, new in zip(site.node.outputs[: site.count], outputs, strict=True):
            take_over(old, new)
        model.graph.remove(site.node, safe=True)
        count += 1
    return count


def _takes(site: Site) -> bool:
    ir = need("onnx_ir", extra="onnx")
    grouped = site.op.name == "ShiftQuantConv2d" and site.facts["group"] > 1
    one_scale = site.op.name.startswith("ShiftQuantMatMul") and dims(site.inputs[1]) in (
        None,
        (),
    )  # the bodies multiply by a column
    return site.inputs[0].dtype != ir.DataType.DOUBLE and not grouped and not one_scale


def _place(model: Any, site: Site, shared: dict[Any, Any]) -> None:
    at = Build(model, site.node, shared)
    half = (at.ir.DataType.FLOAT16, at.ir.DataType.BFLOAT16)
    inputs = tuple(
        at.op("Cast", v, to=1, dtype=at.ir.DataType.FLOAT) if v is not None and v.dtype in half else v for v in site.inputs
    )
    outputs = native_node(at, site.op.name, inputs, site.facts, count=site.count)
    for old, new in zip(site.node.outputs[: site.count], outputs, strict=True):
        if old.dtype in half:
            new.dtype, new.shape = at.ir.DataType.FLOAT, old.shape
            new = at.op("Cast", new, to=int(old.dtype))
        take_over(old, new)
    model.graph.remove(site.node, safe=True)


def native_node(at: Build, name: str, inputs: tuple[Any, ...], facts: dict[str, Any], *, count: int) -> tuple[Any, ...]:
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


def _without_gaps(at: Build, op: Op, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
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
    return tuple(filled.values())


_NEUTRAL = {"gain": 1, "shift": 0, "bias": 0}


def facts_of(node: Any) -> dict[str, Any]:
    """Attributes and structure of a node of `DOMAIN`."""
    op = OPS[node.op_type]
    given = {k: a.value for k, a in node.attributes.items()}
    facts: dict[str, Any] = {k: given.get(k, 0) for k in op.attributes}
    return facts | {k: int(node.metadata_props[_FACTS + k]) for k in op.structure}


def add_functions(model: Any, opset: int) -> None:
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
