"""What people use today to run a model in few bits on a CPU: the engines that ShiftQuant is measured against.

Each is made from the original's default ONNX export with the tool's own recommended call, and calibrated on the same inputs.
Libraries beyond the extra `benchmarks` (openvino, nncf, torchao) are named in the error of the engine that needs them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import MODELS
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


def _prepared(original: Path, folder: Path) -> Path:
    """The file as the quantizers of ONNX Runtime want it: shapes inferred, constants folded, weights inside."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, whole = folder / "prepared.onnx", folder / "whole.onnx"
    if not path.exists():
        onnx.save(onnx.load(str(original)), str(whole))  # external data is looked for beside a temporary copy
        with _quiet():
            quant_pre_process(str(whole), str(path), skip_symbolic_shape=True)
    return path


def _dynamic(_: str, original: Path, inputs: Arrays, __: list[Arrays], folder: Path) -> Engine:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "ort_dynamic.onnx"
    with _quiet():
        # convolutions of ConvInteger are far slower than in float, so that people leave them out
        quantize_dynamic(
            str(_prepared(original, folder)), str(path), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
    return onnxruntime_engine("ort int8 dynamic", path, inputs)


def _static(reduce_range: bool, _: str, original: Path, inputs: Arrays, calibration: list[Arrays], folder: Path) -> Engine:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> Arrays | None:
            return next(self.batches, None)

    path = folder / f"ort_static_{reduce_range}.onnx"
    with _quiet():
        quantize_static(
            str(_prepared(original, folder)), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            reduce_range=reduce_range, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return onnxruntime_engine("ort int8 QDQ", path, inputs)


def _n_bits(block: int, _: str, original: Path, inputs: Arrays, __: list[Arrays], folder: Path) -> Engine:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    path = folder / f"ort_nbits_{block}.onnx"
    with _quiet():
        quantizer = MatMulNBitsQuantizer(
            onnx.load(str(_prepared(original, folder))), bits=4, block_size=block, is_symmetric=True, accuracy_level=4
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(path), use_external_data_format=False)
    return onnxruntime_engine(f"ort MatMulNBits 4 bit, block {block}", path, inputs)


def _openvino(precision: str, _: str, original: Path, inputs: Arrays, __: list[Arrays], ___: Path) -> Engine:
    return openvino_engine(f"openvino {precision}", original, inputs, precision)


def _openvino_int8(precision: str, name: str, original: Path, inputs: Arrays, calibration: list[Arrays], folder: Path) -> Engine:
    path = folder / "openvino_int8.xml"
    if not path.exists():
        nncf_file(original, [list(each.values()) for each in calibration], path, convolutional=MODELS[name].convolutional)
    return openvino_engine(f"openvino int8, {precision} rest", path, inputs, precision)


def nncf_file(original: Path, calibration: list[list[Any]], path: Path, *, convolutional: bool) -> None:
    """What NNCF makes of a model that OpenVINO reads, by its own recommended call; inputs in the order of the model."""
    import nncf
    import openvino

    with _quiet():
        model = openvino.Core().read_model(str(original))
        names = [port.any_name for port in model.inputs]
        seen = [{n: np.asarray(v) for n, v in zip(names, each, strict=True)} for each in calibration]
        quantized = nncf.quantize(
            model, nncf.Dataset(seen), subset_size=len(seen), model_type=None if convolutional else nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
        )  # fmt: skip
    openvino.save_model(quantized, str(path), compress_to_fp16=False)


def openvino_engine(name: str, path: Path, inputs: Arrays, precision: str) -> Engine:
    """OpenVINO on the CPU with the file at `path`; `precision` (f32, bf16) is that of what is not quantized."""
    return Engine(name, partial(_open_openvino, str(path.resolve()), inputs, precision))


def _open_openvino(path: str, inputs: Arrays, precision: str, threads: int) -> Callable[[], Any]:
    import openvino

    compiled = openvino.Core().compile_model(
        path, "CPU",
        {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision},
    )  # fmt: skip
    request = compiled.create_infer_request()
    values = list(inputs.values())
    return partial(request.infer, values, share_inputs=True, share_outputs=True)


def _torchao(name: str, _: Path, __: Arrays, ___: list[Arrays], ____: Path) -> Engine:
    return Engine("torchao int8 dynamic, compiled", partial(_open_torchao, name))


def _open_torchao(name: str, threads: int) -> Callable[[], Any]:
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    from normfuse.app.engines import callable_engine, compiled

    torch.set_num_threads(threads)
    source = MODELS[name].build()
    module = source.module.requires_grad_(False)
    with _quiet():
        quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return callable_engine("torchao", compiled(module), source.example_inputs).open(threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Tools that log and warn on every layer."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


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
