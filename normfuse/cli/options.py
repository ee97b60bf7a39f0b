"""Flags that several verbs share, and what they stand for."""

import dataclasses
import functools
import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from normfuse.app.data.samples import Reading
from normfuse.app.dynamic_axes import Axis, free_axes, parse_axes
from normfuse.app.source_options import Options
from normfuse.app.sources import Source, load_source
from normfuse.cli.help import completed_source
from normfuse.cli.messages import unless_it_fails
from normfuse.cli.quantization import calibration_batches
from normfuse.cli.wording import report_in_options
from normfuse.errors import CaptureError, ExportError, UsageError

if TYPE_CHECKING:
    from torch import fx

    from normfuse.app.dynamic_axes import Free
    from normfuse.quant.spec import ShiftQuant

__all__ = [
    "Model",
    "Pipeline",
    "force_option",
    "json_option",
    "model_options",
    "names",
    "output_option",
    "partial_option",
    "pipeline_options",
    "preprocess_option",
    "spelled",
    "verbosity",
]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
_SHAPE = "Input of this shape, e.g. 1x3x224x224 or input_ids=1x128:int64; repeat for several."
_DYNAMIC = "Axes that may vary: batch, seq, height, width, or INPUT:AXIS[=NAME][..MAX], e.g. tokens:1=seq..512; repeat for several."
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """The model that a command line names."""

    source: str
    options: Options
    dynamic: tuple[Axis, ...] = ()

    def load(self, *, inputs_needed: bool = False) -> Source:
        """Load it.

        Raises:
            UsageError: nothing is called that, or `inputs_needed` and none are known.
        """
        import torch  # noqa: F401 (sets up its own logging when it is imported)

        if not _log.isEnabledFor(logging.INFO):
            logging.getLogger("torch").setLevel(logging.CRITICAL)  # it logs tracebacks of errors that it also raises
        _log.info("loading %s", self.source)
        loaded = load_source(self.source, self.options)
        if inputs_needed and not loaded.has_inputs:
            raise UsageError(f"{self.source} declares no inputs: pass --shape (e.g. --shape 1x3x224x224) or --input")
        return loaded

    def vary(self, loaded: Source, work: Callable[[Any], T]) -> T:
        """`work(dynamic_shapes)` with what --dynamic says, as `torch.export` takes it; None for fixed shapes.

        Where `work` fails, it is done once more with the ranges that torch finds in the model.

        Raises:
            UsageError: an axis does not exist, cannot vary, or not as far as it should.
        """
        free = self._free(loaded)
        if free is None:
            return work(None)
        try:
            return work(free.stated())
        except (CaptureError, ExportError) as e:
            from normfuse.app.found_axes import found_shapes

            _log.info("finding the ranges of %s, for %s", ", ".join(a.name for a in self.dynamic), e)
            try:
                shapes = found_shapes(loaded.module, loaded.example_inputs, free)
            except CaptureError:
                raise e from e.__cause__  # it is not for the sizes
        return work(shapes)

    def stated(self, loaded: Source) -> Any:
        """What --dynamic says, whether or not the model agrees."""
        free = self._free(loaded)
        return None if free is None else free.stated()

    def _free(self, loaded: Source) -> "Free | None":
        if not self.dynamic:
            return None
        import torch

        if isinstance(loaded.model, torch.export.ExportedProgram):
            raise UsageError("--dynamic: a .pt2 file has its dynamic shapes inside; they were chosen when it was saved")
        if not loaded.has_inputs:
            raise UsageError("--dynamic needs example inputs: pass --shape or --input")
        return free_axes(self.dynamic, loaded.model.forward, loaded.args, loaded.kwargs, self._larger)

    def _larger(self, axis: Axis, number: int) -> str:
        """What to do about an example of size 1."""
        if self.options.shapes or self.options.input is not None:
            return f"state 2 or more there with {'--shape' if self.options.shapes else '--input'}"
        if number == 0:
            return "pass --batch 2"
        return "pass --seq 2 or more" if axis.name == "seq" else "state a larger input with --shape"


