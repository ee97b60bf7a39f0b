"""A norm whose result is only ever quantized writes codes, and the sum in front of it.

q, scale, sum = norm_quantize(a, b);   each linear: shiftquant_matmul(q, scale)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from normfuse.ir.constants import Constant
from normfuse.ir.decode import arguments
from normfuse.ir.dtypes import default_eps
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.passes import Change
from normfuse.ir.views import LayerNorm, RmsNorm, Value
from normfuse.passes.fuse.alike import addends_of
from normfuse.passes.fuse.fusion import Fusion, take_place
from normfuse.passes.fuse.product import Product, is_float32, piece, reads_codes_of

__all__ = ["NormCodes"]

ops = torch.ops.normfuse
_OWN: dict[Any, str] = {ops.rms_norm.default: "rms", ops.crms_norm.default: "crms", ops.l1_norm.default: "l1"}


@dataclass(frozen=True, eq=False)
class _Norm:
    """A norm over the last axis of `x`, as `norm_quantize` takes it."""

    node: fx.Node
    x: fx.Node
    kind: str
    gain: Any
    shift: Any
    eps: float
    scale_const: float = 1.0


class NormCodes(Fusion):
    """Norms behind which there is nothing but quantized linear layers."""

    name = "norm_codes"

    def change(self, graph: Graph, node: fx.Node) -> Change | None:
        """linear(norm(a + b))  =  matmul(norm_quantize(a, b)), and a + b for whoever reads it

        Raises:
            Refuse: something else reads the norm, or the norm is none that the kernels have.
        """
        kind = _kind(graph, node)
        if not kind:
            return None
        found = reads_codes_of(node)
        if not found:
            return None
        norm = _norm(graph, node, kind)
        if norm is None:
            raise Refuse("it is not over the last axis alone")
        if not is_float32(norm.x):
            raise Refuse("the kernel computes in float32, and the norm does not", remedy="export it in float32")
        joined = addends_of(graph, norm.x)
        note = f"codes of {found[0].activation_bits} bits for {', '.join(graph.path(p.node) for p in found)}"
        return Change(
            note=note + (", with the sum in front of it" if joined else ""), do=partial(_write, graph, norm, found, joined)
        )


def _kind(graph: Graph, node: fx.Node) -> str:
    match graph.view(node, 1):
        case LayerNorm():
            return "layer"
        case RmsNorm():
            return "rms"
    return _OWN.get(node.target, "") if node.op == "call_function" else ""


def _norm(graph: Graph, node: fx.Node, kind: str) -> _Norm | None:
    match graph.view(node, 1):
        case LayerNorm(Value(node=fx.Node() as x), [_], gamma, beta, eps):
            return _Norm(node, x, kind, _gain(gamma), beta, eps)
        case RmsNorm(Value(node=fx.Node() as x), [_], gamma, eps):
            dtype = node.meta["val"].dtype
            return _Norm(node, x, kind, _gain(gamma), None, default_eps(dtype) if eps is None else eps)
        case LayerNorm() | RmsNorm():
            return None
    a = arguments(node)
    return _Norm(node, a["x"], kind, a["gain"], a.get("shift"), a["eps"], a.get("scale_const", 1.0))


def _gain(gamma: Constant | None) -> Constant | None:
    return None if gamma is None or bool((gamma.native == 1).all()) else gamma


def _write(graph: Graph, norm: _Norm, found: list[Product], joined: tuple[fx.Node, fx.Node] | None) -> None:
    """The operator stands where the sum stood: others may read the sum before the norm comes."""
    before = norm.x if joined else norm.node
    a, b = joined or (norm.x, None)
    gain, shift = (graph.emit_constant(c, before) if isinstance(c, Constant) else c for c in (norm.gain, norm.shift))
    args = (a, b, gain, shift, norm.kind, norm.eps, norm.scale_const, found[0].activation_bits)
    whole = graph.call(ops.norm_quantize.default, args, before, norm.node)
    q, scale = (piece(graph, whole, i, before) for i in (0, 1))
    for reader in found:
        take_place(graph, reader.node, reader.on_codes(q, scale).emit(graph, reader.node))
    take_place(graph, norm.node, q)  # for those that read its sizes
    if joined:
        take_place(graph, norm.x, piece(graph, whole, 2, before))
