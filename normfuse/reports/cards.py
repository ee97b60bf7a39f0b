"""The three answers on the first screen of a page: what changed, how exact it is, how fast."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from normfuse.reports.answer import norms_in_words, quality, widths
from normfuse.reports.model import Latency, ReportData
from normfuse.reports.numbers import change, scientific, size

__all__ = ["Bar", "Card", "cards"]

_IDENTITY = 1e-9  # relative error in float64 up to which a rewrite is one (docs/numerics.md)


@dataclass(frozen=True)
class Bar:
    """An interval of a speedup on a line; `left`, `width` and `one` (where both are equally fast) in percent."""

    text: str
    figures: str
    tone: str
    left: float
    width: float
    one: float


@dataclass(frozen=True)
class Card:
    """A question, its answer in a few words, and what there is to add."""

    question: str
    answer: str
    tone: str = ""
    lines: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()


def cards(report: ReportData) -> Iterator[Card]:
    """The three of them."""
    yield _changed(report)
    yield _exact(report)
    yield _fast(report)


def _changed(report: ReportData) -> Card:
    norms, sizes = norms_in_words(report), change(report.bytes_before, report.bytes_after, size)
    said = [widths(report.quantization)] if report.quantization else []
    said = [*said, norms] if report.norms_before == report.norms_after or said else [norms]
    first, _, rest = said[0].partition("; ")
    where = first.partition(", ")
    head, more = (where[0], [where[2]]) if where[2] and not report.quantization else (first, [])
    return Card("What changed", head, "", tuple(filter(None, (*more, *rest.split("; "), *said[1:], f"size {sizes}"))))


def _exact(report: ReportData) -> Card:
    question, error = "How exact", report.exact
    if report.nothing_compared:
        return Card(question, "nothing was compared", "warn", (report.nothing_compared,))
    rest = () if error is None else (f"everything but the integers: {scientific(error.max_rel)} relative in {error.dtype}",)
    if report.quantization:
        if report.sqnr is None:
            return Card(question, "not measured", "warn", (quality(report), *rest))
        share = f"the error is {100 * 10 ** (-report.sqnr / 20):.2g} % of the outputs (rms)" if 0 < report.sqnr < 400 else ""
        return Card(question, f"{report.sqnr:.1f} dB", "", tuple(filter(None, (quality(report), share, *rest))))
    if error is None:
        return Card(question, "not measured", "warn", ('pass example inputs, and verify="end"',))
    on_purpose = [f"{p.name}: SQNR {p.sqnr:.1f} dB, on purpose" for p in report.passes if p.sqnr is not None]
    same = error.max_rel <= _IDENTITY
    said = f"relative error in {error.dtype}" + (": the same function, but for rounding" if same else "")
    drift = () if report.drift is None else (f"{scientific(report.drift.max_rel)} in {report.drift.dtype}, as the model runs",)
    return Card(question, scientific(error.max_rel), "good" if same else "warn", (said, *drift, *on_purpose))


def _fast(report: ReportData) -> Card:
    question = "How fast"
    if not report.latencies:
        origin = report.origin
        source = origin.model if origin is not None and origin.command else "SOURCE"
        return Card(question, "not measured", "soft", (f"normfuse bench {source} --report bench.html measures it",))
    first = report.latencies[0]
    low = min(1.0, *(x.low for x in report.latencies))
    high = max(1.0, *(x.high for x in report.latencies))
    bars = tuple(_bar(x, 0.92 * low, 1.08 * high) for x in report.latencies)
    busy = ("the machine was too busy, or the difference too small, to decide; close other programs",)
    return Card(question, _word(first), _tone(first), busy if first.verdict == "undecided" else (), bars)


def _word(found: Latency) -> str:
    times = f"{found.speedup:.3g} times as fast"
    return {"faster": times, "slower": f"SLOWER: {times}"}.get(found.verdict, f"undecided: about {found.speedup:.2f} times as fast")


def _tone(found: Latency) -> str:
    return {"faster": "good", "slower": "bad"}.get(found.verdict, "")


def _bar(found: Latency, low: float, high: float) -> Bar:
    def at(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2) if math.isfinite(value) and high > low else 0.0

    times = f"{found.milliseconds:.3g} ms against {found.against_milliseconds:.3g} ms"
    threads = f"{found.threads} thread{'' if found.threads == 1 else 's'}"
    figures = f"{found.speedup:.3f} [{found.low:.3f}, {found.high:.3f}]: {times}, {threads}"
    left, right = at(found.low), at(found.high)
    return Bar(f"{found.engine} against {found.against}", figures, _tone(found), left, round(right - left, 2), at(1.0))
