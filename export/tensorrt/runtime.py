"""Runs an engine on a GPU: tensors of torch in and out, on a stream of its own.

An engine belongs to the version of TensorRT that built it. TensorRT for RTX compiles the last step on the machine itself when an
engine is opened; what it compiled is kept, so that the second start is quick.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.cache import cache_folder
from normfuse.errors import ExportError, UsageError
from normfuse.export.session import Input
from normfuse.export.tensorrt.engine import sha256
from normfuse.export.tensorrt.plugins import register
from normfuse.gpu.device import find_gpu

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EngineSession", "Session", "open_engine"]

_DEVICE = "cuda"
_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool",
}  # fmt: skip

# What a runtime that looks at an engine finds wrong with it, by TensorRT's names.
_FOUND = {
    "MALFORMED_ENGINE": "it is no engine of {module}, or it is damaged: build it again",
    "VERSION_MISMATCH": "another version built it, and {module} here is {version}: build it again",
    "UNSUPPORTED_CC": "it was not built for this GPU ({gpu}): build it with --capability for it, if {module} supports it",
    "OLD_CUDA_DRIVER": "the driver of this machine is too old for {module} {version}: update it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime of this machine is too old for {module} {version}: update it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU ({gpu}) has too little memory for it",
}
# The same from the log, where there is nothing to ask; the first sign that is found counts.
_SAID = (
    (("not compatible with this version", "incompatible serialization version", "serialization version"), "VERSION_MISMATCH"),
    (("incompatible device", "compute capability", "different compute"), "UNSUPPORTED_CC"),
    (("Serialization assertion", "magicTag", "readHeader", "blobSize"), "MALFORMED_ENGINE"),
)

_log = logging.getLogger(__name__)


def open_engine(path: str | Path, trt: Any) -> Session:
    """The engine at `path`, ready to run on the GPU that torch uses.

    Args:
        path: an engine file.
        trt: `tensorrt` or `tensorrt_rtx` (see `normfuse.export.tensorrt.flavour`), the one that built it.

    Raises:
        UsageError: there is no such file.
        ExportError: the file is damaged, of another version or for another GPU, or there is no GPU.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    asks = hasattr(trt.Runtime, "get_engine_validity")
    if not asks:
        _need_gpu(path, trt)  # full TensorRT dies without one
    logger = _logger(trt)
    runtime = trt.Runtime(logger)
    plan = path.read_bytes()
    if asks:
        verdict, diagnostics = runtime.get_engine_validity(plan)
        _check(path, trt, verdict, int(diagnostics))
    register(trt)
    logger.errors.clear()
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise _refused(path, trt, logger.errors)
    _need_gpu(path, trt)
    return Session(path, trt, runtime, engine, logger)


