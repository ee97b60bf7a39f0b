"""Quantized linear layers as the rules of this folder read them, and who reads a value as codes."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ir.decode import arguments
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.operators import CHECKS
from normfuse.ops import OPERATORS

__all__ = ["Product", "is_float32", "product", "readers", "reads_codes_of", "row_codes"]

ops = torch.ops.normfuse
_LINEAR, _MATMUL = (getattr(ops, OPERATORS[name].name).default for name in ("shiftquant_linear", "shiftquant_matmul"))


@dataclass(frozen=True, eq=False)
class Product:
    """act(A (C << e) ⊙ scales + bias) + residual: `shiftquant_linear`, whose A are the codes of floats, or `shiftquant_matmul`.

    Attributes:
        node: the call.
        x: the floats, [..., K]; None where codes are read.
        q, row_scale: the codes, int8 [..., K], and their scale; None where floats are read.
        weight: packed codes, exponents, scale and bias, as the operators take them.
        blocks: the multipliers of blocks, which stand last among the arguments; empty without them.
        residual: [..., N], added behind the activation; None without one.
        bits: of the weight.
        activation_bits: of A; 0 where codes are read.
        static: A has a scale that is fixed.
        epilogue: name of the activation.
    """

    node: fx.Node
    x: fx.Node | None
    q: Any
    row_scale: Any
    weight: tuple[Any, ...]
    blocks: tuple[Any, ...]
    residual: fx.Node | None
    bits: int
    activation_bits: int
    static: bool
    epilogue: str

    def on_codes(self, q: fx.Node, row_scale: fx.Node) -> Product:
        """The same product of codes that are there."""
        return replace(self, x=None, q=q, row_scale=row_scale, activation_bits=0)

    def emit(self, graph: Graph, before: fx.Node) -> fx.Node:
        """The call in front of `before`, which has every operand."""
        if self.x is None:
            args = (self.q, self.row_scale, *self.weight, self.residual, self.bits, self.epilogue, *self.blocks)
            return graph.call(_MATMUL, args, before, self.node)
        given = arguments(self.node)
        args = (
            self.x,
            *self.weight,
            given["input_scale"],
            self.bits,
            self.activation_bits,
            self.epilogue,
            self.residual,
            *self.blocks,
        )
        return graph.call(_LINEAR, args, before, self.node)


def product(node: Any) -> Product | None:
    """The quantized linear layer that `node` is."""
    if not isinstance(node, fx.Node) or node.target not in (_LINEAR, _MATMUL):
        return None
    a = arguments(node)
    weight = tuple(a[name] for name in ("weight", "exponents", "scale", "bias"))
    blocks = () if a["multipliers"] is None else (a["multipliers"],)
    floats = "x" in a
    return Product(
        node, a.get("x"), a.get("q"), a.get("row_scale"), weight, blocks, a["residual"], a["bits"], a.get("activation_bits", 0),
        floats and a["input_scale"] is not None, a["epilogue"],
    )  # fmt: skip


def readers(node: fx.Node) -> list[fx.Node]:
    """Who reads a value, without those that only look at its shape or its dtype."""
    return [user for user in Graph.consumers(node) if user.target not in CHECKS]


def reads_codes_of(node: fx.Node) -> list[Product]:
    """The products that quantize `node` by rows, where nothing else reads it and all want the same bits; none where none does.

    Raises:
        Refuse: something else reads it as well.
    """
    found = [p for user in readers(node) if (p := product(user)) is not None and p.x is node and not p.static]
    if not found:
        return []
    known = {p.node for p in found if p.residual is not node}
    other = next((user for user in readers(node) if user not in known), None)
    if other is not None:
        what = "the model gives it out" if other.op == "output" else "it is read as floats, too"
        raise Refuse(f"its result cannot be codes alone: {what}", blocker=other)
    if len({p.activation_bits for p in found}) > 1:
        raise Refuse("the layers that read it quantize it to different widths", remedy="one activation_bits for all of them")
    return found


def row_codes(graph: Graph, x: fx.Node, bits: int, before: fx.Node, named: fx.Node) -> tuple[fx.Node, fx.Node]:
    """q, scale = quantize_rows(x) in front of `before`; in the module of `named`."""
    both = graph.call(ops.quantize_rows.default, (x, bits), before, named)
    return piece(graph, both, 0, before), piece(graph, both, 1, before)


def piece(graph: Graph, whole: fx.Node, i: int, before: fx.Node) -> fx.Node:
    """One of the results of a call."""
    return graph.call(operator.getitem, (whole, i), before, whole)


def is_float32(node: fx.Node) -> bool:
    """In which the kernels compute."""
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dtype is torch.float32
