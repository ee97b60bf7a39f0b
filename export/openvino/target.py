"""OpenVINO as a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.export.feeding import fed
from normfuse.export.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from normfuse.export.openvino.options import OpenVinoOptions
    from normfuse.export.result import Exported
    from normfuse.export.session import Session

__all__ = ["FOLDER", "OpenVinoFolder"]

# The ONNX model in between. Its frontend spells Attention-23 with a Select against rows that are masked whole, which its CPU plugin
# does not fuse; MatMul, Softmax and MatMul become one kernel there, and Power, ReduceMean, Sqrt one RMS. Codes are int8 with a zero
# point of 0: with one of 128 it multiplies convolutions in float. Between convolutions it takes pairs around additions and pools,
# as bytes from 0 on.
_OPENVINO = Target(
    "openvino",
    20,
    ("decomposed", "attention23"),
    (("qdq",), ("weight_only",)),
    "its frontend reads the standard ops of opset 20, and its CPU plugin fuses them",
    runtime="OpenVINO",
    lacks=("bf16", "fp64"),
    codes_between=True,
)


class OpenVinoFolder:
    """See `normfuse.export.target.Folder`."""

    what = "a model of OpenVINO"
    suffixes: tuple[str, ...] = (".xml",)
    targets = (_OPENVINO,)
    engine = "openvino"
    on_gpu = False

    @property
    def options(self) -> type[OpenVinoOptions]:
        from normfuse.export.openvino.options import OpenVinoOptions

        return OpenVinoOptions

    def write(self, gm: nn.Module, path: Path, options: OpenVinoOptions) -> Exported:
        from normfuse.export.openvino.api import to_openvino

        return to_openvino(gm, path, options)

    def convert(self, file: Path, path: Path, inputs: Mapping[str, Tensor], options: OpenVinoOptions) -> Exported:
        from normfuse.export.openvino.api import convert_to_openvino

        return convert_to_openvino(file, path, inputs, options)

    def original(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, dynamic_shapes: Any = None) -> None:
        from normfuse.export.openvino.original import export_original

        export_original(model, args, kwargs, path, dynamic_shapes)

    def open(self, path: Path, *, threads: int | None = None) -> Session:
        from normfuse.export.openvino.runtime import opened

        return opened(path, threads=threads)

    def facts(self, path: Path) -> Mapping[str, str]:
        from normfuse.export.openvino.graph import provenance

        return provenance(path)

    def dtypes(self, path: Path) -> tuple[str, ...]:
        from normfuse.export.openvino.graph import float_dtypes

        return float_dtypes(path)

    def timed(self, path: str, arrays: Any, threads: int, *, graph: bool = True) -> Callable[[], Any]:
        """In float32, for lowest latency, on that many threads."""
        from normfuse.export.openvino.runtime import compiled, float_inputs

        model = compiled(path, threads=threads)
        request = model.create_infer_request()
        values = list(fed(float_inputs(model), arrays, path).values())
        return partial(request.infer, values, share_inputs=True, share_outputs=True)


FOLDER = OpenVinoFolder()
