"""The answer of a report, which stands first: what changed, how exact it is, how large, and what stayed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from normfuse.reports.model import Error, LayerQuantization, ReportData
from normfuse.reports.numbers import change, scientific, size

__all__ = ["answer", "kind_in_words", "norms_in_words", "origin_lines", "quality", "widths"]

_NAMES = {
    "batch_norm": "BatchNorm", "instance_norm": "InstanceNorm", "layer_norm": "LayerNorm", "rms_norm": "RMSNorm",
    "group_norm": "GroupNorm",
}  # fmt: skip
_STREAM = "layer_norm_is_rms_norm"


def origin_lines(report: ReportData) -> Iterator[str]:
    """Model, command, weights, versions, machine and date, as far as they are known."""
    origin = report.origin
    if origin is None:
        return
    yield origin.model
    if origin.weights:
        yield f"weights: {origin.weights}"
    if origin.command:
        yield f"command: {origin.command}"
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    facts = [versions, origin.machine, f"{origin.date} UTC" if origin.date else ""]
    if any(facts):
        yield "; ".join(f for f in facts if f)


def answer(report: ReportData) -> Iterator[tuple[str, str]]:
    """Pairs of a word and what there is to say about it, most important first."""
    facts = [("changed", norms_in_words(report))]
    if report.quantization:
        facts.append(("quantized", f"{widths(report.quantization)}; {quality(report)}"))
    unchanged = report.norms_before == report.norms_after
    yield from reversed(facts) if unchanged else facts
    for p in report.passes:
        if p.sqnr is not None and not p.quantization:
            yield "on purpose", f"{p.name} changes the function: SQNR of the outputs {p.sqnr:.1f} dB"
    on_purpose = any(p.sqnr is not None or p.quantization for p in report.passes)
    if report.nothing_compared:
        yield "exact", report.nothing_compared
    elif on_purpose:
        yield "exact", f"{_error(report.exact)}; of everything but {_changing(report)}"
    else:
        yield "exact", _error(report.exact)
        if report.drift is not None:
            yield "drift", _error(report.drift)
    yield "size", change(report.bytes_before, report.bytes_after, size)
    yield "parameters", change(report.parameters_before, report.parameters_after)
    if report.operators_before or report.operators_after:
        yield "operators", change(sum(report.operators_before.values()), sum(report.operators_after.values()))
    if stayed := _stayed(report):
        yield "stayed", stayed


def norms_in_words(report: ReportData) -> str:
    """`25 LayerNorm → 25 RMSNorm, all on the residual stream; 49 BatchNorm folded away`"""
    before, after = Counter(report.norms_before), Counter(report.norms_after)
    gone, new = before - after, after - before
    said = []
    for old, kind in _pairs(gone, new):
        n = min(gone[old], new[kind])
        gone[old], new[kind] = gone[old] - n, new[kind] - n
        of = f"{n}" if n == before[old] else f"{n} of {before[old]}"
        where = _where(report, n) if (old, kind) == ("layer_norm", "rms_norm") else ""
        said.append(f"{of} {kind_in_words(old)} → {n} {kind_in_words(kind)}{where}")
    for kind, n in (+gone).items():
        said.append(f"{n if n == before[kind] else f'{n} of {before[kind]}'} {kind_in_words(kind)} folded away")
    said += [f"{n} {kind_in_words(kind)} more than before" for kind, n in (+new).items()]
    if said:
        return "; ".join(said)
    if sum(before.values()):
        return "no norm" + (", see the rules below" if report.applied else "")
    return "the model has no norm of a known kind" + ("; see the rules below" if report.applied else "")


def _pairs(gone: Counter[str], new: Counter[str]) -> Iterator[tuple[str, str]]:
    """Which kind became which: LayerNorm becomes RMSNorm, and a kind that goes in equal numbers becomes the one that comes."""
    if gone["layer_norm"] > 0 and new["rms_norm"] > 0:
        yield "layer_norm", "rms_norm"
    for kind in list(+new):
        old = next((k for k in gone if gone[k] == new[kind] > 0), None)
        if old is not None:
            yield old, kind


def _where(report: ReportData, n: int) -> str:
    on_stream = sum("residual stream" in site.note for site in report.applied if site.rule == _STREAM)
    if not on_stream:
        return ""
    return f", {'all' if on_stream == n else on_stream} on the residual stream"


def _stayed(report: ReportData) -> str:
    kept = Counter(report.norms_before) & Counter(report.norms_after)
    said = ", ".join(f"{n} {kind_in_words(kind)}" for kind, n in kept.items() if n)
    floats = sum(bool(layer.kept) for layer in report.quantization)
    if floats:
        said += f"{', ' if said else ''}{floats} layer{'' if floats == 1 else 's'} in float"
    return said + ("; the reasons stand below" if said and report.refused else "")


def kind_in_words(kind: str) -> str:
    """`LayerNorm` for `layer_norm`, `UnifiedNorm` for `unified_norm`; what is no such name stays."""
    if kind in _NAMES:
        return _NAMES[kind]
    return "".join(w.capitalize() for w in kind.split("_")) if re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", kind) else kind


def quality(report: ReportData) -> str:
    """`outputs: 29.9 dB against the original (SQNR), on 128 samples of images.npz`"""
    data = "the example inputs" if report.calibration is None else str(report.calibration)
    if report.sqnr is None:
        return "the SQNR of the outputs was not measured: there was no data"
    return f"outputs: {report.sqnr:.1f} dB against the original (SQNR), on {data}"


def widths(layers: Iterable[LayerQuantization]) -> str:
    """`49 of 50 layers in W8A8`"""
    layers = [layer for layer in layers if layer.kind not in ("model", "attention")]
    done = [layer for layer in layers if not layer.kept]
    found = Counter(
        f"W{layer.weight_bits}" + ("" if layer.activation_bits is None else f"A{layer.activation_bits}") for layer in done
    )
    each = ", ".join(f"{n} {width}" for width, n in found.most_common())
    return f"{len(done)} of {len(layers)} layers" + (
        f" in {next(iter(found))}" if len(found) == 1 else f" ({each})" if found else ""
    )


def _changing(report: ReportData) -> str:
    return ", ".join(dict.fromkeys(p.name for p in report.passes if p.sqnr is not None or p.quantization))


def _error(error: Error | None) -> str:
    if error is None:
        return "not measured"
    return f"{scientific(error.max_rel)} relative, {scientific(error.max_abs)} absolute ({error.dtype})"
