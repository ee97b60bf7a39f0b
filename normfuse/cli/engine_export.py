"""What `normfuse export` does when a TensorRT engine is asked for."""

from __future__ import annotations

import json
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli.onnx_files import is_onnx
from normfuse.cli.options import Model, Pipeline
from normfuse.cli.profiles import fitted
from normfuse.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from torch import fx

    from normfuse.export.tensorrt import Engine

__all__ = ["EngineOptions", "dry", "to_engine"]


@dataclass(frozen=True)
class EngineOptions:
    """The flags of an engine; see `normfuse.export.to_tensorrt`."""

    dtype: str | None = None
    io_dtype: str = "fp32"
    shapes: tuple[str, ...] = ()
    flavour: str | None = None
    capabilities: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    opset: int | None = None
    form: str = "auto"


def to_engine(
    model: Model, pipeline: Pipeline, options: EngineOptions, output: Path, *, force: bool, progress: bool
) -> tuple[Engine, fx.GraphModule | None]:
    """The engine, and the optimized module; None where SOURCE is an ONNX file, which is built as it is."""
    from normfuse.export.tensorrt.api import build_onnx, check_arguments, to_tensorrt
    from normfuse.export.tensorrt.profiles import parse_shapes

    # what is wrong with the flags costs a second and not a minute
    check_arguments(output, options.dtype, options.io_dtype, options.flavour, options.capabilities, options.plugins, force=force)
    stated = parse_shapes(options.shapes)
    common: dict[str, Any] = {
        "dtype": options.dtype,
        "io_dtype": options.io_dtype,
        "shapes": stated,
        "flavour": options.flavour,
        "capabilities": options.capabilities,
        "force": force,
        "progress": progress,
    }
    if is_onnx(model.source):
        _refuse_passes(model, pipeline, options)
        return build_onnx(model.source, output, **common), None
    loaded, dynamic = fitted(model, model.load(inputs_needed=True), stated)
    fast = pipeline.run(model, loaded, dynamic_shapes=dynamic)
    del loaded
    return to_tensorrt(fast, output, opset=options.opset, form=options.form, plugins=options.plugins, **common), fast


def _refuse_passes(model: Model, pipeline: Pipeline, options: EngineOptions) -> None:
    """What needs the PyTorch model cannot be done to a file."""
    given = {
        "--passes": pipeline.passes,
        "--quantize": pipeline.quantize,
        "--plugins": options.plugins,
        "--opset": options.opset,
    }
    for flag, value in given.items():
        if value:
            raise UsageError(f"{flag} starts from the PyTorch model; {model.source} is exported already")


def dry(model: Model, pipeline: Pipeline, options: EngineOptions, *, as_json: bool) -> None:
    """Say which nodes TensorRT takes, node by node where it refuses; write nothing.

    Raises:
        CheckFailed: it refuses some.
    """
    from normfuse.export.tensorrt.api import file_as_onnx, module_as_onnx
    from normfuse.export.tensorrt.profiles import parse_shapes
    from normfuse.export.tensorrt.support import supported

    stated = parse_shapes(options.shapes)
    with tempfile.TemporaryDirectory(prefix="normfuse-dry-") as name:
        folder = Path(name)
        if is_onnx(model.source):
            _refuse_passes(model, pipeline, options)
            ready = file_as_onnx(model.source, folder, dtype=options.dtype, io_dtype=options.io_dtype)
        else:
            loaded, dynamic = fitted(model, model.load(inputs_needed=True), stated)
            ready = module_as_onnx(
                pipeline.run(model, loaded, dynamic_shapes=dynamic), folder, dtype=options.dtype, io_dtype=options.io_dtype,
                stated=stated, capabilities=options.capabilities, opset=options.opset, form=options.form, plugins=options.plugins,
            )  # fmt: skip
        found = supported(ready.file, flavour=options.flavour, plugins=bool(ready.plugins))
    if as_json:
        click.echo(json.dumps({"schema": 1, "source": model.source, **found.to_dict()}, indent=2))
    else:
        click.echo(str(found))
    if found.refused:
        first = found.refused[0]
        raise CheckFailed(textwrap.shorten(f"{found.module} refuses {len(found.refused)} nodes, the first: {first.text}", 300))
