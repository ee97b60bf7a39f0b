"""Which nodes of a float32 graph have to stay in float32 when the others become half.

Islands are found by structure: a cast to float32 that the author wrote leaves no trace in a program that is float32 anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from normfuse.export.onnx.build import given
from normfuse.export.onnx.precision.constants import Fit, Range, fit_of, range_of
from normfuse.export.onnx.precision.ops import (
    CHEAP,
    ISLANDS,
    MOVES,
    PRODUCTS,
    REDUCTIONS,
    ROOTS,
    TRIGONOMETRIC,
    WIDENING,
    flexible,
)
from normfuse.export.ops import DOMAIN
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Plan", "plan"]


class Origin(IntEnum):
    """What a value was made of, at most: constants, integers (positions, masks, sizes), activations."""

    CONSTANT = 0
    INTEGER = 1
    ACTIVATION = 2


@dataclass
class Plan:
    """What every node computes in.

    Attributes:
        high: nodes that stay in float32.
        places: by node, the inputs and the outputs whose dtype is free.
        fits: how a reader (node, place) takes the constant there.
        huge: values that may hold numbers beyond the range of half because constants of the model do.
        notes: what the user should know.
    """

    low: ir.DataType
    high: set[ir.Node] = field(default_factory=set)
    places: dict[ir.Node, tuple[frozenset[int], frozenset[int]]] = field(default_factory=dict)
    fits: dict[tuple[ir.Node, int], Fit] = field(default_factory=dict)
    huge: set[ir.Value] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def is_low(self, node: ir.Node) -> bool:
        return node in self.places and node not in self.high


def plan(model: ir.Model, nodes: list[ir.Node], low: ir.DataType, *, own_in_fp32: bool = False) -> Plan:
    """Decide for `nodes`, in topological order, those of subgraphs before the node that they belong to; `own_in_fp32` keeps the ops
    of normfuse in float32."""
    return _Planner(model, nodes, low, own_in_fp32).run()


class _Planner:
    def __init__(self, model: ir.Model, nodes: list[ir.Node], low: ir.DataType, own_in_fp32: bool) -> None:
        self.ir = need("onnx_ir", extra="onnx")
        self.nodes = nodes
        self.inputs = set(model.graph.inputs)
        opset = model.graph.opset_imports[""]
        self.made = Plan(low)
        for node in nodes:
            places = flexible(node, opset, low)
            if (places[0] or places[1]) and not (own_in_fp32 and node.domain == DOMAIN):
                self.made.places[node] = places
        self.origin: dict[ir.Value, Origin] = {}
        #: statistics: few numbers each of which stands for many
        self.stat: set[ir.Value] = set()
        #: numbers that half cannot hold: powers, exponentials, sums with a tiny eps
        self.wide: set[ir.Value] = set()
        self.ranges: dict[ir.Value, Range] = {}

    def run(self) -> Plan:
        for node in self.nodes:
            self._originate(node)
        for node in self.nodes:
            if node.op_type in TRIGONOMETRIC and node in self.made.places:
                self._pull_arguments(node)
        for node in self.nodes:
            if node.op_type in PRODUCTS and node not in self.made.high:
                # a product of integers that is no table of positions: an image of bytes, one-hot tokens
                self._originate(node, at_least=Origin.ACTIVATION)
            else:
                self._originate(node)
            self._decide(node)
        changed = True
        while changed:
            found = [n for n in reversed(self.nodes) if self.made.is_low(n) and (self._between(n) or self._feeds_sum(n))]
            self.made.high.update(found)
            changed = bool(found)
        self._note()
        return self.made

    # --- where values come from -----------------------------------------------------------------------------------------

    def _of(self, value: ir.Value) -> Origin:
        if value in self.origin:
            return self.origin[value]
        if value.is_initializer():
            return Origin.CONSTANT
        # graph inputs: integers are positions, tokens and masks; those of a loop body may be anything
        return Origin.INTEGER if value in self.inputs and not self._is_float(value) else Origin.ACTIVATION

    def _is_float(self, value: ir.Value) -> bool:
        return value.dtype is None or value.dtype.is_floating_point()

    def _originate(self, node: ir.Node, at_least: Origin = Origin.CONSTANT) -> None:
        origin = max([at_least, *(self._of(v) for v in node.inputs if v is not None)])
        if node.op_type in ("Shape", "Size") and not node.domain:
            origin = Origin.INTEGER
        elif node.op_type == "Gather" and self._of(given(node)) == Origin.CONSTANT and self._is_float(given(node)):
            origin = Origin.ACTIVATION  # an embedding
        elif node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "If", "Loop", "Scan"):
            origin = Origin.ACTIVATION
        for out in node.outputs:
            self.origin[out] = origin

    def _pull_arguments(self, node: ir.Node) -> None:
        """Keep in float32 what an angle is computed from, back to integers, a graph input, a product or an activation."""
        todo = [node]
        while todo:
            at = todo.pop()
            if at in self.made.high:
                continue
            self.made.high.add(at)
            for v in self._floats(at):
                before = v.producer()
                if before is None or before not in self.made.places:
                    continue
                integer = self._of(v) <= Origin.INTEGER
                scaling = before.op_type in ("Mul", "Div", "Neg", "Mod") or len(self._floats(before)) == 1
                if before.op_type in MOVES or (
                    before.op_type in CHEAP | PRODUCTS if integer else scaling and before.op_type in _LINEAR
                ):
                    todo.append(before)

    # --- forward --------------------------------------------------------------------------------------------------------

    def _floats(self, node: ir.Node) -> list[ir.Value]:
        """Computed float inputs whose dtype is free."""
        read = [v for i, v in enumerate(node.inputs) if i in self.made.places[node][0] and v is not None]
        return [v for v in read if not v.is_initializer()]

    def _decide(self, node: ir.Node) -> None:
        op, made = node.op_type, self.made
        if node not in made.places:
            self._decide_fixed(node)
            return
        refused = self._refusals(node)
        floats, inputs = self._floats(node), [v for v in node.inputs if v is not None]
        stats = [v for v in floats if v in self.stat]
        wide = [v for v in floats if v in self.wide]
        integers = bool(floats) and all(self._of(v) <= Origin.INTEGER for v in inputs) and self._of_floats(floats) == Origin.INTEGER
        square = op == "Mul" and inputs[0] is inputs[1]
        seeds = op in REDUCTIONS or op in WIDENING or op in ROOTS or op in TRIGONOMETRIC or op in ISLANDS or square
        passes = op in CHEAP or op in MOVES
        if passes and op not in _MIXED:
            follows = bool(stats or wide or integers)
        else:  # a concatenation is float32 if all of its parts are
            follows = passes and bool(floats) and (len({*stats, *wide}) == len({*floats}) or integers)
        if refused or (node.domain != DOMAIN and (seeds or follows)):
            made.high.add(node)
        if node not in made.high:
            return
        ordinary = [v for v in floats if v not in self.stat and v not in self.wide]
        if op in REDUCTIONS or (stats and (passes or seeds) and len(stats) == len(floats)):
            self.stat.update(node.outputs)
        elif op in WIDENING or square or (refused and passes) or (wide and passes and self._stays_wide(node, bool(ordinary))):
            self.wide.update(node.outputs)
        spreads = op in _SPREADING or op in MOVES
        if "overflow" in refused or (spreads and any(v in made.huge for v in inputs)):
            made.huge.update(node.outputs)

    def _of_floats(self, floats: list[ir.Value]) -> Origin:
        return max(self._of(v) for v in floats)

    def _stays_wide(self, node: ir.Node, ordinary: bool) -> bool:
        op = node.op_type
        if op in ("Add", "Sub", "Sum", "Mean"):
            return not ordinary
        if op == "Div":
            return node.inputs[1] not in self.wide and node.inputs[1] not in self.stat
        return op in _SPREADING or op in MOVES

    def _decide_fixed(self, node: ir.Node) -> None:
        """Float32 that comes out of ops with a dtype of their own."""
        ir, made = self.ir, self.made
        if node.op_type == "Cast" and not node.domain:
            from_accumulator = given(node).dtype in (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT32)
            if self._of(node.outputs[0]) == Origin.ACTIVATION and from_accumulator:
                self.wide.update(node.outputs)
        elif node.op_type == "DynamicQuantizeLinear":
            self.stat.update(node.outputs)
        elif node.op_type == "ConstantOfShape" and "value" in node.attributes:
            number = float(node.attributes["value"].value.numpy().reshape(-1)[0])
            if abs(number) != float("inf") and abs(number) > float(made.low.max):
                made.huge.update(node.outputs)

    def _refusals(self, node: ir.Node) -> list[str]:
        """Why constants that `node` reads do not go into half."""
        found = []
        for i in self.made.places[node][0]:
            value = given(node, i)
            if not value.is_initializer():
                if node.op_type in ("QuantizeLinear", "DequantizeLinear") and i == 1:
                    found.append("underflow")  # a computed scale
                continue
            if value not in self.ranges:
                self.ranges[value] = range_of(value, self.made.low)
            fit = fit_of(node, i, self.ranges[value], self.made.low)
            self.made.fits[node, i] = fit
            if fit.refused:
                found.append(fit.refused)
        return found

    # --- backward -------------------------------------------------------------------------------------------------------

    def _readers(self, node: ir.Node) -> list[ir.Node] | None:
        """Nodes that read the floats of `node`; None where the graph itself does."""
        outs = [node.outputs[i] for i in self.made.places[node][1]]
        if not outs or any(out.is_graph_output() for out in outs):
            return None
        return [user for out in outs for user, _ in out.uses()]

    def _between(self, node: ir.Node) -> bool:
        """A cheap node that reads float32 and whose readers all do: two casts for nothing."""
        if (node.op_type not in CHEAP and node.op_type not in MOVES) or not self._readers(node):
            return False
        above = any(v.producer() in self.made.high for v in self._floats(node))
        return above and all(user in self.made.high for user in self._readers(node) or ())

    def _feeds_sum(self, node: ir.Node) -> bool:
        """Arithmetic of which nothing but a sum, a power, an exponential or a logarithm is left: its roundings would add up."""
        readers = self._readers(node)
        if not readers or node.op_type not in ("Sub", "Mul", "Div", "Neg", "Add"):
            return False
        if node.op_type == "Add" and not any(v is not None and v.is_initializer() for v in node.inputs):
            return False  # the sum of a residual
        gated = any(maker is not None and maker.op_type in _GATES for maker in (v.producer() for v in self._floats(node)))
        adds_up = {"CumSum", "Exp", "Log", "Pow", "ReduceL2", "ReduceLogSumExp", "ReduceSum", "ReduceSumSquare"}
        if node.op_type != "Add":
            adds_up |= {"ReduceMean"}
        return not gated and all(
            user in self.made.high and (user.op_type in adds_up or (user.op_type == "Mul" and user.inputs[0] is user.inputs[1]))
            for user in readers
        )

    def _note(self) -> None:
        """Say which weights stay in float32."""
        why = {"overflow": "numbers beyond its range", "underflow": "only numbers that it rounds away"}
        seen = set()
        for (node, i), fit in self.made.fits.items():
            value = given(node, i)
            if fit.refused is None or self.ranges[value].size == 1 or value in seen:
                continue
            seen.add(value)
            place = (node.name or "").rsplit("/", 1)[0].strip("/").replace("/", ".") or "the model itself"
            self.made.notes.append(
                f"{value.name} (read by {node.op_type} in {place}) stays in float32: it has {why[fit.refused]}"
                f" for {self.made.low.name.lower()}"
            )


_MIXED = frozenset({"Concat", "ScatterElements", "ScatterND", "Where", "Max", "Min"})
_LINEAR = frozenset({"Add", "Div", "Mod", "Mul", "Neg", "Sub"})
_SPREADING = frozenset({"Abs", "Add", "Clip", "Div", "Max", "Mean", "Min", "Mul", "Neg", "Relu", "Sub", "Sum", "Where"})
_GATES = frozenset({"Erf", "HardSigmoid", "HardSwish", "Sigmoid", "Softmax", "Tanh"})
