"""Where the standard ops of a definition go: into a graph, or into the body of a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from normfuse.extras import need

__all__ = ["DOMAIN", "Emitter", "FunctionBody", "Marker", "Op", "Reference", "number"]

#: Domain of normfuse's own ops.
DOMAIN = "normfuse"


@dataclass(frozen=True)
class Reference:
    """An attribute of the node that calls a function: as an input a constant of its value, as an attribute the attribute itself."""

    name: str
    kind: str


class Marker(Protocol):
    """What stands in a translated graph for a call of an operator of `torch.ops.normfuse`."""

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Its arguments that are no tensors."""

    def has(self, name: str) -> bool:
        """Was a tensor given?"""

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor as numbers.

        Raises:
            ExportError: it is computed when the model runs.
        """

    def size(self, name: str, axis: int) -> int:
        """Of a tensor.

        Raises:
            ExportError: it is not known.
        """


class Emitter(Protocol):
    """Adds nodes. `normfuse.export.onnx.build.Build` is one for graphs."""

    @property
    def opset(self) -> int:
        """Of the standard ops that may be used."""

    def op(self, op_type: str, *inputs: Any, dtype: Any = None, **attributes: Any) -> Any:
        """One node of the standard; its only output."""

    def const(self, array: Any) -> Any:
        """A constant."""

    def known(self, value: Any) -> np.ndarray[Any, Any] | None:
        """The numbers of `value` if they are there when the file is written."""


def number(at: Emitter, fact: Any) -> Any:
    """An INT or INTS among the facts as a value, int64."""
    return fact if isinstance(fact, Reference) else at.const(np.asarray(fact, np.int64))


@dataclass(frozen=True)
class Op:
    """An op of the domain `normfuse`: its signature, which the native kernels have too, and what it means.

    A call of an operator is read by name: an input or attribute of the op is the argument that bears its name, and an attribute of
    type FLOAT that is a tensor there its one constant number, 0 for None.

    Attributes:
        name: op type.
        stands_for: the operators of `torch.ops.normfuse` that it is in a file.
        inputs: names of the inputs; a `?` behind one: it may be missing.
        outputs: names of the outputs; a `?` behind one: it may be missing.
        attributes: name of each attribute and its type: "INT", "FLOAT", "STRING" or "INTS".
        expand: (emitter, inputs, facts) -> outputs, in standard ops. Facts are the attributes, a FLOAT as a value of the graph or
            None where it is 0, and `structure`.
        facts: attributes that no argument bears the name of, and how they follow from a call.
        structure: what the expansion depends on and no attribute tells, e.g. the number of groups, and how it follows from a call.
        words: facts -> what sets one body apart from the other bodies of the op, besides its optional inputs and outputs.
        derived: what else the expansion depends on, and how it follows from the facts.
        told: the attributes that `words` tells, and so are built into a body; a body reads all others from its node (`Reference`).
    """

    name: str
    stands_for: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, str]
    expand: Callable[[Emitter, tuple[Any, ...], Mapping[str, Any]], tuple[Any, ...]]
    facts: Mapping[str, Callable[[Marker], Any]] = field(default_factory=dict)
    structure: Mapping[str, Callable[[Marker], int]] = field(default_factory=dict)
    words: Callable[[Mapping[str, Any]], Sequence[str]] = lambda facts: ()
    told: tuple[str, ...] = ()
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)

    def complete(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """`facts` with what follows from them."""
        return {**facts, **{name: found(facts) for name, found in self.derived.items()}}

    def variant(self, facts: Mapping[str, Any], present: tuple[bool, ...], count: int) -> str:
        """Words for each body: what is built into it, and its optional inputs and outputs.

        Args:
            facts: attributes and structure.
            present: which inputs are there.
            count: number of outputs.
        """
        there = [name for name, given in zip(self.inputs, present, strict=True) if given]
        optional = (name[:-1] for name in (*there, *self.outputs[:count]) if name.endswith("?"))
        return "_".join([*(word for word in self.words(self.complete(facts)) if word), *optional]) or "plain"


class FunctionBody:
    """Collects the nodes of a function."""

    def __init__(self, op: Op, present: tuple[bool, ...], opset: int) -> None:
        self.ir = need("onnx_ir", extra="onnx")
        self.of = op
        self.opset = opset
        values = [self.ir.Value(name=name.removesuffix("?")) for name in op.inputs]
        self.inputs = tuple(v if there else None for v, there in zip(values, present, strict=True))
        # a node names its inputs up to the last one that is there: a function has as many
        count = max((i + 1 for i, there in enumerate(present) if there), default=0)
        self.graph = self.ir.Graph(values[:count], [], nodes=[], opset_imports={"": opset}, name=op.name)
        self.shared: dict[Any, Any] = {}

    def op(self, op_type: str, *inputs: Any, dtype: Any = None, **attributes: Any) -> Any:
        values = [self.attribute(v) if isinstance(v, Reference) else v for v in inputs]
        types = self.ir.AttributeType
        referenced = {k: v for k, v in attributes.items() if isinstance(v, Reference)}
        node = self.ir.node(op_type, values, {k: v for k, v in attributes.items() if k not in referenced}, num_outputs=1)
        for name, reference in referenced.items():
            node.attributes[name] = self.ir.RefAttr(name, reference.name, types[reference.kind])
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

    def attribute(self, given: Reference) -> Any:
        """The value of an attribute of the node that calls the function."""
        if given not in self.shared:
            reference = self.ir.RefAttr(_VALUES[given.kind], given.name, self.ir.AttributeType[given.kind])
            node = self.ir.Node("", "Constant", [], [reference], num_outputs=1)
            self.graph.append(node)
            node.outputs[0].name = f"{given.name}_"
            self.shared[given] = node.outputs[0]
        return self.shared[given]

    def function(self, variant: str, facts: Mapping[str, Any], count: int) -> Any:
        """The finished `onnx_ir.Function`, with the first `count` outputs."""
        types, op = self.ir.AttributeType, self.of
        given = {k: v if k in op.structure or k in op.told else Reference(k, op.attributes[k]) for k, v in facts.items()}
        # a FLOAT that is told is 0, and there is none, or read from the node
        given |= {k: Reference(k, "FLOAT") if facts[k] else None for k in op.told if op.attributes[k] == "FLOAT"}
        given |= {name: found(facts) for name, found in op.derived.items()}
        for value in op.expand(self, self.inputs, given)[:count]:
            self.graph.outputs.append(value)
        attributes = [self.ir.Attr(name, types[kind], None) for name, kind in op.attributes.items()]
        return self.ir.Function(DOMAIN, op.name, variant, graph=self.graph, attributes=attributes)


_VALUES = {"FLOAT": "value_float", "INT": "value_int", "INTS": "value_ints"}
