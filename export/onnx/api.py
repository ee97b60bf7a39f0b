"""`to_onnx`: a module as an ONNX file that was run and compared before it appears."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import math
import operator
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normfuse
from normfuse import native
from normfuse.benchmark.machine import cpu_model
from normfuse.cache import measurement, remember
from normfuse.errors import ExportError, UsageError
from normfuse.export.onnx.build import dims
from normfuse.export.onnx.choose import fastest
from normfuse.export.onnx.compare import compare, tolerance_for
from normfuse.export.onnx.inspect import norm_counts, op_counts
from normfuse.export.onnx.lower import finished, translated
from normfuse.export.onnx.mixed_norms import one_dtype_norms
from normfuse.export.onnx.oldest import needs, signature
from normfuse.export.onnx.other_dtype import in_another_dtype
from normfuse.export.onnx.outline import outline
from normfuse.export.onnx.precision import to_precision
from normfuse.export.onnx.precision.spelling import spelled_dtype
from normfuse.export.onnx.program import Program, program
from normfuse.export.onnx.quantized.forms import is_quantized, possible_forms
from normfuse.export.onnx.quantized.native import keep_nodes
from normfuse.export.onnx.quantized.weights_alone import AS_WRITTEN, weights_alone
from normfuse.export.onnx.runtime import default_threads, session
from normfuse.export.onnx.save import MAX_PROTO, data_files, drop_stale, save_model, sha256_of_tensors, weights_sha256
from normfuse.export.onnx.static_masks import simplify_masks
from normfuse.export.onnx.table import attention_by_table, layers_by_table
from normfuse.export.result import Exported
from normfuse.export.runtimes import Release, parse_runtime, spelled_runtime
from normfuse.export.targets import ATTENTION_FORMS, MAX_OPSET, MIN_OPSET, NATIVE_ATTENTION, Target, opset_for, target_named
from normfuse.extras import need
from normfuse.files import atomic, check_target, spelled
from normfuse.record import record
from normfuse.report import Error
from normfuse.surroundings import undisturbed

__all__ = ["to_onnx", "write_onnx"]

log = logging.getLogger(__name__)


def to_onnx(
    gm: nn.Module,
    path: str | Path,
    *,
    target: str = "onnxruntime",
    opset: int | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    form: str = "auto",
    int4_initializers: bool = False,
    attention: str = "auto",
    verify: bool = True,
    tolerance: float | None = None,
    threads: int | None = None,
    runtime: str | None = None,
    tune: bool = False,
    measure_seconds: float = 10.0,
    external_data_above: int = MAX_PROTO,
    dtype: str | torch.dtype | None = None,
    io_dtype: str = "fp32",
    force: bool = False,
    progress: bool = True,
) -> Exported:
    """Write `gm` to `path` as ONNX for `target`; the file appears only after it was checked, run and compared.

    Args:
        gm: what `normfuse.optimize` returned; any other module in eval mode works with `example_inputs`.
        path: the file to write.
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
            (`normfuse.export.onnx.table`), for other targets their default.
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
    return write_onnx(
        gm, path, target=target, opset=opset, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes, form=form,
        int4_initializers=int4_initializers, attention=attention, verify=verify, tolerance=tolerance, threads=threads,
        runtime=runtime, tune=tune, measure_seconds=measure_seconds, external_data_above=external_data_above, dtype=dtype,
        io_dtype=io_dtype, force=force, progress=progress,
    )[0]  # fmt: skip


