"""Engines for TensorRT and TensorRT for RTX, built in a process of their own.

api.py        to_tensorrt, build_onnx: a module or an ONNX file as an engine
flavour.py    which TensorRT is here
profiles.py   sizes that an engine is made for
builder.py    starts the child, reads its answer, says what went wrong
child.py      the process that holds TensorRT: parse, build, describe
layers.py     what the builder made of the graph, read from its log
engine.py     the result, and the manifest beside the file
inspect.py    what can be said of an engine file
runtime.py    runs one, where there is a GPU
plugins/      normfuse's own kernels inside an engine
"""

from typing import TYPE_CHECKING, Any

__all__ = ["Engine", "build_onnx", "to_tensorrt"]

if TYPE_CHECKING:
    from normfuse.export.tensorrt.api import build_onnx, to_tensorrt
    from normfuse.export.tensorrt.engine import Engine


def __getattr__(name: str) -> Any:
    """Public names load on first use: the child process must not load PyTorch."""
    import importlib

    if name in __all__:
        home = "engine" if name == "Engine" else "api"
        value = getattr(importlib.import_module(f"normfuse.export.tensorrt.{home}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'normfuse.export.tensorrt' has no attribute {name!r}")
