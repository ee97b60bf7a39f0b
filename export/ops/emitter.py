"""Where the standard ops of a definition go: into a graph, or into the body of a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from normfuse.extras import need

__all__ = ["DOMAIN", "Emitter", "FunctionBody", "Op"]

#: Domain of normfuse's own ops.
DOMAIN = "normfuse"


class Emitter(Protocol):
    """Adds nodes. `normfuse.export.onnx.build.Build` is one for graphs."""

    def op(self, op_type: str, *inputs: Any, dtype: Any = None, **attributes: Any) -> Any:
        """One node of the standard; its only output."""

    def const(self, array: Any) -> Any:
        """A constant."""

    def known(self, value: Any) -> np.ndarray[Any, Any] | None:
        """The numbers of `value` if they are there when the file is written."""


@dataclass(frozen=True)
class Op:
    """An op of the domain `normfuse`: its signature, which the native kernels have too, and what it means.

    Attributes:
        name: op type.
        inputs: names of the inputs; a `?` behind one: it may be missing.
        outputs: names of the outputs.
        attributes: name of each attribute and its type: "INT", "FLOAT", "STRING" or "INTS".
        expand: (emitter, inputs, facts) -> outputs, in standard ops. Facts are the attributes, a FLOAT as a value of the graph or
            None where it is 0, and `structure`.
        structure: what the expansion depends on and no attribute tells, e.g. the number of groups: {name: number}.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, str]
    expand: Callable[[Emitter, tuple[Any, ...], Mapping[str, Any]], tuple[Any, ...]]
    structure: tuple[str, ...] = ()

    def overload(self, facts: Mapping[str, Any], present: tuple[bool, ...], count: int) -> str:
        """One name for each body: what is built into it, which optional inputs it has, and its outputs but the first."""
        parts = [f"{k}{facts[k]}" if not isinstance(facts[k], str) else facts[k] for k in self.structure]
        for name, kind in self.attributes.items():
            value = facts[name]
            if kind == "FLOAT":
                parts += [name] if value else []
            elif isinstance(value, (list, tuple)):
                parts.append(f"{name}{'x'.join(map(str, value))}")
            else:
                parts.append(value if isinstance(value, str) else f"{name}{value}")
        parts += [name[:-1] for name, there in zip(self.inputs, present, strict=True) if there and name.endswith("?")]
        return "_".join([*parts, *self.outputs[1:count]])


class FunctionBody:
    """Collects the nodes of a function."""

    def __init__(self, op: Op, present: tuple[bool, ...], opset: int) -> None:
        self.ir = need("onnx_ir", extra="onnx")
        self.of = op
        values = [self.ir.Value(name=name.removesuffix("?")) for name in op.inputs]
        self.inputs = tuple(v if there else None for v, there in zip(values, present, strict=True))
        # a node names its inputs up to the last one that is there: a function has as many
        count = max((i + 1 for i, there in enumerate(present) if there), default=0)
        self.graph = self.ir.Graph(values[:count], [], nodes=[], opset_imports={"": opset}, name=op.name)
        self.shared: dict[Any, Any] = {}

    def op(self, op_type: str, *inputs: Any, dtype: Any = None, **attributes: Any) -> Any:
        node = self.ir.node(op_type, list(inputs), attributes, num_outputs=1)
        self.graph.append(node)
        node.outputs[0].name = f"v{len(self.graph)}"
        return node.outputs[0]

    def const(self, array: Any) -> Any:
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.shared:
            self.shared[key] = self.op("Constant", value=self.ir.tensor(array))
        return self.shared[key]

    def known(self, value: Any) -> None:
        return None

    def attribute(self, name: str) -> Any:
        """The FLOAT attribute `name` of the node that calls the function."""
        reference = self.ir.RefAttr("value_float", name, self.ir.AttributeType.FLOAT)
        node = self.ir.Node("", "Constant", [], [reference], num_outputs=1)
        self.graph.append(node)
        node.outputs[0].name = name
        return node.outputs[0]

    def function(self, overload: str, facts: Mapping[str, Any], count: int) -> Any:
        """The finished `onnx_ir.Function`, with the first `count` outputs."""
        types = self.ir.AttributeType
        given = {k: (self.attribute(k) if v else None) if self.of.attributes.get(k) == "FLOAT" else v for k, v in facts.items()}
        for value in self.of.expand(self, self.inputs, given)[:count]:
            self.graph.outputs.append(value)
        attributes = [self.ir.Attr(name, types[kind], None) for name, kind in self.of.attributes.items()]
        return self.ir.Function(DOMAIN, self.of.name, overload, graph=self.graph, attributes=attributes)
