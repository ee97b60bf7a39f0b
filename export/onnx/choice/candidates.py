"""Forms of attention and of quantized layers: which are possible for a model, and which one its file gets."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import normfuse
from normfuse.benchmark.machine import cpu_model
from normfuse.cache import measurement, remember
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
from normfuse.reports.model import Form

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Chosen", "choose"]


@dataclass(frozen=True)
class Chosen:
    """A model in its forms.

    Attributes:
        model: ready to be written.
        layers: form of quantized layers; None without any.
        attention: form of attention that was asked for.
        sites: what each attention site got.
        ratios: latency of the plain form over that of each form that was measured.
    """

    model: ir.Model
    layers: str | None
    attention: str
    sites: list[Form]
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Candidates:
    """What to try: forms of quantized layers (none for a model without), forms of attention, the plain ones first."""

    quantized: tuple[str, ...]
    attention: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str | None, str]]:
        return iter(itertools.product(self.quantized or (None,), self.attention))


def choose(model: ir.Model, found: Program, opset: int, options: ExportOptions, quantized: tuple[str, ...], folder: Path) -> Chosen:
    """The translated `model` in the forms that `options` ask for; where they leave that open by the table, or by measuring files in
    `folder`. `quantized` are the forms that its quantized layers may take.

    Raises:
        UsageError: a form that is asked for is not possible here.
    """
    target, int4 = options.where, options.int4_initializers
    attention = attention_forms(target, opset, options.attention, native=any(FORMS[f].kernels for f in quantized))
    if options.tune:
        return _measured(model, found, opset, options, _Candidates(quantized, attention), folder)
    layers, form = layers_by_table(quantized), attention_by_table(model, attention)
    ready, sites = finished(model, found, target, opset, form, layers, int4=int4)
    return Chosen(ready, layers, form, sites)


def _measured(model: ir.Model, found: Program, opset: int, options: ExportOptions, candidates: _Candidates, folder: Path) -> Chosen:
    ready: dict[str, Chosen] = {}
    for quantized, form in candidates:
        made, sites = finished(model, found, options.where, opset, form, quantized, int4=options.int4_initializers)
        # a form that no site could take is one of the others again
        if [s.form for s in sites] not in [[s.form for s in c.sites] for c in ready.values() if c.layers == quantized]:
            name = form if len(candidates.quantized) < 2 else " ".join(filter(None, (quantized, form)))
            ready[name] = Chosen(made, quantized, form, sites)
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
    return Chosen(chosen.model, chosen.layers, chosen.attention, chosen.sites, ratios)


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
