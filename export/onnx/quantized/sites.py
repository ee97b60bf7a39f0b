"""What stands in a translated graph for operators of `torch.ops.normfuse`, and which op of `normfuse.export.ops` each is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from normfuse.errors import ExportError
from normfuse.export.onnx.build import const_of, dims
from normfuse.export.onnx.writer.translate import MARKER_DOMAIN
from normfuse.export.ops import OP_OF, Op
from normfuse.ops import OPERATORS

__all__ = ["Site", "sites"]


@dataclass(frozen=True)
class Site:
    """One node.

    Attributes:
        node: the marker.
        op: what it is.
        inputs: in the order of `op.inputs`, None where one is missing.
        facts: attributes of `op`, and its `structure`.
    """

    node: Any
    op: Op
    inputs: tuple[Any, ...]
    facts: dict[str, Any]

    @property
    def layer(self) -> str:
        """Where in the module tree it stands; the name of the node if that is not known."""
        names = ast.literal_eval(self.node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        return next((n for n in reversed(names[:-1]) if n), None) or self.node.name or self.op.name

    @property
    def static(self) -> bool:
        """Activations have a scale that is fixed."""
        return bool(self.facts.get("input_scale"))

    @property
    def count(self) -> int:
        """Outputs that mean something: without a residual the sum of `NormQuantize` is empty in torch."""
        return 2 if self.op.name == "NormQuantize" and self.input("residual") is None else len(self.node.outputs)

    @property
    def has_weight(self) -> bool:
        """A linear or a convolution that reads floats."""
        return self.op.name in ("ShiftQuantLinear", "ShiftQuantConv2d")

    def input(self, name: str) -> Any:
        """The input of that name."""
        names = [n.removesuffix("?") for n in self.op.inputs]
        return self.inputs[names.index(name)]

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """The input of that name as numbers.

        Raises:
            ExportError: it is computed when the model runs.
        """
        found = const_of(self.input(name))
        if found is None:
            raise ExportError(f"{self.layer}: {name} of {self.op.name} is no constant; quantized weights must be")
        return np.asarray(found)


def sites(model: Any) -> Iterator[Site]:
    """Every marker of the graph, in its order; nodes may be added and removed between two of them."""
    for node in list(model.graph):
        if node.domain == MARKER_DOMAIN and node.op_type in OP_OF:
            yield _read(node)


@dataclass(frozen=True)
class _Call:
    """A marker as `normfuse.export.ops` reads it."""

    node: Any
    tensors: dict[str, Any]
    attributes: dict[str, Any]

    def array(self, name: str) -> np.ndarray[Any, Any]:
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

    def number(self, name: str) -> float:
        """A tensor of one constant number; 0 for None."""
        if self.tensors[name] is None:
            return 0.0
        found = self.array(name)
        if found.size != 1:
            raise ExportError(f"{self.node.name}: {name} of {self.node.op_type} is not one number")
        return float(found.reshape(-1)[0])


def _read(node: Any) -> Site:
    op, names = OP_OF[node.op_type], OPERATORS[node.op_type].tensors
    tensors = dict(zip(names, (*node.inputs, *[None] * len(names)), strict=False))
    call = _Call(
        node, tensors, {k: list(a.value) if isinstance(a.value, (list, tuple)) else a.value for k, a in node.attributes.items()}
    )
    inputs = [name.removesuffix("?") for name in op.inputs]
    for name, value in tensors.items():
        if value is not None and name not in inputs and name not in op.attributes:
            raise ExportError(f"{node.op_type} with a {name} has no form in ONNX")
    facts = {name: _fact(op, call, name) for name in op.attributes} | {name: of(call) for name, of in op.structure.items()}
    return Site(node, op, tuple(map(tensors.get, inputs)), facts)


def _fact(op: Op, call: _Call, name: str) -> Any:
    if name in op.facts:
        return op.facts[name](call)
    return call.number(name) if name in call.tensors else call.attributes[name]
