"""Half precision ends at 65504 and thins out below 6e-5: a fold that would leave it is refused and says so."""

import pytest
import torch
from torch import nn

import normfuse
from tests.zoo import randomise_norms


def pair(weight, mean, var, gamma, channels=4):
    net = nn.Sequential(nn.Conv2d(4, channels, 1, groups=4, bias=False), nn.BatchNorm2d(channels)).eval()
    with torch.no_grad():
        net[0].weight.fill_(weight)
        net[1].running_mean.fill_(mean)
        net[1].running_var.fill_(var)
        net[1].weight.fill_(gamma)
    return net


CONTRAST = (250 + 0.125 * torch.arange(-1, 1).repeat(2, 4, 8, 4)).half()
BRIGHT = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 3000).half()


@pytest.mark.parametrize(
    ("net", "x", "reason"),
    [
        (pair(1.0, 250.0, 2e-5, 1.5), CONTRAST, "overflow float16"),
        (pair(0.02, 1.0, 60000.0, 1e-3), BRIGHT, "lose precision in float16"),
        (pair(300.0, 0.0, 1.0, 300.0), BRIGHT / 30000, "overflow float16"),
    ],
)
def test_a_fold_that_leaves_half_precision_is_refused(net, x, reason):
    net = net.half()
    fast = normfuse.optimize(net, (x,), verify="off")
    report = normfuse.report(fast)
    assert report.norms_after["batch_norm"] == 1
    assert reason in " / ".join(s.note for s in report.refused)
    assert torch.equal(fast(x), net(x))
    wide = normfuse.optimize(net.float(), (x.float(),))
    assert normfuse.report(wide).norms_after["batch_norm"] == 0


def test_into_a_reader_too():
    net = nn.Sequential(nn.Sigmoid(), nn.BatchNorm1d(8), nn.Linear(8, 8)).eval()
    with torch.no_grad():
        net[1].running_var.fill_(60000.0)
        net[1].weight.fill_(1e-3)
        net[2].weight.mul_(0.1)
    report = normfuse.report(normfuse.optimize(net.half(), (torch.randn(4, 8).half(),), verify="off"))
    assert "lose precision in float16" in " / ".join(s.note for s in report.refused)


def test_an_ordinary_layer_folds_and_a_dead_channel_does_not_hold_it():
    net = randomise_norms(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))).eval()
    with torch.no_grad():
        net[1].weight[3] = 1e-7
        net[1].bias[3] = 0
    fast = normfuse.optimize(net.half(), (torch.randn(2, 4, 8, 8).half(),))
    assert normfuse.report(fast).norms_after["batch_norm"] == 0
