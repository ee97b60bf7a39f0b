"""`normfuse bench`."""

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.app.baselines import BASELINES, Material, named_arrays
from normfuse.app.cuda import CPU, DTYPES, Placement, for_onnxruntime, in_dtype
from normfuse.app.engines import export_original, file_engine, program_engine, source_engine
from normfuse.app.rivals import bench_each, float_outputs, sqnr_of
from normfuse.app.sources import Source
from normfuse.benchmark import Comparison, Engine, Schedule, Verdict
from normfuse.benchmark.against import Against
from normfuse.benchmark.decided import MORE
from normfuse.cli.bench_decoder import Lengths, bench_folder, length_options
from normfuse.cli.bundled import Telling, bundled, telling_options
from normfuse.cli.files.given import file_inputs, is_file, is_onnx
from normfuse.cli.files.running import opened_file
from normfuse.cli.help import Command
from normfuse.cli.options import Model, Pipeline, model_options, names, pipeline_options, spelled
from normfuse.cli.quantization import calibration_batches
from normfuse.cli.reports import check_report, write_report
from normfuse.errors import CheckFailed, Undecided, UsageError, did_you_mean
from normfuse.export.targets import FOLDERS, Folder, folder_of, opset_for, target_named
from normfuse.gpu.device import Gpu, find_gpu

if TYPE_CHECKING:
    from torch import fx

    from normfuse.reports.report import Report

__all__ = ["ENGINES", "Settings", "Workshop", "bench"]

_log = logging.getLogger(__name__)

_RUNTIMES = {folder.engine: folder for folder in FOLDERS.values()}
ENGINES = (
    "eager", "compile", *_RUNTIMES, "eager-optimized", "compile-optimized", "kernels-optimized",
    *(f"{name}-optimized" for name in _RUNTIMES), *BASELINES,
)  # fmt: skip
_RESTARTS = 3  # of all processes


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

    def schedule(self, times: int) -> Schedule:
        """That many times as long."""
        rounds = None if self.rounds is None else times * self.rounds
        return Schedule(times * self.seconds, rounds, self.warmup, threads=self.threads, restarts=_RESTARTS)


