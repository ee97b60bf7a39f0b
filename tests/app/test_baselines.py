"""The quantizers of others, as `normfuse bench --against` makes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normfuse.app import baselines
from normfuse.app.baselines import BASELINES, Material, is_transformer, named_arrays
from normfuse.app.engines import export_original
from normfuse.app.rivals import float_outputs, sqnr_of
from normfuse.app.sources import Source
from normfuse.errors import MissingExtra, NormfuseError, UsageError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        return self.out(torch.softmax(q @ q.transpose(1, 2), -1) @ x)


def material(model: nn.Module, x: Tensor, folder: Path) -> tuple[Source, Material]:
    torch.manual_seed(0)
    source, path = Source("model", model.eval(), (x,)), folder / "original.onnx"
    export_original(source, path)
    data = [named_arrays(path, (torch.randn(x.shape, generator=torch.Generator().manual_seed(i)),)) for i in range(3)]
    return source, Material(path, named_arrays(path, (x,)), data, folder, threads=1)


def quality(source: Source, made: Any) -> float:
    return sqnr_of(made.engine, float_outputs(source.module, source.args, source.kwargs), 1)


def test_onnxruntime_takes_the_faster_of_its_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, given = material(Convs(), torch.randn(1, 3, 12, 12), tmp_path)
    for times, how in (((1.0, 2.0), "dynamic, per channel: 2.00"), ((3.0, 2.0), "static, QDQ, per channel: 1.50")):
        monkeypatch.setattr(baselines, "_fastest", lambda a, b, threads, times=times: times)
        made = BASELINES["onnxruntime-int8"].made(given)
        assert made.how.startswith(how)
        assert 15 < quality(source, made) < 70


def test_a_network_without_products_is_quantized_statically(tmp_path: Path) -> None:
    source, given = material(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.randn(1, 3, 9, 9), tmp_path)
    made = BASELINES["onnxruntime-int8"].made(given)
    assert made.how == "static, QDQ, per channel"
    assert 15 < quality(source, made) < 70


def test_transformers_are_known_by_their_attention(tmp_path: Path) -> None:
    _, given = material(Attends(), torch.randn(1, 4, 16), tmp_path)
    assert is_transformer(given.original)
    (tmp_path / "other").mkdir()
    _, given = material(Convs(), torch.randn(1, 3, 12, 12), tmp_path / "other")
    assert not is_transformer(given.original)


def test_openvino_is_quantized_by_nncf(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    pytest.importorskip("openvino")
    source, given = material(Convs(), torch.randn(1, 3, 12, 12), tmp_path)
    made = BASELINES["openvino-int8"].made(given)
    assert "NNCF" in made.how
    assert 15 < quality(source, made) < 70


def test_a_missing_library_is_named_with_its_pip_line() -> None:
    baseline = dataclasses.replace(BASELINES["openvino-int8"], libraries=("no_such_library",))
    with pytest.raises(MissingExtra, match=r"no_such_library is not installed.*pip install 'normfuse\[against\]'"):
        baseline.check()


def test_what_a_tool_of_others_says_is_told_in_a_sentence(tmp_path: Path) -> None:
    def fails(_: Material) -> Any:
        raise RuntimeError("of\nits own")

    baseline = dataclasses.replace(BASELINES["onnxruntime-int8"], make=fails)
    with pytest.raises(NormfuseError, match="onnxruntime-int8 cannot quantize this model: RuntimeError: of its own"):
        baseline.made(Material(tmp_path / "x.onnx", {}, [], tmp_path))


def test_batches_are_read_by_name_and_by_position(tmp_path: Path) -> None:
    _, given = material(Convs(), torch.randn(1, 3, 12, 12), tmp_path)
    x = torch.ones(1, 3, 12, 12)
    (name,) = given.inputs
    for batch in ({name: x, "labels": torch.ones(1)}, (x,), x, {"other": x}):
        assert np.array_equal(named_arrays(given.original, batch)[name], x.numpy())
    with pytest.raises(UsageError, match=r"takes 1 inputs .*a batch has 2"):
        named_arrays(given.original, (x, x))


def test_outputs_of_another_shape_are_not_compared() -> None:
    engine = type("E", (), {"open": staticmethod(lambda threads: lambda: [np.ones((2, 3), np.float32)])})
    assert np.isnan(sqnr_of(engine, [np.ones((3, 2), np.float32)], 1))
    assert sqnr_of(engine, [np.ones((2, 3), np.float32)], 1) == np.inf
