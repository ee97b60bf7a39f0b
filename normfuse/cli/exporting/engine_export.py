"""What `normfuse export` does when a TensorRT engine is asked for."""

from __future__ import annotations

import json
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

from normfuse.cli.exporting.profiles import fitted
from normfuse.cli.files.given import is_onnx
from normfuse.cli.options import Model, Pipeline
from normfuse.errors import CheckFailed, UsageError
from normfuse.export.options import EngineOptions

if TYPE_CHECKING:
    from torch import fx

    from normfuse.export.tensorrt import Engine

__all__ = ["dry", "to_engine"]


def to_engine(model: Model, pipeline: Pipeline, options: EngineOptions, output: Path) -> tuple[Engine, fx.GraphModule | None]:
    """The engine, and the optimized module; None where SOURCE is an ONNX file, which is built as it is."""
    from normfuse.export.tensorrt.api import build_onnx, check_place, to_tensorrt

    check_place(output, options)  # what is wrong with the flags costs a second and not a minute
    if is_onnx(model.source):
        _refuse_passes(model, pipeline, options)
        return build_onnx(model.source, output, options), None
    loaded, dynamic = fitted(model, model.load(inputs_needed=True), options.profiles)
    fast = pipeline.run(model, loaded, dynamic_shapes=dynamic)
    del loaded
    return to_tensorrt(fast, output, options), fast


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
    from normfuse.export.tensorrt.support import supported

    with tempfile.TemporaryDirectory(prefix="normfuse-dry-") as name:
        folder = Path(name)
        if is_onnx(model.source):
            _refuse_passes(model, pipeline, options)
            ready = file_as_onnx(model.source, folder, options)
        else:
            loaded, dynamic = fitted(model, model.load(inputs_needed=True), options.profiles)
            ready = module_as_onnx(pipeline.run(model, loaded, dynamic_shapes=dynamic), folder, options)
        found = supported(ready.file, flavour=options.flavour, plugins=bool(ready.plugins))
    if as_json:
        click.echo(json.dumps({"schema": 1, "source": model.source, **found.to_dict()}, indent=2))
    else:
        click.echo(str(found))
    if found.refused:
        first = found.refused[0]
        raise CheckFailed(textwrap.shorten(f"{found.module} refuses {len(found.refused)} nodes, the first: {first.text}", 300))