@dataclass(frozen=True)
class Pipeline:
    """What is done to the model."""

    passes: tuple[str, ...] | None
    verify: Literal["end", "each", "off"]
    quantize: "ShiftQuant | None" = None
    calibration: str | None = None
    partial: bool = False
    random_calibration: bool = False
    words: str | None = None  # what --quantize says
    reading: Reading | None = None

    def run(self, model: Model, loaded: Source, *, dynamic_shapes: Any = None) -> "fx.GraphModule":
        """Optimize it; what may vary in its inputs is `dynamic_shapes`, or what --dynamic says."""
        from normfuse.api import optimize
        from normfuse.capture.explained import decides_by_values

        passes: Any = self.passes  # names that the user wrote
        how = dataclasses.replace(self.reading or Reading(), trust=model.options.trust)
        batches = None if self.calibration is None else calibration_batches(self.calibration, loaded, how)
        _log.info("optimizing %s", model.source)
        if self.quantize is not None and batches is None:
            self._check_data(loaded)

        def optimized(shapes: Any, *, partial: bool = False) -> "fx.GraphModule":
            with unless_it_fails():
                made = optimize(
                    loaded.model,
                    loaded.example_inputs,
                    dynamic_shapes=shapes,
                    passes=passes,
                    quantize=self.quantize,
                    calibration=batches,
                    verify=self.verify,
                    partial=partial,
                    allow_random_calibration=True,  # checked above, in the words of the command line
                )
                return _told(made, model, loaded, self.calibration)

        try:
            if dynamic_shapes is not None or not model.dynamic:
                return optimized(dynamic_shapes, partial=self.partial)
            return model.vary(loaded, optimized)
        except CaptureError as e:
            if not self.partial and (decides_by_values(e.__cause__) or ".detection" in type(loaded.model).__module__):
                raise CaptureError(f"{e}\nPass --partial to optimize the parts that can be captured") from e
            if not self.partial or not model.dynamic:
                raise
        return optimized(model.stated(loaded), partial=True)

    def _check_data(self, loaded: Source) -> None:
        """Static scales stay in the file for good: example inputs of which nothing is known are no data to take them from."""
        if self.quantize is None or self.random_calibration or not self.quantize.needs_data:
            return
        if loaded.data in ("random data", "the example inputs"):
            raise UsageError(
                f"--quantize with static scales takes them from data, and all there is are {loaded.data}: pass --calibration DATA, "
                "or --input FILE with real inputs; --allow-random-calibration is for trying it out"
            )


def _told(made: "fx.GraphModule", model: Model, loaded: Source, calibration: str | None) -> "fx.GraphModule":
    """The report says what the command line knows: the name of the model, its weights, the command, the data."""
    from normfuse.reports.record import record

    found = record(made)
    if found is None or found.report.origin is None:
        return made
    data = found.report.calibration
    report = dataclasses.replace(
        found.report,
        origin=dataclasses.replace(found.report.origin, model=model.source, weights=loaded.weights, command=_command()),
        calibration=None if data is None else dataclasses.replace(data, source=calibration or loaded.data),
    )
    return dataclasses.replace(found, report=report_in_options(report)).attach(made)


def _command() -> str:
    """The command line as it can be typed again; empty where there is none, as in tests."""
    context = click.get_current_context(silent=True)
    while context is not None and context.parent is not None:
        context = context.parent
    if context is None:
        return ""
    return shlex.join(["normfuse", *context.meta.get("normfuse.args", ())])


def model_options(f: F) -> F:
    """SOURCE and how it is loaded, handed to the command as `model`."""

    @click.argument("source", shell_complete=completed_source)
    @click.option("--shape", "shapes", multiple=True, metavar="[NAME=]SIZES[:DTYPE]", help=_SHAPE)
    @click.option("--input", type=click.Path(path_type=Path), help="Inputs from a .npz, .npy, .pt or .safetensors file.")
    @click.option("--batch", type=int, help="Batch size of the inputs that the model declares itself.  [default: 1]")
    @click.option("--seq", "tokens", type=int, help="Sequence length of the inputs that the model declares itself.")
    @click.option("--dynamic", multiple=True, metavar="AXIS[,AXIS]", help=_DYNAMIC)
    @click.option("--pretrained", is_flag=True, help="Fetch the published weights (timm, torchvision) instead of random ones.")
    @click.option(
        "--weights", type=click.Path(path_type=Path), help="Load this state dict (.safetensors, .pt, .ckpt) into the model."
    )
    @click.option("--trust", is_flag=True, help="Allow files to run code: pickles, custom code of Hugging Face folders.")
    @click.option("--seed", type=int, default=0, show_default=True, help="Of random weights and random inputs.")
    @functools.wraps(f)
    def wrapped(source: str, dynamic: tuple[str, ...], **given: Any) -> Any:
        loaded = {field.name: given.pop(field.name) for field in dataclasses.fields(Options)}
        if not -(1 << 63) <= loaded["seed"] < 1 << 64:
            raise UsageError("--seed: torch's generators take 64 bits, and that number has more")
        axes = parse_axes(dynamic)
        if axes and Path(source).suffix == ".onnx":
            raise UsageError("--dynamic: an .onnx file has its dynamic axes inside; they were chosen when it was exported")
        stated = loaded["shapes"] or loaded["input"] is not None or loaded["batch"] is not None
        if not stated and any(a.name == "batch" or a.axis == 0 for a in axes):
            loaded["batch"] = 2  # an example of size 1 would be taken for a fixed size
        return f(model=Model(source, Options(**loaded), axes), **given)

    return wrapped  # type: ignore[return-value]


