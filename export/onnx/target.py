"""ONNX files as a target: ONNX Runtime, and whatever else reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.errors import NormfuseError
from normfuse.export.feeding import fed
from normfuse.export.target import Target
from normfuse.extras import need
from normfuse.files import spelled

if TYPE_CHECKING:
    from torch import Tensor, nn

    from normfuse.export.options import ExportOptions
    from normfuse.export.result import Exported
    from normfuse.export.session import Session

__all__ = ["FOLDER", "OnnxFolder"]

_FLOATS = {"tensor(float16)": "float16", "tensor(float)": "float32", "tensor(double)": "float64"}

_ONNX_RUNTIME = Target(
    "onnxruntime",
    23,
    ("decomposed", "attention23", "mha", "qkv", "native"),
    (("native",), ("integer", "qdq")),
    "RMSNormalization-23 costs half of LayerNormalization on CPU",
    domains=("com.microsoft",),
    runs_here=True,
    unsigned_codes=True,
    codes_between=True,
)
# Whatever reads it, the CPU kernels of ONNX Runtime are what most readers have.
_PORTABLE = Target(
    "portable",
    20,
    ("decomposed", "attention23"),
    (("qdq",), ("integer",), ("weight_only",)),
    "the opset that torch itself exports to",
    codes_between=True,
)


class OnnxFolder:
    """See `normfuse.export.target.Folder`."""

    what = "an ONNX file"
    suffixes: tuple[str, ...] = (".onnx",)
    targets = (_ONNX_RUNTIME, _PORTABLE)
    engine = "onnxruntime"
    on_gpu = False

    @property
    def options(self) -> type[ExportOptions]:
        from normfuse.export.options import ExportOptions

        return ExportOptions

    def write(self, gm: nn.Module, path: Path, options: ExportOptions) -> Exported:
        from normfuse.export.onnx.api import to_onnx

        return to_onnx(gm, path, options)

    def convert(self, file: Path, path: Path, inputs: Mapping[str, Tensor], options: ExportOptions) -> Exported:
        from normfuse.export.onnx.conversion.api import convert_onnx

        return convert_onnx(file, path, inputs, options)

    def original(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, dynamic_shapes: Any = None) -> None:
        from normfuse.export.onnx.baseline import export_original

        export_original(model, args, kwargs, path, dynamic_shapes)

    def open(self, path: Path, *, threads: int | None = None) -> Session:
        from normfuse.export.onnx.runtime import opened

        return opened(path, threads=threads)

    def facts(self, path: Path) -> Mapping[str, str]:
        from normfuse.export.onnx.inspect import provenance

        return provenance(path)

    def dtypes(self, path: Path) -> tuple[str, ...]:
        from normfuse.export.onnx.inspect import float_dtypes

        return tuple(float_dtypes(path))

    def timed(self, path: str, arrays: Any, threads: int, *, graph: bool = True, kernels: bool = True) -> Callable[[], Any]:
        """ONNX Runtime's default session; with normfuse's library, where it is built, for a file that has ops of it."""
        from normfuse.export.onnx.domains import domains
        from normfuse.export.onnx.tensors import check_file
        from normfuse.native_library import library_file, switched_off

        ort = need("onnxruntime", extra="onnx")
        check_file(Path(path))
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        library = library_file()  # normfuse.native would import torch
        if kernels and library.is_file() and not switched_off() and "normfuse" in domains(path):
            settings.register_custom_ops_library(str(library))
        try:
            session = ort.InferenceSession(spelled(path), settings, providers=["CPUExecutionProvider"])
        except Exception as e:
            raise NormfuseError(f"ONNX Runtime cannot load {path}: {e}") from e
        wanted = {i.name: _FLOATS.get(i.type) for i in session.get_inputs()}
        return partial(session.run, None, fed(wanted, arrays, path))


FOLDER = OnnxFolder()
