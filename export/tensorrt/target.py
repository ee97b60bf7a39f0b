"""TensorRT engines as a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.export.feeding import fed
from normfuse.export.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from normfuse.export.options import EngineOptions
    from normfuse.export.session import Session
    from normfuse.export.tensorrt.engine import Engine

__all__ = ["FOLDER", "TensorRTFolder"]

# A TensorRT-RTX builder refuses Attention-23 in fp32 unless it is marked decomposable, and fuses the plain form as well.
# It has no MatMulInteger and no ConvInteger.
_TENSORRT = Target(
    "tensorrt",
    23,
    ("decomposed", "attention23"),
    (("qdq",), ("weight_only",)),
    "the parser takes RMSNormalization-23 as one kernel",
    runtime="TensorRT",
    lacks=("fp64",),
    own_in_float32=False,
    one_scale_tensors=True,
)
_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}


class TensorRTFolder:
    """See `normfuse.export.target.Folder`."""

    what = "a TensorRT engine"
    suffixes: tuple[str, ...] = (".engine", ".plan", ".trt")
    targets = (_TENSORRT,)
    engine = "tensorrt"
    on_gpu = True

    @property
    def options(self) -> type[EngineOptions]:
        from normfuse.export.options import EngineOptions

        return EngineOptions

    def write(self, gm: nn.Module, path: Path, options: EngineOptions) -> Engine:
        from normfuse.export.tensorrt.api import to_tensorrt

        return to_tensorrt(gm, path, options)

    def convert(self, file: Path, path: Path, inputs: Mapping[str, Tensor], options: EngineOptions) -> Engine:
        """Nothing runs it here: the inputs are passed over."""
        from normfuse.export.tensorrt.api import build_onnx

        return build_onnx(file, path, options)

    def original(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, dynamic_shapes: Any = None) -> None:
        from normfuse.export.onnx.baseline import export_original
        from normfuse.export.tensorrt.api import build_onnx

        file = export_original(model, args, kwargs, path.with_suffix(".onnx"), dynamic_shapes, opset=_TENSORRT.opset)
        build_onnx(file, path)

    def open(self, path: Path, *, threads: int | None = None) -> Session:
        from normfuse.export.tensorrt.flavour import find, load
        from normfuse.export.tensorrt.inspect import header
        from normfuse.export.tensorrt.runtime import EngineSession, open_engine

        return EngineSession(open_engine(path, load(find(header(path).module))))

    def facts(self, path: Path) -> Mapping[str, str]:
        return {}

    def dtypes(self, path: Path) -> tuple[str, ...]:
        """By its manifest."""
        from normfuse.export.tensorrt.engine import read_manifest

        made = read_manifest(path)
        return (_DTYPES.get(made.dtype, "float32"),) if made is not None else ("float32",)

    def timed(self, path: str, arrays: Any, threads: int, *, graph: bool = True) -> Callable[[], Any]:
        """Timed by the device, as a CUDA graph unless told otherwise."""
        from normfuse.export.tensorrt.engine import read_manifest
        from normfuse.export.tensorrt.flavour import find, load
        from normfuse.export.tensorrt.runtime import open_engine
        from normfuse.gpu.device import DeviceCall, as_graph

        manifest = read_manifest(Path(path))
        session = open_engine(path, load(find(None if manifest is None else manifest.module)))
        session.bind(fed(dict.fromkeys(session.inputs), arrays, path))
        return DeviceCall(as_graph(Path(path).name, session.launch) if graph else session.launch)


FOLDER = TensorRTFolder()
