"""OpenVINO with files of normfuse against OpenVINO by itself: the same inputs for all, float32 where it is not integers.

    python -m benchmarks.openvino                       # all models of the bar
    python -m benchmarks.openvino vit_base_b8 --seconds 60

Exact: the file of `to_openvino` against `openvino.convert_model` of the original. Integers: ours of 8 bits with static scales
against NNCF's, calibrated on the same inputs; their SQNR is that of the outputs against the float model in PyTorch, on inputs
that neither has seen. One JSON file a model in benchmarks/results/, and the table of all in openvino.md. NNCF is for measuring
only: without it its row says so.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

import normfuse
from benchmarks.baselines import nncf_file
from benchmarks.command import exit_code
from benchmarks.models import MODELS, Entry
from benchmarks.quantized import like
from normfuse.app.engines import file_engine
from normfuse.app.sources import Source
from normfuse.benchmark import Comparison, Engine, Schedule, measure
from normfuse.benchmark.machine import cores
from normfuse.export import to_openvino
from normfuse.export.onnx.compare import sqnr
from normfuse.export.openvino.graph import as_run
from normfuse.export.openvino.original import export_original
from normfuse.export.openvino.runtime import compiled, opened
from normfuse.files import atomic
from normfuse.progress import progress_bar

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"
EXACT = ("vit_base_b8", "bert_128", "resnet50_b1", "llama_128")
INTEGERS = ("vit_base_b8", "resnet50_b1")
_SEEN = 16  # samples that integers are calibrated on
_UNSEEN = 4  # batches that their SQNR is taken on
_W8 = normfuse.ShiftQuant(weight_bits=8, groups=1, activations="static", prefer="size")
_console = Console(stderr=True, soft_wrap=True)


@dataclass
class Prepared:
    """Engines by key, with titles; the first is what each exact one is compared with, and "nncf" what integers are."""

    engines: dict[str, tuple[str, Engine]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(tuple(MODELS)))
@click.option("--threads", type=click.IntRange(1), default=len(cores()), show_default=True)
@click.option("--seconds", type=float, default=120.0, show_default=True, help="Time for measuring each model.")
@click.option("--restarts", type=click.IntRange(1), default=3, show_default=True, help="How often all processes are started anew.")
@click.option("--integers/--no-integers", default=True, show_default=True, help="Quantized files too, where they are in the bar.")
@click.option("--results", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True)
def command(names: tuple[str, ...], threads: int, seconds: float, restarts: int, integers: bool, results: Path) -> None:
    """Measure the models called NAMES; by default those of the bar."""
    results.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(seconds=seconds, threads=threads, restarts=restarts)
    for name in names or EXACT:
        data = _measure(MODELS[name], schedule, integers=integers and name in (names or INTEGERS))
        with atomic(results / f"openvino-{name}-t{threads}.json", force=True) as file:
            file.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    files = sorted(results.glob("openvino-*.json"))
    (results / "openvino.md").write_text(_table([json.loads(f.read_text(encoding="utf-8")) for f in files]), encoding="utf-8")


def _measure(entry: Entry, schedule: Schedule, *, integers: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="normfuse-benchmark-") as folder:
        ready = _prepare(entry, Path(folder), schedule.threads or 1, integers=integers)
        base = ready.engines.pop("own")[1]
        # the first process of a comparison is slower than the others: one that is not counted is started before them
        engines = (base, base, base, *(engine for _, engine in ready.engines.values()))
        with progress_bar(entry.name) as bar:
            found = measure(engines, schedule, on_round=bar.to)
    rows: dict[str, Any] = {}
    at = {key: 3 + i for i, key in enumerate(ready.engines)}
    for key, (title, _) in ready.engines.items():
        rows[key] = {"title": title, "comparison": Comparison.of(found, a=1, again=2, b=at[key]).to_dict(), **ready.facts[key]}
        if key == "ours_int8" and "nncf" in at:
            rows[key]["against_nncf"] = Comparison.of(found, a=at["nncf"], b=at[key], again=at["nncf"]).to_dict()
        _console.print(f"  {title}: {_interval(rows[key]['comparison']['speedup'])} {ready.facts[key]}")
    itself = Comparison.of(found, a=1, again=2, b=2).to_dict()
    facts = ready.facts["own"]
    return {"name": entry.name, "title": entry.title, "itself": itself, "own": facts, "engines": rows, "failed": ready.failed}


def _prepare(entry: Entry, folder: Path, threads: int, *, integers: bool) -> Prepared:
    source, ready = entry.build(), Prepared()
    inputs: Any = source.example_inputs
    unseen = [like(source, 100 + i) for i in range(_UNSEEN)]
    wanted = [_outputs(source, each) for each in unseen]

    def add(key: str, title: str, path: Path) -> None:
        ready.engines[key] = title, file_engine(title, path, inputs)
        found = as_run(compiled(path, threads=threads))
        session = opened(path, threads=threads)
        names = [i.name for i in session.inputs]
        least = min(sqnr(w, _matching(w, session.outputs(_by_name(names, each)))) for w, each in zip(wanted, unseen, strict=True))
        ready.facts[key] = {
            "bytes": sum(path.with_suffix(s).stat().st_size for s in (".xml", ".bin")), "sqnr": least,
            "kernels": found.kernels, "products": found.products,
        }  # fmt: skip

    _console.print(f"{entry.title}: converting")
    export_original(source.model, source.args, source.kwargs, folder / "own.xml")
    add("own", "OpenVINO's own conversion", folder / "own.xml")
    to_openvino(normfuse.optimize(source.model, inputs), folder / "exact.xml", threads=threads, progress=False)
    add("exact", "normfuse, exact", folder / "exact.xml")
    if not integers:
        return ready
    batch = next(t.shape[0] for t in _tensors(inputs))
    seen = [inputs, *(like(source, i) for i in range(1, max(2, _SEEN // batch)))]
    _console.print(f"{entry.title}: quantizing, {len(seen)} batches")
    try:
        nncf_file(folder / "own.xml", [_tensors(each) for each in seen], folder / "nncf.xml", convolutional=entry.convolutional)
        add("nncf", "OpenVINO, int8 (NNCF)", folder / "nncf.xml")
    except Exception as e:  # a tool of others may fail in any way; the row says so
        ready.failed["nncf"] = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
    fast = normfuse.optimize(source.model, inputs, quantize=_W8, calibration=seen)
    to_openvino(fast, folder / "int8.xml", threads=threads, progress=False)
    add("ours_int8", "normfuse, W8A8, static scales", folder / "int8.xml")
    return ready


def _tensors(inputs: Any) -> list[torch.Tensor]:
    values = inputs.values() if isinstance(inputs, dict) else inputs
    return [v for v in values if isinstance(v, torch.Tensor)]


def _outputs(source: Source, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        out = source.module(**inputs) if isinstance(inputs, dict) else source.module(*inputs)
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


def _by_name(names: Sequence[str], inputs: Any) -> dict[str, torch.Tensor]:
    if isinstance(inputs, dict) and set(names) <= set(inputs):
        return {name: inputs[name] for name in names}
    return dict(zip(names, _tensors(inputs), strict=True))


def _matching(wanted: Sequence[torch.Tensor], found: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The outputs that both have, in order: a converter may leave some out, or return a cache."""
    return list(found.values())[: len(wanted)]


