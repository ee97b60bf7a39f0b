"""One report over all parts of a model: totals, their sites under the paths of the whole model, and what stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from normfuse.pipeline.origin import origin_of
from normfuse.pipeline.part import OptimizedPart
from normfuse.reports.model import Error, Part, PassReport, Site
from normfuse.reports.report import Report

__all__ = ["norm_of", "report_of_parts", "under"]

_NORMS = {
    "BatchNorm": "batch_norm",
    "SyncBatchNorm": "batch_norm",
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "GroupNorm": "group_norm",
    "InstanceNorm": "instance_norm",
}


def report_of_parts(
    model: nn.Module, parts: Sequence[Part], left: Sequence[Part], whole: Error | None, notes: tuple[str, ...], seconds: float
) -> Report:
    """Totals over the parts, and what stays as it is.

    Args:
        model: with the parts in their places.
        parts: those that were optimized, with reports under the paths of the whole model (`under`).
        left: those that stay as they are, with reasons.
        whole: the error of the whole model; None where it was not compared.
        notes: what the user should know before all else.
        seconds: what it all took.
    """
    reports = [p.report for p in parts if p.report is not None]
    staying = _norm_modules(model)
    said = dict.fromkeys(note for r in reports for note in r.notes)
    return Report(
        passes=_summed([r.passes for r in reports]),
        exact=_worst([r.exact for r in reports]),
        drift=whole,
        norms_before=dict(sum((Counter(r.norms_before) for r in reports), Counter(staying))),
        norms_after=_with_zeros(sum((Counter(r.norms_after) for r in reports), Counter(staying)), [r.norms_after for r in reports]),
        parameters_before=sum(r.parameters_before for r in reports),
        parameters_after=sum(r.parameters_after for r in reports),
        bytes_before=sum(r.bytes_before for r in reports),
        bytes_after=sum(r.bytes_after for r in reports),
        notes=(f"captured by parts: {len(parts)} were optimized, {len(left)} submodules stay as they are", *notes, *said),
        seconds=seconds,
        nothing_compared=next((r.nothing_compared for r in reports), "") if all(r.nothing_compared for r in reports) else "",
        parts=(*parts, *sorted(left, key=lambda p: p.path)),
        origin=origin_of(model),
        calibration=next((r.calibration for r in reports if r.calibration is not None), None),
        capture_seconds=sum(r.capture_seconds for r in reports),
        verify_seconds=sum(r.verify_seconds for r in reports),
    )


def _with_zeros(counts: Counter[str], of: Sequence[dict[str, int]]) -> dict[str, int]:
    return {kind: counts[kind] for kind in sorted({*counts, *(k for norms in of for k in norms)})}


def under(report: Report, path: str) -> Report:
    """The report of a part with the paths of the whole model."""

    def moved(text: str) -> str:
        return path + text.removeprefix("part") if text == "part" or text.startswith("part.") else text

    def at(sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(
            replace(s, path=moved(s.path), blocker=moved(s.blocker), note=s.note.replace("part.", f"{path}.")) for s in sites
        )

    def layers(p: PassReport) -> Any:
        return tuple(replace(layer, path=moved(layer.path)) for layer in p.quantization)

    passes = tuple(
        replace(p, applied=at(p.applied), refused=at(p.refused), undone=at(p.undone), quantization=layers(p)) for p in report.passes
    )
    return replace(report, passes=passes)


def _summed(pipelines: Sequence[tuple[PassReport, ...]]) -> tuple[PassReport, ...]:
    """Pass by pass over all parts: the same pipeline ran on each."""
    return tuple(
        PassReport(
            rows[0].name,
            tuple(s for p in rows for s in p.applied),
            tuple(s for p in rows for s in p.refused),
            tuple(s for p in rows for s in p.undone),
            seconds=sum(p.seconds for p in rows),
            sqnr=min((p.sqnr for p in rows if p.sqnr is not None), default=None),
            quantization=tuple(layer for p in rows for layer in p.quantization),
        )
        for rows in zip(*pipelines, strict=True)
    )


def _worst(errors: Sequence[Error | None]) -> Error | None:
    worst: Error | None = None
    for error in errors:
        worst = error if worst is None else worst | error
    return worst


def _norm_modules(model: nn.Module) -> Counter[str]:
    """Norms of PyTorch's own classes that stay, outside of parts."""
    found: Counter[str] = Counter()
    inside = {m for part in model.modules() if isinstance(part, OptimizedPart) for m in part.modules()}
    for module in model.modules():
        if module not in inside and (kind := norm_of(module)):
            found[kind] += 1
    return found


def norm_of(module: nn.Module) -> str | None:
    """The kind of norm that a layer of PyTorch is; None if it is none."""
    return _NORMS.get(type(module).__name__.rstrip("123d"))
