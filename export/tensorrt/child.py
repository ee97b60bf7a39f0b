"""The process that holds TensorRT: `python -m normfuse.export.tensorrt.child REQUEST.json ANSWER.json`.

Native code of a builder may abort, and no Python can catch that; here it takes nothing with it but this process. PyTorch is not
loaded, so that a large model is in memory once. What it is asked for and what it answers are plain JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from normfuse.errors import ExportError
from normfuse.export.tensorrt.flavour import load

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Do the work that the request in the file `arguments[0]` asks for, and write down the answer; gives the exit code."""
    _same_addresses(arguments)
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    try:
        answer = _WORK[request["work"]](request)
    except OSError as e:
        answer = {"error": {"kind": "write", "text": e.strerror or str(e)}}
    except ExportError as e:
        answer = {"error": {"kind": "load", "text": str(e)}}
    except Exception as e:  # a binding that changed; the parent shows the last line and logs the rest
        answer = {"error": {"kind": "unexpected", "text": f"{type(e).__name__}: {e}", "trace": traceback.format_exc()}}
    Path(arguments[1]).write_text(json.dumps(answer), encoding="utf-8")
    return 0


def _same_addresses(arguments: list[str]) -> None:
    """Start again with memory at the same addresses each time, where Linux allows it.

    The builder of TensorRT for RTX orders some of its names by address: the same model gave two different files, now it gives one.
    """
    fixed, ask = 0x0040000, 0xFFFFFFFF  # ADDR_NO_RANDOMIZE; a question that changes nothing
    if not sys.platform.startswith("linux"):
        return
    personality = ctypes.CDLL(None).personality
    now = personality(ctypes.c_ulong(ask))
    # a container may forbid it: then the file is as good, and its hash may differ from another build's
    if now == -1 or now & fixed or personality(ctypes.c_ulong(now | fixed)) == -1:
        return
    os.execv(sys.executable, [sys.executable, "-m", "normfuse.export.tensorrt.child", *arguments])


def _logger(trt: Any, path: str | None) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Errors and the list of layers in memory, everything else in the file: a verbose log is as large as a small model."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.file = None if path is None else Path(path).open("w", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.facts: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            level = int(severity)
            if level <= int(trt.ILogger.ERROR):
                self.errors.append(text)
            elif level == int(trt.ILogger.WARNING):
                self.warnings.append(text)
            elif text.startswith(("Layers:", "Total Weights Memory", "Total Activation Memory")):
                self.facts.append(text)
            if self.file is not None:
                self.file.write(f"[{_LEVELS[min(level, 4)]}] {text}\n")

        def close(self) -> None:
            if self.file is not None:
                self.file.close()

    return Logger()


_LEVELS = ("fatal", "error", "warning", "info", "verbose")


def _parsed(trt: Any, request: dict[str, Any], logger: Any) -> tuple[Any, Any, Any, bool]:
    """Builder, network, parser, and whether the file was taken."""
    if request.get("plugins"):
        from normfuse.export.tensorrt.plugins import register

        register(trt)
    builder = trt.Builder(logger)
    if not builder:
        raise ExportError(f"{trt.__name__} made no builder: {_last(logger.errors)}")
    strong = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(strong))
    parser = trt.OnnxParser(network, logger)
    return builder, network, parser, bool(parser.parse_from_file(request["onnx"]))


