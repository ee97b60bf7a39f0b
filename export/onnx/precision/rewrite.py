"""Casts, constants and dtypes of a graph whose plan is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from normfuse.export.onnx.build import given
from normfuse.export.onnx.precision.constants import Fit, in_range, leads_to_softmax
from normfuse.export.onnx.precision.functions import as_low
from normfuse.export.onnx.precision.islands import Plan
from normfuse.export.ops import DOMAIN
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Rewrite"]


class Rewrite:
    """Carries out a plan on a model, in place: every float32 input of a node gets the dtype that its node computes in."""

    def __init__(self, model: ir.Model, nodes: list[ir.Node], plan: Plan) -> None:
        self.ir = need("onnx_ir", extra="onnx")
        self.model, self.nodes, self.plan = model, nodes, plan
        self.full, self.low = self.ir.DataType.FLOAT, plan.low
        # values that are float32 now, and the dtype that each will have
        self.dtype: dict[ir.Value, ir.DataType] = {}
        self.casts: dict[tuple[ir.Value, ir.DataType, float | None], ir.Value] = {}
        self.constants: dict[tuple[None, ir.DataType, float | None], ir.Value] = {}
        self.graphs = [model.graph, *model.graph.subgraphs()]
        self.names = {n.name for n in nodes} | {v.name for g in self.graphs for v in (*g.inputs, *g.initializers.values())}
        self.names |= {out.name for n in nodes for out in n.outputs}

    def run(self, *, low_io: bool) -> None:
        inputs = [v for g in self.graphs for v in g.inputs if v.dtype == self.full]
        for value in inputs:
            self.dtype[value] = self.low if low_io and value.graph is self.model.graph else self.full
        for node in self.nodes:
            free = self.plan.places[node][1] if self.plan.is_low(node) else frozenset()
            for i, out in enumerate(node.outputs):
                if i in free:
                    self.dtype[out] = self.low
                elif out.dtype == self.full:
                    self.dtype[out] = self.full
        read = [(node, i, v) for node in self.nodes for i, v in enumerate(node.inputs) if v is not None]
        wanted = [(node, i, v, self._wanted(node, i)) for node, i, v in read if self._counts(v)]
        self._place_constants([w for w in wanted if w[2].is_initializer()])
        for node, i, value, dtype in wanted:
            if dtype is not None and not value.is_initializer() and self.dtype[value] != dtype:
                node.replace_input_with(i, self._cast(value, dtype, node, i))
        for graph in self.graphs:
            top = graph is self.model.graph
            for k, value in enumerate(graph.outputs):
                self._give_out(graph, k, value, self.low if low_io and top else self.full)
        for value, dtype in self.dtype.items():
            value.type = self.ir.TensorType(dtype)  # a new one: clones of a model share the old
        for node in self.nodes:
            if self.plan.is_low(node):
                self._tell(node)
        self._fold_casts()

    def _counts(self, value: ir.Value) -> bool:
        return value in self.dtype or (value.is_initializer() and value.dtype == self.full)

    def _wanted(self, node: ir.Node, place: int) -> ir.DataType | None:
        """The dtype that `node` reads there; None: any."""
        if node.op_type == "Cast" and not node.domain:
            return None
        low = self.plan.is_low(node) and place in self.plan.places[node][0]
        return self.low if low else self.full

    def _tell(self, node: ir.Node) -> None:
        """Make what a node says of its own dtype agree."""
        if node.op_type == "DequantizeLinear" and "output_dtype" in node.attributes:
            node.attributes["output_dtype"] = self.ir.AttrInt64("output_dtype", int(self.low))
        if node.domain == DOMAIN:
            as_low(self.model, node, self.plan.places[node], self.low)

    # --- constants ------------------------------------------------------------------------------------------------------

    def _place_constants(self, readers: list[tuple[ir.Node, int, ir.Value, ir.DataType | None]]) -> None:
        """Convert weights; one that is read in several dtypes becomes several, and the plain low one keeps the name."""
        needs: dict[ir.Value, dict[tuple[ir.DataType, float | None], list[tuple[ir.Node, int]]]] = {}
        for node, i, value, dtype in readers:
            fit = self.plan.fits.get((node, i), Fit())
            bound = fit.bound if dtype == self.low else None
            needs.setdefault(value, {}).setdefault((dtype or self.full, bound), []).append((node, i))
        for value, variants in needs.items():
            if value.is_graph_output():
                variants.setdefault((self.full, None), [])
            keep = (self.full, None) if value.is_graph_output() else min(variants, key=lambda v: (v[0] != self.low, v[1] or 0.0))
            graph = value.graph
            assert value.const_value is not None
            assert graph is not None
            numbers = value.const_value.numpy()
            for (dtype, bound), places in variants.items():
                if (dtype, bound) == (self.full, None) == keep:
                    continue
                holder = value
                if (dtype, bound) != keep:
                    suffix = dtype.name.lower() + ("" if bound is None else ".bounded")
                    holder = self.ir.Value(name=self._unique(f"{value.name}.{suffix}", "."), shape=value.shape)
                tensor = in_range(numbers, dtype, bound)
                tensor.name = holder.name
                holder.const_value, holder.type = tensor, self.ir.TensorType(dtype)
                if holder is not value:
                    graph.register_initializer(holder)
                    for node, i in places:
                        node.replace_input_with(i, holder)

    # --- casts ----------------------------------------------------------------------------------------------------------

    def _cast(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node | None, place: int) -> ir.Value:
        """`value` in `dtype`, cast once for all readers; what constants blew up beyond its range is cut first."""
        bound = None
        if dtype == self.low and value in self.plan.huge:
            bound = float(dtype.max)
            if reader is not None and leads_to_softmax(reader, place):
                bound /= 2  # as for constants: a mask plus a score must stay finite
        key = (value, dtype, bound)
        if key not in self.casts:
            source = value if bound is None else self._clipped(value, bound, reader)
            # a cast up belongs to the island that needs it, one down to the island that it leaves
            owner = value.producer() if dtype == self.low and value.producer() is not None else reader
            self.casts[key] = self._node("Cast", [source], value, owner, dtype, to=int(dtype))
        return self.casts[key]

    def _clipped(self, value: ir.Value, bound: float, reader: ir.Node | None) -> ir.Value:
        import numpy as np

        ends = []
        for number in (-bound, bound):
            key = (None, self.full, number)
            if key not in self.constants:
                name = self._unique(f"normfuse.bound_{len(self.constants)}", "_")
                end = self.ir.Value(name=name, const_value=self.ir.tensor(np.float32(number), name=name))
                end.dtype, end.shape = self.full, self.ir.Shape(())
                self.model.graph.register_initializer(end)
                self.constants[key] = end
            ends.append(self.constants[key])
        return self._node("Clip", [value, *ends], value, value.producer() or reader, self.full)

    def _node(
        self, op: str, inputs: list[ir.Value], value: ir.Value, owner: ir.Node | None, dtype: ir.DataType, **attributes: Any
    ) -> ir.Value:
        """A new node behind the one that makes `value`, or behind the clip of it, named after the module of `owner`."""
        node: ir.Node = self.ir.node(op, inputs, attributes, num_outputs=1)
        path = (owner.name or "").rpartition("/")[0] if owner is not None else ""
        node.name = self._unique(f"{path}/{op}", "_")
        out = node.outputs[0]
        out.name = self._unique(f"{node.name}_output_0", "_")
        out.dtype, out.shape = dtype, value.shape
        last = inputs[0].producer()
        if last is not None:
            assert last.graph is not None
            last.graph.insert_after(last, node)
            return out
        graph = value.graph
        assert graph is not None
        if len(graph):
            graph.insert_before(graph[0], node)
        else:
            graph.append(node)
        return out

    def _unique(self, name: str, joint: str) -> str:
        found, n = name, 1
        while found in self.names:
            found, n = f"{name}{joint}{n}", n + 1
        self.names.add(found)
        return found

    def _give_out(self, graph: ir.Graph, k: int, value: ir.Value, dtype: ir.DataType) -> None:
        """Make output `k` of `graph` a `dtype`; the output keeps its name, and what was called so gets that of its node."""
        if value not in self.dtype or self.dtype[value] == dtype:
            return
        node = value.producer()
        out = self._cast(value, dtype, node, 0)
        if not out.is_graph_output():
            name = value.name
            value.name = self._unique(f"{node.name}_output_{value.index()}" if node is not None else f"{name}_input", "_")
            out.name = name
        graph.outputs[k] = out

    def _fold_casts(self) -> None:
        """Cast(Cast(integers)) is one Cast; a cast that nothing reads any more goes."""
        for cast in {out.producer() for out in self.casts.values()}:
            assert cast is not None
            first = given(cast).producer()
            if first is None or first.op_type != "Cast" or first.domain:
                continue
            source = given(first)
            if source.dtype is None or source.dtype.is_floating_point():
                continue
            cast.replace_input_with(0, source)
        for node in reversed(self.nodes):
            unread = not any(out.uses() or out.is_graph_output() for out in node.outputs)
            if node.op_type == "Cast" and not node.domain and unread:
                assert node.graph is not None
                node.graph.remove(node, safe=True)