@undisturbed()
def write_onnx(
    gm: nn.Module,
    path: str | Path,
    *,
    target: str,
    opset: int | None,
    example_inputs: Any,
    dynamic_shapes: Any,
    form: str,
    int4_initializers: bool,
    attention: str,
    verify: bool,
    tolerance: float | None,
    threads: int | None,
    runtime: str | None,
    tune: bool,
    measure_seconds: float,
    external_data_above: int,
    dtype: str | torch.dtype | None,
    io_dtype: str,
    force: bool,
    progress: bool,
    kept: Sequence[str] = (),
) -> tuple[Exported, Program]:
    """`to_onnx`, and the program that was written.

    Args:
        kept: names in `torch.ops.normfuse` that stay nodes of the domain `normfuse`, each with a function body.
    """
    where = target_named(target)
    newest = opset_for(where, opset, runtime)
    asked = None if dtype is None else spelled_dtype(dtype)
    _forms(where, newest, attention, native=True)
    path = check_target(path, force=force)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        need(module, extra="onnx")
    found = program(gm, example_inputs, dynamic_shapes, dtype=asked, target=where)
    lacking = _lacks_double(found, where, newest)
    if lacking is not None and asked is None:
        found = program(gm, example_inputs, dynamic_shapes, dtype="fp32", target=where)
    elif lacking is not None and verify:
        raise ExportError(
            f"ONNX Runtime has no float64 kernels on the CPU for this model ({lacking}); export it in float32, or pass "
            "verify=False to write it for another device"
        )
    changed = in_another_dtype(found, where, asked, verify=verify)
    low = asked or "fp32"
    replaced = data_files(path) if path.exists() else ()
    with atomic(path, force=force) as temporary:
        # an op may have come to the runtime later than its opset did: then an older one
        for version in range(newest, MIN_OPSET - 1, -1) if opset is None and runtime is not None else (newest,):
            model = _translated(found, where, version)
            integers = keep_nodes(model, [name for name in kept if name in _ROUNDS])
            keep_nodes(model, kept)
            quantized = possible_forms(model, where, version, form, int4=int4_initializers)
            forms = _forms(where, version, attention, native="native" in quantized)
            with tempfile.TemporaryDirectory(dir=temporary.parent) as folder:
                (layers, chosen), sites, ratios, ready = _chosen(
                    model, found, where, version, Candidates(quantized, forms, int4_initializers), Path(folder), threads,
                    measure_seconds if tune else None, progress, external_data_above,
                )  # fmt: skip
            del model
            oldest, reason = max(needs(ready))
            if runtime is None or oldest <= parse_runtime(runtime):
                break
        else:
            raise _too_new(runtime, oldest, reason)
        rounds = integers > 0 or layers not in (None, "weight_only")
        proof: tuple[Error, float] | None = None
        notes: tuple[str, ...] = ()
        if low == "bf16" and verify:  # ONNX Runtime has no kernels for it: what is converted is proven
            with tempfile.TemporaryDirectory(dir=temporary.parent) as folder:
                plain = Path(folder, "float32.onnx")
                save_model(ready, plain, limit=external_data_above)
                bound = _bound(tolerance, ready, rounds)
                proof, notes = _proven(found, plain, where, bound, threads, layers, rounds=rounds, kept=kept)
            notes = (*notes, "compared in float32, before the conversion to bfloat16")
        notes = (*changed, *notes, *to_precision(ready, low, io_dtype=io_dtype, own_in_fp32=where.contrib))
        oldest, reason = max(needs(ready))
        if runtime is not None and oldest > parse_runtime(runtime):
            raise _too_new(runtime, oldest, reason)
        save_model(ready, temporary, limit=external_data_above)
        bound = _bound(tolerance, ready, rounds)
        run = verify and low != "bf16"
        again, more = _proven(
            found, temporary, where, bound, threads, layers, rounds=rounds, kept=kept, verify=run, half=low == "fp16"
        )
        proof, notes = (proof, notes) if proof is not None else (again, (*notes, *more))
        error, sqnr = (None, None) if proof is None else proof
        facts = _facts(gm, found, ready, where, version, chosen if sites else None, error, bound)
        if layers is not None:
            facts["normfuse.form"] = layers
        facts["normfuse.runtime"] = spelled_runtime(oldest)
        _append_metadata(temporary, facts)
        size = sum(f.stat().st_size for f in temporary.parent.iterdir())
        graph = outline(temporary)
        result = Exported(
            path=path,
            target=where.name,
            opset=version,
            runtime=spelled_runtime(oldest),
            signature=signature(ready),
            bytes=size,
            weight_bytes=sum(v.const_value.nbytes for v in ready.graph.initializers.values() if v.const_value is not None),
            ops=op_counts(graph),
            norms=norm_counts(graph),
            inputs=found.inputs,
            outputs=found.outputs,
            error=error,
            tolerance=None if error is None or bound == math.inf else bound,
            attention=chosen if sites else None,
            attention_sites=sites,
            ratios=ratios,
            form=layers,
            sqnr=sqnr if rounds or layers is not None else None,
            notes=(*found.notes, *notes),
        )
    drop_stale(replaced, path)
    return result, found


