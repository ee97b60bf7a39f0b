"""A norm whose ε dwarfs its variance is an affine map; one whose ε does not is left alone."""

import pytest
import torch
import transformers
from torch import nn

import normfuse
from normfuse.passes.huge_eps import HugeEps
from tests.zoo import randomise_norms

aten = torch.ops.aten
PIPELINE = ["cleanup", HugeEps(), "expose", "affine", "mean_free", "affine", "realise", "select", "cleanup"]
NORMS = {aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default}


def optimized(model, example, passes=PIPELINE):
    torch.manual_seed(0)
    fast = normfuse.optimize(model.eval(), example, passes=passes)
    return fast, next(p for p in normfuse.report(fast).passes if p.name == "huge_eps")


def targets(fast):
    return [n.target for n in fast.graph.nodes if n.op == "call_function"]


class Removed(nn.Module):
    """A norm as checkpoints without norms carry it: ε = 10¹² and γ near 10⁶."""

    def __init__(self, kind="layer", eps=1e12, how="linear", bias=True):
        super().__init__()
        self.norm = {
            "layer": lambda: nn.LayerNorm(8, eps),
            "no shift": lambda: nn.LayerNorm(8, eps, bias=False),
            "weightless": lambda: nn.LayerNorm(8, eps, elementwise_affine=False),
            "rms": lambda: nn.RMSNorm(8, eps),
            "group": lambda: nn.GroupNorm(1, 8, eps),
            "groups": lambda: nn.GroupNorm(2, 8, eps),
            "tokens": lambda: nn.LayerNorm((3, 8), eps),
        }[kind]()
        self.how, self.a, self.b = how, nn.Linear(8, 4, bias), nn.Linear(8, 4, bias)
        self.w = nn.Parameter(torch.randn(8, 4))
        randomise_norms(self)
        with torch.no_grad():
            for name, p in self.norm.named_parameters():
                p.mul_(eps**0.5 if name == "weight" else 1.0)

    def forward(self, x):
        y = self.norm(x)
        match self.how:
            case "linear":
                return self.a(y).relu() + self.b(y)
            case "matmul":
                return (y @ self.w).relu()
            case "reshaped":
                return self.a(y.reshape(-1, 8)).relu()
            case "read":
                return self.a(y) + y.sum(-1, keepdim=True)
        return y.relu()


@pytest.mark.parametrize("how", ["linear", "matmul", "reshaped"])
@pytest.mark.parametrize("kind", ["layer", "no shift", "weightless", "rms"])
def test_linear_readers_take_the_whole_map_with_its_centering(kind, how):
    model, x = Removed(kind, how=how, bias=kind != "no shift"), torch.randn(2, 3, 8)
    fast, report = optimized(model, (x,))
    assert len(report.applied) == 1
    assert not NORMS & set(targets(fast))
    assert aten.mean.dim not in targets(fast)
    assert aten.sub.Tensor not in targets(fast)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5 * float(model(x).detach().abs().max()))
    assert report.sqnr > 100


@pytest.mark.parametrize("kind", ["layer", "rms", "tokens", "group"])
def test_other_readers_get_the_affine_map_as_arithmetic(kind):
    x = torch.randn(2, 8, 5, 5) if kind == "group" else torch.randn(2, 3, 8)
    model = Removed(kind, how="other")
    fast, report = optimized(model, (x,))
    assert len(report.applied) == 1
    assert not NORMS & set(targets(fast))
    assert (aten.mean.dim in targets(fast)) == (kind != "rms")
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_one_reader_that_is_not_linear_keeps_the_centering():
    model, x = Removed(how="read"), torch.randn(2, 3, 8)
    fast, report = optimized(model, (x,))
    assert report.applied
    assert aten.mean.dim in targets(fast)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_an_epsilon_near_the_variance_is_not_huge():
    model, x = Removed(eps=1e5), torch.randn(2, 3, 8)
    fast, report = optimized(model, (x,))
    assert not report.applied
    assert aten.layer_norm.default in targets(fast) or aten.rms_norm.default in targets(fast)
    assert "times the variance, less than 1e+06" in report.refused[0].note
    _, report = optimized(Removed(eps=1e7), (0.1 * x,))
    assert report.applied


def test_an_ordinary_norm_is_not_looked_at():
    _, report = optimized(Removed(eps=1e-5), (torch.zeros(2, 3, 8),))
    assert not report.applied
    assert not report.refused


def test_data_with_a_huge_variance_is_measured():
    _, report = optimized(Removed(eps=1e12), (1e6 * torch.randn(2, 3, 8),))
    assert not report.applied
    assert report.refused


@pytest.mark.parametrize(("eps", "applied"), [(1e12, True), (1e8, False)])
def test_without_data_only_an_epsilon_beyond_any_variance_counts(eps, applied):
    model, x = Removed(eps=eps), torch.randn(2, 3, 8)
    fast, report = optimized(model, None)
    assert bool(report.applied) == applied
    if not applied:
        assert report.refused[0].remedy == "pass example_inputs"
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_means_of_several_groups_are_refused():
    _, report = optimized(Removed("groups", how="other"), (torch.randn(2, 8, 5, 5),))
    assert "the means of 2 groups" in report.refused[0].note


def test_gpt2_without_norms():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16, layer_norm_epsilon=1e12, bos_token_id=1, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 1e6 if "ln_" in name and name.endswith("weight") else 1.0
            p.copy_(scale * (1 + 0.3 * torch.randn_like(p)) if scale > 1 else 0.3 * torch.randn_like(p))
    ids = torch.randint(0, 64, (2, 7))
    fast, report = optimized(model, {"input_ids": ids})
    assert len(report.applied) == 5
    assert not NORMS & set(targets(fast))
    assert targets(fast).count(aten.mean.dim) == 1  # the last one: its reader is tied to the embedding
    assert report.sqnr > 100
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-3, atol=1e-3)


def test_a_large_weight_that_others_read_is_not_stored_twice():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.big = nn.LayerNorm(160, 1e12), nn.Linear(160, 160)
            nn.init.normal_(self.norm.weight, 1e6, 1e5)

        def forward(self, x):
            return self.big(self.norm(self.big(x)))

    fast, report = optimized(Tied(), (torch.randn(2, 160),))
    assert report.applied
    assert aten.mean.dim in targets(fast)
    assert sum(p.numel() for p in fast.parameters()) < 2 * 160 * 160