def _build(request: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    trt = load(request["module"])
    logger = _logger(trt, request["log"])
    try:
        builder, network, parser, taken = _parsed(trt, request, logger)
        if not taken:
            return {"error": {"kind": "parse", "nodes": _errors(parser), "text": _last(logger.errors)}}
        _let_attention_decompose(trt, network)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        profile = builder.create_optimization_profile()
        for name, sizes in request["profiles"].items():
            profile.set_shape(name, *map(tuple, sizes))
        if request["profiles"]:
            config.add_optimization_profile(profile)
        problem = _aim(trt, config, request["capabilities"])
        if problem:
            return {"error": {"kind": "capability", "text": problem}}
        parsed = time.perf_counter()
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            return {"error": {"kind": "build", "text": _said(logger.errors)}}
        answer = {
            "version": trt.__version__,
            "inputs": [_signature(network.get_input(i)) for i in range(network.num_inputs)],
            "outputs": [_signature(network.get_output(i)) for i in range(network.num_outputs)],
            "network_layers": network.num_layers,
            "facts": logger.facts,
            "warnings": logger.warnings,
            "seconds": {"parse": parsed - start, "build": time.perf_counter() - parsed},
        }
        del parser, network
        gc.collect()
        with Path(request["plan"]).open("wb") as out:
            out.write(plan)
        return answer
    finally:
        logger.close()


def _aim(trt: Any, config: Any, capabilities: list[str]) -> str:
    """Set the compute capabilities; what is wrong with them, or nothing."""
    if not capabilities:
        return ""
    if not hasattr(trt, "ComputeCapability"):
        return f"{trt.__name__} builds for the GPU that it finds: leave --capability out"
    known = {name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    config.num_compute_capabilities = len(capabilities)
    for i, text in enumerate(capabilities):
        name = f"SM{text.replace('.', '')}"
        if name not in known or not config.set_compute_capability(getattr(trt.ComputeCapability, name), i):
            takes = ", ".join(sorted((f"{n[2:-1]}.{n[-1]}" for n in known), key=float))
            return f"{trt.__name__} {trt.__version__} does not build for compute capability {text}; it builds for {takes}"
    return ""


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Where there is no fused kernel (float32), TensorRT may spell attention out; without this it refuses the node."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the binding returns the base class
            layer.attention.decomposable = True


def _signature(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": _dtype(tensor.dtype), "shape": list(tensor.shape)}


def _dtype(dtype: Any) -> str:
    name = str(dtype).rpartition(".")[2].lower()
    return {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}.get(name, name)


def _errors(parser: Any) -> list[dict[str, str]]:
    found = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        found.append({"node": error.node_name(), "op": error.node_operator(), "text": error.desc(), "code": str(error.code())})
    return found


def _last(errors: list[str]) -> str:
    return errors[-1] if errors else ""


def _said(errors: list[str]) -> str:
    """The first error that is not a sequel: on a machine without a GPU every error is followed by one about CUDA."""
    real = [e for e in errors if "cudaError" not in e and "ScopedCuda" not in e]
    return (real or errors or [""])[0]


def _support(request: dict[str, Any]) -> dict[str, Any]:
    """Which nodes the parser takes, without building."""
    trt = load(request["module"])
    logger = _logger(trt, None)
    _, network, parser, taken = _parsed(trt, request, logger)
    first = {"taken": taken, "errors": _errors(parser), "layers": network.num_layers, "version": trt.__version__}
    if taken:
        return first
    # A parser stops at what it does not know; asked about the whole model it names every such node.
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    whole = Path(request["onnx"]).read_bytes()
    ask = getattr(parser, "supports_model_v2", None)
    if ask is not None:
        ask(whole, request["onnx"])
        refused = _errors(parser)
        if refused:
            first["errors"] = refused
    return first


def _validity(request: dict[str, Any]) -> dict[str, Any]:
    """What the runtime says of an engine, and with a GPU the engine inspector."""
    trt = load(request["module"])
    logger = _logger(trt, None)
    plan = Path(request["plan"]).read_bytes()
    runtime = trt.Runtime(logger)
    answer: dict[str, Any] = {"version": trt.__version__}
    if request.get("plugins"):
        from normfuse.export.tensorrt.plugins import register

        register(trt)
    if hasattr(runtime, "get_engine_validity"):
        verdict, diagnostics = runtime.get_engine_validity(plan)
        answer |= {"validity": str(verdict).rpartition(".")[2], "diagnostics": int(diagnostics)}
    if not request["gpu"]:
        return answer
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return answer | {"refused": _said(logger.errors)}
    inspector = engine.create_engine_inspector()
    answer["inspector"] = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    return answer


_WORK = {"build": _build, "support": _support, "validity": _validity}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
