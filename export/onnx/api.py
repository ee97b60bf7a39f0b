"""`to_onnx`: a module as an ONNX file that was run and compared before it appears."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normfuse
from normfuse.errors import ExportError, UsageError
from normfuse.export.onnx.choose import fastest
from normfuse.export.onnx.compare import compare, tolerance_for
from normfuse.export.onnx.inspect import norm_counts, op_counts
from normfuse.export.onnx.lower import finished, translated
from normfuse.export.onnx.program import Program, program
from normfuse.export.onnx.runtime import session
from normfuse.export.onnx.save import MAX_PROTO, data_files, drop_stale, save_model, sha256_of_tensors, weights_sha256
from normfuse.export.onnx.static_masks import simplify_masks
from normfuse.export.result import Exported
from normfuse.export.targets import ATTENTION_FORMS, Target, opset_for, target_named
from normfuse.extras import need
from normfuse.files import atomic, check_target
from normfuse.record import record
from normfuse.report import Error

__all__ = ["to_onnx"]

log = logging.getLogger(__name__)


def to_onnx(
    gm: nn.Module,
    path: str | Path,
    *,
    target: str = "onnxruntime",
    opset: int | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    attention: str = "auto",
    verify: bool = True,
    tolerance: float | None = None,
    threads: int | None = None,
    measure_seconds: float = 10.0,
    external_data_above: int = MAX_PROTO,
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
        example_inputs: a tuple of positional inputs or a dict of keyword inputs; by default those of `normfuse.optimize`.
        dynamic_shapes: as in `torch.export.export`; by default those of `normfuse.optimize`.
        attention: `decomposed`, `attention23`, `mha`, `qkv`, or `auto`: for ONNX Runtime the one that measures fastest
            on the example inputs, for other targets their default.
        verify: run the file in ONNX Runtime and compare it with `gm` on the example inputs, on random ones and, where
            axes may vary, at another size. Without it the file is only checked.
        tolerance: bound on max |difference| / max |expected|; by default 1e-9, 1e-4, 2e-2, 1e-1 for float64, float32,
            float16, bfloat16.
        threads: threads of ONNX Runtime for measuring; by default the CPUs of the process.
        measure_seconds: about how long to measure forms of attention in all.
        external_data_above: weights above this many bytes go to a second file, `<name>.<hash>.data`.
        force: replace an existing file.
        progress: show a bar while measuring, on a terminal.

    Raises:
        UsageError: an argument is wrong, the target exists, or it cannot be written.
        ExportError: the model cannot be captured, translated or run, or the error is above the tolerance.
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
    """
    where = target_named(target)
    version = opset_for(where, opset)
    forms = _forms(where, version, attention)
    path = check_target(path, force=force)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        need(module, extra="onnx")
    found = program(gm, example_inputs, dynamic_shapes)
    simplify_masks(found.exported)
    model = translated(found, version, contrib=where.contrib and _is_float32(found))
    replaced = data_files(path) if path.exists() else ()
    with atomic(path, force=force) as temporary:
        with tempfile.TemporaryDirectory(dir=temporary.parent) as folder:
            chosen, sites, ratios, ready = _chosen(
                model, found, where, version, forms, Path(folder), threads, measure_seconds, progress, external_data_above
            )
        del model
        save_model(ready, temporary, limit=external_data_above)
        bound = tolerance_for(_dtypes(ready)) if tolerance is None else tolerance
        error, notes = _proven(found, temporary, where, bound, threads, verify=verify)
        facts = _facts(gm, found, ready, where, version, chosen if sites else None, error, bound)
        _append_metadata(temporary, facts)
        size = sum(f.stat().st_size for f in temporary.parent.iterdir())
        result = Exported(
            path=path,
            target=where.name,
            opset=version,
            bytes=size,
            ops=op_counts(temporary),
            norms=norm_counts(temporary),
            inputs=found.inputs,
            outputs=found.outputs,
            error=error,
            tolerance=None if error is None else bound,
            attention=chosen if sites else None,
            attention_sites=sites,
            ratios=ratios,
            notes=(*found.notes, *notes),
        )
    drop_stale(replaced, path)
    return result


def _forms(target: Target, opset: int, attention: str) -> tuple[str, ...]:
    """The forms to try, the plain one first."""
    possible = target.attention_at(opset)
    if attention == "auto":
        return possible if target.contrib else possible[:1]
    if attention not in ATTENTION_FORMS:
        raise UsageError(f"unknown form of attention {attention!r}: expected auto, {', '.join(ATTENTION_FORMS)}")
    if attention not in possible:
        reason = "needs opset 23" if attention in target.attention else f"uses ops that target {target.name!r} does not have"
        raise UsageError(f"attention={attention!r} {reason}; possible here: auto, {', '.join(possible)}")
    return (attention,)


def _chosen(
    model: Any,
    found: Program,
    target: Target,
    opset: int,
    forms: tuple[str, ...],
    folder: Path,
    threads: int | None,
    seconds: float,
    progress: bool,
    limit: int,
) -> tuple[str, dict[str, int], dict[str, float], Any]:
    """Name of the form, sites by form, measured ratios, and the model to write."""
    ready: dict[str, tuple[Any, dict[str, int]]] = {}
    for form in forms:
        candidate = finished(model, found, target, opset, form)
        # a form that no site could take is one of the others again
        if not ready or candidate[1] not in [sites for _, sites in ready.values()]:
            ready[form] = candidate
    plain = forms[0]
    if len(ready) == 1:
        return plain, ready[plain][1], {}, ready[plain][0]
    files = {}
    for form, (candidate, _) in ready.items():
        (folder / form).mkdir()
        files[form] = folder / form / "model.onnx"
        save_model(candidate, files[form], limit=limit)
    feeds = found.feeds(found.flat_inputs())
    chosen, ratios = fastest(plain, files, feeds, threads=threads, seconds=seconds, progress=progress)
    return chosen, ready[chosen][1], ratios, ready[chosen][0]


def _proven(
    found: Program, file: Path, target: Target, bound: float, threads: int | None, *, verify: bool
) -> tuple[Error | None, tuple[str, ...]]:
    """Check the file, run it, compare it. Without a run the error is None and a note says why."""
    onnx = need("onnx", extra="onnx")
    try:
        # by path: the checker then follows external data; shape inference needs the model in one message
        onnx.checker.check_model(str(file), full_check=file.stat().st_size < MAX_PROTO)
    except Exception as e:
        raise ExportError(f"the exported model is not valid ONNX: {' '.join(str(e).split())[:500]}") from e
    if not verify:
        return None, ("not run: verify=False",)
    try:
        opened = session(file, threads=threads)
    except ExportError as e:
        if torch.bfloat16 not in _tensor_dtypes(found):
            raise
        if target.name == "onnxruntime":
            raise ExportError(
                f"ONNX Runtime has no bfloat16 kernels on the CPU for this model ({e}); export it in float32 or float16, "
                "or pass verify=False to write it for another device"
            ) from e
        return None, ("not run: ONNX Runtime has no bfloat16 kernels on the CPU for this model",)
    error = compare(found, opened)
    if not error.max_rel <= bound:
        raise ExportError(
            f"the exported model deviates from the module by {error.max_rel:.1e} relative, above the bound {bound:.0e}; "
            "nothing was written"
        )
    return error, ()


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
        if report.exact is not None:
            facts["exact"] = f"{report.exact.max_rel:.3e}"
        if report.drift is not None:
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