def _translated(found: Program, target: Target, opset: int) -> Any:
    simplify_masks(found.exported)
    one_dtype_norms(found.exported)
    return translated(found, opset, contrib=target.contrib and _is_float32(found))


def _lacks_double(found: Program, target: Target, opset: int) -> str | None:
    """What the runtime says of the plain form of a model in float64, before any work goes into it; None where it takes it."""
    if torch.float64 not in _tensor_dtypes(found) or target.name == "tensorrt":
        return None
    model = _translated(found, target, opset)
    if is_quantized(model):
        return None
    plain, _ = finished(model, found, target, opset, "decomposed")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "float64.onnx")
        save_model(plain, file, limit=MAX_PROTO)
        try:
            session(file, threads=1, optimized=False)
        except ExportError as e:
            return str(e) if "NOT_IMPLEMENTED" in str(e) else None
    return None


def _too_new(runtime: str | None, oldest: Release, reason: str) -> UsageError:
    return UsageError(f"runtime={runtime!r}: the file needs ONNX Runtime {spelled_runtime(oldest)}, for {reason}")


def _bound(tolerance: float | None, model: Any, rounds: bool) -> float:
    """What the largest deviation is held to; infinite where an SQNR is asked for instead."""
    if tolerance is not None:
        return tolerance
    return math.inf if rounds else tolerance_for(_dtypes(model))


_HALF = " (float16 may be too narrow for its values: export it in bf16, or state a larger tolerance)"
#: Operators that round what they read to integers.
_ROUNDS = ("shiftquant_linear",)


@dataclass(frozen=True)
class Candidates:
    """What to try: forms of quantized layers (none for a model without), forms of attention, the plain ones first."""

    quantized: tuple[str, ...]
    attention: tuple[str, ...]
    int4: bool

    def __iter__(self) -> Iterator[tuple[str | None, str]]:
        return iter(itertools.product(self.quantized or (None,), self.attention))


def _forms(target: Target, opset: int, attention: str, *, native: bool) -> tuple[str, ...]:
    """The forms of attention to try, the plain one first."""
    possible = target.attention_at(opset, native=native)
    if attention == "auto":
        return possible if target.contrib else possible[:1]
    known = (*ATTENTION_FORMS, NATIVE_ATTENTION)
    if attention not in known:
        raise UsageError(f"unknown form of attention {attention!r}: expected auto, {', '.join(known)}")
    if attention not in possible:
        if attention == NATIVE_ATTENTION and target.contrib:
            reason = "stands in files whose quantized layers are in the native form"
        else:
            reason = "needs opset 23" if attention in target.attention else f"uses ops that target {target.name!r} does not have"
        raise UsageError(f"attention={attention!r} {reason}; possible here: auto, {', '.join(possible)}")
    return (attention,)


def _chosen(
    model: Any,
    found: Program,
    target: Target,
    opset: int,
    candidates: Candidates,
    folder: Path,
    threads: int | None,
    seconds: float | None,
    progress: bool,
    limit: int,
) -> tuple[tuple[str | None, str], dict[str, int], dict[str, float], Any]:
    """Names of the forms of quantized layers and attention, sites by form, measured ratios, and the model to write.

    Without `seconds` the table chooses.
    """
    if seconds is None:
        layers = layers_by_table(candidates.quantized)
        form = attention_by_table(model, tuple(candidates.attention))
        ready, sites = finished(model, found, target, opset, form, layers, int4=candidates.int4)
        return (layers, form), sites, {}, ready
    return _measured(model, found, target, opset, candidates, folder, threads, seconds, progress, limit)


