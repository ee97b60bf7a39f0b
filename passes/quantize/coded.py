"""A layer in few bits, whatever the format: what reports, measurements and the graph ask of it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.passes.quantize.layers.layer import Layer, Product

__all__ = ["Coded", "CodedProduct", "Shared"]

#: Constants that were emitted before, by the identity of their codes: a shared weight is stored once.
Shared = dict[int, dict[str, Constant]]

P = TypeVar("P", bound="CodedProduct")


@dataclass(frozen=True, eq=False)
class Coded(ABC):
    """A layer and its codes.

    Attributes:
        layer: the layer in float.
        bits: of its weight.
        activation_bits: of what it multiplies; None for a table.
        activations: how their scales are found; empty for a table.
        channels_by_exponent: input channels with exponent 0, 1, …; empty where there are none.
        block: neighbouring input channels of an output that share a multiplier; 0 where there are none.
    """

    activation_bits: ClassVar[int | None] = None
    activations: ClassVar[str] = ""
    channels_by_exponent: ClassVar[tuple[int, ...]] = ()
    block: ClassVar[int] = 0

    layer: Layer
    bits: int

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Of all constants."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """What the layer gives for x."""

    @abstractmethod
    def emit(self, graph: Graph, shared: Shared, emitted: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Put it into the graph, in the place of the layer and its epilogue; returns the node.

        Args:
            graph: the graph.
            shared: constants emitted before.
            emitted: what stands in the place of nodes that this layer may read.
        """


@dataclass(frozen=True, eq=False)
class CodedProduct(Coded):
    """A product in few bits.

    Attributes:
        bias: float32 [out], corrected or not; None for none.
        input_scale: static scale of what the layer reads; None for one scale a row.
    """

    layer: Product
    bias: Tensor | None
    input_scale: Tensor | None

    @property
    @abstractmethod
    def activation_bits(self) -> int:  # type: ignore[override]
        """Of what it multiplies."""

    def with_bias(self: P, bias: Tensor | None) -> P:
        """The same with another bias."""
        return dataclasses.replace(self, bias=bias)

    @abstractmethod
    def __call__(self, x: Tensor, *, bare: bool = False) -> Tensor:
        """What the layer gives for x; `bare` without bias and epilogue."""
