"""`python -m benchmarks.training`: train every task with every norm, prove what is left of the norm, write table and plot.

    python -m benchmarks.training                                  # all of it, about 45 minutes of one core
    python -m benchmarks.training --tasks digits_vit --norms ln --norms un --seeds 2

Goes on where it stopped: a finished run is a file in the cache. Two calls for different tasks
may share a cache. Table and plot show all that the cache holds.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.command import exit_code
from benchmarks.training.runs import Run, kept, planned
from benchmarks.training.summary import value, write
from benchmarks.training.tasks import CONVOLUTIONAL, TASKS, TRANSFORMER
from normfuse.errors import NormfuseError

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
_NORMS = tuple(n for n in {**TRANSFORMER, **CONVOLUTIONAL} if n != "none")
_console = Console(stderr=True, soft_wrap=True)


@click.command()
@click.option("--tasks", type=click.Choice(tuple(TASKS)), multiple=True, help="Only these tasks.")
@click.option("--norms", type=click.Choice(_NORMS), multiple=True, help="Only these norms.")
@click.option("--seeds", type=click.IntRange(1), help="Number of seeds; each task has its own default.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of torch. Sums depend on it.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "build" / "training",
    help="Folder of finished runs.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "benchmarks" / "results",
    help="Folder of the table.",
)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), default=ROOT / "docs" / "assets" / "training.svg", help="The plot."
)
@click.option("--force", is_flag=True, help="Train again what is there already.")
@click.option("--train-only", is_flag=True, help="Leave optimizing and exporting to a later call.")
@click.option("--prove-again", is_flag=True, help="Optimize and export again what was trained already.")
@click.option("--summary-only", is_flag=True, help="Train nothing; write table and plot of what is there.")
def command(
    tasks: tuple[str, ...],
    norms: tuple[str, ...],
    seeds: int | None,
    threads: int,
    cache: Path,
    results: Path,
    plot: Path,
    force: bool,
    train_only: bool,
    prove_again: bool,
    summary_only: bool,
) -> None:
    """Train, prove, and write training.json, training.md and the plot."""
    torch.set_num_threads(threads)
    cache.mkdir(parents=True, exist_ok=True)
    runs = planned(cache, tasks, norms, seeds)
    failed = []
    for i, run in enumerate(() if summary_only else runs):
        try:
            with _bar(f"{run.name} ({i + 1} of {len(runs)})", run.task.recipe.steps) as on_step:
                found = run.trained(force=force, on_step=on_step)
                proof = run.proven(force=force or prove_again) if run.is_proven and found["finite"] and not train_only else None
        except NormfuseError as e:
            # one run that fails must not cost the others
            logging.getLogger(__name__).debug("where it happened", exc_info=True)
            _console.print(f"{run.name} failed: {e}")
            failed.append(run.name)
            continue
        _console.print(f"{i + 1}/{len(runs)} {_line(run, found, proof)}")
    done = write(_finished(kept(cache)), results, plot)
    _console.print(f"wrote {results / 'training.md'}: {sum(len(r.values) for r in done)} runs")
    if failed:
        raise SystemExit(1)


def _finished(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The figures of the runs that were done with today's configuration, each with its proof."""
    found = ((run, run.known()) for run in runs)
    return [{**figures, "proof": run.known_proof()} for run, figures in found if figures is not None]


def _line(run: Run, found: dict[str, Any], proof: dict[str, Any] | None) -> str:
    text = f"{run.name}: {value(found):.3f}, {found['cpu_seconds']:.0f} s"
    if not found["finite"]:
        return f"{text}; diverged"
    if proof is None:
        return text
    return f"{text}; {proof['norm_ops_left']} norms left, {proof['different']} of {proof['predictions']} predictions changed"


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar of the steps of one run, on terminals only."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda step: bar.update(task, completed=step)


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(command, "benchmarks.training", args, interrupted="interrupted; finished runs are kept")


if __name__ == "__main__":
    sys.exit(main())
