"""Fine-tuning between calibration and the final codes, where the specification asks for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from normfuse.errors import UsageError
from normfuse.ir.constants import Constant
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Samples
from normfuse.passes.quantize.coded import Coded
from normfuse.passes.quantize.evaluation import Outputs
from normfuse.passes.quantize.layers.find import reread
from normfuse.passes.quantize.probe import progress
from normfuse.passes.quantize.shiftquant.coded import Integers, packed
from normfuse.quant.finetune import Finetuned, finetune
from normfuse.quant.spec import ShiftQuant
from normfuse.ranks import several_ranks
from normfuse.reports.model import Site

__all__ = ["finetuned"]

RULE = "finetuning"

Held = list[tuple[fx.Node, list[Constant | None]]]


def finetuned(
    graph: Graph, samples: Samples, coded: Sequence[Coded], spec: ShiftQuant, outputs: Outputs
) -> tuple[list[Coded] | None, Site]:
    """The layers with trained integers, and what to say; None, and the graph as it was, if they are no better than before.

    The constants of the graph are then trained ones. Embeddings stay as they are. Layers that share a weight learn scales
    of their own, so that each gets codes of its own.

    Args:
        graph: in float.
        samples: what to train on.
        coded: the layers as calibrated.
        spec: with `finetune_steps`.
        outputs: those of the float model.

    Raises:
        UsageError: there is no data, or several ranks would train apart.
    """
    if several_ranks():
        raise UsageError("finetune_steps= trains in one process; under torch.distributed quantize on one rank and share the result")
    chosen = [c for c in coded if isinstance(c, Integers)]
    before, reached = _held(graph), outputs.sqnr(coded)
    with progress("fine-tune", spec.finetune_steps) as advance:
        trained = finetune(
            graph,
            samples,
            spec,
            weights={c.layer.node: c.weights for c in chosen},
            input_scales={c.layer.node: c.input_scale for c in chosen if c.input_scale is not None},
            progress=lambda step, loss: advance(),
        )
    found = [_recoded(graph, c, trained) if isinstance(c, Integers) and c.layer.node in trained.weights else c for c in coded]
    now = outputs.sqnr(found)
    said = f"{spec.finetune_steps} steps: SQNR of the outputs {reached:.1f} -> {now:.1f} dB"
    if now > reached:
        return found, Site(RULE, "outputs", said)
    _restore(graph, before)
    return None, Site(RULE, "outputs", f"{said}, not taken", remedy="more steps, or more calibration data")


def _recoded(graph: Graph, coded: Integers, trained: Finetuned) -> Integers:
    """The layer with its trained integers, and the bias that the graph has now."""
    layer = reread(graph, coded.layer)
    weights = trained.weights[coded.layer.node]
    bias = None if layer.bias is None else layer.bias.value.float()
    static = trained.input_scales.get(layer.node, coded.input_scale)
    return Integers(layer, coded.bits, bias, static, weights, *packed(weights, layer))


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
