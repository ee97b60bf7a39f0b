"""What people take today to run a model in 8 bits on a CPU, made the way the tools themselves recommend.

A baseline is one record in `BASELINES`: its name, the libraries that it needs, and how it is made from the model as everybody
exports it. `normfuse bench --against` and `benchmarks.quantized` share it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from normfuse.app.engines import onnxruntime_engine
from normfuse.benchmark import Engine
from normfuse.benchmark.turns import in_turns
from normfuse.errors import NormfuseError, UsageError
from normfuse.extras import need
from normfuse.files import spelled

__all__ = [
    "BASELINES", "Baseline", "Made", "Material", "is_transformer", "named_arrays", "onnxruntime_dynamic", "onnxruntime_static",
    "openvino_engine", "openvino_int8", "prepared", "quiet", "write_nncf",
]  # fmt: skip

Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"

EXTRA = "against"
_TURNS = 5  # of two calls: enough to tell two quantizers of one runtime apart, which differ by tens of percent
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """What a baseline is made of.

    Attributes:
        original: the model as `torch.onnx.export` writes it.
        inputs: what the engine is fed with, by the names of the file.
        calibration: batches of the same kind.
        folder: for files.
        threads: of the engine; None for one for each core.
    """

    original: Path
    inputs: Arrays
    calibration: Sequence[Arrays]
    folder: Path
    threads: int | None = None


@dataclass(frozen=True)
class Made:
    """An engine, and how it was made in a few words."""

    engine: Engine
    how: str


@dataclass(frozen=True)
class Baseline:
    """One way of others.

    Attributes:
        name: what the user writes.
        what: what it is, in a line of the help.
        libraries: modules that it imports, all of the extra `against`.
        make: the engine.
    """

    name: str
    what: str
    libraries: tuple[str, ...]
    make: Callable[[Material], Made] = field(repr=False)

    def made(self, material: Material) -> Made:
        """The engine.

        Raises:
            MissingExtra: a library is not installed; the message has the pip line.
            NormfuseError: the tool fails on the model.
        """
        self.check()
        try:
            return self.make(material)
        except NormfuseError:
            raise
        except Exception as e:  # a tool of others may fail in any way
            said = " ".join(str(e).split())[:300]
            raise NormfuseError(f"{self.name} cannot quantize this model: {type(e).__name__}: {said}") from e

    def check(self) -> None:
        """Raise `MissingExtra` where a library is not installed."""
        os.environ.setdefault("NNCF_CI", "1")  # it sends telemetry otherwise
        with quiet():
            for library in self.libraries:
                need(library, extra=EXTRA)


# -- ONNX Runtime ----------------------------------------------------------------------------------------------------------


def _onnxruntime_int8(material: Material) -> Made:
    """Dynamic and static; the one that is faster here."""
    ways = [("dynamic", onnxruntime_dynamic)] if _has(material.original, "MatMul", "Gemm") else []
    ways.append(("static, QDQ", onnxruntime_static))
    made, failed = [], ""
    for how, make in ways:
        try:
            path = make(material)
            made.append((f"{how}, per channel", onnxruntime_engine("onnxruntime-int8", path, material.inputs, kernels=False)))
        except Exception as e:  # a tool of others may fail in any way; the other way may do
            failed = f"{how}: {type(e).__name__}: {' '.join(str(e).split())[:200]}"
            _log.info("onnxruntime-int8, %s", failed)
    if not made:
        raise NormfuseError(f"onnxruntime-int8 cannot quantize this model: {failed}")
    if len(made) == 1:
        return Made(made[0][1], f"{made[0][0]}{f' ({failed})' if failed else ''}")
    (how, a), (other, b) = made
    first, second = _fastest(a, b, material.threads)
    if second < first:
        (how, a), (other, b) = (other, b), (how, a)
    return Made(a, f"{how}: {max(first, second) / min(first, second):.2f} times as fast as {other}")


def _fastest(a: Engine, b: Engine, threads: int | None) -> tuple[float, float]:
    """The fewest seconds of a call of each."""
    from normfuse.benchmark.machine import cores

    calls = [e.open(threads or len(cores())) for e in (a, b)]
    for call in calls:
        call()
    turns = list(islice(in_turns(*calls), _TURNS))
    return min(t for t, _ in turns), min(t for _, t in turns)


def prepared(material: Material) -> Path:
    """The file as the quantizers of ONNX Runtime want it: shapes inferred, constants folded, weights inside."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    onnx = need("onnx", extra="onnx")
    path, whole = material.folder / "prepared.onnx", material.folder / "whole.onnx"
    if not path.exists():
        onnx.save(onnx.load(str(material.original)), str(whole))  # external data is looked for beside a temporary copy
        with quiet():
            quant_pre_process(str(whole), str(path), skip_symbolic_shape=True)
    return path


