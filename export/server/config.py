"""config.pbtxt: what the server is told about a model.

Fields are those of `ModelConfig` in the server's model_config.proto.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from normfuse import __version__
from normfuse.errors import UsageError
from normfuse.export.server.signature import DTYPES, Signature, TensorSpec
from normfuse.export.server.text import Fields, Symbol, message

__all__ = ["BACKENDS", "CONFIG", "FILE_NAMES", "Options", "check_types", "config_text"]

CONFIG = "config.pbtxt"
BACKENDS = ("onnxruntime", "tensorrt")
#: What the server looks for in a version folder.
FILE_NAMES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}

_KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}


@dataclass(frozen=True)
class Options:
    """How a model is to be served; see `write_repository`."""

    preferred_batches: tuple[int, ...] = ()
    queue_delay_us: int = 0
    instances: int = 1
    device: Literal["auto", "cpu", "gpu"] = "auto"
    threads: int | None = None
    accelerator: Literal["tensorrt"] | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    kernels: bool = False

    def check(self, backend: str) -> None:
        """Raises UsageError where two of them, or one and the backend, do not go together."""
        if self.device not in _KINDS:
            raise UsageError(f"device is {self.device!r}, expected auto, cpu or gpu")
        if self.instances < 1:
            raise UsageError(f"instances is {self.instances}, expected 1 or more")
        if self.queue_delay_us < 0:
            raise UsageError(f"queue_delay_us is {self.queue_delay_us}, expected 0 or more")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads is {self.threads}, expected 1 or more")
        if self.accelerator not in (None, "tensorrt"):
            raise UsageError(f"accelerator is {self.accelerator!r}, expected None or 'tensorrt'")
        if self.precision not in ("fp32", "fp16"):
            raise UsageError(f"precision is {self.precision!r}, expected fp32 or fp16")
        if self.precision != "fp32" and self.accelerator is None:
            raise UsageError("precision is for accelerator='tensorrt'; other runtimes use the types that stand in the file")
        if backend == "tensorrt":
            if self.device == "cpu":
                raise UsageError("device is 'cpu', and an engine of TensorRT runs on a GPU; give the server the ONNX file")
            for name in ("threads", "accelerator", "kernels"):
                if getattr(self, name):
                    raise UsageError(f"{name} is for ONNX files, and the artifact is an engine")
        elif self.accelerator is not None and self.device == "cpu":
            raise UsageError("device is 'cpu', and the accelerator tensorrt runs on a GPU")
        if self.kernels and self.device != "cpu":
            raise UsageError(f"kernels run on the CPU, and device is {self.device!r}; expected device='cpu'")


def check_types(signature: Signature, backend: str) -> None:
    """Raises UsageError where the backend has no such tensors."""
    for t in signature.tensors:
        if backend == "onnxruntime" and t.dtype == "bfloat16":
            raise UsageError(f"{t}: the server's onnxruntime backend has no bfloat16 tensors; keep inputs and outputs in float32")
        if backend == "tensorrt" and not t.shape:
            raise UsageError(f"{t} is a scalar, which the server's tensorrt backend refuses; expected at least one axis")


def config_text(
    name: str,
    backend: str,
    signature: Signature,
    options: Options,
    *,
    max_batch: int,
    warmup: Mapping[str, Sequence[int]] | None,
    capabilities: Mapping[str, str],
    library: str | None,
) -> str:
    """The text of config.pbtxt.

    Args:
        name: of the model.
        backend: one of `BACKENDS`.
        signature: of the file that is served.
        options: checked before.
        max_batch: 0 for a model that is served without batching.
        warmup: sizes by input without the batch axis; None leaves the warm-up out.
        capabilities: file names by compute capability, for engines that differ.
        library: where the server finds normfuse's kernels.
    """
    fields: dict[str, object] = {"name": name, "backend": backend, "max_batch_size": max_batch}
    fields["input"] = [_tensor(t, max_batch) for t in signature.inputs]
    fields["output"] = [_tensor(t, max_batch) for t in signature.outputs]
    # the count is stated because the server would start two instances of an ONNX file on a CPU
    fields["instance_group"] = [{"kind": Symbol(_KINDS[options.device]), "count": options.instances}]
    if capabilities:
        fields["cc_model_filenames"] = [{"key": key, "value": file} for key, file in sorted(capabilities.items())]
    if max_batch > 1:
        fields["dynamic_batching"] = _batching(options)
    if options.accelerator is not None:
        parameters = [{"key": "precision_mode", "value": options.precision.upper()}]
        fields["optimization"] = {
            "execution_accelerators": {"gpu_execution_accelerator": {"name": options.accelerator, "parameters": parameters}}
        }
    if options.threads is not None:
        fields["parameters"] = [{"key": "intra_op_thread_count", "value": {"string_value": str(options.threads)}}]
    if library is not None:
        fields["model_operations"] = {"op_library_filename": [library]}
    if warmup is not None and signature.inputs:
        fields["model_warmup"] = [_warmup(signature, warmup, n) for n in sorted({1, max(1, max_batch)})]
    return f"# Written by normfuse {__version__}. One file for all versions of the model.\n{message(fields)}\n"


def _tensor(tensor: TensorSpec, max_batch: int) -> Fields:
    fields: dict[str, object] = {"name": tensor.name, "data_type": Symbol(DTYPES[tensor.dtype])}
    dims = tensor.dims[1:] if max_batch else tensor.dims
    fields["dims"] = list(dims) or [1]
    if not dims and max_batch:
        fields["reshape"] = {"shape": []}  # one number an item: the server has no dims without a size
    return fields


def _batching(options: Options) -> Fields:
    fields: dict[str, object] = {}
    if options.preferred_batches:
        fields["preferred_batch_size"] = list(options.preferred_batches)
    if options.queue_delay_us:
        fields["max_queue_delay_microseconds"] = options.queue_delay_us
    return fields


def _warmup(signature: Signature, shapes: Mapping[str, Sequence[int]], batch: int) -> Fields:
    inputs = [
        {
            "key": t.name,
            # the server's random data are random bytes: NaN in floats, and indices far outside every table
            "value": {"data_type": Symbol(DTYPES[t.dtype]), "dims": list(shapes[t.name]) or [1], "zero_data": True},
        }
        for t in signature.inputs
    ]
    return {"name": f"batch of {batch}", "batch_size": batch, "inputs": inputs}
