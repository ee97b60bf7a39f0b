"""A module, or an ONNX file (`convert_to_openvino`), as a file of OpenVINO that was run and compared before it appears."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.errors import UsageError
from normfuse.export.keywords import given, keywords_of
from normfuse.export.onnx.api import write_onnx
from normfuse.export.openvino.medium import OpenVinoFile
from normfuse.export.openvino.options import OpenVinoKeywords, OpenVinoOptions
from normfuse.export.openvino.result import OpenVinoExported
from normfuse.export.result import Exported
from normfuse.files import as_path, check_target

if TYPE_CHECKING:
    from torch import Tensor, nn
    from typing_extensions import Unpack

__all__ = ["convert_to_openvino", "to_openvino"]


@keywords_of(OpenVinoOptions)
def to_openvino(
    gm: nn.Module,
    path: str | Path,
    options: OpenVinoOptions | None = None,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    **keywords: Unpack[OpenVinoKeywords],
) -> OpenVinoExported:
    """Write `gm` to `path` for OpenVINO, with its weights in a `.bin` file beside it.

    Both files appear only after they were run by OpenVINO on the CPU, in float32, and compared with `gm`.

    Args:
        gm: what `normfuse.optimize` returned; any other module in eval mode works with `example_inputs`.
        path: the file to write; its name ends in `.xml`.
        options: all that follows as one value; what is given by name goes before it.
        example_inputs: a tuple of positional inputs or a dict of keyword inputs; by default those of `normfuse.optimize`.
        dynamic_shapes: as in `torch.export.export`; by default those of `normfuse.optimize`.
        dtype: of weights and products: `fp32`, `fp16` or `bf16`, also spelt out; statistics of norms stay in float32. OpenVINO
            computes in the precision that it is told when it compiles a model (`INFERENCE_PRECISION_HINT`), so that on a CPU a
            narrow file is smaller and not faster. By default the dtype of the model, float32 for one in bfloat16 or float64. A
            file in bf16 is compared before it is converted.
        io_dtype: `fp32` keeps inputs and outputs in float32; `low` makes them as narrow as the rest.
        form: of quantized layers: `qdq` (static scales: OpenVINO multiplies integers), `weight_only` (weights in integers,
            activations in float), or `auto`: `qdq` where scales are static.
        attention: `decomposed`, which OpenVINO fuses, `attention23`, or `auto`.
        opset: of the ONNX model in between, from which OpenVINO makes its own.
        verify: run the file and compare it with `gm` on the example inputs, on random ones and, where axes may vary, at another
            size.
        tolerance: bound on max |difference| / max |expected|; see `normfuse.export.to_onnx`. A quantized model is held to an SQNR.
        threads: threads of OpenVINO for that; by default the CPUs of the process.
        force: replace existing files.
        progress: show a bar where something takes long, on a terminal.

    Raises:
        UsageError: an argument is wrong, a file exists, or it cannot be written.
        ExportError: the model cannot be captured, translated or run, or the error is above the tolerance.
        MissingExtra: openvino, onnx or onnxscript is not installed.
    """
    chosen = given(OpenVinoOptions, options, keywords, called="to_openvino")
    path = as_path(path)
    _check_place(path, chosen)
    medium = OpenVinoFile()
    made, _ = write_onnx(gm, path, chosen.as_file(), example_inputs=example_inputs, dynamic_shapes=dynamic_shapes, medium=medium)
    return _told(made, medium)


def convert_to_openvino(
    file: str | Path, path: str | Path, inputs: Mapping[str, Tensor], options: OpenVinoOptions | None = None
) -> OpenVinoExported:
    """Write the ONNX file `file` for OpenVINO; see `normfuse.export.onnx.conversion.api.convert_onnx`, whose arguments these are.

    Both files appear only after OpenVINO gave the answers that ONNX Runtime gives to `file`.

    Raises: what `convert_onnx` raises.
    """
    from normfuse.export.onnx.conversion.api import convert_onnx

    chosen = options or OpenVinoOptions()
    path = as_path(path)
    _check_place(path, chosen)
    medium = OpenVinoFile()
    return _told(convert_onnx(file, path, inputs, chosen.as_file(), medium), medium)


def _check_place(path: Path, options: OpenVinoOptions) -> None:
    if path.suffix != ".xml":
        raise UsageError(f"{path}: OpenVINO reads its own models from files whose names end in .xml")
    check_target(path.with_suffix(".bin"), force=options.force)


def _told(made: Exported, medium: OpenVinoFile) -> OpenVinoExported:
    fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    return OpenVinoExported(**fields | {"runtime": ""}, ran=medium.ran)
