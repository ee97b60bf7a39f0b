"""The runtimes that can be compared, and `bench`, which compares what users hold: modules, callables, `.onnx` files.

Stands beside `api.py` above the rooms: it may know every target. Nothing heavy is imported before an engine is opened:
the process of an ONNX Runtime engine holds ONNX Runtime and not torch, as it would in production.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from normfuse.app.cuda import CPU, Placement, in_dtype, on_device, to_device
from normfuse.app.source_options import Options
from normfuse.app.sources import Source, load_source
from normfuse.benchmark import Comparison, Engine, Schedule, measure
from normfuse.errors import ExportError, NormfuseError, UsageError
from normfuse.export.onnx.domains import domains
from normfuse.export.onnx.tensors import check_file
from normfuse.extras import need
from normfuse.files import spelled
from normfuse.gpu.device import DeviceCall, as_graph, find_gpu
from normfuse.native_library import library_file, switched_off
from normfuse.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

__all__ = [
    "bench", "callable_engine", "compiled", "export_original", "onnxruntime_engine", "program_engine", "source_engine",
    "tensorrt_engine",
]  # fmt: skip

Call = Callable[[], Any]
_FLOATS = {"tensor(float16)": "float16", "tensor(float)": "float32", "tensor(double)": "float64"}
Inputs = Any  # a tensor, a tuple of positional inputs or a dict of keyword inputs
Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]] | tuple[np.ndarray[Any, Any], ...]"


def bench(
    a: Any,
    b: Any,
    inputs: Inputs = (),
    *,
    names: tuple[str, str] = ("a", "b"),
    seconds: float = 20.0,
    rounds: int | None = None,
    warmup: float = 0.5,
    threads: int | None = None,
    isolate: bool | None = None,
    seed: int = 0,
    progress: bool = True,
    on_plan: Callable[[int, float], None] | None = None,
) -> Comparison:
    """Is `b` faster than `a`? Interleaved latency comparison with a confidence interval.

    Args:
        a, b: modules in eval mode, callables, paths of `.onnx` files (run by ONNX Runtime) or `.engine` files (by TensorRT),
            or `Engine`s.
        inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; given to both. For an `.onnx` file
            positional inputs are taken in the order of its graph inputs.
        names: how the two are called in the table.
        seconds: time for measuring, without loading and warming up; at least 5 rounds are made.
        rounds: exact number of rounds instead.
        warmup: seconds of warm-up for each of the two.
        threads: threads each may use; one for each physical core by default. The number that torch uses in this
            process is put back afterwards.
        isolate: measure each in a process of its own, started three times. By default when both are files or
            engines; modules and callables are measured in this process.
        seed: of the order of turns and of the bootstrap.
        progress: show a bar when standard error is a terminal.
        on_plan: told (rounds, seconds of wall time still to come) once both have been opened.

    Returns:
        A `Comparison`. `print` shows it; `verdict(at_least)` says whether the claim holds, fails or stays undecided here.

    Raises:
        UsageError: something that cannot be called, a file that is not there, a module in training mode.
        NormfuseError: one of the two failed while it ran.
    """
    if isolate is None:
        isolate = all(isinstance(x, (str, Path, Engine)) for x in (a, b))
    first, second = (_engine(x, inputs, name) for x, name in zip((a, b), names, strict=True))
    schedule = Schedule(
        seconds=seconds, rounds=rounds, warmup=warmup, threads=threads, isolate=isolate, restarts=3 if isolate else 1, seed=seed
    )
    before = None if isolate else _torch_threads()
    try:
        with progress_bar(f"{first.name} / {second.name}", show=progress) as bar:
            return Comparison.of(measure((first, first, second), schedule, on_plan=on_plan, on_round=bar.to))
    finally:
        if before is not None:
            before()


def onnxruntime_engine(name: str, path: str | Path, inputs: Inputs, *, kernels: bool = True) -> Engine:
    """ONNX Runtime on the CPU with its default session, running the file at `path`.

    Args:
        name: shown in tables.
        path: an `.onnx` file.
        inputs: tensors or arrays; positional ones in the order of the graph's inputs, or a dict by name.
        kernels: register normfuse's library, where it is built, for a file that has ops of it; False runs the file as anybody does.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    return Engine(name, partial(_open_onnxruntime, str(path.resolve()), _arrays(inputs), kernels))


