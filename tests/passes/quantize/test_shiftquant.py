"""Quantization of whole models: how near the outputs stay, how small the model gets, what the report says."""

import copy

import pytest
import torch
from torch import nn

import normfuse
from normfuse import ShiftQuant
from normfuse.reports.html import page
from normfuse.reports.report import Report
from tests.passes.quantize.quantized import SIZE, ConvNet, Mlp, Tied, bytes_of, draw, entries, ids, made, operators, sqnr
from tests.zoo import ZOO

MODELS = [
    pytest.param(lambda: made(ConvNet), lambda s: draw(4, 4, 10, 10, seed=s), id="ConvNet"),
    pytest.param(lambda: made(Mlp), lambda s: draw(32, 24, seed=s), id="Mlp"),
    pytest.param(lambda: made(Tied), lambda s: ids(4, 9, seed=s), id="Tied"),
    pytest.param(ZOO["preln_vit"].build, lambda s: draw(*ZOO["preln_vit"].args[0].shape, seed=s), id="ViT"),
    pytest.param(
        ZOO["preln_gpt"].build, lambda s: ids(*ZOO["preln_gpt"].args[0].shape, seed=s, high=5), id="GPT"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("build", "data"), MODELS)
@torch.no_grad()
def test_eight_bits_are_near_smaller_and_told(build, data):
    model = build()
    state = copy.deepcopy(model.state_dict())
    fast = normfuse.optimize(model, (data(0),), quantize=SIZE, calibration=[data(s) for s in range(3)])
    report = normfuse.report(fast)
    assert sqnr(model(data(7)), fast(data(7))) > 30
    assert not report.undone
    assert report.exact.max_rel < 1e-9
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    layers, total = entries(report), report.quantization[-1]
    assert len(layers) >= 2
    assert not any(e.kept for e in layers)
    assert all(e.sqnr > 30 and e.clipped == 0 for e in layers if e.kind != "embedding")
    assert all(sum(e.groups) == e.shape[1] for e in layers if e.kind == "linear")
    assert total.kind == "model"
    assert total.sqnr > 30
    assert total.bytes_after == report.bytes_after == bytes_of(fast) < 0.65 * report.bytes_before
    assert Report.from_json(report.to_json()) == report
    assert all(len(line) <= 80 for line in str(report).splitlines())
    assert all(e.path in page(report) for e in layers)


@torch.no_grad()
def test_what_runs_is_what_the_integers_say():
    """One layer, by hand: the codes of the weight times those of the activations."""
    model, x = made(nn.Linear, 32, 8), draw(16, 32)
    fast = normfuse.optimize(
        model, (x,), quantize=ShiftQuant(weight_bits=8, groups=1, exponents="range", bias_correction=False, prefer="size")
    )
    top = model.weight.double().abs().amax(1, keepdim=True)
    weight = (model.weight.double() * 127 / top).round() * top / 127
    row = x.double().abs().amax(1, keepdim=True)
    codes = (x.double() * 127 / row).round()
    expected = (codes * row / 127) @ weight.T + model.bias.double()
    torch.testing.assert_close(fast(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        pytest.param(nn.ReLU, "relu", id="ReLU"),
        pytest.param(nn.GELU, "gelu", id="GELU"),
        pytest.param(lambda: nn.GELU("tanh"), "gelu_tanh", id="GELU tanh"),
        pytest.param(nn.SiLU, "silu", id="SiLU"),
        pytest.param(nn.Tanh, None, id="Tanh stays"),
    ],
)
@torch.no_grad()
def test_activations_go_into_the_layer_in_front(act, name):
    model, x = made(Mlp, act), draw(32, 24)
    fast = normfuse.optimize(model, (x,), quantize=SIZE)
    epilogues = [n.args[8] for n in fast.graph.nodes if "shiftquant_linear" in str(n.target) and len(n.args) > 8]
    assert epilogues == ([] if name is None else [name])
    assert ("aten.tanh.default" in operators(fast)) == (name is None)
    assert not any(f"aten.{n}.default" in operators(fast) for n in ("relu", "gelu", "silu"))
    assert sqnr(model(x), fast(x)) > 30


def test_an_activation_with_a_second_reader_of_its_input_stays():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x):
            y = self.fc(x)
            return torch.relu(y) + y

    fast = normfuse.optimize(made(Both), (draw(4, 16),), quantize=SIZE)
    assert "aten.relu.default" in operators(fast)