def onnxruntime_dynamic(material: Material) -> Path:
    """`quantize_dynamic`: scales of activations are found at run time. Products only: convolutions are far slower so."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path, source = material.folder / "ort_dynamic.onnx", prepared(material)
    with quiet():
        quantize_dynamic(
            str(source), str(path), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
        )
    return path


def onnxruntime_static(material: Material, *, reduce_range: bool = False) -> Path:
    """`quantize_static`: QDQ, unsigned activations, signed weights by channel; `reduce_range` gives these 7 bits."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(material.calibration)

        def get_next(self) -> Arrays | None:
            return next(self.batches, None)

    path, source = material.folder / f"ort_static{'_7' if reduce_range else ''}.onnx", prepared(material)
    with quiet():
        quantize_static(
            str(source), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=reduce_range,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return path


# -- OpenVINO --------------------------------------------------------------------------------------------------------------


def _openvino_int8(material: Material) -> Made:
    path = openvino_int8(material)
    kind = "transformer" if is_transformer(material.original) else "mixed preset"
    return Made(
        openvino_engine("openvino-int8", path, material.inputs), f"NNCF post-training quantization, {kind}; the rest in float32"
    )


def openvino_int8(material: Material) -> Path:
    """`nncf.quantize`, told whether it is a transformer."""
    path = material.folder / "openvino_int8.xml"
    if not path.exists():
        write_nncf(material.original, material.calibration, path, transformer=is_transformer(material.original))
    return path


def write_nncf(original: Path, calibration: Sequence[Arrays], path: Path, *, transformer: bool) -> None:
    """What NNCF makes of a model that OpenVINO reads, by its own recommended call, as an `.xml` file."""
    nncf, ov = need("nncf", extra=EXTRA), need("openvino", extra=EXTRA)
    with quiet():
        nncf.set_log_level(logging.ERROR)
        quantized = nncf.quantize(
            ov.Core().read_model(spelled(original)), nncf.Dataset(list(calibration)), subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None, preset=nncf.QuantizationPreset.MIXED,
        )  # fmt: skip
        ov.save_model(quantized, str(path), compress_to_fp16=False)


def openvino_engine(name: str, path: Path, inputs: Arrays, precision: str = "f32") -> Engine:
    """OpenVINO on the CPU with the file at `path`; `precision` (f32, bf16) is that of what is not quantized."""
    return Engine(name, partial(_open_openvino, str(path.resolve()), inputs, precision))


def _open_openvino(path: str, inputs: Arrays, precision: str, threads: int) -> Callable[[], Any]:
    ov = need("openvino", extra=EXTRA)
    config = {
        "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision
    }  # fmt: skip
    try:
        request = ov.Core().compile_model(path, "CPU", config).create_infer_request()
    except Exception as e:
        raise NormfuseError(f"OpenVINO cannot load {path}: {' '.join(str(e).split())[:300]}") from e
    return partial(request.infer, list(inputs.values()), share_inputs=True, share_outputs=True)


# -- the model -------------------------------------------------------------------------------------------------------------


def named_arrays(path: Path, given: Any) -> Arrays:
    """Tensors by position or by name as arrays by the names of the file; flags among them are none of its inputs."""
    model = need("onnx", extra="onnx").load(str(path), load_external_data=False)
    wanted = [i.name for i in model.graph.input]
    tensors = {k: v.detach().cpu().numpy() for k, v in _items(given) if hasattr(v, "detach")}
    if set(wanted) <= tensors.keys():
        return {name: tensors[name] for name in wanted}
    if len(tensors) != len(wanted):
        raise UsageError(f"the model takes {len(wanted)} inputs ({', '.join(wanted)}), and a batch has {len(tensors)}")
    return dict(zip(wanted, tensors.values(), strict=True))


def _items(given: Any) -> Iterator[tuple[Any, Any]]:
    if hasattr(given, "items"):
        yield from given.items()
    else:
        yield from enumerate(given if isinstance(given, (tuple, list)) else (given,))


def is_transformer(path: Path) -> bool:
    """It has attention: a Softmax, or an operator that holds one."""
    return _has(path, "Softmax", "Attention", "MultiHeadAttention", "GroupQueryAttention")


def _has(path: Path, *kinds: str) -> bool:
    model = need("onnx", extra="onnx").load(str(path), load_external_data=False)
    return any(n.op_type in kinds for n in (*model.graph.node, *(n for f in model.functions for n in f.node)))


@contextmanager
def quiet() -> Iterator[None]:
    """Tools that log, warn and print on every layer."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


BASELINES: dict[str, Baseline] = {
    b.name: b
    for b in (
        Baseline(
            "onnxruntime-int8",
            "ONNX Runtime's own quantizer, dynamic or static QDQ, the one that is faster",
            ("onnx", "onnxruntime"),
            _onnxruntime_int8,
        ),
        Baseline("openvino-int8", "OpenVINO behind NNCF's post-training quantization", ("openvino", "nncf"), _openvino_int8),
    )
}
