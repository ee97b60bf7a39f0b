"""Layers become integers: weights of 2 to 8 bits whose input channels are scaled by powers of two, activations of 2 to 8 bits.

    W x ≈ s S[n] 2^-E Σ_k A[k] (C[n, k] << (E − e[k]))

Source: ShiftQuant and L1 normalization, arXiv 2411.10948. The parts stand in `normfuse/passes/quantize`, one idea a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import ClassVar

from torch import Tensor, fx

from normfuse.constants import Constant
from normfuse.errors import UsageError
from normfuse.graph import Graph, Refuse
from normfuse.passes.quantize.attention import attentions, attentions_into_integers
from normfuse.passes.quantize.coded import Coded, encode
from normfuse.passes.quantize.evaluation import Outputs
from normfuse.passes.quantize.finetuning import finetuned
from normfuse.passes.quantize.measure import Measured, corrected, measure
from normfuse.passes.quantize.migration import migrate
from normfuse.passes.quantize.patterns import check_patterns
from normfuse.passes.quantize.sites import RULE, Layer, find_layers
from normfuse.passes.quantize.speed import Speed, Timer, speeds
from normfuse.passes.quantize.statistics import Statistics, collect, second_moments, wants_second_moments
from normfuse.passes.quantize.summary import constant_bytes, kept, quantized, whole
from normfuse.passes.quantize.widths import Choice, choose
from normfuse.quant.spec import ShiftQuant
from normfuse.report import LayerQuantization, PassReport, Site

__all__ = ["ShiftQuantize"]

_BATCHES = 8  # of each rank, for the SQNR of the outputs


@dataclass(frozen=True)
class ShiftQuantize:
    """Linears, convolutions and embeddings become integer operators of `torch.ops.normfuse`, calibrated on `graph.samples`.

    Stands last in a pipeline: the norms must be folded before. A layer that cannot or should not be quantized stays in float, and
    the report says why.

    Args:
        spec: how.
        timer: times a layer in integers against the same in float, see `normfuse.passes.quantize.speed.speeds`; None for
            the clock.

    Raises:
        UsageError: a pattern matches no layer, a budget cannot be met (when the pass runs).
    """

    name: ClassVar[str] = "shiftquant"
    changes: ClassVar[str] = "computes layers with integers"
    leaves_affines: ClassVar[bool] = False

    spec: ShiftQuant = field(default_factory=ShiftQuant)
    timer: Timer | None = None

    def __call__(self, graph: Graph) -> PassReport:
        start = perf_counter()
        applied, refused, entries = _Run(graph, self.spec, self.timer).run()
        return PassReport(self.name, tuple(applied), tuple(refused), seconds=perf_counter() - start, quantization=tuple(entries))


class _Run:
    """One run of the pass over one graph."""

    def __init__(self, graph: Graph, spec: ShiftQuant, timer: Timer | None) -> None:
        self.graph, self.spec, self.timer = graph, spec, timer
        self.refusals: dict[fx.Node, tuple[str, Refuse]] = {}
        self.found: dict[tuple[fx.Node, int], Statistics] = {}
        self.second: dict[Layer, Tensor] = {}
        self._made: dict[tuple[object, ...], Coded] = {}

    def run(self) -> tuple[list[Site], list[Site], list[LayerQuantization]]:
        graph = self.graph
        graph.clean()
        before = constant_bytes(graph)
        layers, refused = find_layers(graph, self.spec)
        known = (*(layer.node for layer in layers), *(n for n, _, _ in refused), *attentions(graph, self.spec))
        check_patterns(self.spec, [graph.path(n) for n in known])
        self.refusals = {node: (kind, refusal) for node, kind, refusal in refused}
        layers = self._worth_their_bytes(layers)
        outputs = Outputs(graph, _BATCHES) if graph.samples else None
        original = {layer.node: [c for c in (layer.weight, layer.bias) if c is not None] for layer in layers}
        layers, moved = self._calibrated(layers)
        choices = self._choices(layers, before)
        coded = [c for layer in layers if (c := self._coded(layer, choices.get(layer.node))) is not None]
        timed = speeds(graph, coded, self.timer)
        coded = self._fast_enough(coded, timed)
        measured = measure(graph, coded)
        coded = self._corrected(coded, measured)
        applied, untouched = list(moved), list[Site]()
        if self.spec.finetune_steps and any(c.layer.kind != "embedding" for c in coded):
            if outputs is None:
                raise UsageError("finetune_steps= needs data to train on: pass example_inputs or calibration=")
            learnt, site = finetuned(graph, coded, self.spec, outputs)
            (applied if learnt else untouched).append(site)
            if learnt:
                coded = learnt
                by_node = {layer.node: speed for layer, speed in timed.items()}
                timed |= {c.layer: by_node[c.layer.node] for c in coded if c.layer.node in by_node}
                measured = measure(graph, coded)
        places = {n: i for i, n in enumerate(graph.fx.nodes)}
        rows: list[tuple[int, fx.Node, Coded | None]] = [(places[c.layer.node], c.layer.node, c) for c in coded]
        rows += [(places[n], n, None) for n in self.refusals if n in places]
        entries: list[LayerQuantization] = []
        emitted: dict[fx.Node, fx.Node] = {}
        shared: dict[int, dict[str, Constant]] = {}
        for _, node, c in sorted(rows, key=lambda row: row[0]):
            choice = choices.get(node)
            if c is not None and graph.permit(RULE, c.layer.path):
                entry = quantized(c, measured.get(c.layer), timed.get(c.layer), choice, original[node])
                entries.append(entry)
                applied.append(graph.site(RULE, node, note=_said(entry)))
                emitted[c.layer.tail] = c.emit(graph, shared, emitted)
                continue
            kind, refusal = (c.layer.kind, Refuse("verification took it back")) if c is not None else self.refusals[node]
            speed = next((s for layer, s in timed.items() if layer.node is node), None)
            entries.append(kept(graph, node, kind, refusal, speed, choice))
            untouched.append(graph.site(RULE, node, refusal))
        done, undone, attended = attentions_into_integers(graph, self.spec)
        applied, untouched, entries = applied + done, untouched + undone, entries + attended
        graph.clean()
        if applied:
            quality = None if outputs is None else outputs.sqnr_of(graph)
            entries.append(whole(before, constant_bytes(graph), quality))
        return applied, untouched, entries

    # -- steps -------------------------------------------------------------------------------------------------------------

    def _worth_their_bytes(self, layers: Sequence[Layer]) -> list[Layer]:
        """Codes beside a table that stays in float for somebody else would only add bytes."""
        nodes = {layer.node for layer in layers}
        worth = []
        for layer in layers:
            others = [n for n in self.graph.readers_of(layer.weight) if n not in nodes]
            if others and self.spec.prefer == "size":
                self.refusals[layer.node] = (
                    layer.kind,
                    Refuse(
                        "its weight stays in float for another reader, so that codes would only add bytes",
                        blocker=others[0],
                        remedy="quantize that reader as well (embedding_bits=8), or prefer='speed'",
                    ),
                )
                continue
            worth.append(layer)
        return worth

    def _calibrated(self, layers: Sequence[Layer]) -> tuple[list[Layer], list[Site]]:
        histograms = any(layer.spec.activations == "static" and layer.spec.observer != "minmax" for layer in layers)
        self.found = collect(self.graph, layers, histograms)
        now, moved = migrate(self.graph, layers, self.found)
        if moved:
            self.found = collect(self.graph, now, histograms)
        wanted = [layer for layer in now if wants_second_moments(layer, self.spec, self.found.get((layer.x, layer.axis)))]
        self.second = second_moments(self.graph, wanted)
        return now, moved

    def _choices(self, layers: Sequence[Layer], total: int) -> dict[fx.Node, Choice]:
        """A width for each layer where there is a budget."""
        if self.spec.size_budget is None and self.spec.sqnr_budget is None:
            return {}
        units: dict[int, list[Layer]] = {}
        fixed = total
        nodes = {layer.node for layer in layers}
        gone: set[int] = set()
        for layer in layers:
            for c in (layer.weight, layer.bias):
                if c is not None and id(c) not in gone and nodes.issuperset(self.graph.readers_of(c)):
                    gone.add(id(c))
                    fixed -= c.numel * c.dtype.itemsize
            if layer.kind == "embedding":
                fixed += self._encode(layer, None).bytes
            elif self._coded(layer, None) is not None:
                units.setdefault(id(layer.weight), []).append(layer)
        chosen = choose(self.graph, list(units.values()), self._encode, self.spec, fixed, total)
        return {layer.node: choice for unit, choice in zip(units.values(), chosen, strict=True) for layer in unit}

    def _coded(self, layer: Layer, choice: Choice | None) -> Coded | None:
        """The layer's integers; None, with the reason among the refusals, if it stays in float."""
        try:
            if choice is not None and choice.bits is None:
                raise Refuse(f"sqnr_budget={self.spec.sqnr_budget:g} is not met with it in integers", remedy="a lower budget")
            return self._encode(layer, None if choice is None else choice.bits)
        except Refuse as refusal:
            self.refusals[layer.node] = (layer.kind, refusal)
            return None

    def _encode(self, layer: Layer, bits: int | None) -> Coded:
        """Integers of a layer; a weight that two layers share is coded once."""
        wanted = bits if bits is not None else layer.spec.embedding_bits if layer.kind == "embedding" else layer.spec.weight_bits
        key = (id(layer.weight), layer.kind, layer.transposed, wanted, layer.spec)
        if key not in self._made:
            self._made[key] = encode(layer, self.found.get((layer.x, layer.axis)), self.second.get(layer), bits=bits)
        first = self._made[key]
        if first.layer is layer:
            return first
        return encode(layer, self.found.get((layer.x, layer.axis)), self.second.get(layer), bits=bits, like=first)

    def _fast_enough(self, coded: Sequence[Coded], timed: dict[Layer, Speed]) -> list[Coded]:
        fast = []
        for c in coded:
            speed = timed.get(c.layer)
            if self.spec.prefer == "speed" and speed is not None and speed.slower:
                refusal = Refuse(
                    f"measured {speed.ratio:.2f} times as fast as in float on this machine",
                    remedy="prefer='size' quantizes it all the same",
                )
                self.refusals[c.layer.node] = (c.layer.kind, refusal)
                continue
            fast.append(c)
        return fast

    @staticmethod
    def _corrected(coded: Sequence[Coded], measured: dict[Layer, Measured]) -> list[Coded]:
        found = []
        for c in coded:
            if c.layer in measured:
                c, measured[c.layer] = corrected(c, measured[c.layer])
            found.append(c)
        return found


def _said(entry: LayerQuantization) -> str:
    bits = f"{entry.weight_bits}-bit weights"
    if entry.activation_bits is not None:
        bits += f", {entry.activation_bits}-bit {entry.activations} activations"
    return bits
