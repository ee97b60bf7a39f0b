"""Convolutions in two dimensions; those in one get a unit axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.views import Conv, Op
from normfuse.passes.quantize.layers.layer import Handler, Product, read_node

__all__ = ["CONV2D", "Conv2d", "Geometry", "read_conv2d"]

aten = torch.ops.aten

_FEWEST = 4  # input channels a group: the integer kernels sum four products at a time


@dataclass(frozen=True)
class Geometry:
    """Where a convolution reads, two numbers each.

    Attributes:
        kernel, stride, padding, dilation: of the axes (height, width).
        groups: of channels.
        more: rows of zeros below and columns of zeros to the right, beyond the padding.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    more: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Conv2d(Product):
    """y = W * x + b.

    Attributes:
        at: where it reads.
        unit_axis: it is one in one dimension, and gets a unit axis in front of its last one.
    """

    kind = "conv2d"
    axis = 1
    at: Geometry
    unit_axis: bool

    @property
    def taps(self) -> int:
        return math.prod(self.at.kernel)

    @property
    def groups(self) -> int:
        return self.at.groups

    @property
    def geometry(self) -> tuple[object, ...]:
        at = self.at
        return at.kernel, at.stride, at.padding, at.dilation, at.groups, at.more

    def matrix(self, value: Tensor | None = None) -> Tensor:
        w = self.weight.value if value is None else value
        w = (w.unsqueeze(2) if self.unit_axis else w).permute(0, 2, 3, 1)
        return w.reshape(self.groups, self.outputs // self.groups, -1).double()

    def scaled(self, factor: Tensor, *, outputs: bool = False) -> Constant:
        return self.weight * factor.reshape([-1 if i == (0 if outputs else 1) else 1 for i in range(self.weight.ndim)])

    def laid_out(self, x: Tensor) -> Tensor:
        """As images, with the zeros that the padding does not make."""
        x = x.unsqueeze(2) if self.unit_axis else x
        return F.pad(x, (0, self.at.more[1], 0, self.at.more[0])) if any(self.at.more) else x

    def emit_laid_out(self, graph: Graph, x: fx.Node) -> fx.Node:
        if self.unit_axis:
            x = graph.call(aten.unsqueeze.default, (x, 2), self.tail, self.node)
        if any(self.at.more):
            below, right = self.at.more
            x = graph.call(aten.constant_pad_nd.default, (x, [0, right, 0, below], 0.0), self.tail, self.node)
        return x

    def undone(self, y: Tensor) -> Tensor:
        return y.squeeze(2) if self.unit_axis else y

    def emit_undone(self, graph: Graph, y: fx.Node) -> fx.Node:
        return graph.call(aten.squeeze.dim, (y, 2), self.tail, self.node) if self.unit_axis else y

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        w = weight.to(x.dtype).reshape(self.outputs, *self.at.kernel, self.channels).permute(0, 3, 1, 2)
        return self.undone(self._convolved(self.laid_out(x), w, None))

    def rows(self, x: Tensor) -> Tensor:
        x, at = self.laid_out(x), self.at
        cut = F.unfold(x, at.kernel, at.dilation, at.padding, at.stride)  # (batch, channels · taps, places)
        cut = cut.reshape(x.shape[0], self.groups, self.channels, self.taps, -1).permute(1, 0, 4, 3, 2)
        return cut.reshape(self.groups, -1, self.taps * self.channels)

    def independent(self, x: Tensor, most: int) -> tuple[Tensor, ...]:
        return (x,)

    def timed_on(self, sizes: list[int], most: int) -> list[int]:
        return sizes

    def places(self, sizes: tuple[int, ...]) -> int:
        lengths = ([1] if self.unit_axis else []) + list(sizes[2:])
        at, count = self.at, sizes[0]
        for n, k, s, p, d, more in zip(lengths, at.kernel, at.stride, at.padding, at.dilation, at.more, strict=True):
            count *= (n + 2 * p + more - d * (k - 1) - 1) // s + 1
        return count

    def product(self) -> Callable[[Tensor], Tensor]:
        weight = self.weight.value.float().contiguous()
        weight = weight.unsqueeze(2) if self.unit_axis else weight
        bias = None if self.bias is None else self.bias.value.float()
        return lambda x: self._convolved(self.laid_out(x), weight, bias)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.at.stride, self.at.padding, self.at.dilation, self.at.groups)


def _conv2d(node: fx.Node, op: Op, path: str, spec: Any) -> Conv2d:
    assert isinstance(op, Conv)
    if op.W.ndim in (3, 4) and op.W.shape[1] < _FEWEST and op.groups > 1:
        raise Refuse(f"{op.W.shape[1]} input channels a group are too few for integers to gain anything")
    return read_conv2d(node, op, path, spec)


def read_conv2d(node: fx.Node, op: Conv, path: str, spec: Any) -> Conv2d:
    """The layer, however few channels a group has.

    Raises:
        Refuse: it is none that can be quantized.
    """
    dims = op.W.ndim - 2
    if dims not in (1, 2):
        raise Refuse(f"there is no integer form of a convolution in {dims} dimensions")
    if op.x.rank is not None and op.x.rank != dims + 2:
        raise Refuse(
            "it reads one image without a batch axis", remedy="unsqueeze the image: integers are scaled by image of a batch"
        )
    return Conv2d(node, path, spec, op.W, op.b, read_node(op.x), _geometry(op, dims), dims == 1, tail=node)


def _geometry(op: Conv, dims: int) -> Geometry:
    kernel = tuple(op.W.shape[2:])
    dilation, stride = _pair(op.dilation, dims), _pair(op.stride, dims)
    more = (0, 0)
    if op.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation[-dims:], kernel, strict=True)]
        padding = _pair([t // 2 for t in total], dims, 0)
        more = _pair([t % 2 for t in total], dims, 0)
    else:
        padding = _pair(0 if op.padding == "valid" else op.padding, dims, 0)
    return Geometry(_pair(kernel, dims), stride, padding, dilation, op.groups, more)


def _pair(value: Any, dims: int, unit: int = 1) -> tuple[int, int]:
    """Two numbers for the axes (height, width); one dimension is a width."""
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    given = given * dims if len(given) == 1 else given
    first, second = given if dims == 2 else (unit, given[0])
    return int(first), int(second)


CONV2D = Handler(Conv2d.kind, _conv2d)
