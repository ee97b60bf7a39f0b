"""Families of timm through `fold`: the same function, the same classes, and as many BatchNorms gone as `optimize` removes.

    python -m benchmarks.fold                          # goes on where it stopped
    python -m benchmarks.fold --only resnet --again
    python -m benchmarks.fold --summary                # the table of docs/results.md

One process a model, smallest first, as `benchmarks.zoo` does it, whose models these are. Weights are random, norm statistics and
affines as if trained.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import torch
from torch import nn

import normfuse
from benchmarks.command import exit_code
from benchmarks.zoo import ROOT, read, run_all
from benchmarks.zoo_measure import counted, error_between, first_line, in_float64, outputs_of, relative_error, without_cache
from benchmarks.zoo_models import LIBRARIES, Subject, subjects
from normfuse.app.random_norms import randomise_norms

__all__ = ["main", "measure"]

ROWS = ROOT / "benchmarks" / "results" / "fold.jsonl"
_EXACT = 1e-9
_NATIVE = 1e-4
_NOISE = 30.0
"""The copy may be this many times as far from the model in its own dtype as the model itself is from its values in float64."""

_SHARE = 0.95
_LESS = ("Identity", "RMSNorm", "Sequential")
"""Classes that may stand where a norm or a gain stood; a Sequential holds the activation of a norm with one."""


@dataclass
class Row:
    """What became of one model.

    Attributes:
        name, family, group: as in `benchmarks.zoo`.
        status: `folded`, `same` (nothing to fold), `refused`, `raised`, `unusable`, `timeout`, `memory`, `crashed`.
        message: first line of the error.
        norms_before, norms_after: by kind, of the folded model; `optimized`: of `optimize`.
        native: relative error against the model; `double`: that of the model in float64, folded without a proof; `noise`: that of
            the model in its own dtype against itself in float64.
        classes: modules whose class changed, as `BatchNorm2d -> Identity`, by number.
        state: does the folded model load its own state dict, with the same outputs?
        refused, undone: [reason, rule, number of sites].
        seconds: of `fold`, proof included.
    """

    name: str
    family: str = ""
    group: str = ""
    status: str = ""
    message: str = ""
    norms_before: dict[str, int] = field(default_factory=dict)
    norms_after: dict[str, int] = field(default_factory=dict)
    optimized: dict[str, int] = field(default_factory=dict)
    native: float | None = None
    double: float | None = None
    noise: float | None = None
    no_double: str = ""
    classes: dict[str, int] = field(default_factory=dict)
    state: bool | None = None
    refused: list[tuple[str, str, int]] = field(default_factory=list)
    undone: list[tuple[str, str, int]] = field(default_factory=list)
    seconds: float = 0.0


def measure(subject: Subject, told: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Everything about one model, as plain data; `told` is given the row so far after each stage."""
    row = Row(subject.name, subject.family, subject.group)
    try:
        torch.manual_seed(0)
        model = randomise_norms(subject.build().eval(), seed=0)
        declared, args, kwargs = subject.inputs(model)
        kwargs.pop("use_cache", None)
        plain = without_cache(model)
        expected = outputs_of(plain, args, kwargs)
    except Exception as e:
        row.status, row.message = "unusable", first_line(e)
        return asdict(row)
    told(asdict(row))
    given = None if declared else (args or kwargs)
    begin = perf_counter()
    try:
        folded = normfuse.fold(model, given)
    except Exception as e:
        row.status, row.message = "refused" if isinstance(e, normfuse.NormfuseError) else "raised", first_line(e)
        return asdict(row)
    row.seconds = perf_counter() - begin
    report = normfuse.report(folded)
    row.norms_before, row.norms_after = dict(report.norms_before), dict(report.norms_after)
    row.refused, row.undone = counted(report.refused), counted(report.undone)
    row.classes = _changes(model, folded)
    row.status = "folded" if row.classes else "same"
    told(asdict(row))
    try:
        row.native = error_between(plain, without_cache(folded), args, kwargs, expected)
        row.state = _loads(folded, args, kwargs)
        told(asdict(row))
        truth, row.double, row.no_double = in_float64(plain, args, kwargs, lambda m, inputs: normfuse.fold(m, inputs, verify="off"))
        row.noise = None if truth is None else relative_error(truth, expected)
        row.optimized = dict(normfuse.report(normfuse.optimize(model, given, verify="off")).norms_after)
    except Exception as e:
        row.status, row.message = "raised", first_line(e)
    return asdict(row)


def _changes(model: nn.Module, folded: nn.Module) -> dict[str, int]:
    """Modules whose class is another one, and modules that are gone or new elsewhere."""
    found: Counter[str] = Counter()
    new = dict(folded.named_modules())
    replaced: list[str] = []
    for path, old in model.named_modules():
        if any(path.startswith(f"{p}.") for p in replaced):
            continue
        kind = type(new[path]).__name__ if path in new else "nothing"
        if kind != type(old).__name__:
            found[f"{type(old).__name__} -> {kind}"] += 1
            replaced.append(path)
    return dict(found.most_common())


