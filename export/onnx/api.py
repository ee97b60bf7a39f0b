"""`to_onnx`: a module as an ONNX file that was run and compared before it appears."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from normfuse.errors import ExportError, UsageError
from normfuse.export.keywords import given, keywords_of
from normfuse.export.lowering.layers import quantized_layers
from normfuse.export.lowering.lowering import Lowered, lowered
from normfuse.export.lowering.told import forms_of
from normfuse.export.onnx.choice.candidates import Chosen, choose
from normfuse.export.onnx.lower import finished, translated
from normfuse.export.onnx.medium import OnnxFile
from normfuse.export.onnx.oldest import needs, signature
from normfuse.export.onnx.precision import to_precision
from normfuse.export.onnx.precision.mixed_norms import one_dtype_norms
from normfuse.export.onnx.precision.other_dtype import in_another_dtype
from normfuse.export.onnx.program import Program, program
from normfuse.export.onnx.proven import Proof, Proven, tensor_dtypes
from normfuse.export.onnx.quantized.forms import FORMS, passes_of, possible_forms
from normfuse.export.onnx.quantized.native import keep_nodes
from normfuse.export.onnx.runtime import session
from normfuse.export.onnx.writer.metadata import origin
from normfuse.export.onnx.writer.save import MAX_PROTO, data_files, drop_stale, save_model
from normfuse.export.options import ExportKeywords, ExportOptions
from normfuse.export.result import Exported
from normfuse.export.runtimes import Release, parse_runtime, spelled_runtime
from normfuse.export.targets import MIN_OPSET, AttentionForm, Target
from normfuse.extras import need
from normfuse.files import atomic, check_target
from normfuse.ir.passes import Pass
from normfuse.passes.attention.eager import EagerAttention
from normfuse.passes.attention.static_masks import StaticMasks
from normfuse.passes.fuse.softmaxes import DividedLast, FlatSoftmax
from normfuse.passes.streams.half_range import HalfRange
from normfuse.reports.model import Form
from normfuse.surroundings import undisturbed

if TYPE_CHECKING:
    import onnx_ir as ir
    from typing_extensions import Unpack

__all__ = ["to_onnx", "write_onnx"]

_ONNX = OnnxFile()

#: Operators that round what they read to integers.
_ROUNDS = ("shiftquant_linear",)


@keywords_of(ExportOptions)
def to_onnx(
    gm: nn.Module,
    path: str | Path,
    options: ExportOptions | None = None,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    **keywords: Unpack[ExportKeywords],
) -> Exported:
    """Write `gm` to `path` as ONNX for `target`; the file appears only after it was checked, run and compared.

    Args:
        gm: what `normfuse.optimize` returned; any other module in eval mode works with `example_inputs`.
        path: the file to write.
        options: all that follows as one value; what is given by name goes before it.
        target: `onnxruntime` (the form that is fastest on its CPU, contrib ops included), `tensorrt` or `portable`
            (standard ops alone).
        opset: 17 to 23; each target has a default. RMSNormalization exists from 23 on and is spelt out below.
        runtime: the oldest ONNX Runtime that must run the file, e.g. "1.20"; the opset, the version of the format and the ops are
            chosen for it. Every file says which one it needs: `Exported.runtime`, and its metadata.
        example_inputs: a tuple of positional inputs or a dict of keyword inputs; by default those of `normfuse.optimize`.
        dynamic_shapes: as in `torch.export.export`; by default those of `normfuse.optimize`.
        form: of quantized layers: `native` (ops of normfuse's kernels; a stock ONNX Runtime runs the functions beside them),
            `integer` (standard integer ops), `qdq` (QuantizeLinear and DequantizeLinear, static scales), or `auto`: for ONNX
            Runtime `native` where the kernels are built; else `qdq` where scales are static, and else `integer`.
        int4_initializers: keep weights of up to 4 bits as INT4 in an `integer` or `qdq` file; the runtime expands them to bytes
            when it loads, which takes it longer and more memory.
        attention: `decomposed`, `attention23`, `mha`, `qkv`, `native`, or `auto`: for ONNX Runtime by a table of measurements
            (`normfuse.export.onnx.choice.table`), for other targets their default.
        verify: run the file in ONNX Runtime and compare it with `gm` on the example inputs, on random ones and, where
            axes may vary, at another size. Without it the file is only checked.
        tolerance: bound on max |difference| / max |expected|; by default 1e-9, 1e-4, 2e-2, 1e-1 for float64, float32,
            float16, bfloat16. A quantized model is held to an SQNR instead: 40 dB, or 10 dB below what roundings of its
            weights alone lead to, because a float on a tie in front of a quantization may get the neighbouring code.
        threads: threads of ONNX Runtime for measuring; by default the CPUs of the process.
        tune: measure, on the example inputs, which form of attention (and, without kernels, of quantized layers) is fastest,
            instead of asking the table. What was found is kept for this machine, model and runtime (`normfuse.cache`).
        measure_seconds: about how long to measure in all, with `tune`.
        external_data_above: weights above this many bytes go to a second file, `<name>.<hash>.data`.
        dtype: what the file computes in: `fp32`, `fp16`, `bf16` or `fp64` (also `float16`, `half`, `torch.float16` and so on).
            `fp16` and `bf16` are mixed precision, with statistics of norms in float32 (see `normfuse.export.onnx.precision`); a
            float16 model stays as it is written. A file in bf16 is compared before it is converted: ONNX Runtime cannot run it on
            the CPU. By default the dtype of the model, or float32 where the target cannot compute in it: bfloat16, and float64
            with operators such as Conv, Erf or Gelu, in ONNX Runtime; quantized layers are always scaled in float32. A note says
            so, and the file is held against the model as it was given.
        io_dtype: `fp32` keeps inputs and outputs in float32; `low` makes them as narrow as the rest.
        force: replace an existing file.
        progress: show a bar while measuring, on a terminal.

    Raises:
        UsageError: an argument is wrong, the target exists, or it cannot be written.
        ExportError: the model cannot be captured, translated or run, or the error is above the tolerance.
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
    """
    chosen = given(ExportOptions, options, keywords, called="to_onnx")
    return write_onnx(gm, path, chosen, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)[0]


@undisturbed()
def write_onnx(
    gm: nn.Module,
    path: str | Path,
    options: ExportOptions,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    kept: Sequence[str] = (),
    medium: OnnxFile = _ONNX,
) -> tuple[Exported, Program]:
    """`to_onnx`, and the program that was written.

    Args:
        kept: names in `torch.ops.normfuse` that stay nodes of the domain `normfuse`, each with a function body.
        medium: the kind of file.
    """
    path = check_target(path, force=options.force)
    for module in medium.libraries:
        need(module, extra=medium.extra)
    found = _captured(gm, example_inputs, dynamic_shapes, options)
    changed = in_another_dtype(found, options.where, options.computes_in, verify=options.verify)
    replaced = data_files(path) if path.exists() else ()
    with atomic(path, force=options.force) as temporary:
        draft = _lowered(found, options, kept, temporary.parent)
        proof = Proof(found, options, draft.chosen.layers, draft.rounds, kept, medium)
        try:
            proven, bound = _written(draft, proof, temporary)
        except ExportError as e:
            if not draft.told:
                raise
            raise ExportError(f"{e}; {'; '.join(draft.told)}") from e
        facts = origin(gm, found, draft.chosen.model, options.where, draft.opset)
        medium.tell(temporary, facts | _facts(draft, proven, bound))
        result = _result(temporary, draft, proof, proven, bound)
        result = dataclasses.replace(result, path=path, notes=(*found.notes, *changed, *draft.told, *proven.notes))
    drop_stale(replaced, path)
    return result, found


def _captured(gm: nn.Module, example_inputs: Any, dynamic_shapes: Any, options: ExportOptions) -> Program:
    """The module as a program in a dtype in which it can be run; in float32 where the runtime lacks float64 for it."""
    where, asked = options.where, options.computes_in
    found = program(gm, example_inputs, dynamic_shapes, dtype=asked, target=where)
    lacking = _lacks_double(found, where, options.newest)
    if lacking is None:
        return found
    if asked is None:
        return program(gm, example_inputs, dynamic_shapes, dtype="fp32", target=where)
    if options.verify:
        raise ExportError(
            f"ONNX Runtime has no float64 kernels on the CPU for this model ({lacking}); export it in float32, or pass "
            "verify=False to write it for another device"
        )
    return found


@dataclass(frozen=True)
class _Draft:
    """A model in its forms; `rounds`: to integers, on its way; `forms`: of each site; `told`: what was scaled, and what failed."""

    chosen: Chosen
    opset: int
    rounds: bool
    forms: tuple[Form, ...] = ()
    told: tuple[str, ...] = ()

    @property
    def attentions(self) -> dict[str, int]:
        """Number of attentions in float, by their form."""
        return dict(Counter(f.form for f in self.forms if f.kind == "attention" and f.form in get_args(AttentionForm)))


def _lowered(found: Program, options: ExportOptions, kept: Sequence[str], folder: Path) -> _Draft:
    """In the newest opset that the runtime takes: an op may have come to it later than its opset did."""
    older = options.opset is None and options.runtime is not None
    for opset in range(options.newest, MIN_OPSET - 1, -1) if older else (options.newest,):
        one_dtype_norms(found.exported)
        every = quantized_layers(found.exported)
        layers = [each for each in every if each.operator not in kept]
        forms = possible_forms(layers, options.where, opset, options.form, int4=options.int4_initializers)
        half = (HalfRange(),) if _computes_in_half(found, options) else ()
        passes = (StaticMasks(), *half, EagerAttention(), *passes_of(forms), *_softmaxes(options))
        program = lowered(found.exported, passes, [list(found.flat_inputs())])
        chosen = choose(program, found, opset, options, forms, folder, partial(_translated, found, options.where, opset, kept=kept))
        oldest, reason = max(needs(chosen.model))
        if options.runtime is None or oldest <= parse_runtime(options.runtime):
            rounds = chosen.layers is not None and FORMS[chosen.layers].rounds
            rounds = rounds or any(each.operator in _ROUNDS and each.operator in kept for each in every)
            sites = forms_of(chosen.program, chosen.attention, chosen.layers, opset)
            return _Draft(chosen, opset, rounds, sites, (*chosen.program.notes(HalfRange.name), *chosen.program.failures))
    raise _too_new(options.runtime, oldest, reason)


def _written(draft: _Draft, proof: Proof, file: Path) -> tuple[Proven, float]:
    """Convert the model to its dtype, write it to `file`, check it and prove it; what was found, and the bound that was held.

    ONNX Runtime has no kernels for bfloat16: there what is converted is proven.
    """
    options, model, medium = proof.options, draft.chosen.model, proof.medium
    low = options.computes_in or "fp32"
    proven = Proven()
    if low == "bf16" and options.verify:
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            plain = Path(folder, file.name)
            medium.save(model, plain, limit=options.external_data_above)
            medium.check(plain)
            proven = proof.of(plain, proof.bound(model)).noting("compared in float32, before the conversion to bfloat16")
    proven = proven.noting(*to_precision(model, low, io_dtype=options.io_dtype, own_in_fp32=options.where.own_in_float32))
    oldest, reason = max(needs(model))
    if options.runtime is not None and oldest > parse_runtime(options.runtime):
        raise _too_new(options.runtime, oldest, reason)
    medium.save(model, file, limit=options.external_data_above)
    medium.check(file)
    bound = proof.bound(model)
    if not options.verify:
        return proven.noting("not run: verify=False"), bound
    if low == "bf16":
        return proven, bound
    run = proof.of(file, bound, half=low == "fp16")
    return dataclasses.replace(run, notes=(*proven.notes, *run.notes)), bound


def _facts(draft: _Draft, proven: Proven, bound: float) -> dict[str, str]:
    """What the file says of its forms and of its proof."""
    chosen, facts = draft.chosen, {}
    if draft.attentions:
        facts["attention"] = chosen.attention
    if proven.error is not None:
        facts |= {"error": f"{proven.error.max_rel:.3e}", "error_dtype": proven.error.dtype, "tolerance": f"{bound:.0e}"}
    if chosen.layers is not None:
        facts["form"] = chosen.layers
    facts["runtime"] = spelled_runtime(max(needs(chosen.model))[0])
    return facts


def _result(file: Path, draft: _Draft, proof: Proof, proven: Proven, bound: float) -> Exported:
    chosen = draft.chosen
    model, error = chosen.model, proven.error
    ops, norms = proof.medium.counts(file)
    return Exported(
        path=file,
        target=proof.options.target,
        opset=draft.opset,
        runtime=spelled_runtime(max(needs(model))[0]),
        signature=signature(model),
        bytes=sum(f.stat().st_size for f in file.parent.iterdir()),
        weight_bytes=sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None),
        ops=ops,
        norms=norms,
        inputs=proof.found.inputs,
        outputs=proof.found.outputs,
        error=error,
        tolerance=None if error is None or bound == math.inf else bound,
        attention=chosen.attention if draft.attentions else None,
        attention_sites=draft.attentions,
        forms=draft.forms,
        ratios=chosen.ratios,
        form=chosen.layers,
        sqnr=proven.sqnr if draft.rounds or chosen.layers is not None else None,
    )


def _translated(found: Program, target: Target, opset: int, program: Lowered, kept: Sequence[str] = ()) -> ir.Model:
    """What passes made of `found`, with attention and quantized layers as markers; those named in `kept` are nodes already."""
    written = dataclasses.replace(found, exported=program.exported)
    model = translated(written, opset, contrib=bool(target.domains) and _is_float32(found))
    keep_nodes(model, kept)
    return model


def _lacks_double(found: Program, target: Target, opset: int) -> str | None:
    """What the runtime says of the plain form of a model in float64, before any work goes into it; None where it takes it."""
    if torch.float64 not in tensor_dtypes(found) or "fp64" in target.lacks:
        return None
    if quantized_layers(found.exported):
        return None
    one_dtype_norms(found.exported)
    model = _translated(found, target, opset, lowered(found.exported, (StaticMasks(),)))
    plain = finished(model, found, target, opset)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "float64.onnx")
        save_model(plain, file, limit=MAX_PROTO)
        try:
            session(file, threads=1, optimized=False)
        except ExportError as e:
            return str(e) if "NOT_IMPLEMENTED" in str(e) else None
    return None


def _computes_in_half(found: Program, options: ExportOptions) -> bool:
    """The file's products and sums are in float16, whose range ends at 65504."""
    asked = options.computes_in
    return asked == "fp16" or (asked is None and torch.float16 in tensor_dtypes(found))


def _too_new(runtime: str | None, oldest: Release, reason: str) -> UsageError:
    return UsageError(f"runtime={runtime!r}: the file needs ONNX Runtime {spelled_runtime(oldest)}, for {reason}")


def _softmaxes(options: ExportOptions) -> tuple[Pass, ...]:
    """The layouts that its CPU kernels are fast in; in a file of halves softmax stays one operator, whose sum is in float32."""
    if not options.where.runs_here:
        return ()
    return (DividedLast(), FlatSoftmax()) if options.computes_in in (None, "fp32") else (FlatSoftmax(),)


def _is_float32(found: Program) -> bool:
    """The ops of ONNX Runtime are fast, or there at all, in float32 alone."""
    return not tensor_dtypes(found) & {torch.float64, torch.float16, torch.bfloat16}
