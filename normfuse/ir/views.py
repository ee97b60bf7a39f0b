"""Typed, frozen readings of graph nodes: match on the left of a rule, build on the right.

Fields stand in the order of the operator's schema. A field annotated `Value` is a tensor of the graph, `Constant` one
that is known at compile time; everything else is a literal (or the node of a symbolic size).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.weights import Weight

__all__ = [
    "VIEWS",
    "Add",
    "Addmm",
    "Affine",
    "AvgPool",
    "BatchNorm",
    "Cat",
    "Conv",
    "ConvTranspose",
    "Div",
    "Embedding",
    "GlobalAvgPool",
    "GroupNorm",
    "Identity",
    "InstanceNorm",
    "LayerNorm",
    "LeakyRelu",
    "Linear",
    "MatMul",
    "MaxPool",
    "Mean",
    "Movement",
    "Mul",
    "Neg",
    "Op",
    "Pad",
    "Permute",
    "Pow",
    "Reciprocal",
    "Relu",
    "Reshape",
    "Resize",
    "RmsNorm",
    "Rsqrt",
    "Sdpa",
    "Softmax",
    "Sqrt",
    "Square",
    "Sub",
    "Sum",
    "Take",
    "Value",
    "affine",
    "shape_of",
]

aten = torch.ops.aten


def affine(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """y = s x + t in the dtype of x, with s and t broadcast to x: the form that every static normalization takes between passes."""
    return (x * s + t).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph; `node` is None for one that a rule has just built."""

    node: fx.Node | None = field(default=None, kw_only=True, repr=False)

    @property
    def shape(self) -> tuple[Any, ...] | None:
        """Sizes (integers, or symbols where they vary); None when the model was captured without example inputs."""
        return None if self.node is None else shape_of(self.node)

    @property
    def sole_use(self) -> bool:
        """Is there one reader at most?"""
        return self.node is None or len(self.node.users) <= 1

    @property
    def rank(self) -> int | None:
        """Number of dimensions, if known."""
        if self.node is None:
            return None
        shape = shape_of(self.node)
        return len(shape) if shape is not None else self.node.meta.get("rank")

    @property
    def weight(self) -> Weight | None:
        """Of a layer: its weight, and where that lies; None for what has none."""
        return None


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """The sizes of a node's tensor; None when they are unknown or it is not a tensor."""
    val = node.meta.get("val")
    return tuple(val.shape) if isinstance(val, Tensor) else None


@dataclass(frozen=True, eq=False)
class Op(Value):
    """A value that is understood. `target` is the operator it was decoded from, or is to be built with."""

    targets: ClassVar[tuple[Any, ...]] = ()
    target: Any = field(default=None, kw_only=True, repr=False)

    @property
    def operator(self) -> Any:
        return self.target if self.target is not None else self.targets[0]

    @property
    def unusual(self) -> str:
        """What is unlike the view's description, so that no rule may look into it; empty if nothing is."""
        return ""

    def with_weight(self, W: Constant, b: Constant | None = None) -> Op:
        """The layer with another weight, stored as its own is, and with this bias or none."""
        w = self.weight
        assert w is not None
        assert w.bias_field or b is None
        return replace(self, node=None, **{w.field: W, **({w.bias_field: b} if w.bias_field else {})})


# -- layers with weights ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Linear(Op):
    """y = W x + b over the last axis; W (out, in), b (out,)."""

    targets = (aten.linear.default,)
    x: Value
    W: Constant
    b: Constant | None = None

    @property
    def unusual(self) -> str:
        return "its weight is a vector" if self.W.ndim != 2 else _no_vector(self.b, self.W.shape[0])

    @property
    def weight(self) -> Weight:
        return Weight(self.W, "W", 0, 1, self.b, "b")


@dataclass(frozen=True, eq=False)
class Addmm(Op):
    """y = x W + b for a matrix x; W (in, out), b (out,): the layout of Hugging Face's Conv1D."""

    targets = (aten.addmm.default,)
    b: Constant
    x: Value
    W: Constant

    @property
    def unusual(self) -> str:
        return _no_vector(self.b, self.W.shape[1])

    @property
    def weight(self) -> Weight:
        return Weight(self.W, "W", 1, 0, self.b, "b")

    def with_weight(self, W: Constant, b: Constant | None = None) -> Op:
        return MatMul(self.x, W) if b is None else super().with_weight(W, b)


