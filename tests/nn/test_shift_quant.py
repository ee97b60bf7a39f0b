"""Layers that train in integers: what they round, and that what they round is right on average."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
import normfuse.nn as nnn
from normfuse.errors import UsageError
from normfuse.quant import shift

IMAGE = (2, 4, 5, 5)
MAKE = {
    "linear": (lambda cls, **kw: cls(12, 5, **kw), (6, 12)),
    "conv": (lambda cls, **kw: cls(4, 6, 3, padding=1, **kw), IMAGE),
    "conv-strided": (lambda cls, **kw: cls(4, 6, 3, stride=2, dilation=2, padding=2, groups=2, **kw), (2, 4, 7, 7)),
    "conv-same": (lambda cls, **kw: cls(4, 6, (3, 5), padding="same", **kw), IMAGE),
    "conv-reflect": (lambda cls, **kw: cls(4, 6, 3, padding=1, padding_mode="reflect", **kw), IMAGE),
}
kinds = pytest.mark.parametrize("kind", MAKE)


def built(kind, **options):
    make, shape = MAKE[kind]
    plain, cls = (nn.Linear, nnn.ShiftQuantLinear) if kind == "linear" else (nn.Conv2d, nnn.ShiftQuantConv2d)
    torch.manual_seed(3)
    old = make(plain)
    new = make(cls, **options)
    new.load_state_dict(old.state_dict(), strict=True)
    return old, new, torch.randn(shape)


def gradients(layer, x, weights):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    (layer(x) * weights).sum().backward()
    return x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()


@kinds
def test_float_everywhere_but_the_weight_is_the_plain_layer_with_quantized_weights(kind):
    old, new, x = built(kind, activation_bits=None, gradient_bits=None)
    with torch.no_grad():
        old.weight.copy_(new.quantized_weight())
    weights = torch.randn_like(old(x))
    torch.testing.assert_close(new(x), old(x))
    for found, expected in zip(gradients(new, x, weights), gradients(old, x, weights), strict=True):
        torch.testing.assert_close(found, expected)


@kinds
def test_forward_is_the_product_of_the_quantized_operands(kind):
    old, new, x = built(kind, bits=4, activation_bits=6, shift_groups=3)
    x[:, 1] *= 0.1  # a channel of another range
    with torch.no_grad():
        old.weight.copy_(new.quantized_weight())
    quantized = shift.shift_quantize(x, 6, 3, 1)
    assert int(quantized.exponents.max()) >= 1
    torch.testing.assert_close(new(x), old(quantized.dequantized()))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_weights_have_one_scale_an_output_and_all_their_codes(kind):
    _, new, _ = built(kind, bits=3)
    found, w = new.quantized_weight(), new.weight
    step = w.abs().flatten(1).amax(1).reshape(-1, *[1] * (w.ndim - 1)) / 3
    codes = found / step
    torch.testing.assert_close(codes, codes.round())
    assert bool(((found - w).abs() <= step * 0.5001).all())
    assert bool((codes.abs().flatten(1).amax(1).round() == 3).all())


@kinds
def test_eight_bits_are_close_to_the_gradients_in_float64(kind):
    old, new, x = built(kind, bits=8)
    exact = copy.deepcopy(old).double()
    weights = torch.randn_like(old(x))
    for found, expected in zip(gradients(new, x, weights), gradients(exact, x.double(), weights.double()), strict=True):
        error = float((found - expected).norm() / expected.norm())
        assert error < 0.03
    with torch.no_grad():
        expected = exact(x.double())
        assert float((new(x) - expected).norm() / expected.norm()) < 0.02


@kinds
def test_gradients_have_no_bias(kind):
    """The mean over many draws is the gradient of the quantized operands; the bound is 6 standard errors."""
    _, new, x = built(kind, bits=8, gradient_bits=3)
    _, exact, _ = built(kind, bits=8, gradient_bits=None)
    weights = torch.randn_like(exact(x)) * torch.logspace(0, -2, exact(x).shape[1]).reshape(-1, *[1] * (x.ndim - 2))
    expected = gradients(exact, x, weights)[:2]
    draws = [gradients(new, x, weights)[:2] for _ in range(400)]
    for i in range(2):
        found = torch.stack([d[i] for d in draws]).double()
        noise = found.std(0) / len(draws) ** 0.5
        assert float(noise.mean()) > 0
        assert bool(((found.mean(0) - expected[i]).abs() <= 6 * noise + 1e-5).all())


def test_nearest_rounding_of_gradients_would_be_biased():
    """The test above can fail: with a fixed draw the gradient is off."""
    _, new, x = built("linear", gradient_bits=3)
    _, exact, _ = built("linear", gradient_bits=None)
    weights = torch.randn(6, 5)
    found, expected = gradients(new, x, weights)[1], gradients(exact, x, weights)[1]
    assert not torch.allclose(found, expected, rtol=1e-2)


def test_draws_follow_the_seed_and_leave_the_global_generator_alone():
    x, weights = torch.randn(6, 12), torch.randn(6, 5)

    def run(seed):
        _, layer, _ = built("linear", gradient_bits=2, seed=seed)
        return [gradients(layer, x, weights)[1] for _ in range(2)]

    state = torch.random.get_rng_state()
    layer = nnn.ShiftQuantLinear(12, 5, gradient_bits=2, seed=0)
    state = torch.random.get_rng_state()
    gradients(layer, x, weights)
    assert torch.equal(torch.random.get_rng_state(), state)
    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_backward_keeps_one_byte_a_value_of_the_input(kind):
    _, new, x = built(kind)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        new(x)
    assert [t.dtype for t in kept if t.shape == x.shape] == [torch.int8]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_optimize_sees_a_plain_layer_with_the_quantized_weights(kind):
    _, new, x = built(kind)
    new.eval()
    for fast in (normfuse.optimize(new, (x,)), normfuse.optimize(new)):
        names = [str(n.target) for n in fast.graph.nodes if n.op == "call_function"]
        assert names == ["aten.linear.default" if kind == "linear" else "aten.conv2d.default"]
        constants = dict(fast.named_parameters()) | dict(fast.named_buffers())
        assert any(t.shape == new.weight.shape and torch.allclose(t, new.quantized_weight(), 1e-6, 0) for t in constants.values())
        torch.testing.assert_close(fast(x), new(x))


def test_the_quantizer_finds_the_very_same_integers_again():
    """What was trained is what is deployed: quantizing the quantized weight loses nothing."""
    from normfuse.quant.quantizer import quantize_weight

    _, new, _ = built("linear", bits=4)
    w = new.quantized_weight().detach()
    for exponents in ("range", "search"):
        spec = normfuse.ShiftQuant(weight_bits=4, exponents=exponents)
        again = quantize_weight(w, spec).dequantized()
        torch.testing.assert_close(again.float(), w, rtol=1e-6, atol=1e-7)


def test_rows_of_zeros_and_values_that_are_no_numbers():
    layer = nnn.ShiftQuantLinear(4, 3)
    with torch.no_grad():
        layer.weight[0] = 0
    assert torch.equal(layer(torch.zeros(2, 4)), layer.bias.expand(2, 3))
    assert bool(layer.quantized_weight()[0].eq(0).all())
    assert bool(layer(torch.tensor([[1.0, float("nan"), 0, 0]])).isnan().all())
    out = layer(torch.tensor([[1.0, float("inf"), 0, 0], [1.0, 0, 0, 0]]))
    assert not bool(out.isfinite().any())


def test_an_image_without_a_batch_axis():
    _, new, x = built("conv", gradient_bits=None)
    torch.testing.assert_close(new(x[:1])[0], new(x[0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: nnn.ShiftQuantLinear(4, 3, bits=1), "bits=1", id="bits"),
        pytest.param(lambda: nnn.ShiftQuantLinear(4, 3, activation_bits=9), "activation_bits=9", id="activations"),
        pytest.param(lambda: nnn.ShiftQuantConv2d(4, 3, 3, gradient_bits=0), "gradient_bits=0", id="gradients"),
        pytest.param(lambda: nnn.ShiftQuantConv2d(4, 3, 3, shift_groups=9), "shift_groups=9", id="groups"),
        pytest.param(lambda: nnn.QuantizedL1LayerNorm(4, bits=True), "bits=True", id="bool"),
        pytest.param(lambda: nnn.ShiftQuantLinear(4, 3, seed=-1), "seed=-1", id="seed"),
        pytest.param(lambda: nnn.ShiftQuantLinear(4, 3)(torch.randn(2, 5)), r"input has shape \(2, 5\)", id="features"),
        pytest.param(lambda: nnn.ShiftQuantConv2d(4, 3, 3)(torch.randn(2, 5, 9, 9)), r"input has shape", id="channels"),
        pytest.param(
            lambda: nnn.QuantizedL1LayerNorm(4)(torch.randn(2, 5)), r"expected floating-point values of shape \(…, 4\)", id="norm"
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(UsageError, match=message):
        make()


# -- the norm ------------------------------------------------------------------------------------------------------------


def norms(bits, **options):
    torch.manual_seed(0)
    plain, integers = nnn.L1LayerNorm(16), nnn.QuantizedL1LayerNorm(16, bits=bits, **options)
    with torch.no_grad():
        for p in plain.parameters():
            p.uniform_(0.5, 1.5)
    integers.load_state_dict(plain.state_dict(), strict=True)
    return plain, integers, torch.randn(5, 7, 16) + 0.3


def test_norm_by_hand():
    """x = [1, 2, 3, 6] in 3 bits: q = [0, 1, 2, 3] of step 2 (0.5 and 1.5 to even), m = 2, Σ|q − m| = 4."""
    norm = nnn.QuantizedL1LayerNorm(4, eps=0.0, scale_const=1.0, bits=3, elementwise_affine=False)
    q = torch.tensor([0.0, 1.0, 2.0, 3.0])
    expected = (q - 2) / 1.0  # of step 2/3: codes -3, -1.5 to even -2, 0, 1.5 to even 2
    assert torch.equal((expected * 1.5).round(), torch.tensor([-3.0, -2.0, 0.0, 2.0]))
    torch.testing.assert_close(norm(torch.tensor([[1.0, 2.0, 3.0, 6.0]])), torch.tensor([[-3.0, -2.0, 0.0, 2.0]]) * 2 / 3)


def test_norm_in_eval_mode_is_the_float_one():
    plain, integers, x = norms(4)
    assert torch.equal(integers.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.03), (6, 0.1), (4, 0.4)])
def test_norm_approaches_the_float_one_with_its_bits(bits, bound):
    plain, integers, x = norms(bits)
    expected = plain(x)
    error = float(((integers(x) - expected).norm() / expected.norm()).detach())
    assert bound / 20 < error < bound


def test_norm_gradients_have_no_bias_and_are_close_to_those_in_float64():
    plain, integers, x = norms(8, gradient_bits=4)
    weights = torch.randn_like(x)
    _, exact, _ = norms(8, gradient_bits=None)
    expected = gradients(exact, x, weights)
    draws = [gradients(integers, x, weights) for _ in range(300)]
    for i in range(3):
        found = torch.stack([d[i] for d in draws]).double()
        noise = found.std(0) / len(draws) ** 0.5
        assert bool(((found.mean(0) - expected[i]).abs() <= 6 * noise + 1e-4).all())
    oracle = gradients(plain.double(), x.double(), weights.double())
    for found, wanted in zip(expected, oracle, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_norm_over_two_axes_and_of_one_row():
    norm = nnn.QuantizedL1LayerNorm((3, 4))
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(norm(x)[0], norm(x[0]))


# -- training ------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.fc1, self.norm, self.fc2 = nn.Linear(128, 32), nn.LayerNorm(32), nn.Linear(32, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        return self.fc2(F.relu(self.norm(self.fc1(F.max_pool2d(x, 2, 1, 0)[:, :, ::1, ::1].flatten(1)[:, :128]))))


def test_a_network_learns_in_integers_and_keeps_what_it_learned():
    """Four bits forward and six backward on a task of four classes, from the weights of a plain network."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (256,), generator=generator)
    images = patterns[labels] + 0.7 * torch.randn(256, 1, 8, 8, generator=generator)
    torch.manual_seed(0)
    model = normfuse.nn.convert(Net(), "shiftquant", bits=4, activation_bits=4, gradient_bits=6)
    assert [type(m).__name__ for m in (model.conv, model.fc1, model.fc2)] == [
        "ShiftQuantConv2d", "ShiftQuantLinear", "ShiftQuantLinear",
    ]  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        loss = F.cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = (model.eval()(images).argmax(1) == labels).double().mean()
    assert float(found) > 0.95
