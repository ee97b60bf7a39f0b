"""Accuracy of quantized copies against the float model, paired: the same inputs through both.

    python -m benchmarks.accuracy                                        # all of it
    python -m benchmarks.accuracy --subjects digits_vit --settings W4A8  # a part; the table keeps the rest

Each row is one model and one setting: top-1 agreement with its Wilson interval, accuracy of both and the difference in points,
for texts the ratio of perplexities, and the SQNR of the outputs. Calibration and fine-tuning see other data than evaluation.
The operators run as `normfuse.optimize` leaves them, with native kernels where they are there. Written to accuracy.json and
accuracy.md; bars are those of the project: see `BARS`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import normfuse
from benchmarks.accuracy_subjects import SUBJECTS, Subject
from benchmarks.command import exit_code
from normfuse.benchmark import Machine
from normfuse.errors import NormfuseError
from normfuse.files import atomic

__all__ = ["SETTINGS", "main", "wilson"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STEPS = 200
_console = Console(stderr=True, soft_wrap=True)

ENDS = {"weight_bits": 8, "activation_bits": 8}

SETTINGS: dict[str, dict[str, Any]] = {
    "W8A8": {"weight_bits": 8},
    "W8A8 static": {"weight_bits": 8, "activations": "static"},
    "W8A8 in codes": {"weight_bits": 8, "activations": "static", "chains": True},
    "W6A8": {"weight_bits": 6},
    "W6A8 in codes": {"weight_bits": 6, "activations": "static", "chains": True},
    "W6A8 ends W8A8": {"weight_bits": 6, "overrides": ENDS},
    "W4A8 nearest": {"weight_bits": 4, "rounding": "nearest"},
    "W4A8": {"weight_bits": 4},
    "W4A8 ends W8A8": {"weight_bits": 4, "overrides": ENDS},
    f"W4A8 +{STEPS}": {"weight_bits": 4, "finetune_steps": STEPS},
    "W4A4": {"weight_bits": 4, "activation_bits": 4},
    f"W4A4 +{STEPS}": {"weight_bits": 4, "activation_bits": 4, "finetune_steps": STEPS},
    f"W4A4 ends W8A8 +{STEPS}": {"weight_bits": 4, "activation_bits": 4, "finetune_steps": STEPS, "overrides": ENDS},
}
"""Arguments of `ShiftQuant` by name; what is not said is as by default.
"ends" are the first and the last layer."""

BARS = (
    "W8A8 and W6A8 of image models: agreement of 99 % or more, without training.",
    "W4A8 of image models: at most 1 point of accuracy lost after calibration, or after 200 steps.",
    "W4A4 of the networks trained here: at most 1 point lost after fine-tuning.",
    "Texts: perplexity within 1 % at W8A8, within 3 % at W4A8.",
)


@dataclass(frozen=True)
class Row:
    """One model and one setting.

    Attributes:
        same: predictions that agree, of `count`.
        right, right_before: correct predictions of the quantized and the float model.
        perplexity: of the quantized model over that of the float one; None for images.
        sqnr: of the first output, in dB.
        further: other figures by name.
        quantized: layers in integers; `kept`: layers in float.
        seconds: of `optimize`.
    """

    subject: str
    title: str
    setting: str
    count: int
    same: int
    right: int
    right_before: int
    perplexity: float | None
    sqnr: float
    further: dict[str, float]
    quantized: int
    kept: int
    seconds: float

    @property
    def points(self) -> float:
        return 100 * (self.right - self.right_before) / self.count


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a proportion of `hits` in `count` (Wilson, 1927)."""
    if count == 0:
        return 0.0, 1.0
    p, n = hits / count, count
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


@torch.no_grad()
def _outputs(model: Any, subject: Subject) -> list[Tensor]:
    """All outputs over the evaluation data, the logits first."""
    parts = [model(x) for x in subject.inputs.split(subject.batch)]
    parts = [part if isinstance(part, (tuple, list)) else (part,) for part in parts]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def measure(name: str, setting: str, subject: Subject, expected: Sequence[Tensor]) -> Row:
    """Quantize a copy and hold it against the float outputs."""
    options = dict(SETTINGS[setting])
    if "overrides" in options:
        options["overrides"] = dict.fromkeys(subject.ends, options["overrides"])
    spec = normfuse.ShiftQuant(**options, prefer="size")
    start = time.perf_counter()
    example = subject.calibration[0][:2]  # what rewrites are proven on, in float64
    batches = [(x,) for x in subject.calibration]
    # the batch may vary; a model for single texts keeps its one, and its lengths vary instead
    axis = 1 if subject.batch == 1 else 0
    quantized = normfuse.optimize(
        subject.model, (example,), dynamic_shapes=({axis: torch.export.Dim.AUTO},), quantize=spec, calibration=batches
    )
    seconds = time.perf_counter() - start
    found = _outputs(quantized, subject)
    before, after, labels = expected[0].flatten(0, -2), found[0].flatten(0, -2), subject.labels.flatten()
    if not bool(after.isfinite().all()):
        raise NormfuseError(f"{name}, {setting}: the quantized model gives values that are not finite")
    a, b = before.argmax(1), after.argmax(1)
    noise = (before.double() - after.double()).square().sum()
    layers = [e for e in normfuse.report(quantized).quantization if e.kind != "model"]
    perplexity = None
    if subject.text:
        perplexity = math.exp(F.cross_entropy(after.double(), labels) - F.cross_entropy(before.double(), labels))
    return Row(
        name, subject.title, setting, len(labels), int((a == b).sum()), int((b == labels).sum()), int((a == labels).sum()),
        perplexity, float(10 * torch.log10(before.double().square().sum() / noise)),
        subject.further(expected[1], found[1]) if subject.further is not None else {},
        sum(not e.kept for e in layers), sum(bool(e.kept) for e in layers), seconds,
    )  # fmt: skip