class Session:
    """An engine with a context to run in.

    Args:
        path: for messages, and where its cache is kept.
        trt, runtime, engine, logger: of TensorRT; held, because it keeps addresses only.

    Attributes:
        inputs, outputs: names.
        name: of the engine.
    """

    def __init__(self, path: Path, trt: Any, runtime: Any, engine: Any, logger: Any) -> None:
        import torch

        self._trt, self._runtime, self._engine, self._logger = trt, runtime, engine, logger
        self.name = path.name
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        read = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.inputs, self.outputs = tuple(read), tuple(n for n in names if n not in read)
        self._types = {n: getattr(torch, _DTYPES[engine.get_tensor_dtype(n).name]) for n in names}
        self._stream = torch.cuda.Stream()
        self._bound: dict[str, Tensor] = {}
        self._cache: Any = None
        self._cache_file: Path | None = None
        self._context = self._new_context(path)

    def bind(self, inputs: Mapping[str, Any] | Sequence[Any]) -> None:
        """Copy inputs to the device and make room for outputs; every `launch` then reads and writes these.

        Args:
            inputs: tensors or arrays by name, or in the order of `self.inputs`; floats are cast to what the engine takes.

        Raises:
            UsageError: their names or number are others, or a size is outside of the engine's profile.
            ExportError: the size of an output depends on values.
        """
        import torch

        named = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(self.inputs, inputs, strict=False))
        if set(named) != set(self.inputs) or len(inputs) != len(self.inputs):
            raise UsageError(f"{self.name} takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), got {len(inputs)}")
        self._bound = {n: torch.as_tensor(v).to(_DEVICE, self._types[n], copy=True).contiguous() for n, v in named.items()}
        for n, value in self._bound.items():
            if not self._context.set_input_shape(n, tuple(value.shape)):
                least, _, most = self._engine.get_tensor_profile_shape(n, 0)
                raise UsageError(
                    f"{self.name}: {n} has shape {tuple(value.shape)}; the engine takes {tuple(least)} to {tuple(most)}: "
                    "build it for other shapes"
                )
        for n in self.outputs:
            shape = tuple(self._context.get_tensor_shape(n))
            if min(shape, default=0) < 0:
                raise ExportError(f"{self.name}: the size of the output {n}, {shape}, depends on values; such engines are not run")
            self._bound[n] = torch.empty(shape, dtype=self._types[n], device=_DEVICE)
        for n, value in self._bound.items():
            if not self._context.set_tensor_address(n, value.data_ptr()):
                raise ExportError(f"{self.name}: the address of {n} was refused: {_last(self._logger.errors)}")

    def launch(self) -> dict[str, Tensor]:
        """Start one run on torch's current stream; the outputs, which the next run overwrites.

        Raises:
            ExportError: TensorRT could not start it.
        """
        import torch

        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise ExportError(f"{self.name} could not be run: {_last(self._logger.errors)}")
        return {n: self._bound[n] for n in self.outputs}

    def run(self, inputs: Mapping[str, Any] | Sequence[Any]) -> dict[str, Tensor]:
        """Outputs by name, on the device; see `bind` and `launch`."""
        import torch

        self.bind(inputs)
        self._stream.wait_stream(torch.cuda.current_stream())  # the copies of the inputs
        with torch.cuda.stream(self._stream):
            found = {n: value.clone() for n, value in self.launch().items()}
        self._stream.synchronize()
        self._keep_cache()
        return found

    def dtype_of(self, name: str) -> str:
        """Of an input or output, by torch's name."""
        return str(self._types[name]).removeprefix("torch.")

    def layers(self) -> str:
        """What the engine inspector says, as JSON."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def _new_context(self, path: Path) -> Any:
        """A context; with TensorRT for RTX one whose kernels are compiled at once, from the cache where they are in it."""
        if not hasattr(self._trt, "IRuntimeCache"):
            context = self._engine.create_execution_context()
        else:
            config = self._engine.create_runtime_config()
            strategies = getattr(self._trt, "DynamicShapesKernelSpecializationStrategy", None)
            if strategies is not None:  # lazily they are compiled while the engine runs, and a measurement would see both
                config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            self._cache = config.create_runtime_cache()
            self._read_cache(path)
            config.set_runtime_cache(self._cache)
            context = self._engine.create_execution_context(config)
        if context is None:
            raise ExportError(f"{self.name}: no room to run it, or its kernels do not compile: {_last(self._logger.errors)}")
        return context

    def _read_cache(self, path: Path) -> None:
        self._cache_file = cache_folder() / "tensorrt_rtx" / f"{sha256(path)}.cache"
        try:
            blob = self._cache_file.read_bytes()
        except OSError:
            return
        if not self._cache.deserialize(blob):  # of another driver, GPU or version
            _log.info("%s is not for this machine and is made again", self._cache_file)

    def _keep_cache(self) -> None:
        """Write down what was compiled, once; where that cannot be written it is compiled again next time."""
        if self._cache is None or self._cache_file is None or self._cache_file.exists():
            return
        try:
            self._cache_file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._cache_file.with_suffix(".partial")
            partial.write_bytes(bytes(self._cache.serialize()))
            partial.replace(self._cache_file)
        except OSError as e:
            _log.info("what TensorRT compiled for %s is not kept: %s", self.name, e)


class EngineSession:
    """An opened engine as a `normfuse.export.session.Session`."""

    def __init__(self, opened: Session) -> None:
        self._opened = opened
        self.inputs = tuple(Input(name, opened.dtype_of(name), ()) for name in opened.inputs)

    def outputs(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On the CPU, in the dtypes that the engine gives."""
        run = self._opened.run({i.name: feeds[i.name] for i in self.inputs})
        return {name: value.cpu() for name, value in run.items()}


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(text)
            _log.debug("%s", text)

    return Logger()


def _need_gpu(path: Path, trt: Any) -> None:
    try:
        find_gpu()
    except UsageError as e:
        raise ExportError(f"{path} runs with {trt.__name__} on an NVIDIA GPU and with torch for CUDA: {e}") from e


def _check(path: Path, trt: Any, verdict: Any, diagnostics: int) -> None:
    """Raise the first thing that is wrong with an engine, as its runtime sees it."""
    if verdict != trt.EngineValidity.INVALID:
        return
    for name, bit in trt.EngineInvalidityDiagnostics.__members__.items():
        if diagnostics & int(bit) and name in _FOUND:
            raise _error(path, trt, name)


def _refused(path: Path, trt: Any, errors: Sequence[str]) -> ExportError:
    """What is wrong with an engine that could not be loaded, by what the runtime said."""
    said = [e for e in errors if "catchCudaError" not in e]  # noise that follows every other error
    for signs, name in _SAID:
        found = [text for text in said if any(sign in text for sign in signs)]
        if found:
            return _error(path, trt, name, _last(found))
    if "cudaError" in " ".join(errors):
        return ExportError(f"{path}: {trt.__name__} found no GPU: {_last(said[:1] or errors[:1])}")
    return ExportError(f"{path}: {trt.__name__} {trt.__version__} does not load it: {_last(said)}")


def _error(path: Path, trt: Any, name: str, said: str = "") -> ExportError:
    text = _FOUND[name].format(module=trt.__name__, version=trt.__version__, gpu=_gpu())
    return ExportError(f"{path}: {text}{f' ({said})' if said else ''}")


def _gpu() -> str:
    try:
        return str(find_gpu())
    except UsageError:
        return "none"


def _last(errors: Sequence[str]) -> str:
    return " ".join(errors[-1].split())[:300] if errors else "it said nothing"
