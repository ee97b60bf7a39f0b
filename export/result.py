"""What an export left behind."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from normfuse.export.session import Input
from normfuse.reports.model import Error, Form

__all__ = ["Exported", "note_lines"]


def note_lines(notes: Iterable[str]) -> list[str]:
    """Notes under what they are about, in lines of at most 80 columns."""
    lines: list[str] = []
    for note in notes:
        lines += textwrap.wrap(
            f"note       {note}",
            80,
            initial_indent="  ",
            subsequent_indent=" " * 13,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


@dataclass(frozen=True)
class Exported:
    """One exported file.

    Attributes:
        path: the ONNX file.
        target: name of the target that it was made for.
        opset: opset of the standard ops in it.
        bytes: size of the file and of its external data together.
        weight_bytes: of these, what weights and other constants take.
        ops: number of nodes by op type; ops of a contrib domain carry it, e.g. `com.microsoft.Attention`.
        norms: number of normalizations by op type.
        inputs: names of the graph inputs.
        outputs: names of the graph outputs; a nested output has one name a tensor, e.g. `past_key_values.0.0`.
        error: deviation of the file in the runtime from the torch module; None when it was not run.
        tolerance: the bound on `error.max_rel` that was held; None when it was not run, or was held to an SQNR instead.
        attention: form of attention that was chosen; None when the model has no attention.
        attention_sites: number of attention sites by the form each of them really has.
        forms: what each attention, norm and quantized layer is in the file, and why it is not what was wanted for it.
        ratios: latency of the plain form over latency of each form that was measured; above 1 is faster than plain.
        form: what the quantized layers became: `native`, `integer`, `qdq` or `weight_only`; None when the model has none.
        sqnr: 10 log10(Σ expected² / Σ difference²) of the file against the module, in dB; None unless it is quantized and was run.
        runtime: the oldest ONNX Runtime that the file needs, e.g. "1.23"; it stands in the file's metadata, too.
        signature: name, element type and sizes of each input.
        notes: what else the user should know, e.g. outputs that are no tensors and were left out.
    """

    path: Path
    target: str
    opset: int
    bytes: int
    weight_bytes: int
    ops: dict[str, int]
    norms: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: Error | None = None
    tolerance: float | None = None
    attention: str | None = None
    attention_sites: dict[str, int] = field(default_factory=dict)
    forms: tuple[Form, ...] = ()
    ratios: dict[str, float] = field(default_factory=dict)
    form: str | None = None
    sqnr: float | None = None
    runtime: str = ""
    signature: tuple[Input, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def how_to_run(self) -> str:
        """Python that runs the file in ONNX Runtime, on zeros; for a native file with the kernel library.

        Where the library was not built, the line that registers it is left out, and the functions in the file run.
        """
        from normfuse import native

        kernels = self.form == "native" and native.available()
        lines = ["import numpy as np", "import onnxruntime as ort"]
        if kernels:
            lines += ["", "from normfuse import native"]
        lines += ["", "options = ort.SessionOptions()"]
        if kernels:
            lines.append("options.register_custom_ops_library(str(native.path()))")
        lines += ["session = ort.InferenceSession(", f"    {str(self.path)!r}, options, providers=['CPUExecutionProvider']", ")"]
        return "\n".join([*lines, "outputs = session.run(None, {", *self._zeros(), "})", ""])

    def _zeros(self) -> list[str]:
        """A line for each input: its name, and zeros."""
        lines = []
        for value in self.signature:
            free = [n for n in value.sizes if isinstance(n, str)]
            sizes = tuple(n if isinstance(n, int) else 1 for n in value.sizes)
            comment = f"  # {', '.join(free)}: any size" if free else ""
            lines.append(f"    {value.name!r}: np.zeros({sizes}, {value.dtype!r}),{comment}")
        return lines

    def _head(self) -> list[str]:
        """What file it is, and what it needs."""
        lines = [f"{self.path}: {self.target}, opset {self.opset}, {self.bytes / 1e6:.1f} MB, {sum(self.ops.values())} nodes"]
        return [*lines, f"  needs      ONNX Runtime {self.runtime} or newer"] if self.runtime else lines

    @property
    def explained(self) -> str:
        """One line for each attention, norm and quantized layer: its module path, what it is in the file, and why it is no more."""
        wide = max((len(site.path) for site in self.forms), default=0)
        lines = []
        for site in self.forms:
            why = f"; {site.why}" if site.why else ""
            remedy = f" (would help: {site.remedy})" if site.remedy else ""
            lines.append(f"{site.kind:<10} {site.path:<{wide}}  {site.form}{why}{remedy}")
        return "\n".join(lines) or "no attention, norm or quantized layer is in the file"

    def __str__(self) -> str:
        """A few lines of at most 80 columns."""
        lines = self._head()
        norms = ", ".join(f"{n} {k}" for k, n in self.norms.items()) or "none"
        lines.append(f"  norms      {norms}")
        if self.attention is not None:
            sites = ", ".join(f"{n} {k}" for k, n in self.attention_sites.items())
            ratios = ", ".join(f"{k} {r:.3f}x" for k, r in self.ratios.items())
            lines.append(f"  attention  {sites}" + (f" (measured: {ratios})" if ratios else ""))
        if self.form is not None:
            # a share, not dB: the one SQNR of a quantized model is that of the module against the original
            apart = "" if self.sqnr is None else f", {100 * 10 ** (-self.sqnr / 20):.2g} % apart from the module (rms)"
            lines.append(f"  quantized  {self.form}, weights {self.weight_bytes / 1e6:.1f} MB{apart}")
        plain = [site for site in self.forms if site.why]
        if plain:
            lines.append(f"  forms      {len(plain)} of {len(self.forms)} sites plainer than wanted: Exported.explained, --explain")
        if self.error is None:
            lines.append("  error      not run")
        else:
            bound = "" if self.tolerance is None else f" (bound {self.tolerance:.0e})"
            lines.append(f"  error      {self.error.max_rel:.1e} relative{bound}, {self.error.dtype}")
        return "\n".join([*lines, *note_lines(self.notes)])
