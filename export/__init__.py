"""Everything that knows a target: files for ONNX Runtime, TensorRT, OpenVINO and other runtimes."""

from typing import TYPE_CHECKING, Any

__all__ = ["Engine", "EngineOptions", "ExportOptions", "Exported", "convert_onnx", "to_onnx", "to_openvino", "to_tensorrt"]

if TYPE_CHECKING:
    from normfuse.export.onnx.api import to_onnx
    from normfuse.export.onnx.conversion.api import convert_onnx
    from normfuse.export.openvino.api import to_openvino
    from normfuse.export.options import EngineOptions, ExportOptions
    from normfuse.export.result import Exported
    from normfuse.export.tensorrt.api import to_tensorrt
    from normfuse.export.tensorrt.engine import Engine

    to_decoder: Any  # its types stand above this room

_HOMES = {
    "EngineOptions": "normfuse.export.options",
    "ExportOptions": "normfuse.export.options",
    "Exported": "normfuse.export.result",
    "convert_onnx": "normfuse.export.onnx.conversion.api",
    "Engine": "normfuse.export.tensorrt.engine",
    # stands above this room: a model is optimized on the way
    "to_decoder": "normfuse.app.decoders",
}


if not TYPE_CHECKING:  # where names are known, so that a misspelt one is found

    def __getattr__(name: str) -> Any:
        """Public names load on first use: the process that builds an engine needs none of PyTorch."""
        import importlib

        home = _HOMES.get(name)
        if home is None and name.startswith("to_"):
            from normfuse.export.targets import FOLDERS

            folder = name.removeprefix("to_")
            home = f"normfuse.export.{folder}.api" if folder in FOLDERS else None
        if home is not None:
            value = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'normfuse.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
