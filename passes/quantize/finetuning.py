"""Fine-tuning between calibration and the final codes, where the specification asks for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from normfuse.errors import UsageError
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.passes.quantize.coded import Coded
from normfuse.passes.quantize.evaluation import Outputs
from normfuse.passes.quantize.probe import progress
from normfuse.passes.quantize.sites import reread
from normfuse.quant.finetune import finetune
from normfuse.quant.packing import pack_groups
from normfuse.quant.spec import ShiftQuant
from normfuse.ranks import several_ranks
from normfuse.reports.model import Site

__all__ = ["finetuned"]

RULE = "finetuning"

Held = list[tuple[fx.Node, list[Constant | None]]]


def finetuned(graph: Graph, coded: Sequence[Coded], spec: ShiftQuant, outputs: Outputs) -> tuple[list[Coded] | None, Site]:
    """The layers with trained integers, and what to say; None, and the graph as it was, if they are no better than before.

    The constants of the graph are then trained ones. Embeddings stay as they are. Layers that share a weight learn scales
    of their own, so that each gets codes of its own.

    Args:
        graph: in float.
        coded: the layers as calibrated.
        spec: with `finetune_steps`.
        outputs: those of the float model.

    Raises:
        UsageError: there is no data, or several ranks would train apart.
    """
    if several_ranks():
        raise UsageError("finetune_steps= trains in one process; under torch.distributed quantize on one rank and share the result")
    chosen = [c for c in coded if c.layer.kind != "embedding"]
    before, reached = _held(graph), outputs.sqnr(coded)
    with progress("fine-tune", spec.finetune_steps) as advance:
        trained = finetune(
            graph,
            graph.samples,
            spec,
            weights={c.layer.node: c.weights for c in chosen},
            input_scales={c.layer.node: c.input_scale for c in chosen if c.input_scale is not None},
            progress=lambda step, loss: advance(),
        )
    found: list[Coded] = []
    for c in coded:
        weights = trained.weights.get(c.layer.node)
        if weights is None:
            found.append(c)
            continue
        layer = reread(graph, c.layer)
        bias = None if layer.bias is None else layer.bias.value.float()
        static = trained.input_scales.get(layer.node, c.input_scale)
        codes, exponents, scale = pack_groups(weights, layer.taps)
        found.append(Coded(layer, c.bits, weights, codes, exponents, scale, bias, static))
    now = outputs.sqnr(found)
    said = f"{spec.finetune_steps} steps: SQNR of the outputs {reached:.1f} -> {now:.1f} dB"
    if now > reached:
        return found, Site(RULE, "outputs", said)
    _restore(graph, before)
    return None, Site(RULE, "outputs", f"{said}, not taken", remedy="more steps, or more calibration data")


def _held(graph: Graph) -> Held:
    """The constants that each node reads."""
    return [
        (n, [graph.constant(a) for a in n.all_input_nodes]) for n in graph if any(a.op == "get_attr" for a in n.all_input_nodes)
    ]


def _restore(graph: Graph, held: Held) -> None:
    for node, constants in held:
        for read, constant in zip(list(node.all_input_nodes), constants, strict=True):
            if constant is not None and graph.constant(read) is not constant:
                node.replace_input_with(read, graph.emit_constant(constant, node))
    graph.clean()
