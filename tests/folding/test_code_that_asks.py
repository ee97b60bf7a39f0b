"""Code that may go another way than it went on the examples: flags, sizes, classes and modes that a forward asks for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from normfuse.app.random_norms import randomise_norms
from tests.folding.models import IMAGE, classes, folded, reasons


class Skipping(nn.Module):
    """A norm that a flag leaves out, one that a flag only says more about, and a flag that nothing takes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.more, self.last = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x, skip=False, *, hidden=False, never=False):
        if never:
            raise ValueError
        y = self.conv(x)
        y = self.more(y if skip else self.norm(y)).relu()
        return (self.last(y), y) if hidden else self.last(y)


@pytest.mark.parametrize("inputs", [(IMAGE,), (IMAGE, False), (IMAGE, True)], ids=["default", "given", "turned"])
def test_a_flag_may_lead_past_a_norm(inputs):
    model = Skipping()
    made = folded(model, inputs)
    for skip in (False, True):
        torch.testing.assert_close(made(IMAGE, skip), model(IMAGE, skip), rtol=0, atol=1e-5)
    assert isinstance(made.norm, nn.BatchNorm2d)


def test_a_flag_that_returns_what_flows_between_modules_takes_nothing_back():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x, hidden=False):
            y = self.conv(x)
            return (self.norm(y), y) if hidden else self.norm(y)

    assert classes(folded(Hidden())) == ["Conv2d", "Identity"]


def test_code_that_asks_for_the_class_of_a_norm_is_heard_without_a_proof():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.norm(self.conv(x))
            return y + 1 if isinstance(self.norm, nn.BatchNorm2d) else y

    made = folded(Asks(), verify="off")
    assert isinstance(made.norm, nn.BatchNorm2d)
    assert "taken back" in reasons(made)


class Checks(nn.Module):
    """Code that takes another way when its norm is gone."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), way

    def forward(self, x):
        y, here = self.norm(self.conv(x)), isinstance(self.norm, nn.BatchNorm2d)
        return y * self.norm.num_features if self.way == "reads" else y + int(here) if self.way == "adds" else y * 2 if here else y


class Deaf(nn.Conv2d):
    """Has a place for a bias and does not read it."""

    def forward(self, x):
        return F.conv2d(x, self.weight)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Checks("reads"), "cannot be captured"),
        (lambda: Checks("adds"), "computes something else"),
        (lambda: Checks("doubles"), "computes something else"),
        (lambda: nn.Sequential(Deaf(3, 8, 3, bias=False), nn.BatchNorm2d(8)), "does not read 0.bias"),
    ],
    ids=["reads", "adds", "doubles", "deaf"],
)
def test_code_is_traced_again_where_there_are_no_inputs(make, reason):
    model = randomise_norms(make(), seed=0).eval()
    made = normfuse.fold(model)
    assert torch.equal(made(IMAGE), model(IMAGE))
    assert reason in reasons(made)


def test_arguments_that_were_not_tried_are_named():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x, mask=None, flag: bool | None = None):
            y = self.conv(x)
            return y if flag else self.norm(y if mask is None else y * mask)

    mask = torch.rand(2, 1, 6, 6)
    model = Masked()
    made = folded(model, (IMAGE, mask))
    torch.testing.assert_close(made(IMAGE, mask, True), model(IMAGE, mask, True), rtol=0, atol=1e-5)

    class Whole(Masked):
        def forward(self, x, mask=None):
            return super().forward(x, mask)

    assert "the example inputs do not give it: mask" in " ".join(normfuse.report(folded(Whole())).notes)


@pytest.mark.parametrize("options", [{}, {"verify": "off"}, {"without": True}], ids=["proven", "off", "no-inputs"])
def test_a_train_of_its_own_may_ask_a_norm(options):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def train(self, mode=True):
            self.norm.momentum = 0.1 if self.norm.track_running_stats else 0
            return super().train(mode)

        def forward(self, x):
            return self.norm(self.conv(x))

    made = normfuse.fold(Own().eval(), **options) if options.pop("without", False) else folded(Own(), **options)
    assert isinstance(made.norm, nn.BatchNorm2d)
    assert "no attribute 'track_running_stats'" in reasons(made)


def test_one_image_may_go_another_way():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.conv(x) if x.shape[0] == 1 else self.norm(self.conv(x))

    made = folded(Single())
    assert isinstance(made.norm, nn.BatchNorm2d)
    assert "at [1, 3, 8, 8]" in reasons(made)
