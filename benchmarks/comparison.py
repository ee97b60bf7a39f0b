"""The page that compares: other tools and normfuse on the same models, each by the lines that its own documentation gives.

    python -m benchmarks.comparison                    # about five minutes: measures, and writes docs/comparison.md
    python -m benchmarks.comparison --page             # writes the page again from what was measured

Ratios are against the original's default ONNX export in a default session of ONNX Runtime. A tool that is not installed,
or that fails on a model, is named with its reason. For all rows, beside the extra `test`:
`pip install onnxslim onnxsim openvino nncf torchao`.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich.console import Console

import normfuse
from benchmarks.baselines import BASELINES
from benchmarks.command import exit_code
from benchmarks.comparison_page import Row, page
from benchmarks.models import MODELS, Entry
from normfuse.app.engines import callable_engine, compiled, export_original, onnxruntime_engine
from normfuse.app.sources import Source
from normfuse.benchmark import Comparison, Engine, Schedule, measure
from normfuse.benchmark.machine import Machine, cores
from normfuse.export import to_onnx
from normfuse.export.onnx.inspect import norm_counts, op_counts
from normfuse.files import atomic
from normfuse.progress import progress_bar
from normfuse.quant.words import parse_quantize

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "comparison.json"
PAGE = ROOT / "docs" / "comparison.md"
DEFAULT = ("vit_tiny_b1", "resnet50_b1")
_console = Console(stderr=True, soft_wrap=True)
# weights are random: what a better rounding would win does not show, and its search takes minutes
_W8 = "w8a8,groups=1,size,nearest,migration=false"
_W4 = "w4a8,size,nearest,migration=false"


@dataclass(frozen=True)
class Given:
    """What every way starts from: the model, its default export, its inputs by name, samples to calibrate on, and a folder."""

    entry: Entry
    source: Source
    original: Path
    inputs: dict[str, np.ndarray[Any, Any]]
    calibration: list[dict[str, np.ndarray[Any, Any]]]
    folder: Path
    optimized: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """One way to a faster model.

    Attributes:
        title: tool and setting.
        command: what anybody runs, on the files of this comparison.
        make: the file that it writes, and how the file is run; no file for what runs in PyTorch.
        exact: it is meant to be the same function.
    """

    title: str
    command: str
    make: Callable[[Given], tuple[Path | None, Engine]]
    exact: bool = True


def _session(
    title: str, make: Callable[[Given, Path], None], *, kernels: bool = True
) -> Callable[[Given], tuple[Path | None, Engine]]:
    def made(given: Given) -> tuple[Path | None, Engine]:
        path = given.folder / f"{title.replace(' ', '_').replace('/', '_').replace(',', '')}.onnx"
        make(given, path)
        return path, onnxruntime_engine(title, path, given.inputs, kernels=kernels)

    return made


def _slim(given: Given, path: Path) -> None:
    import onnxslim

    onnxslim.slim(str(given.original), str(path))


def _sim(given: Given, path: Path) -> None:
    import onnx
    import onnxsim

    model, right = onnxsim.simplify(onnx.load(str(given.original)))
    if not right:
        raise RuntimeError("onnxsim's own check failed")
    onnx.save(model, str(path))


def _transformers_optimizer(given: Given, path: Path) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    if given.entry.convolutional:
        raise RuntimeError("it is for transformers")
    optimize_model(str(given.original), model_type="vit" if "vit" in given.entry.name else "bert").save_model_to_file(str(path))


def _ours(words: str | None, form: str, given: Given, path: Path) -> None:
    if words not in given.optimized:
        spec = None if words is None else parse_quantize(words)
        data = None if spec is None else [tuple(map(torch.from_numpy, c.values())) for c in given.calibration]
        given.optimized[words] = normfuse.optimize(given.source.model, given.source.example_inputs, quantize=spec, calibration=data)
    options: dict[str, Any] = {} if words is None else {"form": form}
    to_onnx(given.optimized[words], path, progress=False, **options)


def _open_compiled(name: str, threads: int) -> Callable[[], Any]:
    torch.set_num_threads(threads)
    source = MODELS[name].build()
    return callable_engine("torch.compile", compiled(source.module), source.example_inputs).open(threads)


def _compiled(given: Given) -> tuple[Path | None, Engine]:
    return None, Engine("torch.compile", partial(_open_compiled, given.entry.name))


def _baseline(name: str, file: str | None, given: Given) -> tuple[Path | None, Engine]:
    engine = BASELINES[name].make(given.entry.name, given.original, given.inputs, given.calibration, given.folder)
    return None if file is None else given.folder / file, engine


WAYS = (
    Way("onnxslim", "onnxslim original.onnx slim.onnx", _session("onnxslim", _slim)),
    Way("onnxsim", "onnxsim original.onnx sim.onnx", _session("onnxsim", _sim)),
    Way(
        "ONNX Runtime's transformer optimizer",
        "python -m onnxruntime.transformers.optimizer --input original.onnx --output o.onnx --model_type vit",
        _session("ORT transformer optimizer", _transformers_optimizer),
    ),
    Way("torch.compile (Inductor)", "torch.compile(model, dynamic=False)", _compiled),
    Way("OpenVINO, fp32", "openvino.Core().compile_model('original.onnx', 'CPU')", partial(_baseline, "openvino_fp32", None)),
    Way("**normfuse, fp32**", "normfuse export SOURCE -o fast.onnx", _session("normfuse fp32", partial(_ours, None, ""))),
    Way(
        "ONNX Runtime, int8 dynamic", "onnxruntime.quantization.quantize_dynamic(…, per_channel=True)",
        partial(_baseline, "ort_dynamic", "ort_dynamic.onnx"), exact=False,
    ),
    Way(
        "ONNX Runtime, int8 static (QDQ)", "onnxruntime.quantization.quantize_static(…, QuantFormat.QDQ, per_channel=True)",
        partial(_baseline, "ort_static", "ort_static_False.onnx"), exact=False,
    ),
    Way(
        "OpenVINO, int8 (NNCF)", "nncf.quantize(model, nncf.Dataset(samples))",
        partial(_baseline, "openvino_int8", None), exact=False,
    ),
    Way(
        "torchao, int8 dynamic, compiled", "torchao.quantization.quantize_(model, Int8DynamicActivationInt8WeightConfig())",
        partial(_baseline, "torchao", None), exact=False,
    ),
    Way(
        "**normfuse, W8A8**, with its library", f"normfuse export SOURCE -o q.onnx --quantize {_W8}",
        _session("normfuse W8A8", partial(_ours, _W8, "native")), exact=False,
    ),
    Way(
        "**normfuse, W8A8**, stock ONNX Runtime", f"normfuse export SOURCE -o q.onnx --quantize {_W8} --form integer",
        _session("normfuse W8A8 integer", partial(_ours, _W8, "integer")), exact=False,
    ),
    Way(
        "**normfuse, W4A8**, with its library", f"normfuse export SOURCE -o q.onnx --quantize {_W4}",
        _session("normfuse W4A8", partial(_ours, _W4, "native")), exact=False,
    ),
)  # fmt: skip


@click.command()
@click.option("--model", "names", type=click.Choice(tuple(MODELS)), multiple=True, help=f"Models.  [default: {', '.join(DEFAULT)}]")
@click.option("--seconds", type=float, default=40.0, show_default=True, help="Time for measuring each model.")
@click.option("--threads", type=click.IntRange(1), default=len(cores()), show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--page", "only_page", is_flag=True, help="Measure nothing; write the page from the results.")
@click.option("--to", type=click.Path(path_type=Path), default=PAGE, show_default=True, help="The page.")
def command(names: tuple[str, ...], seconds: float, threads: int, results: Path, only_page: bool, to: Path) -> None:
    """Measure all ways on all models, and write the page."""
    if not only_page:
        with tempfile.TemporaryDirectory(prefix="normfuse-comparison-") as folder:
            rows = [_measured(MODELS[n], Schedule(seconds=seconds, threads=threads), Path(folder, n)) for n in names or DEFAULT]
        today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        data = {"date": today, "threads": threads, "machine": asdict(Machine.here()), "tools": _versions(), "models": rows}
        with atomic(results, force=True) as file:
            file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    to.write_text(page(json.loads(results.read_text(encoding="utf-8"))), encoding="utf-8")


def _measured(entry: Entry, schedule: Schedule, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    given = _given(entry, folder)
    base = onnxruntime_engine("original", given.original, given.inputs)
    expected = _outputs(given.original, base)
    rows, engines = [], []
    ours = torch.get_num_threads()
    for way in WAYS:
        _console.print(f"  {entry.name}: {way.title.replace('*', '')}")
        try:
            path, engine = way.make(given)
            found = engine.open(schedule.threads or 1)()
        except Exception as e:  # a tool of others may fail in any way, or not be installed; the row says so
            why = f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
            rows.append(Row(way.title, way.command, way.exact, why_not=why))
            continue
        finally:
            torch.set_num_threads(ours)  # engines of PyTorch set it
        rows.append(Row(way.title, way.command, way.exact, *_facts(path), error=_apart(expected, found)))
        engines.append(engine)
    # the first process of a comparison is slower than the others: one that is not counted is started before them
    with progress_bar(entry.name) as bar:
        times = measure((base, base, base, *engines), schedule, on_round=bar.to)
    itself = Comparison.of(times, a=1, again=2, b=2)
    ran = [row for row in rows if not row.why_not]
    for i, row in enumerate(ran):
        compared = Comparison.of(times, a=1, again=2, b=3 + i)
        row.timed(compared.b.median, compared.speedup.value, compared.speedup.low, compared.speedup.high)
    first = Row("the original", "torch.onnx.export(model, inputs, dynamo=True)", True, *_facts(given.original), error=0.0)
    first.timed(itself.a.median, itself.speedup.value, itself.speedup.low, itself.speedup.high)
    return {"name": entry.name, "title": entry.title, "noise": itself.noise, "rows": [asdict(row) for row in (first, *rows)]}


def _given(entry: Entry, folder: Path) -> Given:
    source = entry.build()
    original = folder / "original.onnx"
    export_original(source, original)
    import onnx

    names = [i.name for i in onnx.load(str(original), load_external_data=False).graph.input]
    inputs = dict(zip(names, _arrays(source.example_inputs), strict=True))
    generator = np.random.default_rng(1)
    other = {n: generator.permutation(a.ravel()).reshape(a.shape) for n, a in inputs.items()}
    return Given(entry, source, original, inputs, [inputs, other], folder)


def _arrays(inputs: Any) -> Iterator[np.ndarray[Any, Any]]:
    for value in inputs.values() if isinstance(inputs, dict) else inputs:
        yield value.numpy()


def _outputs(original: Path, base: Engine) -> np.ndarray[Any, Any]:
    return _first(base.open(1)())


def _first(found: Any) -> np.ndarray[Any, Any]:
    """The first output of any runtime, as an array."""
    if isinstance(found, torch.Tensor):
        return found.detach().numpy()
    if hasattr(found, "to_tuple"):  # OpenVINO
        return np.asarray(found.to_tuple()[0])
    if isinstance(found, dict):
        return _first(next(iter(found.values())))
    return _first(found[0]) if isinstance(found, (list, tuple)) else np.asarray(found)


def _apart(expected: np.ndarray[Any, Any], found: Any) -> float:
    """Difference over the outputs, both as root mean squares."""
    value = _first(found).astype(np.float64)
    return float(np.sqrt(np.mean((value - expected) ** 2) / np.mean(expected.astype(np.float64) ** 2)))


def _facts(path: Path | None) -> tuple[int | None, int | None, float | None]:
    """Nodes, norms and megabytes of a file."""
    if path is None:
        return None, None, None
    data = sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))
    return sum(op_counts(path).values()), sum(norm_counts(path).values()), data / 1e6


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("normfuse", "torch", "onnxruntime", "onnxslim", "onnxsim", "openvino", "nncf", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(args: Sequence[str] | None = None) -> int:
    return exit_code(command, "benchmarks.comparison", args)


if __name__ == "__main__":
    sys.exit(main())