# -- the table -----------------------------------------------------------------------------------------------------------


def holds(row: Row) -> bool | None:
    """Is the row within its bar? None where there is none."""
    kind, tuned = row.setting.partition(" ")[0], "+" in row.setting
    if row.perplexity is not None:
        bound = {"W8A8": 1.01, "W4A8": 1.03}.get(kind)
        return None if bound is None else row.perplexity <= bound
    if kind in ("W8A8", "W6A8"):
        return row.same >= 0.99 * row.count
    if kind == "W4A8" or tuned:
        return row.points >= -1.0
    return None


def _table(rows: Sequence[Row]) -> str:
    machine = Machine.here()
    lines = [
        "# Accuracy of quantized models",
        "",
        "The same inputs through the float model and its quantized copy; agreement of top-1 predictions with the 95 % Wilson",
        "interval. Calibrated on other data, without labels; `+200` are steps of fine-tuning against the float model on them.",
        "Made by `python -m benchmarks.accuracy`.",
        "",
        "| model | setting | agreement | float | quantized | points | perplexity | SQNR dB | other | in bar |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = wilson(row.same, row.count)
        within = holds(row)
        further = ", ".join(f"{name} {value:.3f}" for name, value in row.further.items())
        lines.append(
            f"| {row.title} | {row.setting} | {row.same / row.count:.2%} [{low:.2%}, {high:.2%}] of {row.count} | "
            f"{row.right_before / row.count:.2%} | {row.right / row.count:.2%} | {row.points:+.2f} | "
            f"{'' if row.perplexity is None else f'{row.perplexity:.4f}'} | {row.sqnr:.1f} | {further} | "
            f"{'' if within is None else 'yes' if within else 'no'} |"
        )
    lines += ["", "Bars (for W4 one setting of the model within it is enough):", "", *(f"* {bar}" for bar in BARS), ""]
    lines += [f"Measured on: {machine.cpu}; torch {machine.libraries.get('torch', '?')}", ""]
    return "\n".join(lines)


def _known(path: Path) -> dict[tuple[str, str], Row]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {(r["subject"], r["setting"]): Row(**r) for r in stored}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(rows: dict[tuple[str, str], Row], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    ordered = [rows[s, t] for s in SUBJECTS for t in SETTINGS if (s, t) in rows]
    data = {"schema": 1, "machine": dataclasses.asdict(Machine.here()), "rows": [dataclasses.asdict(r) for r in ordered]}
    for name, text in (("accuracy.json", json.dumps(data, indent=2) + "\n"), ("accuracy.md", _table(ordered))):
        with atomic(out / name, force=True) as path:
            path.write_text(text, encoding="utf-8")


@click.command()
@click.option("--subjects", type=click.Choice(tuple(SUBJECTS)), multiple=True, help="Only these models; repeatable.")
@click.option("--settings", type=click.Choice(tuple(SETTINGS)), multiple=True, help="Only these settings; repeatable.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of torch.")
@click.option("--missing", is_flag=True, help="Leave out what the table has already.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "build" / "training",
    help="Folder of trained networks, as of benchmarks.training.",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, help="Folder of the table.")
def command(subjects: tuple[str, ...], settings: tuple[str, ...], threads: int, missing: bool, cache: Path, out: Path) -> None:
    """Quantize, compare, and write accuracy.json and accuracy.md."""
    torch.set_num_threads(threads)
    rows = _known(out / "accuracy.json")
    failed = False
    for name in subjects or SUBJECTS:
        wanted = [s for s in settings or SETTINGS if not (missing and (name, s) in rows)]
        if not wanted:
            continue
        try:
            subject = SUBJECTS[name](cache)
        except (NormfuseError, ImportError, _skipped()) as e:
            _console.print(f"{name} left out: {e}", markup=False)
            continue
        expected = _outputs(subject.model, subject)
        for setting in wanted:
            if ("W4A4" in setting and not subject.trained) or ("ends" in setting and not subject.ends):
                continue
            try:
                row = measure(name, setting, subject, expected)
            except NormfuseError as e:
                _console.print(f"{name}, {setting} failed: {e}", markup=False)
                failed = True
                continue
            rows[name, setting] = row
            _write(rows, out)
            _console.print(_line(row), markup=False)
    if failed:
        raise SystemExit(1)


def _line(row: Row) -> str:
    text = "" if row.perplexity is None else f", perplexity x {row.perplexity:.4f}"
    further = "".join(f", {name} {value:.3f}" for name, value in row.further.items())
    return (
        f"{row.subject}, {row.setting}: agreement {row.same / row.count:.2%}, {row.points:+.2f} points{text}, "
        f"{row.sqnr:.1f} dB{further}; {row.quantized} layers, {row.kept} kept, {row.seconds:.0f} s"
    )


def _skipped() -> type[BaseException]:
    """What the loaders of the tests raise where a wheel is not installed."""
    import pytest

    found: type[BaseException] = pytest.skip.Exception
    return found


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(command, "benchmarks.accuracy", args)


if __name__ == "__main__":
    sys.exit(main())
