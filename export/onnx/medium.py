"""What a model in its forms is written as: an ONNX file, or a file of another kind that is made of one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normfuse import native
from normfuse.errors import ExportError
from normfuse.export.onnx.inspect import norm_counts, op_counts
from normfuse.export.onnx.quantized.forms import FORMS
from normfuse.export.onnx.quantized.weights_alone import AS_WRITTEN
from normfuse.export.onnx.runtime import opened
from normfuse.export.onnx.writer.metadata import append_metadata
from normfuse.export.onnx.writer.outline import outline
from normfuse.export.onnx.writer.save import save_model
from normfuse.export.options import ExportOptions
from normfuse.export.session import Session
from normfuse.export.targets import MAX_OPSET
from normfuse.extras import need
from normfuse.files import spelled

__all__ = ["OnnxFile"]


class OnnxFile:
    """A file of ONNX, run by ONNX Runtime. A target whose files are made of the same model is a subclass.

    Attributes:
        libraries: what writing and proving it needs.
        extra: of normfuse, which installs them.
    """

    libraries: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
    extra: str = "onnx"

    def save(self, model: Any, path: Path, *, limit: int) -> None:
        """Write the finished `onnx_ir` model; weights above `limit` bytes may stand beside it."""
        save_model(model, path, limit=limit)

    def check(self, path: Path) -> None:
        """The file is valid, as far as that can be said without running it.

        Raises:
            ExportError: it is not.
        """
        _check(path)

    def sessions(self, path: Path, options: ExportOptions, layers: str | None, *, as_written: bool = False) -> Sequence[Session]:
        """The file in its runtime: with the kernels of `layers`, the form of its quantized layers, and without.

        Nodes that wait for plugins come in any form and type; our CPU kernels take float32. `as_written`: without the runtime's own
        rewrites, where its products are not exact.

        Raises:
            ExportError: the runtime does not take it.
        """
        config = {} if layers is None or (options.where.runs_here and not as_written) else AS_WRITTEN
        kernels = layers is not None and FORMS[layers].kernels
        sessions = [opened(path, threads=options.threads, config=config, kernels=kernels)]
        if kernels and native.available():
            sessions.append(opened(path, threads=options.threads, kernels=False))
        return sessions

    def tell(self, path: Path, facts: Mapping[str, str]) -> None:
        """Add to the written file what it says of its origin."""
        append_metadata(path, facts)

    def counts(self, path: Path) -> tuple[dict[str, int], dict[str, int]]:
        """Number of operators by type in the written file, and of normalizations."""
        graph = outline(path)
        return op_counts(graph), norm_counts(graph)


def _check(file: Path) -> None:
    """The file is valid ONNX, with shapes and types that fit. Its weights are not read for that.

    Raises:
        ExportError: it is not.
    """
    onnx = need("onnx", extra="onnx")
    beside = file.with_name(f"{file.name}.outline")  # by path: the checker then looks for external data
    try:
        beside.write_bytes(outline(file).SerializeToString())
        onnx.checker.check_model(spelled(beside), full_check=True)
    except Exception as e:
        raise _invalid(e) from e
    finally:
        beside.unlink(missing_ok=True)


def _invalid(e: Exception) -> ExportError:
    """What the checker says; most of the time that operators of an older opset do not take a dtype."""
    said = " ".join(str(e).split())[:500]
    dtype = re.search(r"unsupported type: (tensor\((\w+)\))", said)
    if dtype is None:
        return ExportError(f"the exported model is not valid ONNX: {said}")
    op = re.search(r"op_type:\s*(\w+)", said)
    newer = "with opset=23, or " if op is not None and _takes(op[1], dtype[1]) else ""
    return ExportError(f"an operator of this ONNX opset does not take {dtype[2]} ({said}); export {newer}in float32")


def _takes(op: str, dtype: str) -> bool:
    """The newest opset that is written takes it."""
    onnx = need("onnx", extra="onnx")
    schema = onnx.defs.get_schema(op, MAX_OPSET) if onnx.defs.has(op) else None
    return schema is not None and any(dtype in c.allowed_type_strs for c in schema.type_constraints)
