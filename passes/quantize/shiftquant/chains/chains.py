"""Chains into the graph: ranges from the calibration data, weights as integers, and each step in the place of its operators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Rewriting, Samples
from normfuse.numerics.evaluate import evaluate
from normfuse.passes.quantize.layers.conv2d import Conv2d
from normfuse.passes.quantize.shiftquant.chains.errors import mean_errors
from normfuse.passes.quantize.shiftquant.chains.find import Chain, find_chains
from normfuse.passes.quantize.shiftquant.chains.functions import KERNELS, values
from normfuse.passes.quantize.shiftquant.chains.ranges import Extent, Range, common, extents, merged, range_of, single
from normfuse.passes.quantize.shiftquant.chains.steps import Conv, Step
from normfuse.passes.quantize.shiftquant.chains.weights import CodedConv, Integers, floats, integers
from normfuse.passes.quantize.speed import Speed, Timer, compared
from normfuse.passes.quantize.statistics import Statistics, collect, second_moments
from normfuse.passes.quantize.summary import PACKED
from normfuse.quant.spec import ShiftQuant
from normfuse.reports.model import LayerQuantization, Site

__all__ = ["RULE", "into_chains"]

RULE = "codes"

ops = torch.ops.normfuse
aten = torch.ops.aten

_WIDEST = 4608  # inputs, as of `_Quantizing`
_ROWS_AN_INPUT = 2


def into_chains(work: Rewriting, spec: ShiftQuant, timer: Timer | None = None) -> list[str]:
    """Put the chains of the graph into codes, and say what became of each convolution.

    With prefer="speed" a chain that makes the model slower on this machine stays out.

    Returns:
        The module paths of the convolutions that are now in codes.
    """
    found = find_chains(work.graph, spec)
    for node, refusal in found.refused:
        work.refuse(RULE, node, refusal)
    done: list[str] = []
    seen: set[str] = set()
    while chains := [c for c in found.chains if c.path not in seen]:  # the nodes of others may be new ones by now
        seen.add(chains[0].path)
        done += _into_codes(work, spec, chains[0], timer)
        found = find_chains(work.graph, spec)
    return done


def _into_codes(work: Rewriting, spec: ShiftQuant, chain: Chain, timer: Timer | None) -> list[str]:
    """One chain; the paths of its convolutions, or none."""
    graph, first = work.graph, chain.convolutions[0]
    planned = work.found(RULE, first.node, partial(_Plan, graph, work.run.samples, spec, chain))
    if planned is None or not work.permits(RULE, first.node):
        return []
    count, paths, site = len(chain.convolutions), [step.path for step in chain.convolutions], graph.site(RULE, first.node)
    before, entries = graph.copy(), [planned.entry(step) for step in chain.convolutions]
    note = f"{count} convolutions hand on codes, from {first.path} to {chain.ends[-1].path}"
    planned.emit()
    graph.clean()
    speed = _speed(chain, before, graph, work.run.samples, timer) if spec.prefer == "speed" else None
    if speed is not None and speed.slower:
        graph.become(before)
        reason = f"measured the model {speed.ratio:.2f} times as fast as in float on this machine with these {count} convolutions"
        work.refused.append(Site(RULE, site.path, reason, "", "prefer='size' puts them into codes all the same"))
        return []
    if speed is not None and speed.decided:
        note += f"; the model measured {speed.ratio:.2f} times as fast as in float"
    work.applied.append(Site(RULE, site.path, note))
    work.quantization += entries
    return paths


def _speed(chain: Chain, before: Graph, after: Graph, samples: Samples, timer: Timer | None) -> Speed | None:
    """Of the model with the chain, on the first batch."""
    values = samples[0]
    layers = [(s.layer.shape, s.layer.geometry, s.function is not None, s.residual is not None) for s in chain.convolutions]
    sizes = [tuple(v.shape) for v in values if isinstance(v, Tensor)]
    integers, floats = (partial(evaluate, graph, values, exact=False) for graph in (after, before))
    return compared(("chain", sizes, len(chain.steps), layers), integers, floats, timer)


class _Plan:
    """One chain: what a code is worth everywhere, the weights, and the nodes."""

    def __init__(self, graph: Graph, samples: Samples, spec: ShiftQuant, chain: Chain) -> None:
        self.graph, self.samples, self.spec, self.chain = graph, samples, spec, chain
        self.written: dict[fx.Node, fx.Node] = {}
        watched = list(dict.fromkeys([*self._carried(), *(self._before(s) for s in chain.steps if s.function)]))
        found = extents(graph, samples, watched)
        self.roots = common([s.alike for s in chain.steps], self._carried())
        whole = merged(found, self.roots)
        self.ranges = {root: range_of(extent, spec, spec.activation_bits) for root, extent in whole.items()}
        self.inner = {s: self._inner(s, found[self._before(s)]) for s in chain.steps if s.function and not self._kernel(s)}
        self.weights = self._integers()
        corrected = {s.layer: (w, self.range(s.layer.x)) for s, w in self.weights.items() if s.layer.spec.bias_correction}
        self.errors = mean_errors(graph, samples, corrected)
        self.convs = {step: self._coded(step) for step in chain.convolutions}

    def _carried(self) -> list[fx.Node]:
        """Every value that there are codes of."""
        read = [n for s in self.chain.steps for n in s.reads]
        return list(dict.fromkeys([*read, *(s.tail for s in self.chain.steps if s.writes)]))

    @staticmethod
    def _before(step: Step) -> fx.Node:
        """The value that the table of a step reads."""
        return step.taken[-2]

    # -- numbers -----------------------------------------------------------------------------------------------------------

    def range(self, node: fx.Node) -> Range:
        return self.ranges[self.roots[node]]

    def _inner(self, step: Step, extent: Extent) -> Range:
        """Of what a table reads: without the ends at which its function hardly changes."""
        assert step.function is not None
        x = torch.linspace(extent.low, extent.high, 4097, dtype=torch.float64)
        y = values(step.function, x)
        slack = 0.25 * self.range(step.tail).scale
        first = int(((y - y[0]).abs() > slack).int().argmax()) - 1
        last = len(x) - int(((y - y[-1]).abs() > slack).flip(0).int().argmax())
        low, high = float(x[max(first, 0)]), float(x[min(last, len(x) - 1)])
        return range_of(Extent(low, high, extent.counts), ShiftQuant(), 8)

    def _integers(self) -> dict[Conv, Integers]:
        graph, samples, layers = self.graph, self.samples, [s.layer for s in self.chain.convolutions]
        statistics = collect(graph, samples, layers, False)
        moments = second_moments(graph, samples, [s for s in layers if self._rounded_by_moments(s, statistics)])
        return {
            step: integers(step.layer, statistics.get((step.layer.x, step.layer.axis)), moments.get(step.layer))
            for step in self.chain.convolutions
        }

    @staticmethod
    def _rounded_by_moments(layer: Conv2d, statistics: Mapping[tuple[fx.Node, int], Statistics]) -> bool:
        found = statistics.get((layer.x, layer.axis))
        if layer.channels == 1 and layer.groups > 1:
            return False
        if layer.spec.rounding != "auto":
            return bool(layer.spec.rounding == "gptq")
        inputs = layer.taps * layer.channels
        return found is not None and inputs <= _WIDEST and found.count >= _ROWS_AN_INPUT * inputs

    def _coded(self, step: Conv) -> CodedConv:
        writes, kernel = self.range(step.tail), self._kernel(step)
        computed = Range(1.0, 0, writes.top) if kernel else self.inner.get(step, writes)
        residual = None if step.residual is None else self.range(step.residual)
        bias = None if step.layer.bias is None else step.layer.bias.value.double()
        if (error := self.errors.get(step.layer)) is not None:
            bias = error if bias is None else bias + error.to(bias.device)
        scale, offset, by = floats(self.weights[step], bias, self.range(step.layer.x), computed, residual)
        folder = step.layer.weight.name.rpartition(".")[0] or "quantized"
        if kernel:
            behind = (kernel, single(1 / writes.scale), float(writes.zero))
            return CodedConv(folder, self.weights[step], scale, offset, None, (0, writes.top), by, *behind)
        table = self._table(step) if step.function else None
        return CodedConv(folder, self.weights[step], scale, offset, table, computed.limits(step.bounds), by)

    @staticmethod
    def _kernel(step: Step) -> str:
        """The function that kernels compute in float; empty for none, and for a table."""
        target: Any = step.function.target if step.function else None
        return "" if not step.bounds.none else KERNELS.get(target, "")

    def _table(self, step: Step) -> Tensor:
        """The code of f at what each code of the inner range is worth."""
        assert step.function is not None
        inner = self.inner[step]
        x = (torch.arange(256, dtype=torch.float64) - inner.zero) * inner.scale
        return self.range(step.tail).code(values(step.function, x))

    def coded(self, step: Conv) -> CodedConv:
        return self.convs[step]

    # -- nodes -------------------------------------------------------------------------------------------------------------

    def codes(self, node: fx.Node, step: Step) -> fx.Node:
        """The codes of a value, quantized here where no step has written them."""
        if node not in self.written:
            r = self.range(node)
            arguments = (node, single(r.scale), r.zero, r.top)
            self.written[node] = self.graph.call(ops.quantize_codes.default, arguments, step.tail, step.node)
        return self.written[node]

    def emit(self) -> None:
        inside = {n for s in self.chain.steps for n in s.taken}
        for step in self.chain.steps:
            new = step.emit(self)
            outside = [u for u in step.tail.users if u not in inside]
            if step.writes:
                self.written[step.tail] = new
                if not outside:
                    continue
                r = self.range(step.tail)
                new = self.graph.call(ops.dequantize_codes.default, (new, single(r.scale), r.zero), step.tail, step.node)
            for user in outside:
                user.replace_input_with(step.tail, new)

    # -- the report --------------------------------------------------------------------------------------------------------

    def entry(self, step: Conv) -> LayerQuantization:
        layer, coded = step.layer, self.convs[step]
        shifts = coded.integers.shifts.int()
        held = [c for c in (layer.weight, layer.bias) if c is not None]
        return LayerQuantization(
            step.path, layer.kind, layer.shape, coded.bits, self.spec.activation_bits, "static",
            tuple(torch.bincount(int(shifts.max()) - shifts).tolist()),
            bytes_before=sum(c.numel * c.dtype.itemsize for c in held), bytes_after=coded.bytes,
        )  # fmt: skip


def _surplus(node: fx.Node, held: list[Constant | None]) -> dict[int, int]:
    weight, shifts, scale, table = held[1], held[2], held[3], held[6]
    if weight is None or shifts is None or scale is None:
        return {}
    kernel: Any = node.args[8]
    groups: Any = node.args[12]
    count = scale.numel * shifts.numel * math.prod(kernel) // groups
    found = {id(weight): weight.numel - count, id(shifts): shifts.numel}
    return found if table is None else found | {id(table): table.numel}


PACKED[ops.codes_conv2d.default] = _surplus
