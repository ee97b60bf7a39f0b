"""Calibration batches of another size than the batch that the model was captured with."""

import logging

import pytest
import torch
from torch import nn

import normfuse
from normfuse import ShiftQuant
from normfuse.errors import UsageError
from tests.passes.quantize.quantized import SIZE, Mlp, draw, entries, made

STATIC = ShiftQuant(weight_bits=8, activations="static", bias_correction=False, migration=False, prefer="size")


class Viewed(nn.Module):
    """Its graph holds the batch size as a number; a second input stays as it is, whatever the batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(48, 5)

    def forward(self, x, scale):
        return self.b(self.a(x * scale).relu().view(x.shape[0], -1))


class Mixed(nn.Module):
    """Captured with one sample its graph takes any number of them, and gives all of them the features of the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x)[torch.arange(x.shape[0])])


def static_scales(gm):
    return [float(t) for name, t in sorted(gm.state_dict().items()) if name.endswith("input_scale")]


def said(caplog):
    return [r.getMessage() for r in caplog.records if "pieces" in r.getMessage()]


@pytest.mark.parametrize("b", [1, 2])
def test_larger_batches_run_in_pieces(b, caplog):
    model, scale = made(Viewed), torch.rand(3, 1) + 1
    data = [draw(4, 3, 6, seed=s) for s in range(3)]
    with caplog.at_level(logging.INFO, "normfuse"):
        cut = normfuse.optimize(model, (draw(b, 3, 6, seed=9), scale), quantize=STATIC, calibration=[(x, scale) for x in data])
    assert said(caplog) == [f"calibration: batches of 4 run in pieces of {b}, the batch size of the example inputs"]
    whole = normfuse.optimize(model, (data[0], scale), quantize=STATIC, calibration=[(x, scale) for x in data])
    assert len(static_scales(cut)) == 2
    assert static_scales(cut) == pytest.approx(static_scales(whole))


def test_samples_that_fill_no_piece_are_dropped(caplog):
    model, scale, x = made(Viewed), torch.ones(3, 1), draw(5, 3, 6)
    x[4] = 1000
    with caplog.at_level(logging.INFO, "normfuse"):
        cut = normfuse.optimize(model, (draw(2, 3, 6), scale), quantize=STATIC, calibration=[(x, scale)])
    assert said(caplog)[0].endswith("of which the last 1 samples are dropped")
    assert max(static_scales(cut)) < 1


def test_a_batch_that_is_too_small_is_an_error():
    model, scale = made(Viewed), torch.ones(3, 1)
    data = [(draw(4, 3, 6), scale), (draw(3, 3, 6), scale)]
    with pytest.raises(UsageError, match=r"batch 1 \(\(3, 3, 6\), \(3, 1\)\) has 3 samples, the model was captured with 4"):
        normfuse.optimize(model, (draw(4, 3, 6), scale), quantize=SIZE, calibration=data)


def test_other_sizes_are_an_error():
    model, scale = made(Viewed), torch.ones(3, 1)
    with pytest.raises(UsageError, match=r"batch 0 .* does not run through the model as it was captured"):
        normfuse.optimize(model, (draw(1, 3, 6), scale), quantize=SIZE, calibration=[(draw(4, 2, 6), torch.ones(2, 1))])


def test_batches_that_would_run_but_mix_samples_are_cut(caplog):
    model, data = made(Mixed), draw(4, 6)
    data[2] *= 50
    with caplog.at_level(logging.INFO, "normfuse"):
        cut = normfuse.optimize(model, (draw(1, 6),), quantize=STATIC, calibration=[data])
    assert len(said(caplog)) == 1
    with torch.no_grad():
        assert max(static_scales(cut)) == pytest.approx(max(float(t.abs().max()) for t in (data, model.a(data))) / 127, rel=1e-4)


@pytest.mark.parametrize("n", [3, 16])
def test_a_graph_that_takes_any_batch_runs_it_whole(n, caplog):
    with caplog.at_level(logging.INFO, "normfuse"):
        fast = normfuse.optimize(made(Mlp), (draw(8, 24),), quantize=SIZE, calibration=[draw(n, 24)])
    assert not said(caplog)
    assert all(not e.kept for e in entries(normfuse.report(fast)))


def test_dynamic_shapes_run_batches_whole(caplog):
    model, scale = made(Viewed), torch.ones(3, 1)
    with caplog.at_level(logging.INFO, "normfuse"):
        fast = normfuse.optimize(
            model, (draw(2, 3, 6), scale), dynamic_shapes=({0: torch.export.Dim("b")}, None), quantize=SIZE,
            calibration=[(draw(n, 3, 6), scale) for n in (5, 1)],
        )  # fmt: skip
    assert not said(caplog)
    with torch.no_grad():
        assert fast(draw(7, 3, 6), scale).shape == (7, 5)
