"""Regions of the graph that torch.export keeps apart."""

import pytest
import torch
from torch import nn

import normfuse


class Region(nn.Module):
    """A BatchNorm around a region without autocast, as rotary positions are written."""

    def __init__(self, deep: bool):
        super().__init__()
        self.linear, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("frequencies", torch.rand(8))
        self.deep = deep
        for t in (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias):
            nn.init.uniform_(t, 0.5, 1.5)

    def forward(self, x):
        y = self.norm(self.linear(x))
        with torch.autocast(device_type="cpu", enabled=False):
            z = y.float() @ torch.outer(self.frequencies, self.frequencies)
            if self.deep:
                with torch.autocast(device_type="cpu", enabled=False):
                    z, y = z.float().sin() + 1, y * z
        return self.last(z.to(y.dtype) * y)


@pytest.mark.parametrize("deep", [False, True])
def test_a_region_without_autocast_is_part_of_the_graph(deep):
    model, x = Region(deep).eval(), torch.randn(4, 8)
    fast = normfuse.optimize(model, (x,))
    report = normfuse.report(fast)
    assert report.norms_before == {"batch_norm": 1}
    assert report.norms_after == {"batch_norm": 0}
    assert report.exact.max_rel < 1e-9
    assert not [n for n in fast.graph.nodes if "autocast" in str(n.target)]
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


class Positions(nn.Module):
    """Rotary positions under no_grad, as Hugging Face writes them, with a region in the region."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("frequencies", torch.rand(8))
        for t in (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias):
            nn.init.uniform_(t, 0.5, 1.5)

    @torch.no_grad()
    def angles(self, x):
        with torch.autocast(device_type="cpu", enabled=False):
            z = x.float() * self.frequencies
            with torch.enable_grad():
                return z.cos() + self.frequencies

    def forward(self, x):
        return self.last(self.norm(self.linear(x)) * self.angles(x))


@pytest.mark.parametrize("grad", [False, True])
def test_regions_about_gradients_are_part_of_the_graph(grad):
    model, x = Positions().eval(), torch.randn(4, 8)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,))
    fast = normfuse.optimize(program)
    assert normfuse.report(fast).norms_after == {"batch_norm": 0}
    assert normfuse.report(fast).exact.max_rel < 1e-9
    assert not [n for n in fast.graph.nodes if "wrap_with" in str(n.target)]
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_branches_of_cond_behind_a_region_run_as_they_are():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.a(x)
            return torch.cond(x.sum() > 0, lambda t: self.b(t), lambda t: t * 2, (y.float(),))

    model = Kept().eval()
    fast = normfuse.optimize(model, (torch.randn(4, 8),), verify="off")
    for x in (torch.randn(4, 8) + 1, torch.randn(4, 8) - 1):
        torch.testing.assert_close(fast(x), model(x), rtol=3e-2, atol=3e-2)


class Mixed(nn.Module):
    """Autocast around convolutions, products, attention and norms; a part of it without, gradients switched inside."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.q, self.last = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8), nn.Linear(6, 6), nn.Linear(6, 3)
        self.layer = nn.LayerNorm(6)
        for t in (self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias):
            nn.init.uniform_(t, 0.5, 1.5)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.norm(self.conv(x))
            with torch.no_grad():
                z = self.q(y)
            a = nn.functional.scaled_dot_product_attention(z, z, self.layer(z))
            with torch.autocast("cpu", enabled=False):
                b = self.last(a.float()).exp()
            c = torch.cat([torch.softmax(self.last(a), -1), b.to(torch.bfloat16)], -1)
        return c, b, y


def test_a_region_with_autocast_is_part_of_the_graph_with_its_casts():
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(2, 8, 6)
    fast = normfuse.optimize(model, (x,))
    report = normfuse.report(fast)
    assert not [n for n in fast.graph.nodes if "autocast" in str(n.target)]
    assert report.norms_after["batch_norm"] == 0
    assert report.exact.max_rel < 1e-9
    assert [t.dtype for t in fast(x)] == [t.dtype for t in model(x)]
    torch.testing.assert_close(fast(x), model(x), rtol=3e-2, atol=3e-2)


def test_casts_that_cannot_be_told_leave_the_region():
    class Einsum(nn.Module):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return torch.einsum("bij,bkj->bik", x, x)

    model, x = Einsum().eval(), torch.randn(2, 3, 4)
    fast = normfuse.optimize(model, (x,))
    assert fast(x).dtype == torch.bfloat16
    torch.testing.assert_close(fast(x), model(x))
