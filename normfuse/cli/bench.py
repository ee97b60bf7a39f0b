"""`normfuse bench`."""

import json
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.benchmark import Comparison, Engine, Verdict
from normfuse.cli.onnx_files import file_inputs, is_onnx
from normfuse.cli.options import Model, Pipeline, json_option, model_options, pipeline_options, verbosity
from normfuse.engines import bench as compare
from normfuse.engines import export_original, onnxruntime_engine, program_engine, source_engine
from normfuse.errors import CheckFailed, UsageError
from normfuse.sources import Source

if TYPE_CHECKING:
    from torch import fx

__all__ = ["ENGINES", "Workshop", "bench"]

ENGINES = ("eager", "compile", "onnxruntime", "eager-optimized", "compile-optimized", "onnxruntime-optimized")
_MORE = 2  # an undecided measurement is repeated once, this much longer
_log = logging.getLogger(__name__)


@click.command(short_help="Measure optimized against original; exit 1 if slower.")
@model_options
@pipeline_options
@click.option(
    "--against",
    default="onnxruntime",
    show_default=True,
    metavar="ENGINE",
    help=f"What to beat: {', '.join(ENGINES)} or an .onnx file.",
)
@click.option(
    "--engine", "challenger", metavar="ENGINE", help="What should be faster.  [default: onnxruntime-optimized; SOURCE for .onnx]"
)
@click.option(
    "--form",
    type=click.Choice(("auto", "native", "integer", "qdq")),
    default="auto",
    show_default=True,
    help="What --quantize becomes in onnxruntime-optimized.",
)
@click.option("--at-least", type=float, metavar="RATIO", help="Demanded speedup.  [default: 1 minus the measured noise]")
@click.option("--threads", type=click.IntRange(1), help="Threads of each engine.  [default: one for each physical core]")
@click.option("--seconds", type=float, default=20.0, show_default=True, help="Time for measuring, without loading and warming up.")
@click.option("--rounds", type=click.IntRange(2), help="Exact number of rounds instead.")
@click.option("--warmup", type=float, default=0.5, show_default=True, help="Seconds of warm-up for each engine.")
@json_option
@verbosity
def bench(
    model: Model, pipeline: Pipeline, against: str, challenger: str | None, form: str, at_least: float | None,
    threads: int | None, seconds: float, rounds: int | None, warmup: float, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure the optimized SOURCE against another engine, interleaved, each in a process of its own.

    Exit code 1 when the lower end of the speedup's 95 % interval is below --at-least.
    """
    with tempfile.TemporaryDirectory(prefix="normfuse-bench-") as folder:
        workshop = Workshop(model, pipeline, Path(folder), form)
        baseline = workshop.engine(against)
        contender = workshop.engine(challenger or (model.source if is_onnx(model.source) else "onnxruntime-optimized"))

        def measured(longer: int) -> Comparison:
            return compare(
                baseline,
                contender,
                seconds=longer * seconds,
                rounds=None if rounds is None else longer * rounds,
                warmup=warmup,
                threads=threads,
                progress=not quiet,
            )

        result = measured(1)
        if result.verdict(at_least) is Verdict.UNDECIDED:
            _log.info("undecided after %d rounds: measuring again for longer", result.rounds)
            result = measured(_MORE)
    bound = result.default_bound if at_least is None else at_least
    verdict = result.verdict(at_least)
    if as_json:
        click.echo(json.dumps({**result.to_dict(), "at_least": bound, "verdict": verdict.value}, indent=2))
    elif not quiet:
        click.echo(f"{result}\nat least {bound:.3f}: {verdict.value}")
    if verdict is Verdict.FAILS:
        raise CheckFailed(
            f"{contender.name} is {result.speedup} times as fast as {baseline.name}; at least {bound:.3f} was demanded"
        )
    if verdict is Verdict.UNDECIDED:
        raise CheckFailed(f"too noisy to tell: the speedup {result.speedup} reaches below {bound:.3f}; try more --seconds")


class Workshop:
    """Makes the engines of one model; files that they need are made once and live in `folder`."""

    def __init__(self, model: Model, pipeline: Pipeline, folder: Path, form: str = "auto") -> None:
        self._model = model
        self._pipeline = pipeline
        self._folder = folder
        self._form = form
        self._loaded: Source | None = None
        self._fast: fx.GraphModule | None = None

    def engine(self, name: str) -> Engine:
        """The engine called `name`, or ONNX Runtime on the file of that name.

        Raises:
            UsageError: nothing is called that, or the model is an `.onnx` file and the engine needs the PyTorch model.
        """
        if is_onnx(name):
            return onnxruntime_engine(Path(name).name, name, self._inputs(Path(name)))
        if name not in ENGINES:
            raise UsageError(f"unknown engine {name!r}: expected {', '.join(ENGINES)} or an .onnx file")
        if is_onnx(self._model.source):
            raise UsageError(f"{name} starts from the PyTorch model; {self._model.source} is exported: name another .onnx file")
        kind, _, optimized = name.partition("-")
        if kind == "onnxruntime":
            path = self._optimized_onnx() if optimized else self._original_onnx()
            return onnxruntime_engine(name, path, self._inputs(path))
        if optimized:
            return program_engine(name, self._program(), compile=kind == "compile")
        self._load()  # a wrong name is an error here and not in another process
        return source_engine(name, self._model.source, self._model.options, compile=kind == "compile")

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

    def _optimized(self) -> "fx.GraphModule":
        if self._fast is None:
            self._fast = self._pipeline.run(self._model, self._load())
        return self._fast

    def _original_onnx(self) -> Path:
        path = self._folder / "original.onnx"
        if not path.exists():
            export_original(self._load(), path, dynamic_shapes=self._model.dynamic_shapes(self._load()))
        return path

    def _optimized_onnx(self) -> Path:
        from normfuse.export import to_onnx

        path = self._folder / "optimized.onnx"
        if not path.exists():
            to_onnx(self._optimized(), path, target="onnxruntime", form=self._form)
        return path

    def _program(self) -> Path:
        from normfuse.pt2 import save_program

        path = self._folder / "optimized.pt2"
        if not path.exists():
            save_program(self._optimized(), path)
        return path