def callable_engine(name: str, call: Callable[..., Any], inputs: Inputs) -> Engine:
    """A module or callable of this process.

    Raises:
        UsageError: it cannot be called, or it is a module in training mode.
    """
    if not callable(call):
        raise UsageError(f"{name} is a {type(call).__name__}: expected a module, a callable or the path of an .onnx file")
    if getattr(call, "training", False) and not _is_graph_module(call):
        raise UsageError(f"{name} is in training mode: call .eval() on it before measuring")
    return Engine(name, partial(_open_callable, call, inputs))


def compiled(module: nn.Module) -> Callable[..., Any]:
    """`torch.compile(module)` for one shape."""
    import torch

    return torch.compile(module, dynamic=False)


def source_engine(name: str, source: str, options: Options, *, compile: bool = False, place: Placement = CPU) -> Engine:
    """The PyTorch model that `source` names (see `normfuse.app.sources`), run by torch; loaded where it is opened.

    On a GPU it is timed by the device, and by default as a CUDA graph.
    """
    return Engine(name, partial(_open_source, name, source, options, compile, place))


def program_engine(name: str, path: str | Path, *, compile: bool = False, place: Placement = CPU) -> Engine:
    """The `.pt2` file at `path`, run by torch on the example inputs in it."""
    return source_engine(name, str(Path(path).resolve()), Options(), compile=compile, place=place)


