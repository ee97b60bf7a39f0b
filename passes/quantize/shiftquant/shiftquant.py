"""Layers become integers: weights of 2 to 8 bits whose input channels are scaled by powers of two, activations of 2 to 8 bits.

    W x ≈ s S[n] 2^-E Σ_k A[k] (C[n, k] << (E − e[k]))

Source: ShiftQuant and L1 normalization, arXiv 2411.10948.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from normfuse.errors import UsageError
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Refuse
from normfuse.ir.passes import Pass, Rewriting
from normfuse.ir.views import Embedding, Op
from normfuse.passes.quantize.between import note_ranges, observed_ranges
from normfuse.passes.quantize.coded import Coded, CodedProduct, Shared
from normfuse.passes.quantize.evaluation import Outputs
from normfuse.passes.quantize.layers.embedding import EMBEDDING
from normfuse.passes.quantize.layers.find import HANDLERS, find_layers, products
from normfuse.passes.quantize.layers.layer import Handler, Layer, Product
from normfuse.passes.quantize.measure import Measured, corrected, measure
from normfuse.passes.quantize.patterns import check_patterns
from normfuse.passes.quantize.shiftquant.attention import attentions, attentions_into_integers
from normfuse.passes.quantize.shiftquant.chains.chains import into_chains
from normfuse.passes.quantize.shiftquant.coded import RULE, encode, width
from normfuse.passes.quantize.shiftquant.finetuning import finetuned
from normfuse.passes.quantize.shiftquant.migration import migrate
from normfuse.passes.quantize.shiftquant.widths import Choice, choose
from normfuse.passes.quantize.speed import Speed, Timer, speeds
from normfuse.passes.quantize.statistics import Statistics, collect, second_moments
from normfuse.passes.quantize.summary import constant_bytes, kept, quantized, whole
from normfuse.quant.spec import ShiftQuant
from normfuse.reports.model import LayerQuantization, Site

__all__ = ["ShiftQuantize"]

_BATCHES = 8  # of each rank, for the SQNR of the outputs
_ROWS_AN_INPUT = 2  # of calibration data: fewer say too little about how inputs go together
_WIDEST = 4608  # inputs (a 3x3 convolution of 512 channels): the time of second-order rounding grows with their cube


def _embedding(node: fx.Node, op: Op, path: str, spec: ShiftQuant) -> Layer:
    if spec.embedding_bits is None:
        raise Refuse("kept in float by embedding_bits=None")
    return EMBEDDING.read(node, op, path, spec)


_HANDLERS = {**HANDLERS, Embedding: Handler(EMBEDDING.kind, _embedding)}


@dataclass(frozen=True)
class ShiftQuantize(Pass):
    """Linears, convolutions and embeddings become integer operators of `torch.ops.normfuse`, calibrated on `Run.samples`.

    Stands last in a pipeline: the norms must be folded before. A layer that cannot or should not be quantized stays in float, and
    the report says why.

    Args:
        spec: how.
        timer: times a layer in integers against the same in float, see `normfuse.passes.quantize.speed.speeds`; None for
            the clock.

    Raises:
        UsageError: a pattern matches no layer, a budget cannot be met (when the pass runs).
    """

    name = "shiftquant"
    changes = "computes layers with integers"
    leaves_affines = False

    spec: ShiftQuant = field(default_factory=ShiftQuant)
    timer: Timer | None = None

    def rewrite(self, work: Rewriting) -> None:
        _Quantizing(work, self.spec, self.timer).run()


class _Quantizing:
    """One run of the pass over one graph."""

    def __init__(self, work: Rewriting, spec: ShiftQuant, timer: Timer | None) -> None:
        self.work, self.graph, self.samples = work, work.graph, work.run.samples
        self.spec, self.timer = spec, timer
        self.refusals: dict[fx.Node, tuple[str, Refuse]] = {}
        self.found: dict[tuple[fx.Node, int], Statistics] = {}
        self.second: dict[Product, Tensor] = {}
        self.original: dict[fx.Node, list[Constant]] = {}
        self.choices: dict[fx.Node, Choice] = {}
        self.timed: dict[Layer, Speed] = {}
        self.measured: dict[Layer, Measured] = {}
        self._made: dict[tuple[object, ...], Coded] = {}

    def run(self) -> None:
        graph, samples, work = self.graph, self.samples, self.work
        graph.clean()
        before = constant_bytes(graph)
        outputs = Outputs(graph, samples[:_BATCHES]) if samples else None
        layers = self._layers(into_chains(work, self.spec, self.timer) if self.spec.chains else ())
        layers, moved = self._calibrated(layers)
        self.choices = self._choices(layers, before)
        coded = [c for layer in layers if (c := self._coded(layer, self.choices.get(layer.node))) is not None]
        self.timed = speeds(graph, samples, coded, self.timer)
        coded = self._fast_enough(coded)
        self.measured = measure(graph, samples, coded)
        coded = self._corrected(coded)
        ranges = observed_ranges(graph, samples, [c.layer for c in coded])
        work.applied += moved
        note_ranges(ranges, self._emit(self._finetuned(coded, outputs)))
        attentions_into_integers(work, self.spec)
        graph.clean()
        if work.applied:
            quality = None if outputs is None else outputs.sqnr_of(graph)
            work.quantization.append(whole(before, constant_bytes(graph), quality))

    # -- steps -------------------------------------------------------------------------------------------------------------

    def _layers(self, chained: Sequence[str]) -> list[Layer]:
        """The layers that may become integers, as the specification names them, besides those at paths that are in chains."""
        graph = self.graph
        layers, refused = find_layers(graph, self.spec, _HANDLERS)
        known = (*(layer.node for layer in layers), *(n for n, _, _ in refused), *attentions(graph, self.spec))
        check_patterns(self.spec, [*chained, *(graph.path(n) for n in known)])
        self.refusals = {node: (kind, refusal) for node, kind, refusal in refused}
        layers = self._worth_their_bytes(layers)
        self.original = {layer.node: [c for c in (layer.weight, layer.bias) if c is not None] for layer in layers}
        return layers

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
        self.found = collect(self.graph, self.samples, layers, histograms)
        now, moved = migrate(self.work, layers, self.found)
        if moved:
            self.found = collect(self.graph, self.samples, now, histograms)
        wanted = [layer for layer in products(now) if self._by_second_moments(layer)]
        self.second = second_moments(self.graph, self.samples, wanted)
        return now, moved

    def _by_second_moments(self, layer: Product) -> bool:
        """Is the layer to be rounded by second moments?"""
        if layer.spec.rounding != "auto":
            return bool(layer.spec.rounding == "gptq")
        found = self.found.get((layer.x, layer.axis))
        if found is None or self.spec.size_budget is not None or self.spec.sqnr_budget is not None:
            return False  # widths are compared at a rounding that is quick
        inputs = layer.taps * layer.channels
        return inputs <= _WIDEST and found.count >= _ROWS_AN_INPUT * inputs

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
            if not isinstance(layer, Product):
                fixed += self._encode(layer, None).bytes
            elif self._coded(layer, None) is not None:
                units.setdefault(id(layer.weight), []).append(layer)
        chosen = choose(self.graph, self.samples, list(units.values()), self._encode, self.spec, fixed, total)
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
        key = (id(layer.weight), layer.stored, width(layer) if bits is None else bits, layer.spec)
        found = second = None
        if isinstance(layer, Product):
            found, second = self.found.get((layer.x, layer.axis)), self.second.get(layer)
        if key not in self._made:
            self._made[key] = encode(layer, found, second, bits=bits)
        first = self._made[key]
        return first if first.layer is layer else encode(layer, found, second, bits=bits, like=first)

    def _fast_enough(self, coded: Sequence[Coded]) -> list[Coded]:
        fast = []
        for c in coded:
            speed = self.timed.get(c.layer)
            if self.spec.prefer == "speed" and speed is not None and speed.slower:
                refusal = Refuse(
                    f"measured {speed.ratio:.2f} times as fast as in float on this machine",
                    remedy="prefer='size' quantizes it all the same",
                )
                self.refusals[c.layer.node] = (c.layer.kind, refusal)
                continue
            fast.append(c)
        return fast

    def _corrected(self, coded: Sequence[Coded]) -> list[Coded]:
        found = []
        for c in coded:
            if isinstance(c, CodedProduct) and c.layer in self.measured:
                c, self.measured[c.layer] = corrected(c, self.measured[c.layer])
            found.append(c)
        return found

    def _finetuned(self, coded: list[Coded], outputs: Outputs | None) -> list[Coded]:
        """The layers after training, where it is asked for and made them better."""
        if not self.spec.finetune_steps or not any(isinstance(c, CodedProduct) for c in coded):
            return coded
        if outputs is None:
            raise UsageError("finetune_steps= needs data to train on: pass example_inputs or calibration=")
        learnt, site = finetuned(self.graph, self.samples, coded, self.spec, outputs)
        (self.work.applied if learnt else self.work.refused).append(site)
        if not learnt:
            return coded
        by_node = {layer.node: speed for layer, speed in self.timed.items()}
        self.timed |= {c.layer: by_node[c.layer.node] for c in learnt if c.layer.node in by_node}
        self.measured = measure(self.graph, self.samples, learnt)
        return learnt

    def _emit(self, coded: Sequence[Coded]) -> dict[fx.Node, fx.Node]:
        """Put the integer operators into the graph, in its order, and say of every layer what became of it.

        Returns: what now stands in the place of which node.
        """
        graph, work = self.graph, self.work
        places = {n: i for i, n in enumerate(graph.fx.nodes)}
        rows: list[tuple[int, fx.Node, Coded | None]] = [(places[c.layer.node], c.layer.node, c) for c in coded]
        rows += [(places[n], n, None) for n in self.refusals if n in places]
        emitted: dict[fx.Node, fx.Node] = {}
        shared: Shared = {}
        for _, node, c in sorted(rows, key=lambda row: row[0]):
            choice = self.choices.get(node)
            sensitivity = () if choice is None else choice.sensitivity
            if c is not None and work.run.permit(RULE, c.layer.path):
                entry = quantized(c, self.measured.get(c.layer), self.timed.get(c.layer), sensitivity, self.original[node])
                work.quantization.append(entry)
                work.done(RULE, node, _said(entry))
                emitted[c.layer.tail] = c.emit(graph, shared, emitted)
                continue
            kind, refusal = (c.layer.kind, Refuse("verification took it back")) if c is not None else self.refusals[node]
            speed = next((s for layer, s in self.timed.items() if layer.node is node), None)
            work.quantization.append(kept(graph, node, kind, refusal, speed, sensitivity))
            work.refuse(RULE, node, refusal)
        return emitted


def _said(entry: LayerQuantization) -> str:
    bits = f"{entry.weight_bits}-bit weights"
    if entry.activation_bits is not None:
        bits += f", {entry.activation_bits}-bit {entry.activations} activations"
    return bits
