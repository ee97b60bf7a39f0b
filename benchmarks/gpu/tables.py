"""The results of one GPU as JSON and as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normfuse.files import atomic

__all__ = ["checks_table", "model_line", "norm_line", "page", "parts", "product_line", "slug", "write"]

Row = Mapping[str, Any]
_MOST_SAID = 5  # cases of one kernel and dtype that are named


def slug(name: str) -> str:
    """`NVIDIA H100 80GB HBM3` is `h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-") or "unknown"


def write(facts: Mapping[str, Any], folder: Path, name: str) -> tuple[Path, Path]:
    """Both files; they replace earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / f"{name}.json", folder / f"{name}.md"
    for path, text in zip(files, (json.dumps(facts, indent=1) + "\n", page(facts)), strict=True):
        with atomic(path, force=True) as partial:
            partial.write_text(text, encoding="utf-8")
    return files


def page(facts: Mapping[str, Any]) -> str:
    """The page of one device."""
    device = facts["device"]
    lines = [
        f"# {device['name']}",
        "",
        f"Compute capability {device['capability']}, driver {device['driver']}, CUDA {device['cuda']}. {facts['date']}.",
        ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + ".",
        "",
        f"    {facts['command']}",
        "",
    ]
    return "\n".join([*lines, *parts(facts)])


def parts(facts: Mapping[str, Any], head: str = "##") -> list[str]:
    """Lines of every part that was run, each under a heading of that level."""
    lines = []
    if "checks" in facts:
        lines += [f"{head} Kernels against float64", "", checks_table(facts["checks"]), ""]
    if "probe" in facts:
        lines += [f"{head} TensorRT for RTX", "", _probe(facts["probe"]), ""]
    if "norms" in facts:
        lines += [f"{head} Memory-bound kernels", "", *_norms(facts["norms"]), ""]
    if "products" in facts:
        lines += [f"{head} Products", "", *_products(facts["products"], f"{head}#"), ""]
    if "models" in facts:
        lines += [f"{head} Models", "", *_models(facts["models"], f"{head}#"), ""]
    if facts.get("left_out"):
        lines += ["Not measured, because the time was over: " + "; ".join(facts["left_out"]) + ".", ""]
    return lines


def checks_table(rows: Sequence[Row]) -> str:
    """One line a kernel and dtype, and below it what failed."""
    lines = ["| kernel | dtype | cases | largest error | bound | |", "|---|---|---|---|---|---|"]
    for r in rows:
        verdict = "FAILED" if r["failed"] else "ok"
        lines.append(f"| {r['kernel']} | {r['dtype']} | {r['cases']} | {r['error']:.1e} | {r['bound']:.0e} | {verdict} |")
    wrong = [f"- {r['kernel']}, {r['dtype']}: {text}{_more(r)}" for r in rows for text in r["failed"][:_MOST_SAID]]
    return "\n".join([*lines, *(["", *wrong] if wrong else [])])


def _more(row: Row) -> str:
    return f" ({len(row['failed'])} cases in all)" if len(row["failed"]) > _MOST_SAID else ""


def norm_line(row: Row) -> str:
    """A function, dtype and shape in one line."""
    best = row["best"]
    ours = "not measured" if best is None else f"{best[1]:.2f}x the best other, {row['bandwidth']:.0%} of the bandwidth"
    return f"{row['name']} {row['dtype']} {_shape(row['shape'])}: {ours}{_failed(row)}"


def product_line(row: Row) -> str:
    times = ", ".join(f"{n} {t['median']:.1f} µs" for n, t in row["timings"].items())
    return f"{_shape(row['size'])}: {times}{_failed(row)}"


def model_line(row: Row) -> str:
    times = ", ".join(f"{n} {t['median'] / 1e3:.3f} ms" for n, t in row["timings"].items())
    return f"{row['name']} {row['dtype']}: {times}{_failed(row)}"


def _failed(row: Row) -> str:
    return "".join(f"; {name} failed: {why}" for name, why in row["failed"].items())


def _shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _probe(found: Row) -> str:
    version = f"TensorRT for RTX {found['version']}: " if "version" in found else ""
    if not found["works"]:
        return f"{version}{found['error']}"
    return f"{version}an engine was built in {found['build_seconds']:.1f} s, opened in {found['open_seconds']:.1f} s, and ran."


def _norms(found: Row) -> list[str]:
    lines = [
        "Microseconds, median and 95 % interval, the functions taken in turn. Values come from memory; where all copies of them",
        f"may fit into the cache, the shape has a star. To add to one number takes {found['floor']:.1f} µs: no kernel takes less.",
        "Above 1 normfuse is faster than the best of the others. The last column is the share of what a copy reaches,",
        f"{found['copy'] / 1e9:.0f} GB/s.",
        "",
        "| function | dtype | shape | normfuse | torch | compile | against the best | of a copy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found["rows"]:
        times = " | ".join(_time(r["timings"].get(n), 1) for n in ("normfuse", "torch", "compile"))
        best = "—" if r["best"] is None else f"{r['best'][1]:.2f} [{r['best'][0]:.2f}, {r['best'][2]:.2f}]"
        share = "—" if r["bandwidth"] is None else f"{r['bandwidth']:.0%}"
        star = " *" if r["cached"] else ""
        lines.append(f"| {r['name']} | {r['dtype']} | {_shape(r['shape'])}{star} | {times} | {best} | {share} |")
    return [*lines, *_reasons(found["rows"], lambda r: f"{r['name']} {r['dtype']} {_shape(r['shape'])}")]


def _products(rows: Sequence[Row], head: str) -> list[str]:
    lines = [
        "Rows x inputs x outputs. Microseconds, median and 95 % interval, all products taken in turn, and how many times faster",
        "than the fp16 product. Weights come from memory, another copy each time; a star: all copies may be in the cache, in part.",
        "",
    ]
    for r in rows:
        beside = f", beside {r['beside']}" if r["beside"] else ""
        lines += [f"{head} {_shape(r['size'])}{beside}", "", "| product | µs | against fp16 | TFLOP/s |", "|---|---|---|---|"]
        for n, t in r["timings"].items():
            star = " *" if n in r["cached"] else ""
            lines.append(f"| {n}{star} | {_time(t, 1)} | {_ratio(t)} | {r['operations'] / t['median'] / 1e6:.1f} |")
        lines.append("")
    return [*lines, *_reasons(rows, lambda r: _shape(r["size"]))]


def _models(rows: Sequence[Row], head: str) -> list[str]:
    lines = ["Milliseconds of one call as a CUDA graph. The error is that of the largest output, against float32.", ""]
    for r in rows:
        lines += [f"{head} {r['name']}, {r['dtype']}", "", "| engine | ms | against eager | error |", "|---|---|---|---|"]
        for n, t in r["timings"].items():
            error = r["errors"].get(n)
            lines.append(f"| {n} | {_time(t, 1e3)} | {_ratio(t)} | {'' if error is None else f'{error:.1e}'} |")
        lines.append("")
    return [*lines, *_reasons(rows, lambda r: f"{r['name']} {r['dtype']}")]


def _time(t: Row | None, unit: float) -> str:
    return "—" if t is None else f"{t['median'] / unit:.3f} [{t['low'] / unit:.3f}, {t['high'] / unit:.3f}]"


def _ratio(t: Row) -> str:
    return "—" if t["speedup"] is None else f"{t['speedup'][1]:.2f}"


def _reasons(rows: Sequence[Row], label: Any) -> list[str]:
    return [f"- {label(r)}, {name}: {why}" for r in rows for name, why in r["failed"].items()]
