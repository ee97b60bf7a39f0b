"""What the user should know about a model that was written for the server."""

from __future__ import annotations

from normfuse.export.server.batching import why_not
from normfuse.export.server.config import Serving

__all__ = ["notes"]


def notes(served: Serving, *, ours: bool) -> list[str]:
    """One sentence or two each; `ours`: the file has ops of the domain `normfuse`."""
    signature, options, max_batch, library = served.signature, served.options, served.max_batch, served.library
    found = []
    if not max_batch and options.max_batch is None:
        found.append(f"served without batching: {why_not(signature)}")
    if ours and library is None:
        found.append(
            "the file has ops of normfuse, and the server runs the functions that stand in the file for them, slower; "
            "on a CPU, kernels=True brings the kernels along"
        )
    if options.kernels and not ours:
        found.append("the file has no ops of normfuse: no kernels were copied")
    if library is not None:
        found.append(
            f"the server must find {library}; it needs the processor family and a C++ library as new as here, and ONNX Runtime 1.17"
        )
    if options.instances > 1 and options.threads is None and options.device == "cpu":
        found.append(f"{options.instances} instances with a thread for each core get into each other's way; state threads")
    if signature.tensorrt is not None:
        found.append(f"the engine needs a server with TensorRT {signature.tensorrt}")
    if signature.plugins:
        found.append(
            f"the engine needs plugins of normfuse ({', '.join(signature.plugins)}): start the server with their C++ library, "
            "--backend-config=tensorrt,plugins=PATH or LD_PRELOAD=PATH"
        )
    bounded = [t.name for t in signature.inputs if t.name in signature.profiles and -1 in t.dims[1 if max_batch else 0 :]]
    if bounded:
        found.append(f"requests outside the sizes that the engine was built for fail (inputs {', '.join(bounded)})")
    return found
