"""Which calls of `torch.ops.normfuse` a program has, and what each is in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from normfuse.errors import ExportError
from normfuse.export.ops import OP_OF, Op
from normfuse.export.ops.emitter import Marker
from normfuse.ir.decode import arguments
from normfuse.ir.graph import path_of
from normfuse.ops import OPERATORS

__all__ = ["Layer", "facts_of_call", "quantized_layers"]


@dataclass(frozen=True)
class Layer:
    """One call of an operator of `torch.ops.normfuse`.

    Attributes:
        operator: its name in `torch.ops.normfuse`.
        op: what it is in a file.
        facts: attributes of `op`, and its `structure`.
        layer: where in the module tree it stands.
    """

    operator: str
    op: Op
    facts: dict[str, Any]
    layer: str

    @property
    def static(self) -> bool:
        """Activations have a scale that is fixed."""
        return bool(self.facts.get("input_scale"))

    @property
    def has_weight(self) -> bool:
        """A linear or a convolution that reads floats."""
        return self.op.name in ("ShiftQuantLinear", "ShiftQuantConv2d")


def facts_of_call(op: Op, call: Marker, tensors: Mapping[str, object]) -> dict[str, Any]:
    """Attributes and structure of `op` by what a call of it was given; `tensors` are the arguments that may be tensors."""

    def fact(name: str) -> Any:
        if name in op.facts:
            return op.facts[name](call)
        if name not in tensors:
            return call.attributes[name]
        if tensors[name] is None:
            return 0.0
        found = call.array(name)
        if found.size != 1:
            raise ExportError(f"{name} of {op.name} is not one number")
        return float(found.reshape(-1)[0])

    return {name: fact(name) for name in op.attributes} | {name: of(call) for name, of in op.structure.items()}


def quantized_layers(program: ExportedProgram) -> list[Layer]:
    """Every call of an operator that an op of a file stands for, in order."""
    held = {**program.constants, **program.state_dict}
    names = {s.arg.name: s.target for s in program.graph_signature.input_specs}
    found: list[Layer] = []
    for node in program.graph.nodes:
        name = _name(node)
        if name in OP_OF:
            call = _Call(node, arguments(node), {n: held.get(t or "") for n, t in names.items()})
            given = {n: call.given[n] for n in OPERATORS[name].tensors}
            found.append(Layer(name, OP_OF[name], facts_of_call(OP_OF[name], call, given), path_of(node)))
    return found


def _name(node: fx.Node) -> str:
    """Of an operator in `torch.ops.normfuse`; empty for any other node."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    space, _, name = node.target._schema.name.partition("::")
    return name if space == "normfuse" else ""


@dataclass(frozen=True)
class _Call:
    """A call in a graph as `normfuse.export.ops` reads it."""

    node: fx.Node
    given: dict[str, Any]
    constants: dict[str, Any]

    @property
    def attributes(self) -> dict[str, Any]:
        return {name: value for name, value in self.given.items() if not isinstance(value, fx.Node)}

    def has(self, name: str) -> bool:
        return self.given[name] is not None

    def array(self, name: str) -> np.ndarray[Any, Any]:
        node = self.given[name]
        tensor = self.constants.get(node.name) if isinstance(node, fx.Node) else None
        if not isinstance(tensor, Tensor):
            raise ExportError(f"{path_of(self.node)}: {name} of {self.node.target} is no constant; quantized weights must be")
        return np.asarray(tensor.detach().numpy())

    def size(self, name: str, axis: int) -> int:
        found = self.given[name].meta["val"].shape[axis]
        if not isinstance(found, int):
            raise ExportError(f"{path_of(self.node)}: the size of axis {axis} of {name} of {self.node.target} is not known")
        return found
