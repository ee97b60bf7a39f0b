"""Everything that knows a target: files for ONNX Runtime, TensorRT and other runtimes."""

from typing import TYPE_CHECKING, Any

__all__ = ["Engine", "EngineOptions", "ExportOptions", "Exported", "to_onnx", "to_tensorrt"]

if TYPE_CHECKING:
    from normfuse.export.onnx.api import to_onnx
    from normfuse.export.options import EngineOptions, ExportOptions
    from normfuse.export.result import Exported
    from normfuse.export.tensorrt.api import to_tensorrt
    from normfuse.export.tensorrt.engine import Engine

    to_decoder: Any  # its types stand above this room

_HOMES = {
    "EngineOptions": "normfuse.export.options",
    "ExportOptions": "normfuse.export.options",
    "to_onnx": "normfuse.export.onnx.api",
    "Exported": "normfuse.export.result",
    "to_tensorrt": "normfuse.export.tensorrt.api",
    "Engine": "normfuse.export.tensorrt.engine",
    # stands above this room: a model is optimized on the way
    "to_decoder": "normfuse.app.decoders",
}


if not TYPE_CHECKING:  # where names are known, so that a misspelt one is found

    def __getattr__(name: str) -> Any:
        """Public names load on first use: the process that builds an engine needs none of PyTorch."""
        import importlib

        if name in _HOMES:
            value = getattr(importlib.import_module(_HOMES[name]), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'normfuse.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
