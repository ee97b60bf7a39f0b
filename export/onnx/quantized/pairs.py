"""QuantizeLinear and DequantizeLinear behind each value that is codes between layers (`quantized.between`)."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from normfuse.export.onnx.build import Build, dims, take_over
from normfuse.export.onnx.quantized.between import Chain, Codes
from normfuse.export.onnx.quantized.sites import Site
from normfuse.export.onnx.writer.translate import MARKER_DOMAIN

__all__ = ["read_pair", "write_pairs"]

_MARK = "normfuse.codes"  # on markers of layers of the chain
_POOLS = ("AveragePool", "GlobalAveragePool", "ReduceMean")
log = logging.getLogger(__name__)


def write_pairs(model: Any, chain: Chain) -> None:
    """Put a pair behind every value of `chain`, in front of its readers, while its layers are markers still.

    What leaves the graph stays in float.
    """
    shared: dict[Any, Any] = {}
    values = _values(model, chain)
    for name in chain.pools.keys() & values.keys():
        values[name] = _as_pool(model, values[name], chain.codes.get(name), shared)
    for layer in chain.layers.keys() & values.keys():
        values[layer].producer().meta[_MARK] = True
    for name, codes in chain.codes.items():
        value = values.get(name)
        if value is None:  # the translation made something else of it
            log.debug("there is no value %s to write codes of", name)
            continue
        readers = [(u, i) for u, i in value.uses() if name in chain.inside or _is_layer(u, chain)]
        if not readers:
            continue
        rounded = _pair(model, value, codes, shared)
        for reader, i in readers:
            reader.replace_input_with(i, rounded)


def _values(model: Any, chain: Chain) -> dict[str, Any]:
    """By the names of the program. The translation may take a pool apart, or a change of shape, and then calls the parts its own
    way: they are found by who reads them, and by what they read."""
    found = {v.name: v for v in (*model.graph.inputs, *(v for node in model.graph for v in node.outputs))}
    for layer, x in chain.layers.items():
        if x not in found and layer in found:
            found[x] = found[layer].producer().inputs[0]
    for pool, x in chain.pools.items():
        if pool not in found and x in found:
            made = [u.outputs[0] for u, _ in found[x].uses() if u.op_type in _POOLS and not u.domain]
            found |= {pool: made[0]} if len(made) == 1 else {}
    return found


def read_pair(site: Site) -> tuple[Any, Any, Any] | None:
    """(codes, scale, zero point) that a layer of the chain reads; None for any other layer."""
    if _MARK not in site.node.meta:
        return None
    codes, scale, zero = site.x.producer().inputs  # type: ignore[union-attr]
    return codes, scale, zero


def _is_layer(node: Any, chain: Chain) -> bool:
    return node.domain == MARKER_DOMAIN and node.outputs[0].name in chain.layers


def _pair(model: Any, value: Any, codes: Codes, shared: dict[Any, Any]) -> Any:
    """The value rounded to codes, behind its producer."""
    maker, first = value.producer(), next(iter(model.graph))
    at = Build(model, maker or first, shared)
    scale, zero = at.const(np.float32(codes.scale)), at.const(np.uint8(codes.zero))
    nodes: list[Any] = []
    for kind, dtype in (("QuantizeLinear", zero.dtype), ("DequantizeLinear", value.dtype)):
        node = at.ir.node(kind, [nodes[-1].outputs[0] if nodes else value, scale, zero])
        node.metadata_props.update(at.before.metadata_props)
        node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
        nodes.append(node)
    if maker is None:
        model.graph.insert_before(first, nodes)
    else:
        model.graph.insert_after(maker, nodes)
    return nodes[-1].outputs[0]


def _as_pool(model: Any, mean: Any, codes: Codes | None, shared: dict[Any, Any]) -> Any:
    """A mean over height and width as the pool that runtimes have for codes, and its codes where it has some."""
    node = mean.producer()
    if node is None or node.op_type != "ReduceMean" or (shape := dims(mean)) is None:
        return mean
    at, x = Build(model, node, shared), node.inputs[0]
    pooled = at.op("GlobalAveragePool", x, dtype=x.dtype, shape=(*shape[:2], 1, 1))
    if len(shape) == 2:
        inner = pooled if codes is None else _pair(model, pooled, codes, shared)
        pooled = at.op("Flatten", inner, axis=1, dtype=x.dtype, shape=shape)
    take_over(mean, pooled)
    model.graph.remove(node, safe=True)
    return pooled
