"""Several quantized linear layers that read one value quantize it once.

linear_1(x), linear_2(x)  =  matmul_1(q, scale), matmul_2(q, scale);   q, scale = quantize_rows(x)
"""

from __future__ import annotations

from functools import partial

from torch import fx

from normfuse.ir.graph import Graph
from normfuse.ir.passes import Change
from normfuse.passes.fuse.fusion import Fusion, take_place
from normfuse.passes.fuse.product import Product, is_float32, product, readers, row_codes

__all__ = ["SharedCodes"]


class SharedCodes(Fusion):
    """The first of several readers stands for all."""

    name = "shared_codes"

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        """linear_1(x), linear_2(x)  =  matmul_1(q), matmul_2(q);   q = quantize_rows(x)"""
        first = product(node)
        if first is None or first.x is None or not is_float32(first.x):
            return None
        found = [p for user in readers(first.x) if (p := product(user)) is not None and p.x is first.x and not p.static]
        found = sorted((p for p in found if p.activation_bits == first.activation_bits), key=lambda p: p.node)
        if len(found) < 2 or found[0].node is not node:
            return None
        note = f"one quantization for {', '.join(graph.path(p.node) for p in found)}"
        return Change(note=note, do=partial(_write, graph, found))


def _write(graph: Graph, found: list[Product]) -> None:
    first = found[0]
    assert first.x is not None
    q, scale = row_codes(graph, first.x, first.activation_bits, first.node, first.node)
    for reader in found:
        take_place(graph, reader.node, reader.on_codes(q, scale).emit(graph, reader.node))
