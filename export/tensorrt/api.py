"""`to_tensorrt`: a module as an engine; `build_onnx`: an ONNX file as one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfuse.errors import ExportError, UsageError
from normfuse.export.keywords import given, keywords_of
from normfuse.export.onnx.inspect import provenance, read_model
from normfuse.export.onnx.precision import to_precision
from normfuse.export.options import EngineKeywords, EngineOptions, FileKeywords
from normfuse.export.tensorrt.builder import ask
from normfuse.export.tensorrt.engine import Engine, Tensor, log_path, manifest_path, sha256
from normfuse.export.tensorrt.flavour import find
from normfuse.export.tensorrt.layers import layers, memory
from normfuse.export.tensorrt.profiles import InputSize, complete
from normfuse.files import atomic, check_target, workspace
from normfuse.reports.model import Error

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

    from normfuse.export.onnx.program import Program

__all__ = ["Ready", "build_onnx", "check_place", "file_as_onnx", "module_as_onnx", "to_tensorrt"]

_QUANTIZED = "shiftquant_linear"
_INLINE = 2**20  # a converted file keeps its weights beside it, so that reading its signature does not read them
_WITH_RESIDUAL = {"rms_norm": "add_rms_norm", "crms_norm": "add_crms_norm"}
#: What a file that is built as it is has behind it.
_OF_THE_MODULE = ("plugins", "opset", "form", "attention", "verify", "tolerance")


@keywords_of(EngineOptions)
def to_tensorrt(
    gm: nn.Module,
    path: str | Path,
    options: EngineOptions | None = None,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    **keywords: Unpack[EngineKeywords],
) -> Engine:
    """Build a TensorRT engine of `gm` at `path`; a manifest (`<path>.json`) and the builder's log (`<path>.log`) appear beside it.

    The module is exported to ONNX for the target `tensorrt`, compared with the module in ONNX Runtime, and built in a process of
    its own. TensorRT for RTX needs no GPU for that, TensorRT does.

    Args:
        gm: what `normfuse.optimize` returned; any other module in eval mode works with `example_inputs`.
        path: the engine file to write, e.g. `model.engine`.
        options: all that follows as one value; what is given by name goes before it.
        dtype: of weights and products: `fp32`, `fp16` or `bf16`, also spelt out; statistics of norms stay in float32. By default
            that of the model, float32 for one in float64.
        io_dtype: `fp32` keeps inputs and outputs in float32; `low` makes them as narrow as the rest.
        shapes: for inputs whose size may vary the smallest, usual and largest one: {"x": ((1, 3, 224, 224), (8, ...), (64, ...))},
            or strings as on the command line. By default from the captured range, or 1 to 8 times the example.
        flavour: `tensorrt_rtx` or `tensorrt`; by default the first that is installed.
        capabilities: compute capabilities to build for, e.g. ("8.6", "8.9"), with TensorRT for RTX; by default all that it can.
        opset: of the ONNX file in between; older releases of TensorRT know neither RMSNormalization nor Attention of opset 23.
        attention: `attention23`, `decomposed` or `auto`.
        form: of quantized layers: `qdq` (static scales), `weight_only` (packed weights, activations in float) or `auto`.
        plugins: ops that become normfuse's own kernels, any of `normfuse.export.tensorrt.plugins.PLUGINS`. Who loads such an
            engine registers the plugins first (`normfuse.export.tensorrt.plugins.register`, or the C++ library).
        example_inputs, dynamic_shapes: by default those of `normfuse.optimize`.
        verify: run the ONNX file in ONNX Runtime and compare it with `gm`.
        tolerance: bound on max |difference| / max |expected| of that comparison; see `to_onnx`.
        force: replace existing files.
        progress: show that something is happening, on a terminal.

    Raises:
        UsageError: an argument is wrong, a profile does not fit the model, a file exists or cannot be written.
        ExportError: the model cannot be exported, deviates, or TensorRT refuses it; the message names the module.
        MissingExtra: TensorRT, onnx, onnxscript or onnxruntime is not installed.
    """
    chosen = given(EngineOptions, options, keywords, called="to_tensorrt")
    path = check_place(path, chosen)
    with workspace(path) as folder:
        ready = module_as_onnx(gm, folder, chosen, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
        del gm
        return _built(ready, path, chosen)


@dataclass(frozen=True)
class Ready:
    """An ONNX file as TensorRT is to read it.

    Attributes:
        file: where it stands; its weights may stand beside it.
        inputs: what it says of its inputs.
        plugins: number of normfuse's own kernels by op type.
        form: what quantized layers became; None without any.
        error: deviation from the module in ONNX Runtime; None where it was not run.
        notes: what else the user should know.
    """

    file: Path
    inputs: tuple[InputSize, ...]
    plugins: dict[str, int] = field(default_factory=dict)
    form: str | None = None
    error: Error | None = None
    notes: tuple[str, ...] = ()


def module_as_onnx(
    gm: nn.Module, folder: Path, options: EngineOptions, *, example_inputs: Any = None, dynamic_shapes: Any = None
) -> Ready:
    """The file in `folder` that `to_tensorrt` builds from.

    Raises: what `to_tensorrt` raises before it builds.
    """
    from normfuse.export.onnx.api import write_onnx

    plugins = tuple(options.plugins)
    if plugins:
        from normfuse.export.kernels import with_kernels

        gm = with_kernels(_graph(gm), _ops(plugins))
    file = folder / "model.onnx"
    kept = (*_ops(plugins), *(p for p in plugins if p == _QUANTIZED))
    exported, program = write_onnx(
        gm, file, options.as_file(), example_inputs=example_inputs, dynamic_shapes=dynamic_shapes, kept=kept
    )
    sizes = _sizes(file, program)
    placed = _place(file, options, sizes) if plugins else {}
    return Ready(file, sizes, placed, exported.form, exported.error, exported.notes)


def file_as_onnx(file: str | Path, folder: Path, options: EngineOptions) -> Ready:
    """The file that `build_onnx` builds from: the one that is given, or its conversion in `folder`."""
    file = Path(file)
    sizes = _sizes(file)
    if options.weights_in == "fp32":
        return Ready(file, sizes)
    from normfuse.export.onnx.writer.save import save_model
    from normfuse.export.onnx.writer.variants import load_model

    model = load_model(file)
    notes = to_precision(model, options.weights_in, io_dtype=options.io_dtype)
    save_model(model, folder / "model.onnx", limit=_INLINE)
    return Ready(folder / "model.onnx", sizes, notes=notes)


@keywords_of(EngineOptions, tuple(FileKeywords.__annotations__))
def build_onnx(
    file: str | Path, path: str | Path, options: EngineOptions | None = None, **keywords: Unpack[FileKeywords]
) -> Engine:
    """Build an engine of the ONNX file at `file` as it is; the arguments are those of `to_tensorrt`.

    Raises:
        UsageError: the file is missing or no ONNX file, an argument is wrong or about an export, or sizes of an input are open.
        ExportError: TensorRT refuses the model.
        MissingExtra: TensorRT or onnx is not installed.
    """
    chosen = given(EngineOptions, options, keywords, called="build_onnx")
    for name in (f.name for f in fields(chosen) if f.name in _OF_THE_MODULE and getattr(chosen, f.name) != f.default):
        raise UsageError(f"{name} starts from the PyTorch model; {file} is exported already")
    path = check_place(path, chosen)
    with workspace(path) as folder:
        return _built(file_as_onnx(file, folder, chosen), path, chosen)


def check_place(path: str | Path, options: EngineOptions) -> Path:
    """`path`, when everything that can be wrong without looking at the model is right.

    Raises:
        UsageError: something is not.
        MissingExtra: TensorRT is not installed.
    """
    path = check_target(path, force=options.force)
    for beside in (manifest_path(path), log_path(path)):
        check_target(beside, force=options.force)
    find(options.flavour)
    return path


def _graph(gm: nn.Module) -> Any:
    from torch import fx

    if not isinstance(gm, fx.GraphModule):
        raise UsageError("plugins are placed in what normfuse.optimize returned; optimize the module first")
    return gm


def _ops(plugins: Sequence[str]) -> tuple[str, ...]:
    """The operators of `torch.ops.normfuse` for these plugins, without those that only quantization makes."""
    found = [name for name in plugins if name != _QUANTIZED]
    return (*found, *(_WITH_RESIDUAL[name] for name in found if name in _WITH_RESIDUAL))


def _place(file: Path, options: EngineOptions, inputs: Sequence[InputSize]) -> dict[str, int]:
    """Kernels into the nodes of `file`, in place; their tiles are chosen for the usual sizes of the profiles."""
    from normfuse.export.onnx.writer.save import save_model
    from normfuse.export.onnx.writer.variants import load_model
    from normfuse.export.tensorrt.plugins import kernel_capabilities, place

    profiles = complete(inputs, options.profiles)
    usual = {
        axis: profiles[wanted.name].opt[at]
        for wanted in inputs
        for at, axis in enumerate(wanted.sizes)
        if isinstance(axis, str) and wanted.name in profiles
    }
    model, capabilities = load_model(file), kernel_capabilities(options.capabilities)
    placed: dict[str, int] = place(model, options.plugins, dtype=options.weights_in, capabilities=capabilities, sizes=usual)
    if not placed:
        raise UsageError(f"plugins={tuple(options.plugins)}: the optimized model has no place for any of them")
    ready = file.with_name("plugins.onnx")
    save_model(model, ready, limit=_INLINE)
    os.replace(ready, file)
    return placed


def _sizes(file: Path, program: Program | None = None) -> tuple[InputSize, ...]:
    """What the ONNX file says of its inputs, and what the program adds to it."""
    graph = read_model(file).graph
    initializers = {i.name for i in graph.initializer}
    examples, limits = _known(program) if program is not None else ({}, {})
    found = []
    for value in graph.input:
        if value.name in initializers:
            continue
        axes = value.type.tensor_type.shape.dim
        sizes = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in axes)
        found.append(InputSize(value.name, sizes, examples.get(value.name), limits))
    return tuple(found)


def _known(program: Program) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, int | None]]]:
    """Sizes of the example inputs by name, and the captured range of each named axis."""
    examples = {name: tuple(t.shape) for name, t in program.feeds(program.flat_inputs()).items()}
    limits: dict[str, tuple[int, int | None]] = {}
    for symbol, bounds in program.exported.range_constraints.items():
        name = program.axes.get(str(symbol))
        if name is not None:
            upper = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**31 else None
            # torch starts every range at 0 or 2 where none was stated: 0 and 1 are special to its tracing, not to the model
            lower = int(bounds.lower) if bounds.lower.is_Integer else 0
            limits[name] = (1 if lower <= 2 else lower, upper)
    return examples, limits


def _built(ready: Ready, path: Path, options: EngineOptions) -> Engine:
    """Build the file, and write engine, manifest and log to `path` and beside it."""
    profiles = complete(ready.inputs, options.profiles)
    module = find(options.flavour)
    with atomic(path, force=options.force) as temporary:
        asked = {
            "onnx": str(ready.file.resolve()),
            "plan": str(temporary),
            "log": str(log_path(temporary)),
            "profiles": {name: (p.min, p.opt, p.max) for name, p in profiles.items()},
            "capabilities": list(options.capabilities),
            "plugins": bool(ready.plugins),
        }
        answer = ask(module, "build", asked, label=f"building {path.name} with {module}", progress=options.progress)
        if not temporary.is_file():
            raise ExportError(f"{module} built nothing and said nothing; its log is lost with it")
        result = Engine(
            path=path,
            module=module,
            dtype=options.weights_in,
            capabilities=tuple(options.capabilities),
            bytes=temporary.stat().st_size,
            sha256=sha256(temporary),
            profiles={n: {"min": list(p.min), "opt": list(p.opt), "max": list(p.max)} for n, p in profiles.items()},
            plugins=ready.plugins,
            passes=_passes(ready.file),
            form=ready.form,
            error=ready.error,
            notes=ready.notes,
            **_told(answer),
        )
        manifest_path(temporary).write_text(result.to_json(), encoding="utf-8")
    return result


def _told(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What the builder says of the engine."""
    facts = answer["facts"]
    tensors = {
        side: tuple(Tensor(t["name"], t["dtype"], tuple(t["shape"])) for t in answer[side]) for side in ("inputs", "outputs")
    }
    return tensors | {
        "version": answer["version"],
        "seconds": answer["seconds"],
        "layers": layers(facts),
        "weight_bytes": memory(facts, "Weights"),
        "activation_bytes": memory(facts, "Activation"),
    }


def _passes(file: Path) -> tuple[tuple[str, int], ...]:
    """The passes that the ONNX file says it went through."""
    found = provenance(file).get("normfuse.passes")
    return tuple((name, count) for name, count in json.loads(found)) if found else ()
