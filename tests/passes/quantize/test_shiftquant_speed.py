"""Which measurements of a layer are believed and kept, with times that no clock has made."""

import math
import random

import pytest
import torch
from torch import nn

import normfuse
from normfuse import ShiftQuant, cache, native
from normfuse.passes.quantize import speed
from normfuse.passes.quantize.shiftquant import ShiftQuantize
from normfuse.passes.quantize.speed import Rounds, decided

pytestmark = pytest.mark.skipif(not native.available(), reason="layers are timed where the native kernels are built")


def times(ratio, noise=0.01, count=40, disturbed=False, seed=0):
    """Rounds in which integers are `ratio` times as fast as floats, with that much noise."""
    rng = random.Random(seed)
    one = lambda base: base * math.exp(noise * rng.gauss(0, 1))  # noqa: E731
    return Rounds(tuple((one(1e-3), one(1e-3), one(1e-3 / ratio)) for _ in range(count)), disturbed)


@pytest.mark.parametrize(
    ("found", "is_decided", "is_slower"),
    [
        pytest.param(times(2.0), True, False, id="faster"),
        pytest.param(times(0.5), True, True, id="slower"),
        pytest.param(times(0.97), True, False, id="slower by less than is worth a layer"),
        pytest.param(times(1.0), False, False, id="alike"),
        pytest.param(times(0.9, noise=0.5), False, False, id="floats differ from themselves by more"),
        pytest.param(times(0.96, disturbed=True), False, False, id="others used the CPU"),
        pytest.param(times(0.5, disturbed=True), True, True, id="more than others explain"),
    ],
)
def test_a_ratio_is_decided_where_it_is_more_than_noise(found, is_decided, is_slower):
    made = decided(found)
    assert (made.decided, made.slower) == (is_decided, is_slower)


@pytest.fixture
def quantized(monkeypatch, tmp_path):
    """Quantizes one layer with the given times; how often it was timed, and its entry of the report."""
    monkeypatch.setenv("NORMFUSE_CACHE", str(tmp_path))

    def run(found):
        asked = []
        monkeypatch.setattr(speed, "rounds", lambda integers, floats, seconds: asked.append(seconds) or found)
        model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval(), torch.randn(8, 16)
        made = normfuse.optimize(model, (x,), passes=["default", ShiftQuantize(ShiftQuant(groups=1, prefer="speed"))])
        return len(asked), next(e for e in normfuse.report(made).quantization if e.path == "2")

    return run


def test_a_busy_machine_is_not_remembered(quantized):
    busy = times(0.7, noise=0.8)
    assert not decided(busy).decided
    count, entry = quantized(busy)
    assert count == 2 * len(speed._SECONDS)  # two kinds of layers: with and without the activation
    assert not entry.kept
    count, entry = quantized(times(0.5))  # the same layers later, on a quiet machine
    assert count == 2
    assert entry.kept == "measured 0.50 times as fast as in float on this machine"
    count, entry = quantized(times(3.0))  # what is decided stays
    assert count == 0
    assert entry.kept


def test_what_a_clock_kept_without_deciding_is_not_read(quantized, monkeypatch):
    read = cache.measurement
    kinds = []
    monkeypatch.setattr(speed, "measurement", lambda kind, key: kinds.append(kind) or read(kind, key))
    quantized(times(2.0))
    assert set(kinds) == {"speed-2"}


def test_a_model_that_is_slower_in_integers_stays_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr(speed, "rounds", lambda integers, floats, seconds: times(0.5))
    model, x = nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(8, 16)
    made = normfuse.optimize(model, (x,), quantize="w8a8")
    torch.testing.assert_close(made(x), model(x))
    assert [e.kept for e in normfuse.report(made).quantization if e.kind == "linear"] == [
        "measured 0.50 times as fast as in float on this machine"
    ]
    assert "nothing is quantized" in caplog.text
