"""Kernels in the returned module: where a clock says that they are faster, and the reason where it does not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normfuse
from normfuse import native
from normfuse.capture.capture import capture
from normfuse.errors import UsageError
from normfuse.ir.graph import Graph
from normfuse.ir.passes import Run
from normfuse.passes.fuse import measured
from normfuse.passes.fuse.kernels import KERNELS
from normfuse.passes.fuse.measured import Measured
from normfuse.passes.quantize.speed import Speed

X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
RMS_NORM = next(p for p in KERNELS if p.name == "rms_norm")


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 16)
        nn.init.normal_(self.norm.weight, 1, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x).tanh() + self.linear(x).softmax(-1)
        return out


def _operators(gm: Any) -> list[str]:
    return sorted(str(n.target).split(".")[1] for n in gm.graph.nodes if "normfuse" in str(n.target))


def _clock(ratio: float, *, sure: bool = True) -> Any:
    return lambda fused, apart: (fused(), apart(), Speed(ratio, True, sure))[-1]


@pytest.mark.skipif(not native.available(), reason="the kernels are not built")
@pytest.mark.parametrize(
    ("clock", "words"),
    [(_clock(1.2), ""), (_clock(0.8), "0.80x of the speed"), (_clock(1.1, sure=False), "1.10x of the speed.*within the noise")],
)
def test_a_clock_decides(clock: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_clock", clock)
    model = Norms().eval()
    fast = normfuse.optimize(model, (X,), target="pytorch")
    found = normfuse.report(fast)
    assert _operators(fast) == ([] if words else ["rms_norm", "two_pass_softmax"])
    assert found.exact is not None
    assert found.exact.max_rel < 1e-12
    assert found.norms_after == {"rms_norm": 1}  # whatever computes it
    assert not found.undone
    torch.testing.assert_close(fast(X), model(X))
    if words:
        said = [s for s in found.refused if s.rule == "rms_norm"]
        assert [s.path for s in said] == ["norm"]
        assert re.search(words, said[0].note)


class Spelled(nn.Module):
    """Attention in single operators, with a mask of positions that hides nothing."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        y = (q @ (q + 1).mT / 8**0.5).softmax(-1) @ q
        seen = torch.arange(x.shape[1])[:, None].expand(-1, x.shape[1]) >= 0
        return nn.functional.scaled_dot_product_attention(y, q, q, attn_mask=seen)


@pytest.mark.parametrize("ratio", [1.2, 0.8])
def test_attention_is_the_operator_of_pytorch_where_that_is_faster(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel of ours."""
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(measured, "_clock", _clock(ratio))
    model = Spelled().eval()
    fast = normfuse.optimize(model, (X,), target="pytorch", passes=())
    found = normfuse.report(fast)
    names = {"eager_attention", "static_masks"}
    assert {s.rule for s in (found.applied if ratio > 1 else found.refused)} & names == names
    assert [str(n.target) for n in fast.graph.nodes].count("aten.scaled_dot_product_attention.default") == 1 + (ratio > 1)
    torch.testing.assert_close(fast(X), model(X))


def test_it_is_measured_once() -> None:
    """A pipeline that runs again comes to the same decision."""
    asked: list[float] = []

    def clock(fused: Any, apart: Any) -> Speed:
        asked.append(1.0)
        return Speed(1.5 if len(asked) == 1 else 0.5, True)

    found = Measured(RMS_NORM, clock)
    for _ in range(2):
        graph = Graph.of(capture(Norms().eval(), (X,), None).gm)
        report = found(graph, Run([[X]]))
        assert bool(report.applied) == native.available()
    assert len(asked) == native.available()


def test_where_nothing_is_fused_nothing_is_measured() -> None:
    def clock(fused: Any, apart: Any) -> Speed:
        raise AssertionError("there is nothing to measure")

    graph = Graph.of(capture(nn.Linear(16, 16).eval(), (X,), None).gm)
    report = Measured(RMS_NORM, clock)(graph, Run([[X]]))
    assert (report.applied, report.refused) == ((), ())


@pytest.mark.parametrize(("sure", "times"), [((True,), [0.2]), ((False, True), [0.2, 0.8]), ((False, False), [0.2, 0.8])])
def test_what_is_decided_is_not_measured_on(sure: tuple[bool, ...], times: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    answers = iter(sure)
    monkeypatch.setattr(measured, "rounds", lambda fused, apart, seconds: asked.append(seconds))
    monkeypatch.setattr(measured, "decided", lambda found: Speed(1.5, True, next(answers)))
    assert measured._clock(lambda: None, lambda: None).decided == sure[-1]
    assert asked == times


@pytest.mark.parametrize(
    ("samples", "words"),
    [([], "no example inputs"), ([[X.to("meta")]], "on meta"), ([[X]], "no kernels"), ([[X, 3]], "no kernels")],
)
def test_where_nothing_can_be_measured(samples: list[Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "they were not built")
    report = Measured(RMS_NORM, _clock(2.0))(Graph.of(capture(Norms().eval(), (X,), None).gm), Run(samples))
    assert not report.applied
    assert words in report.refused[0].note


def test_other_targets_are_files() -> None:
    with pytest.raises(UsageError, match=r"normfuse\.export"):
        normfuse.optimize(Norms().eval(), (X,), target="onnxruntime")  # type: ignore[arg-type]
