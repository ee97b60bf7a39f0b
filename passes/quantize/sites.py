"""Layers that can be quantized, as the pass finds them in a graph, and why others cannot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.dtypes import FLOATS
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.views import Conv, Embedding, MatMul, Value
from normfuse.ir.weights import Weight
from normfuse.quant.spec import ShiftQuant

__all__ = ["RULE", "Layer", "by_input", "find_layers", "reread"]

RULE = "shiftquant"

aten = torch.ops.aten

_WEIGHTED = {  # operators with weights for which there is no integer form, or whose weight has turned out not to be constant
    aten.linear.default, aten.addmm.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding,
    aten.conv2d.padding, aten.conv3d.padding, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    aten.conv_transpose3d.input, aten.embedding.default, aten.embedding_bag.default, aten.embedding_bag.padding_idx,
    aten.bilinear.default, aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input, aten.lstm_cell.default,
    aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default,
}  # fmt: skip
_PRODUCTS = {
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default, aten._grouped_mm.default,
}  # fmt: skip
"""Products of what they are given: layers only where one factor is a weight."""
_FEWEST = 4  # input channels a group of a convolution: the integer kernels sum four products at a time


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer and what its integer form needs to know.

    Attributes:
        node: the operator in float.
        kind: `linear`, `conv2d` or `embedding`.
        path: its module path.
        spec: the specification of this layer.
        weight: its weight, as the operator holds it.
        bias: its bias.
        x: what it reads: activations, or indices of an embedding.
        rows: the weight as (out, in) matrices, a group of a convolution each; in = kh · kw · channels, channel fastest.
        taps: kernel positions of a convolution, 1 for others: channels repeat that often along `in`.
        epilogue: function of its sole reader that goes into the layer.
        tail: the node whose place the quantized layer takes: that reader, or `node`.
        kernel, stride, padding, dilation: of a convolution, two numbers each.
        groups: of a convolution.
        unit_axis: a convolution in one dimension: it gets a unit axis in front of its last one.
        more: rows of zeros below and columns of zeros to the right, beyond the padding.
        transposed: the weight is stored as (in, out).
    """

    node: fx.Node
    kind: str
    path: str
    spec: ShiftQuant
    weight: Constant
    bias: Constant | None
    x: fx.Node
    taps: int = 1
    epilogue: str = "none"
    tail: fx.Node = dataclasses.field(default=None)  # type: ignore[assignment]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    unit_axis: bool = False
    more: tuple[int, int] = (0, 0)
    transposed: bool = False

    @property
    def axis(self) -> int:
        """Of the input channels in what the layer reads."""
        return -1 if self.kind == "linear" else 1

    @property
    def outputs(self) -> int:
        return self.weight.shape[1] if self.transposed else self.weight.shape[0]

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        return self.weight.shape[0] if self.transposed else self.weight.shape[1]

    def matrix(self, value: Tensor | None = None) -> Tensor:
        """The weight, or another value of its shape, as (groups, out / groups, taps · channels) in float64."""
        w = self.weight.value if value is None else value
        if self.transposed:
            w = w.T
        if self.kind == "conv2d":
            w = (w.unsqueeze(2) if self.unit_axis else w).permute(0, 2, 3, 1)
        return w.reshape(self.groups, self.outputs // self.groups, -1).double()

    def laid_out(self, x: Tensor) -> Tensor:
        """What a convolution reads as images, with the zeros that its padding does not make."""
        x = x.unsqueeze(2) if self.unit_axis else x
        return torch.nn.functional.pad(x, (0, self.more[1], 0, self.more[0])) if any(self.more) else x

    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer in float without bias and epilogue; `weight` is a matrix as `matrix` gives it."""
        weight = weight.to(x.dtype)
        if self.kind == "linear":
            return torch.nn.functional.linear(x, weight[0])
        w = weight.reshape(self.outputs, *self.kernel, self.channels).permute(0, 3, 1, 2)
        y = torch.nn.functional.conv2d(self.laid_out(x), w, None, self.stride, self.padding, self.dilation, self.groups)
        return y.squeeze(2) if self.unit_axis else y

    def rows(self, x: Tensor) -> Tensor:
        """What each output is a product of: (conv groups, rows, taps · channels)."""
        if self.kind == "linear":
            return x.reshape(1, -1, x.shape[-1])
        x = self.laid_out(x)
        cut = torch.nn.functional.unfold(
            x, self.kernel, self.dilation, self.padding, self.stride
        )  # (batch, channels · taps, places)
        cut = cut.reshape(x.shape[0], self.groups, self.channels, self.taps, -1).permute(1, 0, 4, 3, 2)
        return cut.reshape(self.groups, -1, self.taps * self.channels)


def find_layers(graph: Graph, spec: ShiftQuant) -> tuple[list[Layer], list[tuple[fx.Node, str, Refuse]]]:
    """The layers in execution order, and the nodes with weights that stay in float: (node, kind, why)."""
    found: list[Layer] = []
    refused: list[tuple[fx.Node, str, Refuse]] = []
    for node in graph:
        op = graph.view(node, 2)
        weighted = node.target in _WEIGHTED or (_may_multiply(node) and _has_weight(graph, node, op))
        if not (node.op == "call_function" and (weighted or op.weight is not None)):
            continue
        path = graph.path(node)
        kind = _kind(op)
        try:
            layer = _layer(node, op, path, spec.at(path))
            if (pattern := spec.kept(path)) is not None:
                raise Refuse(f"kept in float by keep={pattern!r}")
        except Refuse as refusal:
            refused.append((node, kind, refusal))
            continue
        found.append(_with_epilogue(graph, layer))
    return found, refused


def _kind(op: Any) -> str:
    return "conv2d" if isinstance(op, Conv) else "embedding" if isinstance(op, Embedding) else "linear"


def _may_multiply(node: fx.Node) -> bool:
    """By a weight: an operator of a library other than PyTorch does whatever it likes (experts, deformable convolutions)."""
    foreign = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims", "normfuse")
    return foreign or node.target in _PRODUCTS


def _has_weight(graph: Graph, node: fx.Node, op: Value) -> bool:
    """Is a matrix among its factors, or several? A constant vector, as the frequencies of rotary positions, is none."""
    if isinstance(op, MatMul):
        if isinstance(op.y, Constant) and op.y.ndim == 2:
            return True
        held = [c for c in (op.x, op.y) if isinstance(c, Constant)]
    else:
        added = node.args[0] if node.target is aten.baddbmm.default else None
        held = [c for n in node.all_input_nodes if n is not added and (c := graph.constant(n)) is not None]
    return any(c.ndim >= 2 and min(c.shape[-2:]) > 1 and c.dtype.is_floating_point for c in held)


def _layer(node: fx.Node, op: Value, path: str, spec: ShiftQuant) -> Layer:
    """The layer.

    Raises:
        Refuse: it must stay in float.
    """
    match op:
        case Value(weight=Weight(linear=True) as w, x=Value() as x):  # type: ignore[misc]
            layer = Layer(node, "linear", path, spec, w.value, w.bias, _node(x), tail=node, transposed=w.out == 1)
        case MatMul(x=Constant()):
            raise Refuse("its weight is the left factor of the product", remedy="write it as x @ W, or as nn.Linear")
        case MatMul():
            raise Refuse("its weight has more than two dimensions", remedy="write it as one nn.Linear for each matrix")
        case Conv():
            layer = _convolution(node, op, path, spec)
        case Embedding(W=W):
            layer = Layer(node, "embedding", path, spec, W, None, _node(op.x), tail=node)
            if spec.embedding_bits is None:
                raise Refuse("kept in float by embedding_bits=None")
        case _:
            raise Refuse(_opaque(node))
    _check_numbers(layer)
    return layer


def _opaque(node: fx.Node) -> str:
    op: Any = node.target
    name = op._schema.name.removeprefix("aten::")
    if name in ("linear", "addmm", "conv1d", "conv2d", "embedding"):
        return "its weight is computed when the model runs"
    return f"there is no integer form of {name}"


def _node(value: Value | Constant | float) -> fx.Node:
    if not isinstance(value, Value) or value.node is None:
        raise Refuse("what it reads is a constant")
    return value.node


def _check_numbers(layer: Layer) -> None:
    val = layer.node.meta.get("val")
    for what, dtype in (("its weight is", layer.weight.dtype), ("it computes in", getattr(val, "dtype", layer.weight.dtype))):
        if dtype not in FLOATS:  # codes, scales and sums are made in float32, whatever the float
            raise Refuse(f"{what} {str(dtype).removeprefix('torch.')}; quantized layers multiply real floats")
    if not bool(layer.weight.value.isfinite().all()):
        raise Refuse("its weight holds NaN or Inf", remedy="look for the step of training at which it diverged")
    if layer.weight.numel == 0:
        raise Refuse("its weight is empty")


def _convolution(node: fx.Node, op: Conv, path: str, spec: ShiftQuant) -> Layer:
    dims = op.W.ndim - 2
    if dims not in (1, 2):
        raise Refuse(f"there is no integer form of a convolution in {dims} dimensions")
    if op.W.shape[1] < _FEWEST and op.groups > 1:
        raise Refuse(f"{op.W.shape[1]} input channels a group are too few for integers to gain anything")
    if op.x.rank is not None and op.x.rank != dims + 2:
        raise Refuse(
            "it reads one image without a batch axis", remedy="unsqueeze the image: integers are scaled by image of a batch"
        )
    kernel = tuple(op.W.shape[2:])
    dilation, stride = _pair(op.dilation, dims), _pair(op.stride, dims)
    more = (0, 0)
    if op.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation[-dims:], kernel, strict=True)]
        padding = _pair([t // 2 for t in total], dims, 0)
        more = _pair([t % 2 for t in total], dims, 0)
    else:
        padding = _pair(0 if op.padding == "valid" else op.padding, dims, 0)
    return Layer(
        node, "conv2d", path, spec, op.W, op.b, _node(op.x), taps=math.prod(kernel), tail=node, kernel=_pair(kernel, dims),
        stride=stride, padding=padding, dilation=dilation, groups=op.groups, unit_axis=dims == 1, more=more,
    )  # fmt: skip


def _pair(value: Any, dims: int, unit: int = 1) -> tuple[int, int]:
    """Two numbers for the axes (height, width); one dimension is a width."""
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    given = given * dims if len(given) == 1 else given
    first, second = given if dims == 2 else (unit, given[0])
    return int(first), int(second)


def _with_epilogue(graph: Graph, layer: Layer) -> Layer:
    """act(layer(x)) is one operator where nobody else reads layer(x)."""
    users = list(layer.node.users)
    if layer.kind == "embedding" or len(users) != 1:
        return layer
    (user,) = users
    name = _activation(user)
    return layer if name is None else dataclasses.replace(layer, epilogue=name, tail=user)


def _activation(node: fx.Node) -> str | None:
    if node.target is aten.relu.default:
        return "relu"
    if node.target is aten.silu.default:
        return "silu"
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    return None


def reread(graph: Graph, layer: Layer) -> Layer:
    """The layer with the weight and the bias that its node has now."""
    w = graph.view(layer.node, 2).weight
    return layer if w is None else dataclasses.replace(layer, weight=w.value, bias=w.bias)


def by_input(layers: Sequence[Layer]) -> Iterator[tuple[tuple[fx.Node, int], list[Layer]]]:
    """Layers that read the same channels of the same value."""
    groups: dict[tuple[fx.Node, int], list[Layer]] = {}
    for layer in layers:
        if layer.kind != "embedding":
            groups.setdefault((layer.x, layer.axis), []).append(layer)
    yield from groups.items()