@dataclass(frozen=True, eq=False)
class Conv(Op):
    """Convolution in 1, 2 or 3 dimensions; W (out, in / groups, *kernel), channels on axis 1."""

    targets = (
        aten.conv2d.default, aten.conv1d.default, aten.conv3d.default,
        aten.conv2d.padding, aten.conv1d.padding, aten.conv3d.padding,
    )  # fmt: skip
    x: Value
    W: Constant
    b: Constant | None = None
    stride: Any = (1,)
    padding: Any = (0,)
    dilation: Any = (1,)
    groups: int = 1

    @property
    def padded(self) -> bool:
        """Do zeros enter the sum at the border?"""
        if self.padding == "same":
            return any(k > 1 for k in self.W.shape[2:])
        return self.padding != "valid" and any(p != 0 for p in _sequence(self.padding))

    @property
    def weight(self) -> Weight:
        why = ("a shift does not commute with zero padding", "pad before the normalization, or train with padding=0")
        return Weight(self.W, "W", 0, 1, self.b, "b", 1 - self.W.ndim, self.groups, *(why if self.padded else ()))


@dataclass(frozen=True, eq=False)
class ConvTranspose(Op):
    """Transposed convolution; W (in, out / groups, *kernel), channels on axis 1."""

    targets = (aten.conv_transpose2d.input, aten.conv_transpose1d.default, aten.conv_transpose3d.input)
    x: Value
    W: Constant
    b: Constant | None = None
    stride: Any = (1,)
    padding: Any = (0,)
    output_padding: Any = (0,)
    groups: int = 1
    dilation: Any = (1,)

    @property
    def weight(self) -> Weight:
        why = "a shift through overlapping kernels of a transposed convolution is not constant"
        return Weight(self.W, "W", 1, 0, self.b, "b", 1 - self.W.ndim, self.groups, why)


@dataclass(frozen=True, eq=False)
class Embedding(Op):
    """Row look-up; W (rows, features). `padding_idx` only matters to gradients."""

    targets = (aten.embedding.default,)
    W: Constant
    x: Value
    padding_idx: int = -1
    scale_grad: bool = False
    sparse: bool = False

    @property
    def weight(self) -> Weight:
        return Weight(self.W, "W", 1, None)


# -- normalizations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BatchNorm(Op):
    """γ (x − μ) / √(σ² + ε) + β over axis 1."""

    targets = (aten.batch_norm.default,)
    x: Value
    gamma: Constant | None
    beta: Constant | None
    mean: Constant | None
    var: Constant | None
    training: bool
    momentum: float
    eps: float
    cudnn: bool


@dataclass(frozen=True, eq=False)
class InstanceNorm(Op):
    """Instance normalization; with `use_input_stats` off it is BatchNorm with running statistics."""

    targets = (aten.instance_norm.default,)
    x: Value
    gamma: Constant | None
    beta: Constant | None
    mean: Constant | None
    var: Constant | None
    use_input_stats: bool
    momentum: float
    eps: float
    cudnn: bool


@dataclass(frozen=True, eq=False)
class LayerNorm(Op):
    """γ (x − mean) / √(var + ε) + β over the trailing axes `normalized`."""

    targets = (aten.layer_norm.default,)
    x: Value
    normalized: Any
    gamma: Constant | None = None
    beta: Constant | None = None
    eps: float = 1e-5
    cudnn: bool = True


@dataclass(frozen=True, eq=False)
class RmsNorm(Op):
    """γ x / √(mean x² + ε) over the trailing axes `normalized`; ε = None means what `default_eps` says of the dtype."""

    targets = (aten.rms_norm.default,)
    x: Value
    normalized: Any
    gamma: Constant | None = None
    eps: float | None = None


