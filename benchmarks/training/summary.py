"""The results as JSON, as a Markdown table and as a plot: means over seeds with 95 % t intervals, differences seed by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.training.tasks import TASKS, Task
from normfuse.benchmark import Machine
from normfuse.extras import need
from normfuse.files import atomic

__all__ = ["Mean", "Result", "plot", "summarise", "table", "write"]

# quantile 0.975 of Student's t for 1 to 30 degrees of freedom; the normal distribution's behind them
_T = (
    12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL = 1.96


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval (Student's t): mean ± half. A single value has no interval: half is None."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        count = len(values)
        mean = sum(values) / count
        if count < 2:
            return cls(mean, None, count)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
        quantile = _T[count - 2] if count - 2 < len(_T) else _NORMAL
        return cls(mean, quantile * deviation / math.sqrt(count), count)

    def text(self, digits: int = 2, *, sign: bool = False) -> str:
        number = f"{self.mean:+.{digits}f}" if sign else f"{self.mean:.{digits}f}"
        return number if self.half is None else f"{number} ± {self.half:.{digits}f}"


@dataclass(frozen=True)
class Result:
    """All seeds of a task with one norm.

    Attributes:
        task, norm: keys of `benchmarks.training.tasks`.
        values: accuracy in percent a seed, or bits a character.
        mean: of the values.
        difference: to the baseline of the task, seed by seed; None for the baseline and where no seed is shared.
        seconds: median CPU time of a training.
        parameters: of the model.
        diverged: runs that ended with an infinite loss.
        proofs: number of runs that were optimized and exported.
        norm_ops, nodes, nodes_plain: of the exported file: see `benchmarks.training.proof`; the largest of all seeds.
        exact: largest float64 error of `optimize`.
        different, predictions: predictions that the exported file changes, of how many, in all proofs.
        compressed: what `benchmarks.training.proof.compressed` found, the worst of all seeds.
    """

    task: str
    norm: str
    values: dict[int, float]
    mean: Mean
    difference: Mean | None
    seconds: float
    parameters: int
    diverged: int
    proofs: int
    norm_ops: int | None
    nodes: int | None
    nodes_plain: int | None
    exact: float | None
    different: int
    predictions: int
    compressed: dict[str, Any] | None


def value(run: Mapping[str, Any]) -> float:
    """Accuracy in percent, or bits a character of a text."""
    return float(run["bits"]) if "bits" in run else 100 * float(run["accuracy"])


def summarise(runs: Sequence[Mapping[str, Any]]) -> tuple[Result, ...]:
    """One result a task and norm, in the order of `TASKS`; a run holds its proof under `proof`, if there is one."""
    results = []
    for task in TASKS.values():
        of_task = [r for r in runs if r["task"] == task.name]
        baseline = {r["seed"]: value(r) for r in of_task if r["norm"] == task.variants[0]}
        for norm in task.variants:
            chosen = sorted((r for r in of_task if r["norm"] == norm), key=lambda r: r["seed"])
            if chosen:
                results.append(_result(task, norm, chosen, baseline))
    return tuple(results)


def _result(task: Task, norm: str, runs: Sequence[Mapping[str, Any]], baseline: Mapping[int, float]) -> Result:
    values = {r["seed"]: value(r) for r in runs}
    shared = [v - baseline[seed] for seed, v in values.items() if seed in baseline]
    proofs = [r["proof"] for r in runs if r.get("proof")]
    times = sorted(r["cpu_seconds"] for r in runs)

    def largest(key: str) -> Any:
        return max((p[key] for p in proofs if p[key] is not None), default=None)

    compressed = [p["compressed"] for p in proofs if p.get("compressed")]
    return Result(
        task=task.name,
        norm=norm,
        values=values,
        mean=Mean.of(list(values.values())),
        difference=Mean.of(shared) if shared and norm != task.variants[0] else None,
        seconds=times[len(times) // 2],
        parameters=runs[0]["parameters"],
        diverged=sum(not r["finite"] for r in runs),
        proofs=len(proofs),
        norm_ops=largest("norm_ops_left"),
        nodes=largest("nodes"),
        nodes_plain=largest("nodes_plain"),
        exact=largest("exact"),
        different=sum(p["different"] for p in proofs),
        predictions=sum(p["predictions"] for p in proofs),
        compressed={k: max(c[k] for c in compressed) for k in compressed[0]} if compressed else None,
    )


# -- Markdown ----------------------------------------------------------------------------------------------------------

_COLUMNS = (
    "norm",
    "seeds",
    "held out",
    "difference, paired",
    "CPU s a run",
    "norms left",
    "nodes",
    "float64 error",
    "changed predictions",
)


def table(results: Sequence[Result], machine: Machine) -> str:
    lines = [
        "# Training proof",
        "",
        "Mean over seeds ± half of the 95 % interval (Student's t). Differences are taken seed by seed against the first row: the",
        "same data in the same order. Then the trained model goes through `normfuse.optimize` and `to_onnx`. Norms left:",
        "normalizations in the file, spelt-out ones included. Nodes: of the file; in brackets, where the norm must cost nothing,",
        "of the model without norms (for LayerNorm Scaling: with plain LayerNorm). Float64 error: the largest of `optimize`.",
        "Changed predictions: on the held-out data, the file in ONNX Runtime against the trained model in torch; of all seeds",
        "where the norm must cost nothing, of the first elsewhere. Made by `python -m benchmarks.training`.",
    ]
    for task in TASKS.values():
        rows = [r for r in results if r.task == task.name]
        if not rows:
            continue
        unit = "bits a character, lower is better" if task.kind == "gpt" else "accuracy in percent"
        recipe = task.recipe
        lines += [
            "",
            f"## {task.title}",
            "",
            f"{rows[0].parameters:,} parameters, {recipe.steps} steps of {recipe.batch}; {unit}.",
            "",
            "| " + " | ".join(_COLUMNS) + " |",
            "|---" * len(_COLUMNS) + "|",
            *(_row(task, r) for r in rows),
        ]
        lines += [_conversion(r.compressed) for r in rows if r.compressed]
        lines += [f"\n{v.title} {v.note}" for v in (task.variant(r.norm) for r in rows) if v.note]
        lines += [f"\n{task.variant(r.norm).title}: {r.diverged} of {len(r.values)} runs diverged." for r in rows if r.diverged]
    libraries = ", ".join(f"{k} {v}" for k, v in machine.libraries.items())
    lines += ["", f"Measured on: {machine.cpu}, {machine.cores} cores, {machine.system}, Python {machine.python}; {libraries}", ""]
    return "\n".join(lines)


def _row(task: Task, r: Result) -> str:
    digits = 3 if task.kind == "gpt" else 2
    nodes = "" if r.nodes is None else f"{r.nodes}" + ("" if r.nodes_plain is None else f" ({r.nodes_plain})")
    cells = (
        task.variant(r.norm).title,
        str(len(r.values)),
        r.mean.text(digits),
        "" if r.difference is None else r.difference.text(digits, sign=True),
        f"{r.seconds:.0f}",
        "" if r.norm_ops is None else str(r.norm_ops),
        nodes,
        "" if r.exact is None else _short(r.exact),
        f"{r.different} of {r.predictions}" if r.proofs else "",
    )
    return "| " + " | ".join(cells) + " |"


def _short(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def _conversion(found: Mapping[str, Any]) -> str:
    """What `benchmarks.training.conversion.compressed` found, as a paragraph."""
    return (
        f"\nPre-LayerNorm to Pre-RMSNorm: {found['rms_layer_norms']} LayerNorms left, error in float64 "
        f"{_short(found['rms_exact'])}, of the gradients {_short(found['rms_gradient'])}. "
        f"To Pre-CRMSNorm: {found['crms_sites']} norms, error {_short(found['crms_exact'])}, "
        f"of the gradients {_short(found['crms_gradient'])}."
    )


# -- plot --------------------------------------------------------------------------------------------------------------


def plot(results: Sequence[Result], path: Path) -> None:
    """One panel a task: a dot a seed, and the mean with its interval.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    matplotlib = need("matplotlib", extra="benchmarks")
    matplotlib.use("Agg")
    pyplot = need("matplotlib.pyplot", extra="benchmarks")
    tasks = [t for t in TASKS.values() if any(r.task == t.name for r in results)]
    heights = [1 + sum(r.task == t.name for r in results) for t in tasks]
    # no date and fixed ids: the same results give the same file
    with pyplot.rc_context({"svg.hashsalt": "normfuse", "svg.fonttype": "none", "font.size": 8}):
        figure, axes = pyplot.subplots(
            len(tasks), 1, figsize=(7, 0.28 * sum(heights) + 0.5), height_ratios=heights, squeeze=False, layout="constrained"
        )
        for task, axis in zip(tasks, axes[:, 0], strict=True):
            _panel(axis, task, [r for r in results if r.task == task.name])
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _panel(axis: Any, task: Task, rows: Sequence[Result]) -> None:
    for y, r in enumerate(rows):
        axis.plot(list(r.values.values()), [y] * len(r.values), "o", color="0.7", markersize=3, zorder=2)
        axis.errorbar(r.mean.mean, y, xerr=r.mean.half or 0, fmt="|", color="C0", markersize=8, capsize=2, zorder=1)
    axis.axvline(rows[0].mean.mean, color="0.85", linewidth=1, zorder=0)
    axis.set_yticks(range(len(rows)), [task.variant(r.norm).title for r in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_title(task.title, loc="left", fontsize=8, fontweight="bold")
    axis.set_xlabel("bits a character" if task.kind == "gpt" else "accuracy, %")
    axis.spines[["top", "right"]].set_visible(False)


# -- files -------------------------------------------------------------------------------------------------------------


def write(runs: Sequence[Mapping[str, Any]], results: Path, picture: Path | None) -> tuple[Result, ...]:
    """Write training.json and training.md into the folder `results`, and the plot to `picture`; all of what is there so far."""
    found = summarise(runs)
    machine = Machine.here()
    data = {
        "schema": 1,
        "machine": vars(machine),
        "results": [asdict(r) for r in found],
        "runs": [{k: v for k, v in r.items() if k not in ("schema", "losses")} for r in runs],
    }
    results.mkdir(parents=True, exist_ok=True)
    _written(results / "training.json", lambda p: p.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8"))
    _written(results / "training.md", lambda p: p.write_text(table(found, machine), encoding="utf-8"))
    if picture is not None and found:
        picture.parent.mkdir(parents=True, exist_ok=True)
        _written(picture, lambda p: plot(found, p))
    return found


def _written(path: Path, make: Callable[[Path], object]) -> None:
    with atomic(path, force=True) as partial:
        make(partial)
