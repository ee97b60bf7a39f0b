"""normfuse's ops inside TensorRT engines.

payload.py    what a node carries: PTX and how to launch it
plans.py      which kernel stands for a node, and what it reads
placing.py    `place`: puts compiled kernels into the nodes of an ONNX file
plugin.py     `register`: the plugin class
kernel.py     loads and launches the PTX on a GPU

The same plugins in C++ are in `native/tensorrt/`.
"""

from typing import TYPE_CHECKING, Any

from normfuse.export.tensorrt.plugins.plugin import register

__all__ = ["PLUGINS", "kernel_capabilities", "place", "register"]

if TYPE_CHECKING:
    from normfuse.export.tensorrt.plugins.placing import kernel_capabilities, place
    from normfuse.export.tensorrt.plugins.plans import PLUGINS


def __getattr__(name: str) -> Any:
    """What needs PyTorch loads on first use: who builds or runs an engine imports `register` alone."""
    import importlib

    if name in __all__:
        home = "plans" if name == "PLUGINS" else "placing"
        return getattr(importlib.import_module(f"normfuse.export.tensorrt.plugins.{home}"), name)
    raise AttributeError(f"module 'normfuse.export.tensorrt.plugins' has no attribute {name!r}")
