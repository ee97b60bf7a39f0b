"""What `fold` takes, refuses and says of itself."""

import pytest
import torch
from torch import nn

import normfuse
from normfuse.app.random_norms import randomise_norms
from normfuse.errors import CaptureError, UsageError
from tests.folding.models import IMAGE, PreNorm, classes, folded


def test_random_models_are_folded_without_a_proof():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Noise()).eval()
    assert isinstance(normfuse.fold(model, (IMAGE,), verify="off")[1], nn.Identity)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_lazy_modules_are_to_be_called_first():
    with pytest.raises(UsageError, match="call the model on an input once"):
        normfuse.fold(nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d()), (IMAGE,))


def test_report_says_what_is_not_proven():
    made = folded(PreNorm(), (torch.randn(4, 5, 8),))
    assert "what flows between modules has changed" in normfuse.report(made).notes[-1]


def test_kinds_of_models_that_have_no_modules():
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(UsageError, match=r"ExportedProgram, which has no modules; use normfuse.optimize"):
        normfuse.fold(program)
    with pytest.raises(UsageError, match="verify='never'"):
        normfuse.fold(nn.Linear(2, 2), verify="never")


def test_kinds_of_models_that_are_taken_as_they_come():
    """Compiled, made under inference mode, in half precision, captured under autocast, traced by torch.fx, folded already."""

    def model():
        return randomise_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), seed=0).eval()

    with torch.inference_mode():
        frozen = model()
    half = model().bfloat16()
    made = [
        normfuse.fold(torch.compile(model(), backend="eager"), (IMAGE,)),
        normfuse.fold(frozen, (IMAGE,)),
        normfuse.fold(half, (IMAGE.bfloat16(),)),
        normfuse.fold(normfuse.fold(model(), (IMAGE,)), (IMAGE,)),
    ]
    with torch.autocast("cpu"):
        made.append(normfuse.fold(model(), (IMAGE,)))
    assert all(classes(m) == ["Conv2d", "Identity", "ReLU"] for m in made)
    whole = model()
    graph = normfuse.fold(torch.fx.symbolic_trace(whole), (IMAGE,))
    again = normfuse.optimize(graph)  # without inputs it is traced like any module, not taken for a result of `optimize`
    torch.testing.assert_close(again(IMAGE), whole(IMAGE), rtol=0, atol=1e-5)


def test_a_function_that_holds_the_modules_of_another_model_is_said():
    """A copy does not copy what a lambda refers to: here a norm that trains and is no module of the model."""

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.call = lambda x: norm(x)

        def forward(self, x):
            return self.call(self.conv(x))

    with pytest.raises(CaptureError, match="may hold modules of another model"):
        normfuse.fold(Holding().train(), (IMAGE,))
