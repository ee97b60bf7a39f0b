"""`normfuse bench`."""

import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.app.cuda import CPU, DTYPES, Placement, for_onnxruntime, in_dtype
from normfuse.app.engines import bench as compare
from normfuse.app.engines import export_original, onnxruntime_engine, program_engine, source_engine, tensorrt_engine
from normfuse.app.sources import Source
from normfuse.benchmark import Comparison, Engine, Verdict
from normfuse.benchmark.decided import MORE, decided
from normfuse.cli.bundled import Telling, bundled, telling_options
from normfuse.cli.onnx_files import file_inputs, is_onnx
from normfuse.cli.options import Model, Pipeline, model_options, names, pipeline_options, spelled
from normfuse.cli.reports import check_report, write_report
from normfuse.errors import CheckFailed, Undecided, UsageError
from normfuse.export.targets import target_named
from normfuse.gpu.device import Gpu, find_gpu

if TYPE_CHECKING:
    from torch import fx

    from normfuse.reports.report import Report

__all__ = ["ENGINES", "Settings", "Workshop", "bench"]

_log = logging.getLogger(__name__)

ENGINES = (
    "eager", "compile", "onnxruntime", "tensorrt", "eager-optimized", "compile-optimized", "kernels-optimized",
    "onnxruntime-optimized", "tensorrt-optimized",
)  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """Which engine is claimed to be how much faster than which."""

    against: str | None
    challenger: str | None
    at_least: float | None


@dataclass(frozen=True)
class Making:
    """How engines are made."""

    device: str
    dtype: str | None
    graph: bool
    plugins: str | None
    form: Any


@dataclass(frozen=True)
class Timing:
    """How long, and on how many threads; see `normfuse.bench`."""

    threads: int | None
    seconds: float
    rounds: int | None
    warmup: float

    def longer(self, times: int) -> dict[str, Any]:
        """The arguments of `normfuse.bench`, for that many times as long."""
        found = dataclasses.asdict(self)
        return found | {"seconds": times * self.seconds, "rounds": None if self.rounds is None else times * self.rounds}


_claim_options = bundled(
    "claim",
    Claim,
    click.option(
        "--against", metavar="ENGINE", help="What to beat.  [default: onnxruntime; on a GPU compile, or tensorrt for TensorRT]"
    ),
    click.option("--engine", "challenger", metavar="ENGINE", help="What should be faster.  [default: see above; SOURCE for .onnx]"),
    click.option("--at-least", type=float, metavar="RATIO", help="Demanded speedup.  [default: 1 minus the measured noise]"),
)
_making_options = bundled(
    "making",
    Making,
    click.option("--device", type=click.Choice(("cpu", "cuda")), default="cpu", show_default=True, help="Where PyTorch runs."),
    click.option(
        "--dtype", metavar="fp32|fp16|bf16", callback=spelled(tuple(DTYPES)), help="Of the model on a GPU.  [default: fp16]"
    ),
    click.option("--graph/--no-graph", default=True, help="On a GPU, replay a CUDA graph.  [default: graph]"),
    click.option("--plugins", metavar="NAMES", help="normfuse's kernels in tensorrt-optimized: rms_norm, ...  [default: none]"),
    click.option(
        "--form",
        type=click.Choice(("auto", *target_named("onnxruntime").quantized)),
        default="auto",
        show_default=True,
        help="What --quantize becomes in onnxruntime-optimized.",
    ),
)
_timing_options = bundled(
    "timing",
    Timing,
    click.option("--threads", type=click.IntRange(1), help="Threads of each engine.  [default: one for each physical core]"),
    click.option(
        "--seconds",
        type=float,
        default=20.0,
        show_default=True,
        help="Time for measuring. Exporting, loading and warming up come on top.",
    ),
    click.option("--rounds", type=click.IntRange(2), help="Exact number of rounds instead."),
    click.option("--warmup", type=float, default=0.5, show_default=True, help="Seconds of warm-up for each engine."),
)


