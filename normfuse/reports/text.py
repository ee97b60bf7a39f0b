"""A report as plain text of a given width."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from normfuse.errors import UsageError
from normfuse.reports.answer import answer, origin_lines
from normfuse.reports.model import LayerQuantization, Part, PassReport, ReportData, Site
from normfuse.reports.numbers import change, duration, exactness, magnitude, size

__all__ = [
    "LAYER_HEAD",
    "Reason",
    "compact",
    "layer_cells",
    "layer_table",
    "left_by_reason",
    "part_in_short",
    "passes_in_rows",
    "quantized_in_short",
    "reasons",
    "table",
]

_NARROWEST = 20
_NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")  # no leading zero: it would not come back as it was written
_VARIES = re.compile(r"\w+(?:\.\w+)+|(?<![\w.])\d+(?![\w.])")  # module paths and numbers in a reason
_LISTED = 3  # places that one reason names


@dataclass(frozen=True)
class Reason:
    """Sites that one rule treated alike, for one reason.

    Attributes:
        rule, note, remedy: as in `Site`, the same for all of them.
        paths: module paths, in the order of the report, each once.
        blockers: module paths of what blocks them, each once.
        count: number of sites; a path may hold several.
    """

    rule: str
    note: str
    remedy: str
    paths: tuple[str, ...]
    blockers: tuple[str, ...]
    count: int


def reasons(sites: Iterable[Site]) -> tuple[Reason, ...]:
    """Sites of the same rule, reason and remedy together, largest group first.

    Reasons that differ only in the place or the numbers that they name are one reason that names all of them.
    """
    groups: dict[tuple[str, str, str], list[Site]] = {}
    for site in sites:
        groups.setdefault((site.rule, _VARIES.sub("\0", site.note), site.remedy), []).append(site)
    found = [
        Reason(
            rule,
            _together([s.note for s in group]),
            remedy,
            paths=tuple(dict.fromkeys(s.path for s in group)),
            blockers=tuple(dict.fromkeys(s.blocker for s in group if s.blocker)),
            count=len(group),
        )
        for (rule, _, remedy), group in groups.items()
    ]
    return tuple(sorted(found, key=lambda r: -r.count))


def _together(notes: list[str]) -> str:
    """One sentence for notes that differ in places and numbers."""
    notes = list(dict.fromkeys(notes))
    if len(notes) == 1:
        return notes[0]
    columns = zip(*([m[0] for m in _VARIES.finditer(note)] for note in notes), strict=True)
    words = iter([_listed(dict.fromkeys(column)) for column in columns])
    return _VARIES.sub(lambda _: next(words), notes[0])


def _listed(found: Iterable[str]) -> str:
    found = tuple(found)
    names = found if all(name.isdigit() for name in found) else compact(found)
    return ", ".join(names) if len(names) <= _LISTED else f"{', '.join(names[:_LISTED])} and {len(names) - _LISTED} more"


def compact(paths: Iterable[str]) -> tuple[str, ...]:
    """Three or more paths that differ in one number, written as one: `blocks.{0-11}.norm1`."""
    paths = tuple(dict.fromkeys(paths))
    templates: dict[str, dict[str, int]] = {}
    for path in paths:
        for number in _NUMBER.finditer(path):
            template = f"{path[: number.start()]}\0{path[number.end() :]}"
            templates.setdefault(template, {})[path] = int(number[0])
    home: dict[str, str] = {}  # path -> the template that it is written in
    for template, members in sorted(templates.items(), key=lambda item: -len(item[1])):
        free = [path for path in members if path not in home]
        if len(free) >= 3:
            home |= dict.fromkeys(free, template)
    numbers: dict[str, list[int]] = {}
    for path, template in home.items():
        numbers.setdefault(template, []).append(templates[template][path])
    together = {t: t.replace("\0", "{" + ",".join(_ranges(sorted(ns))) + "}") for t, ns in numbers.items()}
    return tuple(dict.fromkeys(together[home[path]] if path in home else path for path in paths))


def _ranges(numbers: list[int]) -> Iterator[str]:
    first = last = numbers[0]
    for n in [*numbers[1:], None]:
        if n is not None and n == last + 1:
            last = n
            continue
        yield f"{first}" if first == last else f"{first}-{last}"
        if n is not None:
            first = last = n


def table(report: ReportData, width: int = 80) -> str:
    """The report as text; no line is longer than `width`, whatever the module paths are.

    Args:
        report: what `normfuse.report` returns.
        width: columns; 20 or more.
    """
    if width < _NARROWEST:
        raise UsageError(f"a report needs at least {_NARROWEST} columns, not {width}")
    lines = [line for text in origin_lines(report) for line in _wrap(text, width, 0, hang=2)]
    lines += [""] if lines else []
    lines += _facts(report, width)
    if report.parts:
        lines += ["", *_parts(report.parts, width)]
    for title, sites in (("taken back: failed verification", report.undone), ("stayed, and why", report.refused)):
        if sites:
            lines += ["", *_wrap(title, width, 0), *_reasons(sites, width)]
    changed = [s for p in report.passes if p.sqnr is not None and not p.quantization for s in p.applied]
    if changed:
        lines += ["", *_wrap("changed on purpose", width, 0), *_reasons(changed, width)]
    if report.notes:
        lines += ["", "notes"]
        for note in report.notes:
            lines += _wrap(f"- {note}", width, 2, hang=2)
    if report.quantization:
        lines += ["", *layer_table(report.quantization, width)]
    lines += ["", *_rules(report, width), *_passes(report, width)]
    return "\n".join(lines)


def _rules(report: ReportData, width: int) -> Iterator[str]:
    rules = Counter(site.rule for site in report.applied).most_common()
    if rules:
        yield from _wrap("rules applied: " + ", ".join(f"{rule} {count}" for rule, count in rules), width, 0, hang=2)


def _passes(report: ReportData, width: int) -> Iterator[str]:
    """One line a pass that did something; those that did not share one, so that all times add up."""
    if not report.passes:
        yield "no pass ran"
        return
    undone = any(p.undone for p in report.passes)
    errors = any(p.exact is not None or p.drift is not None for p in report.passes)
    rows = passes_in_rows(report)
    room = width - 9 * (2 + undone) - 22 * errors - 13
    if room < 5:
        for name, p in rows:
            counts = f"{len(p.applied)} applied, {len(p.refused)} refused" + (f", {len(p.undone)} undone" if p.undone else "")
            measured = f", exact {exactness(p)}, drift {magnitude(p.drift)}" if errors else ""
            yield from _wrap(f"{name}: {counts}{measured}, {duration(p.seconds)}", width, 0, hang=2)
        return
    names = [_shorten(_clean(name), room) for name, _ in rows]
    column = max(4, *map(len, names))
    head = ("applied", "refused", *(["undone"] if undone else []))
    yield (
        f"{'pass':<{column}}"
        + "".join(f"{h:>9}" for h in head)
        + (f"{'exact':>11}{'drift':>11}" if errors else "")
        + f"{'time':>13}"
    )
    for name, (_, p) in zip(names, rows, strict=True):
        counts = "".join(f"{len(sites) or '-':>9}" for sites in (p.applied, p.refused, *([p.undone] if undone else [])))
        measured = f"{exactness(p):>11}{magnitude(p.drift):>11}" if errors else ""
        yield f"{name:<{column}}{counts}{measured}{duration(p.seconds):>13}"


def passes_in_rows(report: ReportData) -> list[tuple[str, PassReport]]:
    """What the table of passes shows: capture, passes that did something, the others in one row, verification, the whole."""
    busy = [p for p in report.passes if p.applied or p.refused or p.undone or p.exact is not None or p.sqnr is not None]
    idle = [p for p in report.passes if not any(p is b for b in busy)]
    rows = [("capture", PassReport("capture", seconds=report.capture_seconds))] if report.capture_seconds else []
    rows += [(p.name, p) for p in busy]
    if idle:
        others = f"{len(idle)} other{'' if len(idle) == 1 else 's'}"
        rows.append((others, PassReport(others, seconds=sum(p.seconds for p in idle))))
    if report.verify_seconds:
        rows.append(("verification", PassReport("verification", seconds=report.verify_seconds)))
    return [*rows, ("whole", _whole(report))]


def _whole(report: ReportData) -> PassReport:
    return PassReport("whole", report.applied, report.refused, report.undone, report.exact, report.drift, report.seconds)


def _facts(report: ReportData, width: int) -> Iterator[str]:
    for name, text in answer(report):
        yield from _wrap(f"{name:<12}{text}", width, 0, hang=12 if width >= 40 else 2)


def _parts(parts: Iterable[Part], width: int) -> Iterator[str]:
    """One line an optimized part; what stays as it is by reason."""
    for part in parts:
        if part.report is not None:
            yield from _wrap(f"part {part.path} ({part.kind}): {part_in_short(part.report)}", width, 0, hang=5)
    for reason, paths in left_by_reason(parts):
        yield from _wrap(f"left as it is: {reason}", width, 0, hang=5)
        yield from _wrap("at " + ", ".join(compact(paths)), width, 5, hang=3)


def part_in_short(report: ReportData) -> str:
    """`62 applied, 0 refused, batch_norm 49 → 0, exact 3.1e-16, 1.25 s`"""
    kinds = sorted({*report.norms_before, *report.norms_after})
    norms = [f"{k} {report.norms_before.get(k, 0)} → {report.norms_after.get(k, 0)}" for k in kinds]
    counts = [f"{len(report.applied)} applied", f"{len(report.refused)} refused"]
    return ", ".join([*counts, *norms, f"exact {magnitude(report.exact)}", duration(report.seconds)])


def left_by_reason(parts: Iterable[Part]) -> list[tuple[str, list[str]]]:
    """Paths of the submodules that stay as they are, by reason, most frequent first."""
    found: dict[str, list[str]] = {}
    for part in parts:
        if part.report is None:
            found.setdefault(part.left, []).append(part.path)
    return sorted(found.items(), key=lambda item: -len(item[1]))


def layer_table(layers: Iterable[LayerQuantization], width: int) -> Iterator[str]:
    """One line a quantized layer; those that stay in float are counted, their reasons stand among the refusals."""
    layers = tuple(layers)
    yield from _wrap(quantized_in_short(layers), width, 0, hang=2)
    rows = [layer_cells(layer) for layer in layers if not layer.kept]
    room = width - _LAYER_COLUMNS
    if room < 12:
        for path, *cells in rows:
            text = ", ".join(f"{h} {c}" for h, c in zip(LAYER_HEAD[1:], cells, strict=True) if c != "-")
            yield from _wrap(f"{path}: {text}", width, 0, hang=2)
        return
    names = [_tail(_clean(path), room) for path, *_ in rows]
    column = max(5, *map(len, names)) if names else 0
    lines = [(LAYER_HEAD[0], LAYER_HEAD[1:]), *zip(names, (r[1:] for r in rows), strict=True)] if names else []
    for name, values in lines:
        cut = (f"{_shorten(c, w - 1):>{w}}" for c, w in zip(values, _LAYER_WIDTHS, strict=True))
        yield f"{name:<{column}}" + "".join(cut)


LAYER_HEAD = ("layer", "bits", "by shift", "SQNR", "clipped", "bytes", "ratio", "speed")
_LAYER_WIDTHS = (7, 14, 9, 8, 8, 6, 7)
_LAYER_COLUMNS = sum(_LAYER_WIDTHS)


def quantized_in_short(layers: Iterable[LayerQuantization]) -> str:
    """`quantized 24 of 25 layers: 18.6 MB → 2.5 MB (-86.4 %)`"""
    layers = tuple(layers)
    total = next((layer for layer in layers if layer.kind == "model"), None)
    layers = tuple(layer for layer in layers if layer is not total)
    done = sum(not layer.kept for layer in layers)
    return f"quantized {done} of {len(layers)} layers" + (
        "" if total is None else f": {change(total.bytes_before, total.bytes_after, size)}"
    )


def layer_cells(layer: LayerQuantization) -> tuple[str, ...]:
    """Path, bits, channels by exponent, SQNR, clip rate, bytes, their share of the float ones, and speed (≈: predicted)."""
    weight = "" if layer.weight_bits is None else f"w{layer.weight_bits}"
    activation = "" if layer.activation_bits is None else f"a{layer.activation_bits}{'s' if layer.activations == 'static' else ''}"
    speed = "-" if layer.speedup is None else f"{'' if layer.measured else '≈'}{layer.speedup:.2f}x"
    return (
        layer.path,
        weight + activation or "-",
        "/".join(map(str, layer.groups)) or "-",
        "-" if layer.sqnr is None else f"{layer.sqnr:.1f} dB",
        "-" if layer.clipped is None else f"{100 * layer.clipped:.2f} %",
        size(layer.bytes_after),
        f"{layer.bytes_after / layer.bytes_before:.2f}" if layer.bytes_before else "-",
        speed,
    )


def _reasons(sites: Iterable[Site], width: int) -> Iterator[str]:
    for r in reasons(sites):
        times = f" ({r.count} times)" if r.count > 1 else ""
        yield from _wrap(f"{r.rule}: {r.note or 'no reason given'}{times}", width, 2, hang=2)
        yield from _wrap("at " + ", ".join(compact(r.paths)), width, 6, hang=3)
        if r.blockers:
            yield from _wrap("blocked by " + ", ".join(compact(r.blockers)), width, 6, hang=3)
        if r.remedy:
            yield from _wrap(f"to unblock: {r.remedy}", width, 6, hang=3)


def _wrap(text: str, width: int, indent: int, hang: int = 0) -> list[str]:
    return textwrap.wrap(
        _clean(text, keep_runs=True),
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hang),
        break_on_hyphens=False,
    )


def _clean(text: str, *, keep_runs: bool = False) -> str:
    """One line of printable characters: a reason may quote anything."""
    joined = re.sub(r"\s*[\r\n\t\v\f]+\s*", " ", text) if keep_runs else " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


def _shorten(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


def _tail(text: str, room: int) -> str:
    """The end of a module path says which layer it is."""
    return text if len(text) <= room else "…" + text[len(text) - room + 1 :]
