"""A captured causal model as an ONNX file with the names, order and sizes that its readers expect."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from normfuse.export.decoder.capture import Site
from normfuse.export.decoder.forms import lower_cache, translations
from normfuse.export.lowering.layers import quantized_layers
from normfuse.export.lowering.lowering import lowered
from normfuse.export.onnx.choice.table import layers_by_table
from normfuse.export.onnx.lower import finished, translated
from normfuse.export.onnx.oldest import needs
from normfuse.export.onnx.precision.mixed_norms import one_dtype_norms
from normfuse.export.onnx.program import program
from normfuse.export.onnx.quantized.forms import passes_of, possible_forms
from normfuse.export.runtimes import Release
from normfuse.export.targets import opset_for, target_named
from normfuse.extras import need
from normfuse.passes.attention.eager import EagerAttention
from normfuse.passes.attention.static_masks import StaticMasks

__all__ = ["Written", "cache_names", "write_model"]


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


def cache_names(layers: int, prefix: str) -> list[str]:
    """`prefix.0.key`, `prefix.0.value`, `prefix.1.key`, …"""
    return [f"{prefix}.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def write_model(gm: fx.GraphModule, sites: Sequence[Site], *, attention: str, padding: str = "both") -> Written:
    """The graph of what `normfuse.optimize` made of a `CausalModel`.

    Args:
        attention: a form of `normfuse.export.decoder.forms`.
        padding: `both`, or `right` where no row is ever padded on the left.

    Raises:
        ExportError: an operator of the model has no translation.
    """
    target = target_named("portable" if attention == "portable" else "onnxruntime")
    opset = opset_for(target, None)
    found = program(gm, target=target)
    inputs = ("input_ids", "attention_mask", *cache_names(len(sites), "past_key_values"))
    outputs = ("logits", *cache_names(len(sites), "present"))
    found = dataclasses.replace(found, inputs=inputs, outputs=outputs)
    one_dtype_norms(found.exported)
    forms = possible_forms(quantized_layers(found.exported), target, opset, "auto", int4=False)
    passes = (StaticMasks(), EagerAttention(), *passes_of(forms))
    fused = dataclasses.replace(found, exported=lowered(found.exported, passes).exported)
    model = translated(fused, opset, contrib=bool(target.domains), more=translations())
    lower_cache(model, attention, left=padding == "both")
    form = layers_by_table(forms)
    model = finished(model, found, target, opset, form)
    _state_sizes(model, sites)
    runtime, _ = max(needs(model))
    if attention == "gqa":
        # older releases have no bias, and take a window to be one token longer, silently
        runtime = max(runtime, (1, 24) if any(s.window for s in sites) else (1, 22))
    return Written(model, opset, runtime, form)


def _state_sizes(model: Any, sites: Sequence[Site]) -> None:
    """The axes of inputs and outputs, by the names that readers know."""
    ir = need("onnx_ir", extra="onnx")
    batch, new = "batch_size", "sequence_length"
    sizes: dict[str, tuple[Any, ...]] = {"input_ids": (batch, new), "attention_mask": (batch, "total_sequence_length")}
    for i, site in enumerate(sites):
        for kind in ("key", "value"):
            sizes[f"past_key_values.{i}.{kind}"] = (batch, site.kv_heads, "past_sequence_length", site.width)
            # in a shared buffer it is the buffer's length, so it has a name of its own
            sizes[f"present.{i}.{kind}"] = (batch, site.kv_heads, "present_sequence_length", site.width)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in sizes:
            value.shape = ir.Shape(sizes[value.name])
        else:
            known = value.shape.dims[-1]
            value.shape = ir.Shape((batch, 1 if value.shape.dims[1] == 1 else new, known))  # the logits
