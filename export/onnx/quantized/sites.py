"""What stands in a translated graph for operators of `torch.ops.normfuse`, and which op of `normfuse.export.ops` each is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from normfuse.errors import ExportError
from normfuse.export.lowering.layers import Layer, facts_of_call
from normfuse.export.onnx.build import Numbers, const_of, dims, module_of
from normfuse.export.onnx.writer.translate import MARKER_DOMAIN
from normfuse.export.ops import OP_OF
from normfuse.export.ops.weights import Packed
from normfuse.ops import OPERATORS

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Site", "sites"]


@dataclass(frozen=True)
class Site(Layer):
    """One node.

    Attributes:
        node: the marker.
        inputs: in the order of `op.inputs`, None where one is missing.
    """

    node: ir.Node
    inputs: tuple[ir.Value | None, ...]

    @property
    def count(self) -> int:
        """Outputs that mean something: without a residual the sum of `NormQuantize` is empty in torch."""
        return 2 if self.op.name == "NormQuantize" and self.input("residual") is None else len(self.node.outputs)

    @property
    def has_residual(self) -> bool:
        """Something is added behind the activation."""
        return "residual?" in self.op.inputs and self.input("residual") is not None

    @property
    def x(self) -> ir.Value:
        """The first input, which is always there."""
        first = self.inputs[0]
        assert first is not None
        return first

    def dtype(self, i: int = 0) -> ir.DataType:
        """Of output `i`: torch says it of every call."""
        found = self.node.outputs[i].dtype
        assert found is not None
        return found

    def input(self, name: str) -> ir.Value | None:
        """The input of that name."""
        names = [n.removesuffix("?") for n in self.op.inputs]
        return self.inputs[names.index(name)]

    @property
    def packed(self) -> Packed:
        """The weight of a linear layer as numbers.

        Raises:
            ExportError: a part of it is computed when the model runs.
        """
        weight, exponents, scale = (self.array(name) for name in ("weight", "exponents", "scale"))
        return Packed(weight, exponents, scale, None if self.input("multipliers") is None else self.array("multipliers"))

    def array(self, name: str) -> Numbers:
        """The input of that name as numbers.

        Raises:
            ExportError: it is computed when the model runs.
        """
        found = const_of(self.input(name))
        if found is None:
            raise ExportError(f"{self.layer}: {name} of {self.op.name} is no constant; quantized weights must be")
        return np.asarray(found)


def sites(model: ir.Model) -> Iterator[Site]:
    """Every marker of the graph, in its order; nodes may be added and removed between two of them."""
    for node in list(model.graph):
        if node.domain == MARKER_DOMAIN and node.op_type in OP_OF:
            yield _read(node)


@dataclass(frozen=True)
class _Call:
    """A marker as `normfuse.export.ops` reads it."""

    node: ir.Node
    tensors: dict[str, ir.Value | None]
    attributes: dict[str, Any]

    def has(self, name: str) -> bool:
        return self.tensors[name] is not None

    def array(self, name: str) -> Numbers:
        found = const_of(self.tensors[name])
        if found is None:
            raise ExportError(f"{self.node.name}: {name} of {self.node.op_type} is no constant; quantized weights must be")
        return np.asarray(found)

    def size(self, name: str, axis: int) -> int:
        shape = dims(self.tensors[name])
        found = None if shape is None else shape[axis]
        if not isinstance(found, int):
            raise ExportError(f"{self.node.name}: the size of axis {axis} of {name} of {self.node.op_type} is not known")
        return found


def _read(node: ir.Node) -> Site:
    op, names = OP_OF[node.op_type], OPERATORS[node.op_type].tensors
    tensors = dict(zip(names, (*node.inputs, *[None] * len(names)), strict=False))
    call = _Call(
        node, tensors, {k: list(a.value) if isinstance(a.value, (list, tuple)) else a.value for k, a in node.attributes.items()}
    )
    inputs = [name.removesuffix("?") for name in op.inputs]
    for name, value in tensors.items():
        if value is not None and name not in inputs and name not in op.attributes:
            raise ExportError(f"{node.op_type} with a {name} has no form in ONNX")
    facts = facts_of_call(op, call, tensors)
    return Site(node.op_type, op, facts, module_of(node), node, tuple(map(tensors.get, inputs)))
