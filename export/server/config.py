"""config.pbtxt: what the server is told about a model.

Fields are those of `ModelConfig` in the server's model_config.proto.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from normfuse import __version__
from normfuse.errors import UsageError
from normfuse.export.server.options import ServeOptions
from normfuse.export.server.signature import DTYPES, Signature, TensorSpec
from normfuse.export.server.text import Fields, Symbol, message

__all__ = ["CONFIG", "FILE_NAMES", "Serving", "check_types", "config_text"]

CONFIG = "config.pbtxt"
#: What the server looks for in a version folder.
FILE_NAMES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}

_KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}


def check_types(signature: Signature, backend: str) -> None:
    """Raises UsageError where the backend has no such tensors."""
    for t in signature.tensors:
        if backend == "onnxruntime" and t.dtype == "bfloat16":
            raise UsageError(f"{t}: the server's onnxruntime backend has no bfloat16 tensors; keep inputs and outputs in float32")
        if backend == "tensorrt" and not t.shape:
            raise UsageError(f"{t} is a scalar, which the server's tensorrt backend refuses; expected at least one axis")


@dataclass(frozen=True)
class Serving:
    """What is served, and what was found out about it.

    Attributes:
        name: of the model.
        backend: one of `BACKENDS`.
        signature: of the file.
        options: checked before.
        max_batch: 0 for a model that is served without batching.
        engines: file names by compute capability, for engines that differ.
        warmup: sizes by input without the batch axis; None leaves the warm-up out.
        library: where the server finds normfuse's kernels.
    """

    name: str
    backend: str
    signature: Signature
    options: ServeOptions
    max_batch: int
    engines: Mapping[str, str]
    warmup: Mapping[str, Sequence[int]] | None
    library: str | None


def config_text(served: Serving) -> str:
    """The text of config.pbtxt."""
    signature, options, max_batch = served.signature, served.options, served.max_batch
    fields: dict[str, object] = {"name": served.name, "backend": served.backend, "max_batch_size": max_batch}
    fields["input"] = [_tensor(t, max_batch) for t in signature.inputs]
    fields["output"] = [_tensor(t, max_batch) for t in signature.outputs]
    # the count is stated because the server would start two instances of an ONNX file on a CPU
    fields["instance_group"] = [{"kind": Symbol(_KINDS[options.device]), "count": options.instances}]
    if served.engines:
        fields["cc_model_filenames"] = [{"key": key, "value": file} for key, file in sorted(served.engines.items())]
    if max_batch > 1:
        fields["dynamic_batching"] = _batching(options)
    if options.accelerator is not None:
        parameters = [{"key": "precision_mode", "value": options.precision.upper()}]
        fields["optimization"] = {
            "execution_accelerators": {"gpu_execution_accelerator": {"name": options.accelerator, "parameters": parameters}}
        }
    if options.threads is not None:
        fields["parameters"] = [{"key": "intra_op_thread_count", "value": {"string_value": str(options.threads)}}]
    if served.library is not None:
        fields["model_operations"] = {"op_library_filename": [served.library]}
    if served.warmup is not None and signature.inputs:
        fields["model_warmup"] = [_warmup(signature, served.warmup, n) for n in sorted({1, max(1, max_batch)})]
    return f"# Written by normfuse {__version__}. One file for all versions of the model.\n{message(fields)}\n"


def _tensor(tensor: TensorSpec, max_batch: int) -> Fields:
    fields: dict[str, object] = {"name": tensor.name, "data_type": Symbol(DTYPES[tensor.dtype])}
    dims = tensor.dims[1:] if max_batch else tensor.dims
    fields["dims"] = list(dims) or [1]
    if not dims and max_batch:
        fields["reshape"] = {"shape": []}  # one number an item: the server has no dims without a size
    return fields


def _batching(options: ServeOptions) -> Fields:
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