def _interval(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _table(models: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# OpenVINO with files of normfuse, and by itself",
        "",
        "Speedup over OpenVINO's own conversion of the original in float32, with its 95 % interval; every engine in a process of",
        "its own, interleaved. Made by `python -m benchmarks.openvino`. Weights are random: speed is real, SQNR is not accuracy.",
        "",
        "| model | engine | ms | speedup | against NNCF | products in integers | file MB | SQNR dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data in models:
        own = data["own"]
        lines.append(
            f"| {data['title']}, {data['itself']['threads']} threads | OpenVINO's own conversion | "
            f"{data['itself']['a']['median']:.2f} | against itself {_interval(data['itself']['speedup'])} | | "
            f"{own['products'][1]} of {own['products'][0]} | {own['bytes'] / 1e6:.1f} | |"
        )
        for row in data["engines"].values():
            c = row["comparison"]
            nncf = _interval(row["against_nncf"]["speedup"]) if "against_nncf" in row else ""
            lines.append(
                f"| | {row['title']} | {c['b']['median']:.2f} | {_interval(c['speedup'])} | {nncf} | {row['products'][1]} of "
                f"{row['products'][0]} | {row['bytes'] / 1e6:.1f} | {row['sqnr']:.1f} |"
            )
        lines += [f"| | {key} | not run: {why} | | | | | |" for key, why in data["failed"].items()]
    machines = {f"{m['cpu']}, {m['cores']} cores, {m['system']}" for m in (data["itself"]["machine"] for data in models)}
    return "\n".join([*lines, "", *(f"Measured on: {m}" for m in sorted(machines)), ""])


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(command, "benchmarks.openvino", args)


if __name__ == "__main__":
    sys.exit(main())
