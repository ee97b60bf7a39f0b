"""A captured model as an ONNX file with the names, order and sizes that its readers expect."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import fx

from normfuse.export.decoder.blocks import Blocks, to_blocks
from normfuse.export.decoder.cross import lower_cross
from normfuse.export.decoder.forms import lower_cache, translations
from normfuse.export.decoder.layout import Layout
from normfuse.export.decoder.operator import cached_attention
from normfuse.export.lowering.attention.forms import AttentionForms
from normfuse.export.lowering.layers import quantized_layers
from normfuse.export.lowering.lowering import lowered
from normfuse.export.onnx.choice.table import attention_by_table, layers_by_table
from normfuse.export.onnx.lower import finished, translated
from normfuse.export.onnx.oldest import needs
from normfuse.export.onnx.precision.mixed_norms import one_dtype_norms
from normfuse.export.onnx.program import program
from normfuse.export.onnx.quantized.forms import passes_of, possible_forms
from normfuse.export.runtimes import Release
from normfuse.export.targets import attention_forms, opset_for, target_named
from normfuse.extras import need
from normfuse.passes.attention.eager import EagerAttention
from normfuse.passes.attention.static_masks import StaticMasks

__all__ = ["Written", "write_model"]


@dataclass(frozen=True)
class Written:
    """A finished graph, not yet on disk.

    Attributes:
        model: an `onnx_ir.Model`.
        opset: of its standard ops.
        runtime: the oldest ONNX Runtime that computes it rightly.
        form: of quantized layers, see `normfuse.export.targets.QUANTIZED_FORMS`; None where there are none.
    """

    model: Any
    opset: int
    runtime: Release
    form: str | None = None


def write_model(
    gm: fx.GraphModule,
    layout: Layout,
    *,
    attention: str,
    padding: str = "both",
    windows: bool = False,
    blocks: Blocks | None = None,
) -> Written:
    """The graph of what `normfuse.optimize` made of a model with flat caches, or of an encoder.

    Args:
        layout: names and sizes of its inputs and outputs.
        attention: a form of `normfuse.export.decoder.forms`.
        padding: `both`, or `right` where no row is ever padded on the left.
        windows: tokens do not see all tokens before them.
        blocks: what products with weights become; None for what they are.

    Raises:
        ExportError: an operator of the model has no translation.
        UsageError: no product fits into blocks.
    """
    target = target_named("portable" if attention == "portable" else "onnxruntime")
    opset = opset_for(target, None)
    found = dataclasses.replace(program(gm, target=target), inputs=tuple(layout.inputs), outputs=tuple(layout.outputs))
    one_dtype_norms(found.exported)
    forms = possible_forms(quantized_layers(found.exported), target, opset, "auto", int4=False)
    passes = (StaticMasks(), EagerAttention(), *passes_of(forms))
    low = lowered(found.exported, passes)
    cached = any(node.target is cached_attention._opoverload for node in low.exported.graph.nodes)
    if not cached:  # an encoder's
        tried = attention_forms(target, opset, "auto", native=False)
        low = low.then([AttentionForms(attention_by_table(low, tried, opset), opset)])
    fused = dataclasses.replace(found, exported=low.exported)
    model = translated(fused, opset, contrib=bool(target.domains), more=translations())
    lower_cache(model, attention, left=padding == "both")
    form = layers_by_table(forms)
    model = finished(model, found, target, opset, form)
    if blocks is not None:
        to_blocks(model, blocks)
    lower_cross(model, attention)
    layout.state(model, need("onnx_ir", extra="onnx"))
    runtime, _ = max(needs(model))
    if attention == "gqa" and cached:
        # older releases have no bias, and take a window to be one token longer, silently
        runtime = max(runtime, (1, 24) if windows else (1, 22))
    if blocks is not None and blocks.bits == 8:
        runtime = max(runtime, (1, 22))  # MatMulNBits has 8 bits with products in int8 since then
    return Written(model, opset, runtime, form)
