"""`python -m benchmarks.training.tune`: how the options of UnifiedNorm for the digits ViT were chosen.

The held-out images take no part: the last quarter of the training images stands in for them, and the seeds are others than
those of the results. The learning rate is LayerNorm's. Writes benchmarks/results/training-tuning.md.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from benchmarks.command import exit_code
from benchmarks.training.tasks import TASKS, Variant
from benchmarks.training.train import measure, train
from normfuse.files import atomic

__all__ = ["GRID", "main"]

RESULTS = Path(__file__).parents[1] / "results"
FIRST_SEED = 100
GRID: tuple[Mapping[str, Any], ...] = (
    {},
    {"outlier_filtration": False},
    {"window_size": 1},
    {"window_size": 2},
    {"window_size": 8},
    {"warm_up": 0.3},
    {"warm_up": 0.02},
    {"momentum": 0.95},
    {"momentum": 0.8},
)
_console = Console(stderr=True, soft_wrap=True)


@click.command()
@click.option(
    "--task", type=click.Choice([n for n, t in TASKS.items() if t.kind == "vit"]), default="digits_vit", show_default=True
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Number of seeds.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of torch.")
@click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True, help="Folder of the table."
)
def command(task: str, seeds: int, threads: int, results: Path) -> None:
    """Train LayerNorm, and UnifiedNorm with each set of options, on three quarters of the training images."""
    torch.set_num_threads(threads)
    layer_norm, unified = (TASKS[task].variant(n) for n in ("ln", "un"))
    tried = [("LayerNorm", layer_norm)]
    for options in GRID:
        label = ", ".join(f"{k} {v}" for k, v in options.items()) or ", ".join(f"{k} {v}" for k, v in unified.options.items())
        tried.append((label, dataclasses.replace(unified, options={**unified.options, **options})))
    rows = []
    for label, variant in tried:
        values = [_accuracy(task, variant, FIRST_SEED + i) for i in range(seeds)]
        rows.append(f"| {label} | {sum(values) / seeds:.2f} | {', '.join(f'{v:.2f}' for v in values)} |")
        _console.print(rows[-1])
    lines = [
        f"# Options of UnifiedNorm: {TASKS[task].title}",
        "",
        "Accuracy in percent on the last quarter of the training images, which these runs did not train on; one value a seed.",
        "The first row of UnifiedNorm has the options of the results, the others change one. Made by",
        "`python -m benchmarks.training.tune`.",
        "",
        "| options | mean | by seed |",
        "|---|---|---|",
        *rows,
        "",
    ]
    with atomic(results / "training-tuning.md", force=True) as path:
        path.write_text("\n".join(lines), encoding="utf-8")


def _accuracy(task: str, variant: Variant, seed: int) -> float:
    chosen = TASKS[task]
    data = chosen.data().for_tuning()
    torch.manual_seed(seed)
    model = chosen.build(variant, data)
    train(model, data, chosen.recipe, seed=seed)
    return 100 * float(measure(model, data, chosen.recipe)["accuracy"])


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(command, "benchmarks.training.tune", args)


if __name__ == "__main__":
    sys.exit(main())
