"""The ways that docs/comparison.md compares: each names what anybody runs, and does it.

They stand apart from the command, so that other processes find their functions by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import normfuse
from benchmarks.baselines import BASELINES
from benchmarks.models import MODELS, Entry
from normfuse.app.engines import callable_engine, compiled, onnxruntime_engine
from normfuse.app.sources import Source
from normfuse.benchmark import Engine
from normfuse.export import to_onnx
from normfuse.quant.words import parse_quantize

__all__ = ["WAYS", "Given", "Way"]

# weights are random: what a better rounding would win does not show, and its search takes minutes
_W8 = "w8a8,groups=1,size,nearest,migration=false"
_W4 = "w4a8,size,nearest,migration=false"


@dataclass(frozen=True)
class Given:
    """What every way starts from: the model, its default export, its inputs by name, samples to calibrate on, and a folder."""

    entry: Entry
    source: Source
    original: Path
    inputs: dict[str, np.ndarray[Any, Any]]
    calibration: list[dict[str, np.ndarray[Any, Any]]]
    folder: Path
    optimized: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """One way to a faster model.

    Attributes:
        title: tool and setting.
        command: what anybody runs, on the files of this comparison.
        make: the file that it writes, and how the file is run; no file for what runs in PyTorch.
        exact: it is meant to be the same function.
    """

    title: str
    command: str
    make: Callable[[Given], tuple[Path | None, Engine]]
    exact: bool = True


def _session(
    title: str, make: Callable[[Given, Path], None], *, kernels: bool = True
) -> Callable[[Given], tuple[Path | None, Engine]]:
    def made(given: Given) -> tuple[Path | None, Engine]:
        path = given.folder / f"{title.replace(' ', '_').replace('/', '_').replace(',', '')}.onnx"
        make(given, path)
        return path, onnxruntime_engine(title, path, given.inputs, kernels=kernels)

    return made


def _slim(given: Given, path: Path) -> None:
    import onnxslim

    onnxslim.slim(str(given.original), str(path))


def _sim(given: Given, path: Path) -> None:
    import onnx
    import onnxsim

    model, right = onnxsim.simplify(onnx.load(str(given.original)))
    if not right:
        raise RuntimeError("onnxsim's own check failed")
    onnx.save(model, str(path))


def _transformers_optimizer(given: Given, path: Path) -> None:
    from onnxruntime.transformers.optimizer import optimize_model

    if given.entry.convolutional:
        raise RuntimeError("it is for transformers")
    optimize_model(str(given.original), model_type="vit" if "vit" in given.entry.name else "bert").save_model_to_file(str(path))


def _ours(words: str | None, form: str, given: Given, path: Path) -> None:
    if words not in given.optimized:
        spec = None if words is None else parse_quantize(words)
        data = None if spec is None else [tuple(map(torch.from_numpy, c.values())) for c in given.calibration]
        given.optimized[words] = normfuse.optimize(given.source.model, given.source.example_inputs, quantize=spec, calibration=data)
    options: dict[str, Any] = {} if words is None else {"form": form}
    to_onnx(given.optimized[words], path, progress=False, **options)


def _open_compiled(name: str, threads: int) -> Callable[[], Any]:
    torch.set_num_threads(threads)
    source = MODELS[name].build()
    return callable_engine("torch.compile", compiled(source.module), source.example_inputs).open(threads)


def _compiled(given: Given) -> tuple[Path | None, Engine]:
    return None, Engine("torch.compile", partial(_open_compiled, given.entry.name))


def _baseline(name: str, file: str | None, given: Given) -> tuple[Path | None, Engine]:
    engine = BASELINES[name].make(given.entry.name, given.original, given.inputs, given.calibration, given.folder)
    return None if file is None else given.folder / file, engine


WAYS = (
    Way("onnxslim", "onnxslim original.onnx slim.onnx", _session("onnxslim", _slim)),
    Way("onnxsim", "onnxsim original.onnx sim.onnx", _session("onnxsim", _sim)),
    Way(
        "ONNX Runtime's transformer optimizer",
        "python -m onnxruntime.transformers.optimizer --input original.onnx --output o.onnx --model_type vit",
        _session("ORT transformer optimizer", _transformers_optimizer),
    ),
    Way("torch.compile (Inductor)", "torch.compile(model, dynamic=False)", _compiled),
    Way("OpenVINO, fp32", "openvino.Core().compile_model('original.onnx', 'CPU')", partial(_baseline, "openvino_fp32", None)),
    Way("**normfuse, fp32**", "normfuse export SOURCE -o fast.onnx", _session("normfuse fp32", partial(_ours, None, ""))),
    Way(
        "ONNX Runtime, int8 dynamic", "onnxruntime.quantization.quantize_dynamic(…, per_channel=True)",
        partial(_baseline, "ort_dynamic", "ort_dynamic.onnx"), exact=False,
    ),
    Way(
        "ONNX Runtime, int8 static (QDQ)", "onnxruntime.quantization.quantize_static(…, QuantFormat.QDQ, per_channel=True)",
        partial(_baseline, "ort_static", "ort_static.onnx"), exact=False,
    ),
    Way(
        "OpenVINO, int8 (NNCF)", "nncf.quantize(model, nncf.Dataset(samples))",
        partial(_baseline, "openvino_int8", None), exact=False,
    ),
    Way(
        "torchao, int8 dynamic, compiled", "torchao.quantization.quantize_(model, Int8DynamicActivationInt8WeightConfig())",
        partial(_baseline, "torchao", None), exact=False,
    ),
    Way(
        "**normfuse, W8A8**, with its library", f"normfuse export SOURCE -o q.onnx --quantize {_W8}",
        _session("normfuse W8A8", partial(_ours, _W8, "native")), exact=False,
    ),
    Way(
        "**normfuse, W8A8**, stock ONNX Runtime", f"normfuse export SOURCE -o q.onnx --quantize {_W8} --form integer",
        _session("normfuse W8A8 integer", partial(_ours, _W8, "integer")), exact=False,
    ),
    Way(
        "**normfuse, W4A8**, with its library", f"normfuse export SOURCE -o q.onnx --quantize {_W4}",
        _session("normfuse W4A8", partial(_ours, _W4, "native")), exact=False,
    ),
)  # fmt: skip