_claim_options = bundled(
    "claim",
    Claim,
    click.option(
        "--against",
        metavar="ENGINE[,ENGINE]",
        help="What to beat, e.g. onnxruntime-int8,openvino-int8.  [default: the runtime of --engine with the original; on a GPU "
        "compile, or tensorrt for TensorRT]",
    ),
    click.option("--engine", "challenger", metavar="ENGINE", help="What should be faster.  [default: see above]"),
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
        help="What --quantize becomes in onnxruntime-optimized; in the others it is what their runtime likes best.",
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


@click.command(cls=Command, short_help="Measure optimized against original; exit 1 if slower, 3 if undecided.")
@model_options
@pipeline_options
@_claim_options
@_making_options
@_timing_options
@length_options
@telling_options
def bench(
    model: Model, pipeline: Pipeline, claim: Claim, making: Making, timing: Timing, lengths: Lengths, telling: Telling
) -> None:
    """Measure the optimized SOURCE against another engine, interleaved, each in a process of its own.

    Engines: eager, compile (torch.compile), onnxruntime, openvino (as it converts the model itself, in float32) and tensorrt
    run the original. With -optimized they run the result, and kernels-optimized runs it with normfuse's own kernels in
    PyTorch. An .onnx, .xml or .engine file is an engine too. What should be faster is by default onnxruntime-optimized,
    openvino-optimized or tensorrt-optimized where --against is openvino or tensorrt, and kernels-optimized with --device
    cuda. On a GPU the device is the clock.

    An .onnx file as SOURCE is held against another file, or against what OpenVINO or the quantizers below make of it; alone, what
    `normfuse export SOURCE -o NEW.onnx` makes of it is held against it.

    onnxruntime-int8 and openvino-int8 are what a model is quantized with otherwise: ONNX Runtime's own quantizer (dynamic, or
    static where that is faster) and NNCF's, with the data of --calibration. How close each engine is to the float model stands
    beside its speed. Several engines are measured in one run; the claim is then about each of them:

    \b
      normfuse bench timm:resnet50 --quantize w8a8,static \\
          --calibration images.npz --against onnxruntime-int8,openvino-int8

    The folder of a decoder is measured as it writes: prefill and decode apart, each in tokens a second, with --against hf:DIR
    (PyTorch), genai, int4:DIR (ONNX Runtime's own), openvino:FILE, or another folder. The claim is about decode:

    \b
      normfuse bench smollm2-w4 --against hf:smollm2,genai,int4:smollm2

    The claim is that the speedup is --at-least RATIO. It holds (exit code 0) where the whole 95 % interval of the speedup is
    above that, fails (1) where all of it is below, and is undecided (3) otherwise. Where the baseline differs from
    itself by more than 5 %, or other processes worked during most turns, the interval is widened by that first.
    """
    from normfuse.app.writing.rivals import is_decoder

    if is_decoder(model.source):
        _check_for_folder(pipeline, claim, making, telling)
        bench_folder(model, claim.against, lengths, timing.schedule, claim.at_least, telling)
        return
    lengths.check_unused()
    against, challenger = _chosen(model, claim, making.device)
    for name in against:
        _known(name)
    check_report(telling.report_path, force=telling.force)
    if telling.report_path is not None and (is_file(model.source) or not challenger.endswith("-optimized")):
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
        say(f"preparing {', '.join(against)} and {challenger}, then opening each of them in a process of its own")
        workshop = Workshop(model, pipeline, Path(folder), making.form, settings)
        workshop.threads = timing.threads
        rivals, ours = [workshop.engine(name) for name in against], workshop.engine(challenger)
        weights = workshop.weights
        quality = workshop.qualities((*rivals, ours)) if gpu is None else {}
        found = _decided(rivals, ours, timing, claim.at_least, say, progress=not telling.quiet)
    result = Against(found, claim.at_least, quality, workshop.how, workshop.calibrated, _clock(gpu, settings))
    if workshop.report is not None:
        latencies = tuple(c.latency() for c in found)
        write_report(replace(workshop.report, latencies=latencies), telling.report_path, force=telling.force)
    if telling.as_json:
        on = {} if gpu is None else {"gpu": gpu.to_dict() | {"dtype": settings.place.dtype, "graph": making.graph}}
        click.echo(json.dumps({**result.to_dict(), **on, "source": model.source, "weights": weights}, indent=2))
    elif not telling.quiet:
        click.echo(f"{model.source}, weights: {weights}\n{result}" if weights else str(result))
    _judged(result)


def _check_for_folder(pipeline: Pipeline, claim: Claim, making: Making, telling: Telling) -> None:
    """Raise `UsageError` for a flag that the folder of a decoder does not have."""
    flags: dict[str, Any] = {
        "--quantize": pipeline.quantize, "--passes": pipeline.passes, "--calibration": pipeline.calibration,
        "--engine": claim.challenger, "--device": making.device != "cpu", "--dtype": making.dtype, "--plugins": making.plugins,
        "--form": making.form != "auto", "--report": telling.report_path,
    }  # fmt: skip
    stray = next((flag for flag, value in flags.items() if value), None)
    if stray:
        raise UsageError(f"{stray} is not for the folder of a decoder, which is measured as it is")


def _judged(result: Against) -> None:
    """Raise what the verdict says: the exit code.

    Raises:
        CheckFailed: the claim fails.
        Undecided: it is undecided.
    """
    worst, bound = result.worst, result.worst.bound(result.at_least)
    if result.verdict is Verdict.FAILS:
        raise CheckFailed(f"{worst.b.name} is {worst.speedup} times as fast as {worst.a.name}; at least {bound:.3f} was demanded")
    if result.verdict is Verdict.UNDECIDED:
        why = worst.why_undecided(result.at_least).replace("(seconds)", "(--seconds)")
        raise Undecided(f"{why}; the speedup is {worst.speedup}")


def _known(name: str) -> None:
    """Raise `UsageError` where nothing is called that, or a library that it needs is missing."""
    if name in BASELINES:
        BASELINES[name].check()
    elif name not in ENGINES and folder_of(name) is None:
        known = " or ".join(folder.suffixes[0] for folder in FOLDERS.values())
        raise UsageError(
            f"unknown engine {name!r}{did_you_mean(name, ENGINES)}: expected {', '.join(ENGINES)} or a file that ends in {known}"
        )


def _device_of(against: tuple[str, ...], challenger: str, making: Making) -> bool:
    """All of them run on a GPU.

    Raises:
        UsageError: one does, or a flag is about another device.
    """
    on_gpu = {name: _on_gpu(name, making.device) for name in (*against, challenger)}
    if len(set(on_gpu.values())) > 1:
        raise UsageError(
            f"{', '.join(against)} and {challenger} are not on one device, and each is timed by its own clock: compare engines on "
            "the CPU, or on a GPU (--device cuda, tensorrt)"
        )
    if making.dtype is not None and not on_gpu[challenger]:
        raise UsageError("--dtype is for engines on a GPU; on the CPU models run as they are")
    if making.plugins is not None and "tensorrt-optimized" not in on_gpu:
        raise UsageError(f"--plugins is for the engine tensorrt-optimized, not for {', '.join(on_gpu)}")
    return on_gpu[challenger]


def _decided(
    rivals: Sequence[Engine], ours: Engine, timing: Timing, at_least: float | None, say: Callable[[str], None], *, progress: bool
) -> list[Comparison]:
    """Measured, and once more for longer where that decides nothing."""
    from normfuse.reports.numbers import duration

    def measured(times: int) -> list[Comparison]:
        more = f"; {MORE} times as long once more if that is undecided" if times == 1 else ""

        def plan(count: int, left: float) -> None:
            say(f"measuring for about {duration(left)}, on a busy machine up to twice that: {count} rounds{more}")

        return bench_each(rivals, ours, timing.schedule(times), progress=progress, on_plan=plan)

    found = measured(1)
    first = Against(found, at_least)
    if first.verdict is not Verdict.UNDECIDED:
        return found
    say(f"undecided after {first.worst.rounds} rounds: {first.worst.why_undecided(at_least)}")
    return measured(MORE)


def _chosen(model: Model, claim: Claim, device: str) -> tuple[tuple[str, ...], str]:
    """What to beat, and what should be faster, with defaults where they are not named."""
    against, challenger = tuple(dict.fromkeys(names(claim.against))), claim.challenger
    if challenger is None and not against and is_onnx(model.source):
        challenger = "onnxruntime-optimized"
    if challenger is None:
        runtime = next((r for r in map(_runtime, against) if r is not None and (r.on_gpu or device != "cuda")), None)
        challenger = (
            model.source if is_file(model.source) else f"{runtime.engine}-optimized" if runtime is not None
            else "kernels-optimized" if device == "cuda" else "onnxruntime-optimized"
        )  # fmt: skip
    if not against:
        runtime = _runtime(challenger)
        on_gpu = device == "cuda" and (runtime is None or not runtime.on_gpu)
        against = ("compile" if on_gpu else "onnxruntime" if runtime is None else runtime.engine,)
    return against, challenger


def _runtime(name: str) -> Folder | None:
    """The target whose runtime an engine of ours is, by its name or that of a file; None for PyTorch and for tools of others."""
    return None if name in BASELINES else folder_of(name) or _RUNTIMES.get(name.partition("-")[0])


def _on_gpu(name: str, device: str) -> bool:
    if name in BASELINES:
        return False
    runtime = _runtime(name)
    return device == "cuda" if runtime is None else runtime.on_gpu


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
        self.threads: int | None = None
        self.how: dict[str, str] = {}  # engines of others were made, by name

    def engine(self, name: str) -> Engine:
        """The engine called `name`, or the runtime of the file of that name.

        Raises:
            UsageError: nothing is called that, or the model is a file and the engine needs the PyTorch model.
        """
        place = self._settings.place
        if (folder := folder_of(name)) is not None:
            source = self._model.source if folder.on_gpu else name
            return file_engine(Path(name).name, name, self._inputs(Path(source)), graph=place.graph)
        _known(name)
        if is_file(self._model.source):
            return self._of_file(name)
        if name in BASELINES:
            return self._baseline(name)
        kind, _, optimized = name.partition("-")
        if kind in _RUNTIMES:
            path = self._optimized_file(kind) if optimized else self._original_file(kind)
            return file_engine(name, path, self._inputs(path), graph=place.graph)
        if optimized:
            # the program in the file is in its dtype already
            return program_engine(
                name, self._program(kernels=kind == "kernels"), compile=kind == "compile", place=replace(place, dtype="fp32")
            )
        self._load()  # a wrong name is an error here and not in another process
        return source_engine(name, self._model.source, self._model.options, compile=kind == "compile", place=place)

    def _of_file(self, name: str) -> Engine:
        """An engine that needs no more than the .onnx file that is the model.

        Raises:
            UsageError: it needs the PyTorch model.
        """
        kind, _, optimized = name.partition("-")
        source, folder = Path(self._model.source), _RUNTIMES.get(kind)
        if not is_onnx(self._model.source) or folder is None or folder.on_gpu or self._pipeline.quantize is not None:
            raise UsageError(f"{name} starts from the PyTorch model; {source} is exported: name another file")
        inputs = file_inputs(source, self._model.options)
        if name in BASELINES:
            arrays = {key: value.numpy() for key, value in inputs.items()}
            made = BASELINES[name].made(Material(source, arrays, [arrays], self._folder, self.threads))
            self.how[name] = made.how
            return made.engine
        path = self._folder / f"{name}{folder.suffixes[0]}"
        if optimized:
            folder.convert(source, path, inputs, folder.options(progress=False))
        elif folder.engine == "onnxruntime":
            path = source
        else:
            from normfuse.export.openvino.original import convert_original

            convert_original(source, path)
        return file_engine(name, path, tuple(inputs.values()))

    @property
    def weights(self) -> str:
        """Where the weights are from, once the model was loaded; empty for files and where nothing is known."""
        return "" if self._loaded is None else self._loaded.weights

    @property
    def report(self) -> "Report | None":
        """What was done to the model, once an engine was made that runs it optimized."""
        from normfuse.reports.record import report

        return next((report(fast) for fast in self._fast.values()), None)

    @property
    def calibrated(self) -> str:
        """What engines of others were calibrated on; empty where there is none."""
        if not self.how:
            return ""
        stated = self._model.options.input
        of_file = "random data" if stated is None else str(stated)
        data = self._pipeline.calibration or (of_file if self._loaded is None else self._loaded.data)
        return f"{data}: their SQNR says nothing of your data" if data == "random data" else data

    def qualities(self, engines: Sequence[Engine]) -> dict[str, float]:
        """The SQNR of each engine on the example inputs in dB against the float model; {} where nothing is quantized."""
        if not (self.how or self._pipeline.quantize is not None):
            return {}
        if is_file(self._model.source):
            source = Path(self._model.source)
            answer = opened_file(source)(file_inputs(source, self._model.options)).values()
            expected = [v.float().numpy() for v in answer if v.is_floating_point()]
        else:
            loaded = self._load()
            expected = float_outputs(loaded.module, loaded.args, loaded.kwargs)
        return {e.name: sqnr_of(e, expected, self.threads) for e in engines}

    def _baseline(self, name: str) -> Engine:
        """The engine of others of that name, calibrated as --calibration says, else on the example inputs."""
        path, loaded = self._original_onnx(), self._load()
        batches = [] if self._pipeline.calibration is None else calibration_batches(self._pipeline.calibration, loaded)
        inputs = named_arrays(path, self._inputs(path))
        calibration = [named_arrays(path, batch) for batch in batches] or [inputs]
        made = BASELINES[name].made(Material(path, inputs, calibration, self._folder, self.threads))
        self.how[name] = made.how
        return made.engine

    def _load(self) -> Source:
        if self._loaded is None:
            self._loaded = self._model.load(inputs_needed=True)
        return self._loaded

    def _inputs(self, path: Path) -> Any:
        """What the file at `path` is fed with: the model's own example inputs, so that all engines get the same."""
        if is_file(self._model.source):
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

    def _original_file(self, runtime: str) -> Path:
        """The original as everybody gives it to a runtime."""
        made = {"onnxruntime": self._original_onnx, "tensorrt": self._original_engine}
        if runtime in made:
            return made[runtime]()
        folder = _RUNTIMES[runtime]
        path = self._folder / f"original{folder.suffixes[0]}"
        if not path.exists():
            source = self._load()
            self._model.vary(source, lambda shapes: folder.original(source.model, source.args, source.kwargs, path, shapes))
        return path

    def _optimized_file(self, runtime: str) -> Path:
        folder = _RUNTIMES[runtime]
        path = self._folder / f"optimized{folder.suffixes[0]}"
        if not path.exists():
            own = {"onnxruntime": {"form": self._form}, "tensorrt": {"plugins": self._settings.plugins}}
            asked: dict[str, Any] = {"dtype": self._settings.place.dtype} if folder.on_gpu else {}
            folder.write(self._optimized(), path, folder.options(**asked, **own.get(runtime, {})))
        return path

    def _original_engine(self) -> Path:
        from normfuse.export.tensorrt import build_onnx

        path = self._folder / "original.engine"
        if not path.exists():
            file = self._original_onnx(opset_for(target_named("tensorrt"), None))
            build_onnx(file, path, dtype=self._settings.place.dtype)
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