@torch.no_grad()
def test_addmm_matmul_and_one_dimension():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(8, 12, 3, 2, 1)
            self.weight, self.bias, self.last = (
                nn.Parameter(draw(12, 20)),
                nn.Parameter(draw(20)),
                nn.Parameter(draw(20, 6, seed=1)),
            )

        def forward(self, x):
            y = torch.relu(self.conv(x)).mean(2)
            return torch.addmm(self.bias, y, self.weight) @ self.last

    model, x = Odd().eval(), draw(16, 8, 11)
    fast = normfuse.optimize(model, (x,), quantize=SIZE)
    assert [(e.kind, e.shape) for e in entries(normfuse.report(fast))] == [
        ("conv2d", (12, 8, 3)), ("linear", (20, 12)), ("linear", (6, 20)),
    ]  # fmt: skip
    assert sqnr(model(x), fast(x)) > 30


def test_a_shared_weight_is_stored_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x)))

    fast = normfuse.optimize(made(Twice), (draw(8, 32),), quantize=SIZE)
    first, second = [n for n in fast.graph.nodes if "shiftquant_linear" in str(n.target)]
    assert first.args[1].target == second.args[1].target
    assert sum("codes" in name for name in fast.state_dict()) == 1


def test_a_tied_table_is_integers_twice_or_float_once():
    model, x = made(Tied), ids(4, 9)
    both = normfuse.optimize(model, (x,), quantize=SIZE)
    assert bytes_of(both) < 0.65 * sum(p.numel() * 4 for p in model.parameters())
    kept = normfuse.optimize(model, (x,), quantize=ShiftQuant(embedding_bits=None, prefer="size"))
    (head,) = entries(normfuse.report(kept), path="head")
    assert head.kept == "its weight stays in float for another reader, so that codes would only add bytes"
    assert {e.kept for e in entries(normfuse.report(kept), path="wte")} == {"kept in float by embedding_bits=None"}
    assert sum(t.shape == (40, 16) for t in kept.state_dict().values()) == 1


@torch.no_grad()
def test_batch_and_length_stay_free():
    model = made(Tied)
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    fast = normfuse.optimize(model, (ids(4, 9),), dynamic_shapes=(dims,), quantize=SIZE)
    for shape in ((1, 3), (7, 12)):
        assert sqnr(model(ids(*shape)).flatten(0, 1), fast(ids(*shape)).flatten(0, 1)) > 25


@torch.no_grad()
def test_without_inputs_it_is_not_calibrated_and_says_so():
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    fast = normfuse.optimize(model, quantize=SIZE)
    report = normfuse.report(fast)
    assert any(note.startswith("not calibrated") for note in report.notes)
    assert [e.sqnr for e in entries(report)] == [None, None]
    assert sqnr(model(draw(64, 24)), fast(draw(64, 24))) > 30


def test_optimizing_again_changes_nothing():
    model, x = made(ConvNet), draw(4, 4, 10, 10)
    fast = normfuse.optimize(model, (x,), quantize=SIZE)
    again = normfuse.optimize(fast, (x,))
    assert not normfuse.report(again).undone
    torch.testing.assert_close(again(x), fast(x))


def test_attention_is_integers_or_says_why_not():
    """Its operator may be there or not; the entry of the report says which, and the outputs stay near either way."""

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    model, x = made(Attend), draw(2, 5, 16)
    fast = normfuse.optimize(model, (x,), quantize=ShiftQuant(weight_bits=8, attention=True, prefer="size"))
    (entry,) = entries(normfuse.report(fast), kind="attention")
    there = hasattr(torch.ops.normfuse, "shiftquant_attention")
    assert entry.activation_bits == (8 if there else None)
    assert entry.kept == ("" if there else "this version of normfuse has no integer operator for attention")
    assert any("shiftquant_attention" in name for name in operators(fast)) == there
    with torch.no_grad():
        assert sqnr(model(x), fast(x)) > 25
