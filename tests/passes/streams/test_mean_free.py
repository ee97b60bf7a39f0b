"""Which streams lose their mean, which do not, and why."""

import pytest
import torch
from torch import nn

import normfuse
from tests.zoo import ZOO, randomise_norms


def report_of(model, *example, **options):
    model = randomise_norms(model).eval()
    report = normfuse.report(normfuse.optimize(model, example, **options))
    assert report.exact.max_rel <= 1e-9
    assert not report.undone
    return report


class Stack(nn.Module):
    """Pre-LN blocks on a writer, with something special at one place."""

    def __init__(self, special="", d=8, blocks=4):
        super().__init__()
        self.special = special
        self.stem = nn.Linear(6, d)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 16), nn.GELU(), nn.Linear(16, d)) for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 3)

    def forward(self, x):
        x = self.stem(x)
        if self.special == "nonlinear stem":
            x = torch.tanh(x)
        middle = None
        for i, block in enumerate(self.blocks):
            x = x + block(x)
            if i == 0 and self.special == "read in the middle":
                middle = x
            if self.special == "scalar gain":
                x = x * 0.5
            if self.special == "per-token gain":
                x = x * torch.sigmoid(x.norm(dim=-1, keepdim=True))
        y = self.head(self.norm(x))
        if self.special == "stream is an output":
            return y, x
        if self.special == "rms reader":
            return y + nn.functional.rms_norm(x, (8,))[..., :3]
        return y if middle is None else (y, torch.tanh(middle))


@pytest.mark.parametrize(
    ("special", "left"),
    [
        pytest.param("", 0, id="plain"),
        pytest.param("nonlinear stem", 0, id="root centering"),
        pytest.param("scalar gain", 0, id="scalar gain"),
        pytest.param("stream is an output", 5, id="stream is an output"),
        pytest.param("rms reader", 5, id="RMSNorm reads the stream"),
        pytest.param("read in the middle", 1, id="read in the middle: centered below"),
        pytest.param("per-token gain", 5, id="a reader of the norm of the stream"),
    ],
)
def test_streams(special, left):
    report = report_of(Stack(special), torch.randn(2, 5, 6))
    assert report.norms_after["layer_norm"] == left


def test_root_centering_is_one_operator():
    fast = normfuse.optimize(randomise_norms(Stack("nonlinear stem")).eval(), (torch.randn(2, 5, 6),))
    assert sum(str(n.target) == "aten.mean.dim" for n in fast.graph.nodes) == 1
    sites = [s for s in normfuse.report(fast).applied if s.rule == "layer_norm_is_rms_norm"]
    assert all("centered once, after" in s.note for s in sites)


def test_tied_table_is_centered_once_at_the_root():
    entry = ZOO["preln_gpt"]
    fast = normfuse.optimize(entry.build(), entry.args)
    report = normfuse.report(fast)
    assert report.norms_after == {"layer_norm": 0, "rms_norm": 5}
    assert sum(str(n.target) == "aten.mean.dim" for n in fast.graph.nodes) == 1


@pytest.mark.parametrize("name", ["llama_rms", "rms_eps_none"])
def test_rms_norm_models_are_never_centered(name):
    entry = ZOO[name]
    before = entry.build().state_dict()
    after = normfuse.optimize(entry.build(), entry.args, passes=["mean_free"]).state_dict()
    assert all(torch.equal(v, before[k]) for k, v in after.items() if k in before)


def test_post_ln_is_refused_norm_by_norm_and_bit_for_bit_the_same():
    entry = ZOO["postln_bert"]
    model = entry.build()
    fast = normfuse.optimize(model, entry.args)
    refused = [s for s in normfuse.report(fast).refused if s.rule == "layer_norm_is_rms_norm"]
    assert len(refused) == 5
    assert sum("Post-LN" in s.note for s in refused) == 4
    found, expected = (torch.utils._pytree.tree_leaves(m(*entry.args)) for m in (fast, model))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_patch_merging_keeps_the_stages_above_it():
    """LN over 4C sees the difference of the four means: centering each C would change it."""
    entry = ZOO["swin_like"]
    report = normfuse.report(normfuse.optimize(entry.build(), entry.args))
    kept = {s.path: s.note for s in report.refused if s.rule == "layer_norm_is_rms_norm"}
    assert "reads the residual stream without a norm" in kept["stage1.norm1"]
    assert report.norms_after == {"layer_norm": 3, "rms_norm": 3}


def test_a_norm_over_several_axes_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 6, 6)), nn.Conv2d(4, 2, 1))
    report = report_of(model, torch.randn(2, 3, 8, 8))
    assert "normalizes over 3 axes" in next(s.note for s in report.refused if s.rule == "layer_norm_is_rms_norm")


def test_the_reason_names_the_reader():
    report = report_of(Stack("stream is an output"), torch.randn(2, 5, 6))
    site = next(s for s in report.refused if s.rule == "layer_norm_is_rms_norm")
    assert site.note == "the stream is an output of the model"
    assert site.remedy


def test_a_shift_stays_behind_its_norm_rather_than_widen_a_head():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack, self.norm, self.head = Stack(), nn.LayerNorm(3), nn.Linear(3, 100, bias=False)

        def forward(self, x):
            return self.head(self.norm(self.stack(x)))

    model = randomise_norms(Model()).eval()
    fast = normfuse.optimize(model, (torch.randn(2, 5, 6),))
    report = normfuse.report(fast)
    assert report.norms_after["layer_norm"] + report.norms_after["rms_norm"] == 6
    assert "head.bias" not in fast.state_dict()
    assert "a new bias of 100 values" in next(s.note for s in report.refused if s.path == "norm" and "affine" in s.rule)