def _measured(
    model: Any, found: Program, target: Target, opset: int, candidates: Candidates, folder: Path, threads: int | None,
    seconds: float, progress: bool, limit: int,
) -> tuple[tuple[str | None, str], dict[str, int], dict[str, float], Any]:  # fmt: skip
    """The same by measuring."""
    ready: dict[tuple[str | None, str], tuple[Any, dict[str, int]]] = {}
    for quantized, form in candidates:
        candidate = finished(model, found, target, opset, form, quantized, int4=candidates.int4)
        # a form that no site could take is one of the others again
        if candidate[1] not in [sites for (other, _), (_, sites) in ready.items() if other == quantized]:
            ready[quantized, form] = candidate
    plain = next(iter(ready))
    if len(ready) == 1:
        return plain, ready[plain][1], {}, ready[plain][0]
    names = {key: key[1] if len(candidates.quantized) < 2 else " ".join(filter(None, key)) for key in ready}
    files: dict[str, Path] = {}
    for key, (candidate, _) in ready.items():
        place = folder / str(len(files))
        place.mkdir()
        files[names[key]] = place / "model.onnx"
        save_model(candidate, files[names[key]], limit=limit)
    feeds = found.feeds(found.flat_inputs())
    question = _measured_for(ready[plain][0], list(files), feeds, threads)
    known = measurement("forms", question)
    if known is None or known[0] not in files:
        known = fastest(names[plain], files, feeds, threads=threads, seconds=seconds, progress=progress)
        remember("forms", question, known)
    name, ratios = known
    chosen = next(key for key in ready if names[key] == name)
    return chosen, ready[chosen][1], ratios, ready[chosen][0]


def _measured_for(plain: Any, forms: list[str], feeds: Mapping[str, torch.Tensor], threads: int | None) -> dict[str, Any]:
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


def _proven(
    found: Program,
    file: Path,
    target: Target,
    bound: float,
    threads: int | None,
    layers: str | None,
    *,
    rounds: bool,
    kept: Sequence[str] = (),
    verify: bool = True,
    half: bool = False,
) -> tuple[tuple[Error, float] | None, tuple[str, ...]]:
    """Check the file, run it, compare it; error and SQNR. Without a run there is none, and a note says why."""
    _check(file)
    if not verify:
        return None, ("not run: verify=False",)
    config = {} if target.contrib or layers is None else AS_WRITTEN
    notes: tuple[str, ...] = ()
    try:
        # nodes that wait for plugins are there in any form and type; our CPU kernels take float32
        sessions = [session(file, threads=threads, config=config, kernels=layers == "native")]
        if layers == "native" and native.available():
            sessions.append(session(file, threads=threads, kernels=False))
        elif layers == "native":
            notes = (f"run without normfuse's kernels: {native.why_not()}",)
    except ExportError as e:
        lacking = _without_kernels(found, e)
        if lacking is None:
            raise
        has_none = f"ONNX Runtime has no {lacking} kernels on the CPU for this model"
        if target.name == "onnxruntime" or lacking == "float64":
            other = "float32" if lacking == "float64" else "float32 or float16"
            raise ExportError(f"{has_none} ({e}); export it in {other}, or pass verify=False to write it for another device") from e
        return None, (f"not run: {has_none}",)
    meant = weights_alone(found, kept) if layers == "weight_only" else found
    proofs = [compare(meant, opened, quantized=rounds, half=half, bound=bound) for opened in sessions]
    error, worst = functools.reduce(operator.or_, (p.error for p in proofs)), min(proofs, key=lambda p: p.sqnr - p.wanted)
    sqnr, wanted = worst.sqnr, worst.wanted
    notes = (*notes, *dict.fromkeys(note for p in proofs for note in p.notes))
    fault = next((p.fault for p in proofs if p.fault), "")
    if fault and (not error.max_rel <= bound or bound == math.inf):
        raise ExportError(f"{fault}: the runtime leaves the range of the dtype; nothing was written{_HALF if half else ''}")
    if not error.max_rel <= bound:
        raise ExportError(
            f"the exported model deviates from the module by {error.max_rel:.1e} relative, above the bound {bound:.0e}; "
            f"nothing was written{_HALF if half else ''}"
        )
    if bound == math.inf and not sqnr >= wanted:
        raise ExportError(
            f"the exported model has {sqnr:.0f} dB against the module, and a quantized one must have {wanted:.0f}; "
            "nothing was written"
        )
    if layers == "weight_only":
        sqnr = compare(found, sessions[0], half=half).sqnr
        which = "of what is in no plugin " if rounds else ""
        notes = (*notes, f"activations {which}stay floats: {sqnr:.0f} dB against the module, which rounds them")
    return (error, sqnr), notes


def _check(file: Path) -> None:
    """Is the file valid ONNX, with shapes and types that fit? Its weights are not read for that.

    Raises:
        ExportError: it is not.
    """
    onnx = need("onnx", extra="onnx")
    beside = file.with_name(f"{file.name}.outline")  # by path: the checker then looks for external data
    try:
        beside.write_bytes(outline(file).SerializeToString())
        onnx.checker.check_model(spelled(beside), full_check=True)
    except Exception as e:
        raise _invalid(e) from e
    finally:
        beside.unlink(missing_ok=True)