@dataclass(frozen=True, eq=False)
class GroupNorm(Op):
    """Normalization over groups of channels (axis 1) and all further axes."""

    targets = (aten.group_norm.default,)
    x: Value
    groups: int
    gamma: Constant | None = None
    beta: Constant | None = None
    eps: float = 1e-5
    cudnn: bool = True


# -- arithmetic ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Affine(Op):
    """s x + t; s and t have the rank of x and broadcast to it. Lives between the passes `expose` and `realise`."""

    targets = (affine,)
    x: Value
    s: Constant
    t: Constant

    @property
    def shape(self) -> tuple[Any, ...] | None:
        return self.x.shape if self.node is None else shape_of(self.node)

    @property
    def rank(self) -> int | None:
        return self.x.rank if self.node is None else Value.rank.fget(self)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Add(Op):
    """x + y, broadcast."""

    targets = (aten.add.Tensor,)
    x: Value | Constant | float
    y: Value | Constant | float


@dataclass(frozen=True, eq=False)
class Sub(Op):
    """x - y, broadcast."""

    targets = (aten.sub.Tensor,)
    x: Value | Constant | float
    y: Value | Constant | float


@dataclass(frozen=True, eq=False)
class Mul(Op):
    """x y, element by element, broadcast."""

    targets = (aten.mul.Tensor,)
    x: Value | Constant | float
    y: Value | Constant | float


@dataclass(frozen=True, eq=False)
class Div(Op):
    """x / y, broadcast."""

    targets = (aten.div.Tensor,)
    x: Value | Constant | float
    y: Value | Constant | float


@dataclass(frozen=True, eq=False)
class Neg(Op):
    """-x."""

    targets = (aten.neg.default,)
    x: Value


@dataclass(frozen=True, eq=False)
class Pow(Op):
    """x to a power that is a literal."""

    targets = (aten.pow.Tensor_Scalar,)
    x: Value
    exponent: float


@dataclass(frozen=True, eq=False)
class Square(Op):
    """x²."""

    targets = (aten.square.default,)
    x: Value


@dataclass(frozen=True, eq=False)
class Sqrt(Op):
    """√x."""

    targets = (aten.sqrt.default,)
    x: Value


@dataclass(frozen=True, eq=False)
class Rsqrt(Op):
    """1 / √x."""

    targets = (aten.rsqrt.default,)
    x: Value


@dataclass(frozen=True, eq=False)
class Reciprocal(Op):
    """1 / x."""

    targets = (aten.reciprocal.default,)
    x: Value


@dataclass(frozen=True, eq=False)
class MatMul(Op):
    """x y over the last axis of x and the last but one of y; y a matrix or more, and x too unless y is a matrix of weights."""

    targets = (aten.matmul.default, aten.bmm.default, aten.mm.default)
    x: Value | Constant
    y: Value | Constant

    @property
    def unusual(self) -> str:
        x, y = (v.ndim if isinstance(v, Constant) else v.rank for v in (self.x, self.y))
        if self.operator is not aten.matmul.default or (isinstance(self.y, Constant) and y == 2):
            return ""
        if x is None or y is None:
            return "the shapes of its operands are unknown"
        return "it multiplies by a vector" if min(x, y) < 2 else ""

    @property
    def weight(self) -> Weight | None:
        of_weights = isinstance(self.x, Value) and isinstance(self.y, Constant) and self.y.ndim == 2
        return Weight(self.y, "y", 1, 0) if of_weights else None  # type: ignore[arg-type]

    def with_weight(self, W: Constant, b: Constant | None = None) -> Op:
        assert isinstance(self.x, Value)
        return super().with_weight(W) if b is None else Linear(self.x, W.T, b)


@dataclass(frozen=True, eq=False)
class Softmax(Op):
    """exp(x) over its sum along `dim`."""

    targets = (aten.softmax.int, aten._softmax.default)
    x: Value
    dim: int
    dtype: Any = None


@dataclass(frozen=True, eq=False)
class Sdpa(Op):
    """softmax(q kᵀ · scale + mask) v."""

    targets = (aten.scaled_dot_product_attention.default,)
    q: Value
    k: Value
    v: Value
    mask: Value | Constant | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    gqa: bool = False


