"""What a file computes whose values between layers are codes (`quantized.between`): the reference that it is held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.export.onnx.program import Program
from normfuse.export.onnx.quantized.between import Chain, Codes, narrowed
from normfuse.export.onnx.quantized.weights_alone import PRODUCTS

__all__ = ["as_coded"]


def as_coded(program: Program, chain: Chain) -> Program:
    """The same program, whose reference rounds what `chain` says to codes, and multiplies these with dequantized weights."""
    if not chain:
        return program
    module: Any = program.exported.module()
    graph: fx.Graph = module.graph
    layers = [n for n in graph.nodes if n.name in chain.layers]
    for node in list(graph.nodes):
        codes = chain.codes.get(node.name)
        if codes is None:
            continue
        inside = node.name in chain.inside
        readers = [n for n in node.users if n.op != "output" and (inside or n in layers)]
        with graph.inserting_after(node):
            rounded = graph.call_function(_rounded(codes), (node,))
        for reader in readers:
            reader.replace_input_with(node, rounded)
    for node in layers:
        node.target = _product(node.target, chain.codes[chain.layers[node.name]])
    module.recompile()
    return dataclasses.replace(program, module=module)


def _rounded(codes: Codes) -> Callable[[Tensor], Tensor]:
    def rounded(x: Tensor) -> Tensor:
        return codes.rounded(x)

    return rounded


def _product(target: Any, read: Codes) -> Callable[..., Tensor]:
    """The operator with floats for what it reads, and its bias in units of its sums."""
    name, arguments = target._schema.name.partition("::")[2], target._schema.arguments
    product, defaults = PRODUCTS[name], {a.name: a.default_value for a in arguments}

    def product_of_floats(*args: Any, **kwargs: Any) -> Tensor:
        given = {a.name: v for a, v in zip(arguments, args, strict=False)}
        a = _Layer(**defaults | given | kwargs)
        a.read = read.scale
        return product(a)

    return product_of_floats


class _Layer(SimpleNamespace):
    """The arguments of a layer; its weight as the one int8 that is in the file, and its bias in units of the sums."""

    scale: Tensor
    bias: Tensor | None
    read: float

    def weights(self, operand: Tensor) -> Tensor:
        steps, factor = narrowed(operand.numpy())
        scale = self.scale * torch.from_numpy(factor)
        if self.bias is not None:
            unit = scale * torch.tensor(self.read, dtype=torch.float32)
            self.bias = (self.bias.double() / unit).round().to(self.bias.dtype) * unit
        return torch.from_numpy(steps).to(scale.dtype) * scale[:, None]
