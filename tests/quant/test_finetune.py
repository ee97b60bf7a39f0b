"""Fine-tuning with the deployed integers: nearer to the float graph, and what it returns is what it trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from normfuse.errors import NormfuseError, UsageError
from normfuse.ir.graph import Graph
from normfuse.ir.views import Addmm, Conv, Linear, MatMul
from normfuse.numerics.evaluate import evaluate
from normfuse.quant.finetune import finetune
from normfuse.quant.integers import integer_matmul, quantize_rows
from normfuse.quant.quantizer import quantize_weight
from normfuse.quant.spec import ShiftQuant
from normfuse.quant.student import as_matrices, from_matrices, simulate


class Net(nn.Module):
    """A grouped convolution, LayerNorm, two linear layers of which one is used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.norm, self.fc, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        y = F.relu(self.conv(x)).flatten(2).transpose(1, 2)
        y = F.gelu(self.fc(self.norm(y)))
        return self.head(self.fc(y).mean(1))


class Transposed(nn.Module):
    """What Hugging Face's Conv1D and a product with a parameter become."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))
        self.factor = nn.Parameter(torch.randn(6, 5))
        self.conv = nn.Conv1d(2, 4, 3)

    def forward(self, x):
        y = torch.addmm(self.bias, x.flatten(1)[:, :8], self.weight)
        return (F.relu(y) @ self.factor).sum(1, keepdim=True) + self.conv(x).mean(2)


def captured(model, *batches):
    """The graph of a model that nothing is rewritten in."""
    torch.manual_seed(1)
    gm = normfuse.optimize(model.eval(), (batches[0],), passes=[])
    return Graph.of(gm)


def coded(graph, spec):
    found = {}
    for node in graph:
        view = graph.view(node)
        weight = view.y if isinstance(view, MatMul) else getattr(view, "W", None)
        if isinstance(view, (Linear, Addmm, MatMul, Conv)):
            taps = weight.numel // (weight.shape[0] * weight.shape[1])
            channels = None if taps == 1 else torch.arange(weight.shape[1]).repeat(taps)
            matrices = as_matrices(weight.value, view)
            found[node] = tuple(quantize_weight(m, spec, channel_groups=channels) for m in matrices)
    return found


def net(spec, *, batches=3):
    torch.manual_seed(0)
    model = Net()
    samples = [[torch.randn(16, 4, 6, 6)] for _ in range(batches)]
    graph = captured(model, *(b for (b,) in samples))
    return graph, coded(graph, spec), samples


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("bits", "factor"),
    [pytest.param({"activation_bits": 8}, 0.5, id="W4A8"), pytest.param({"activation_bits": 4}, 0.75, id="W4A4")],
)
def test_the_outputs_come_nearer_also_on_other_data(bits, factor):
    spec = ShiftQuant(weight_bits=4, **bits)
    graph, weights, samples = net(spec)
    torch.manual_seed(9)
    other = torch.randn(16, 4, 6, 6)
    expected = evaluate(graph, [other], exact=False)[0]
    before = error(simulate(graph, [other], spec, weights)[0], expected)
    found = finetune(graph, samples, spec, weights=weights, steps=60, rate=4e-3)
    after = error(simulate(graph, [other], spec, found.weights)[0], expected)
    assert after < factor * before
    assert len(found.losses) == 60
    assert found.losses[-1] < found.losses[0]


def test_the_returned_integers_are_the_values_in_the_graph():
    spec = ShiftQuant(weight_bits=3)
    graph, weights, samples = net(spec)
    found = finetune(graph, samples, spec, weights=weights, steps=3)
    assert set(found.weights) == set(weights)
    for node, quantized in found.weights.items():
        view = graph.view(node)
        values = torch.stack([w.dequantized() for w in quantized]).float()
        assert torch.equal(view.W.native, from_matrices(values, view))
        assert [w.bits for w in quantized] == [3] * len(quantized)
        again = [quantize_weight(m, spec) for m in as_matrices(view.W.value, view)] if view.W.ndim == 2 else []
        for a, b in zip(again, quantized, strict=bool(again)):
            torch.testing.assert_close(a.dequantized(), b.dequantized(), rtol=1e-6, atol=1e-8)


def test_the_simulation_is_the_integer_product():
    torch.manual_seed(0)
    spec = ShiftQuant(weight_bits=4, activation_bits=8)
    x = torch.randn(5, 12)
    graph = captured(nn.Linear(12, 7), x)
    ((node, (weight,)),) = coded(graph, spec).items()
    codes, scale = quantize_rows(x, 8)
    expected = integer_matmul(codes, weight.operand()).double() * scale.double() * weight.scale.double() + graph.view(node).b.value
    torch.testing.assert_close(simulate(graph, [x], spec, {node: (weight,)})[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_convolutions_are_quantized_by_image():
    torch.manual_seed(0)
    spec = ShiftQuant(weight_bits=8, activation_bits=2)
    x = torch.randn(2, 4, 5, 5)
    x[1] *= 100
    graph = captured(nn.Conv2d(4, 3, 3, bias=False), x)
    weights = coded(graph, spec)
    both, alone = simulate(graph, [x], spec, weights)[0], simulate(graph, [x[:1]], spec, weights)[0]
    torch.testing.assert_close(both[:1], alone)


def test_static_scales_are_trained_too():
    spec = ShiftQuant(weight_bits=8, activation_bits=4, activations="static")
    graph, weights, samples = net(spec)
    scales = {node: torch.tensor(0.5) for node in weights}  # too coarse for most
    found = finetune(graph, samples, spec, weights=weights, input_scales=scales, steps=60, rate=1e-2)
    assert set(found.input_scales) == set(weights)
    assert any(abs(float(s) - 0.5) > 0.02 for s in found.input_scales.values())
    assert min(found.losses[-5:]) < 0.8 * found.losses[0]


def test_transposed_weights_and_products_with_a_constant():
    torch.manual_seed(0)
    data = torch.randn(8, 2, 6)
    graph = captured(Transposed(), data)
    spec = ShiftQuant(weight_bits=3)
    weights = coded(graph, spec)
    assert sorted(str(n.target).split(".")[1] for n in weights) == ["addmm", "conv1d", "matmul"]
    found = finetune(graph, [[data]], spec, weights=weights, steps=40, rate=1e-2)
    assert found.after < 0.8 * found.before
    for node, quantized in found.weights.items():
        assert all(a.codes.shape == b.codes.shape for a, b in zip(quantized, weights[node], strict=True))


def test_codes_that_are_not_the_nearest_are_kept_at_the_start():
    """GPTQ rounds to others; the first step must see its codes."""
    torch.manual_seed(0)
    spec = ShiftQuant(weight_bits=4)
    x = torch.randn(6, 12)
    graph = captured(nn.Linear(12, 7), x)
    ((node, (weight,)),) = coded(graph, spec).items()
    codes = (weight.codes + torch.randint(-1, 2, weight.codes.shape)).clamp(-7, 7).to(torch.int8)
    moved = type(weight)(codes, weight.exponents, weight.scale, weight.bits)
    result = finetune(graph, [[x]], spec, weights={node: (moved,)}, steps=0)
    assert torch.equal(result.weights[node][0].codes, codes)


def test_steps_that_make_it_worse_are_not_kept():
    spec = ShiftQuant(weight_bits=8)
    graph, weights, samples = net(spec, batches=1)
    biases = [c.native.clone() for c in graph.constants.values() if c.ndim == 1]
    found = finetune(graph, samples, spec, weights=weights, steps=2, rate=10.0)
    assert found.after == found.before < found.losses[1]
    for node, quantized in found.weights.items():
        assert all(torch.equal(a.codes, b.codes) for a, b in zip(quantized, weights[node], strict=True))
    assert all(torch.equal(a, c.native) for a, c in zip(biases, (c for c in graph.constants.values() if c.ndim == 1), strict=True))


def test_it_follows_the_seed_and_leaves_the_global_generator_alone():
    def run(seed):
        spec = ShiftQuant(weight_bits=3, seed=seed)
        graph, weights, samples = net(spec)
        state = torch.random.get_rng_state()
        found = finetune(graph, samples, spec, weights=weights, steps=5)
        assert torch.equal(torch.random.get_rng_state(), state)
        return found.losses

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_progress_is_told_after_each_step():
    spec = ShiftQuant(weight_bits=4)
    graph, weights, samples = net(spec)
    told = []
    found = finetune(graph, samples, spec, weights=weights, steps=3, progress=lambda step, loss: told.append((step, loss)))
    assert told == list(enumerate(found.losses, 1))


def test_a_loss_that_is_no_number_stops_and_leaves_the_graph_alone():
    spec = ShiftQuant(weight_bits=4)
    graph, weights, samples = net(spec)
    before = dict(graph.constants)
    samples[1][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(NormfuseError, match=r"loss is nan at step \d of 10; lower the rate"):
        finetune(graph, samples, spec, weights=weights, steps=10)
    assert graph.constants == before


def test_refusals():
    spec = ShiftQuant()
    graph, weights, samples = net(spec)
    with pytest.raises(UsageError, match="there is no batch"):
        finetune(graph, [], spec, weights=weights, steps=1)
    relu = next(n for n in graph if "relu" in str(n.target))
    with pytest.raises(UsageError, match="no linear layer or convolution with a constant weight"):
        finetune(graph, samples, spec, weights={relu: next(iter(weights.values()))}, steps=1)
    half = captured(nn.Linear(4, 4).half(), torch.randn(2, 4).half())
    node = next(n for n in half if "linear" in str(n.target))
    weight = quantize_weight(half.view(node).W.value, spec)
    with pytest.raises(UsageError, match="float16; fine-tuning needs float32"):
        finetune(half, [[torch.randn(2, 4).half()]], spec, weights={node: (weight,)}, steps=1)