def _invalid(e: Exception) -> ExportError:
    """What the checker says; most of the time that operators of an older opset do not take a dtype."""
    said = " ".join(str(e).split())[:500]
    dtype = re.search(r"unsupported type: (tensor\((\w+)\))", said)
    if dtype is None:
        return ExportError(f"the exported model is not valid ONNX: {said}")
    op = re.search(r"op_type:\s*(\w+)", said)
    newer = "with opset=23, or " if op is not None and _takes(op[1], dtype[1]) else ""
    return ExportError(f"an operator of this ONNX opset does not take {dtype[2]} ({said}); export {newer}in float32")


def _takes(op: str, dtype: str) -> bool:
    """The newest opset that is written takes it."""
    onnx = need("onnx", extra="onnx")
    schema = onnx.defs.get_schema(op, MAX_OPSET) if onnx.defs.has(op) else None
    return schema is not None and any(dtype in c.allowed_type_strs for c in schema.type_constraints)


def _without_kernels(found: Program, e: ExportError) -> str | None:
    """The dtype of the model for which the runtime lacks kernels, where it says so; of bfloat16 it lacks nearly all."""
    dtypes = _tensor_dtypes(found)
    if torch.bfloat16 in dtypes:
        return "bfloat16"
    return "float64" if torch.float64 in dtypes and "NOT_IMPLEMENTED" in str(e) else None


def _tensor_dtypes(found: Program) -> set[torch.dtype]:
    return {t.dtype for t in found.exported.state_dict.values()} | {
        t.dtype for t in found.flat_inputs() if isinstance(t, torch.Tensor)
    }


def _is_float32(found: Program) -> bool:
    """The ops of ONNX Runtime are fast, or there at all, in float32 alone."""
    return not _tensor_dtypes(found) & {torch.float64, torch.float16, torch.bfloat16}


def _dtypes(model: Any) -> list[torch.dtype]:
    """Floating dtypes of the values of the graph."""
    ir = need("onnx_ir", extra="onnx")
    known = {
        ir.DataType.DOUBLE: torch.float64,
        ir.DataType.FLOAT: torch.float32,
        ir.DataType.FLOAT16: torch.float16,
        ir.DataType.BFLOAT16: torch.bfloat16,
    }
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    return [known[v.dtype] for v in values if v.dtype in known]


def _facts(
    gm: nn.Module, found: Program, model: Any, target: Target, opset: int, attention: str | None, error: Error | None, bound: float
) -> dict[str, str]:
    """What the file says of its origin."""
    facts = {
        "version": normfuse.__version__,
        "torch": torch.__version__.split("+")[0],
        "target": target.name,
        "opset": str(opset),
        "inputs_sha256": sha256_of_tensors(t for t in found.flat_inputs() if isinstance(t, torch.Tensor)),
        "weights_sha256": weights_sha256(model),
    }
    if attention is not None:
        facts["attention"] = attention
    if error is not None:
        facts |= {"error": f"{error.max_rel:.3e}", "error_dtype": error.dtype, "tolerance": f"{bound:.0e}"}
    made = record(gm)
    if made is not None:
        report = made.report
        facts["passes"] = json.dumps([[p.name, len(p.applied)] for p in report.passes])  # a pass may run twice
        if report.quantization:
            facts["calibration"] = "none" if report.calibration is None else str(report.calibration)
            if report.sqnr is not None:
                facts["sqnr"] = f"{report.sqnr:.1f} dB"
        if report.exact is not None:
            facts["exact"] = f"{report.exact.max_rel:.3e}"
        if report.drift is not None and not report.quantization:  # integers against the same integers say nothing
            facts["drift"] = f"{report.drift.max_rel:.3e}"
    return {f"normfuse.{k}": v for k, v in facts.items()}


def _append_metadata(file: Path, facts: dict[str, str]) -> None:
    """Add `metadata_props` to a written model.

    Protobuf merges messages that stand one behind the other, so the verified bytes stay as they are and are not read again.
    """
    onnx = need("onnx", extra="onnx")
    extra = onnx.ModelProto()
    for key, value in facts.items():
        extra.metadata_props.add(key=key, value=value)
    with file.open("ab") as f:
        f.write(extra.SerializeToString())
