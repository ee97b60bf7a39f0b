"""docs/zoo.md from the rows of the zoo."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.zoo_measure import Row

__all__ = ["bars", "text"]

Rows = Sequence[Row]

_CAPTURED = ("whole", "parts")
_BARS = {"timm": 1.0, "torchvision": 0.98, "transformers": 0.96}
_SECONDS, _PARAMETERS, _SPREAD, _SHARE = 30.0, 100_000_000, 3.0, 0.95
_REASONS = 40  # rows of the table of reasons


_HEAD = """\
Every family of timm, torchvision and transformers through `normfuse.optimize`, with random weights and norm statistics as if
trained, one process a model. Made by `python -m benchmarks.zoo` and `python -m benchmarks.zoo --page`.

*whole*: one graph; *parts*: `partial=True`, submodule by submodule. *wrong* compares the result with the model as it was given, on
its example and on other random inputs, and once more in float64 with nothing proven and nothing taken back. *idempotent*: a second
`optimize` finds nothing to do. A model of transformers is its base model at tiny sizes; types whose tiny model does not run by
itself are not counted. Times include whatever else the machine did meanwhile.""".splitlines()


def text(lines: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]] | None = None, planned: int | None = None) -> str:
    """The page.

    Args:
        lines: rows as `benchmarks.zoo` writes them.
        before: rows of an earlier version, for the table of reasons.
        planned: how many models the zoo has; the page says how many of them were run.
    """
    rows = [_row(line) for line in lines]
    usable = [r for r in rows if r.status != "unusable"]
    earlier = None if before is None else [_row(line) for line in before]
    parts = [
        "# The zoo",
        "",
        *_HEAD,
        "",
        *([] if planned is None or planned <= len(rows) else [f"**Run so far: {len(rows)} of {planned} models.**", ""]),
        *_summary(usable, len(rows) - len(usable)),
        "",
        "## Bars",
        "",
        *(f"* {'holds' if held else '**missed**'}: {what}" for what, held in bars(usable)),
        "",
        "## Norms that stay, and why",
        "",
        *_reasons(usable, earlier),
        "",
        *_faults(usable),
        "## Models",
        "",
        *_models(usable),
    ]
    return "\n".join(parts).rstrip() + "\n"


def bars(rows: Rows) -> Iterator[tuple[str, bool]]:
    """What is asked of the zoo, with what was found, and does it hold?"""
    ran = [r for r in rows if r.status in _CAPTURED]
    wrong = [r.name for r in ran if r.wrong]
    yield f"0 wrong ({len(wrong)} of {len(ran)})", not wrong
    for library, share in _BARS.items():
        of = [r for r in rows if r.name.startswith(f"{library}:")]
        done = sum(r.status in _CAPTURED for r in of)
        if of:
            yield f"{library}: {share:.0%} captured ({done} of {len(of)}, {done / len(of):.1%})", done >= share * len(of)
    twice = [r for r in ran if r.again is not None]
    more = [r.name for r in twice if r.again]
    yield f"idempotent ({len(twice) - len(more)} of {len(twice)})", not more
    small = [r for r in ran if r.parameters < _PARAMETERS]
    slow = [r.name for r in small if r.seconds > _SECONDS]
    yield f"at most {_SECONDS:.0f} s below 100 M parameters ({len(slow)} of {len(small)} take longer)", not slow
    paces = [_pace(r) for r in ran if r.nodes]
    if paces:
        limit = _SPREAD * statistics.median(paces)
        near = sum(p <= limit for p in paces)
        yield (
            f"ms a node within {_SPREAD:.0f} x of the median, {limit / _SPREAD:.1f} ms, for {_SHARE:.0%} ({near / len(paces):.1%})",
            near >= _SHARE * len(paces),
        )


def _row(line: dict[str, Any]) -> Row:
    known = {k: v for k, v in line.items() if k in Row.__dataclass_fields__}
    return Row(**known)


def _pace(row: Row) -> float:
    """ms a node."""
    return 1e3 * row.seconds / row.nodes


def _summary(rows: Rows, unusable: int) -> Iterator[str]:
    yield "| library | models | whole | parts | refused | raised, stopped | wrong | norms | stay | undone | median s | longest s |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for library in (*_BARS, ""):
        of = [r for r in rows if r.name.startswith(f"{library}:" if library else "")]
        if not of:
            continue
        ran = [r for r in of if r.status in _CAPTURED]
        status = Counter(r.status for r in of)
        other = len(of) - sum(status[s] for s in (*_CAPTURED, "refused"))
        norms, stay = (sum(sum(getattr(r, n).values()) for r in ran) for n in ("norms_before", "norms_after"))
        seconds = [r.seconds for r in ran] or [0.0]
        undone = sum(n for r in ran for *_, n in r.undone)
        yield (
            f"| {library or 'all'} | {len(of)} | {status['whole']} | {status['parts']} | {status['refused']} | {other} "
            f"| {sum(r.wrong for r in ran)} | {norms} | {stay} | {undone} | {statistics.median(seconds):.1f} | {max(seconds):.0f} |"
        )
    yield ""
    yield f"{unusable} more do not run by themselves at these sizes."


def _reasons(rows: Rows, before: Rows | None) -> Iterator[str]:
    now = _by_reason(rows)
    if before is not None:
        common = {r.name for r in rows} & {r.name for r in before}
        now = _by_reason([r for r in rows if r.name in common])
        then = _by_reason([r for r in before if r.name in common])
        yield f"Sites and models by reason, before and now, in the {len(common)} models that both runs hold."
        yield ""
        yield "| rule | reason | before: sites | models | now: sites | models |"
        yield "|---|---|---|---|---|---|"
        order = sorted({*now, *then}, key=lambda k: (-max(then.get(k, (0, 0))[0], now.get(k, (0, 0))[0]), k))
        for note, rule in order[:_REASONS]:
            (a, b), (c, d) = then.get((note, rule), (0, 0)), now.get((note, rule), (0, 0))
            yield f"| `{rule}` | {_cell(note)} | {a} | {b} | {c} | {d} |"
        return
    yield "| rule | reason | sites | models |"
    yield "|---|---|---|---|"
    for (note, rule), (sites, models) in sorted(now.items(), key=lambda item: (-item[1][0], item[0]))[:_REASONS]:
        yield f"| `{rule}` | {_cell(note)} | {sites} | {models} |"


def _by_reason(rows: Rows) -> dict[tuple[str, str], tuple[int, int]]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for row in rows:
        for note, rule, count in row.refused:
            sites, models = found.get((note, rule), (0, 0))
            found[note, rule] = sites + count, models + 1
    return found


def _faults(rows: Rows) -> Iterator[str]:
    """Sections that a good run does not have."""
    for title, lines in (
        ("Not captured", [f"* `{r.name}` ({r.status}): {_cell(r.message)}" for r in rows if r.status not in _CAPTURED]),
        ("Wrong", [f"* `{r.name}`: native {r.native}, float64 {r.double}, noise {r.noise}" for r in rows if r.wrong]),
        ("Taken back", [f"* `{r.name}`: `{rule}` {n} x, {_cell(note)}" for r in rows for note, rule, n in r.undone]),
        ("Not idempotent", [f"* `{r.name}`: {r.again} rewrites more" for r in rows if r.again]),
        ("Not exported", [f"* `{r.name}`: {_cell(r.exported)}" for r in rows if r.exported]),
    ):
        if lines:
            yield from (f"## {title}", "", *lines, "")


def _models(rows: Rows) -> Iterator[str]:
    yield "Errors are relative: in float64 without a proof (*exact*), in the model's own dtype (*drift*)."
    yield ""
    yield "| model | M | how | norms | exact | drift | s | proving | ms a node |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for r in sorted(rows, key=lambda r: (r.name.partition(":")[0], r.family, r.name)):
        if r.status in _CAPTURED:
            norms = ", ".join(f"{k} {n} → {r.norms_after.get(k, 0)}" for k, n in r.norms_before.items())
            pace = f"{_pace(r):.1f}" if r.nodes else ""
            share = f"{r.proving / r.seconds:.0%}" if r.seconds else ""
            yield (
                f"| `{r.name}` | {r.parameters / 1e6:.1f} | {r.status} | {norms} | {_worst(r.double)} | {_worst(r.native)} "
                f"| {r.seconds:.1f} | {share} | {pace} |"
            )


def _worst(errors: Iterable[float]) -> str:
    errors = list(errors)
    return f"{max(errors):.0e}" if errors else "-"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("<", "&lt;")
