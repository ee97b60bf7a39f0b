"""A report as one HTML page: nothing is loaded, no script runs, every text is escaped."""

from collections.abc import Iterable, Iterator
from html import escape

from normfuse import __version__
from normfuse.reports.answer import answer, kind_in_words, origin_lines
from normfuse.reports.model import LayerQuantization, Part, ReportData, Site
from normfuse.reports.numbers import duration, exactness, magnitude
from normfuse.reports.text import (
    LAYER_HEAD,
    compact,
    layer_cells,
    left_by_reason,
    part_in_short,
    passes_in_rows,
    quantized_in_short,
    reasons,
)

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --ink: #1a1d23; --soft: #636b78; --line: #e1e4ea;
  --good: #0a7f4f; --warn: #9a5b00; --bad: #b3261e; --bar: #3b6fe0; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --card: #1d2026; --ink: #e7e9ee; --soft: #9aa3b2;
  --line: #30353f; --good: #4fd08f; --warn: #f0b35a; --bad: #ff8a80; --bar: #7ea6ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 62rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.5rem; overflow-wrap: anywhere; }
h1 ~ p { margin: .15rem 0; }
h2 { margin: 2rem 0 .6rem; font-size: 1.05rem; }
.soft { color: var(--soft); }
.card, .reason, .frame { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.frame { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 500; }
tr.whole td { font-weight: 600; }
.bar { display: inline-block; height: .55rem; min-width: 1px; border-radius: .2rem; background: var(--bar);
  vertical-align: middle; }
td:has(.bar) { text-align: left; }
td[data-head^="kept"] { text-align: left; white-space: normal; min-width: 11rem; }
pre { padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .45rem 1.25rem; margin: 1.25rem 0 0; padding: 1rem; }
dt { color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
dd.first { font-size: 1.2rem; font-weight: 600; }
.reason { padding: .8rem 1rem; margin: .6rem 0; }
.reason p { margin: .25rem 0; }
.rule { font-weight: 600; }
.count { float: right; color: var(--soft); }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
summary { cursor: pointer; padding: .15rem 0; }
ul { margin: .3rem 0; padding-left: 1.2rem; }
details > table, details > .frame { margin-top: .5rem; }
@media (max-width: 40rem) {  /* a row becomes a block, each cell behind its heading: nothing is cut off */
  body { padding: 1.25rem .75rem 2rem; }
  dl { grid-template-columns: 1fr; gap: .1rem; }
  dd { margin-bottom: .5rem; }
  table, tbody, tr, td { display: block; width: 100%; }
  tr { padding: .5rem .9rem; border-bottom: 1px solid var(--line); }
  tr:has(> th) { display: none; }
  td, td[data-head^="kept"] { display: flex; justify-content: space-between; gap: 1rem;
    padding: .1rem 0; border: 0; white-space: normal;
    text-align: right; overflow-wrap: anywhere; }
  td::before { content: attr(data-head); color: var(--soft); text-align: left; white-space: nowrap; }
  td:empty, td:has(.bar) { display: none; }
  td:first-child { font-weight: 600; }
}
footer { margin-top: 2.5rem; font-size: .85rem; }
"""


def page(report: ReportData) -> str:
    """The report as a self-contained HTML page, light or dark as the reader's system is."""
    body = "".join(
        (
            f"<h1>{escape(_title(report))}</h1>{_origin(report)}",
            f"<dl class=card>{''.join(_answers(report))}</dl>",
            "".join(f"<pre class=card>{escape(text)}</pre>" for text in report.files),
            _parts(report.parts),
            _groups("Taken back: failed verification", report.undone, "bad"),
            _groups("What stayed, and why", report.refused, "warn"),
            _notes(report.notes),
            _layers(report.quantization),
            _applied(report.applied),
            f"<h2>Normalizations</h2>{_norms(report)}",
            f"<h2>Passes</h2>{_passes(report)}",
            f"<footer class=soft>normfuse {escape(__version__)}</footer>",
        )
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(_title(report))} · normfuse</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _title(report: ReportData) -> str:
    return report.origin.model if report.origin is not None else "A normfuse report"


def _origin(report: ReportData) -> str:
    return "".join(f"<p class=soft>{escape(line)}</p>" for line in list(origin_lines(report))[1:])


def _answers(report: ReportData) -> Iterator[str]:
    for i, (name, text) in enumerate(answer(report)):
        yield f"<dt>{escape(name)}</dt><dd{' class=first' if i == 0 else ''}>{escape(text)}</dd>"
    yield f"<dt>time</dt><dd>{duration(report.seconds)}, verification included</dd>"


def _passes(report: ReportData) -> str:
    if not report.passes:
        return "<p class=soft>No pass ran.</p>"
    rows = passes_in_rows(report)
    errors = any(p.exact is not None or p.drift is not None for p in report.passes)
    heads = ("pass", "applied", "refused", "undone", *(("exact", "drift") if errors else ()), "time", "")
    longest = max((p.seconds for name, p in rows[:-1]), default=0.0) or 1.0
    lines = []
    for i, (name, p) in enumerate(rows):
        last = i == len(rows) - 1
        undone = f"<span class=bad>{len(p.undone)}</span>" if p.undone else "-"
        bar = "" if last else f"<span class=bar style='width:{p.seconds / longest * 5:.2f}rem'></span>"
        measured = (exactness(p), magnitude(p.drift)) if errors else ()
        cells = (escape(name), *(str(len(s) or "-") for s in (p.applied, p.refused)), undone, *measured, duration(p.seconds), bar)
        lines.append(f"<tr{' class=whole' if last else ''}>{_row(heads, cells)}</tr>")
    return _table(heads, lines)


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    return f"<div class=frame><table><tr>{_cells('th', heads)}</tr>{''.join(rows)}</table></div>"


def _row(heads: Iterable[str], cells: Iterable[str]) -> str:
    """Cells that hold markup, each with its heading for narrow screens."""
    return "".join(f'<td data-head="{escape(head)}">{cell}</td>' for head, cell in zip(heads, cells, strict=True))


def _norms(report: ReportData) -> str:
    kinds = sorted({*report.norms_before, *report.norms_after})
    if not kinds:
        return "<p class=soft>The model has none.</p>"
    heads = ("kind", "before", "after")
    counts = ((kind_in_words(k), report.norms_before.get(k, 0), report.norms_after.get(k, 0)) for k in kinds)
    return _table(heads, (f"<tr>{_row(heads, (escape(k), str(before), str(after)))}</tr>" for k, before, after in counts))


def _layers(layers: Iterable[LayerQuantization]) -> str:
    layers = tuple(layers)
    if not layers:
        return ""
    searched = [f"{b} bits" for b in sorted({b for layer in layers for b, _ in layer.sensitivity})]
    kept = any(layer.kept for layer in layers)
    heads = (*LAYER_HEAD, *(("kept in float because",) if kept else ()), *searched)
    rows = (
        f"<tr>{_row(heads, map(escape, (*layer_cells(x), *((x.kept,) if kept else ()), *_sensitivity(x, searched))))}</tr>"
        for x in layers
    )
    told = ". By shift: input channels with exponent 0, 1, ..." + (
        "; columns by bits: SQNR of the outputs with that layer alone quantized" if searched else ""
    )
    summary = f"<summary>{escape(quantized_in_short(layers))}<span class=soft>{told}</span></summary>"
    return f"<h2>Quantization</h2><details>{summary}{_table(heads, rows)}</details>"


def _cells(kind: str, texts: Iterable[str]) -> str:
    return "".join(f"<{kind}>{escape(t)}</{kind}>" for t in texts)


def _sensitivity(layer: LayerQuantization, searched: Iterable[str]) -> Iterator[str]:
    found = {f"{b} bits": f"{v:.1f} dB" for b, v in layer.sensitivity}
    return (found.get(column, "") for column in searched)


def _groups(title: str, sites: Iterable[Site], tone: str) -> str:
    groups = reasons(sites)
    if not groups:
        return ""
    blocks = []
    for r in groups:
        lines = [f"<p><span class=count>{r.count} ×</span><code class='rule {tone}'>{escape(r.rule)}</code></p>"]
        lines.append(f"<p>{escape(r.note or 'no reason given')}</p>")
        lines.append(f"<p class=soft>at {_codes(r.paths)}</p>")
        if r.blockers:
            lines.append(f"<p class=soft>blocked by {_codes(r.blockers)}</p>")
        if r.remedy:
            lines.append(f"<p class=good>To unblock: {escape(r.remedy)}</p>")
        blocks.append(f"<div class=reason>{''.join(lines)}</div>")
    return f"<h2>{escape(title)}</h2>{''.join(blocks)}"


def _codes(paths: Iterable[str]) -> str:
    return ", ".join(f"<code>{escape(path)}</code>" for path in compact(paths))


def _applied(sites: Iterable[Site]) -> str:
    rules: dict[str, list[Site]] = {}
    for site in sites:
        rules.setdefault(site.rule, []).append(site)
    if not rules:
        return "<h2>Applied</h2><p class=soft>Nothing.</p>"
    blocks = []
    for rule, members in sorted(rules.items(), key=lambda item: -len(item[1])):
        places = "".join(
            f"<li><code>{escape(s.path)}</code>{f' <span class=soft>{escape(s.note)}</span>' if s.note else ''}</li>"
            for s in members
        )
        summary = f"<summary><code class=rule>{escape(rule)}</code> <span class=soft>{len(members)} ×</span></summary>"
        blocks.append(f"<details>{summary}<ul>{places}</ul></details>")
    return f"<h2>Applied</h2><div class=reason>{''.join(blocks)}</div>"


def _parts(parts: Iterable[Part]) -> str:
    done = [
        f"<li><code>{escape(p.path)}</code> <span class=soft>{escape(p.kind)}: {escape(part_in_short(p.report))}</span></li>"
        for p in parts
        if p.report is not None
    ]
    left = [f"<li>{escape(reason)}: {_codes(paths)}</li>" for reason, paths in left_by_reason(parts)]
    blocks = (("Optimized parts", done), ("Left as they are, and why", left))
    return "".join(f"<h2>{title}</h2><ul>{''.join(items)}</ul>" for title, items in blocks if items)


def _notes(notes: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""
