"""Every family of timm, torchvision and transformers through `optimize`: captured, right, which norms stay and why, time.

    python -m benchmarks.zoo --out rows.jsonl                    # goes on where it stopped
    python -m benchmarks.zoo --out rows.jsonl --only resnet
    python -m benchmarks.zoo --out rows.jsonl --page             # docs/zoo.md

One process a model, smallest first, with a limit of time and memory; one line of JSON a model. Weights are random, norm
statistics and affines as if trained. A model is optimized as a user would: with the inputs that it declares, else with images;
what cannot be captured whole, by parts.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.command import exit_code
from benchmarks.zoo_models import LIBRARIES, SIZES, Subject, sizes, subjects
from normfuse.files import atomic

__all__ = ["main", "read", "run", "run_all"]

Task = Callable[[Subject, Callable[[dict[str, Any]], None]], dict[str, Any]]
"""Makes the row of a subject, and tells what is known of it after each stage; a function of a module, or a partial of one."""

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "zoo.jsonl"
PAGE = ROOT / "docs" / "zoo.md"
_PATIENCE = 20  # a process that waits for something for ever uses no CPU
_PRELOADED = ("torch", "timm", "torchvision", "transformers", "normfuse.api", "benchmarks.zoo_measure")
_console = Console(stderr=True, soft_wrap=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, the last one of a name; a line that was cut off is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["name"]] = row
    return list(found.values())


def _child(subject: Subject, task: Task, pipe: Any) -> None:
    """Runs in a process of its own; what is known so far goes to the parent after every stage."""
    import logging
    import warnings

    import torch

    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    pipe.send((False, {}))
    pipe.send((True, task(subject, lambda row: pipe.send((False, row)))))
    pipe.close()


def _measured(export: bool, subject: Subject, told: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    from dataclasses import asdict

    from benchmarks.zoo_measure import measure

    return measure(subject, export=export, told=lambda row: told(asdict(row)))


def run(subject: Subject, *, task: Task, seconds: float, memory: float) -> dict[str, Any]:
    """The row of one model; where its process is stopped or dies, what was known by then, and why.

    Args:
        task: makes the row in that process.
        seconds: limit of its CPU time, which other work on the machine does not use up; of wall time `_PATIENCE` times as many.
        memory: limit of resident memory in GiB.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(subject, task, there), daemon=True)
    row: dict[str, Any] = {}
    ended = "crashed"
    process.start()
    there.close()
    until = time.monotonic() + _PATIENCE * seconds
    try:
        while True:
            if here.poll(0.5):
                done, row = here.recv()
                if done:
                    ended = ""
                    break
            elif _spent(process.pid) > seconds or time.monotonic() > until:
                ended = "timeout"
                break
            elif _resident(process.pid) > memory:
                ended = "memory"
                break
    except EOFError:
        pass
    if ended in ("timeout", "memory"):
        process.kill()
    process.join()
    if ended:
        row = {"name": subject.name, "family": subject.family, "group": subject.group} | row
        said = {"timeout": f"stopped after {seconds:.0f} s", "memory": f"stopped at {memory:.0f} GiB"}
        row |= {"message": said.get(ended, f"the process died with code {process.exitcode}"), "stage": row.get("status", "")}
        row["status"] = ended
    return row


def _spent(pid: int | None) -> float:
    """CPU seconds of a process; 0 where that cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return 0.0


def _resident(pid: int | None) -> float:
    """GiB in memory; 0 where that cannot be read."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize() / 2**30
    except OSError:
        return 0.0


def _in_turn(libraries: Sequence[Sequence[Subject]]) -> list[Subject]:
    """Each library from its smallest model to its largest, all at the same pace, so that a part of the run shows all of them."""
    paced = [(i / len(of), s) for of in libraries for i, s in enumerate(of)]
    return [s for _, s in sorted(paced, key=lambda pair: pair[0])]


def run_all(todo: Sequence[Subject], out: Path, jobs: int, **limits: Any) -> None:
    waiting: queue.SimpleQueue[Subject] = queue.SimpleQueue()
    for s in todo:
        waiting.put(s)
    lock = threading.Lock()
    count = [0]

    def work() -> None:
        while True:
            try:
                s = waiting.get_nowait()
            except queue.Empty:
                return
            row = run(s, **limits)
            with lock, out.open("a", encoding="utf-8") as file:
                count[0] += 1
                file.write(json.dumps(row) + "\n")
                _console.print(f"{count[0]}/{len(todo)} {s.name}: {row['status']} {row.get('message', '')}"[:200], highlight=False)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


@click.command()
@click.option("--library", "libraries", type=click.Choice(LIBRARIES), multiple=True, help="Only of this library; may be repeated.")
@click.option("--only", multiple=True, metavar="TEXT", help="Only models with this text in their name; may be repeated.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes at a time.")
@click.option("--seconds", type=float, default=900.0, show_default=True, help="CPU time that one model may take.")
@click.option("--memory", type=float, default=10.0, show_default=True, help="Memory limit of one model in GiB.")
@click.option(
    "--most", type=click.IntRange(1), default=100_000_000, show_default=True, help="Leave out models with more parameters."
)
@click.option("--export", is_flag=True, help="Export each result to ONNX as well.")
@click.option("--again", is_flag=True, help="Run models that have a line already once more.")
@click.option("--list", "listing", is_flag=True, help="Print the models and end.")
@click.option("--sizes", "sizing", is_flag=True, help="Count the parameters of all models of the libraries anew, and end.")
@click.option("--page", is_flag=True, help="Write docs/zoo.md from the lines and end.")
@click.option("--before", type=click.Path(path_type=Path, dir_okay=False), help="Lines of an earlier run, for the page.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=ROWS, show_default=True, help="The lines.")
def command(
    libraries: tuple[str, ...],
    only: tuple[str, ...],
    jobs: int,
    seconds: float,
    memory: float,
    most: int,
    export: bool,
    again: bool,
    listing: bool,
    sizing: bool,
    page: bool,
    before: Path | None,
    out: Path,
) -> None:
    """Optimize every family of the libraries and write what became of it."""
    if sizing:
        with atomic(SIZES, force=True) as path:
            path.write_text(json.dumps({lib: sizes(lib) for lib in LIBRARIES[:2]}, indent=0) + "\n", encoding="utf-8")
        return
    if page:
        from benchmarks.zoo_page import text

        planned = sum(len(list(subjects(lib))) for lib in LIBRARIES)
        PAGE.write_text(text(read(out), None if before is None else read(before), planned), encoding="utf-8")
        _console.print(f"wrote {PAGE}")
        return
    found = _in_turn([[s for s in subjects(lib) if s.size <= most] for lib in libraries or LIBRARIES])
    found = [s for s in found if not only or any(text in s.name for text in only)]
    if not found:
        raise click.UsageError(f"--only {' '.join(only)}: no model has that in its name; --list shows them all")
    if listing:
        for s in found:
            click.echo(f"{s.name}  {s.size or ''}")
        return
    known = set() if again else {row["name"] for row in read(out)}
    out.parent.mkdir(parents=True, exist_ok=True)
    task = functools.partial(_measured, export)
    run_all([s for s in found if s.name not in known], out, jobs, task=task, seconds=seconds, memory=memory)


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(command, "benchmarks.zoo", args)


if __name__ == "__main__":
    sys.exit(main())
