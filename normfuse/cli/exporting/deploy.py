"""`normfuse export --repository`: export, and put the file where NVIDIA Triton Inference Server finds it."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import click

from normfuse.cli.bundled import Telling
from normfuse.cli.exporting.asked import Asked, Place
from normfuse.cli.files.given import is_onnx
from normfuse.cli.options import Model, Pipeline
from normfuse.errors import UsageError
from normfuse.export.options import EngineOptions

if TYPE_CHECKING:
    from torch import fx

__all__ = ["deploy"]

_Exported: TypeAlias = "tuple[Path, Any, fx.GraphModule | None]"
"""The file, what is to be told of it, and the module that it is of."""


def deploy(model: Model, pipeline: Pipeline, asked: Asked, place: Place, telling: Telling) -> None:
    """Export to a temporary folder, and from there into the repository.

    Raises:
        UsageError: a flag is wrong, the version exists, or the repository cannot be written.
    """
    from normfuse.export.server import check_place, write_repository

    assert place.repository is not None
    backend, _, accelerator = (place.backend or "onnxruntime").partition("+")
    name = place.name or re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(model.source.partition(":")[2] or model.source).stem)
    version = _number(place.model_version or "1")
    export = _exporter(model, pipeline, asked, telling, backend, accelerator)
    check_place(place.repository, name, version=version, force=telling.force)  # a taken version costs a second and not a minute
    with tempfile.TemporaryDirectory(prefix="normfuse-deploy-") as folder:
        file, told, fast = export(Path(folder))
        served = write_repository(
            place.repository, name, file, version=version, force=telling.force, accelerator="tensorrt" if accelerator else None,
            precision="fp16" if accelerator and asked.dtype == "fp16" else "fp32",
        )  # fmt: skip
    if told is not None:
        told = dataclasses.replace(told, path=served.files[0])  # where it was written is gone
    if telling.as_json:
        click.echo(json.dumps({"schema": 1, "repository": dataclasses.asdict(served)}, indent=2, default=str))
    elif not telling.quiet:
        click.echo("\n\n".join(str(part) for part in (_report(fast), told, served) if part is not None))


def _exporter(
    model: Model, pipeline: Pipeline, asked: Asked, telling: Telling, backend: str, accelerator: str
) -> Callable[[Path], _Exported]:
    """Writes what the server is to run into a folder; flags that are wrong are errors now."""
    if backend == "tensorrt":
        from normfuse.cli.exporting.engine_export import to_engine

        options = asked.engine(telling)
        _check_flavour(options)

        def engine(folder: Path) -> _Exported:
            file = folder / "model.engine"
            return file, *to_engine(model, pipeline, options, file)

        return engine
    stray = asked.engine_only()
    if stray is not None:
        raise UsageError(f"{stray} is for TensorRT engines, and the server is to run an ONNX file: pass --backend tensorrt")
    if is_onnx(model.source):
        return lambda folder: (Path(model.source), None, None)
    wanted = asked.file(telling, target="tensorrt" if accelerator else None)

    def onnx(folder: Path) -> _Exported:
        from normfuse.export import to_onnx

        fast = pipeline.run(model, model.load(inputs_needed=True))
        return folder / "model.onnx", to_onnx(fast, folder / "model.onnx", wanted), fast

    return onnx


def _check_flavour(options: EngineOptions) -> None:
    """Before anything is built: the server runs engines of TensorRT, not of TensorRT for RTX."""
    from normfuse.export.tensorrt.flavour import find

    if find(options.flavour) == "tensorrt_rtx":
        raise UsageError(
            "the server loads engines of TensorRT, and TensorRT for RTX would build here: pass --flavour tensorrt on a machine "
            "with the server's GPU, or --backend onnxruntime+tensorrt, which lets the server build the engine itself"
        )


def _report(fast: fx.GraphModule | None) -> Any:
    from normfuse.reports.record import report

    return None if fast is None else report(fast)


def _number(text: str) -> int | Literal["next"]:
    if text == "next":
        return "next"
    if re.fullmatch("[0-9]+", text) is None or int(text) < 1:
        raise UsageError(f"--model-version {text!r}: expected a number from 1 on, or next")
    return int(text)
