"""Files of models that leave the range of their dtype: what must be the same, and what is said of the rest."""

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from normfuse.errors import ExportError
from normfuse.export import to_onnx
from normfuse.export.onnx import runtime
from normfuse.export.onnx.compare import deviation
from normfuse.export.onnx.out_of_range import finite, within_range
from normfuse.export.onnx.program import program

HUGE = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * 1e30


class RootOfSquares(nn.Module):
    """NaN on what is too small to be squared."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True))


class Logarithm(nn.Module):
    def forward(self, x):
        return torch.log(x)


def test_an_overflow_of_the_module_is_no_fault_of_the_file(tmp_path):
    made = to_onnx(nn.LayerNorm(16).eval(), tmp_path / "m.onnx", example_inputs=(HUGE,), progress=False)
    assert not nn.LayerNorm(16)(HUGE).isfinite().any()  # that is what this is about
    assert made.notes == (
        "on example inputs the module itself leaves the range of float32: 64 of 64 values of output are NaN or infinite in it "
        "and finite in float64; they were not compared; compared on standard normal inputs instead",
    )
    assert made.error.max_rel < 1e-5


def test_a_file_of_infinities_is_compared_on_other_inputs(tmp_path):
    tiny = (HUGE.double() * 1e-70).float()
    made = to_onnx(RootOfSquares().eval(), tmp_path / "m.onnx", example_inputs=(tiny,), progress=False)
    assert any("compared on standard normal inputs instead" in note for note in made.notes)
    assert 0 < made.error.max_rel < 1e-5


def test_where_the_module_is_finite_the_file_must_be(tmp_path, monkeypatch):
    run = runtime.run
    monkeypatch.setattr(
        runtime,
        "run",
        lambda s, feeds: {k: v.index_fill(0, torch.tensor([0]), torch.inf) for k, v in run(s, feeds).items()},
    )
    with pytest.raises(
        ExportError, match="on example inputs 8 of 16 values of output are NaN or infinite in the file and finite in the module"
    ):
        to_onnx(nn.Linear(8, 8).eval(), tmp_path / "m.onnx", example_inputs=(torch.randn(2, 8),), progress=False)
    assert not list(tmp_path.iterdir())


def test_values_that_float64_has_are_left_out_and_others_are_not():
    huge = program(nn.LayerNorm(16).eval(), (HUGE,))
    expected = huge.reference([HUGE])
    found = [torch.zeros(4, 16)]
    judged = within_range(huge, [HUGE], expected, found, "example")
    assert (bool(judged.note), judged.fault) == (True, "")
    assert judged.found[0].isnan().all()

    x = torch.tensor([1.0, -1.0])
    logarithm = program(Logarithm().eval(), (x,))
    expected = logarithm.reference([x])
    judged = within_range(logarithm, [x], expected, [torch.zeros(2)], "example")
    assert (judged.note, judged.fault) == ("", "")  # NaN in float64 too: the file is wrong, and the deviation says so
    assert deviation(expected, judged.found, logarithm.outputs).max_rel == torch.inf


def test_nothing_finite_is_said(tmp_path):
    made = to_onnx(Logarithm().eval(), tmp_path / "m.onnx", example_inputs=(-torch.rand(4) - 1e9,), progress=False)
    assert any("compared on standard normal inputs instead" in note for note in made.notes)
    assert not finite([torch.full((2,), torch.nan)])
    assert finite([torch.tensor([torch.nan, 1.0])])
    assert finite([torch.tensor([1])])


def test_denormals_have_the_precision_of_the_smallest_normal_number():
    """A unit in the last place of 1e-43 is one per cent of it, which no bound on a relative error takes."""
    a, b = torch.tensor([1e-43, 2e-43]), torch.tensor([1.02e-43, 2e-43])
    assert 0 < deviation([a], [b], ["y"]).max_rel < 1e-6
    assert deviation([a], [torch.tensor([1e-38, 2e-43])], ["y"]).max_rel > 0.5