@click.command(short_help="Measure optimized against original; exit 1 if slower, 3 if undecided.")
@model_options
@pipeline_options
@_claim_options
@_making_options
@_timing_options
@telling_options
def bench(model: Model, pipeline: Pipeline, claim: Claim, making: Making, timing: Timing, telling: Telling) -> None:
    """Measure the optimized SOURCE against another engine, interleaved, each in a process of its own.

    Engines: eager, compile (torch.compile), onnxruntime and tensorrt run the original. With -optimized they run
    the result, and kernels-optimized runs it with normfuse's own kernels in PyTorch. An .onnx or .engine file is
    an engine too. What should be faster is by default onnxruntime-optimized, tensorrt-optimized where --against is
    tensorrt, and kernels-optimized with --device cuda. On a GPU the device is the clock.

    The claim is that the speedup is --at-least RATIO. It holds (exit code 0) where the whole 95 % interval of the speedup is
    above that, fails (1) where all of it is below, and is undecided (3) otherwise. Where the baseline differs from
    itself by more than 5 %, or other processes worked during most turns, the interval is widened by that first.
    """
    against, challenger = _chosen(model, claim, making.device)
    check_report(telling.report_path, force=telling.force)
    if telling.report_path is not None and not challenger.endswith("-optimized"):
        raise UsageError(f"--report tells what was done to the model, and {challenger} runs none that normfuse optimized")
    on_gpu = _device_of(against, challenger, making)
    gpu = find_gpu() if on_gpu else None
    settings = Settings(
        Placement(making.device, making.dtype or ("fp32" if gpu is None else "fp16"), making.graph), names(making.plugins)
    )

    def say(text: str) -> None:
        if not (telling.quiet or telling.as_json):
            click.echo(text, err=True)

    with tempfile.TemporaryDirectory(prefix="normfuse-bench-") as folder:
        say(f"preparing {against} and {challenger}, then opening each of them in a process of its own")
        workshop = Workshop(model, pipeline, Path(folder), making.form, settings)
        pair = workshop.engine(against), workshop.engine(challenger)
        weights = workshop.weights
        result = _decided(pair, timing, claim.at_least, say, progress=not telling.quiet)
    if workshop.report is not None:
        write_report(replace(workshop.report, latencies=(result.latency(),)), telling.report_path, force=telling.force)
    bound, verdict, why = result.bound(claim.at_least), result.verdict(claim.at_least), result.why_undecided(claim.at_least)
    if telling.as_json:
        on = {} if gpu is None else {"gpu": gpu.to_dict() | {"dtype": settings.place.dtype, "graph": making.graph}}
        told = {"source": model.source, "weights": weights, "at_least": bound, "verdict": verdict.value, "why_undecided": why}
        click.echo(json.dumps({**result.to_dict(), **on, **told}, indent=2))
    elif not telling.quiet:
        said = f"{model.source}, weights: {weights}\n" if weights else ""
        click.echo(f"{said}{result}\n{_clock(gpu, settings)}at least {bound:.3f}: {verdict.value}")
    if verdict is Verdict.FAILS:
        raise CheckFailed(f"{pair[1].name} is {result.speedup} times as fast as {pair[0].name}; at least {bound:.3f} was demanded")
    if verdict is Verdict.UNDECIDED:
        raise Undecided(f"{why.replace('(seconds)', '(--seconds)')}; the speedup is {result.speedup}")


def _device_of(against: str, challenger: str, making: Making) -> bool:
    """Both run on a GPU.

    Raises:
        UsageError: one does, or a flag is about another device.
    """
    on_gpu = {name: _on_gpu(name, making.device) for name in (against, challenger)}
    if len(set(on_gpu.values())) > 1:
        raise UsageError(
            f"{against} and {challenger} are not on one device, and each is timed by its own clock: compare two on the CPU, or "
            "two on a GPU (--device cuda, tensorrt)"
        )
    if making.dtype is not None and not on_gpu[against]:
        raise UsageError("--dtype is for engines on a GPU; on the CPU models run as they are")
    if making.plugins is not None and "tensorrt-optimized" not in on_gpu:
        raise UsageError(f"--plugins is for the engine tensorrt-optimized, not for {against} and {challenger}")
    return on_gpu[against]


def _decided(
    pair: tuple[Engine, Engine], timing: Timing, at_least: float | None, say: Callable[[str], None], *, progress: bool
) -> Comparison:
    """Measured, and once more for longer where that decides nothing."""
    from normfuse.reports.numbers import duration

    def measured(times: int) -> Comparison:
        more = f"; {MORE} times as long once more if that is undecided" if times == 1 else ""

        def plan(count: int, left: float) -> None:
            say(f"measuring for about {duration(left)}, on a busy machine up to twice that: {count} rounds{more}")

        return compare(*pair, progress=progress, on_plan=plan, **timing.longer(times))

    return decided(measured, at_least, lambda c: say(f"undecided after {c.rounds} rounds: {c.why_undecided(at_least)}"))


def _chosen(model: Model, claim: Claim, device: str) -> tuple[str, str]:
    """Both engines, with defaults where they are not named."""
    against, challenger = claim.against, claim.challenger
    if challenger is None:
        file = is_onnx(model.source)
        tensorrt = against is not None and _is_tensorrt(against)
        challenger = (
            model.source if file else "tensorrt-optimized" if tensorrt else "kernels-optimized" if device == "cuda"
            else "onnxruntime-optimized"
        )  # fmt: skip
    if against is None:
        against = "tensorrt" if _is_tensorrt(challenger) else "compile" if device == "cuda" else "onnxruntime"
    return against, challenger


def _is_tensorrt(name: str) -> bool:
    return name.startswith("tensorrt") or Path(name).suffix == ".engine"


def _on_gpu(name: str, device: str) -> bool:
    return _is_tensorrt(name) or (device == "cuda" and not is_onnx(name) and not name.startswith("onnxruntime"))


def _clock(gpu: Gpu | None, settings: "Settings") -> str:
    if gpu is None:
        return ""
    how = "CUDA graphs" if settings.place.graph else "no CUDA graphs"
    return f"{gpu}\n{settings.place.dtype}, {how}, timed by the device\n"


