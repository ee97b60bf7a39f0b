"""Is a file faster than its float original here, in a runtime as everybody has it? A few seconds of measuring."""

from __future__ import annotations

import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.app.cuda import for_onnxruntime
from normfuse.app.engines import export_original, onnxruntime_engine
from normfuse.benchmark import Comparison, Schedule, Verdict, measure
from normfuse.errors import NormfuseError
from normfuse.export.onnx.domains import domains
from normfuse.reports.model import Latency

if TYPE_CHECKING:
    from normfuse.app.sources import Source

__all__ = ["Speed", "speed_of", "speed_option"]

_SECONDS = 3.0
_LARGEST = 2 << 30  # bytes of weights of the original: a larger model takes more than a few seconds to export and to run
speed_option = click.option(
    "--speed-check/--no-speed-check",
    default=True,
    show_default=True,
    help="With --quantize or --report, measure the file against the float original for a few seconds.",
)


@dataclass(frozen=True)
class Speed:
    """What was measured, or why it was not.

    Attributes:
        path: the file.
        stock: the original in float against the file, both in ONNX Runtime as everybody has it; None if it was not measured.
        library: the same with normfuse's library registered; None where the file has no op of it, or it is not built.
        native: has the file ops that the library makes faster?
        why_not: why nothing was measured.
        quantized: is it a file in integers?
    """

    path: Path
    stock: Comparison | None = None
    library: Comparison | None = None
    native: bool = False
    why_not: str = ""
    quantized: bool = True

    @property
    def latencies(self) -> tuple[Latency, ...]:
        """What was measured, as the report shows it; the library first, which is how such a file is meant to run."""
        told = (("ONNX Runtime with normfuse's library", self.library), ("stock ONNX Runtime", self.stock))
        return tuple(c.latency(f"the file in {where}", "the float original in ONNX Runtime") for where, c in told if c is not None)

    @property
    def slower(self) -> bool:
        """Surely slower than the original in a stock runtime."""
        return self.stock is not None and self.stock.verdict(1.0) is Verdict.FAILS

    def to_dict(self) -> dict[str, Any]:
        """Plain data; latencies in milliseconds."""
        found = {"stock": self.stock, "library": self.library}
        return {k: None if c is None else c.to_dict() for k, c in found.items()} | {"slower": self.slower, "why_not": self.why_not}

    def __str__(self) -> str:
        """A few lines of at most 80 columns."""
        if self.stock is None:
            lines = textwrap.wrap(
                f"speed      not measured: {self.why_not}",
                80,
                initial_indent="  ",
                subsequent_indent=" " * 13,
                break_on_hyphens=False,
            )
        else:
            lines = [
                f"  speed      stock ONNX Runtime: {_words(self.stock)} the float original here,",
                f"             {_figures(self.stock)}",
            ]
        if self.library is not None:
            lines += [
                f"             with normfuse's library: {_words(self.library)} it,",
                f"             {_figures(self.library)}",
            ]
        if self.native and (self.stock is None or self.slower or self.library is not None):
            lines.append("             the lines below register the library")
        elif self.slower and self.quantized:
            lines += ["             integers do not pay here: keep it in float, or export --form native"]
        return "\n".join(lines)


def speed_of(loaded: Source, path: Path, *, quantized: bool = True) -> Speed:
    """Measure the file at `path` against the model that it was made of, for a few seconds."""
    native = "normfuse" in domains(path)
    held = sum(t.numel() * t.element_size() for t in loaded.module.state_dict().values())
    if held > _LARGEST:
        return Speed(
            path, native=native, quantized=quantized, why_not=f"the original has {held / 1e9:.1f} GB; compare with normfuse bench"
        )
    inputs: Any = loaded.kwargs if loaded.kwargs and not loaded.args else (*loaded.args, *loaded.kwargs.values())
    with tempfile.TemporaryDirectory(prefix="normfuse-speed-") as folder:
        original = Path(folder, "original.onnx")
        try:
            export_original(for_onnxruntime(loaded)[0], original)
            float_ = onnxruntime_engine("the float original", original, inputs)
            engines = [float_, float_, onnxruntime_engine("the file", path, inputs, kernels=False)]
            if native and _library():
                engines.append(onnxruntime_engine("the file with the library", path, inputs))
            found = measure(engines, Schedule(seconds=_SECONDS, warmup=0.2, turn=0.1, restarts=1))
        except NormfuseError as e:
            return Speed(path, native=native, quantized=quantized, why_not=str(e).splitlines()[0][:200])
    library = Comparison.of(found, b=3) if len(engines) == 4 else None
    return Speed(path, Comparison.of(found), library, native, quantized=quantized)


def _library() -> bool:
    from normfuse import native

    return native.available()


def _words(found: Comparison) -> str:
    match found.verdict(1.0):
        case Verdict.HOLDS:
            return "faster than"
        case Verdict.FAILS:
            return "SLOWER than"
        case _:
            return "not to be told from"


def _figures(found: Comparison) -> str:
    return f"{found.b.median:.3g} ms against {found.a.median:.3g} ms, {found.speedup} times as fast"
