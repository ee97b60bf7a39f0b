"""`convert_onnx`: an ONNX file as another one, which was run and compared with it before it appears."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import normfuse
from normfuse.errors import ExportError
from normfuse.export.onnx.conversion.opset import in_opset
from normfuse.export.onnx.conversion.proof import Held, Original
from normfuse.export.onnx.conversion.steps import check_possible, simplified
from normfuse.export.onnx.inspect import provenance, read_model
from normfuse.export.onnx.medium import OnnxFile
from normfuse.export.onnx.oldest import needs, signature
from normfuse.export.onnx.precision import to_precision
from normfuse.export.onnx.precision.ops import infer_dtypes
from normfuse.export.onnx.writer.save import data_files, drop_stale, weights_sha256
from normfuse.export.onnx.writer.variants import load_model
from normfuse.export.ops import DOMAIN
from normfuse.export.options import ExportOptions
from normfuse.export.result import Exported
from normfuse.export.runtimes import parse_runtime, spelled_runtime
from normfuse.export.targets import MAX_OPSET
from normfuse.extras import need
from normfuse.files import atomic, check_target
from normfuse.numerics.compare import TOLERANCE

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["convert_onnx"]

_ROUNDS = ("QuantizeLinear", "DynamicQuantizeLinear")
_ONNX = OnnxFile()


def convert_onnx(
    file: str | Path, path: str | Path, inputs: Mapping[str, Tensor], options: ExportOptions | None = None, medium: OnnxFile = _ONNX
) -> Exported:
    """Write the ONNX file `file` anew to `path`; the result appears only after it was run and held against `file`.

    Constants are computed, BatchNorms go into the weights in front of them, what does nothing goes. The norms that stay are what
    they were: which of them can go is asked of the PyTorch model (`normfuse.optimize`).

    Args:
        file: of any origin; it stays as it is.
        path: the file to write.
        inputs: by name, to compare the two files on; on others like them, and at another size where one is free, as well.
        options: `target`, `opset`, `runtime`, `dtype`, `io_dtype`, `tolerance`, `force`, `threads` and `external_data_above` mean
            what they mean for `normfuse.export.to_onnx`; the opset stays as it is unless another is asked for.
        medium: the kind of file.

    Raises:
        UsageError: the file is missing or no ONNX model, the target does not have its operators, or `path` exists.
        ExportError: it cannot be converted or run, or the new file deviates from it.
        MissingExtra: onnx, onnxscript or onnxruntime is not installed.
    """
    options = options or ExportOptions()
    path, file = check_target(path, force=options.force), Path(file)
    for module in medium.libraries:
        need(module, extra=medium.extra)
    read_model(file)  # says what is wrong with it before a library does
    check_possible(load_model(file), options, file)
    original = Original(file, inputs, options.threads)
    replaced = data_files(path) if path.exists() else ()
    with atomic(path, force=options.force) as temporary:
        work = _Work(file, options, medium, original)
        try:
            made = work.written(temporary, simplify=True)
        except ExportError as e:
            made = work.written(temporary, simplify=False, notes=(f"nothing was simplified: {e}",))
        medium.tell(temporary, _facts(file, made, options))
        result = _result(temporary, path, made, options, medium)
    drop_stale(replaced, path)
    return result


@dataclass(frozen=True)
class _Made:
    """The graph that was written, its runtime by release or "", how far it is from the old one, and the bound on that."""

    model: ir.Model
    runtime: str
    held: Held | None
    bound: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Work:
    """What is to be done to which file."""

    file: Path
    options: ExportOptions
    medium: OnnxFile
    original: Original

    def written(self, place: Path, *, simplify: bool, notes: tuple[str, ...] = ()) -> _Made:
        """The file at `place`, proven."""
        options, low = self.options, self.options.computes_in or "fp32"
        model = _loaded(self.file)
        in_opset(model, options)
        if simplify:
            simplified(model)
        _typed(model)
        held = None
        if low == "bf16":  # which ONNX Runtime cannot run
            self._save(model, place)
            held, _ = self._proven(model, place)
            notes = (*notes, "compared in float32, before the conversion to bfloat16")
        notes = (*notes, *to_precision(model, low, io_dtype=options.io_dtype, own_in_fp32=options.where.own_in_float32))
        runtime = _runtime(model, options)
        self._save(model, place)
        bound = _bound(model, options)
        if low != "bf16":
            held, bound = self._proven(model, place)
        return _Made(model, runtime, held, bound, (*notes, held.nothing) if held is not None and held.nothing else notes)

    def _save(self, model: ir.Model, place: Path) -> None:
        self.medium.save(model, place, limit=self.options.external_data_above)
        self.medium.check(place)

    def _proven(self, model: ir.Model, place: Path) -> tuple[Held, float]:
        bound = _bound(model, self.options)
        sessions = self.medium.sessions(place, self.options, None)
        return self.original.held(sessions[0], bound), bound


def _loaded(file: Path) -> ir.Model:
    """With the weights that stand beside it, which will stand elsewhere, and with its constants as weights."""
    model = load_model(file)
    need("onnx_ir", extra="onnx").external_data.load_to_model(model)
    need("onnx_ir.passes.common", extra="onnx").LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def _typed(model: ir.Model) -> None:
    """Types of values that the file leaves open."""
    need("onnx_ir.passes.common", extra="onnx").ShapeInferencePass()(model)
    infer_dtypes([node for graph in model.graphs() for node in graph], model.opset_imports[""])


def _runtime(model: ir.Model, options: ExportOptions) -> str:
    """The oldest ONNX Runtime that reads the file; empty where nothing is known of its opset.

    Raises:
        ExportError: it is newer than the one that is asked for.
    """
    if model.opset_imports[""] > MAX_OPSET:
        return ""
    oldest, reason = max(needs(model))
    if options.runtime is not None and oldest > parse_runtime(options.runtime):
        raise ExportError(
            f"the file needs ONNX Runtime {spelled_runtime(oldest)} for {reason}, and --runtime says {options.runtime}"
        )
    return spelled_runtime(oldest)


def _bound(model: ir.Model, options: ExportOptions) -> float:
    """What the deviation is held to; infinite where integers are rounded to, and an SQNR is asked for."""
    if options.tolerance is not None:
        return options.tolerance
    nodes = [node for graph in model.graphs() for node in graph]
    if any(node.op_type in _ROUNDS or node.domain == DOMAIN for node in nodes):
        return math.inf
    ir = need("onnx_ir", extra="onnx")
    known = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16, ir.DataType.FLOAT: torch.float32}
    found = {v.dtype for v in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())}
    return max((TOLERANCE[known[d]] for d in found if d in known), default=TOLERANCE[torch.float64])


def _facts(file: Path, made: _Made, options: ExportOptions) -> dict[str, str]:
    """What the new file says of itself; what the old one says of its model stays true."""
    kept = {key.removeprefix("normfuse."): value for key, value in provenance(file).items()}
    facts = {
        "version": normfuse.__version__, "target": options.target, "opset": str(made.model.opset_imports[""]),
        "made_of": file.name, "weights_sha256": weights_sha256(made.model), "runtime": made.runtime,
    }  # fmt: skip
    if made.held is not None:
        facts |= {"error": f"{made.held.error.max_rel:.3e}", "error_dtype": made.held.error.dtype}
    return {key: value for key, value in {**kept, **facts}.items() if value}


def _result(file: Path, path: Path, made: _Made, options: ExportOptions, medium: OnnxFile) -> Exported:
    ops, norms = medium.counts(file)
    graph, held = made.model.graph, made.held
    return Exported(
        path=path,
        target=options.target,
        opset=made.model.opset_imports[""],
        bytes=sum(f.stat().st_size for f in file.parent.iterdir()),
        weight_bytes=sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value is not None),
        ops=ops,
        norms=norms,
        inputs=tuple(v.name or "" for v in graph.inputs),
        outputs=tuple(v.name or "" for v in graph.outputs),
        error=None if held is None else held.error,
        tolerance=None if made.bound == math.inf else made.bound,
        sqnr=held.sqnr if held is not None and made.bound == math.inf else None,
        runtime=made.runtime,
        signature=signature(made.model),
        notes=made.notes,
    )
