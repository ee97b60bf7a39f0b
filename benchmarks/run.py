"""Latency of the optimized export against the original's default export, both in ONNX Runtime, model by model.

    python -m benchmarks.run                       # the whole set, all cores
    python -m benchmarks.run vit_tiny_b1 --threads 1 --also eager --also compile

One JSON file a model and number of threads in benchmarks/results/, and a table of all of them in latency.md. A model
that was measured on the same machine with the same libraries is not measured again without --force.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.command import exit_code
from benchmarks.models import MODELS, Entry, prepared_call
from benchmarks.prepare import prepare
from normfuse.benchmark import Comparison, Engine, Machine, Schedule, measure
from normfuse.benchmark.machine import cores
from normfuse.errors import NormfuseError
from normfuse.files import atomic
from normfuse.progress import progress_bar

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
ALSO = ("eager", "compile")
_COLUMNS = (
    "model", "threads", "original ms", "optimized ms", "speedup", "against itself", "verdict", *ALSO,
    "norms before", "norms in the file",
)  # fmt: skip
_console = Console(stderr=True, soft_wrap=True)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(tuple(MODELS)))
@click.option("--threads", type=click.IntRange(1), default=len(cores()), show_default=True, help="Threads of each engine.")
@click.option("--also", type=click.Choice(ALSO), multiple=True, help="Measure the original in torch as well.")
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Time for measuring each model.")
@click.option("--restarts", type=click.IntRange(1), default=3, show_default=True, help="How often all processes are started anew.")
@click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True, help="Folder of the results."
)
@click.option("--force", is_flag=True, help="Measure again what is there already.")
def command(
    names: tuple[str, ...], threads: int, also: tuple[str, ...], seconds: float, restarts: int, results: Path, force: bool
) -> None:
    """Measure the models called NAMES (default: all) and write the table."""
    results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names or tuple(MODELS):
        path = results / f"latency-{name}-t{threads}.json"
        if not force and _is_current(path, also):
            _console.print(f"{name}: measured already ({path.name})")
            continue
        _console.print(f"{name}: {MODELS[name].title}")
        try:
            data = _measure(MODELS[name], also, Schedule(seconds=seconds, threads=threads, restarts=restarts))
        except NormfuseError as e:
            # one model that fails must not cost the night
            logging.getLogger(__name__).debug("where it happened", exc_info=True)
            _console.print(f"  failed: {e}")
            failed.append(name)
            continue
        with atomic(path, force=True) as partial_file:
            partial_file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        _console.print(f"  {_row(data)}")
    table = _table([json.loads(p.read_text(encoding="utf-8")) for p in sorted(results.glob("latency-*.json"))])
    (results / "latency.md").write_text(table, encoding="utf-8")
    _console.print(f"wrote {results / 'latency.md'}")
    if failed:
        raise SystemExit(1)


def _measure(entry: Entry, also: tuple[str, ...], schedule: Schedule) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="normfuse-benchmark-") as folder:
        ready = prepare(entry, Path(folder), threads=schedule.threads)
        others = [Engine(kind, partial(prepared_call, entry.name, kind == "compile")) for kind in also]
        engines = (ready.original, ready.original, ready.optimized, *others)
        with progress_bar(entry.name) as bar:
            found = measure(engines, schedule, on_round=bar.to)
    comparison = Comparison.of(found)
    return {
        "name": entry.name,
        "title": entry.title,
        "demanded": entry.demanded,
        "verdict": comparison.verdict().value,
        "facts": ready.facts,
        "comparison": comparison.to_dict(),
        "also": {kind: Comparison.of(found, b=3 + i).to_dict() for i, kind in enumerate(also)},
    }


def _is_current(path: Path, also: tuple[str, ...]) -> bool:
    """Measured here, with these libraries, and with all the engines that are asked for."""
    if not path.exists():
        return False
    data = json.loads(path.read_text(encoding="utf-8"))
    machine = json.loads(json.dumps(vars(Machine.here())))
    return bool(data["comparison"]["machine"] == machine and set(also) <= data["also"].keys())


def _interval(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _norms(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in counts.items() if n) or "none"


def _row(data: dict[str, Any]) -> str:
    c = data["comparison"]
    times = f"{c['a']['median']:.2f} -> {c['b']['median']:.2f} ms"
    return f"speedup {_interval(c['speedup'])}, against itself {_interval(c['itself'])}, {times}"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """All results as Markdown, with what they were measured on."""
    lines = [
        "# Latency in ONNX Runtime: optimized export against the original's default export",
        "",
        "Speedup with its 95 % interval (above 1: the optimized file is faster); beside it the original against itself with its",
        "99 % interval, which is the noise of the measurement. Median milliseconds a call. Torch columns: the original in torch",
        "against the original in ONNX Runtime (above 1: torch is faster). Made by `python -m benchmarks.run`.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---" * len(_COLUMNS) + "|",
    ]
    machines = []
    for data in rows:
        c = data["comparison"]
        torch = [_interval(data["also"][kind]["speedup"]) if kind in data["also"] else "" for kind in ALSO]
        cells = [
            data["title"],
            str(c["threads"]),
            f"{c['a']['median']:.2f}",
            f"{c['b']['median']:.2f}",
            _interval(c["speedup"]),
            _interval(c["itself"]),
            data["verdict"],
            *torch,
            _norms(data["facts"]["norms_before"]),
            _norms(data["facts"]["export"]["norms"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        m = c["machine"]
        libraries = ", ".join(f"{k} {v}" for k, v in m["libraries"].items())
        machines.append(f"{m['cpu']}, {m['cores']} cores, {m['system']}, Python {m['python']}; {libraries}")
    lines += ["", *(f"Measured on: {m}" for m in dict.fromkeys(machines)), ""]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(command, "benchmarks.run", args, interrupted="interrupted; finished models are kept")


if __name__ == "__main__":
    sys.exit(main())