def tensorrt_engine(name: str, path: str | Path, inputs: Inputs, *, graph: bool = True) -> Engine:
    """The TensorRT engine at `path`, timed by the device, with a CUDA graph unless told otherwise.

    Args:
        name: shown in tables.
        path: an `.engine` file; what built it stands in the manifest beside it, else it is the TensorRT that is installed.
        inputs: tensors or arrays; positional ones in the order of the engine's inputs, or a dict by name.
        graph: replay a CUDA graph.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    return Engine(name, partial(_open_tensorrt, name, str(path.resolve()), _arrays(inputs), graph))


def export_original(source: Source, path: str | Path, *, dynamic_shapes: Any = None, opset: int | None = None) -> None:
    """The model as everybody exports it: `torch.onnx.export` with its own defaults; what an optimized file must beat.

    `opset` is for runtimes that take more than what torch writes by default.

    Raises:
        ExportError: torch cannot export it.
    """
    import torch

    if not isinstance(source.model, torch.export.ExportedProgram):
        from normfuse.export.onnx.baseline import export_original as export_module

        export_module(source.model, source.args, source.kwargs, path, dynamic_shapes, opset=opset)
        return
    need("onnxscript", extra="onnx")
    from normfuse.export.onnx.quiet import quiet

    try:
        with quiet():
            torch.onnx.export(source.model, (), str(path), dynamo=True, opset_version=opset, verbose=False)
    except Exception as e:
        raise ExportError(f"torch cannot export {source.name} to ONNX: {' '.join(str(e).split())[:500]}") from e


def _open_source(name: str, source: str, options: Options, compile: bool, place: Placement, threads: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    if place.device == "cuda":
        find_gpu()
    loaded = in_dtype(load_source(source, options), place.dtype)
    if not loaded.has_inputs:
        raise UsageError(f"{source} declares no inputs: pass --shape or --input")
    module = loaded.module
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    inputs, named = loaded.args, loaded.kwargs
    if place.device == "cuda":
        module = on_device(module, place.device)
        inputs, named = to_device((inputs, named), place.device)
    call = compiled(module) if compile else module

    def run() -> Any:
        with torch.inference_mode():
            return call(*inputs, **named)

    if place.device == "cpu":
        return run
    return DeviceCall(as_graph(name, run) if place.graph else run)


def _open_tensorrt(name: str, path: str, arrays: Arrays, graph: bool, threads: int) -> Call:
    from normfuse.export.tensorrt.engine import read_manifest
    from normfuse.export.tensorrt.flavour import find, load
    from normfuse.export.tensorrt.runtime import open_engine

    manifest = read_manifest(Path(path))
    session = open_engine(path, load(find(None if manifest is None else manifest.module)))
    session.bind(_feed(session.inputs, arrays, path))
    return DeviceCall(as_graph(name, session.launch) if graph else session.launch)


def _engine(x: Any, inputs: Inputs, name: str) -> Engine:
    if isinstance(x, Engine):
        return x
    if isinstance(x, (str, Path)):
        label = name if name not in ("a", "b") else Path(x).name
        if Path(x).suffix == ".engine":
            return tensorrt_engine(label, x, inputs)
        if Path(x).suffix != ".onnx":
            raise UsageError(f"{x}: only .onnx and .engine files can be measured by path; load the model and pass the module")
        return onnxruntime_engine(label, x, inputs)
    return callable_engine(name, x, inputs)


def _open_callable(call: Callable[..., Any], inputs: Inputs, threads: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    args, kwargs = _split(inputs)

    def run() -> None:
        with torch.inference_mode():
            call(*args, **kwargs)

    if not any(isinstance(x, torch.Tensor) and x.is_cuda for x in (*args, *kwargs.values())):
        return run

    def run_and_wait() -> None:
        run()
        torch.cuda.synchronize()

    return run_and_wait


def _open_onnxruntime(path: str, arrays: Arrays, registered: bool, threads: int) -> Call:
    ort = need("onnxruntime", extra="onnx")
    check_file(Path(path))
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    kernels = library_file()  # normfuse.native would import torch
    if registered and kernels.is_file() and not switched_off() and "normfuse" in domains(path):
        settings.register_custom_ops_library(str(kernels))
    try:
        session = ort.InferenceSession(spelled(path), settings, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise NormfuseError(f"ONNX Runtime cannot load {path}: {e}") from e
    wanted = {i.name: _FLOATS.get(i.type) for i in session.get_inputs()}
    feed = _feed(list(wanted), arrays, path)
    return partial(session.run, None, {n: _as_taken(x, wanted[n]) for n, x in feed.items()})


def _as_taken(array: Any, dtype: str | None) -> Any:
    """Floats in the dtype that the file takes, which need not be that of the model that it was made of."""
    return array.astype(dtype, copy=False) if dtype is not None and array.dtype.kind == "f" else array


def _feed(names: Sequence[str], arrays: Arrays, path: str) -> dict[str, Any]:
    if isinstance(arrays, dict) and set(names) <= set(arrays):
        return {n: arrays[n] for n in names}
    values = tuple(arrays.values()) if isinstance(arrays, dict) else arrays
    if len(values) != len(names):
        raise UsageError(f"{path} takes {len(names)} inputs ({', '.join(names)}), got {len(values)}")
    return dict(zip(names, values, strict=True))


def _arrays(inputs: Inputs) -> Arrays:
    """Inputs as NumPy arrays; what is no tensor (a flag such as `use_cache`) is no graph input and falls away."""
    args, kwargs = _split(inputs)
    if kwargs:
        return {k: _array(v) for k, v in kwargs.items() if hasattr(v, "shape")}
    return tuple(_array(v) for v in args if hasattr(v, "shape"))


def _array(x: Any) -> Any:
    if not hasattr(x, "detach"):
        return x
    x = x.detach().cpu()
    return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()  # NumPy has no bfloat16; float32 holds its values


def _split(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def _is_graph_module(x: Any) -> bool:
    return any(c.__name__ == "GraphModule" for c in type(x).__mro__)


def _torch_threads() -> Callable[[], None]:
    import torch

    threads = torch.get_num_threads()
    return lambda: torch.set_num_threads(threads)
