"""What a quantized model was calibrated on: said, refused where it is one random input, labels left out."""

import pytest
import torch
from torch import nn

import normfuse
from normfuse import ShiftQuant, UsageError
from tests.passes.quantize.quantized import SIZE, Mlp, draw, made

STATIC = ShiftQuant(weight_bits=8, activations="static", prefer="size")


def test_static_scales_without_data_are_refused() -> None:
    model, x = made(Mlp), draw(8, 24)
    with pytest.raises(UsageError, match=r"takes its scales from data.*calibration=\[example_inputs\].*allow_random_calibration"):
        normfuse.optimize(model, (x,), quantize=STATIC)
    mixed = ShiftQuant(prefer="size", overrides={"*": {"activations": "static"}})
    with pytest.raises(UsageError, match="takes its scales from data"):
        normfuse.optimize(model, (x,), quantize=mixed)


def test_report_says_what_it_was_calibrated_on() -> None:
    model, x = made(Mlp), draw(8, 24)
    allowed = normfuse.optimize(model, (x,), quantize=STATIC, allow_random_calibration=True)
    assert str(normfuse.report(allowed).calibration) == "the example inputs (8 samples)"
    given = normfuse.optimize(model, (x,), quantize=SIZE, calibration=[draw(8, 24, seed=s) for s in range(3)])
    report = normfuse.report(given)
    assert str(report.calibration) == "24 samples of calibration="
    assert f"outputs: {report.sqnr:.1f} dB against the original (SQNR), on 24 samples of" in " ".join(str(report).split())
    assert not any("SQNR" in note for note in report.notes)
    assert "drift" not in str(report)


class Positional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(24, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.f(images)


@pytest.mark.parametrize(
    ("example", "batch", "note"),
    [
        pytest.param((draw(4, 24),), (draw(4, 24), torch.arange(4)), "only the first entry of each batch", id="image and label"),
        pytest.param((draw(4, 24),), [draw(4, 24), torch.arange(4), "name"], "only the first entry of each batch", id="list"),
        pytest.param(
            {"images": draw(4, 24)},
            {"images": draw(4, 24), "labels": torch.arange(4)},
            "'labels' of each batch left out",
            id="dict",
        ),
        pytest.param(
            (draw(4, 24),), {"labels": torch.arange(4), "images": draw(4, 24)}, "'labels' of each batch left out", id="by name"
        ),
    ],
)
def test_what_the_model_does_not_take_is_left_out_with_a_note(example: object, batch: object, note: str) -> None:
    fast = normfuse.optimize(Positional().eval(), example, quantize=SIZE, calibration=[batch, batch])
    notes = [n for n in normfuse.report(fast).notes if n.startswith("calibration")]
    assert len(notes) == 1
    assert note in notes[0]
    assert str(normfuse.report(fast).calibration) == "8 samples of calibration="


def test_a_batch_with_too_little_is_still_refused() -> None:
    with pytest.raises(UsageError, match=r"calibration: batch 0"):
        normfuse.optimize(Positional().eval(), {"images": draw(4, 24)}, quantize=SIZE, calibration=[{"labels": torch.arange(4)}])
