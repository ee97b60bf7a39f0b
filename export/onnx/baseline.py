"""The file that a user gets without normfuse: what a benchmark compares with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normfuse.errors import ExportError
from normfuse.export.onnx.quiet import quiet
from normfuse.export.onnx.writer.once import made_once
from normfuse.extras import need
from normfuse.files import atomic

__all__ = ["export_original"]


def export_original(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    path: str | Path = "original.onnx",
    dynamic_shapes: Any = None,
    *,
    opset: int | None = None,
    force: bool = False,
) -> Path:
    """`torch.onnx.export(model, args)` with its own defaults, or in another opset, weights beside the file as it writes them.

    A Hugging Face model is exported without its key/value cache, which the exporter cannot return; `model` itself stays
    as it is: a copy that shares its parameters is exported, in eval mode.

    Raises:
        ExportError: torch cannot export the model.
        UsageError: the target exists or cannot be written.
    """
    need("onnxscript", extra="onnx")
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, memo=dict(shared)).eval()
    for module in plain.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
    with atomic(path, force=force) as temporary:
        try:
            with quiet(), torch.no_grad(), made_once():
                torch.onnx.export(
                    plain, args, str(temporary), kwargs=kwargs or {}, dynamo=True, dynamic_shapes=dynamic_shapes,
                    opset_version=opset, verbose=False,
                )  # fmt: skip
        except OSError:
            raise
        except Exception as e:
            raise ExportError(f"torch cannot export the original model: {' '.join(str(e).split())[:500]}") from e
    return Path(path)
