"""What the page of a report shows, as values: the template only lays them out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from normfuse.reports.answer import answer, kind_in_words, origin_lines
from normfuse.reports.cards import Card, cards
from normfuse.reports.chips import Chip, before_and_after
from normfuse.reports.model import LayerQuantization, Part, ReportData, Site
from normfuse.reports.norms import norm_reasons
from normfuse.reports.numbers import change, duration, exactness, magnitude, size
from normfuse.reports.text import (
    LAYER_HEAD,
    Reason,
    compact,
    layer_cells,
    left_by_reason,
    passes_in_rows,
    quantized_in_short,
    reasons,
)

__all__ = ["Page"]

_ON_CARDS = ("changed", "quantized", "exact", "drift", "size")
_TOP = 60.0  # dB: a full bar


@dataclass(frozen=True)
class BlockRow:
    """Blocks that are alike: their places, and what they compute before and after."""

    paths: tuple[str, ...]
    count: int
    before: tuple[Chip, ...]
    after: tuple[Chip, ...]


@dataclass(frozen=True)
class LayerRow:
    """One layer in bits; `share` is the length of its bar in percent, `kept` why it is still in float."""

    path: str
    bits: str
    kept: str
    share: float
    sqnr: str
    size: str


@dataclass(frozen=True)
class Page:
    """The parts of the page, from top to bottom."""

    title: str
    weights: str
    answers: tuple[Card, ...]
    facts: tuple[tuple[str, str], ...]
    undone: tuple[Reason, ...]
    parts_done: tuple[Part, ...]
    parts_left: tuple[tuple[str, list[str]], ...]
    blocks: tuple[BlockRow, ...]
    same: tuple[str, ...]
    norms: tuple[Reason, ...]
    kinds: tuple[tuple[str, str, str], ...]
    refused: tuple[Reason, ...]
    layers: tuple[LayerRow, ...]
    quantized: str
    top: str
    searched_told: str
    layer_heads: tuple[str, ...]
    layer_rows: tuple[tuple[str, ...], ...]
    applied: tuple[tuple[str, tuple[Site, ...]], ...]
    pass_heads: tuple[str, ...]
    passes: tuple[tuple[str, ...], ...]
    origin: tuple[str, ...]

    @classmethod
    def of(cls, report: ReportData) -> Page:
        origin = report.origin
        heads, rows, searched = _layer_table(report.quantization)
        pass_heads, passes = _pass_table(report)
        told = list(origin_lines(report))[1:]
        facts = [(name, text) for name, text in answer(report) if name not in _ON_CARDS]
        return cls(
            title="A normfuse report" if origin is None else origin.model,
            weights="" if origin is None else origin.weights,
            answers=tuple(cards(report)),
            facts=(*facts, ("time", f"{duration(report.seconds)}, verification included")),
            undone=reasons(report.undone),
            parts_done=tuple(p for p in report.parts if p.report is not None),
            parts_left=tuple(left_by_reason(report.parts)),
            blocks=tuple(_blocks(report)),
            same=compact(path or "the model itself" for b in report.blocks if b.before == b.after for path in b.paths),
            norms=norm_reasons(report),
            kinds=_kinds(report),
            refused=reasons(report.refused),
            layers=tuple(map(_layer_row, report.quantization)),
            quantized=quantized_in_short(report.quantization),
            top=f"{_TOP:.0f}",
            searched_told="; columns by bits: SQNR of the outputs with that layer alone quantized" if searched else "",
            layer_heads=heads,
            layer_rows=rows,
            applied=_applied(report),
            pass_heads=pass_heads,
            passes=passes,
            origin=tuple(line for line in told if not line.startswith("weights: ")),
        )


def _blocks(report: ReportData) -> Iterator[BlockRow]:
    for block in report.blocks:
        if block.before != block.after:
            before, after = before_and_after(block)
            yield BlockRow(compact(p or "the model itself" for p in block.paths), len(block.paths), before, after)


def _kinds(report: ReportData) -> tuple[tuple[str, str, str], ...]:
    before, after = Counter(report.norms_before), Counter(report.norms_after)
    return tuple((kind_in_words(k), str(before[k]), str(after[k])) for k in sorted({*before, *after}))


def _applied(report: ReportData) -> tuple[tuple[str, tuple[Site, ...]], ...]:
    rules: dict[str, list[Site]] = {}
    for site in report.applied:
        rules.setdefault(site.rule, []).append(site)
    return tuple((rule, tuple(sites)) for rule, sites in sorted(rules.items(), key=lambda item: -len(item[1])))


def _layer_row(layer: LayerQuantization) -> LayerRow:
    path, bits, *_ = layer_cells(layer)
    sqnr = "" if layer.sqnr is None else f"{layer.sqnr:.1f} dB"
    share = 0.0 if layer.sqnr is None else round(100 * min(max(layer.sqnr, 0.0), _TOP) / _TOP, 1)
    sizes = size(layer.bytes_after) if layer.kept else change(layer.bytes_before, layer.bytes_after, size).split(" (")[0]
    return LayerRow(path, "float" if layer.kept else bits.upper(), layer.kept, share, sqnr, sizes)


def _layer_table(layers: tuple[LayerQuantization, ...]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], bool]:
    """Headings, rows, and whether widths were searched."""
    searched = [f"{b} bits" for b in sorted({b for layer in layers for b, _ in layer.sensitivity})]
    kept = any(layer.kept for layer in layers)
    heads = (*LAYER_HEAD, *(("kept in float because",) if kept else ()), *searched)
    rows = tuple((*layer_cells(x), *((x.kept,) if kept else ()), *_sensitivity(x, searched)) for x in layers)
    return heads, rows, bool(searched)


def _sensitivity(layer: LayerQuantization, searched: list[str]) -> Iterator[str]:
    found = {f"{b} bits": f"{v:.1f} dB" for b, v in layer.sensitivity}
    return (found.get(column, "") for column in searched)


def _pass_table(report: ReportData) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    if not report.passes:
        return (), ()
    errors = any(p.exact is not None or p.drift is not None for p in report.passes)
    heads = ("pass", "applied", "refused", "undone", *(("exact", "drift") if errors else ()), "time")
    rows = []
    for name, p in passes_in_rows(report):
        measured = (exactness(p), magnitude(p.drift)) if errors else ()
        counts = (str(len(sites) or "-") for sites in (p.applied, p.refused, p.undone))
        rows.append((name, *counts, *measured, duration(p.seconds)))
    return heads, tuple(rows)
