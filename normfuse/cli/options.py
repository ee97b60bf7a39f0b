"""Flags that several verbs share, and what they stand for."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from normfuse.cli.quantization import calibration_batches, parse_quantize
from normfuse.errors import UsageError
from normfuse.sources import Options, Source, load_source

if TYPE_CHECKING:
    from torch import fx

    from normfuse.quant.spec import ShiftQuant

__all__ = ["Model", "Pipeline", "force_option", "json_option", "model_options", "output_option", "pipeline_options", "verbosity"]

F = TypeVar("F", bound=Callable[..., Any])
_SHAPE = "Input of this shape, e.g. 1x3x224x224 or input_ids=1x128:int64; repeat for several."
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """The model that a command line names."""

    source: str
    options: Options
    dynamic: tuple[str, ...] = ()

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

    def dynamic_shapes(self, loaded: Source) -> Any:
        """What may vary, as `torch.export` takes it; None for fixed shapes."""
        if not self.dynamic:
            return None
        import inspect

        import torch

        from normfuse.example_inputs import dynamic_shapes

        if isinstance(loaded.model, torch.export.ExportedProgram):
            raise UsageError("--dynamic: a .pt2 file has its dynamic shapes inside; they were chosen when it was saved")
        if not loaded.has_inputs:
            raise UsageError("--dynamic needs example inputs: pass --shape or --input")
        parameters = list(inspect.signature(loaded.model.forward).parameters)
        return dynamic_shapes(self.dynamic, loaded.args, loaded.kwargs, parameters)


@dataclass(frozen=True)
class Pipeline:
    """What is done to the model."""

    passes: tuple[str, ...] | None
    verify: str
    quantize: "ShiftQuant | None" = None
    calibration: str | None = None

    def run(self, model: Model, loaded: Source, *, dynamic_shapes: Any = None) -> "fx.GraphModule":
        """Optimize it; what may vary in its inputs is `dynamic_shapes`, or what --dynamic says."""
        from normfuse.api import optimize

        shapes = model.dynamic_shapes(loaded) if dynamic_shapes is None else dynamic_shapes
        batches = None if self.calibration is None else calibration_batches(self.calibration, loaded)
        _log.info("optimizing %s", model.source)
        return optimize(
            loaded.model,
            loaded.example_inputs,
            dynamic_shapes=shapes,
            passes=self.passes,
            quantize=self.quantize,
            calibration=batches,
            verify=self.verify,
        )


def model_options(f: F) -> F:
    """SOURCE and how it is loaded, handed to the command as `model`."""

    @click.argument("source")
    @click.option("--shape", "shapes", multiple=True, metavar="[NAME=]SIZES[:DTYPE]", help=_SHAPE)
    @click.option("--input", "input_", type=click.Path(path_type=Path), help="Inputs from a .npz, .npy, .pt or .safetensors file.")
    @click.option("--batch", type=int, help="Batch size of the inputs that the model declares itself.  [default: 1]")
    @click.option("--seq", type=int, help="Sequence length of the inputs that the model declares itself.")
    @click.option("--dynamic", metavar="AXES", help="Axes that may vary: batch, seq, height, width, separated by commas.")
    @click.option("--pretrained", is_flag=True, help="Fetch the published weights (timm, torchvision) instead of random ones.")
    @click.option("--trust", is_flag=True, help="Allow files to run code: pickles, custom code of Hugging Face folders.")
    @click.option("--seed", type=int, default=0, show_default=True, help="Of random weights and random inputs.")
    @functools.wraps(f)
    def wrapped(
        source: str,
        shapes: tuple[str, ...],
        input_: Path | None,
        batch: int | None,
        seq: int | None,
        dynamic: str | None,
        pretrained: bool,
        trust: bool,
        seed: int,
        **rest: Any,
    ) -> Any:
        axes = _names(dynamic)
        if batch is None and "batch" in axes and not shapes and input_ is None:
            batch = 2  # an example of size 1 would be taken for a fixed size
        options = Options(pretrained=pretrained, trust=trust, shapes=shapes, input=input_, batch=batch, tokens=seq, seed=seed)
        return f(model=Model(source, options, axes), **rest)

    return wrapped  # type: ignore[return-value]


def pipeline_options(f: F) -> F:
    """Which passes run and how they are proven, handed to the command as `pipeline`."""

    @click.option("--passes", metavar="NAMES", help="Run these passes only, separated by commas; see `normfuse passes`.")
    @click.option(
        "--verify", type=click.Choice(("each", "end", "off")), default="end", show_default=True, help="When to prove the result."
    )
    @click.option("--quantize", metavar="WIDTHS[,...]", help="Integer layers: w4a8, w8a8,static, w4a8,groups=1,prefer=size, ...")
    @click.option("--keep", multiple=True, metavar="PATTERN", help="Layers that --quantize leaves in float; repeat for several.")
    @click.option(
        "--calibration",
        metavar="DATA",
        help="Samples in a .npz, .npy or .safetensors file, or batches from package.module:factory.",
    )
    @functools.wraps(f)
    def wrapped(
        passes: str | None, verify: str, quantize: str | None, keep: tuple[str, ...], calibration: str | None, **rest: Any
    ) -> Any:
        if keep and quantize is None:
            raise UsageError("--keep says what --quantize leaves in float: pass --quantize as well, e.g. --quantize w4a8")
        spec = None if quantize is None else parse_quantize(quantize, keep)
        return f(pipeline=Pipeline(_names(passes) if passes is not None else None, verify, spec, calibration), **rest)

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


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
force_option = click.option("--force", is_flag=True, help="Replace files that exist.")


def output_option(what: str) -> Callable[[F], F]:
    return click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=f"Where to write {what}.")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(n.strip() for n in text.split(",") if n.strip()) if text else ()
