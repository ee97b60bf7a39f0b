"""Forms of attention and of quantized layers: which are possible for a model, and which one its file gets."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import normfuse
from normfuse.benchmark.machine import cpu_model
from normfuse.cache import measurement, remember
from normfuse.export.lowering.attention.forms import AttentionForms, forms_in
from normfuse.export.lowering.lowering import Lowered
from normfuse.export.onnx.build import dims
from normfuse.export.onnx.choice.fastest import fastest
from normfuse.export.onnx.choice.table import attention_by_table, layers_by_table
from normfuse.export.onnx.lower import finished
from normfuse.export.onnx.program import Program
from normfuse.export.onnx.quantized.forms import FORMS
from normfuse.export.onnx.runtime import default_threads
from normfuse.export.onnx.writer.save import save_model
from normfuse.export.options import ExportOptions
from normfuse.export.targets import attention_forms
from normfuse.extras import need

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Chosen", "Translate", "choose"]

Translate = Callable[[Lowered], "ir.Model"]
"""From a program to a model with markers."""


@dataclass(frozen=True)
class Chosen:
    """A model in its forms.

    Attributes:
        model: ready to be written.
        layers: form of quantized layers; None without any.
        attention: form of attention that was asked for.
        program: what it was translated from.
        ratios: latency of the plain form over that of each form that was measured.
    """

    model: ir.Model
    layers: str | None
    attention: str
    program: Lowered
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Candidates:
    """What to try: forms of quantized layers (none for a model without), forms of attention, the plain ones first."""

    quantized: tuple[str, ...]
    attention: tuple[str, ...]

    def name(self, layers: str | None, attention: str) -> str:
        """What a measurement calls a pair of forms."""
        return attention if len(self.quantized) < 2 else " ".join(filter(None, (layers, attention)))


def choose(
    program: Lowered,
    found: Program,
    opset: int,
    options: ExportOptions,
    quantized: tuple[str, ...],
    folder: Path,
    translate: Translate,
) -> Chosen:
    """A model in the forms that `options` ask for; where they leave that open by the table, or by measuring files in `folder`.

    Args:
        program: `found` as passes have left it, with attention in no form yet.
        quantized: the forms that its quantized layers may take.
        translate: makes a model of a program whose attentions have their form.

    Raises:
        UsageError: a form that is asked for is not possible here.
    """
    target, int4 = options.where, options.int4_initializers
    attention = attention_forms(target, opset, options.attention, native=any(FORMS[f].kernels for f in quantized))
    if options.tune:
        ready = dict(_ready(program, found, opset, options, _Candidates(quantized, attention), translate))
        return _measured(ready, found, options, folder)
    layers, form = layers_by_table(quantized), attention_by_table(program, attention, opset)
    formed = program.then([AttentionForms(form, opset)])
    return Chosen(finished(translate(formed), found, target, opset, layers, int4=int4), layers, form, formed)


def _ready(
    program: Lowered, found: Program, opset: int, options: ExportOptions, candidates: _Candidates, translate: Translate
) -> Iterator[tuple[str, Chosen]]:
    """What there is to measure, by name, the plain one first."""
    known: list[list[str]] = []
    models: list[tuple[str, Lowered, ir.Model]] = []
    for form in candidates.attention:
        formed = program.then([AttentionForms(form, opset)])
        got = [each for _, each in forms_in(formed.exported.graph.nodes)]
        if got not in known:  # a form that no site could take is one of the others again
            known.append(got)
            models.append((form, formed, translate(formed)))
    for layers, (form, formed, model) in itertools.product(candidates.quantized or (None,), models):
        made = finished(model, found, options.where, opset, layers, int4=options.int4_initializers)
        yield candidates.name(layers, form), Chosen(made, layers, form, formed)


def _measured(ready: dict[str, Chosen], found: Program, options: ExportOptions, folder: Path) -> Chosen:
    plain = next(iter(ready))
    if len(ready) == 1:
        return ready[plain]
    feeds = found.feeds(found.flat_inputs())
    question = _question(ready[plain].model, list(ready), feeds, options.threads)
    known = measurement("forms", question)
    if known is None or known[0] not in ready:
        known = _fastest(plain, ready, feeds, options, folder)
        remember("forms", question, known)
    name, ratios = known
    chosen = ready[name]
    return replace(chosen, ratios=ratios)


def _fastest(
    plain: str, ready: Mapping[str, Chosen], feeds: Mapping[str, torch.Tensor], options: ExportOptions, folder: Path
) -> tuple[str, dict[str, float]]:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        files: dict[str, Path] = {}
        for name, candidate in ready.items():
            files[name] = Path(place, str(len(files)), "model.onnx")
            files[name].parent.mkdir()
            save_model(candidate.model, files[name], limit=options.external_data_above)
        return fastest(plain, files, feeds, threads=options.threads, seconds=options.measure_seconds, progress=options.progress)


def _question(plain: ir.Model, forms: list[str], feeds: Mapping[str, torch.Tensor], threads: int | None) -> dict[str, Any]:
    """What a measurement of forms depends on: machine, runtime, threads, inputs, and the ops of the model with their sizes."""
    ort = need("onnxruntime", extra="onnx")
    digest = hashlib.sha256()
    for node in plain.graph:
        digest.update(repr((node.domain, node.op_type, [dims(v) for v in node.inputs])).encode())
    return {
        "cpu": cpu_model(),
        "threads": default_threads() if threads is None else threads,
        "onnxruntime": ort.__version__,
        "normfuse": normfuse.__version__,
        "forms": forms,
        "inputs": {name: [str(x.dtype), *x.shape] for name, x in feeds.items()},
        "model": digest.hexdigest(),
    }