@dataclass(frozen=True)
class Settings:
    """How engines on a GPU are made.

    Attributes:
        place: device of PyTorch, dtype, CUDA graphs.
        plugins: of `tensorrt-optimized`.
    """

    place: Placement = CPU
    plugins: tuple[Any, ...] = ()


class Workshop:
    """Makes the engines of one model; files that they need are made once and live in `folder`."""

    def __init__(
        self, model: Model, pipeline: Pipeline, folder: Path, form: Any = "auto", settings: Settings | None = None
    ) -> None:
        self._model = model
        self._pipeline = pipeline
        self._folder = folder
        self._form = form
        self._settings = settings or Settings()
        self._loaded: Source | None = None
        self._fast: dict[str, fx.GraphModule] = {}

    def engine(self, name: str) -> Engine:
        """The engine called `name`, or the runtime of the file of that name.

        Raises:
            UsageError: nothing is called that, or the model is an `.onnx` file and the engine needs the PyTorch model.
        """
        place = self._settings.place
        if is_onnx(name):
            return onnxruntime_engine(Path(name).name, name, self._inputs(Path(name)))
        if Path(name).suffix == ".engine":
            return tensorrt_engine(Path(name).name, name, self._inputs(Path(self._model.source)), graph=place.graph)
        if name not in ENGINES:
            raise UsageError(f"unknown engine {name!r}: expected {', '.join(ENGINES)} or an .onnx or .engine file")
        if is_onnx(self._model.source):
            raise UsageError(f"{name} starts from the PyTorch model; {self._model.source} is exported: name another .onnx file")
        kind, _, optimized = name.partition("-")
        if kind == "onnxruntime":
            path = self._optimized_onnx() if optimized else self._original_onnx()
            return onnxruntime_engine(name, path, self._inputs(path))
        if kind == "tensorrt":
            path = self._optimized_engine() if optimized else self._original_engine()
            return tensorrt_engine(name, path, self._inputs(path), graph=place.graph)
        if optimized:
            # the program in the file is in its dtype already
            return program_engine(
                name, self._program(kernels=kind == "kernels"), compile=kind == "compile", place=replace(place, dtype="fp32")
            )
        self._load()  # a wrong name is an error here and not in another process
        return source_engine(name, self._model.source, self._model.options, compile=kind == "compile", place=place)

    @property
    def weights(self) -> str:
        """Where the weights are from, once the model was loaded; empty for files and where nothing is known."""
        return "" if self._loaded is None else self._loaded.weights

    @property
    def report(self) -> "Report | None":
        """What was done to the model, once an engine was made that runs it optimized."""
        from normfuse.reports.record import report

        return next((report(fast) for fast in self._fast.values()), None)

    def _load(self) -> Source:
        if self._loaded is None:
            self._loaded = self._model.load(inputs_needed=True)
        return self._loaded

    def _inputs(self, path: Path) -> Any:
        """What the file at `path` is fed with: the model's own example inputs, so that all engines get the same."""
        if is_onnx(self._model.source):
            return file_inputs(path, self._model.options)
        loaded = self._load()
        return loaded.kwargs if loaded.kwargs and not loaded.args else (*loaded.args, *loaded.kwargs.values())

    def _optimized(self, dtype: str = "fp32") -> "fx.GraphModule":
        if dtype not in self._fast:
            self._fast[dtype] = self._pipeline.run(self._model, in_dtype(self._load(), dtype))
        return self._fast[dtype]

    def _original_onnx(self, opset: int | None = None) -> Path:
        path = self._folder / f"original{opset or ''}.onnx"
        if not path.exists():
            original, given = for_onnxruntime(self._load()) if opset is None else (self._load(), "")
            if given:
                _log.warning("onnxruntime runs the original in float32: it has no %s kernels for all of it on the CPU", given)
            self._model.vary(original, lambda shapes: export_original(original, path, dynamic_shapes=shapes, opset=opset))
        return path

    def _optimized_onnx(self) -> Path:
        from normfuse.export import to_onnx

        path = self._folder / "optimized.onnx"
        if not path.exists():
            to_onnx(self._optimized(), path, target="onnxruntime", form=self._form)
        return path

    def _original_engine(self) -> Path:
        from normfuse.export.targets import opset_for, target_named
        from normfuse.export.tensorrt import build_onnx

        path = self._folder / "original.engine"
        if not path.exists():
            file = self._original_onnx(opset_for(target_named("tensorrt"), None))
            build_onnx(file, path, dtype=self._settings.place.dtype)
        return path

    def _optimized_engine(self) -> Path:
        from normfuse.export.tensorrt import to_tensorrt

        path = self._folder / "optimized.engine"
        if not path.exists():
            to_tensorrt(self._optimized(), path, dtype=self._settings.place.dtype, plugins=self._settings.plugins)
        return path

    def _program(self, *, kernels: bool) -> Path:
        from normfuse.pt2 import save_program

        dtype = self._settings.place.dtype
        path = self._folder / f"optimized-{dtype}{'-kernels' if kernels else ''}.pt2"
        if path.exists():
            return path
        gm = self._optimized(dtype)
        if kernels:
            from normfuse.export.kernels import with_kernels

            gm = with_kernels(gm)
        save_program(gm, path)
        return path
