"""The section "On a GPU" of docs/results.md, from what steps wrote down."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.first_light.record import Record, read

__all__ = ["HEADING", "REHEARSED", "put", "section", "write"]

HEADING = "## On a GPU"
#: Name of the device of a rehearsal, which is none.
REHEARSED = "stand-in"


def put(folder: Path, page: Path) -> int:
    """Put what is in `folder` into `page`, in the place of the section that is there; an exit code."""
    try:
        records = read(folder)
    except FileNotFoundError as e:
        print(f"nothing was run into {folder}: {e}", file=sys.stderr)
        return 2
    names = {record.device.get("name") for record in records if record.device}
    if not names or REHEARSED in names:
        print(f"{folder} holds a rehearsal, or nothing from a device: no page is made of it", file=sys.stderr)
        return 2
    text = page.read_text(encoding="utf-8")
    place = re.compile(rf"^{HEADING}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    if not place.search(text):
        print(f"{page} has no section {HEADING!r}", file=sys.stderr)
        return 2
    found = section(records).rstrip() + "\n"
    after = text[place.search(text).end() :]  # type: ignore[union-attr]
    page.write_text(place.sub(lambda m: found + ("\n" if after else ""), text, count=1), encoding="utf-8")
    return 0


def write(records: Sequence[Record], path: Path) -> None:
    """The section alone."""
    path.write_text(section(records), encoding="utf-8")


def section(records: Sequence[Record]) -> str:
    """What was run on which device with what, the steps and what became of them, and their tables."""
    from benchmarks.gpu.tables import parts

    device = next((r.device for r in reversed(records) if r.device), {})
    capability = str(device.get("capability", "?")).replace(".", "")
    lines = [
        HEADING,
        "",
        f"{device.get('name', 'unknown device')} (sm_{capability}), driver {device.get('driver', '?')}, CUDA "
        f"{device.get('cuda', '?')}; {records[0].date}; " + ", ".join(f"{k} {v}" for k, v in records[-1].versions.items()) + ".",
        "`python -m benchmarks.gpu.first_light`; each step in a process of its own.",
        "",
        "| step | | seconds |",
        "|---|---|---|",
        *(f"| {r.step} | {r.status} | {r.seconds:.0f} |" for r in records),
        "",
        *(f"- {r.step}, {r.status}: {' '.join(r.said.split())[:400]}" for r in records if r.said),
        "",
        *_carried(records),
        *parts(_facts(records), "###"),
    ]
    text = "\n".join(lines) + "\n"
    return re.sub(r"\n{3,}", "\n\n", text)


def _facts(records: Sequence[Record]) -> dict[str, Any]:
    """Parts as `tables` knows them."""
    from benchmarks.gpu.checks import gathered

    rows = {r.step: [row for row in r.rows if "left_out" not in row] for r in records}
    facts: dict[str, Any] = {"left_out": [row["left_out"] for r in records for row in r.rows if "left_out" in row]}
    if checks := [row for name, found in rows.items() if name.startswith("checks: ") for row in found]:
        facts["checks"] = gathered(checks)
    if products := [row for name, found in rows.items() if name.startswith("products: ") for row in found]:
        facts["products"] = products
    if norms := rows.get("norms"):
        facts["norms"] = {**norms[0], "rows": norms[1:]}
    if models := rows.get("models"):
        facts["models"] = models
    return facts


def _carried(records: Sequence[Record]) -> list[str]:
    """Kernels as engines carry them, the tests of the operators, and memory."""
    lines = []
    for record in records:
        if record.step == "carried" and record.rows:
            rows = [row for row in record.rows if "image" in row]
            right = [row for row in rows if not row["failed"]]
            same = sum(row["difference"] == 0 for row in right)
            load = max((row["load_ms"] for row in right), default=0.0)
            lines.append(
                f"Kernels as engines carry them, in a CUDA graph, {len(rows)} images: {len(right)} right, {same} of them with the "
                f"same bits as the launch of PyTorch; loading one takes up to {load:.0f} ms."
            )
            lines += [f"- {row['name']} {row['image']}: {row['failed']}" for row in rows if row["failed"]]
            lines.append("")
        if record.step in ("operators", "memory") and record.rows:
            name = {"operators": "Tests of the operators", "memory": "compute-sanitizer, memcheck"}[record.step]
            lines += [f"{name}: {record.rows[-1]['summary']}.", ""]
    return lines