def _spec(text: str | None, keep: tuple[str, ...]) -> "ShiftQuant | None":
    if text is None:
        return None
    from normfuse.quant.words import parse_quantize

    return parse_quantize(text, keep)


partial_option = click.option(
    "--partial", is_flag=True, help="Where SOURCE cannot be captured whole, optimize the parts of it that can and leave the rest."
)


preprocess_option = click.option(
    "--preprocess",
    metavar="HOW",
    help="How images are prepared: imagenet, unit, symmetric, bytes, timm:NAME, torchvision:NAME, hf:DIR, or mean=0.5,std=0.5,"
    "crop=0.9,...  [default: as the model's configuration says]",
)


def pipeline_options(f: F) -> F:
    """Which passes run and how they are proven, handed to the command as `pipeline`."""

    @click.option("--passes", metavar="NAMES", help="Run these passes only, separated by commas; see `normfuse passes`.")
    @click.option(
        "--verify", type=click.Choice(("each", "end", "off")), default="end", show_default=True, help="When to prove the result."
    )
    @partial_option
    @click.option("--quantize", metavar="WIDTHS[,...]", help="Integer layers: w4a8, w8a8,static, w4a8,groups=1,prefer=size, ...")
    @click.option("--keep", multiple=True, metavar="PATTERN", help="Layers that --quantize leaves in float; repeat for several.")
    @click.option(
        "--calibration",
        metavar="DATA",
        help="Samples for --quantize: a folder of images, a data set on disk, a .txt or .jsonl file, a .npz, .npy or .safetensors "
        "file, or batches from package.module:factory or FILE.py:factory.",
    )
    @click.option(
        "--calibration-samples", "samples", type=click.IntRange(1), help="At most so many of a folder or text file.  [default: 256]"
    )
    @preprocess_option
    @click.option(
        "--allow-random-calibration",
        "random_calibration",
        is_flag=True,
        help="Take static scales from the example inputs, random or not, to try it out.",
    )
    @functools.wraps(f)
    def wrapped(
        passes: str | None,
        verify: Literal["end", "each", "off"],
        partial: bool,
        quantize: str | None,
        keep: tuple[str, ...],
        calibration: str | None,
        samples: int | None,
        preprocess: str | None,
        random_calibration: bool,
        **rest: Any,
    ) -> Any:
        if keep and quantize is None:
            raise UsageError("--keep says what --quantize leaves in float: pass --quantize as well, e.g. --quantize w4a8")
        about_data = {
            "--calibration": calibration is not None,
            "--allow-random-calibration": random_calibration,
            "--calibration-samples": samples is not None,
            "--preprocess": preprocess is not None,
        }
        for flag, given in about_data.items():
            if given and quantize is None:
                raise UsageError(f"{flag} is about the data of --quantize: pass --quantize as well, e.g. --quantize w8a8,static")
            if given and calibration is None and flag in ("--calibration-samples", "--preprocess"):
                raise UsageError(f"{flag} is about --calibration: pass --calibration FOLDER as well")
        spec = _spec(quantize, keep)
        chosen = names(passes) if passes is not None else None
        reading = Reading(preprocess, samples or Reading.most)
        return f(pipeline=Pipeline(chosen, verify, spec, calibration, partial, random_calibration, quantize, reading), **rest)

    return wrapped  # type: ignore[return-value]


def verbosity(f: F) -> F:
    """-v and -q, which set the level of the log on standard error."""

    @click.option("-v", "--verbose", count=True, help="Say what is being done; -vv with tracebacks.")
    @click.option("-q", "--quiet", is_flag=True, help="Errors only.")
    @functools.wraps(f)
    def wrapped(verbose: int, quiet: bool, **rest: Any) -> Any:
        level = logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("normfuse").setLevel(level)
        return f(quiet=quiet, **rest)

    return wrapped  # type: ignore[return-value]


def spelled(known: tuple[str, ...] = ("fp32", "fp16", "bf16", "fp64")) -> Callable[..., str | None]:
    """A callback that gives the one of `known` that a dtype is, however it is spelt."""

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value is None:
            return None
        from normfuse.export.onnx.precision.spelling import spelled_dtype

        return spelled_dtype(value, known=known)

    return callback


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
force_option = click.option("--force", is_flag=True, help="Replace files that exist.")


def output_option(what: str) -> Callable[[F], F]:
    """The option `--output`, for a command that writes `what`."""
    return click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=f"Where to write {what}.")


def names(text: str | None) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(n.strip() for n in text.split(",") if n.strip()) if text else ()
