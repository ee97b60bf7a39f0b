"""A report as one HTML page: nothing is loaded, no script runs, every text is escaped."""

from collections.abc import Iterable, Iterator
from html import escape

from normfuse import __version__
from normfuse.report import Error, LayerQuantization, Part, PassReport, Report, Site
from normfuse.report_text import (
    LAYER_HEAD,
    change,
    compact,
    duration,
    exactness,
    layer_cells,
    left_by_reason,
    magnitude,
    part_in_short,
    quantized_in_short,
    reasons,
    size,
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
h1 { margin: 0; font-size: 1.5rem; }
h2 { margin: 2rem 0 .6rem; font-size: 1.05rem; }
.soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .75rem; margin: 1.25rem 0 0; }
.card, .reason, .frame { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.card { padding: .8rem 1rem; }
.card b { display: block; font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums; }
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
th.why, td.why { text-align: left; white-space: normal; min-width: 11rem; }
.reason { padding: .8rem 1rem; margin: .6rem 0; }
.reason p { margin: .25rem 0; }
.rule { font-weight: 600; }
.count { float: right; color: var(--soft); }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
summary { cursor: pointer; padding: .15rem 0; }
ul { margin: .3rem 0; padding-left: 1.2rem; }
footer { margin-top: 2.5rem; font-size: .85rem; }
"""


def page(report: Report) -> str:
    """The report as a self-contained HTML page, light or dark as the reader's system is."""
    body = "".join(
        (
            f"<h1>normfuse report</h1><p class=soft>{_headline(report)}</p>",
            f"<div class=cards>{''.join(_cards(report))}</div>",
            f"<h2>Passes</h2>{_passes(report)}",
            f"<h2>Normalizations</h2>{_norms(report)}",
            _parts(report.parts),
            _layers(report.quantization),
            _groups("Undone: failed verification, taken back", report.undone, "bad"),
            _groups("Refused, and why", report.refused, "warn"),
            _applied(report.applied),
            _notes(report.notes),
            f"<footer class=soft>normfuse {escape(__version__)}</footer>",
        )
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>normfuse report</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _headline(report: Report) -> str:
    def many(count: int, what: str) -> str:
        return f"{count:,} {what}{'' if count == 1 else 's'}"

    undone = f", {len(report.undone):,} undone" if report.undone else ""
    return f"{many(len(report.applied), 'rewrite')} applied, {len(report.refused):,} refused{undone}"


def _cards(report: Report) -> Iterator[str]:
    before, after = sum(report.norms_before.values()), sum(report.norms_after.values())
    yield _card("normalizations", f"{before} → {after}" if before or after else "none", "")
    yield _card("exact error (float64)", magnitude(report.exact), _absolute(report.exact))
    yield _card(
        f"drift ({report.drift.dtype if report.drift else 'native dtype'})", magnitude(report.drift), _absolute(report.drift)
    )
    yield _card("parameters", f"{report.parameters_after:,}", change(report.parameters_before, report.parameters_after))
    yield _card("size", size(report.bytes_after), change(report.bytes_before, report.bytes_after, size))
    yield _card("time", duration(report.seconds), "verification included")


def _card(title: str, value: str, below: str) -> str:
    head, foot = (f"<span class=soft>{escape(text)}</span>" for text in (title, below))
    return f"<div class=card>{head}<b>{escape(value)}</b>{foot}</div>"


def _absolute(error: Error | None) -> str:
    return "not measured" if error is None else f"relative; {error.max_abs:.1e} absolute"


def _passes(report: Report) -> str:
    if not report.passes:
        return "<p class=soft>No pass ran.</p>"
    longest = max(p.seconds for p in report.passes) or 1.0
    rows = "".join(
        _row(p.name, p, f"<span class=bar style='width:{p.seconds / longest * 5:.2f}rem'></span>") for p in report.passes
    )
    whole = PassReport("", report.applied, report.refused, report.undone, report.exact, report.drift, report.seconds)
    head = "".join(f"<th>{h}</th>" for h in ("pass", "applied", "refused", "undone", "exact", "drift", "time", ""))
    return f"<div class=frame><table><tr>{head}</tr>{rows}{_row('whole', whole, '', ' class=whole')}</table></div>"


def _row(name: str, p: PassReport, bar: str, attributes: str = "") -> str:
    undone = f"<span class=bad>{len(p.undone)}</span>" if p.undone else "0"
    cells = (
        escape(name), str(len(p.applied)), str(len(p.refused)), undone,
        exactness(p), magnitude(p.drift), duration(p.seconds), bar,
    )  # fmt: skip
    return f"<tr{attributes}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _norms(report: Report) -> str:
    kinds = sorted({*report.norms_before, *report.norms_after})
    if not kinds:
        return "<p class=soft>The model has none.</p>"
    rows = "".join(
        f"<tr><td>{escape(k)}</td><td>{report.norms_before.get(k, 0)}</td><td>{report.norms_after.get(k, 0)}</td></tr>"
        for k in kinds
    )
    return f"<div class=frame><table><tr><th>kind</th><th>before</th><th>after</th></tr>{rows}</table></div>"


def _layers(layers: Iterable[LayerQuantization]) -> str:
    layers = tuple(layers)
    if not layers:
        return ""
    searched = [f"{b} bits" for b in sorted({b for layer in layers for b, _ in layer.sensitivity})]
    head = _cells("th", LAYER_HEAD) + "<th class=why>kept in float because</th>" + _cells("th", searched)
    rows = "".join(
        f"<tr>{_cells('td', layer_cells(layer))}<td class=why>{escape(layer.kept)}</td>"
        f"{_cells('td', _sensitivity(layer, searched))}</tr>"
        for layer in layers
    )
    told = "; columns by bits: SQNR of the outputs with that layer alone quantized" if searched else ""
    return (
        f"<h2>Quantization</h2><p class=soft>{escape(quantized_in_short(layers))}{told}</p>"
        f"<div class=frame><table><tr>{head}</tr>{rows}</table></div>"
    )


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
