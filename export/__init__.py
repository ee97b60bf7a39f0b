"""Everything that knows a target: files for ONNX Runtime, TensorRT and other runtimes."""

from normfuse.export.onnx.api import to_onnx
from normfuse.export.result import Exported

__all__ = ["Exported", "to_onnx"]
