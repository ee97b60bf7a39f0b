"""What counts as a norm, before and after; and reasons in words."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normfuse
from tests.zoo import ZOO


class CastGain(nn.Module):
    """The norm of half-precision models: computed in float32, its gain cast where it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8) + 0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.rms_norm(x.float(), (8,), self.gain.float(), 1e-5).to(x.dtype).tanh())


class Frn(nn.Module):
    """Filter response normalization: a norm by hand, whose gain and shift are arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + 1e-6)
        return torch.maximum(x * self.gain + self.shift, 0.1 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_whose_gain_is_cast_counts_before_and_after(dtype: torch.dtype) -> None:
    fast = normfuse.optimize(CastGain().eval().to(dtype), (torch.randn(2, 3, 8, dtype=dtype),))
    report = normfuse.report(fast)
    assert sum(report.norms_before.values()) == sum(report.norms_after.values()) == 1


def test_arithmetic_is_no_norm() -> None:
    report = normfuse.report(normfuse.optimize(Frn().eval(), (torch.randn(2, 8, 5, 5),)))
    assert "batch_norm" not in report.norms_after
    assert sum(report.norms_after.values()) <= sum(report.norms_before.values())


@pytest.mark.parametrize("name", ["postln_bert", "preln_vit", "swin_like", "cnn_bn", "preln_gpt"])
def test_reasons_hold_no_objects_of_python(name: str) -> None:
    entry = ZOO[name]
    report = normfuse.report(normfuse.optimize(entry.build(), entry.args, verify="off"))
    for site in (*report.refused, *report.applied):
        assert not re.search(r"<\w|0x[0-9a-f]{4}|\bobject at\b", site.note + site.remedy)


def test_a_post_ln_model_has_one_reason_whatever_its_depth() -> None:
    entry = ZOO["postln_bert"]
    text = str(normfuse.report(normfuse.optimize(entry.build(), entry.args, verify="off")))
    assert text.count("(Post-LN)") == 1
