"""What people use today to run a model in few bits on a CPU: the engines that ShiftQuant is measured against.

Each is made from the original's default ONNX export with the tool's own recommended call, and calibrated on the same inputs;
`normfuse.app.baselines` has those that `normfuse bench --against` knows, too.
Libraries beyond the extra `benchmarks` (openvino, nncf, torchao) are named in the error of the engine that needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import MODELS
from normfuse.app.baselines import (
    Material,
    onnxruntime_dynamic,
    onnxruntime_static,
    openvino_engine,
    openvino_int8,
    prepared,
    quiet,
    write_nncf,
)
from normfuse.app.engines import onnxruntime_engine
from normfuse.benchmark import Engine

__all__ = ["BASELINES", "Baseline", "nncf_file", "openvino_engine"]

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Baseline:
    """One way of others.

    Attributes:
        name: key in tables.
        title: what it is, with its settings.
        make: from the original's ONNX file, its inputs by name, the calibration inputs and a folder: the engine.
    """

    name: str
    title: str
    make: Callable[[str, Path, Arrays, list[Arrays], Path], Engine] = field(repr=False)


def _plain(_: str, original: Path, inputs: Arrays, __: list[Arrays], ___: Path) -> Engine:
    return onnxruntime_engine("ort fp32", original, inputs)


def _material(original: Path, inputs: Arrays, calibration: list[Arrays], folder: Path) -> Material:
    return Material(original, inputs, calibration, folder)


def _dynamic(_: str, original: Path, inputs: Arrays, calibration: list[Arrays], folder: Path) -> Engine:
    path = onnxruntime_dynamic(_material(original, inputs, calibration, folder))
    return onnxruntime_engine("ort int8 dynamic", path, inputs)


def _static(reduce_range: bool, _: str, original: Path, inputs: Arrays, calibration: list[Arrays], folder: Path) -> Engine:
    path = onnxruntime_static(_material(original, inputs, calibration, folder), reduce_range=reduce_range)
    return onnxruntime_engine("ort int8 QDQ", path, inputs)


def _n_bits(block: int, _: str, original: Path, inputs: Arrays, __: list[Arrays], folder: Path) -> Engine:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    path = folder / f"ort_nbits_{block}.onnx"
    source = prepared(_material(original, inputs, [], folder))
    with quiet():
        quantizer = MatMulNBitsQuantizer(onnx.load(str(source)), bits=4, block_size=block, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(path), use_external_data_format=False)
    return onnxruntime_engine(f"ort MatMulNBits 4 bit, block {block}", path, inputs)


def _openvino(precision: str, _: str, original: Path, inputs: Arrays, __: list[Arrays], ___: Path) -> Engine:
    return openvino_engine(f"openvino {precision}", original, inputs, precision)


def _openvino_int8(precision: str, _: str, original: Path, inputs: Arrays, calibration: list[Arrays], folder: Path) -> Engine:
    path = openvino_int8(_material(original, inputs, calibration, folder))
    return openvino_engine(f"openvino int8, {precision} rest", path, inputs, precision)


def nncf_file(original: Path, calibration: list[list[Any]], path: Path, *, convolutional: bool) -> None:
    """What NNCF makes of a model that OpenVINO reads, by its own recommended call; inputs in the order of the model."""
    import openvino

    names = [port.any_name for port in openvino.Core().read_model(str(original)).inputs]
    seen = [{n: np.asarray(v) for n, v in zip(names, each, strict=True)} for each in calibration]
    write_nncf(original, seen, path, transformer=not convolutional)


def _torchao(name: str, _: Path, __: Arrays, ___: list[Arrays], ____: Path) -> Engine:
    return Engine("torchao int8 dynamic, compiled", partial(_open_torchao, name))


def _open_torchao(name: str, threads: int) -> Callable[[], Any]:
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    from normfuse.app.engines import callable_engine, compiled

    torch.set_num_threads(threads)
    source = MODELS[name].build()
    module = source.module.requires_grad_(False)
    with quiet():
        quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return callable_engine("torchao", compiled(module), source.example_inputs).open(threads)


BASELINES: dict[str, Baseline] = {
    b.name: b
    for b in (
        Baseline("ort_fp32", "ONNX Runtime, fp32, full optimization", _plain),
        Baseline("ort_dynamic", "ONNX Runtime, int8 dynamic, per channel", _dynamic),
        Baseline("ort_static", "ONNX Runtime, int8 QDQ, u8s8 per channel", partial(_static, False)),
        Baseline(
            "ort_static_7", "ONNX Runtime, int8 QDQ, u8s8 per channel, weights of 7 bits (reduce_range)", partial(_static, True)
        ),
        Baseline("ort_nbits_128", "ONNX Runtime, MatMulNBits 4 bit, block 128, accuracy level 4", partial(_n_bits, 128)),
        Baseline("ort_nbits_32", "ONNX Runtime, MatMulNBits 4 bit, block 32, accuracy level 4", partial(_n_bits, 32)),
        Baseline("openvino_fp32", "OpenVINO, fp32", partial(_openvino, "f32")),
        Baseline("openvino_bf16", "OpenVINO, bf16", partial(_openvino, "bf16")),
        Baseline("openvino_int8", "OpenVINO, int8 (NNCF), fp32 for the rest", partial(_openvino_int8, "f32")),
        Baseline("openvino_int8_bf16", "OpenVINO, int8 (NNCF), bf16 for the rest", partial(_openvino_int8, "bf16")),
        Baseline("torchao", "torchao, int8 dynamic, torch.compile", _torchao),
    )
}
"""bf16 is an engine of its own only where the CPU has it: OpenVINO computes in fp32 elsewhere."""
