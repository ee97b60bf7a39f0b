"""A product whose result is only ever quantized writes codes.

linear(act(linear(x)))  =  shiftquant_matmul(shiftquant_matmul_quantize(quantize_rows(x)))
"""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Change
from normfuse.passes.fuse.fusion import Fusion, take_place
from normfuse.passes.fuse.product import Product, is_float32, piece, product, reads_codes_of, row_codes

__all__ = ["CodesBetween"]

ops = torch.ops.normfuse


class CodesBetween(Fusion):
    """Quantized linear layers behind which there is nothing but quantized linear layers."""

    name = "codes_between"

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        """linear(act(linear(x)))  =  matmul(matmul_quantize(quantize_rows(x)))

        Raises:
            Refuse: something else reads the first, it adds a residual, or its scale is static.
        """
        first = product(node)
        if first is None:
            return None
        found = reads_codes_of(node)
        if not found:
            return None
        if first.static:
            raise Refuse("its scale is static, and the kernel that writes codes finds scales by rows")
        if first.residual is not None:
            raise Refuse("it adds a residual, which the kernel that writes codes does not", blocker=first.residual)
        if not is_float32(node):
            raise Refuse("the kernel computes in float32, and the layer does not", remedy="export it in float32")
        bits = found[0].activation_bits
        note = f"codes of {bits} bits for {', '.join(graph.path(p.node) for p in found)}"
        return Change(note=note, do=partial(_write, graph, first, found, bits))


def _write(graph: Graph, first: Product, found: list[Product], bits: int) -> None:
    at = first.node
    q, scale = (first.q, first.row_scale) if first.x is None else row_codes(graph, first.x, first.activation_bits, at, at)
    args = (q, scale, *first.weight, None, first.bits, first.epilogue, bits, *first.blocks)
    whole = graph.call(ops.shiftquant_matmul_quantize.default, args, at, at)
    q, scale = (piece(graph, whole, i, at) for i in (0, 1))
    for reader in found:
        take_place(graph, reader.node, reader.on_codes(q, scale).emit(graph, reader.node))
    take_place(graph, at, q)  # for those that read its sizes
