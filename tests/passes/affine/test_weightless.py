"""Norms without weights, and their scales behind the products that read them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from normfuse.api import DEFAULT
from normfuse.passes.affine.weightless import Weightless
from tests.zoo import ZOO, randomise_norms

aten = torch.ops.aten


def done(model, example, options=None, passes=DEFAULT, **kwargs):
    fast = normfuse.optimize(model, example, passes=[*passes, Weightless(**(options or {}))], **kwargs)
    report = normfuse.report(fast)
    assert report.exact.max_rel <= 1e-9
    assert not report.undone
    return fast, next(p for p in report.passes if p.name == "weightless")


def gains(fast):
    """Weights that norms of the graph still have."""
    norms = [n for n in fast.graph.nodes if n.target in (aten.layer_norm.default, aten.rms_norm.default)]
    return [n for n in norms if any(isinstance(a, torch.fx.Node) for a in n.args[2:4])]


@pytest.mark.parametrize("passes", [pytest.param(DEFAULT, id="behind the pipeline"), pytest.param(("cleanup",), id="alone")])
@pytest.mark.parametrize("name", ["preln_gpt", "llama_rms", "rms_eps_none", "preln_vit", "parallel_gpt"])
def test_no_gain_is_left(name, passes):
    entry = ZOO[name]
    fast, _ = done(entry.build(), entry.args, passes=passes)
    if name != "preln_vit":  # its head reads the joined features of two tokens
        assert not gains(fast)


def test_a_tied_head_gets_a_matrix_of_its_own_and_the_report_says_what_it_costs():
    entry = ZOO["preln_gpt"]
    fast, report = done(entry.build(), entry.args)
    (site,) = [s for s in report.applied if s.path == "norm"]
    size = entry.build().head.weight.numel() * 4
    assert f"{size} bytes more" in site.note
    assert fast.state_dict()["wte.weight"].shape == entry.build().wte.weight.shape


def test_a_tied_head_stays_tied_when_asked():
    entry = ZOO["preln_gpt"]
    fast, report = done(entry.build(), entry.args, {"clone_tied": False})
    assert len(gains(fast)) == 1
    assert [("twice" in s.note, s.path) for s in report.refused] == [(True, "norm")]


def test_post_ln_is_refused():
    entry = ZOO["postln_bert"]
    fast, report = done(entry.build(), entry.args)
    assert len(report.refused) == 5
    assert len(gains(fast)) == 5


def test_without_shapes():
    model = randomise_norms(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))).eval()
    fast = normfuse.optimize(model, passes=["cleanup", Weightless()])
    assert not gains(fast)
    x = torch.randn(4, 8)
    assert torch.allclose(fast(x), model(x), atol=1e-5)


# -- deferral ----------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """Something that reads an RMSNorm."""

    def __init__(self, special=""):
        super().__init__()
        self.special, self.norm = special, nn.RMSNorm(8, eps=1e-3)
        self.a, self.b = nn.Linear(8, 5), nn.Linear(8, 3, bias=False)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        y = self.norm(x)
        match self.special:
            case "addmm":
                return torch.addmm(self.bias, y.view(-1, 8), self.weight).view(*x.shape[:-1], 6)
            case "matmul":
                return y @ self.weight
            case "one token":
                return self.a(y[:, 0]), self.b(y)
            case "pieces":
                first, second = y.split([2, 3], dim=1)
                return self.a(first), self.b(second)
            case "output":
                return self.a(y), y
            case "gelu":
                return self.a(F.gelu(y))
            case "heads":
                return self.a(y), F.linear(y.unflatten(-1, (2, 4)), self.weight[:4].T)
        return self.a(y), self.b(y)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("special", "scales"), [("", 1), ("addmm", 1), ("matmul", 1), ("one token", 2), ("pieces", 2)])
def test_scale_moves_behind_the_product(special, scales):
    model = randomise_norms(Reader(special)).eval()
    fast, report = done(model, (X,), {"defer": True})
    assert [s.rule for s in report.applied if "behind" in s.rule] == ["norm_scale_behind_product"]
    targets = [n.target for n in fast.graph.nodes]
    assert aten.rms_norm.default not in targets
    assert targets.count(aten.rsqrt.default) == scales


@pytest.mark.parametrize("special", ["output", "gelu", "heads"])
def test_scale_stays_where_one_reader_cannot_take_it(special):
    model = randomise_norms(Reader(special)).eval()
    fast, report = done(model, (X,), {"defer": True})
    assert aten.rms_norm.default in [n.target for n in fast.graph.nodes]
    assert len(report.refused) == 1


def test_off_by_default():
    fast, _ = done(randomise_norms(Reader()).eval(), (X,))
    assert aten.rms_norm.default in [n.target for n in fast.graph.nodes]


def test_half_precision():
    model = randomise_norms(Reader()).eval()
    fast = normfuse.optimize(model.half(), (X.half(),), passes=[*DEFAULT, Weightless(defer=True)])
    refused = [s.note for s in normfuse.report(fast).refused]
    assert any("may overflow float16" in note for note in refused)
    brain, _ = done(model.bfloat16(), (X.bfloat16(),), {"defer": True})
    assert [t.dtype for t in brain(X.bfloat16())] == [torch.bfloat16] * 2


@pytest.mark.parametrize("name", ["preln_gpt", "llama_rms", "sinusoidal_gpt"])
def test_deferred_models(name):
    entry = ZOO[name]
    fast, report = done(entry.build(), entry.args, {"defer": True})
    assert [s for s in report.applied if s.rule == "norm_scale_behind_product"]
    again = normfuse.optimize(fast, passes=[Weightless(defer=True)])
    assert not normfuse.report(again).applied


def test_dynamic_batch():
    model = randomise_norms(Reader("addmm")).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    fast, _ = done(model, (X,), {"defer": True}, dynamic_shapes=({0: batch},))
    big = torch.randn(7, 5, 8)
    assert torch.allclose(fast(big), model(big), atol=1e-5)
