"""A written file is checked, run and compared with the module before anybody sees it."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from normfuse import native
from normfuse.errors import ExportError
from normfuse.export.onnx.compare import compare, tolerance_for
from normfuse.export.onnx.medium import OnnxFile
from normfuse.export.onnx.program import Program
from normfuse.export.onnx.quantized.forms import FORMS
from normfuse.export.options import ExportOptions
from normfuse.extras import need
from normfuse.reports.model import Error

__all__ = ["Proof", "Proven", "tensor_dtypes"]

_SATURATES = (
    "compared as it is written: on this CPU, without VNNI, ONNX Runtime adds two products of int8 in 16 bits and clips what is too "
    "large; weight_bits=7 always fits"
)
_HALF = " (float16 may be too narrow for its values: export it in bf16, or state a larger tolerance)"


@dataclass(frozen=True)
class Proven:
    """What was found when a file was run.

    Attributes:
        error: its deviation from the module; None where it was not run.
        sqnr: the same in dB.
        notes: what the user should know.
    """

    error: Error | None = None
    sqnr: float | None = None
    notes: tuple[str, ...] = ()

    def noting(self, *notes: str) -> Proven:
        """The same with more notes."""
        return dataclasses.replace(self, notes=(*self.notes, *notes))


@dataclass(frozen=True)
class Proof:
    """What a file is held against, and how.

    Attributes:
        found: the program that was written.
        options: of the export.
        layers: form of its quantized layers; None without any.
        rounds: it rounds to integers on its way, so that an SQNR is asked of it, unless a tolerance is stated.
        kept: names in `torch.ops.normfuse` that are nodes of the domain `normfuse`.
        medium: the kind of file that it is, and who runs it.
    """

    found: Program
    options: ExportOptions
    layers: str | None
    rounds: bool
    kept: Sequence[str]
    medium: OnnxFile

    def bound(self, model: Any) -> float:
        """What the largest deviation is held to; infinite where an SQNR is asked for instead."""
        if self.options.tolerance is not None:
            return self.options.tolerance
        return math.inf if self.rounds else tolerance_for(_dtypes(model))

    def of(self, file: Path, bound: float, *, half: bool = False) -> Proven:
        """Run the file and compare it: where there is a kernel library, with it and without.

        Args:
            file: it was checked.
            bound: see `bound`.
            half: it was converted to float16.

        Raises:
            ExportError: it does not run, or deviates from the module.
        """
        form = None if self.layers is None else FORMS[self.layers]
        try:
            sessions = self.medium.sessions(file, self.options, self.layers, as_written=self._saturates())
        except ExportError as e:
            return self._cannot_run(e)
        meant = self.found if form is None else form.meant(self.found, self.options.where, self.kept)
        proofs = [compare(meant, session, quantized=self.rounds, half=half, bound=bound) for session in sessions]
        error, worst = functools.reduce(operator.or_, (p.error for p in proofs)), min(proofs, key=lambda p: p.sqnr - p.wanted)
        sqnr, wanted = worst.sqnr, worst.wanted
        notes = tuple(dict.fromkeys(note for p in proofs for note in p.notes))
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
        if form is not None and form.kernels and not native.available():
            notes = (f"run without normfuse's kernels: {native.why_not()}", *notes)
        if said := "" if form is None else form.deviates(self.found, self.options.where):
            notes = (*notes, f"{said}: {compare(self.found, sessions[0], half=half).sqnr:.0f} dB against the module")
            notes = (*notes, _SATURATES) if self._saturates() else notes
        if form is not None and not form.rounds:
            sqnr = compare(self.found, sessions[0], half=half).sqnr
            which = "of what is in no plugin " if self.rounds else ""
            notes = (*notes, f"activations {which}stay floats: {sqnr:.0f} dB against the module, which rounds them")
        return Proven(error, sqnr, notes)

    def _saturates(self) -> bool:
        """The runtime's own product of the file's bytes is not exact on this CPU."""
        form = None if self.layers is None else FORMS[self.layers]
        here = native.isa() if native.available() else ""
        return here == "avx2" and form is not None and bool(form.deviates(self.found, self.options.where))

    def _cannot_run(self, e: ExportError) -> Proven:
        lacking = _without_kernels(self.found, e)
        if lacking is None:
            raise e
        has_none = f"ONNX Runtime has no {lacking} kernels on the CPU for this model"
        if self.options.where.runs_here or lacking == "float64":
            other = "float32" if lacking == "float64" else "float32 or float16"
            raise ExportError(f"{has_none} ({e}); export it in {other}, or pass verify=False to write it for another device") from e
        return Proven(notes=(f"not run: {has_none}",))


def _without_kernels(found: Program, e: ExportError) -> str | None:
    """The dtype of the model for which the runtime lacks kernels, where it says so; of bfloat16 it lacks nearly all."""
    dtypes = tensor_dtypes(found)
    if torch.bfloat16 in dtypes:
        return "bfloat16"
    return "float64" if torch.float64 in dtypes and "NOT_IMPLEMENTED" in str(e) else None


def tensor_dtypes(found: Program) -> set[torch.dtype]:
    """Of weights and inputs."""
    return {t.dtype for t in found.exported.state_dict.values()} | {
        t.dtype for t in found.flat_inputs() if isinstance(t, torch.Tensor)
    }


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
