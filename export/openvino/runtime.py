"""Runs a file in OpenVINO on the CPU.

Torch is imported where tensors are, so that a process that only times a file is without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.errors import ExportError, UsageError
from normfuse.export.session import Input
from normfuse.extras import need
from normfuse.files import spelled

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OpenVinoSession", "compiled", "float_inputs", "opened", "read", "said"]

_LONGEST = 300  # letters of somebody else's message
_FLOATS = {"f16": "float16", "f32": "float32", "f64": "float64"}  # what NumPy has
_TYPES = {
    **_FLOATS,
    "bf16": "bfloat16",
    "boolean": "bool",
    **{f"{s[0]}{n}": f"{s}{n}" for s in ("int", "uint") for n in (8, 16, 32, 64)},
}


def read(path: str | Path) -> Any:
    """The `openvino.Model` in a file, `.xml` or `.onnx`.

    Raises:
        UsageError: there is no such file, or its weights are missing.
        ExportError: OpenVINO does not take it.
    """
    ov = need("openvino", extra="openvino")
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    if path.suffix == ".xml" and not path.with_suffix(".bin").is_file():
        raise UsageError(f"{path} has its weights in {path.with_suffix('.bin').name}, which is not beside it")
    try:
        return ov.Core().read_model(spelled(path))
    except Exception as e:  # everything that OpenVINO finds wrong is a RuntimeError
        raise ExportError(f"OpenVINO {version()} does not read {path.name}: {said(e)}") from e


def version() -> str:
    """Of the library that is installed, without its build."""
    return str(need("openvino", extra="openvino").__version__).partition("-")[0]


def compiled(model: Any, *, threads: int | None = None) -> Any:
    """A model, or the one in a file, ready to run on the CPU: in float32, for low latency.

    By itself OpenVINO computes in bfloat16 where a CPU can, with errors of one percent: nothing could be compared.

    Raises:
        UsageError: there is no such file.
        ExportError: OpenVINO does not take it.
    """
    ov = need("openvino", extra="openvino")
    if isinstance(model, (str, Path)):
        model = read(model)
    config = {
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": _cpus() if threads is None else threads,
    }  # fmt: skip
    try:
        return ov.Core().compile_model(model, "CPU", config)
    except Exception as e:
        raise ExportError(f"OpenVINO {version()} cannot compile the model: {said(e)}") from e


def float_inputs(model: Any) -> dict[str, str | None]:
    """Names of the inputs in order, and NumPy's name of the dtype of those that are floats."""
    return {i.name: i.dtype if i.dtype in _FLOATS.values() else None for i in _inputs(model)}


def opened(path: str | Path, *, threads: int | None = None) -> OpenVinoSession:
    """The file at `path`, to be compared with others.

    Raises: what `compiled` raises.
    """
    model = read(path)
    return OpenVinoSession(model, compiled(model, threads=threads))


class OpenVinoSession:
    """A compiled model as a `normfuse.export.session.Session`.

    Args:
        model: as it was read: compiling it adds names to its inputs and outputs.
        ready: the same, compiled.
    """

    def __init__(self, model: Any, ready: Any) -> None:
        self.ready = ready
        self.inputs = _inputs(model)
        self._outputs = tuple(_name(port, f"output_{i}") for i, port in enumerate(model.outputs))

    def outputs(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        request = self.ready.create_infer_request()
        try:
            for i, wanted in enumerate(self.inputs):
                request.set_input_tensor(i, _to_openvino(feeds[wanted.name]))
            request.infer()
        except Exception as e:
            raise ExportError(f"OpenVINO fails on the inputs: {said(e)}") from e
        return {name: _to_torch(request.get_output_tensor(i)) for i, name in enumerate(self._outputs)}


def said(e: BaseException) -> str:
    """What OpenVINO says, in one line: where in its sources that was said comes before it."""
    lines = [line.strip() for line in str(e).splitlines()]
    own = [line for line in lines if line and not line.startswith(("Exception from ", "Check '", "FrontEnd API failed"))]
    return " ".join(own or [line for line in lines if line])[:_LONGEST] or type(e).__name__


def _inputs(model: Any) -> tuple[Input, ...]:
    return tuple(
        Input(_name(port, f"input_{i}"), _dtype(port), tuple(_size(d) for d in _sizes(port))) for i, port in enumerate(model.inputs)
    )


def _name(port: Any, otherwise: str) -> str:
    names: list[str] = sorted(port.names, key=lambda name: (name.startswith("/"), len(name), name))
    return names[0] if names else otherwise


def _dtype(port: Any) -> str:
    name = str(port.element_type.get_type_name())
    return _TYPES.get(name, name)


def _sizes(port: Any) -> Any:
    shape = port.partial_shape
    return shape if shape.rank.is_static else ()


def _size(dimension: Any) -> int | str:
    return int(dimension.get_length()) if dimension.is_static else str(dimension)


def _to_openvino(value: Tensor) -> Any:
    import torch

    ov = need("openvino", extra="openvino")
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:  # NumPy has none: the bits travel as uint16
        bits = value.view(torch.uint16).numpy()
        return ov.Tensor(bits, list(value.shape), ov.Type.bf16)
    return ov.Tensor(value.numpy(), shared_memory=False)


def _to_torch(tensor: Any) -> Tensor:
    import numpy as np
    import torch

    if tensor.element_type.get_type_name() == "bf16":
        bits = np.array(tensor.data).view(np.uint16)
        return torch.from_numpy(bits).view(torch.bfloat16).reshape(tuple(tensor.shape))
    return torch.from_numpy(np.array(tensor.data))


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
