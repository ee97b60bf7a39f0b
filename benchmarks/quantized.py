"""Latency of quantized models against what people use today, every engine on the same inputs.

    python -m benchmarks.quantized vit_base_b8                     # all baselines, all forms of ours
    python -m benchmarks.quantized vit_tiny_b1 --only ort_fp32 --only native_w4a8 --seconds 30

Ratios are against ONNX Runtime's fp32 on the original's default export. One JSON file a model in benchmarks/results/, and the
table of all in quantized.md. An engine that cannot be made here (a library is missing, an operator is not supported) is
named with its reason.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console

import normfuse
from benchmarks.baselines import BASELINES, openvino_engine
from benchmarks.command import exit_code
from benchmarks.models import MODELS, Entry
from normfuse.app.engines import export_original, onnxruntime_engine
from normfuse.app.rivals import float_outputs, sqnr_of
from normfuse.app.sources import Source
from normfuse.benchmark import Comparison, Engine, Schedule, measure
from normfuse.benchmark.machine import cores
from normfuse.export import to_onnx
from normfuse.files import atomic
from normfuse.progress import progress_bar

__all__ = ["main"]

_EXACT = 90.0  # dB: floats that were only added up in another order
RESULTS = Path(__file__).parent / "results"
_console = Console(stderr=True, soft_wrap=True)


@dataclass(frozen=True)
class Ours:
    """One way of normfuse.

    Attributes:
        title: for the table.
        spec: the quantization; None for the exact rewrites alone.
        form: of the ONNX file.
        openvino: run by OpenVINO instead of ONNX Runtime, with this precision for the rest.
        target: of the ONNX file.
    """

    title: str
    spec: normfuse.ShiftQuant | None
    form: str = "auto"
    openvino: str = ""
    target: str = "onnxruntime"


# random weights: what a better rounding would win is not measured here, and its time is saved
_W4 = normfuse.ShiftQuant(weight_bits=4, activation_bits=8, prefer="size", migration=False, rounding="nearest")
_W8 = dataclasses.replace(_W4, weight_bits=8, groups=1)
_STATIC = dataclasses.replace(_W8, activations="static")
_CHAINS = dataclasses.replace(_STATIC, chains=True, prefer="speed")  # what is fast on this machine

OURS = {
    "exact": Ours("normfuse, fp32 (exact rewrites alone)", None),
    "native_w4a8": Ours("normfuse, W4A8, native kernels in ONNX Runtime", _W4, "native"),
    "native_w4a8_g1": Ours("normfuse, W4A8 without shifts, native kernels", dataclasses.replace(_W4, groups=1), "native"),
    "native_w6a8": Ours("normfuse, W6A8, native kernels", dataclasses.replace(_W4, weight_bits=6), "native"),
    "native_w8a8": Ours("normfuse, W8A8, native kernels", _W8, "native"),
    **{
        f"chains_w{bits}a8": Ours(
            f"normfuse, W{bits}A8 in codes from layer to layer, native kernels",
            dataclasses.replace(_CHAINS, weight_bits=bits, groups=groups),
            "native",
        )
        for bits, groups in ((8, 1), (7, 1), (6, 2), (4, 4))
    },
    "integer_w8a8": Ours("normfuse, W8A8, standard ops, stock ONNX Runtime", _W8, "integer"),
    "qdq_w8a8": Ours("normfuse, W8A8 QDQ, stock ONNX Runtime", _STATIC, "qdq"),
    "qdq_w8a8_openvino": Ours("normfuse, W8A8 QDQ, OpenVINO", _STATIC, "qdq", "f32", "portable"),
}


@dataclass
class Prepared:
    engines: dict[str, tuple[str, Engine]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@click.command()
@click.argument("names", nargs=-1, required=True, type=click.Choice(tuple(MODELS)))
@click.option("--only", type=click.Choice((*BASELINES, *OURS)), multiple=True, help="Measure these engines; default: all.")
@click.option("--threads", type=click.IntRange(1), default=len(cores()), show_default=True)
@click.option("--seconds", type=float, default=120.0, show_default=True, help="Time for measuring each model.")
@click.option("--restarts", type=click.IntRange(1), default=1, show_default=True, help="How often all processes are started anew.")
@click.option("--results", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True)
def command(names: tuple[str, ...], only: tuple[str, ...], threads: int, seconds: float, restarts: int, results: Path) -> None:
    """Measure the models called NAMES."""
    results.mkdir(parents=True, exist_ok=True)
    for name in names:
        data = _measure(MODELS[name], only, Schedule(seconds=seconds, threads=threads, restarts=restarts))
        with atomic(results / f"quantized-{name}-t{threads}.json", force=True) as file:
            file.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    files = sorted(results.glob("quantized-*.json"))
    (results / "quantized.md").write_text(_table([json.loads(f.read_text(encoding="utf-8")) for f in files]), encoding="utf-8")


def _measure(entry: Entry, only: Sequence[str], schedule: Schedule) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="normfuse-benchmark-") as folder:
        ready = _prepare(entry, only, Path(folder), schedule.threads or 1)
        base = ready.engines.pop("ort_fp32")[1]
        # the first process of a comparison is slower than the others: one that is not counted is started before them
        engines = (base, base, base, *(engine for _, engine in ready.engines.values()))
        with progress_bar(entry.name) as bar:
            found = measure(engines, schedule, on_round=bar.to)
        rows = {}
        for i, (key, (title, _)) in enumerate(ready.engines.items()):
            comparison = Comparison.of(found, a=1, again=2, b=3 + i)
            rows[key] = {"title": title, "comparison": comparison.to_dict(), **ready.facts.get(key, {})}
            _console.print(f"  {title}: {_interval(comparison.to_dict()['speedup'])}, {comparison.b.median:.2f} ms")
    itself = Comparison.of(found, a=1, again=2, b=2).to_dict()
    return {"name": entry.name, "title": entry.title, "itself": itself, "engines": rows, "failed": ready.failed}


def _prepare(entry: Entry, only: Sequence[str], folder: Path, threads: int) -> Prepared:
    source = entry.build()
    original = folder / "original.onnx"
    export_original(source, original)
    calibration = [source.example_inputs, like(source, 1)]
    names = _input_names(original)
    arrays = [_by_name(names, c) for c in calibration]
    ready = Prepared()
    for key, baseline in BASELINES.items():
        if only and key not in only and key != "ort_fp32":
            continue
        _console.print(f"  making {baseline.title}")
        try:
            engine = baseline.make(entry.name, original, arrays[0], arrays, folder)
            _try(engine, threads)
            ready.engines[key] = (baseline.title, engine)
        except Exception as e:  # a tool of others may fail in any way; the row says so
            ready.failed[key] = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
            _console.print(f"  {baseline.title}: {ready.failed[key]}")
    optimized: dict[Any, Any] = {}
    for key, ours in OURS.items():
        if only and key not in only:
            continue
        _console.print(f"  making {ours.title}")
        path = folder / f"{key}.onnx"
        if ours.spec not in optimized:
            optimized[ours.spec] = normfuse.optimize(
                source.model, source.example_inputs, quantize=ours.spec, calibration=calibration
            )
        fast = optimized[ours.spec]
        options: dict[str, Any] = {} if ours.spec is None else {"form": ours.form, "target": ours.target}
        exported = to_onnx(fast, path, threads=threads, progress=False, **options)
        if ours.openvino:
            engine = openvino_engine(ours.title, path, arrays[0], ours.openvino)
        else:
            engine = onnxruntime_engine(ours.title, path, source.example_inputs)
        _try(engine, threads)
        ready.engines[key] = (ours.title, engine)
        ready.facts[key] = {"bytes": exported.bytes}
    for key, (_, engine) in ready.engines.items():
        ready.facts.setdefault(key, {})["sqnr"] = _quality(source, engine, threads)
    return ready


def _quality(source: Source, engine: Engine, threads: int) -> float | None:
    """SQNR in dB against the float model on the inputs that engines are timed on; None for one that is as good as equal."""
    found = sqnr_of(engine, float_outputs(source.module, source.args, source.kwargs), threads)
    return found if found < _EXACT else None


def _try(engine: Engine, threads: int) -> None:
    engine.open(threads)()


def like(source: Source, seed: int) -> Any:
    """Inputs of the same shapes, other values; token ids are rolled so that they stay in the vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def other(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return torch.randn(x.shape, generator=generator) if x.is_floating_point() else x.roll(seed, -1)

    given = source.example_inputs or ()
    return {k: other(v) for k, v in given.items()} if isinstance(given, dict) else tuple(other(x) for x in given)


def _input_names(path: Path) -> list[str]:
    import onnx

    return [i.name for i in onnx.load(str(path), load_external_data=False).graph.input]


def _by_name(names: Sequence[str], inputs: Any) -> dict[str, np.ndarray[Any, Any]]:
    values = inputs if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
    return {k: v.numpy() for k, v in values.items() if isinstance(v, torch.Tensor)}


# -- table -------------------------------------------------------------------------------------------------------------------


def _interval(interval: dict[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _table(models: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# Quantized models against what people use today",
        "",
        "Speedup over ONNX Runtime in fp32 on the original's default export, with its 95 % interval; every engine in a process of",
        "its own, interleaved. Made by `python -m benchmarks.quantized`. Weights are random: speed is real, SQNR is not accuracy.",
    ]
    machines = []
    for data in models:
        machine = data["itself"]["machine"]
        machines.append(f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}")
        lines += [
            "",
            f"## {data['title']}, {data['itself']['threads']} threads",
            "",
            f"Baseline {data['itself']['a']['median']:.2f} ms; against itself {_interval(data['itself']['speedup'])}.",
            "",
            "| engine | ms | speedup | file MB | SQNR dB |",
            "|---|---|---|---|---|",
        ]
        ordered = sorted(data["engines"].values(), key=lambda r: -r["comparison"]["speedup"]["value"])
        for row in ordered:
            size = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else ""
            sqnr = f"{row['sqnr']:.1f}" if row.get("sqnr") is not None else ""
            c = row["comparison"]
            lines.append(f"| {row['title']} | {c['b']['median']:.2f} | {_interval(c['speedup'])} | {size} | {sqnr} |")
        lines += [f"| {BASELINES[k].title} | not run | {why} | | |" for k, why in data["failed"].items()]
    lines += ["", *(f"Measured on: {m}" for m in dict.fromkeys(machines)), ""]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(command, "benchmarks.quantized", args)


if __name__ == "__main__":
    sys.exit(main())
