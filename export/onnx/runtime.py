"""ONNX Runtime sessions on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normfuse import native
from normfuse.errors import ExportError
from normfuse.export.onnx.domains import domains
from normfuse.export.onnx.tensors import check_file
from normfuse.export.session import Input
from normfuse.extras import need
from normfuse.files import spelled

__all__ = ["OnnxSession", "default_threads", "opened", "run", "session"]

_TYPES = {"float": "float32", "double": "float64"}  # names of ONNX Runtime that are not those of NumPy


def default_threads() -> int:
    """Number of CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def session(
    model: str | Path | bytes,
    *,
    threads: int | None = None,
    optimized: bool = True,
    disabled_optimizers: Sequence[str] = (),
    config: Mapping[str, str] | None = None,
    dump: str | Path | None = None,
    kernels: bool = True,
) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    Args:
        model: a file, or a model without external data as bytes.
        threads: threads within an op, pinned to that number; default: the CPUs of this process.
        optimized: False turns the graph optimizations of the runtime off.
        disabled_optimizers: single optimizations to leave out, e.g. `SkipLayerNormFusion`.
        config: session entries, e.g. `{"session.intra_op.allow_spinning": "0"}`.
        dump: where to write the graph as the runtime has optimized it.
        kernels: register normfuse's kernels, where they are built, for a file that uses their ops; False runs the functions that
            stand in the file for them.

    Raises:
        ExportError: the runtime does not take the model; the message says why.
        UsageError: the file takes weights from elsewhere.
    """
    ort = need("onnxruntime", extra="onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = default_threads() if threads is None else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions; the runtime would print them as well
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL if optimized else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    source = model
    if not isinstance(model, bytes):
        check_file(Path(model))
        source = spelled(model)
    try:
        if kernels and native.available() and "normfuse" in domains(model):
            options.register_custom_ops_library(str(native.path()))
        return ort.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled_optimizers) or None
        )
    except Exception as e:  # onnxruntime has an exception class for every status code, all private
        raise ExportError(f"ONNX Runtime {ort.__version__} does not take the model: {_message(e)}") from e


def run(session: Any, feeds: Mapping[str, Tensor | np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    """Outputs by name; `feeds` are torch tensors or numpy arrays by input name.

    Raises:
        ExportError: the runtime fails on the inputs.
    """
    ort = need("onnxruntime", extra="onnx")
    wanted = {i.name for i in session.get_inputs()}
    try:
        values = session.run_with_ort_values(None, {k: _to_ort(v, ort) for k, v in feeds.items() if k in wanted})
    except Exception as e:
        raise ExportError(f"ONNX Runtime fails on the inputs: {_message(e)}") from e
    return {o.name: _to_torch(v) for o, v in zip(session.get_outputs(), values, strict=True)}


class OnnxSession:
    """An `onnxruntime.InferenceSession` as a `normfuse.export.session.Session`."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened
        self.inputs = tuple(Input(i.name, _dtype(i.type), tuple(_size(d) for d in i.shape)) for i in opened.get_inputs())

    def outputs(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return run(self._opened, feeds)


def opened(model: str | Path | bytes, **how: Any) -> OnnxSession:
    """`session(model, **how)`, to be compared with others."""
    return OnnxSession(session(model, **how))


def _dtype(stated: str) -> str:
    """NumPy's name of `tensor(float)`; what is no tensor keeps its own."""
    name = stated.removeprefix("tensor(").removesuffix(")") if stated.startswith("tensor(") else stated
    return _TYPES.get(name, name)


def _size(stated: Any) -> int | str:
    return stated if isinstance(stated, int) else str(stated or "?")


def _to_ort(value: Tensor | np.ndarray[Any, Any], ort: Any) -> Any:
    if isinstance(value, np.ndarray):
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:  # numpy has none: the bits travel as uint16
        onnx = need("onnx", extra="onnx")
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value.view(torch.uint16).numpy(), onnx.TensorProto.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(value.numpy())


def _to_torch(value: Any) -> Tensor:
    if value.data_type() == "tensor(bfloat16)":
        out: Tensor = torch.utils.dlpack.from_dlpack(value._get_c_value())
        return out.clone()
    return torch.from_numpy(value.numpy())


def _message(e: BaseException) -> str:
    """The last part of an error of the runtime: what comes before are its source files."""
    text = " ".join(str(e).split())
    return text.split("Status Message: ")[-1][:500]
