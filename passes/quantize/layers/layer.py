"""What all layers have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.dtypes import FLOATS
from normfuse.ir.graph import Graph, Refuse
from normfuse.ir.views import Op, Value
from normfuse.ops._epilogue import activation

__all__ = ["Handler", "Layer", "Product", "read_node"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer and what its form in few bits needs to know.

    Attributes:
        kind: in reports.
        node: the operator in float.
        path: its module path.
        spec: the scheme of this layer.
        weight: its weight, as the operator holds it.
        bias: its bias.
        x: what it reads: activations, or indices.
        epilogue: function of its sole reader that goes into the layer.
        tail: the node whose place the quantized layer takes: that reader, or `node`.
    """

    kind: ClassVar[str]

    node: fx.Node
    path: str
    spec: Any
    weight: Constant
    bias: Constant | None
    x: fx.Node
    epilogue: str = field(default="none", kw_only=True)
    tail: fx.Node = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, outputs first, whatever its layout."""
        return tuple(self.weight.shape)

    @property
    def stored(self) -> object:
        """How the weight is read: layers that read the same one in the same way have the same codes."""
        return self.kind

    def check(self) -> None:
        """Refuse numbers that have no form in few bits."""
        val = self.node.meta.get("val")
        for what, dtype in (("its weight is", self.weight.dtype), ("it computes in", getattr(val, "dtype", self.weight.dtype))):
            if dtype not in FLOATS:  # codes, scales and sums are made in float32, whatever the float
                raise Refuse(f"{what} {str(dtype).removeprefix('torch.')}; quantized layers multiply real floats")
        if not bool(self.weight.value.isfinite().all()):
            raise Refuse("its weight holds NaN or Inf", remedy="look for the step of training at which it diverged")
        if self.weight.numel == 0:
            raise Refuse("its weight is empty")

    def laid_out(self, x: Tensor) -> Tensor:
        """What it reads, as its operator takes it."""
        return x

    def emit_laid_out(self, graph: Graph, x: fx.Node) -> fx.Node:
        """The same in the graph, in front of `tail`."""
        return x

    def undone(self, y: Tensor) -> Tensor:
        """What the operator gives, as the layer does."""
        return y

    def emit_undone(self, graph: Graph, y: fx.Node) -> fx.Node:
        """The same in the graph."""
        return y


@dataclass(frozen=True, eq=False)
class Product(Layer):
    """A layer that multiplies activations: out features are sums over `groups` groups of channels and `taps` taps.

    Attributes:
        axis: of the input channels in what the layer reads.
    """

    axis: ClassVar[int]

    @property
    def taps(self) -> int:
        """How often a channel repeats among what an output is a sum of; the channel runs fastest."""
        return 1

    @property
    def groups(self) -> int:
        """Of channels, each with weights of its own."""
        return 1

    @property
    def outputs(self) -> int:
        return self.shape[0]

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        return self.shape[1]

    @property
    @abstractmethod
    def geometry(self) -> tuple[object, ...]:
        """What else a call of a given size depends on."""

    @abstractmethod
    def matrix(self, value: Tensor | None = None) -> Tensor:
        """The weight, or another value of its shape, as (groups, out / groups, taps · channels) in float64."""

    @abstractmethod
    def scaled(self, factor: Tensor, *, outputs: bool = False) -> Constant:
        """The weight with its input channels, or its outputs, times `factor`."""

    @abstractmethod
    def reference(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer in float without bias and epilogue; `weight` is a matrix as `matrix` gives it."""

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """What each output is a product of: (groups, rows, taps · channels)."""

    @abstractmethod
    def independent(self, x: Tensor, most: int) -> tuple[Tensor, ...]:
        """x in parts that are quantized each by itself, of about `most` outputs each."""

    @abstractmethod
    def timed_on(self, sizes: list[int], most: int) -> list[int]:
        """Sizes of an input to time it on, for one that it reads; more than `most` rows change no ratio."""

    @abstractmethod
    def places(self, sizes: tuple[int, ...]) -> int:
        """Sums for each output on an input of these sizes."""

    @abstractmethod
    def product(self) -> Callable[[Tensor], Tensor]:
        """W x + b by PyTorch in float32."""

    def in_float(self) -> Callable[[Tensor], Tensor]:
        """The layer by PyTorch in float32."""
        product, epilogue = self.product(), self.epilogue
        return product if epilogue == "none" else lambda x: activation(product(x), epilogue)


@dataclass(frozen=True)
class Handler:
    """How a view becomes a layer.

    Attributes:
        kind: of the layer, in reports.
        read: (node, view, path, scheme of the layer) -> the layer; raises `Refuse` if it must stay in float.
    """

    kind: str
    read: Callable[[fx.Node, Op, str, Any], Layer]


def read_node(value: Value | Constant | float) -> fx.Node:
    """The node that a layer reads."""
    if not isinstance(value, Value) or value.node is None:
        raise Refuse("what it reads is a constant")
    return value.node
