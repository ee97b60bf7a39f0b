"""The runtimes that can be compared, and `bench`, which compares what users hold: modules, callables, files.

Stands beside `api.py` above the rooms: it may know every target. Nothing heavy is imported before an engine is opened:
the process of an ONNX Runtime engine holds ONNX Runtime and not torch, as it would in production.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from normfuse.app.cuda import CPU, Placement, in_dtype, on_device, to_device
from normfuse.app.source_options import Options
from normfuse.app.sources import Source, load_source
from normfuse.benchmark import Comparison, Engine, Schedule, measure
from normfuse.errors import ExportError, UsageError
from normfuse.export.targets import FOLDERS, folder_of
from normfuse.extras import need
from normfuse.gpu.device import DeviceCall, as_graph, find_gpu
from normfuse.progress import progress_bar

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

__all__ = [
    "bench", "callable_engine", "compiled", "export_original", "file_engine", "onnxruntime_engine", "program_engine",
    "source_engine", "tensorrt_engine",
]  # fmt: skip

Call = Callable[[], Any]
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
        a, b: modules in eval mode, callables, paths of files that a target writes (`.onnx` is run by ONNX Runtime, `.xml` by
            OpenVINO, `.engine` by TensorRT), or `Engine`s.
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


def file_engine(name: str, path: str | Path, inputs: Inputs, **how: Any) -> Engine:
    """The file at `path` in the runtime that it is for (`normfuse.export.targets`), opened in its own process without torch.

    Args:
        name: shown in tables.
        path: e.g. an `.onnx`, `.xml` or `.engine` file.
        inputs: tensors or arrays; positional ones in the order of the file's inputs, or a dict by name.
        how: more for its runtime: `graph` for those on a GPU.

    Raises:
        UsageError: there is no such file, or it is of no target.
    """
    path = Path(path)
    if folder_of(path) is None:
        raise UsageError(f"{path}: only {_suffixes()} files can be measured by path; load the model and pass the module")
    if not path.is_file():
        raise UsageError(f"{path} does not exist")
    return Engine(name, partial(_open_file, str(path.resolve()), _arrays(inputs), how))


def onnxruntime_engine(name: str, path: str | Path, inputs: Inputs, *, kernels: bool = True) -> Engine:
    """`file_engine` for ONNX Runtime on the CPU with its default session.

    Args:
        kernels: register normfuse's library, where it is built, for a file that has ops of it; False runs the file as anybody does.
    """
    return file_engine(name, path, inputs, kernels=kernels)


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
    """`file_engine` for TensorRT, timed by the device, with a CUDA graph unless told otherwise.

    What built the engine stands in the manifest beside it; else it is the TensorRT that is installed.
    """
    return file_engine(name, path, inputs, graph=graph)


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


def _open_file(path: str, arrays: Arrays, how: Mapping[str, Any], threads: int) -> Call:
    folder = folder_of(path)
    assert folder is not None
    return folder.timed(path, arrays, threads, **how)


def _engine(x: Any, inputs: Inputs, name: str) -> Engine:
    if isinstance(x, Engine):
        return x
    if isinstance(x, (str, Path)):
        label = name if name not in ("a", "b") else Path(x).name
        return file_engine(label, x, inputs)
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


def _suffixes() -> str:
    *first, last = (suffix for folder in FOLDERS.values() for suffix in folder.suffixes)
    return f"{', '.join(first)} and {last}"


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
