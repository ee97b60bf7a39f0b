"""The model as OpenVINO converts it itself: what a benchmark compares with."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch

from normfuse.errors import ExportError
from normfuse.export.openvino.runtime import read, said
from normfuse.extras import need
from normfuse.files import atomic, spelled

__all__ = ["convert_original", "export_original"]


def export_original(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, dynamic_shapes: Any = None) -> None:
    """`openvino.convert_model` of the exported program, whose sizes are as fixed as ours; of a trace where it cannot be exported.

    `model` stays as it is: a copy that shares its parameters is converted, in eval mode and without a cache.

    Raises:
        ExportError: OpenVINO cannot convert the model.
        UsageError: the file exists or cannot be written.
        MissingExtra: openvino is not installed.
    """
    ov = need("openvino", extra="openvino")
    with atomic(path) as temporary, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            made = _converted(ov, model, args, kwargs, dynamic_shapes)
            ov.save_model(made, spelled(temporary), compress_to_fp16=False)
        except OSError:
            raise
        except Exception as e:
            raise ExportError(f"OpenVINO cannot convert the original model: {said(e)}") from e


def convert_original(file: Path, path: Path) -> None:
    """An ONNX file as OpenVINO converts it itself.

    Raises:
        ExportError: OpenVINO does not take it.
        UsageError: there is no such file, or `path` exists or cannot be written.
        MissingExtra: openvino is not installed.
    """
    ov = need("openvino", extra="openvino")
    with atomic(path) as temporary:
        ov.save_model(read(file), spelled(temporary), compress_to_fp16=False)


def _converted(ov: Any, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> Any:
    if isinstance(model, torch.export.ExportedProgram):
        return ov.convert_model(model)
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, memo=dict(shared)).eval()
    for module in plain.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
    try:
        return ov.convert_model(torch.export.export(plain, args, kwargs, dynamic_shapes=dynamic_shapes))
    except Exception:  # torch.export raises errors of many kinds; OpenVINO's other door may be open
        return ov.convert_model(plain, example_input=kwargs or args)
