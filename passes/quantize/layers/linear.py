"""Products with a matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Refuse
from normfuse.ir.views import MatMul, Op
from normfuse.passes.quantize.layers.layer import Handler, Product, read_node

__all__ = ["LINEAR", "MATMUL", "Linear"]


@dataclass(frozen=True, eq=False)
class Linear(Product):
    """y = W x + b over the last axis.

    Attributes:
        transposed: the weight is stored as (in, out).
    """

    kind = "linear"
    axis = -1
    transposed: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        stored = tuple(self.weight.shape)
        return stored[::-1] if self.transposed else stored

    @property
    def stored(self) -> object:
        return self.kind, self.transposed

    @property
    def geometry(self) -> tuple[object, ...]:
        return ()

    def matrix(self, value: Tensor | None = None) -> Tensor:
        w = self.weight.value if value is None else value
        return (w.T if self.transposed else w).reshape(1, self.outputs, -1).double()

    def scaled(self, factor: Tensor, *, outputs: bool = False) -> Constant:
        return self.weight * factor.reshape([-1, 1] if outputs is not self.transposed else [1, -1])

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight[0].to(x.dtype))

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1, x.shape[-1])

    def independent(self, x: Tensor, most: int) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = x.reshape(-1, x.shape[-1]).split(max(1, most // self.outputs))
        return parts

    def timed_on(self, sizes: list[int], most: int) -> list[int]:
        return [min(math.prod(sizes[:-1]), most), sizes[-1]]

    def places(self, sizes: tuple[int, ...]) -> int:
        return math.prod(sizes) // self.channels

    def product(self) -> Callable[[Tensor], Tensor]:
        weight = self.weight.value.float()
        weight = (weight.T if self.transposed else weight).contiguous()
        bias = None if self.bias is None else self.bias.value.float()
        return lambda x: F.linear(x, weight, bias)


def _linear(node: fx.Node, op: Op, path: str, spec: Any) -> Linear:
    w = op.weight
    if w is None or not w.linear:
        raise Refuse("its weight is no matrix")
    return Linear(node, path, spec, w.value, w.bias, read_node(op.x), tail=node, transposed=w.out == 1)  # type: ignore[attr-defined]


def _matmul(node: fx.Node, op: Op, path: str, spec: Any) -> Linear:
    assert isinstance(op, MatMul)
    if isinstance(op.x, Constant):
        raise Refuse("its weight is the left factor of the product", remedy="write it as x @ W, or as nn.Linear")
    if op.weight is None:
        raise Refuse("its weight has more than two dimensions", remedy="write it as one nn.Linear for each matrix")
    return _linear(node, op, path, spec)


LINEAR, MATMUL = Handler(Linear.kind, _linear), Handler(Linear.kind, _matmul)