# -- elementwise functions and pools ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Relu(Op):
    """max(x, 0)."""

    targets = (aten.relu.default,)
    x: Value


@dataclass(frozen=True, eq=False)
class LeakyRelu(Op):
    """x where it is positive, elsewhere `slope` x."""

    targets = (aten.leaky_relu.default,)
    x: Value
    slope: float = 0.01


@dataclass(frozen=True, eq=False)
class MaxPool(Op):
    """The largest of each window; sizes as PyTorch takes them."""

    targets = (aten.max_pool2d.default, aten.max_pool1d.default, aten.max_pool3d.default)
    x: Value
    kernel: Any
    stride: Any = ()
    padding: Any = (0,)
    dilation: Any = (1,)
    ceil_mode: bool = False


@dataclass(frozen=True, eq=False)
class AvgPool(Op):
    """The sum of each window over a divisor: the window's size, unless `divisor` says another."""

    targets = (aten.avg_pool2d.default, aten.avg_pool1d.default, aten.avg_pool3d.default)
    x: Value
    kernel: Any
    stride: Any = ()
    padding: Any = (0,)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None

    @property
    def mean(self) -> bool:
        """Is every output a mean of inputs (no border zeros are counted, no divisor is forced)?"""
        bordered = any(p != 0 for p in _sequence(self.padding)) and self.count_include_pad
        return not bordered and self.divisor is None


@dataclass(frozen=True, eq=False)
class GlobalAvgPool(Op):
    """Means over windows that the output's `size` fixes."""

    targets = (aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool3d.default)
    x: Value
    size: Any


@dataclass(frozen=True, eq=False)
class Resize(Op):
    """Interpolation of any kind over the axes behind the channels: outputs are means of inputs, whose weights sum to one."""

    x: Value
    rest: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Mean(Op):
    """The mean over the axes `dim`."""

    targets = (aten.mean.dim,)
    x: Value
    dim: Any
    keepdim: bool = False
    dtype: Any = None


@dataclass(frozen=True, eq=False)
class Sum(Op):
    """The sum over the axes `dim`."""

    targets = (aten.sum.dim_IntList,)
    x: Value
    dim: Any
    keepdim: bool = False
    dtype: Any = None


# -- movement: every output element is an input element ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Identity(Op):
    """The same values: dropout in eval, copies, aliases."""

    targets = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
    x: Value
    memory_format: Any = None


@dataclass(frozen=True, eq=False)
class Permute(Op):
    """y[i...] = x[permuted]: axis k of y is axis dims[k] of x."""

    x: Value | Constant
    dims: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Reshape(Op):
    """The same elements in the same order under another shape (the shapes are read off the nodes)."""

    x: Value | Constant
    rest: tuple[Any, ...] = ()


@dataclass(frozen=True, eq=False)
class Movement(Op):
    """Any other operator whose output elements are elements of x: slices, rolls, expansions, one piece of a split.

    `piece` is the index into the result if the operator gives several tensors, else None.
    """

    x: Value | Constant
    rest: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    piece: int | None = None


@dataclass(frozen=True, eq=False)
class Take(Op):
    """Rows of x at places that are known at run time (an index, a gather): axes that are not `mixed` stay as they are.

    Attributes:
        mixed: axes of x, counted from the end, from which elements are taken.
    """

    x: Value
    mixed: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Cat(Op):
    """The operands behind each other along `dim`."""

    targets = (aten.cat.default,)
    xs: Sequence[Value | Constant]
    dim: int = 0


@dataclass(frozen=True, eq=False)
class Pad(Op):
    """Padding with a constant; `pad` counts from the last axis backwards, two numbers an axis."""

    targets = (aten.constant_pad_nd.default,)
    x: Value
    pad: Any
    value: float = 0.0


def _no_vector(b: Constant | None, size: int) -> str:
    return "" if b is None or b.shape == (size,) else f"its bias has the shape {tuple(b.shape)}"


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


VIEWS: dict[Any, type[Op]] = {target: view for view in Op.__subclasses__() for target in view.targets}
