"""`normfuse export --repository`: export, and put the file where NVIDIA Triton Inference Server finds it."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfuse.cli.engine_export import EngineOptions, to_engine
from normfuse.cli.onnx_files import FileOptions, is_onnx
from normfuse.cli.options import Model, Pipeline
from normfuse.errors import UsageError

if TYPE_CHECKING:
    from torch import fx

__all__ = ["Deployment", "deploy"]


@dataclasses.dataclass(frozen=True)
class Deployment:
    """The flags of a repository; see `normfuse.export.server.write_repository`."""

    folder: Path
    name: str | None
    version: str
    backend: str | None


def deploy(
    model: Model, pipeline: Pipeline, options: EngineOptions, where: Deployment, target: str | None, files: FileOptions, *,
    int4: bool, force: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Export to a temporary folder, and from there into the repository.

    Raises:
        UsageError: a flag is wrong, the version exists, or the repository cannot be written.
    """
    from normfuse.export import to_onnx
    from normfuse.export.server import check_place, write_repository

    backend, _, accelerator = (where.backend or "onnxruntime").partition("+")
    if backend == "tensorrt":
        _check_flavour(options)
    if accelerator:
        target = target or "tensorrt"
    if backend != "tensorrt":
        engine_only = {"--shapes": options.shapes, "--flavour": options.flavour, "--capability": options.capabilities}
        for flag, value in (engine_only | {"--plugins": options.plugins}).items():
            if value:
                raise UsageError(f"{flag} is for TensorRT engines, and the server is to run an ONNX file: pass --backend tensorrt")
    name = where.name or re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(model.source.partition(":")[2] or model.source).stem)
    version: Any = where.version if where.version == "next" else _number(where.version)
    check_place(where.folder, name, version=version, force=force)  # a taken version costs a second and not a minute
    fast: fx.GraphModule | None = None
    with tempfile.TemporaryDirectory(prefix="normfuse-deploy-") as folder:
        told: Any
        if backend == "tensorrt":
            file = Path(folder, "model.engine")
            told, fast = to_engine(model, pipeline, options, file, force=False, progress=not quiet)
        elif is_onnx(model.source):
            file, told = Path(model.source), None
        else:
            file = Path(folder, "model.onnx")
            fast = pipeline.run(model, model.load(inputs_needed=True))
            told = to_onnx(
                fast, file, target=target or "onnxruntime", opset=options.opset, form=options.form, int4_initializers=int4,
                dtype=options.dtype, io_dtype=options.io_dtype, **dataclasses.asdict(files),
            )  # fmt: skip
        served = write_repository(
            where.folder, name, file, version=version, force=force, accelerator="tensorrt" if accelerator else None,
            precision="fp16" if accelerator and options.dtype == "fp16" else "fp32",
        )  # fmt: skip
    if told is not None:
        told = dataclasses.replace(told, path=served.files[0])  # where it was written is gone
    if as_json:
        click.echo(json.dumps({"schema": 1, "repository": dataclasses.asdict(served)}, indent=2, default=str))
    elif not quiet:
        click.echo("\n\n".join(str(part) for part in (_report(fast), told, served) if part is not None))


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


def _number(text: str) -> int:
    if re.fullmatch("[0-9]+", text) is None or int(text) < 1:
        raise UsageError(f"--model-version {text!r}: expected a number from 1 on, or next")
    return int(text)