def _loads(folded: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    other = copy.deepcopy(folded)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(folded.state_dict())
    return error_between(folded, other, args, kwargs, outputs_of(folded, args, kwargs)) == 0


# -- summary -----------------------------------------------------------------------------------------------------------


def problems(row: dict[str, Any]) -> list[str]:
    """What a row falls short of."""
    found = []
    if row["status"] not in ("folded", "same", "unusable"):
        return [f"{row['status']}: {row['message']}"]
    if row["status"] == "unusable":
        return []
    if row["double"] is not None and not row["double"] <= _EXACT:
        found.append(f"float64 error {row['double']:.1e}")
    if not row["native"] <= max(_NATIVE, _NOISE * (row.get("noise") or 0.0)):
        found.append(f"native error {row['native']:.1e}")
    if not row["state"]:
        found.append("does not load its own state dict")
    found += [f"class changed: {c}" for c in row["classes"] if c.split(" -> ")[1] not in _LESS]
    removed, whole = _batch_norms(row)
    if whole and removed < _SHARE * whole:
        found.append(f"{removed} of the {whole} BatchNorms that `optimize` removes")
    return found


def _batch_norms(row: dict[str, Any]) -> tuple[int, int]:
    """BatchNorms that `fold` removed, and that `optimize` removes."""
    before = row["norms_before"].get("batch_norm", 0)
    return before - row["norms_after"].get("batch_norm", 0), before - row["optimized"].get("batch_norm", 0)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The numbers of all rows as a Markdown table, and below it what falls short."""
    run = [r for r in rows if r["status"] in ("folded", "same")]
    batch = [_batch_norms(r) for r in run]
    layer = [
        (r["norms_before"].get("layer_norm", 0) - r["norms_after"].get("layer_norm", 0),
         r["norms_before"].get("layer_norm", 0) - r["optimized"].get("layer_norm", 0)) for r in run
    ]  # fmt: skip
    folded, same = (sum(r["status"] == kind for r in rows) for kind in ("folded", "same"))
    doubles = [r["double"] for r in run if r["double"] is not None]
    lines = [
        "| | |",
        "|---|---|",
        f"| models (families) | {len(rows)} ({len({r['family'] for r in rows})}) |",
        f"| a module became less; none did | {folded}; {same} |",
        f"| BatchNorms removed, of those that `optimize` removes | {sum(a for a, _ in batch)} of {sum(b for _, b in batch)} |",
        f"| LayerNorms converted, of those that `optimize` converts | {sum(a for a, _ in layer)} of {sum(b for _, b in layer)} |",
        f"| largest error in float64 | {max(doubles, default=0):.1e} ({len(doubles)} models) |",
        f"| largest error in float32 | {max((r['native'] for r in run), default=0):.1e} |",
        f"| loads its own state dict | {sum(bool(r['state']) for r in run)} of {len(run)} |",
        f"| seconds of `fold`, median | {sorted(r['seconds'] for r in run)[len(run) // 2] if run else 0:.1f} |",
        "",
    ]
    short = [(r["name"], p) for r in rows for p in problems(r)]
    return "\n".join([*lines, *(f"* {name}: {p}" for name, p in short)]) + "\n"


@click.command()
@click.option("--library", type=click.Choice(LIBRARIES), default="timm", show_default=True, help="Models of this library.")
@click.option("--only", multiple=True, metavar="TEXT", help="Only models with this text in their name; may be repeated.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes at a time.")
@click.option("--seconds", type=float, default=600.0, show_default=True, help="Time limit of one model.")
@click.option("--memory", type=float, default=10.0, show_default=True, help="Memory limit of one model in GiB.")
@click.option(
    "--most", type=click.IntRange(1), default=100_000_000, show_default=True, help="Leave out models with more parameters."
)
@click.option("--families", is_flag=True, help="The smallest model of each family alone.")
@click.option("--again", is_flag=True, help="Run models that have a line already once more.")
@click.option("--summary", "summing", is_flag=True, help="Print the table of the lines and end.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=ROWS, show_default=True, help="The lines.")
def command(
    library: str,
    only: tuple[str, ...],
    jobs: int,
    seconds: float,
    memory: float,
    most: int,
    families: bool,
    again: bool,
    summing: bool,
    out: Path,
) -> None:
    """Fold every family and write what became of it."""
    if summing:
        click.echo(summary(read(out)), nl=False)
        return
    found = [s for s in subjects(library) if s.size <= most and (not only or any(text in s.name for text in only))]
    if families:
        found = sorted({s.family: s for s in reversed(found)}.values(), key=lambda s: s.size)
    if not found:
        raise click.UsageError(f"--only {' '.join(only)}: no model has that in its name")
    known = set() if again else {row["name"] for row in read(out)}
    out.parent.mkdir(parents=True, exist_ok=True)
    run_all([s for s in found if s.name not in known], out, jobs, task=measure, seconds=seconds, memory=memory)


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(command, "benchmarks.fold", args)


if __name__ == "__main__":
    sys.exit(main())
