"""benchmarks/decode.py on a decoder so small that it takes no time: every engine runs, and ours computes its definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from normfuse import native

pytest.importorskip("onnxruntime")
pytest.importorskip("click")
pytest.importorskip("rich")
pytest.importorskip("benchmarks.decode", reason="the benchmarks are in the repository, not in the package")

from benchmarks import decode, decoder

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "there")
SMALL = decoder.Shape(layers=2, width=128, heads=2, vocabulary=300, room=12)


@pytest.fixture(scope="module")
def weights() -> decoder.Weights:
    return decoder.random_weights(SMALL)


@pytest.mark.parametrize("tied", [pytest.param(True, id="tied"), pytest.param(False, id="untied")])
def test_every_engine_agrees(tied: bool, tmp_path: Path) -> None:
    shape = decoder.Shape(**(SMALL.__dict__ | {"tied": tied}))
    w = decoder.random_weights(shape)
    quantized = {n: decoder.quantized(shape, w, decode.spec(n, 4)) for n in decode.OURS}
    files = {n: decode.make(n, shape, w, tmp_path, quantized.get(n)) for n in decode.TITLES}
    errors = decode.agreement(files, shape, w, quantized)
    assert errors["fp32"]["fp32"] < 1e-5
    for name in decode.OURS:
        assert errors[name]["definition"] < 1e-5
    assert all(e["fp32"] < 0.8 for e in errors.values())


def test_wrong_weights_show(tmp_path: Path, weights: decoder.Weights) -> None:
    """What `agreement` finds is not small for any file."""
    layers = decoder.quantized(SMALL, weights, decode.spec("shiftquant", 8))
    path = decode.make("shiftquant", SMALL, weights, tmp_path, layers)
    assert decode.agreement({"shiftquant": path}, SMALL, weights, {"shiftquant": layers})["shiftquant"]["fp32"] < 0.05
    other = decoder.random_weights(SMALL, seed=1)
    assert decode.agreement({"shiftquant": path}, SMALL, other, {})["shiftquant"]["fp32"] > 0.8


def test_a_timed_call_decodes_behind_the_past(tmp_path: Path, weights: decoder.Weights) -> None:
    layers = decoder.quantized(SMALL, weights, decode.spec("shiftquant", 4))
    path = decode.make("shiftquant", SMALL, weights, tmp_path, layers)
    call = decoder.open_decoder(str(path), SMALL, SMALL.room - 1, 1)
    call()
    session = decoder.Session(path, SMALL, 1)
    first = session.step(3, 0)
    assert torch.equal(session.step(3, 0), first)
    assert not torch.equal(session.step(3, 1), first)


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "Shape", lambda tied: SMALL)
    options = ["--only", "nbits_32", "--only", "shiftquant", "--past", "5", "--threads", "1"]
    assert decode.main([*options, "--seconds", "0.5", "--restarts", "1", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text())
    assert data["base"] == "nbits_32"
    assert data["errors"]["shiftquant"]["definition"] < 1e-5
    assert data["engines"]["shiftquant"]["speedup"]["value"] > 0
