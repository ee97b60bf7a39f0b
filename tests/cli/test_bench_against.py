"""`normfuse bench --against`: several engines in one run, and how close they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from normfuse.benchmark import Comparison, Measurement, Schedule, Verdict
from normfuse.benchmark.against import Against
from normfuse.benchmark.machine import Machine
from tests.cli_runner import Run, runner

MODELS = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    return m, (torch.randn(2, 3, 8, 8),)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    with runner("networks", MODELS, tmp_path, monkeypatch, capsys) as ready:
        yield ready


def compared(*seconds: float) -> list[Comparison]:
    """An engine that takes 1 s against others that take `seconds`."""
    names = tuple(f"engine-of-others-{i}" for i in range(len(seconds)) for _ in range(2))
    row = (*(s for s in seconds for _ in range(2)), 1.0)
    machine = Machine("a processor with a long name that nobody would ever print in full", 2, "Linux", "3.11", {})
    found = Measurement(
        (*names, "onnxruntime-optimized"), (row,) * 6, tuple((t,) * 6 for t in row), 1, (0,), 0.0, machine, Schedule()
    )
    return [Comparison.of(found, a=2 * i, again=2 * i + 1, b=len(row) - 1) for i in range(len(seconds))]


def test_the_claim_is_about_each_of_them() -> None:
    for seconds, verdict in (((2.0, 3.0), Verdict.HOLDS), ((2.0, 0.5), Verdict.FAILS)):
        found = Against(compared(*seconds))
        assert found.verdict is verdict
        assert found.worst.verdict() is verdict
    assert Against(compared(2.0, 3.0), at_least=2.5).verdict is Verdict.FAILS


def test_the_table_fits_a_terminal() -> None:
    quality = {"engine-of-others-0": 33.25, "engine-of-others-1": float("nan"), "onnxruntime-optimized": float("inf")}
    how = {"engine-of-others-0": "static, QDQ, per channel: 1.80 times as fast as dynamic, per channel"}
    found = Against(compared(2.0, 3.0), sqnr=quality, how=how, calibrated="images.npz")
    text = str(found)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("33.2", "not comparable", "exact", "2.000 [2.000, 2.000]", "1.80 times", "images.npz", "holds (engine-"):
        assert part in text, part
    told = json.loads(json.dumps(found.to_dict()))
    assert [c["a"]["name"] for c in told["comparisons"]] == ["engine-of-others-0", "engine-of-others-1"]
    assert told["sqnr"]["engine-of-others-1"] is None
    assert (told["verdict"], told["calibrated_on"]) == ("holds", "images.npz")


def test_of_one_engine_the_entries_stay_where_they_were() -> None:
    told = Against(compared(2.0)).to_dict()
    assert told["a"]["name"] == "engine-of-others-0"
    assert (told["verdict"], told["at_least"]) == ("holds", 1.0)
    assert "comparisons" not in told


def test_a_wrong_name_is_an_error_with_the_right_one(run: Run) -> None:
    code, _, err = run("bench", "networks:build", "--against", "onnxruntime,onnxruntime-in8")
    assert code == 2
    assert "did you mean 'onnxruntime-int8'?" in err


def test_a_missing_library_is_an_error_before_anything_is_made(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from normfuse.app.baselines import BASELINES

    lacking = dataclasses.replace(BASELINES["openvino-int8"], libraries=("no_such_library",))
    monkeypatch.setitem(BASELINES, "openvino-int8", lacking)
    code, out, err = run("bench", "networks:build", "--against", "openvino-int8")
    assert (code, out) == (2, "")
    assert err.splitlines() == ["error: no_such_library is not installed; install it with: pip install 'normfuse[against]'"]


@pytest.mark.slow
def test_a_quantized_model_against_the_quantizer_of_its_runtime(run: Run) -> None:
    pytest.importorskip("onnxruntime")
    common = ("bench", "networks:build", "--quantize", "w8a8,prefer=size", "--rounds", "2", "--warmup", "0", "--threads", "1")
    code, out, _ = run(*common, "--against", "onnxruntime,onnxruntime-int8", "--at-least", "0.000001", "--json")
    assert code == 0
    data = json.loads(out)
    assert [c["a"]["name"] for c in data["comparisons"]] == ["onnxruntime", "onnxruntime-int8"]
    assert data["sqnr"]["onnxruntime"] > 90
    assert 15 < data["sqnr"]["onnxruntime-int8"] < 60
    assert "per channel" in data["how"]["onnxruntime-int8"]
    assert data["calibrated_on"] == "the example inputs"
    assert data["verdict"] == "holds"
