"""Both files of a model: the original's default export and the optimized export."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.models import Entry
from normfuse.api import optimize
from normfuse.app.engines import export_original, onnxruntime_engine
from normfuse.app.sources import Source
from normfuse.benchmark import Engine
from normfuse.export import to_onnx
from normfuse.reports.record import report

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """One model, ready to be measured.

    Attributes:
        original, optimized: ONNX Runtime on each file.
        facts: norms, errors, form of attention, time of `optimize`; plain data.
        source: the model in torch.
    """

    original: Engine
    optimized: Engine
    facts: dict[str, Any]
    source: Source


def prepare(entry: Entry, folder: Path, *, threads: int | None = None) -> Prepared:
    """Optimize and export `entry` into `folder`.

    Args:
        entry: the model.
        folder: an existing folder for the two files.
        threads: threads with which the exporter chooses the form of attention.
    """
    source = entry.build()
    fast = optimize(source.model, source.example_inputs)
    found = report(fast)
    original, optimized = folder / "original.onnx", folder / "optimized.onnx"
    export_original(source, original)
    exported = to_onnx(fast, optimized, threads=threads, progress=False)
    inputs = source.example_inputs
    facts = {
        "norms_before": found.norms_before,
        "norms_after": found.norms_after,
        "exact": None if found.exact is None else found.exact.max_rel,
        "drift": None if found.drift is None else found.drift.max_rel,
        "optimize_s": found.seconds,
        "export": json.loads(json.dumps(asdict(exported) | {"path": exported.path.name}, default=str)),
    }
    return Prepared(
        onnxruntime_engine("original", original, inputs), onnxruntime_engine("optimized", optimized, inputs), facts, source
    )
